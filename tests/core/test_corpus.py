"""The text of the running Python: what is read, what is left out, what is held out."""
import ast
import importlib
import json
import re
import sys

import pytest

from tokenkit.core import corpus
from tokenkit.core.corpus import (SHORTEST, SMALLEST, Document, deduplicate, docstrings, frequent_words, held_out, package_documents,
                                  source_files, stdlib_code, stdlib_documents, stdlib_folder, stdlib_text, topics)

SOURCE = '''"""A module."""
import nowhere_to_be_found

class Stack:
    """Last in, first out."""
    if True:
        def pop(self):
            """Remove the newest item.

               Indented more.
            """
    try:
        pass
    except ImportError:
        async def push(self, item):
            "Add an item.   "

def silent():
    return """not a docstring"""
'''


def squash(text):
    return " ".join(text.split()).lower()


def test_docstrings_are_read_and_nothing_is_run():
    found = docstrings(SOURCE, "demo")
    assert [d.name for d in found] == ["demo", "demo.Stack", "demo.Stack.pop", "demo.Stack.push"]
    assert {d.module for d in found} == {"demo"} and found[2].text == "Remove the newest item.\n\nIndented more."
    assert docstrings(SOURCE.encode(), "demo") == found
    with pytest.raises(SyntaxError):
        docstrings("def", "demo")


def test_source_files(tmp_path):
    for name in ("b.py", "a/__init__.py", "a/c.py", "a/test/d.py", "tests/e.py", "telnetlib.py", "config-3/f.py", "a/data.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert list(source_files(tmp_path)) == ["a", "a.c", "b"]
    assert list(source_files(tmp_path, "top", left_out=["a"])) == ["top.b", "top.telnetlib", "top.tests.e"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no Python source"):
        source_files(tmp_path / "empty")


def test_topics(tmp_path):
    assert topics(tmp_path) == []
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'with': ' The with statement. ', 'if': 'The if statement.'}\n")
    assert topics(tmp_path) == [Document("topics.if", "topics.if", "The if statement."), Document("topics.with", "topics.with", "The with statement.")]


def test_a_module_is_held_out_whole_and_with_its_implementation():
    modules = list(source_files(stdlib_folder()))
    for module in modules:
        assert held_out(module) == held_out(module.split(".")[0])
    assert held_out("datetime") == held_out("_pydatetime") and held_out("json") == held_out("_json") == held_out("JSON")
    assert 0.04 < sum(map(held_out, modules)) / len(modules) < 0.2
    assert len({held_out(f"topics.{i}") for i in range(100)}) == 2, "topics are drawn one by one"


def test_paragraphs_stand_once():
    header = "Licensed to whoever reads this header, which stands at the top of every single file."
    first, second = Document("a", "a", f"{header}\n\nThe first page says something."), Document("b", "b", f"{header.upper()}\n \nSo does the second page, and more.")
    assert [d.text for d in deduplicate([first, second])] == [first.text, "So does the second page, and more."]
    whole = Document("c", "c", "A document of less than sixty letters.")
    assert deduplicate([whole, whole._replace(name="again"), whole._replace(text=whole.text + " Not quite.")])[1:] == [whole._replace(text=whole.text + " Not quite.")]
    assert deduplicate([Document("a", "a", "Short.")]) == []
    example = Document("a", "a", "Example:\n\n" + "x" * SHORTEST)
    assert [d.text[:8] for d in deduplicate([example, example._replace(text="Example:\n\n" + "y" * SHORTEST)])] == ["Example:"] * 2


def test_nothing_of_the_training_text_is_held_out():
    train, test = stdlib_documents("train"), stdlib_documents("held-out")
    assert len(train) > 5000 and len(test) > 300 and len(stdlib_documents("all")) == len(train) + len(test)
    assert not {d.module for d in train} & {d.module for d in test}
    seen = {squash(p) for d in train for p in re.split(r"\n\s*\n", d.text)}
    again = {squash(p) for d in test for p in re.split(r"\n\s*\n", d.text) if len(squash(p)) >= SHORTEST}
    assert not seen & again and [d.text for d in test] == stdlib_text("held-out")
    assert all(len(d.text) >= SMALLEST for d in train + test)


def test_code_follows_the_same_split():
    code = stdlib_code("held-out")
    assert all(held_out(d.module) for d in code) and [d.module for d in code] == [m for m in source_files(stdlib_folder()) if held_out(m)]
    ast.parse(max(code, key=lambda d: len(d.text)).text)


@pytest.mark.parametrize("reader", [stdlib_documents, stdlib_text, stdlib_code])
def test_unknown_splits_are_refused(reader):
    with pytest.raises(ValueError, match="split must be one of train, held-out, all, got 'test'"):
        reader("test")


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A standard library of two modules, and a cache of its own."""
    library, cache = tmp_path / "lib", tmp_path / "cache"
    library.mkdir()
    (library / "one.py").write_text('"""The documentation of one module."""\n')
    (library / "two.py").write_text('"""The documentation of another module."""\n')
    monkeypatch.setattr(corpus, "stdlib_folder", lambda: library)
    monkeypatch.setattr(corpus, "cache_dir", lambda: cache)
    corpus._stdlib.cache_clear()
    yield library, cache
    corpus._stdlib.cache_clear()


def test_the_cache_is_used_and_follows_the_files(small_library):
    library, cache = small_library
    fresh = corpus._stdlib()
    (kept,) = cache.iterdir()
    assert sorted(d.name for d in fresh) == ["one", "two"]
    corpus._stdlib.cache_clear()
    kept.write_text(json.dumps([["from", "the", "cache"]]))
    assert corpus._stdlib() == (Document("from", "the", "cache"),)
    for broken in ("{", "[[1]]", "[3]"):
        corpus._stdlib.cache_clear()
        kept.write_text(broken)
        assert corpus._stdlib() == fresh
    corpus._stdlib.cache_clear()
    (library / "three.py").write_text('"""The documentation of a third module."""\n')
    assert len(corpus._stdlib()) == 3 and len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(small_library):
    _, cache = small_library
    cache.write_text("a file where the folder should be")
    assert len(corpus._stdlib()) == 2


def test_other_packages_are_read_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "corpus_demo"
    (package / "part").mkdir(parents=True)
    (package / "tests").mkdir()
    (package / "__init__.py").write_text('"""A package that must not be imported."""\nraise RuntimeError\n')
    (package / "part" / "__init__.py").write_text('"""A part of the package, with documentation."""\n')
    (package / "old.py").write_text("print 'no Python 3'\n")
    (package / "tests" / "test_it.py").write_text('"""Documentation of a test, which is left out."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert [d.name for d in package_documents("corpus_demo")] == ["corpus_demo", "corpus_demo.part"]
    assert [d.name for d in package_documents("corpus_demo.part")] == ["corpus_demo.part"]
    assert "corpus_demo" not in sys.modules
    for name in ("corpus_demo.missing", "no_such_package", "../etc", "", "corpus_demo.old.more"):
        with pytest.raises(ValueError, match="package must be an installed package"):
            package_documents(name)


def test_frequent_words(monkeypatch):
    pytest.importorskip("wordfreq")
    words = frequent_words("pt", 50)
    assert len(words) == 50 and words == sorted(words, key=lambda row: -row[1]) and 0 < words[0][1] < 1
    with pytest.raises(ValueError, match="language must be one of"):
        frequent_words("xx")
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        frequent_words(count=0)
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(ModuleNotFoundError, match=r"tokenkit\[text\]"):
        frequent_words()
