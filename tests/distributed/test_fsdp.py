"""FSDP matches a single process and writes the same checkpoint."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import train
from brisk.checkpoint import load_checkpoint
from brisk.device import Device
from brisk.distributed.process_group import Ranks
from brisk.distributed.sharded_work import chunk_bounds
from brisk.errors import UserError
from brisk.training.memory import expected_memory, shared_state, state_memory
from configurator import configure
from model import GPT, GPTConfig

# Micro-batches that 2 and 4 processes split as one does, so that dropout draws the same numbers;
# evaluations of 3 batches, which neither can share evenly.
CLASSIC = {"dropout": 0.2, "bias": True}
MODERN = {"position": "rotary", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "tied": False}
MODERN |= {"n_kv_head": 1, "ngrams": 3, "ngram_rows": 32, "zero_init": True}
SIZES = {"n_layer": 2, "gradient_accumulation_steps": 8, "batch_size": 2, "eval_iters": 3}
SIZES |= {"max_iters": 11, "lr_decay_iters": 11}
RUNS = {
    "adamw-classic": CLASSIC | {"optimizer": "adamw"},
    "muon-modern": MODERN | {"optimizer": "muon"},
}
FAST_AND_SLOW = [pytest.param(RUNS["adamw-classic"], marks=pytest.mark.slow), RUNS["muon-modern"]]
MORE_RUNS = {
    "adamw-modern": MODERN | {"optimizer": "adamw"},
    "muon-classic": CLASSIC | {"optimizer": "muon"},
}


def metrics(out_dir, key):
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def assert_same_run(run, whole):
    """Compare all losses with those of `whole`, and the final state."""
    for key in ("loss", "grad_norm"):
        losses, expected = metrics(run, key), metrics(whole, key)
        assert losses == pytest.approx(expected, abs=1e-4) and len(losses) == 12
    losses, expected = metrics(run, "val_loss"), metrics(whole, "val_loss")
    assert losses.items() and {s: expected[s] for s in losses if s in expected} == pytest.approx(
        {s: losses[s] for s in losses if s in expected}, abs=1e-4
    )
    state, expected = (load_checkpoint(out / "last.pt") for out in (run, whole))
    assert state.keys() == expected.keys() and state["model"].keys() == expected["model"].keys()
    for name, weight in expected["model"].items():
        torch.testing.assert_close(state["model"][name], weight, atol=1e-4, rtol=0)
    moments, expected = state["optimizer"]["state"], expected["optimizer"]["state"]
    assert moments.keys() == expected.keys()
    for number, kept in expected.items():
        for key, moment in kept.items():
            assert type(moments[number][key]) is torch.Tensor  # no DTensor in the file
            torch.testing.assert_close(moments[number][key], moment, atol=1e-4, rtol=1e-3)


def succeed(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_two_ranks_match_one_process(train_tiny, settings, torchrun, tmp_path, changes, parallel):
    """DDP too, for Muon, whose work is divided there as well."""
    changes = {**SIZES, **changes}
    whole = train_tiny(tmp_path / "whole", **changes).out_dir
    two = tmp_path / "two"
    console = succeed(torchrun("train.py", *settings(two, **changes, parallel=parallel)))
    assert_same_run(two, whole)
    assert f"2 processes ({parallel}), each on cpu" in console
    assert len(re.findall(r"^iter 2: ", console, re.MULTILINE)) == 1  # one of them speaks
    assert (two / "last.pt").stat().st_size < 1.02 * (whole / "last.pt").stat().st_size


@pytest.mark.parametrize("changes", FAST_AND_SLOW, ids=RUNS)
def test_fsdp_and_ddp_resume_each_other(
    train_tiny, resume, settings, resumed_settings, torchrun, tmp_path, quick_script, changes
):
    changes = {**SIZES, **changes}
    whole = train_tiny(tmp_path / "whole", **changes).out_dir
    shared = tmp_path / "shared"
    argv = settings(shared, **{**changes, "max_iters": 5, "parallel": "fsdp"})
    succeed(torchrun("train.py", *argv, processes=4))
    shutil.copytree(shared, tmp_path / "alone")
    assert_same_run(resume(tmp_path / "alone", max_iters=11).out_dir, whole)
    argv = [f"--out_dir={shared}", "--device=cpu", "--num_samples=1", "--max_new_tokens=5"]
    assert succeed(quick_script("sample.py", *argv))
    argv = resumed_settings(shared, max_iters=11, dry_run=True)
    assert "2 processes (fsdp)" in succeed(torchrun("train.py", *argv))  # it stays the run's
    argv = resumed_settings(shared, max_iters=11, parallel="ddp")
    assert "2 processes (ddp)" in succeed(torchrun("train.py", *argv))
    assert_same_run(shared, whole)

    train_tiny(tmp_path / "back", **{**changes, "max_iters": 5})
    argv = resumed_settings(tmp_path / "back", max_iters=11, parallel="fsdp")
    succeed(torchrun("train.py", *argv))
    assert_same_run(tmp_path / "back", whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes, parallel", [(4, "fsdp"), (4, "ddp"), (2, "fsdp")])
@pytest.mark.parametrize("changes", [*RUNS.values(), *MORE_RUNS.values()], ids=RUNS | MORE_RUNS)
def test_more_ranks_match_one_process(
    train_tiny, settings, torchrun, tmp_path, changes, processes, parallel
):
    changes = {**SIZES, **changes}
    whole = train_tiny(tmp_path / "whole", **changes).out_dir
    argv = settings(tmp_path / "out", **changes, parallel=parallel)
    succeed(torchrun("train.py", *argv, processes=processes))
    assert_same_run(tmp_path / "out", whole)


def test_other_settings_work_with_fsdp(train_tiny, settings, torchrun, tmp_path):
    """Samples at evaluations, skipped steps, recomputed and frozen blocks."""
    changes = {**SIZES, **CLASSIC, "eval_samples": 2, "on_spike": "skip", "spike_factor": 20}
    changes["freeze_layers"] = 1
    whole = train_tiny(tmp_path / "whole", **changes).out_dir
    more = {"parallel": "fsdp", "activation_checkpointing": True}
    succeed(torchrun("train.py", *settings(tmp_path / "out", **changes, **more)))
    assert_same_run(tmp_path / "out", whole)
    texts, expected = (metrics(out, "samples") for out in (tmp_path / "out", whole))
    assert texts == expected and len(texts) == 4


@pytest.mark.slow
def test_compiled_blocks(train_tiny, settings, torchrun, tmp_path):
    changes = {**SIZES, **MODERN, "compile": True, "optimizer": "muon"}
    whole = train_tiny(tmp_path / "whole", **changes).out_dir
    succeed(torchrun("train.py", *settings(tmp_path / "out", **changes, parallel="fsdp")))
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.slow
def test_float16_with_grad_scaler(train_tiny, settings, torchrun, tmp_path):
    """The scaler starts at 65536 and skips steps with overflowing gradients, the same ones on all
    ranks."""
    changes = {**SIZES, **CLASSIC, "dtype": "float16"}
    whole = train_tiny(tmp_path / "whole", **changes).out_dir
    succeed(torchrun("train.py", *settings(tmp_path / "out", **changes, parallel="fsdp")))
    for key in ("loss", "val_loss"):
        expected = metrics(whole, key)
        assert metrics(tmp_path / "out", key) == pytest.approx(expected, abs=2e-3)
    scaled, expected = (load_checkpoint(o / "last.pt")["scaler"] for o in (tmp_path / "out", whole))
    assert scaled == expected


# A run whose loss is NaN at step 6, once.
POISONED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from brisk.errors import one_line_errors
from brisk.training.spikes import SpikeWatch
import train

look, poisoned = SpikeWatch.record, []
check, checked = SpikeWatch.check, []

def poison(self, step, position, loss, grad_norm, limit):
    if step == 6 and not poisoned:
        poisoned.append(step)
        loss = loss * float("nan")
    return look(self, step, position, loss, grad_norm, limit)

def poison_check(self, loss, grad_norm):
    checked.append(loss)
    return check(self, loss * (float("nan") if len(checked) == 7 else 1), grad_norm)

SpikeWatch.record, SpikeWatch.check = poison, poison_check
with train.clean_end(), one_line_errors():
    train.main(train.configure(train.TrainConfig, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "on_spike", ["rewind", *(pytest.param(key, marks=pytest.mark.slow) for key in ("skip", "stop"))]
)
def test_all_ranks_respond_to_a_spike(settings, torchrun, quick_script, tmp_path, on_spike):
    poisoned = tmp_path / "poisoned.py"
    poisoned.write_text(POISONED)
    changes = {**SIZES, **CLASSIC, "on_spike": on_spike, "parallel": "fsdp"}
    one = quick_script(poisoned, *settings(tmp_path / "one", **changes))
    two = torchrun(poisoned, *settings(tmp_path / "two", **changes))
    said = {"rewind": "continuing with new batches", "skip": ", skipped", "stop": ""}[on_spike]
    assert said in one.stdout and said in two.stdout
    if on_spike == "stop":
        assert one.returncode == 1 and two.returncode != 0
        assert "step 6: the loss is nan" in one.stderr and "step 6: the loss is nan" in two.stderr
        assert load_checkpoint(tmp_path / "two" / "last.pt")["iter_num"] == 4
        return
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_all_ranks_stop_together(settings, resume, torchrun, train_tiny, tmp_path):
    """Every process gets the signal, at different steps."""
    stopped = tmp_path / "stopped.py"
    stopped.write_text(
        POISONED.replace("step == 6", "step == 2 + int(train.os.environ['RANK'])")
        .replace("== 7", "== 0")
        .replace('loss = loss * float("nan")', "stop.number = 15")
        .replace("import train\n", "import os, brisk.training.signals, train\ntrain.os = os\n")
        .replace("look, poisoned", "stop = brisk.training.signals.StopRequest()\nlook, poisoned")
        .replace("sys.argv[1:])", "sys.argv[1:]), stop")
    )
    changes = {**SIZES, **CLASSIC}
    result = torchrun(stopped, *settings(tmp_path / "out", **changes, parallel="fsdp"))
    assert result.returncode != 0 and "saved step 3 to" in result.stdout, result.stderr
    whole = train_tiny(tmp_path / "whole", **changes).out_dir
    assert_same_run(resume(tmp_path / "out").out_dir, whole)


def test_model_error_is_one_line(settings, torchrun, tmp_path):
    """Only rank 0 builds the model."""
    argv = settings(tmp_path / "out", n_head=3, parallel="fsdp")
    result = torchrun("train.py", *argv)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1 and "n_head=3" in errors[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cpu_offload": True}, "--cpu_offload needs --parallel=fsdp"),
        ({"cpu_offload": True, "parallel": "fsdp"}, "--cpu_offload needs --parallel=fsdp, and"),
        ({"dry_run_world_size": 8}, "--dry_run_world_size needs --dry_run=True"),
    ],
)
def test_unsupported_keys_are_refused(train_tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_tiny(tmp_path / "out", **changes)


@given(rows=st.integers(1, 100), world_size=st.integers(1, 20))
def test_chunk_bounds_match_torch_chunk(rows, world_size):
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(world_size)]
    chunks += [0] * (world_size - len(chunks))
    edges = [chunk_bounds(rank, world_size, rows) for rank in range(world_size)]
    assert [end - first for first, end in edges] == chunks
    assert edges[0][0] == 0 and edges[-1][1] == rows


# ----------------------------------------------------------------------------- memory

# The memory of a process after a step, in bytes.
HELD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import brisk.training.async_checkpoint
from brisk.distributed.process_group import to_local
import train

def save(self, state, *_):
    weights = {{id(w): to_local(w).nbytes for w in state["model"].values()}}
    moments = [to_local(m).nbytes for kept in state["optimizer"]["state"].values()
               for key, m in kept.items() if key != "step"]
    # in one write: two processes share a pipe
    sys.stdout.write(f"held {{2 * sum(weights.values()) + sum(moments)}}\\n")

brisk.training.async_checkpoint.Saver.save = save
with train.clean_end():
    train.main(train.configure(train.TrainConfig, sys.argv[1:]))
"""


