import importlib.util
import json
import re

import yaml

from tokenkit.core.catalog import Catalog, Entry, load_catalog
from tokenkit.core.docs import in_order, methods_table, sidebar


def entry(path, kind, **more):
    paper = {"title": "P", "year": 2024, "venue": "V", "arxiv": "2401.00001"} if kind == "method" else None
    return Entry(path, kind, path.upper(), "what it does", path.split("/")[0], paper, **more)


CATALOG = Catalog({e.path: e for e in (entry("text/index", "family"), entry("text/b", "method"), entry("text/engine", "engine"),
                                       entry("reduce/a", "method", code="https://example.org"), entry("core/index", "family"))})


def test_families_and_methods_are_in_order():
    assert {f: [e.name for e in es] for f, es in in_order(CATALOG).items()} == {"reduce": ["a"], "text": ["index", "engine", "b"]}


def test_table_links_every_paper():
    rows = methods_table(CATALOG, prefix="../").splitlines()[2:]
    assert len(rows) == 2 and "(../reduce/a.ipynb)" in rows[0] and "[official](https://example.org)" in rows[0] and "none published" in rows[1]


def test_navigation_is_yaml_and_complete():
    contents = yaml.safe_load(sidebar(load_catalog()))["website"]["sidebar"]["contents"]
    linked = {s.get("href") for s in contents} | {p["href"] for s in contents for p in s.get("contents", [])}
    assert {f"nbs/{e.path}.ipynb" for e in load_catalog()} <= linked


def test_home_page_and_readme_show_every_method(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert methods_table(load_catalog(), prefix="nbs/") in text, "run `tokenkit run index --in-place`, then `make export`"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (root / target).exists(), target


def filter_module(root):
    spec = importlib.util.spec_from_file_location("quarto_filter", root / "docs" / "filter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quarto_sees_no_tool_cells(root):
    clean = filter_module(root).clean
    for e in load_catalog():
        cells = clean(json.loads(e.notebook.read_text(encoding="utf-8")))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert not re.search(r"^(#\| (export|default_exp|hide)|\s*%pip)", text, re.MULTILINE)
        assert cells[0]["cell_type"] == "raw"


def test_quartos_own_options_stay(root):
    cell = {"cell_type": "code", "metadata": {}, "source": ["#| fig-alt: a cat\n", "#| export\n", "x = 1"], "outputs": []}
    assert filter_module(root).clean({"cells": [cell]})["cells"][0]["source"] == ["#| fig-alt: a cat\n", "x = 1"]
