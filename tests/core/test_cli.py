"""The command line, through real processes: tokenkit.core.cli."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import write

from tokenkit.core.catalog import Catalog, Entry, update
from tokenkit.core.claims import MIME
from tokenkit.core.cli import chosen, settings_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, "-c", "from tokenkit.core.cli import main; main()"]


def tokenkit(*words, home=ROOT, code=0, **extra):
    """Output of a command run in a checkout, which must end with this exit code."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")} | {"PYTHONPATH": str(home)} | extra
    done = subprocess.run([*SCRIPT, *words], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_help_is_complete_and_quick():
    text = tokenkit("--help")
    assert all(f"\n  {command} " in text for command in ("list", "show", "run", "results", "assets", "new"))
    assert "..." not in text.replace("[ARGS]...", ""), "a command's line is cut off"
    for command in ("list", "show", "run", "results", "assets", "new"):
        assert "Usage" in tokenkit(command, "-h")
    heavy = "import sys, tokenkit.core.cli; print([m for m in ('torch', 'transformers', 'distributed', 'papermill', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_console_script_is_installed():
    script = Path(sys.executable).with_name("tokenkit")
    assert subprocess.run([script, "--help"], capture_output=True, text=True).stdout.startswith("Usage: tokenkit")


@pytest.mark.parametrize("words, message", [
    (["lst"], "Did you mean 'list'"), (["show", "lane"], "did you mean 'lanes'"), (["list", "xyz"], "no family 'xyz'"),
    (["run"], "name what to run, or give --all"), (["run", "lanes", "--all"], "not both"), (["run", "lnaes"], "did you mean 'lanes'"),
    (["run", "lanes", "--lane", "long"], "core/lanes has no long lane; it has cpu"), (["run", "lanes", "--jobs", "0"], "jobs must be at least 1"),
    (["run", "lanes", "--jobs", "two"], "Invalid value for '--jobs'"), (["run", "lanes", "--set", "seed"], "--set takes NAME=VALUE"),
    (["run", "lanes", "--set", "seed=1", "--in-place"], "default parameters"), (["results", "--json", "--markdown"], "not both"),
    (["assets", "dinov3"], "did you mean 'dinov2-vits14'"), (["new", "x-y", "--family", "reduce"], "name must be"), (["new", "xy"], "--family"),
])
def test_wrong_usage_ends_with_2_and_says_what_to_do(words, message):
    assert message in tokenkit(*words, code=2)


def test_show_and_assets():
    text = tokenkit("show", "core/lanes")
    assert "tokenkit.core.lanes" in text and os.path.join("nbs", "core", "lanes.ipynb") in text and "tokenkit run core/lanes" in text
    text = tokenkit("assets")
    assert all(name in text for name in ("smollm2-135m-instruct", "all-minilm-l6-v2", "dinov2-vits14", "Apache-2.0"))


def test_chosen_entries():
    entries = [Entry("reduce/evit", "method", "", "", "reduce", lanes={"cpu": "", "gpu": ""}), Entry("reduce/index", "family", "", "", "reduce"),
               Entry("text/index", "family", "", "", "text"), Entry("text/bytes", "method", "", "", "text", lanes={"cpu": "", "long": ""})]
    catalog = Catalog({e.path: e for e in entries})

    def paths(*names, every=False, lane="cpu"):
        return [e.path for e in chosen(catalog, list(names), every, lane)]

    assert paths(every=True) == [e.path for e in entries]
    assert paths(every=True, lane="gpu") == paths(every=True, lane="rehearsal") == paths("reduce", lane="gpu") == ["reduce/evit"]
    assert paths("bytes", "reduce", "text") == ["text/bytes", "reduce/evit", "reduce/index", "text/index"]
    assert paths("text/index") == ["text/index"] and paths("evit", "evit") == ["reduce/evit"]
    for names, lane, words in ((["index"], "cpu", "ambiguous"), (["evit"], "long", "no long lane; it has cpu, gpu"), (["evi"], "cpu", "did you mean 'evit'")):
        with pytest.raises(ValueError, match=words):
            paths(*names, lane=lane)


def test_settings():
    assert settings_of(["seed=3", "rates=[0.5, 1]", "name=deit", "empty="]) == {"seed": 3, "rates": [0.5, 1], "name": "deit", "empty": ""}


# ---- a small checkout of its own

FRONT = '---\ntitle: "{0}"\ndescription: "About {0}."\nkind: engine\nfamily: reduce\n---'


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkout with the library, and three toy notebooks: one that waits, one that fails, one that has not been run."""
    home = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "tokenkit", home / "tokenkit", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copy(ROOT / "settings.ini", home)
    write(home / "nbs/reduce/slow.ipynb", "import time\ntime.sleep(60)", front=FRONT.format("slow"))
    write(home / "nbs/reduce/broken.ipynb", "1 / 0", front=FRONT.format("broken"))
    write(home / "nbs/reduce/quick.ipynb", "1 + 1", front=FRONT.format("quick"))
    tests = home / "tests"
    tests.mkdir()
    for name in ("conftest.py", "test_anatomy.py"):
        shutil.copy(ROOT / "tests" / name, tests)
    (home / "nbs/core").mkdir()
    shutil.copy(ROOT / "nbs/core/catalog.ipynb", home / "nbs/core")
    update(home)
    return home


def test_a_new_method_runs_passes_its_tests_and_has_the_anatomy(home):
    """From `tokenkit new` to a finished page, without an edit; beside it a notebook that fails."""
    assert "wrote nbs/reduce/big_tokens.ipynb" in tokenkit("new", "big_tokens", "--family", "reduce", home=home)
    assert "'big_tokens' is taken" in tokenkit("new", "big_tokens", "--family", "reduce", home=home, code=2)
    assert "big_tokens" in tokenkit("list", home=home)

    text = tokenkit("run", "big_tokens", "broken", "--in-place", "--html", "--verdict", home=home, code=1)
    assert "reduce/broken failed" in text and "cell 1:" in text and "ZeroDivisionError" in text and "1 done, 1 failed" in text
    assert "Keeping every token changes nothing" in text and "holds" in text
    for kind in ("ipynb", "html"):
        file = f"_runs/cpu/reduce/big_tokens.{kind}"
        assert file in text and (home / file).exists()
    assert "1 cached; results in _runs/cpu" in tokenkit("run", "reduce/big_tokens", home=home)
    assert "Half of the tokens keep more" in tokenkit("show", "big_tokens", home=home)

    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=home, check=True, capture_output=True)
    checks = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", home, "-k", "big_tokens", "tests"]
    done = subprocess.run(checks, cwd=home, env=os.environ | {"PYTHONPATH": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def test_results_in_every_form(home):
    row = {"kind": "claim", "statement": "One and one", "paper": "two", "measured": 2, "criterion": "= 2", "outcome": "pass", "passed": True, "record": False, "why": ""}
    output = home / "_runs/cpu/reduce/quick.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"cells": [{"outputs": [{"data": {MIME: row}}]}]}))
    text = tokenkit("results", "--runs", home=home)
    assert "One and one" in text and "reduce/quick" in text
    assert "[quick](reduce/quick.ipynb)" in tokenkit("results", "--runs", "--markdown", home=home)
    assert [c["statement"] for c in json.loads(tokenkit("results", "--runs", "--json", home=home))["claims"] if c["path"] == "reduce/quick"] == ["One and one"]
    assert "One and one" not in tokenkit("results", home=home), "the stored notebook has no outputs"
    output.write_text(json.dumps({"cells": [{"outputs": [{"data": {MIME: row | {"outcome": "fail"}}}]}]}))
    assert "does not hold" in tokenkit("results", "--runs", home=home, code=1)


def test_interrupted_by_the_keyboard(home):
    process = subprocess.Popen([*SCRIPT, "run", "slow"], cwd=home, env=os.environ | {"PYTHONPATH": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell in the background hands down that it is ignored
    for line in process.stdout:
        if "started" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted; what is finished is kept" in errors and "Traceback" not in errors


def test_installed_without_notebooks(home, tmp_path):
    shutil.copytree(home / "tokenkit", tmp_path / "tokenkit", ignore=shutil.ignore_patterns("__pycache__"))
    assert "comes with a checkout" in tokenkit("run", "quick", home=tmp_path, code=2)
    assert "come with a checkout" in tokenkit("results", home=tmp_path, code=1)
    assert "are made in a checkout" in tokenkit("new", "xy", "--family", "reduce", home=tmp_path, code=1)
    assert "notebook " not in tokenkit("show", "quick", home=tmp_path).splitlines()
