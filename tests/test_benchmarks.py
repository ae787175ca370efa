"""The benchmarks run, and their statistics are right."""

import importlib
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from brisk.data.dataset import write_dataset
from brisk.data.loader import TokenFile
from brisk.data.tokenizer import CharTokenizer
from brisk.errors import UserError
from configurator import configure

FOLDER = ROOT / "benchmarks"
CHECKOUT = Path(os.environ.get("NANOGPT") or "nowhere")
sys.path.insert(0, str(FOLDER))  # for imports between the benchmarks


import ratios  # noqa: E402 (found by the line above)
import sides  # noqa: E402


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_naive_bayes_matches_the_formula():
    judge = load("label_agreement").NaiveBayes({"a": ["xx", "xy"], "b": ["yy"]}, alpha=0.5)
    # features: x, y and the pairs xx, xy, yy; a has x 3, y 1, xx 1, xy 1 of 6, b has y 2, yy 1 of 3
    a = math.log(1.5 / 8.5) + math.log(3.5 / 8.5)  # for "yx", whose pair is unknown
    b = math.log(2.5 / 5.5) + math.log(0.5 / 5.5)
    assert judge.label("yx") == ("a" if a > b else "b")
    assert judge.label("xx") == "a" and judge.label("yy") == "b"


def test_agreement_of_a_trained_model(train_tiny, tmp_path, capsys):
    train = ["+abab", "+aabb", "-cdcd", "-ccdd"] * 20
    tokenizer = CharTokenizer(sorted("+-abcd"), eot=True)
    write_dataset(tmp_path / "data", tokenizer, {"train": train, "val": train}, "kinds", True)
    more = {"data_dir": tmp_path / "data", "rows": "documents", "max_iters": 100, "block_size": 8}
    train_tiny(tmp_path / "out", **more, lr_decay_iters=100, eval_interval=100)
    module = load("label_agreement")
    argv = [f"--out_dir={tmp_path / 'out'}", f"--data_dir={tmp_path / 'data'}", "--prompts=+,-"]
    capsys.readouterr()
    module.main(configure(module.AgreementConfig, [*argv, "--count=50", "--json"]))
    result = json.loads(capsys.readouterr().out)
    for kind in ("+", "-"):
        assert result[kind]["real"] == 1.0 and result[kind]["ratio"] > 0.9
        assert result[kind]["n_written"] == 50


# ---------------------------------------------------------------------------- nanoGPT


@pytest.fixture
def compare(monkeypatch):
    """compare_nanogpt.py with a tiny model size."""
    module = load("compare_nanogpt")
    tiny = module.Size(2, 16, 1, 2, 16, 65, 0.0, log_interval=1, warm_up=1, steps=3, samples=2)
    monkeypatch.setitem(module.SIZES, "tiny", tiny)
    return module


@pytest.fixture
def peer(tmp_path):
    """A checkout of nanoGPT in which imports of our modules fail."""
    if not (CHECKOUT / "train.py").exists():
        pytest.skip("NANOGPT names no checkout of nanoGPT")
    leave_out = shutil.ignore_patterns(".git", "assets", "out*", "*.bin")
    folder = shutil.copytree(CHECKOUT, tmp_path / "peer", ignore=leave_out)
    (folder / "brisk.py").write_text("raise RuntimeError('nanoGPT has taken something of ours')")
    return folder


@pytest.fixture
def result(compare, peer, text, tmp_path, capsys):
    """Run a section of the comparison for one round. Returns {label: row}."""

    def run(section, *more):
        (tmp_path / "text.txt").write_text(text * 20, encoding="utf-8")
        argv = [f"--peer={peer}", f"--sections={section}", "--sizes=tiny", "--rounds=1"]
        argv += [f"--input={tmp_path / 'text.txt'}", "--device=cpu", "--tokens=20"]
        argv += [f"--json={tmp_path / 'result.json'}", "--dtype=float32"]
        compare.main(configure(compare.CompareConfig, [*argv, *more]))
        written = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
        assert written["rounds"] == 1 and "cpu" in written["device"] and written["threads"] >= 1
        printed = capsys.readouterr().out
        for row in written["rows"]:
            assert row["section"] == section and row["what"] in printed
            assert len(row["brisk"]) == len(row["nanogpt"]) == 1
            assert min(row["brisk"] + row["nanogpt"]) > 0
        return {row["what"]: row for row in written["rows"]}

    return run


def test_compare_train(result):
    more = "--max_iters=20 --eval_interval=10 --eval_iters=2 --n_layer=1 --n_embd=16 --n_head=2"
    rows = result("train", f"--train_more={more}")
    assert list(rows) == ["train.py, whole process", "a step, as it prints it"]
    whole, step = rows.values()
    assert whole["check"]["what"] == "validation loss at step 20"
    assert 2 < whole["check"]["brisk"] < 4.3 and 2 < whole["check"]["nanogpt"] < 4.3
    assert max(step["brisk"]) * 20 < min(whole["brisk"])


