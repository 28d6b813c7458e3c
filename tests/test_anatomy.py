"""Every notebook has the anatomy that a reader relies on, and its module and tests keep the house rules."""
import ast
import json
import re

import pytest

from tokenkit.core.catalog import load_catalog
from tokenkit.core.claims import claims_of

CATALOG = load_catalog()
ALL = sorted(CATALOG.entries)
METHODS = [e.path for e in CATALOG.methods()]
SECTIONS = ["The claim", "The idea", "Build it", "Use it", "Does it work?", "Verdict", "Limits and what to try next", "References"]
LONGEST_MODULE, LONGEST_CELL, LARGEST_OUTPUT = 300, 66, 900_000


def book(path):
    return json.loads(CATALOG.entries[path].notebook.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(path):
    return [c for c in book(path)["cells"] if c["cell_type"] == "code"]


def tagged(path, tag):
    return [c for c in book(path)["cells"] if tag in c["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", ALL)
def test_outputs_are_whole_clean_and_small(path):
    cells = code_cells(path)
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"]), "an error is stored"
    assert all(c["execution_count"] for c in cells if source(c).strip()), "run it: tokenkit run NAME --in-place"
    text = json.dumps(book(path))
    assert not re.search(r"/(work|tmp|home|root|Users)/", text), "a path of one machine"
    assert sum(len(json.dumps(c["outputs"])) for c in cells) < LARGEST_OUTPUT
    assert not any("papermill" in c["metadata"] for c in book(path)["cells"]) and "papermill" not in book(path)["metadata"]


@pytest.mark.parametrize("path", ALL)
def test_generated_cells(path):
    if CATALOG.entries[path].kind == "home":
        return
    badge, setup = tagged(path, "badges"), tagged(path, "setup")
    assert len(badge) == len(setup) == 1 and "colab" in source(badge[0]) and "pip install" in source(setup[0])
    first_code = code_cells(path)[0]
    assert "setup" in first_code["metadata"]["tags"], "the first code cell installs tokenkit where it is missing"


@pytest.mark.parametrize("path", METHODS)
def test_method_sections_in_order(path):
    found = re.findall(r"^## (.+?)\s*$", "\n".join(source(c) for c in book(path)["cells"] if c["cell_type"] == "markdown"), re.MULTILINE)
    assert [s for s in found if s in SECTIONS] == SECTIONS, f"sections: {found}"


@pytest.mark.parametrize("path", METHODS)
def test_method_parameters_and_lanes(path):
    cells = tagged(path, "parameters")
    assert len(cells) == 1 and source(cells[0]).split() == ["lane", "=", '"cpu"', "seed", "=", "0"]
    assert sum("choose(" in source(c) and "gpu=" in source(c) for c in code_cells(path)) == 1, "one cell says what differs between lanes"


@pytest.mark.parametrize("path", METHODS)
def test_method_verdict(path):
    rows = claims_of(book(path))
    claims = [r for r in rows if r["kind"] == "claim"]
    assert claims and all(r["passed"] for r in claims)
    assert any(not r["record"] for r in claims), "at least one claim is measured live"


@pytest.mark.parametrize("path", METHODS)
def test_method_shows_figures(path):
    assert sum("image/png" in o.get("data", {}) for c in code_cells(path) for o in c["outputs"]) >= 2


@pytest.mark.parametrize("path", METHODS)
def test_method_has_tests(path, root):
    family, name = path.split("/")
    assert (root / "tests" / family / f"test_{name}.py").exists()


@pytest.mark.parametrize("path", ALL)
def test_cells_fit_in_the_head(path):
    long = [source(c).splitlines()[1] for c in code_cells(path) if source(c).startswith("#| export") and len(source(c).splitlines()) > LONGEST_CELL]
    assert not long, f"cells over {LONGEST_CELL} lines: {long}"


MODULES = sorted(p for p in (CATALOG.find("core/catalog").notebook.parents[2] / "tokenkit").rglob("*.py") if p.name != "_modidx.py")


@pytest.mark.parametrize("module", MODULES, ids=lambda p: "/".join(p.parts[-2:]))
def test_module_keeps_the_house_rules(module):
    text = module.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_MODULE
    assert ".cuda(" not in text and "import *" not in text
    public = next((ast.literal_eval(n.value) for n in ast.parse(text).body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
    bare = [n.name for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public and not ast.get_docstring(n)]
    assert not bare, f"public names without a docstring: {bare}"
