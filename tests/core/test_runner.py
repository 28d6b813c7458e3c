"""Many notebooks: tokenkit.core.runner, and the drills."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from toys import entry, text_of

from tokenkit.core import runner
from tokenkit.core.job import Job, RunResult, standing_result
from tokenkit.core.runner import Event, portable, progress, run_notebooks, write_back

ROOT = Path(__file__).resolve().parents[2]


def statuses(results):
    return [(r.path.split("/")[1], r.status) for r in results]


def test_a_failing_notebook_among_good_ones(tmp_path):
    """Failures are reported and the rest go on; outputs go back into sources; what is done stands."""
    pages = [entry(tmp_path, "a", "import warnings\nwarnings.warn('here')", "6 * 7", parameters="lane = 'cpu'"),
             entry(tmp_path, "b", "x = 0", "1 / x"), entry(tmp_path, "c", "print(lane, seed)", parameters="lane = 'cpu'\nseed = 0")]
    sources = [p.notebook.read_text() for p in pages]
    events = []
    results = run_notebooks(pages, out=tmp_path / "_runs", in_place=True, on_event=events.append)
    assert statuses(results) == [("a", "done"), ("b", "failed"), ("c", "done")]
    assert results[1].error.cell == 1 and "ZeroDivisionError" in results[1].error.traceback
    kinds = [(e.path, e.kind) for e in events]
    assert all(kinds.index((f"toy/{n}", "started")) < kinds.index((f"toy/{n}", s)) for n, s in statuses(results))
    assert [e.result.status for e in events if e.result] and sum(e.result is not None for e in events) == 3

    stored = pages[0].notebook.read_text()
    assert str(tmp_path) not in stored and "papermill" not in stored and "injected" not in stored and "/ipykernel_" not in stored
    cells = json.loads(stored)["cells"]
    assert [c["execution_count"] for c in cells] == [1, 2, 3] and cells[2]["outputs"][0]["execution_count"] == 3
    assert "UserWarning: here" in text_of(pages[0].notebook) and "<cell>" in text_of(pages[0].notebook)
    assert text_of(pages[2].notebook) == "cpu 0\n" and pages[1].notebook.read_text() == sources[1]

    again = run_notebooks([pages[0], pages[2]], out=tmp_path / "_runs", in_place=True)
    assert statuses(again) == [("a", "cached"), ("c", "cached")] and pages[0].notebook.read_text() == stored


def test_outputs_do_not_go_into_a_notebook_that_was_edited_meanwhile(tmp_path):
    page = entry(tmp_path, "page", "1 + 1")
    job = Job("toy/page", page.notebook, tmp_path / "_runs" / "cpu")
    job.file(".ipynb").parent.mkdir(parents=True)
    entry(job.file("").parent, "page", "1 + 2")
    with pytest.raises(ValueError, match="edited while it ran"):
        write_back(job)


def test_portable_text():
    text = f"{ROOT}/nbs/x.py {Path.home()}/file /tmp/ipykernel_12/345.py:3: UserWarning, /usr/lib/python"
    assert portable(text, ROOT) == "nbs/x.py ~/file <cell>:3: UserWarning, /usr/lib/python"


@pytest.mark.parametrize("options, message", [
    (dict(jobs=0), "jobs must be at least 1, got 0"), (dict(lane="fast"), "lane must be one of cpu, long, gpu, rehearsal, got 'fast'"),
    (dict(in_place=True, lane="long"), "in_place stores outputs of the cpu lane"), (dict(in_place=True, parameters={"seed": 1}), "default parameters"),
])
def test_what_cannot_be_run(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_notebooks([entry(tmp_path, "a", "1")], out=tmp_path / "_runs", **options)


def test_missing_and_repeated_notebooks_are_refused(tmp_path):
    page = entry(tmp_path, "a", "1")
    with pytest.raises(ValueError, match="given twice"):
        run_notebooks([page, page], out=tmp_path)
    page.notebook = None
    with pytest.raises(ValueError, match="comes with a checkout"):
        run_notebooks([page], out=tmp_path)


def test_nothing_to_do_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "workers", lambda *a: pytest.fail("workers were started"))
    assert run_notebooks([], out=tmp_path) == []


def test_no_scheduler_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ConnectionError, match="no Dask scheduler answers at tcp://127.0.0.1:1"):
        run_notebooks([entry(tmp_path, "a", "1")], out=tmp_path, scheduler="tcp://127.0.0.1:1")


def test_log_has_a_line_for_each_event(tmp_path):
    with open(tmp_path / "log", "w+") as file, progress(2, Console(file=file, width=80)) as on_event:
        on_event(Event("toy/a", "started"))
        on_event(Event("toy/a", "cell", 3, 9))
        on_event(Event("toy/b", "waiting"))
        on_event(Event("toy/a", "done", result=RunResult("toy/a", "done", 1.25)))
        file.seek(0)
        lines = [line.split() for line in file]
    assert lines == [["started", "toy/a"], ["waiting", "toy/b"], ["1/2", "done", "1.2", "s", "toy/a"]]


# ---- drills: runners are real processes, and some of them are killed

RUNNER = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from tokenkit.core.runner import run_notebooks
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
pages = [SimpleNamespace(path=f"toy/{p.stem}", notebook=p) for p in sorted(folder.glob("*.ipynb"))]
tell = lambda e: print(e.path, e.kind, flush=True) if e.kind != "cell" else None
for r in run_notebooks(pages, out=folder / "_runs", on_event=tell, **options):
    print("RESULT", r.path, r.status, flush=True)
"""


