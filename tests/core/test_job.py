"""One notebook, run once: tokenkit.core.job."""
import json
import sys
from pathlib import Path

import pytest
from toys import text_of, write

import tokenkit
from tokenkit.core.job import Job, run_job, standing_result


def job(folder, *sources, name="page", **options):
    keep = {key: options.pop(key) for key in list(options) if key in ("parameters", "front")}
    return Job(f"toy/{name}", write(folder / f"{name}.ipynb", *sources, **keep), folder / "_runs" / options.get("lane", "cpu"), **options)


def record(j):
    return json.loads(j.file(".json").read_text())


def test_runs_once_and_again_after_an_edit_or_damage(tmp_path):
    j = job(tmp_path, "print('first')")
    heard = []
    result = run_job(j, lambda kind, **counts: heard.append((kind, counts.get("cell"))))
    assert (result.status, result.output, heard) == ("done", j.file(".ipynb"), [("started", None), ("cell", 0)])
    assert text_of(result.output) == "first\n"
    assert run_job(j).status == "cached" and run_job(j).seconds == result.seconds > 0
    assert not list(tmp_path.rglob("*.part*"))

    whole = j.file(".ipynb").read_text()
    j.file(".ipynb").write_text(whole[:100])
    assert standing_result(j) is None, "half an output must not stand"
    j.file(".ipynb").write_text(whole)
    assert standing_result(j).status == "cached"
    for text in ("{", "[]", "{}", '{"status": "done"}'):
        good = j.file(".json").read_text()
        j.file(".json").write_text(text)
        assert standing_result(j) is None, "a broken record must not stand"
        j.file(".json").write_text(good)
    job(tmp_path, "print('second')")
    assert standing_result(j) is None, "an edited notebook must run again"
    assert standing_result(Job(j.path, j.notebook, j.folder, parameters={"seed": 1})) is None


def test_failure_names_the_cell_of_the_source_and_leaves_no_result(tmp_path):
    j = job(tmp_path, "x = 1", parameters="lane = 'cpu'")
    assert run_job(j).status == "done"
    j = job(tmp_path, "x = 1", "print('so far')\n1 / 0", "print('never')", parameters="lane = 'cpu'")
    result = run_job(j)
    assert (result.status, result.error.cell, result.error.source) == ("failed", 2, "print('so far')\n1 / 0")
    assert result.error.traceback.endswith("ZeroDivisionError: division by zero") and "\x1b" not in result.error.traceback
    assert "cell 2" in str(result.error)
    assert result.output == j.file(".failed.ipynb") and "so far" in text_of(result.output)
    assert not j.file(".ipynb").exists() and record(j)["status"] == "failed" and record(j)["error"]["cell"] == 2
    assert standing_result(j) is None


def test_a_kernel_that_dies_is_a_failure_of_the_running_cell(tmp_path):
    result = run_job(job(tmp_path, "x = 1", "import os\nos._exit(3)"))
    assert (result.status, result.error.cell) == ("failed", 1) and "DeadKernel" in result.error.traceback


@pytest.mark.parametrize("text", ["", '{"cells": [], "metadata": {}', '{"nbformat": 4}'])
def test_a_file_that_is_no_notebook_fails_without_a_cell(text, tmp_path):
    j = job(tmp_path)
    j.notebook.write_text(text)
    write(j.file(".part.ipynb"), "of a run that was killed")
    result = run_job(j)
    assert (result.status, result.error.cell) == ("failed", None) and "not a notebook" in result.error.traceback


def test_the_kernel_sees_this_checkout_this_interpreter_and_its_own_folder(tmp_path, monkeypatch):
    other = tmp_path / "other" / "tokenkit"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(other.parent))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "kernels"))
    (tmp_path / "kernels" / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "kernels" / "python3" / "kernel.json").write_text('{"argv": ["false"], "display_name": "", "language": "python"}')
    source = "import json, os, sys, tokenkit\nprint(json.dumps([tokenkit.__file__, sys.executable, os.getcwd(), os.environ['TOKENKIT_LANE'], os.environ['OMP_NUM_THREADS'], 'inline' in os.environ['MPLBACKEND'], lane, seed]))"
    folder = tmp_path / "pages"
    result = run_job(job(folder, source, parameters="lane = 'cpu'\nseed = 0", lane="rehearsal", threads=3), lambda *a, **k: None)
    assert result.status == "done", result.error
    found = json.loads(text_of(result.output))
    assert found == [tokenkit.__file__, sys.executable, str(folder), "rehearsal", "3", True, "rehearsal", 0]


def test_the_checkout_of_the_notebook_comes_first(tmp_path):
    (tmp_path / "tokenkit").mkdir()
    (tmp_path / "tokenkit" / "__init__.py").write_text("")
    assert job(tmp_path / "nbs").root == tmp_path
    assert Job("toy/page", Path("/nowhere/page.ipynb"), tmp_path).root == Path(tokenkit.__file__).parents[1]
