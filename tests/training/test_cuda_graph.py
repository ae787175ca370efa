"""A step as CUDA graphs is the step that train.py makes without them. Graphs are tapes here."""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, exit_line, same

from brisk.cuda_graph import WARM_UP, CapturedFunction, GraphPool
from brisk.device import Device
from brisk.distributed.process_group import Ranks
from brisk.errors import UserError
from brisk.training.cuda_graph import check_cuda_graph

sys.path.insert(0, str(ROOT / "benchmarks"))
from trainer import open_trainer

CPU = torch.device("cpu")
# float32 holds these rates exactly, so the device has the same ones as the host
EXACT = {"learning_rate": 2**-7, "muon_learning_rate": 2**-6, "decay_lr": False}


# ----------------------------------------------------------------------------- the tape itself


def test_replay_reads_static_tensors(tapes):
    captured, x = CapturedFunction(GraphPool(CPU)), torch.zeros(3)
    for call in range(WARM_UP + 3):
        doubled, total = captured(lambda x, weight: (2 * x, (weight * x).sum()), x + call, call / 2)
        assert doubled.equal(2 * (x + call)) and total == 3 * call * call / 2
    assert (tapes.captures, tapes.replays) == (1, 3)


def test_results_survive_the_next_replay(tapes):
    captured = CapturedFunction(GraphPool(CPU))
    results = [captured(lambda x: 2 * x, torch.ones(2) * call) for call in range(6)]
    assert [result[0].item() for result in results] == [0, 2, 4, 6, 8, 10]


def test_python_number_is_frozen(tapes):
    captured, rate, x = CapturedFunction(GraphPool(CPU)), [1.0], torch.ones(2)
    for _ in range(WARM_UP + 1):
        captured(lambda x: rate[0] * x, x)
    rate[0] = 2.0
    assert captured(lambda x: rate[0] * x, x).equal(x)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x.nonzero(),
    ],
)
def test_host_is_refused(tapes, read):
    captured = CapturedFunction(GraphPool(CPU))
    for _ in range(WARM_UP):
        captured(read, torch.ones(2))
    with pytest.raises(RuntimeError, match="during a capture"):
        captured(read, torch.ones(2))


def test_capture_computes_nothing(tapes):
    """It changes no tensor; what is allocated in it, such as state that should have been there
    before, is computed again at every replay."""
    counter, random_state = torch.zeros(()), torch.get_rng_state()
    replay, outputs = GraphPool(CPU).capture(lambda: (counter.add_(1), torch.rand(2)))
    assert counter == 0 and outputs[1].isnan().all()
    assert torch.get_rng_state().equal(random_state)
    torch.manual_seed(3)
    replay()
    drawn = outputs[1].clone()
    torch.manual_seed(3)
    assert counter == 1 and torch.rand(2).equal(drawn)


def test_other_shape_is_refused(tapes):
    captured = CapturedFunction(GraphPool(CPU))
    captured(lambda x: x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="shape"):
        captured(lambda x: x, torch.zeros(1, 2))


# ----------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 3, "dropout": 0.2},
        {"on_spike": "skip", "spike_factor": 10.0},
        {"on_spike": "ignore", "grad_clip": 0.0},
        {"activation_checkpointing": True},
        {"freeze_layers": 1},
        {"position": "rotary", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "n_kv_head": 1},
        {"ngrams": 3, "ngram_rows": 50, "ngram_dropout": 0.5, "tied": False},
        {"rows": "documents"},
    ],
    ids=str,
)
def test_same_run(tapes, train_tiny, lines_data, tmp_path, changes):
    """To the bit, evaluations included."""
    changes = {**EXACT, "n_layer": 2, "n_head": 2, "max_iters": 9, **changes}
    if changes.get("rows") == "documents":
        changes["data_dir"] = lines_data
    plain = train_tiny(tmp_path / "plain", **changes)
    graphs = train_tiny(tmp_path / "graphs", cuda_graph=True, **changes)
    micro_batches = 10 * changes.get("gradient_accumulation_steps", 1)
    assert tapes.captures == 2 and tapes.replays == 10 + micro_batches - 2 * WARM_UP
    for key in ("loss", "val_loss", "grad_norm"):
        assert graphs.series(key) == plain.series(key)
    ours, theirs = graphs.checkpoint(), plain.checkpoint()
    assert same(ours["model"], theirs["model"]) and same(ours["optimizer"], theirs["optimizer"])
    if "spike_factor" in changes:  # NaN stands for no norm yet
        assert ours["grad_norms"].nan_to_num(-1).equal(theirs["grad_norms"].nan_to_num(-1))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("on_spike", ["stop", "skip"])
