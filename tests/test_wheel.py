"""A wheel of the repository, installed in an empty environment, trains and samples."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

NO_SETUPTOOLS = ("No matching distribution found for setuptools", "No module named pip")


def pip(*argv):
    """Run pip. Skips the test without pip, or without a package index for setuptools."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if reason := next((text for text in NO_SETUPTOOLS if text in done.stderr), None):
        pytest.skip(f"cannot build a wheel here: {reason}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of the wheel. It is built from a copy, as setuptools writes to the source folder."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, source)
    shutil.copytree(ROOT / "brisk", source / "brisk")
    for folder in ("data", "tests"):  # not in the wheel
        (source / folder).mkdir()
        (source / folder / "prepare.py").touch()
    pip("wheel", "--no-deps", f"--wheel-dir={built}", source)
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel, and with access to these packages."""
    folder, posix = tmp_path_factory.mktemp("env"), os.name != "nt"
    venv.create(folder, symlinks=posix, with_pip=False)
    python = folder / ("bin/python" if posix else "Scripts/python.exe")
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    pip("install", "--no-deps", f"--target={packages}", wheel)
    behind = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "behind.pth").write_text("\n".join(behind))
    return python


@pytest.fixture
def run(installed, tmp_path):
    """Run the environment's Python in an empty folder."""

    def run(*argv):
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "BRISK_DATA")}
        env |= {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
        options = {"cwd": tmp_path, "env": env, "capture_output": True, "encoding": "utf-8"}
        return subprocess.run([installed, *argv], **options, timeout=300)

    return run


def succeed(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_script_is_in_the_wheel():
    """A new script at the top is named in pyproject.toml, which has no pattern for it."""
    listed = re.search(r"py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert set(re.findall(r'"(\w+)"', listed[1])) == {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.slow
def test_wheel_holds_the_scripts_and_the_package(wheel):
    """Without tests and data."""
    files = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("brisk/**/*") if path.is_file())]
    expected = {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


@pytest.mark.slow
def test_installed_wheel_trains_and_samples(run, settings, tmp_path):
    assert "step 4: train loss" in succeed(run("-m", "train", *settings("out")))
    text = succeed(run("-m", "sample", "--out_dir=out", "--num_samples=1", "--max_new_tokens=20"))
    assert len(text) > 20
    result = succeed(run("-m", "evaluate", "--out_dir=out", "--device=cpu", "--json=True"))
    assert 0 < json.loads(result)["loss"] < 10
    succeed(run("-m", "export", "--out_dir=out", "--to=exported"))
    assert (tmp_path / "exported" / "model.safetensors").exists()
    succeed(run("-m", "plot", "out", "--to=loss.svg"))


@pytest.mark.slow
def test_environment_runs_the_wheel(run, installed):
    """Not the repository, which may be on the path of this interpreter."""
    code = "import brisk, train; print(brisk.__file__, train.__file__, sep='\\n')"
    for path in succeed(run("-c", code)).splitlines():
        assert Path(path).is_relative_to(installed.parent.parent)


@pytest.mark.slow
def test_installed_wheel_has_help_and_no_data(run):
    assert "--out_dir=out" in succeed(run("-m", "train", "--help"))
    done = run("-m", "train", "--dataset=shakespeare_char", "--device=cpu")
    assert done.returncode == 2 and "site-packages" not in done.stderr
    assert done.stderr.count("\n") == 1 and "--data_dir=PATH" in done.stderr
