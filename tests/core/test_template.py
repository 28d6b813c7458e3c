"""The template of a new method: tokenkit.core.template. That it runs is tested through the command line."""
import ast
import json

import pytest

from tokenkit.core.catalog import entry_of, front_matter
from tokenkit.core.template import write_new


@pytest.fixture
def repository(tmp_path):
    for folder in ("nbs/reduce", "nbs/decode", "nbs/core", "nbs/zoo", "nbs/.ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_what_is_written_is_valid(repository):
    book, tests = write_new("big_tokens", "reduce", repository, 'The "big" ones')
    assert (book, tests) == (repository / "nbs/reduce/big_tokens.ipynb", repository / "tests/reduce/test_big_tokens.py")
    notebook = json.loads(book.read_text())
    entry = entry_of(front_matter(notebook, "reduce/big_tokens"), "reduce/big_tokens")
    assert (entry.title, entry.kind, entry.family) == ("The 'big' ones", "method", "reduce")
    text = "".join("".join(cell["source"]) for cell in notebook["cells"]) + tests.read_text()
    assert not any(word in text for word in ("METHOD", "FAMILY", "TITLE", "#: "))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum(c.startswith("#| export\n") for c in code) == 2 and "#| default_exp reduce.big_tokens" in code
    for source in [*code, tests.read_text()]:
        ast.parse(source)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.parametrize("name", ["Big", "big-tokens", "2big", "", "class", "index", "engine", "a b", "../x"])
def test_names_that_are_no_module(name, repository):
    with pytest.raises(ValueError, match="a method's name must be"):
        write_new(name, "reduce", repository)


@pytest.mark.parametrize("family, words", [("redcue", "did you mean 'reduce'"), ("core", "there are decode, reduce"), ("", "no family ''")])
def test_unknown_families(family, words, repository):
    with pytest.raises(ValueError, match=words):
        write_new("big", family, repository)


def test_nothing_is_overwritten(repository):
    with pytest.raises(ValueError, match="'evit' is taken"):
        write_new("evit", "reduce", repository, taken=["evit"])
    book, tests = write_new("big", "reduce", repository)
    tests.write_text("mine")
    book.unlink()
    with pytest.raises(FileExistsError, match="is left alone"):
        write_new("big", "reduce", repository)
    assert tests.read_text() == "mine" and not book.exists()