def test_rank_holds_only_its_shard(settings, torchrun, tmp_path):
    (tmp_path / "held.py").write_text(HELD)
    changes = {"parallel": "fsdp", "n_embd": 64, "eval_interval": 100, "max_iters": 1}
    printed = succeed(torchrun(tmp_path / "held.py", *settings(tmp_path / "out", **changes)))
    held = [int(number) for number in re.findall(r"held (\d+)", printed)]
    millions = float(re.search(r"number of parameters: ([\d.]+)M", printed)[1])
    parameters = 1e6 * millions + 16 * 64  # and the position embeddings
    share = 16 * parameters / 2
    assert len(held) == 2 and held == pytest.approx([share, share], rel=0.1)


def test_expected_memory_falls_with_world_size():
    sizes = {"block_size": 32, "vocab_size": 64, "n_layer": 6, "n_head": 2, "n_embd": 64}
    model, cpu = GPT(GPTConfig(**sizes)), Device(torch.device("cpu"), "float32")
    parameters = sum(weight.numel() for weight in model.parameters())

    def expected(world_size, parallel, **more):
        return expected_memory(model, 2, cpu, ranks=Ranks(0, 0, world_size, parallel), **more)

    alone = expected_memory(model, 2, cpu)
    assert expected(1, "fsdp") == expected(1, "ddp") == expected(8, "ddp") == alone
    assert expected(8, "ddp", accumulates=True) == alone + 4 * parameters
    two, four = expected(2, "fsdp"), expected(4, "fsdp")
    assert two - four == pytest.approx(16 * parameters / 4)
    assert four < alone and expected(4, "fsdp", accumulates=True) == four + 4 * parameters
    offloaded = expected(4, "fsdp", offload=True)
    assert four - offloaded == shared_state(model, Ranks(0, 0, 4, "fsdp"))
    state = state_memory(model, Ranks(0, 0, 4, "fsdp"), False, False, 4)
    assert expected(4, "fsdp", recomputed=True) - state < (four - state) / 2


def test_dry_run_plans_for_a_world_size(main, settings, tmp_path):
    def foretold(**changes):
        console = main(settings(tmp_path / "out", dry_run=True, batch_size=8, **changes)).console
        return re.search(r"device: (.*)cpu .* about (\S+) MB", console).groups()

    deep = {"n_layer": 12, "n_embd": 64}
    assert foretold()[0] == ""
    each, memory = foretold(dry_run_world_size=8, parallel="fsdp", **deep)
    assert each == "8 processes (fsdp), each on "
    assert float(memory) < float(foretold(**deep)[1]) / 2
    assert not (tmp_path / "out").exists()


def test_dry_run_of_gpt2_xl_on_8_gpus(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = configure(train.TrainConfig, ["config/train_gpt2_xl.py"])
    assert config.parallel == "fsdp"
    tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
    assert tokens == 2**19 and len(Ranks(0, 0, 8).micro_batches(32, config.batch_size)) == 4