def test_learning_rate_follows_its_schedule(tapes, train_tiny, tmp_path, optimizer, on_spike):
    """The device has it in float32, the host in float64."""
    schedule = {"warmup_iters": 4, "lr_decay_iters": 12, "max_iters": 12, "min_lr": 0}
    changes = {**schedule, "optimizer": optimizer, "on_spike": on_spike}
    plain = train_tiny(tmp_path / "plain", **changes)
    graphs = train_tiny(tmp_path / "graphs", cuda_graph=True, **changes)
    assert graphs.series("lr") == plain.series("lr") and tapes.replays > 0
    for key in ("loss", "val_loss", "grad_norm"):
        assert graphs.series(key) == pytest.approx(plain.series(key), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoint_has_the_same_format(tapes, train_tiny, tmp_path, optimizer):
    plain, graphs = (
        train_tiny(tmp_path / str(on), cuda_graph=on, optimizer=optimizer).checkpoint()
        for on in (False, True)
    )
    assert graphs.keys() == plain.keys()
    for ours, theirs in zip(
        *(c["optimizer"]["param_groups"] for c in (graphs, plain)), strict=True
    ):
        assert same({**ours, "lr": 0.0}, {**theirs, "lr": 0.0}) and type(ours["lr"]) is float


@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True)])
def test_resume(tapes, train_tiny, resume, tmp_path, before, after):
    changes = {**EXACT, "dropout": 0.1}
    whole = train_tiny(tmp_path / "whole", max_iters=13, **changes)
    train_tiny(tmp_path / "part", max_iters=6, cuda_graph=before, **changes)
    replays = tapes.replays
    again = resume(tmp_path / "part", max_iters=13, **({"cuda_graph": True} if after else {}))
    assert (tapes.replays > replays) == after
    assert again.series("loss") == whole.series("loss")
    assert same(again.checkpoint()["model"], whole.checkpoint()["model"])


def test_minutes(tapes, train_tiny, tmp_path):
    """The steps that measure the speed have graphs of their own."""
    run = train_tiny(tmp_path / "out", minutes=0.02, cuda_graph=True)
    assert tapes.captures == 4 and "as CUDA graphs" in run.console
    assert run.checkpoint()["iter_num"] == run.checkpoint()["config"]["max_iters"] + 1


# ----------------------------------------------------------------------------- single steps


@pytest.fixture
def trainer(tapes, settings, tmp_path):
    """A run with graphs that are captured already, of two micro-batches a step."""
    changes = {"cuda_graph": True, "gradient_accumulation_steps": 2, "on_spike": "skip"}
    with open_trainer(settings(tmp_path / "out", spike_factor=100.0, **changes)) as trainer:
        for _ in range(WARM_UP + 2):
            trainer.step()
        yield trainer


def test_rewind_captures_again(trainer, tapes):
    checkpoint = torch.utils._pytree.tree_map(
        lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t,
        trainer.state.state_dict(),
    )
    position = trainer.state.position
    losses = [trainer.step()[0].item() for _ in range(WARM_UP + 3)]
    captures = tapes.captures
    trainer.state.rewind(checkpoint, trainer.run.ranks)
    trainer.state.position = position
    assert [trainer.step()[0].item() for _ in range(WARM_UP + 3)] == losses
    assert tapes.captures == captures + 2


def test_spike_is_skipped(trainer):
    """The loss of one step is NaN, because of its weight, which the graph reads from memory."""
    targets, before = trainer.data.train.targets, weights(trainer)
    trainer.data.train.targets = lambda position, count: float("nan")
    trainer.step()
    assert all(map(torch.equal, before, weights(trainer)))
    trainer.data.train.targets = targets
    trainer.step()
    assert not any(map(torch.equal, before, weights(trainer)))
    assert [spike.step for spike in trainer.state.spikes.poll()] == [WARM_UP + 2]


def weights(trainer):
    return [p.detach().clone() for p in trainer.state.model.parameters()]


def test_returned_numbers_stay(trainer):
    steps = [trainer.step() for _ in range(3)]
    losses = [loss.item() for loss, _ in steps]
    assert len(set(losses)) == 3 and len({norm.item() for _, norm in steps}) == 3
    recorded = [(loss.item(), norm.item()) for *_, (loss, norm, _) in trainer.state.spikes.unread]
    assert recorded[-3:] == [(loss.item(), norm.item()) for loss, norm in steps]


def test_throwaway_run_is_freed(tapes, settings, tmp_path):
    """Its graphs refer to nothing that refers to them: --minutes measures on a run of its own."""
    gc.collect()
    gc.disable()
    try:
        with open_trainer(settings(tmp_path / "out", cuda_graph=True)) as trainer:
            for _ in range(WARM_UP + 2):
                trainer.step()
            model = weakref.ref(trainer.state.model)
            del trainer
        assert tapes.captures == 2 and model() is None
    finally:
        gc.enable()


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"device": "cpu"}, "the device is cpu"),
        ({"ranks": 2}, "without torchrun"),
        ({"dtype": "float16"}, "--dtype=float16"),
        ({"activation_checkpointing": True, "dropout": 0.1}, "with dropout"),
    ],
    ids=str,
)
def test_refusals(changes, reason):
    settings = {"device": "cuda", "dtype": "bfloat16", "activation_checkpointing": False}
    settings |= {"dropout": 0.0, "ranks": 1, **changes}
    device = Device(torch.device(settings["device"]), settings["dtype"])
    ranks = Ranks(world_size=settings["ranks"])
    with pytest.raises(UserError, match=reason):
        check_cuda_graph(SimpleNamespace(**settings), device, ranks)


def test_refusal_is_one_line(settings, tmp_path):
    import train
    from configurator import configure

    given = configure(train.TrainConfig, settings(tmp_path / "out", cuda_graph=True))
    assert "--cuda_graph needs a GPU" in exit_line(train.main, given)
    train.main(configure(train.TrainConfig, settings(tmp_path, cuda_graph=True, dry_run=True)))
