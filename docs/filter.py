"""Quarto's view of a notebook: nbdev's directives and set-up cells are for tools, not for readers.

Quarto calls this with the notebook's JSON on standard input and reads JSON from standard output. Directives that are
Quarto's own (`#| label: ...`) stay; cells that only configure nbdev, or are marked `#| hide`, go.
"""
import json
import re
import sys

DIRECTIVE = re.compile(r"^#\|\s*(export|exporti|exports|hide_line|default_exp|hide|eval|test)\b(?!:)")


def visible(cell: dict) -> bool:
    source = "".join(cell["source"])
    hidden = re.search(r"^#\|\s*(default_exp|hide)\b(?!:)", source, re.MULTILINE)
    return not (cell["cell_type"] == "code" and (hidden or not source.strip() or "setup" in cell["metadata"].get("tags", [])))


def clean(notebook: dict) -> dict:
    """The notebook without tool cells and directive lines."""
    cells = [cell for cell in notebook["cells"] if visible(cell)]
    for cell in cells:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines(keepends=True)
            cell["source"] = [line for line in lines if not DIRECTIVE.match(line)]
    return {**notebook, "cells": cells}


if __name__ == "__main__":
    json.dump(clean(json.load(sys.stdin)), sys.stdout)
