import importlib
import subprocess
import sys
import types

import pytest

from tokenkit.core.lazy import attach, package_index, public_names


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    heavy = "torch timm transformers numpy nbdev fastcore matplotlib papermill".split()
    assert run(f"import sys, tokenkit; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_library_never_imports_nbdev():
    code = "import sys, tokenkit.core.lanes, tokenkit.core.train, tokenkit.core.plots; print([m for m in ('nbdev', 'fastcore', 'execnb') if m in sys.modules])"
    assert run(code) == "[]"


def test_names_load_on_first_use():
    code = "import sys, tokenkit; a = 'torch' in sys.modules; tokenkit.core.Shelf; print(a, 'torch' in sys.modules)"
    assert run(code) == "False True"


def test_unknown_name_is_an_attribute_error():
    import tokenkit
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        tokenkit.nonsense
    with pytest.raises(ImportError):
        from tokenkit.core import nonsense  # noqa: F401


def test_public_names_are_read_without_running(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("raise SystemExit\n__all__ = ['a', 'b']\n")
    assert public_names(file) == ["a", "b"]
    file.write_text("x = 1\n")
    assert public_names(file) == []


def test_attach_lists_modules_and_names(tmp_path, monkeypatch):
    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("__all__ = ['thing']\nthing = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    package_index.cache_clear()
    importlib.import_module("made_up")
    load, listing = attach("made_up")
    assert listing() == ["one", "thing"]
    assert load("thing") == 1 and isinstance(load("one"), types.ModuleType)