def test_compare_step_uses_the_same_batches(result):
    (row,) = result("step").values()
    assert row["check"]["holds"] and row["check"]["difference"] < 1e-4
    assert row["check"]["brisk"] == pytest.approx(math.log(65), abs=0.2)
    assert row["precision"] == {"brisk": "float32", "nanogpt": "float32"}
    assert row["tokens"] == 2 * 16


def test_compare_sample(result):
    rows = result("sample")
    kinds = [what.removeprefix("tiny, 2x20, ") for what in rows]
    assert kinds == ["sample.py, whole process", "generate alone", "alone, exact_window"]
    whole, alone, exact = rows.values()
    assert max(alone["brisk"]) < min(whole["brisk"])  # the whole process imports torch
    assert exact["nanogpt"] == alone["nanogpt"] and exact["brisk"] != alone["brisk"]


def test_compare_data(result):
    whole, alone = result("data").values()
    assert whole["check"] == {
        "what": "files that differ",
        "brisk": 0,
        "nanogpt": 0,
        "limit": 0,
        "difference": 0,
        "holds": True,
    }
    for side in ("brisk", "nanogpt"):
        assert max(alone[side]) < min(whole[side])


def test_compare_start(result):
    (row,) = result("start").values()
    assert row["what"] == "tiny, to the first step"


def test_compare_memory(result):
    pytest.importorskip("resource", reason="Windows does not tell it")
    (row,) = result("memory").values()
    for side in ("brisk", "nanogpt"):
        assert 50e6 < min(row[side]) < 5e9


def test_wrong_peer_is_one_line(script, quick_script, tmp_path):
    for start, argv, words in [
        (script, [], "--peer="),
        (quick_script, [f"--peer={tmp_path}"], f"{tmp_path} is not a checkout of nanoGPT"),
        (quick_script, ["--peer=x", "--sections=step,dat"], "unknown name dat; did you mean data?"),
        (quick_script, ["--peer=x", "--sizes=gpt3"], "unknown name gpt3; did you mean gpt2?"),
    ]:
        done = start("benchmarks/compare_nanogpt.py", *argv)
        assert done.returncode == 2 and done.stdout == ""
        assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_ratios_are_within_a_round():
    row = {"brisk": [1.0, 2.0, 4.0], "nanogpt": [3.0, 2.0, 20.0]}
    assert ratios.summary(row) == {
        "median": {"brisk": 2.0, "nanogpt": 3.0},
        "ratio": 3.0,  # median of 3, 1 and 5; the ratio of the medians is 1.5
        "lowest": 1.0,
        "highest": 5.0,
        "spread": {"brisk": 1.5, "nanogpt": 6.0},
    }


def test_disagreement_is_marked():
    runs = {"brisk": [{"s": 2.0}, {"s": 2.0}], "nanogpt": [{"s": 3.0}, {"s": 5.0}]}
    row = ratios.row("train", "a run", runs, "s", tokens=100)
    row["summary"] = ratios.summary(row)
    for theirs, marked in [(1.885, False), (1.91, True), (math.nan, True)]:
        row["check"] = ratios.check("loss", 1.88, theirs, 0.02)
        table = ratios.as_lines(row)
        assert ("DIFFER" in table) is marked and "loss: 1.88" in table
    assert "2.00 (1.50 to 2.50)" in table and "0% 50%" in table
    assert "tokens/s: 50, 25" in table


def test_first_side_alternates():
    order = []
    config = load("compare_nanogpt").CompareConfig(rounds=3)
    figures = sides.alternate(config, {"a": 1, "b": 2}, lambda side: order.append(side) or side)
    assert order == [1, 2, 2, 1, 1, 2] and figures == {"a": [1] * 3, "b": [2] * 3}


def test_window_starts_match_the_batches(tmp_path):
    sides.write_random_ids(tmp_path, 65, count=1000)
    starts = sides.window_starts(tmp_path, block_size=16, batch_size=5, batches=40)
    ids = np.fromfile(tmp_path / "train.bin", "<u2")
    data = TokenFile(tmp_path / "train.bin", 16, 65)
    for number, row in enumerate(starts):  # the last of them in another epoch than the first
        x, _ = data.batch(5 * number, 5)
        assert [ids[start : start + 16].tolist() for start in row] == x.tolist()


@pytest.fixture
def side(tmp_path):
    return sides.Side("nanogpt", tmp_path, tmp_path)


