"""All verdicts in one table: tokenkit.core.results."""
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from tokenkit.core.claims import MIME
from tokenkit.core.results import as_json, counted, escaped, gather, markdown, table, tally, to_html


def claim(statement="Half suffices", outcome="pass", **changes):
    return {"kind": "claim", "statement": statement, "paper": "a | b", "measured": {"half": 0.91234, "all": 0.92}, "criterion": "≥ 0.9",
            "outcome": outcome, "passed": outcome == "pass", "record": False, "why": ""} | changes


ROWS = {"reduce/halving": [claim(), claim("It is faster", "report", criterion="", why="timings", record=True, measured=1.4)],
        "decode/tree": [claim("Trees *win*", "fail")], "decode/silent": []}


@pytest.fixture
def verdicts(tmp_path):
    entries = [SimpleNamespace(path=path, title=path.title()) for path in [*ROWS, "decode/missing"]]
    for path, rows in ROWS.items():
        file = tmp_path / f"{path}.ipynb"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ""}, {"outputs": [{"data": {MIME: r}} for r in rows]}]}))
    return gather(entries, lambda entry: tmp_path / f"{entry.path}.ipynb")


def test_gather_keeps_order_and_entries_without_a_verdict(verdicts):
    assert [(v.path, v.name, len(v.claims)) for v in verdicts] == [
        ("reduce/halving", "halving", 2), ("decode/tree", "tree", 1), ("decode/silent", "silent", 0), ("decode/missing", "missing", 0)]
    assert tally(verdicts) == {"pass": 1, "report": 1, "fail": 1}
    assert counted(verdicts) == "Findings: 3, from 2 of 4 notebooks: 1 held, 1 failed, 1 reported without judgement."
    assert gather([SimpleNamespace(path="a/b", title="")], lambda entry: None)[0].claims == []


def test_table_shows_every_claim(verdicts):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(table(verdicts))
    text = console.export_text()
    for words in ("reduce/halving", "Half suffices", "half 0.912, all 0.92", "≥ 0.9", "holds", "1.4 (recorded)", "timings", "does not hold", "a | b"):
        assert words in text


def test_markdown_is_a_page_with_a_table_for_each_family(verdicts):
    text = markdown(verdicts, prefix="../nbs/")
    assert text.startswith("---\ntitle: Results\n") and text.index("## reduce") < text.index("## decode")
    assert "| [halving](../nbs/reduce/halving.ipynb) | Half suffices | a \\| b | half 0.912, all 0.92 | ≥ 0.9 | ✅ holds |" in text
    assert "Trees \\*win\\*" in text and "1.4 (recorded)" in text and "`decode/silent`, `decode/missing`" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 7 for line in rows), "every row has six cells"


def test_markdown_escapes():
    assert escaped("a|b\n*c* <d> $e$ [f](g) `h` ~i~ \\") == "a\\|b \\*c\\* \\<d\\> \\$e\\$ \\[f\\](g) \\`h\\` \\~i\\~ \\\\"


def test_json_holds_everything(verdicts):
    found = json.loads(as_json(verdicts))
    assert found["tally"] == {"pass": 1, "report": 1, "fail": 1} and found["without_verdict"] == ["decode/silent", "decode/missing"]
    assert found["claims"][0] == {"path": "reduce/halving", "title": "Reduce/Halving", **ROWS["reduce/halving"][0]}


def test_html_is_for_reading(tmp_path):
    cells = [("raw", "---\ntitle: x\nsecret: front\n---", []), ("markdown", "", ["badges"]), ("code", "import setup_cell", ["setup"]),
             ("code", "lane = 'gpu'", ["injected-parameters"]), ("code", "#| default_exp reduce.x", []), ("code", "#| export\nvalue = 1", [])]
    book = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [
        {"cell_type": kind, "id": f"c{i}", "source": source, "metadata": {"tags": tags}} | ({"outputs": [], "execution_count": 1} if kind == "code" else {})
        for i, (kind, source, tags) in enumerate(cells)]}
    (tmp_path / "x.ipynb").write_text(json.dumps(book))
    page = to_html(tmp_path / "x.ipynb", "A title", "What it does.")
    text = page.read_text()
    assert page == tmp_path / "x.html" and "A title</h1>" in text.replace("<a", "</h1><a") and "What it does." in text and "value" in text
    for hidden in ("secret", "setup_cell", "default_exp", "#| export", "injected"):
        assert hidden not in text.split("<body")[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.html", "x.ipynb"]
