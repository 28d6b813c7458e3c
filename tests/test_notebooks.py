"""Every notebook runs from top to bottom: all on the cpu lane, methods also in the gpu lane's rehearsal.

Two notebooks run at a time with one thread each. A notebook that ran before and whose inputs are unchanged is not run again.
"""
import json
import math
import warnings

import pytest

from tokenkit.core.catalog import load_catalog
from tokenkit.core.claims import claims_of
from tokenkit.core.runner import run_notebooks

CATALOG = load_catalog()
ALL = sorted(CATALOG.entries)
REHEARSED = [e.path for e in CATALOG if e.kind == "method"]
BUDGET = 60  # seconds a notebook should take on the cpu lane, by itself on two cores


def run(paths, lane, root):
    results = run_notebooks([CATALOG.entries[p] for p in paths], jobs=2, lane=lane, out=root / "_runs")
    return {r.path: r for r in results}


@pytest.fixture(scope="session")
def executed(root):
    return run(ALL, "cpu", root)


@pytest.fixture(scope="session")
def rehearsed(root):
    return run(REHEARSED, "rehearsal", root)


def verdict(file):
    return claims_of(json.loads(file.read_text(encoding="utf-8")))


def close(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    return a == b if isinstance(a, (str, bool)) else math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)


@pytest.mark.network
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", ALL)
def test_notebook_runs(path, executed):
    result = executed[path]
    assert result.status != "failed", str(result.error)
    if result.seconds > BUDGET:
        warnings.warn(f"{path} took {result.seconds:.0f} s beside another notebook", stacklevel=1)


@pytest.mark.network
@pytest.mark.parametrize("path", [p for p in ALL if CATALOG.entries[p].kind in ("method", "engine", "family")])
def test_stored_verdict_is_this_verdict(path, executed):
    """What the committed notebook shows is what running it gives."""
    fresh, stored = verdict(executed[path].output), verdict(CATALOG.entries[path].notebook)
    assert [(r["kind"], r["outcome"]) for r in fresh] == [(r["kind"], r["outcome"]) for r in stored], "run `make outputs`"
    for new, old in zip(fresh, stored):
        if new["kind"] == "claim" and not close(new["measured"], old["measured"]):
            warnings.warn(f"{path}: {new['statement']}: {old['measured']} stored, {new['measured']} here", stacklevel=1)


@pytest.mark.network
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", REHEARSED)
def test_gpu_lane_rehearsal(path, rehearsed):
    assert rehearsed[path].status != "failed", str(rehearsed[path].error)


def test_time_report(executed, capsys):
    """Not a check: where the minutes go."""
    with capsys.disabled():
        print("\nseconds  notebook (cpu lane, two at a time)")
        for r in sorted(executed.values(), key=lambda r: -r.seconds)[:20]:
            print(f"{r.seconds:7.1f}  {r.path}")
        print(f"{sum(r.seconds for r in executed.values()):7.1f}  all {len(executed)}")
