"""Wrong input ends in one line on standard error and exit status 2.

Each case runs in a separate process, forked with PyTorch loaded if possible.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from brisk.distributed.process_group import Ranks
from brisk.errors import UserError, one_line_errors

# libraries read these at import
REAL_STARTS = ("no network", "no GPU", "unknown key")
HERE = "HERE"  # placeholder for the folder of the test
NO_NETWORK = {"HF_HUB_OFFLINE": "1", "HF_HOME": "HERE/empty", "CUDA_VISIBLE_DEVICES": ""}

# name: (arguments after those of the tiny run, words in the error line)
MISTAKES = {
    "unknown key": (["--weather=fine"], ["--weather"]),
    "misspelt key": (["--batch-sise=3"], ["did you mean batch_size?"]),
    "misspelt optimizer": (["--optimizer=moun"], ["optimizer", "did you mean muon?"]),
    "misspelt value": (["--dtype=bfloat61"], ["dtype", "did you mean bfloat16?"]),
    "seed past all bounds": (["--seed=" + "9" * 40], ["seed"]),
    "bad key in a config file": (["HERE/bad_key.py"], ["bad_key.py", "did you mean n_layer?"]),
    "config file that fails": (["HERE/fails.py"], ["fails.py, line 2", "ZeroDivisionError"]),
    "no data set": (
        ["--data_dir=", "--dataset=unmade"],
        ["train.bin", "python data/unmade/prepare.py"],
    ),
    "misspelt data set": (
        ["--data_dir=", "--dataset=shakespear"],
        ["shakespear", "shakespeare_char"],
    ),
    "nothing to resume": (["--init_from=resume", "--out_dir=HERE/none"], ["HERE/none"]),
    "text as a checkpoint": (["--init_from=HERE/letter.pt"], ["letter.pt"]),
    "other weights as a checkpoint": (["--init_from=HERE/other.pt"], ["other.pt"]),
    "damaged checkpoint": (
        ["--init_from=resume", "--out_dir=HERE/damaged"],
        ["HERE/damaged", "damaged"],
    ),
    "misspelt init_from": (["--init_from=resum"], ["init_from=resum", "did you mean resume?"]),
    "no network": (["--init_from=gpt2"], ["gpt2", "network"]),
    "ids beyond the vocabulary": (["--data_dir=HERE/beyond"], ["train.bin", "9999"]),
    "val.bin too short": (["--data_dir=HERE/short"], ["val.bin", "block_size"]),
    "head that does not divide": (["--n_embd=10", "--n_head=3"], ["n_embd=10", "n_head=3"]),
    "no end of text": (["--rows=documents"], ["rows=documents", "end-of-text"]),
    "longer context than there is": (
        ["--init_from=HERE/whole.pt", "--block_size=32"],
        ["block_size=32", "16"],
    ),
    "folder that is a file": (["--out_dir=HERE/letter.pt"], ["out_dir", "letter.pt"]),
    "no such device": (["--device=gpu"], ["--device=gpu"]),
    "no GPU": (["--device=cuda"], ["--device=cuda", "--device out"]),
}


@pytest.fixture(scope="module")
def folder(char_data, tmp_path_factory):
    """A folder with an unprepared data set and invalid files."""
    from conftest import TINY

    import train
    from configurator import configure

    here = tmp_path_factory.mktemp("mistakes")
    (here / "data" / "unmade").mkdir(parents=True)
    (here / "data" / "unmade" / "prepare.py").touch()
    (here / "bad_key.py").write_text("n_layers = 4\n")
    (here / "fails.py").write_text("batch_size = 4\nmin_lr = 1 / 0\n")
    (here / "letter.pt").write_text("Dear model,\n")
    torch.save({"layer.weight": torch.zeros(3)}, here / "other.pt")
    for name in ("beyond", "short"):  # as nanoGPT makes them, without a meta.json
        shutil.copytree(char_data, here / name, ignore=shutil.ignore_patterns("meta.json"))
    ids = np.fromfile(here / "beyond" / "train.bin", dtype="<u2")
    ids[500] = 9999
    ids.tofile(here / "beyond" / "train.bin")
    ids[:16].tofile(here / "short" / "val.bin")
    out = here / "damaged"
    given = {**TINY, "data_dir": char_data, "out_dir": out, "max_iters": 0}
    train.main(configure(train.TrainConfig, [f"--{k}={v}" for k, v in given.items()]))
    shutil.copyfile(out / "last.pt", here / "whole.pt")
    contents = bytearray((out / "last.pt").read_bytes())
    contents[len(contents) // 2] ^= 1
    for name in ("last.pt", "ckpt.pt"):
        (out / name).write_bytes(contents)
    return here


@pytest.fixture(scope="module")
def make(folder, char_data, script, request):
    """`make(name)`: run a case. Returns the finished process."""
    from conftest import TINY

    def make(name):
        arguments = [a.replace(HERE, str(folder)) for a in MISTAKES[name][0]]
        given = {**TINY, "data_dir": char_data, "out_dir": folder / "out"}
        argv = [f"--{key}={value}" for key, value in given.items()] + arguments
        if name in REAL_STARTS or not Path("/proc/self/statm").exists():
            env = {key: value.replace(HERE, str(folder)) for key, value in NO_NETWORK.items()}
            return script("train.py", *argv, cwd=folder, env=env)
        return request.getfixturevalue("forked")("train.py", argv, folder)

    return make


def assert_one_line(result, words):
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stdout
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_input_is_one_line_and_status_2(make, folder, name):
    result = make(name)
    assert_one_line(result, [word.replace(HERE, str(folder)) for word in MISTAKES[name][1]])
    assert not (folder / "out").exists() and not (folder / "none").exists()  # nor a run


@pytest.mark.parametrize("steps, batch_size, world_size, near", [(5, 3, 2, 4), (1, 1, 8, 8)])
def test_indivisible_batch_is_refused(steps, batch_size, world_size, near):
    with pytest.raises(UserError) as caught:
        Ranks(0, 0, world_size).micro_batches(steps, batch_size)
    assert f"--gradient_accumulation_steps={near} " in str(caught.value)
    assert f"{world_size} processes" in str(caught.value)


def test_long_error_becomes_one_line(capsys):
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise UserError("first\n  second\nthird")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: first second third\n"


def test_programming_error_keeps_its_traceback():
    with pytest.raises(ValueError, match="shape"), one_line_errors():
        raise ValueError("shape")


def test_torchrun_prints_one_line_per_node(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("told once is enough")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell")
@pytest.mark.parametrize("end", ["| head -3", ">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full"])
def test_training_outlives_its_console(settings, tmp_path, end):
    """A closed pipe or stream, or a full disk, loses only console output."""
    if end == "> /dev/full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = [sys.executable, "-u", str(ROOT / "train.py"), *settings(tmp_path / "out")]
    subprocess.run(["bash", "-c", f"{shlex.join(command)} {end}"], timeout=120)
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["iter_num"] == 8


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
    ],
    ids=str,
)
def test_invalid_ranks_are_one_line(settings, tmp_path, variables):
    command = [sys.executable, str(ROOT / "train.py"), *settings(tmp_path / "out")]
    env = os.environ | variables
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "describe no rank" in result.stderr
