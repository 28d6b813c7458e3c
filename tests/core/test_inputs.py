"""What a notebook's result depends on: tokenkit.core.inputs."""
import json

import pytest

from tokenkit.core.inputs import files_of, fingerprint, imported_names, library_files, notebook_names, weight_files


@pytest.fixture
def home(tmp_path):
    """A library with two families, lazy packages, and weights."""
    files = {
        "__init__.py": "from .core.lazy import attach", "core/__init__.py": "", "core/lazy.py": "", "core/lanes.py": "import torch",
        "core/table.py": "", "core/table.json": "{}",
        "reduce/__init__.py": "", "reduce/engine.py": "from ..core.lanes import choose",
        "reduce/evit.py": "__all__ = ['EViT']\nfrom .engine import Reducer", "reduce/tome.py": "__all__ = ['ToMe']",
        "text/__init__.py": "", "text/bytes.py": "def late():\n    from tokenkit.core import table",
        "weights/reduce/evit.a.safetensors": "A", "weights/reduce/tome.a.safetensors": "T", "weights/text/bytes.b.safetensors": "B",
        "weights/reduce/tome.partial12": "half", "zoo/__init__.py": "", "zoo/hub.py": "", "zoo/weights/vit-world.safetensors": "Z",
        "zoo/weights/lm-world.json": "{}",
    }
    for name, text in files.items():
        file = tmp_path / "tokenkit" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def write(folder, *sources, name="page", outputs=()):
    cells = [{"cell_type": "code", "source": s, "metadata": {}, "outputs": list(outputs), "execution_count": None} for s in sources]
    file = folder / f"{name}.ipynb"
    file.write_text(json.dumps({"cells": cells}))
    return file


def short(files, home):
    return {f.relative_to(home / "tokenkit").as_posix() for f in files}


@pytest.mark.parametrize("code, package, names", [
    ("import tokenkit.core.lanes as lanes, torch", (), {"tokenkit.core.lanes"}),
    ("from tokenkit.core.lanes import choose, Lane", (), {"tokenkit.core.lanes.choose", "tokenkit.core.lanes.Lane"}),
    ("from tokenkit.reduce import *", (), {"tokenkit.reduce"}),
    ("from .engine import Reducer", ("tokenkit", "reduce"), {"tokenkit.reduce.engine.Reducer"}),
    ("from ..core import lanes", ("tokenkit", "reduce"), {"tokenkit.core.lanes"}),
    ("from . import engine", ("tokenkit", "reduce"), {"tokenkit.reduce.engine"}),
    ("def f():\n    if True:\n        from tokenkit import zoo", (), {"tokenkit.zoo"}),
    ("import tokenkitten", (), set()),
])
def test_imported_names(code, package, names):
    assert imported_names(code, package) == names


@pytest.mark.parametrize("name, files", [
    ("tokenkit.core.lanes", {"core/lanes.py"}), ("tokenkit.core.lanes.choose", {"core/lanes.py"}),
    ("tokenkit.reduce.EViT", {"reduce/evit.py"}), ("tokenkit.text", {"text/__init__.py", "text/bytes.py"}),
    ("tokenkit.text.unknown", {"text/__init__.py", "text/bytes.py"}),
])
def test_files_of(name, files, home):
    assert short(files_of(name, home), home) == files


def test_imports_are_followed_and_packages_count(home):
    assert short(library_files({"tokenkit.reduce.evit.EViT"}, home), home) == {
        "__init__.py", "core/__init__.py", "core/lazy.py", "core/lanes.py", "reduce/__init__.py", "reduce/engine.py", "reduce/evit.py"}


def test_imports_inside_functions_are_followed(home):
    assert "core/table.py" in short(library_files({"tokenkit.text.bytes"}, home), home)


@pytest.mark.parametrize("source", ["importlib.import_module('tokenkit.' + name)", "def broken(:"])
def test_code_that_could_import_anything_depends_on_everything(source):
    assert notebook_names([{"cell_type": "code", "source": source}]) == {"tokenkit"}


def test_ipython_syntax_is_understood():
    cells = [{"cell_type": "code", "source": "%matplotlib inline\n!ls\nfrom tokenkit.zoo import load\nload?"},
             {"cell_type": "markdown", "source": "import tokenkit.text"}]
    assert notebook_names(cells) == {"tokenkit.zoo.load"}


def test_weights_of_imported_families_count_and_own_ones_are_outputs_of_the_long_lane(home, monkeypatch):
    monkeypatch.delenv("TOKENKIT_WEIGHTS", raising=False)
    monkeypatch.delenv("TOKENKIT_ZOO", raising=False)
    modules = library_files({"tokenkit.reduce.evit"}, home)
    both = {"weights/reduce/evit.a.safetensors", "weights/reduce/tome.a.safetensors"}
    assert short(weight_files("reduce/evit", modules, "cpu", home), home) == both
    assert short(weight_files("reduce/evit", modules, "long", home), home) == {"weights/reduce/tome.a.safetensors"}
    assert short(weight_files("text/page", modules, "cpu", home), home) == both | {"weights/text/bytes.b.safetensors"}
    zoo = library_files({"tokenkit.zoo.hub"}, home)
    assert short(weight_files("reduce/new", zoo, "cpu", home), home) == both | {"zoo/weights/vit-world.safetensors", "zoo/weights/lm-world.json"}
    assert short(weight_files("zoo/vit_world", zoo, "long", home), home) == {"zoo/weights/lm-world.json"}


def keys(home, page, **changes):
    call = dict(path="reduce/evit", lane="cpu", parameters={}, root=home) | changes
    return fingerprint(page, **call)


def test_fingerprint_sees_what_matters_and_nothing_else(home, monkeypatch):
    monkeypatch.delenv("TOKENKIT_WEIGHTS", raising=False)
    source = "from tokenkit.reduce import EViT\nfrom tokenkit.core import table"
    page = write(home, source)
    key = keys(home, page)
    assert keys(home, write(home, source, outputs=["a result"], name="run")) == key
    assert keys(home, write(home, source + "\n", name="edited")) != key
    assert keys(home, page, lane="long") != key and keys(home, page, parameters={"seed": 1}) != key
    for name, counts in (("text/bytes.py", False), ("weights/text/bytes.b.safetensors", False), ("reduce/tome.py", False),
                         ("reduce/engine.py", True), ("core/lanes.py", True), ("core/table.json", True), ("weights/reduce/evit.a.safetensors", True)):
        file = home / "tokenkit" / name
        before = file.read_text()
        file.write_text(before + "# changed")
        assert (keys(home, page) != key) == counts, name
        file.write_text(before)
    assert keys(home, page) == key


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": [{}]}'])
def test_what_is_no_notebook_is_refused(text, tmp_path):
    (tmp_path / "bad.ipynb").write_text(text)
    with pytest.raises(ValueError, match="is not a notebook"):
        fingerprint(tmp_path / "bad.ipynb", "toy/bad", "cpu", {}, tmp_path)
