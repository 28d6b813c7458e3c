import math

import numpy as np
import pytest
import torch

from tokenkit.core.claims import MIME, ClaimFailed, above, at_least, at_most, below, claim, claims_of, equals, format_value, holds, report


@pytest.fixture
def shown(monkeypatch):
    rows = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: rows.append(data))
    return rows


def test_a_claim_that_holds_is_shown_and_stored(shown):
    claim("a", paper="b", measured=torch.tensor(1.5), criterion=at_least(1.4))
    row = shown[0][MIME]
    assert row["passed"] and row["measured"] == 1.5 and row["criterion"] == "≥ 1.4"
    assert "<table" in shown[0]["text/html"] and "✅" in shown[0]["text/plain"]


def test_a_claim_that_fails_is_shown_and_raises(shown):
    with pytest.raises(ClaimFailed, match="a: measured 1.3, criterion ≥ 1.4"):
        claim("a", paper="b", measured=1.3, criterion=at_least(1.4))
    assert shown[0][MIME]["passed"] is False


@pytest.mark.parametrize("value", [math.nan, math.inf, {"x": math.nan}])
def test_what_is_not_finite_never_passes(shown, value):
    with pytest.raises(ClaimFailed):
        claim("a", paper="b", measured=value, criterion=holds("anything", lambda m: True))


@pytest.mark.parametrize("criterion, good, bad", [(at_least(1), 1, 0.9), (at_most(1), 1, 1.1), (above(1), 1.1, 1), (below(1), 0.9, 1), (equals(3), 3, 2)])
def test_criteria(criterion, good, bad):
    assert criterion.test(good) and not criterion.test(bad)


def test_nothing_is_judged_in_a_rehearsal(shown, monkeypatch):
    monkeypatch.setenv("TOKENKIT_LANE", "rehearsal")
    claim("a", paper="b", measured=0.0, criterion=at_least(1))
    assert shown[0][MIME]["outcome"] == "unjudged" and shown[0][MIME]["passed"] is None


def test_report_is_not_judged(shown):
    report("a", paper="b", measured={"x": np.float32(2)}, why="timing")
    assert shown[0][MIME]["kind"] == "report" and shown[0][MIME]["passed"] is None


@pytest.mark.parametrize("call, message", [
    (lambda: claim("", paper="b", measured=1, criterion=at_least(0)), "needs a statement"),
    (lambda: claim("a", paper="b", measured=1, criterion=True), "criterion must be a Criterion"),
    (lambda: claim("a", paper="b", measured=[1], criterion=at_least(0)), "measured must be a number"),
    (lambda: report("a", paper="b", measured=1, why=""), "why it is not judged"),
    (lambda: at_least(math.nan), "finite limit"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_claims_are_found_in_a_notebook():
    row = {"statement": "s"}
    notebook = {"cells": [{"outputs": [{"data": {MIME: row}}, {"text": "x"}]}, {"cell_type": "markdown"}]}
    assert claims_of(notebook) == [row]


def test_values_are_readable():
    assert format_value({"a": 0.12345, "b": 3}) == "a 0.123, b 3"
    assert format_value(1e-5) == "1.00e-05" and format_value(12345.6) == "12,346" and format_value(0.0) == "0"


def test_html_is_escaped(shown):
    claim("<b>", paper="x", measured=1, criterion=at_least(0))
    assert "&lt;b&gt;" in shown[0]["text/html"]
