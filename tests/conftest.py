"""Shared fixtures: the checkout and its catalog."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENKIT_QUIET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def judged_lane(monkeypatch):
    """Tests that choose a lane must not leave it to the next test."""
    monkeypatch.delenv("TOKENKIT_LANE", raising=False)
