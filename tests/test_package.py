"""A wheel is built, installed in a clean environment, and imported without the repository."""
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, "."], cwd=root, check=True)
    return next(out.glob("tokenkit-*.whl"))


def test_wheel_carries_library_weights_and_catalog_and_nothing_else(wheel, root):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {f.relative_to(root).as_posix() for f in (root / "tokenkit").rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert {n for n in names if ".dist-info" not in n} == files
    assert wheel.stat().st_size < 90e6


def test_installed_wheel_works_without_the_repository(wheel, tmp_path):
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True).stdout.strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the others, but not this checkout
    code = ("import tokenkit, sys; assert 'torch' not in sys.modules; from tokenkit.core.catalog import checkout, load_catalog; "
            "from tokenkit.reduce import EViT, reduce_model; from tokenkit.decode import TokenRecycling; "
            "assert checkout() is None and len(load_catalog()) > 10; print(tokenkit.__file__)")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(home) in done.stdout
    listed = subprocess.run([home / "bin" / "tokenkit", "list"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert listed.returncode == 0 and "evit" in listed.stdout, listed.stderr


def test_lower_bounds_are_honest(root):
    """Every requirement states a floor, and the lock holds a version for it."""
    from tokenkit.core.catalog import settings
    from packaging.requirements import Requirement
    lock = {line.split("==")[0].lower() for line in (root / "requirements.lock").read_text().splitlines() if "==" in line}
    for key, value in settings(root).items():
        if key.endswith("requirements"):
            for text in value.split():
                requirement = Requirement(text)
                assert requirement.specifier, f"{text} has no bound"
                assert requirement.name.lower() in lock, f"{text} is not in requirements.lock"