def test_start_ends_at_the_first_step(side, tmp_path):
    (tmp_path / "train.py").write_text("print('iter 0: loss 1'); open('went_on', 'w')")
    job = {"job": "start", "script": str(tmp_path / "train.py"), "argv": []}
    began = time.monotonic()
    assert 0 < sides.work(side, job)["seconds"] < time.monotonic() - began
    assert not (tmp_path / "went_on").exists()
    (tmp_path / "train.py").write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match="nanogpt"):
        sides.work(side, job)


def test_preparing_is_timed_without_imports(side, tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(1)")
    (tmp_path / "prepare.py").write_text("def main():\n    import slow\nmain()")
    job = {"job": "prepare", "script": str(tmp_path / "prepare.py"), "argv": []}
    figures = sides.work(side, {**job, "modules": []})
    assert figures["seconds"] >= 1 and "slow" in figures["modules"]
    assert sides.work(side, {**job, "modules": figures["modules"]})["seconds"] < 1


def test_decode_ratio(capsys, monkeypatch):
    script = load("decode_ratio")
    sizes = dict(n_layer=1, n_head=2, n_embd=8, block_size=128, vocab_size=9)
    monkeypatch.setattr(script, "MODELS", {"tiny": sizes})
    argv = ["--models=tiny", "--rows=1,3", "--rounds=2", "--steps=2"]
    script.main(configure(script.DecodeRatioConfig, argv))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["tiny", "1"], ["tiny", "3"]]
    with pytest.raises(UserError, match="models=tony is not one of tiny"):
        script.main(configure(script.DecodeRatioConfig, ["--models=tony"]))


# ---------------------------------------------------------------------------- on a GPU


@pytest.fixture
def gpu():
    return load("gpu")


@pytest.fixture
def measure(gpu, tmp_path, monkeypatch):
    """Run a section of gpu.py with tiny sizes in this process. Returns its rows."""
    monkeypatch.delenv("NANOGPT", raising=False)

    def run(section, *more):
        argv = ["--tiny", "--device=cpu", f"--out={tmp_path / 'rows.jsonl'}", f"--run={section}"]
        gpu.main(configure(gpu.GpuConfig, [*argv, *more]), [])
        return gpu.read_rows(tmp_path / "rows.jsonl")

    return run


GPU_PARTS = {
    "correct": ["ceilings", "memory", "graphs"],
    "gpt2": ["step", "batches", "ddp", "attention", "loss", "kernels", "xl"],
    "small": ["compiled", "eager", "graphs"],
    "decode": ["samples", "graphs"],
    "learn": ["shakespeare_char", "gpt2", "modern"],
}


@pytest.mark.parametrize("section", GPU_PARTS)
def test_section_writes_rows(gpu, measure, section):
    rows = measure(section, f"--parts={','.join(GPU_PARTS[section])}")
    assert [row for row in rows if "failed" in row] == []
    assert {row["part"] for row in rows} == set(GPU_PARTS[section])
    assert all(min(row["values"]) > 0 for row in rows)
    table = gpu.tables(rows)
    assert table.startswith(f"## {section}") and all(row["what"] in table for row in rows)


def test_every_part_is_tested(gpu):
    for section in gpu.SECTIONS:
        parts = importlib.import_module(f"gpu_sections.{section}").PARTS
        assert set(parts) - {"tests"} == set(GPU_PARTS[section])


@pytest.mark.slow
def test_section_of_tests(measure):
    *_, row = measure("correct", "--parts=tests")
    assert row["what"] == "tests of numbers that passed" and row["values"][0] > 0