def start(folder, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", RUNNER, folder, json.dumps(options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def page_that_keeps_a_diary(folder, name, seconds=0.6):
    note = "open('diary', 'a').write(f'{} {} {{os.getpid()}} {{os.getppid()}}\\n')"
    return entry(folder, name, f"import os, time\n{note.format('begin', name)}", f"time.sleep({seconds})", note.format("end", name))


def diary(folder):
    file = folder / "diary"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def begun(folder):
    return [name for what, name, *_ in diary(folder) if what == "begin"]


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_files(folder):
    """Every published file is whole. Returns the notebooks whose results stand."""
    jobs = {p.stem: Job(f"toy/{p.stem}", p, folder / "_runs" / "cpu") for p in folder.glob("*.ipynb")}
    for job in jobs.values():
        if job.file(".json").exists():
            assert json.loads(job.file(".json").read_text())["status"] == "done"
        if job.file(".ipynb").exists():
            cells = json.loads(job.file(".ipynb").read_text())["cells"]
            assert len(cells) == 3 and all(c["execution_count"] for c in cells)
    return {name for name, job in jobs.items() if standing_result(job)}


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_at_random_moments_then_resumed_by_two_at_once(tmp_path):
    names = list("abcd")
    for name in names:
        page_that_keeps_a_diary(tmp_path, name)
    luck = random.Random()
    for _ in range(2):
        process = start(tmp_path, jobs=2)
        for line in process.stdout:
            if line.split()[-1] == "started":
                break
        time.sleep(luck.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        patience = time.monotonic() + 15
        while (orphans := {int(p) for _, _, *pids in diary(tmp_path) for p in pids if alive(int(p))}) and time.monotonic() < patience:
            time.sleep(0.2)
        assert not orphans, "kernels or workers outlive their runner"
        finished, before = check_files(tmp_path), begun(tmp_path)
        assert finished == {r for r in names if (tmp_path / "_runs/cpu/toy" / f"{r}.json").exists()}

    both = [start(tmp_path, jobs=1), start(tmp_path, jobs=1)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert check_files(tmp_path) == set(names)
    assert sorted(begun(tmp_path)[len(before):]) == sorted(set(names) - finished), "each unfinished one ran exactly once more"
    told = [line.split() for out, _ in outputs for line in out.splitlines() if line.startswith("RESULT")]
    done = sorted(path for _, path, status in told if status == "done")
    assert done == sorted(f"toy/{n}" for n in set(names) - finished) and len(told) == 2 * len(names)


def dask(*words):
    return subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_on_a_scheduler_with_two_worker_processes(tmp_path):
    where = tmp_path / "scheduler.json"
    processes = [dask("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", where)]
    try:
        processes += [dask("distributed.cli.dask_worker", "--scheduler-file", where, "--nthreads", "1", "--no-dashboard", "--no-nanny") for _ in range(2)]
        while not where.exists() or not where.read_text().strip():
            assert processes[0].poll() is None
            time.sleep(0.1)
        pages = [page_that_keeps_a_diary(tmp_path, name, seconds=2) for name in "abc"] + [entry(tmp_path, "d", "1 / 0")]
        address = json.loads(where.read_text())["address"]
        from distributed import Client
        with Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        results = run_notebooks(pages, out=tmp_path / "_runs", scheduler=address)
        assert statuses(results) == [("a", "done"), ("b", "done"), ("c", "done"), ("d", "failed")]
        workers = {int(line[3]) for line in diary(tmp_path)}
        assert workers == {p.pid for p in processes[1:]}, "both workers ran notebooks"
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
