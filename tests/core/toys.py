"""Tiny notebooks for the tests of jobs, runner and command line."""
import json
from pathlib import Path
from types import SimpleNamespace


def cell(source, tag=None):
    return {"cell_type": "code", "id": "", "source": source, "metadata": {"tags": [tag]} if tag else {}, "outputs": [], "execution_count": None}


def write(file: Path, *sources, parameters=None, front=None):
    """A notebook of code cells, with a cell tagged "parameters" in front if `parameters` has its source."""
    cells = [cell(parameters, "parameters")] if parameters else []
    cells += [cell(source) for source in sources]
    if front:
        cells.insert(0, {"cell_type": "raw", "id": "", "source": front, "metadata": {}})
    for i, c in enumerate(cells):
        c["id"] = f"cell-{i:03d}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return file


def entry(folder: Path, name: str, *sources, **options):
    """A stand-in for a catalog entry."""
    return SimpleNamespace(path=f"toy/{name}", notebook=write(folder / f"{name}.ipynb", *sources, **options))


def text_of(file: Path) -> str:
    """All text that a notebook's cells printed or returned."""
    outputs = [o for c in json.loads(file.read_text())["cells"] for o in c.get("outputs", [])]
    return "".join("".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in outputs)