def test_sides_alternate(measure, peer):
    step, *starts = measure("gpt2", "--parts=step", f"--peer={peer}")
    assert len(step["values"]) == len(step["peer"]) == 1
    losses = [step["more"][f"loss, {name}"] for name in ("brisk", "nanogpt")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # the same batches
    assert [row["what"].split(", ")[1] for row in starts] == ["cold cache", "warm cache"]


def test_failed_part_is_a_row(measure, monkeypatch):
    small = importlib.import_module("gpu_sections.small")

    def fails(job):
        yield {"what": "first", "unit": "ms", "values": [1.0]}
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(small, "PARTS", {"a": fails, "b": fails})
    rows = [(row["part"], row.get("failed")) for row in measure("small")]
    failed = "RuntimeError: CUDA out of memory."
    assert rows == [("a", None), ("a", failed), ("b", None), ("b", failed)]


def test_section_stops_at_its_limit(gpu, monkeypatch, tmp_path):
    monkeypatch.setitem(gpu.SECTIONS, "small", 0.001)
    argv = ["--tiny", "--device=cpu", f"--out={tmp_path / 'rows.jsonl'}", "--sections=small"]
    gpu.main(configure(gpu.GpuConfig, argv), argv)
    machine, stopped = gpu.read_rows(tmp_path / "rows.jsonl")
    assert "cpu" in machine["machine"] and "PyTorch" in machine["machine"]
    assert stopped["failed"].startswith("stopped after")


def test_table_of_rows(gpu, script, tmp_path):
    rows = [
        {"section": "", "what": "machine", "machine": "a GPU", "values": [], "unit": ""},
        {"section": "gpt2", "part": "step", "what": "a step", "unit": "ms",
         "values": [10.0, 20.0, 40.0], "peer": [20.0, 20.0, 20.0], "more": {"MFU": 0.51234}},
        {"section": "decode", "part": "x", "what": "a sample", "unit": "tokens/s",
         "values": [3000.0], "peer": [1000.0]},
        {"section": "gpt2", "part": "xl", "what": "xl", "failed": "OutOfMemoryError: all"},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = script("benchmarks/gpu.py", f"--table={tmp_path / 'rows.jsonl'}")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0] == "## gpt2" and lines[2] == "a GPU"
    ratio = "1 (0.5 to 2)"
    assert f"| a step | 20 (10 to 40) ms | 20 (20 to 20) ms | {ratio} | MFU 0.5123 |" in lines
    assert "| a sample | 3,000 tokens/s | 1,000 tokens/s | 3 |  |" in lines
    assert "| xl | failed: OutOfMemoryError: all |  |  |  |" in lines


def test_unknown_section_is_one_line(quick_script, tmp_path):
    for argv, words in [
        (["--sections=smal"], "unknown section smal; did you mean small?"),
        (["--sections=small", "--parts=eagre"], "unknown part eagre; did you mean eager?"),
        ([f"--table={tmp_path / 'none'}"], "--table="),
    ]:
        done = quick_script("benchmarks/gpu.py", *argv, "--device=cpu")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert words in done.stderr


def test_clocks_match_nvidia_smi(gpu, monkeypatch, tmp_path):
    job = importlib.import_module("gpu_sections.job")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job.clocks() == {}
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '1980, 3201, 412.53'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert job.clocks() == {"SM MHz": 1980, "memory MHz": 3201, "W": 412.53}


def test_gpu_only_parts(measure, monkeypatch):
    """The branches for GPUs, on a CPU that pretends to be one."""
    job, fractions = importlib.import_module("gpu_sections.job"), []
    monkeypatch.setattr(job.Job, "on_gpu", True)
    monkeypatch.setattr(torch, "compile", lambda form: form)
    stubs = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda *_: 10**9,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=160e9),
        "set_per_process_memory_fraction": fractions.append,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    rows = measure("correct", "--parts=ceilings,memory")
    rows = measure("gpt2", "--parts=loss,attention,xl,step")
    failed = [row["what"] for row in rows if "failed" in row]
    assert set(failed) <= {f"attention, {kernel}" for kernel in ("cuDNN", "memory-efficient")}
    found = {row["what"] for row in rows}
    assert {"loss, ours, compiled", "memory expected, eager", "attention, flash"} <= found
    assert {"product of 256x256, float32 as TF32", "memory, 124M, 2x16"} <= found
    assert fractions == [0.5, 1.0]


def test_graphs_on_a_gpu(measure, monkeypatch, tapes):
    """As tapes on a CPU that is taken for one."""
    job = importlib.import_module("gpu_sections.job")
    monkeypatch.setattr(job.Job, "on_gpu", True)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    rows = measure("correct", "--parts=graphs")
    assert [row["values"] for row in rows] == [[1.0]] * 4 and tapes.captures >= 5
    measure("small", "--parts=graphs")


def test_failed_worker_ends_the_others(measure, monkeypatch):
    """The row has its last message, and no process remains that holds memory."""
    gpt2, made = importlib.import_module("gpu_sections.gpt2"), []

    class Worker(gpt2.Worker):
        def __init__(self, side, job, environment=None):
            wrong = {**job, "tokens": "nowhere/train.bin"} if made else job
            super().__init__(side, wrong, environment)
            made.append(self)

    monkeypatch.setattr(gpt2, "Worker", Worker)
    (row,) = measure("gpt2", "--parts=ddp")
    assert "no train.bin" in row["failed"]
    assert [worker.process.poll() is not None for worker in made] == [True, True]


def test_estimate_follows_from_the_peak(capsys):
    script = load("estimate")
    script.main(configure(script.EstimateConfig, ["--mfu=0.5", "--recipe=config/model/gpt2.py"]))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    rates = {name.strip("| "): float(rate.replace(",", "")) for name, _, rate, _ in rows[2:]}
    flops = 6 * 124.4e6 + 12 * 12 * 768 * 1024  # PaLM, appendix B
    assert rates["A100"] == pytest.approx(0.5 * 312e12 / flops, rel=0.01)
