import json

import pytest

from tokenkit.core.catalog import badges, entry_of, front_matter, load_catalog, near, refresh_cells, scan, settings, setup_cell

METHOD = {"title": "T", "description": "d", "kind": "method", "family": "reduce", "code": None, "lanes": {"cpu": "1 s"},
          "paper": {"title": "P", "year": 2024, "venue": "V", "arxiv": "2401.00001"}}


def notebook(meta=METHOD, cells=()):
    text = "---\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in meta.items()) + "\n---"
    raw = {"cell_type": "raw", "metadata": {}, "source": [text]}
    return {"cells": [raw, *cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def write(nbs, path, meta=METHOD, cells=()):
    file = nbs / f"{path}.ipynb"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(notebook(meta, cells)))
    return file


def test_scan_reads_front_matter(tmp_path):
    write(tmp_path, "reduce/a")
    write(tmp_path, "core/b", {"title": "B", "description": "b", "kind": "core"})
    catalog = scan(tmp_path)
    assert [e.name for e in catalog.methods()] == ["a"] and catalog.find("a").paper["year"] == 2024
    assert catalog.find("reduce/a") is catalog.find("a") and catalog.families() == ["reduce"]


def test_two_methods_of_one_name(tmp_path):
    write(tmp_path, "reduce/a")
    write(tmp_path, "vision/a", {**METHOD, "family": "vision"})
    with pytest.raises(ValueError, match="two methods are called a"):
        scan(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"kind": "mehtod"}, "kind must be one of"), ({"family": "vision"}, "family must be its folder 'reduce'"),
    ({"paper": {"title": "P"}}, "paper must state year, venue, arxiv"), ({"colour": "red"}, "unknown front matter .'colour'."),
])
def test_bad_front_matter(change, message):
    with pytest.raises(ValueError, match=message):
        entry_of({**METHOD, **change}, "reduce/a")


@pytest.mark.parametrize("field", ["title", "description", "paper", "code", "lanes"])
def test_missing_field_is_named(field):
    with pytest.raises(ValueError, match=f"reduce/a: a method notebook must state {field}"):
        entry_of({k: v for k, v in METHOD.items() if k != field}, "reduce/a")


def test_notebook_without_front_matter():
    with pytest.raises(ValueError, match="first cell must be raw"):
        front_matter({"cells": [{"cell_type": "code", "source": []}]}, "x")


def test_unknown_names_suggest(tmp_path):
    write(tmp_path, "reduce/evit")
    catalog = scan(tmp_path)
    with pytest.raises(ValueError, match="no notebook 'evti', did you mean 'evit'?"):
        catalog.find("evti")
    with pytest.raises(ValueError, match="no family 'redcue', did you mean 'reduce'?"):
        catalog.methods("redcue")
    assert near("zzz", ["evit"]) == ""


def test_generated_cells_follow_settings(tmp_path, root):
    cells = [{"cell_type": "markdown", "metadata": {"tags": ["badges"]}, "source": []},
             {"cell_type": "code", "metadata": {"tags": ["setup"]}, "source": [], "outputs": []}]
    file, cfg = write(tmp_path, "reduce/a", METHOD, cells), {**settings(root), "user": "someone", "repo": "elsewhere"}
    cfg["git_url"] = "https://github.com/someone/elsewhere"
    entry = entry_of(METHOD, "reduce/a")
    assert refresh_cells(file, entry, cfg) and not refresh_cells(file, entry, cfg)
    text = file.read_text()
    assert "github/someone/elsewhere/blob/main/nbs/reduce/a.ipynb" in text and "git+https://github.com/someone/elsewhere@main" in text
    assert "arxiv.org/abs/2401.00001" in badges(entry, cfg) and "official" not in badges(entry, cfg)
    assert "notebooks,reduce" in setup_cell(entry, cfg)


def test_packaged_catalog_is_current(root):
    assert load_catalog() == scan(root / "nbs"), "run `make export`"


def test_every_notebook_has_its_module_and_the_other_way_round(root):
    catalog = load_catalog()
    modules = {p.relative_to(root / "tokenkit").with_suffix("").as_posix() for p in (root / "tokenkit").rglob("*.py")}
    exported = {e.path.removesuffix("index") + "__init__" if e.name == "index" else e.path for e in catalog if e.kind != "home"}
    assert modules - exported - {"__init__", "_modidx"} == set(), "a module has no notebook"
    assert {e.path for e in catalog.methods()} <= modules, "a method exports no module"
