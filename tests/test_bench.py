"""bench.py times train.py's steps on any device, without data, and writes nothing."""

import pytest
from conftest import ROOT
from test_compiling import compiler

SMALL = "--n_layer=1 --n_embd=32 --n_head=2 --block_size=16 --vocab_size=64 --steps=2".split()
LINES = ["device", "data", "model", "step", "speed", "peak memory", "products", "copy", "MFU"]


def lines_of(done):
    assert done.returncode == 0, done.stderr
    return {line[:13].strip(): line[13:].strip() for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["--compile=True"], marks=compiler),
        ["--optimizer=muon", "--dtype=bfloat16", "--activation_checkpointing=True"],
        [str(ROOT / "config/train_shakespeare_char.py"), "--batch_size=2"],
    ],
    ids=["compiled", "muon", "recipe"],
)
def test_bench_reports_all_figures(device, script, argv, tmp_path):
    argv = [*argv, *SMALL, f"--device={device.type}"]
    found = lines_of(script("bench.py", *argv, cwd=tmp_path))
    assert [*found] == LINES
    assert float(found["step"].split()[0]) > 0
    assert 0 < float(found["MFU"].split("%")[0]) < 150
    assert found["model"].endswith("not compiled") == ("--compile=True" not in argv)
    assert not [*tmp_path.iterdir()]


def test_bench_under_torchrun(torchrun, tmp_path):
    done = torchrun("bench.py", *SMALL, "--batch_size=3", "--device=cpu", cwd=tmp_path)
    found = lines_of(done)
    assert [*found] == LINES
    assert "6x16 tokens a step" in found["model"]
