"""Drills for the cache: damage, forgery, crowds, kills, no network, full and read-only disks. All offline, on a tiny wheel."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenkit.core import cache
from tokenkit.core.cache import Asset, AssetError, cache_dir, explain_failure, fault, file_sha256, obtain, pip_refusal, system_error

TEXT = "so much depends\nupon\n" * 500


def build(raw, out):
    (out / "poem.txt").write_text(raw.read_text().upper())
    (out / "sub").mkdir()
    (out / "sub" / "note.txt").write_text("a file in a folder")


@pytest.fixture
def pip_shop(tmp_path, monkeypatch):
    """A folder that pip searches instead of the network, with one wheel in it, and an empty cache."""
    folder = tmp_path / "shop"
    folder.mkdir()
    files = {"poem/poem.txt": TEXT, "poem/__init__.py": "raise SystemExit('imported')",
             "poem-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: poem\nVersion: 1.0\n",
             "poem-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n", "poem-1.0.dist-info/RECORD": ""}
    with zipfile.ZipFile(folder / "poem-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "",
                        "TOKENKIT_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def shop(pip_shop, monkeypatch):
    """The same with a stand-in for pip, which would take a second for each test."""
    def copy(asset, into):
        return Path(shutil.copy(pip_shop / "poem-1.0-py3-none-any.whl", into))
    monkeypatch.setattr(cache, "pip_download", copy)
    return pip_shop


def poem(shop, **changes):
    fields = dict(name="poem", wheel="poem==1.0", sha256=file_sha256(shop / "poem-1.0-py3-none-any.whl"), member="poem/poem.txt",
                  megabytes=1, build=build, licence="public domain", origin="an example", hub="nobody/poem")
    return Asset(**fields | changes)


def left_behind():
    return [p.name for p in cache_dir().glob(".making*")]


# What a fetch leaves

def test_first_fetch_makes_second_finds(shop, monkeypatch):
    asset = poem(shop)
    assert fault(asset.folder) == "missing"
    folder = obtain(asset)
    assert (folder / "poem.txt").read_text() == TEXT.upper() and not fault(folder) and not left_behind()
    monkeypatch.setattr(cache, "make_asset", lambda *a: pytest.fail("made again"))
    assert obtain(asset) == folder


def test_pip_fetches_without_installing_or_importing(pip_shop):
    assert (obtain(poem(pip_shop)) / "poem.txt").read_text() == TEXT.upper() and not left_behind()
    assert "poem" not in sys.modules


def test_only_the_result_lies_in_the_cache(shop):
    folder = obtain(poem(shop))
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "poem.txt", "sub"]
    record = json.loads((folder / "manifest.json").read_text())
    assert set(record["files"]) == {"poem.txt", "sub/note.txt"} and record["wheel"] == "poem==1.0" and record["licence"] == "public domain"


def test_files_can_be_read_by_others(shop):
    def private(raw, out):
        (out / "secret").write_text("x")
        (out / "secret").chmod(0o600)
    assert (obtain(poem(shop, build=private)) / "secret").stat().st_mode & 0o777 == 0o644


def test_folder_member_and_other_versions(shop):
    whole = poem(shop, name="whole", member="poem/", build=lambda raw, out: (out / "names").write_text(str(sorted(p.name for p in raw.iterdir()))))
    assert (obtain(whole) / "names").read_text() == "['__init__.py', 'poem.txt']"
    assert poem(shop).folder != poem(shop, recipe=2).folder, "a new recipe is a new folder"


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENKIT_CACHE", "~/here")
    assert cache_dir().is_absolute() and cache_dir().name == "here"
    monkeypatch.delenv("TOKENKIT_CACHE")
    assert cache_dir().name == "tokenkit"
    if sys.platform.startswith("linux"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_dir() == tmp_path / "tokenkit"


# Damage heals

def truncate(folder):
    os.truncate(folder / "poem.txt", 100)


def alter(folder):
    (folder / "poem.txt").write_text("X" + TEXT.upper()[1:])


def alter_keeping_the_time(folder):
    stat = (folder / "poem.txt").stat()
    alter(folder)
    os.utime(folder / "poem.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cache._hashed.clear()  # as in a new process


def remove(folder):
    (folder / "sub" / "note.txt").unlink()


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


def spoil_manifest(folder):
    (folder / "manifest.json").write_text('{"files": [1, 2')


def nonsense_manifest(folder):
    (folder / "manifest.json").write_text("[]")


def replace_folder_by_file(folder):
    folder.rename(folder.with_name("away"))
    folder.write_text("a file")


@pytest.mark.parametrize("damage", [truncate, alter, alter_keeping_the_time, remove, lose_manifest, spoil_manifest, nonsense_manifest,
                                    replace_folder_by_file], ids=lambda f: f.__name__)
def test_damage_is_noticed_and_healed(shop, damage):
    folder = obtain(poem(shop))
    damage(folder)
    assert fault(folder)
    assert (obtain(poem(shop)) / "poem.txt").read_text() == TEXT.upper()
    assert not fault(folder) and not left_behind()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(TEXT) - 1), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(shop, position, flip):
    folder = obtain(poem(shop))
    good = (folder / "poem.txt").read_bytes()
    (folder / "poem.txt").write_bytes(good[:position] + bytes([good[position] ^ flip]) + good[position + 1:])
    cache._hashed.clear()
    assert fault(folder) == "damaged: poem.txt was altered"
    assert not fault(folder, hashes=False), "sizes alone cannot tell"
    (folder / "poem.txt").write_bytes(good)


def test_a_failed_repair_leaves_the_damaged_copy_and_says_why(shop):
    folder = obtain(poem(shop))
    truncate(folder)
    with pytest.raises(AssetError, match="hash mismatch"):
        obtain(replace(poem(shop), sha256=poem(shop).sha256[:8] + "0" * 56))
    assert folder.is_dir() and not left_behind()


# Refusals, each in one sentence

def refused(asset, match):
    with pytest.raises(AssetError, match=match) as caught:
        obtain(asset)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert not left_behind() if cache_dir().is_dir() else True
    return str(caught.value)


def test_hash_mismatch(shop):
    refused(poem(shop, sha256="0" * 64), "hash mismatch: poem==1.0 should have sha256 000000000000")
    assert not poem(shop, sha256="0" * 64).folder.exists()


def test_no_network(pip_shop, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert "TOKENKIT_CACHE" in refused(poem(pip_shop), "no network: poem is not in the cache")


def test_not_offered(pip_shop):
    refused(poem(pip_shop, wheel="poem==2.0"), "does not offer poem==2.0")


def test_missing_member(shop):
    refused(poem(shop, member="poem/prose.txt"), "has no member poem/prose.txt")


def test_failing_conversion(shop):
    def fail(raw, out):
        raise KeyError("backbone.layer.7")
    refused(poem(shop, build=fail), "could not be made from poem==1.0: 'backbone.layer.7'")


@pytest.mark.parametrize("said, match", [
    ("python: No module named pip", "ensurepip"),
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "hash mismatch"),
    ("WARNING: Retrying after ConnectTimeoutError(...)\nERROR: No matching distribution found for poem==1.0", "no network"),
    ("ERROR: No matching distribution found for poem==1.0", "does not offer"),
    ("something new\nERROR: and unheard of\n", "ERROR: and unheard of"),
    ("", "could not be made"),
])
def test_what_pip_says(shop, said, match):
    error = pip_refusal(poem(shop), said)
    assert isinstance(error, AssetError) and match in str(error)


def test_interrupt_passes_through_and_cleans_up(shop):
    def interrupt(raw, out):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        obtain(poem(shop, build=interrupt))
    assert not left_behind() and fault(poem(shop).folder) == "missing"


# Full disk

def test_full_disk_before_the_download(shop, monkeypatch):
    usage = namedtuple("usage", "total used free")(1, 1, 999_999)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(cache, "download_wheel", lambda *a: pytest.fail("downloaded"))
    refused(poem(shop), "no room for poem: fetching it takes about 1 MB")


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"),
                                     RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_full_disk_while_converting(shop, problem):
    def fail(raw, out):
        (out / "half").write_text("half")
        raise problem
    refused(poem(shop, build=fail), "no room for poem")


def test_full_disk_while_downloading(pip_shop, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
    monkeypatch.setattr(cache.subprocess, "run", lambda *a, **k: failed)
    refused(poem(pip_shop), "no room for poem")


# Read-only cache

def test_cache_under_a_file(shop, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path in ("file", "file/below"):
        monkeypatch.setenv("TOKENKIT_CACHE", str(tmp_path / path))
        with pytest.raises(AssetError, match="cannot be written .*set TOKENKIT_CACHE to a folder that can"):
            obtain(poem(shop))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_read_only_cache(shop, monkeypatch, number):
    def refuse(*a, **k):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(cache.FileLock, "acquire", refuse)
    refused(poem(shop), "cannot be written")


def test_a_sound_asset_in_a_read_only_cache_is_used(shop, monkeypatch):
    folder = obtain(poem(shop))
    monkeypatch.setattr(cache, "locked", lambda *a: pytest.fail("tried to write"))
    assert obtain(poem(shop)) == folder


def test_system_error_numbers():
    assert system_error(OSError(28, "x")) == 28 and system_error("(os error 30)") == 30 and system_error("[Errno 13] no") == 13
    assert system_error("all is well") is None and system_error(OSError("no number")) is None
    unknown = Asset("a", "a==1", "0", "m", 1, build, "l", "o", "h")
    assert "out of memory" in str(explain_failure(unknown, OSError(errno.ENOMEM, "out of memory")))


# Several processes

SCRIPT = """
    import shutil, sys, time
    from pathlib import Path
    from tokenkit.core import cache
    log, pause, wheel = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    cache.pip_download = lambda asset, into: Path(shutil.copy(wheel, into))

    def build(raw, out):
        with open(log, "a") as file:
            file.write("x")
        (out / "part.txt").write_text("part")
        time.sleep(pause)
        (out / "poem.txt").write_text(raw.read_text())

    asset = cache.Asset("crowd", "poem==1.0", cache.file_sha256(wheel), "poem/poem.txt", 1, build, "", "", "")
    print((cache.obtain(asset) / "poem.txt").stat().st_size)
"""


def ask(shop, log, pause):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(log), str(pause), str(shop / "poem-1.0-py3-none-any.whl")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_at_once_fetch_once(pip_shop, tmp_path):
    crowd = [ask(pip_shop, tmp_path / "log", 1.5) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in crowd]
    assert [out.strip() for out, _ in results] == [str(len(TEXT))] * 3
    assert (tmp_path / "log").read_text() == "x", "built once"
    assert sum("waiting for another process" in err for _, err in results) >= 1


def test_a_killed_process_leaves_nothing_that_hurts(pip_shop, tmp_path):
    victim = ask(pip_shop, tmp_path / "log", 60)
    deadline = time.time() + 30
    while not (tmp_path / "log").exists() and time.time() < deadline:
        time.sleep(0.05)
    waiting = ask(pip_shop, tmp_path / "log", 0)  # stands in line behind the victim
    time.sleep(0.3)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    out, err = waiting.communicate(timeout=60)
    assert out.strip() == str(len(TEXT)), err
    assert (tmp_path / "log").read_text() == "xx" and not left_behind()
