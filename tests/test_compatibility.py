"""Files of version 0.1.0 still load, resume, sample, evaluate and export with the same results.

tests/fixtures has the files and the recorded results (`expected.json`, see `make.py`). Texts,
digests of exported weights and data files must be equal. Losses must be equal if this machine
rounds like the recording one (`EXACT`), else within `tolerance`.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from fixtures import observe

EXPECTED = json.loads((observe.FIXTURES / "expected.json").read_text(encoding="utf-8"))
RUNS = sorted(EXPECTED["runs"])
MACHINE = observe.machine()
ROUNDS_ALIKE = ("torch", "machine", "cpu_capability", "rounding", "dropout")
EXACT = all(MACHINE[key] == EXPECTED["made"][key] for key in ROUNDS_ALIKE)

PARAMETERS = 10_000  # maximum of a recorded model
LONGEST_SUM = 64  # terms of a product, 4 n_embd


@pytest.fixture(autouse=True)
def beside_the_data(monkeypatch):
    """The recorded runs have relative paths to their data."""
    monkeypatch.chdir(observe.FIXTURES)


@pytest.fixture(params=RUNS)
def run(request):
    return request.param


def folder_of(run):
    return observe.FIXTURES / "runs" / run


def unit(run):
    """Relative error of a matrix product: one float32 rounding for each term, or one float16
    rounding after a float32 sum."""
    return 2**-11 if run == "float16" else LONGEST_SUM * 2**-24


def tolerance(run, recorded, step):
    """Largest difference of the loss at `step` that rounding explains.

    With u the relative error of a product, a loss differs by u times itself, and by what its
    weights differ. A gradient g_i is off by about e = u ‖g‖ / √N. AdamW divides by its size, so
    the weight is off by at most lr · min(2, e / |g_i|) a step, and the loss, to first order, by
    |g_i| times that: at most lr · e for each of N weights, lr · u · √N ‖g‖ in all. Muon divides by
    singular values and is bounded likewise; its rate is twice AdamW's.
    """
    line = max((int(s), line) for s, line in recorded["steps"].items() if int(s) <= step)[1]
    rates = sum(line["lr"] for s, line in recorded["steps"].items() if int(s) < step)
    rates *= 3 if run == "modern_muon" else 1
    drift = rates * math.sqrt(PARAMETERS) * line["grad_norm"]
    return unit(run) * (line["loss"] + drift)


def assert_same_results(run, found, recorded):
    """Compare the losses and counters of a resumed run."""
    if EXACT:
        assert found == recorded
        return
    for part in ("steps", "evaluations"):
        assert found[part].keys() == recorded[part].keys()
        for step, line in recorded[part].items():
            within = tolerance(run, recorded, int(step))
            for key in line.keys() & {"loss", "train_loss", "val_loss"}:
                assert found[part][step][key] == pytest.approx(line[key], abs=within, rel=0)
            assert found[part][step]["tokens"] == line["tokens"]
            if "lr" in line:  # cosines differ between C libraries
                assert found[part][step]["lr"] == pytest.approx(line["lr"], rel=1e-12)
    for key in ("iter_num", "position", "scaler"):
        assert found["final"][key] == recorded["final"][key]


def has_other_dropout(run):
    """Whether a run's masks are drawn by PyTorch's dropout, and are others on this machine."""
    return run == "ngrams" and MACHINE["dropout"] != EXPECTED["made"]["dropout"]


def test_resume_matches_recorded_losses(run, tmp_path):
    if has_other_dropout(run):
        pytest.skip("PyTorch's dropout draws other masks here than where the run was recorded")
    out = shutil.copytree(folder_of(run), tmp_path / "out")
    keys = {"dtype": "float32"} if run == "nanogpt" else {}  # nanoGPT does not save it
    assert_same_results(run, observe.resume(out, **keys), EXPECTED["runs"][run]["resume"])


@pytest.mark.parametrize("run", [run for run in RUNS if "changed" in EXPECTED["runs"][run]])
def test_longer_run_matches_recorded_losses(run, tmp_path):
    """With max_iters or max_epochs given at the resume."""
    out = shutil.copytree(folder_of(run), tmp_path / "out")
    recorded = dict(EXPECTED["runs"][run]["changed"])
    assert_same_results(run, observe.resume(out, **recorded.pop("keys")), recorded)


def test_earlier_metrics_are_kept(tmp_path):
    out = shutil.copytree(folder_of("classic"), tmp_path / "out")
    before = (out / "metrics.jsonl").read_text(encoding="utf-8")
    observe.resume(out)
    assert (out / "metrics.jsonl").read_text(encoding="utf-8").startswith(before)


def test_best_loss_is_kept(tmp_path):
    """A resumed run replaces ckpt.pt, the best model, only by a better one."""
    out = shutil.copytree(folder_of("ngrams"), tmp_path / "out")
    checkpoint = observe.load(out / "last.pt")
    checkpoint["best_val_loss"] = 0.5  # as from an earlier evaluation
    torch.save(checkpoint, out / "last.pt")
    best = (out / "ckpt.pt").read_bytes()
    assert observe.resume(out)["final"]["best_val_loss"] == 0.5
    assert (out / "ckpt.pt").read_bytes() == best


def test_sample_matches_recorded_text(run):
    """On every machine: the texts in `make.py` do not depend on rounding."""
    assert observe.sample(out_dir=folder_of(run)) == EXPECTED["runs"][run]["sample"]


def assert_same_figures(found, recorded):
    if EXACT:
        assert found == recorded
        return
    assert found.keys() == recorded.keys() and found["tokens"] == recorded["tokens"]
    for key, value in recorded.items():  # evaluate.py computes in float32; e^loss multiplies by it
        times = recorded["loss"] if key == "perplexity" else 1
        assert found[key] == pytest.approx(value, rel=times * LONGEST_SUM * 2**-24)


def test_evaluation_matches_recorded_figures(run):
    found = observe.evaluate(out_dir=folder_of(run))
    assert_same_figures(found, EXPECTED["runs"][run]["evaluate"])


def assert_same_export(found, recorded):
    assert found["weights_sha256"] == recorded["weights_sha256"]
    assert found["config"].items() >= recorded["config"].items()


def test_export_matches_recorded_weights(run, tmp_path):
    """Or is refused, if no other program supports the architecture."""
    found = observe.export(tmp_path / "exported", out_dir=folder_of(run))
    recorded = EXPECTED["runs"][run]["export"]
    assert found.keys() == recorded.keys()
    if "refused" not in recorded:
        assert_same_export(found, recorded)


def test_exported_directory_is_read(tmp_path):
    exported, recorded = observe.FIXTURES / "exported", EXPECTED["exported"]
    assert_same_export(observe.read_export(exported), EXPECTED["runs"]["classic"]["export"])
    assert observe.sample(init_from=exported) == recorded["sample"]
    found = observe.evaluate(init_from=exported, data_dir="data/sonnets")
    assert_same_figures(found, recorded["evaluate"])
    found = observe.finetune(exported, tmp_path / "out")
    if EXACT:
        assert found == recorded["finetune"]
    else:
        within = LONGEST_SUM * 2**-24 * (1 + math.sqrt(PARAMETERS) * 1e-2)  # as in `tolerance`
        assert found == pytest.approx(recorded["finetune"], rel=within)


def test_recorded_data_is_verified(tmp_path):
    """Its checksums are valid, and damage to a copy is detected."""
    keys = {"max_iters": 0, "eval_only": True, "device": "cpu", "n_layer": 1, "n_head": 1}
    keys |= {"n_embd": 8, "block_size": 8, "eval_iters": 1, "verify_data": True}
    for name in ("sonnets", "lines"):
        argv = observe.arguments(dataset=name, out_dir=tmp_path / "out", **keys)
        assert "val loss" in observe.run_main("train", argv)
    damaged = shutil.copytree(Path("data", "lines"), tmp_path / "data")
    ids = bytearray((damaged / "train.bin").read_bytes())
    ids[100] ^= 1
    (damaged / "train.bin").write_bytes(ids)
    with pytest.raises(Exception, match=r"train\.bin is damaged"):
        observe.run_main("train", observe.arguments(data_dir=damaged, out_dir=tmp_path, **keys))


@pytest.mark.parametrize("name", EXPECTED["prepared"])
def test_prepared_data_is_the_same(name, tmp_path):
    script, keys = observe.PREPARED[name]
    found = observe.prepare(script, tmp_path / "data", input=observe.SONNETS, **keys)
    recorded = EXPECTED["prepared"][name]
    assert found["files"] == recorded["files"]
    assert found["meta"].items() >= recorded["meta"].items()


def test_recorded_data_sets_are_reproduced(char_data, lines_data):
    for name, folder in (("sonnets", char_data), ("lines", lines_data)):
        found, recorded = observe.read_data(folder), observe.read_data(Path("data", name))
        assert found["files"] == recorded["files"]
        assert found["meta"].items() >= recorded["meta"].items()
