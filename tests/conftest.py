"""Shared fixtures: the checkout and its catalog."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENKIT_QUIET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for each other
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def judged_lane(monkeypatch):
    """Tests that choose a lane must not leave it to the next test."""
    monkeypatch.delenv("TOKENKIT_LANE", raising=False)
