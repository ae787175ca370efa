"""Muon: orthogonalization, parameter groups and saved state; learning-rate schedules."""

from copy import deepcopy

import pytest
import torch

from brisk.checkpoint import save_checkpoint
from brisk.errors import UserError
from brisk.training.muon import orthogonalize
from brisk.training.optim import get_lr, load_optimizer
from model import GPT, GPTConfig

BETAS = (0.9, 0.95)
RATES = {"weight_decay": 0.1, "learning_rate": 1e-3, "betas": BETAS, "device_type": "cpu"}
HIDDEN = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def a_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return GPT(GPTConfig(**{**sizes, **changes}))


def set_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def with_singular_values(values, rows, columns):
    """(a matrix, its orthogonal factor), both (1, rows, columns)."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0]
    return (u * values @ v.mT)[None], (u @ v.mT)[None]


# ----------------------------------------------------------------------------- the update


@pytest.mark.parametrize("rows, columns", [(24, 24), (16, 64), (1, 8)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_orthogonalize_keeps_singular_vectors(rows, columns, size):
    """Singular values of at least a thousandth of the norm are within 0.12 of 1, at every size."""
    matrix, factor = with_singular_values(torch.logspace(0, -2.5, rows), rows, columns)
    assert torch.linalg.svdvals(matrix).min() > 1.1e-3 * matrix.norm()
    result = orthogonalize(size * matrix)
    values = torch.linalg.svdvals(result)
    assert 0.88 < values.min() and values.max() < 1.12
    assert (result - factor).norm() < 0.12 * factor.norm()


def test_small_singular_values_stay_below_one():
    matrix, _ = with_singular_values(torch.logspace(0, -7, 24), 24, 24)
    before, after = torch.linalg.svdvals(matrix)[0], torch.linalg.svdvals(orthogonalize(matrix))[0]
    assert after.max() < 1.12
    small = (before < 1e-3) & (before > 1e-6)
    assert small.sum() > 5 and (after[small] > 100 * before[small]).all()


def test_bfloat16_is_enough():
    matrix, factor = with_singular_values(torch.logspace(0, -2, 48), 48, 64)
    result = orthogonalize(matrix.bfloat16()).float()
    values = torch.linalg.svdvals(result)
    assert 0.8 < values.min() and values.max() < 1.2
    assert (result - factor).norm() < 0.2 * factor.norm()


def test_batch_matches_single_matrices():
    stack = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(0))
    stack[2] *= 1e5  # each matrix has a separate norm
    stack[3] = 0
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), alone, atol=1e-5, rtol=0)
    assert not alone[3].any()


# ----------------------------------------------------------------------------- which weights


@pytest.mark.parametrize("bias", [True, False])
def test_muon_parameter_groups(bias):
    model = a_model(bias=bias)
    groups = model.configure_optimizers(**RATES, muon=(0.02, 0.95)).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    hidden, embeddings, vectors = ({names[id(p)] for p in g["params"]} for g in groups)
    assert hidden == {f"transformer.h.{i}.{name}" for i in (0, 1) for name in HIDDEN}
    assert embeddings == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert vectors == set(names.values()) - hidden - embeddings
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
    assert [g["lr"] for g in groups] == [0.02, 1e-3, 1e-3]


@pytest.mark.parametrize("n_kv_head, rows", [(0, [16, 16, 16]), (1, [16, 8, 8])])
def test_q_k_v_are_orthogonalized_separately(n_kv_head, rows):
    optimizer = a_model(n_kv_head=n_kv_head).configure_optimizers(**RATES, muon=(0.02, 0.95))
    first_block = optimizer.param_groups[0]["rows"][:4]
    assert first_block == [rows, [16], [64], [16]]


def test_update_is_the_orthogonal_factor():
    """Without momentum and decay: queries, keys and values have separate factors, and a matrix with
    more rows than columns a larger one, so that the change of its outputs is the same."""
    model = a_model()
    rates = {**RATES, "weight_decay": 0.0}
    optimizer = model.configure_optimizers(**rates, muon=(0.02, 0.0))
    set_gradients(model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer.step()
    for i in (0, 1):
        for name in HIDDEN:
            weight = model.get_parameter(f"transformer.h.{i}.{name}")
            moved = before[f"transformer.h.{i}.{name}"] - weight.detach()
            maps = 3 if "c_attn" in name else 1
            for part, gradient in zip(moved.chunk(maps), weight.grad.chunk(maps), strict=True):
                rows, columns = part.shape
                values = torch.linalg.svdvals(part) / (0.02 * max(1, rows / columns) ** 0.5)
                # a singular value of a random square matrix may be too small
                assert values.max() < 1.13 and values.sort().values[2] > 0.87
                assert (part * gradient).sum() > 0.85 * 0.02 * torch.linalg.svdvals(gradient).sum()


def test_momentum_is_nesterov():
    """Two steps computed by hand, from the mean of the gradients and the latest one."""
    model = a_model()
    optimizer = model.configure_optimizers(**{**RATES, "weight_decay": 0.0}, muon=(0.02, 0.9))
    weight = model.transformer.h[0].attn.c_proj.weight
    expected, mean = weight.detach().clone(), torch.zeros_like(weight)
    for seed in (1, 2):
        set_gradients(model, seed)
        mean = 0.9 * mean + 0.1 * weight.grad
        expected -= 0.02 * orthogonalize((0.9 * mean + 0.1 * weight.grad)[None])[0]
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=0)


def test_matrices_decay_with_the_muon_rate():
    model = a_model()
    optimizer = model.configure_optimizers(**RATES, muon=(0.02, 0.95))
    set_gradients(model)
    weight = model.transformer.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.02 * 0.1))


def test_other_parameters_match_adamw_exactly():
    one, other = a_model(), a_model()
    ours = one.configure_optimizers(**RATES, muon=(0.02, 0.95))
    theirs = other.configure_optimizers(**RATES)
    for seed in range(3):
        for model, optimizer in ((one, ours), (other, theirs)):
            set_gradients(model, seed)
            optimizer.step()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) != name.endswith(HIDDEN)


def test_weights_without_gradient_are_unchanged():
    model = a_model()
    optimizer = model.configure_optimizers(**RATES, muon=(0.02, 0.95))
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer.step()
    set_gradients(model)
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.grad = None
    kept = weight.detach().clone()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.step()
    assert torch.equal(weight, kept) and not torch.equal(before[0], next(model.parameters()))


def test_overflowed_step_is_skipped():
    """float16's gradient scaler checks the gradients of all groups."""
    model = a_model()
    optimizer = model.configure_optimizers(**RATES, muon=(0.02, 0.95))
    scaler = torch.amp.GradScaler("cpu")
    idx = torch.zeros((1, 8), dtype=torch.int64)
    for infinite in (True, False):
        before = [weight.detach().clone() for weight in model.parameters()]
        scaler.scale(model(idx, idx)[1]).backward()
        if infinite:
            model.transformer.h[0].mlp.c_fc.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(map(torch.equal, before, model.parameters())) == infinite


# ----------------------------------------------------------------------------- kept and taken up


def test_saved_state_resumes_bit_exact():
    """Including AdamW's part, and with the learning rates of the loading optimizer."""
    one = a_model()
    first = one.configure_optimizers(**RATES, muon=(0.02, 0.95))
    for seed in (1, 2):
        set_gradients(one, seed)
        first.step()
    other = a_model(seed=5)
    other.load_state_dict(one.state_dict())
    second = other.configure_optimizers(**RATES, muon=(0.02, 0.95))
    load_optimizer(second, deepcopy(first.state_dict()))
    for model, optimizer in ((one, first), (other, second)):
        for seed in (3, 4):
            set_gradients(model, seed)
            for group in optimizer.param_groups:  # also reaches AdamW's groups after loading
                group["lr"] *= 0.5
            optimizer.step()
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    third = a_model().configure_optimizers(0.7, 1e-2, (0.5, 0.6), "cpu", muon=(0.04, 0.8))
    load_optimizer(third, first.state_dict())
    hidden, embeddings, vectors = third.param_groups
    assert hidden["momentum"] == 0.8 and hidden["lr_ratio"] == pytest.approx(4)
    assert embeddings["betas"] == vectors["betas"] == (0.5, 0.6)
    assert [g["weight_decay"] for g in third.param_groups] == [0.7, 0.7, 0]


@pytest.mark.parametrize("saved, now", [("adamw", "muon"), ("muon", "adamw")])
def test_state_of_another_optimizer_is_refused(train_tiny, resume, tmp_path, saved, now):
    train_tiny(tmp_path / "out", optimizer=saved)
    with pytest.raises(
        UserError, match=f"optimizer is {saved}, not .*{now}.*--init_from="
    ) as caught:
        resume(tmp_path / "out", optimizer=now, max_iters=9)
    assert "\n" not in str(caught.value)
    start = tmp_path / "out" / "last.pt"
    run = train_tiny(
        tmp_path / "other", init_from=start, optimizer=now
    )  # the remedy in the message works
    assert run.checkpoint()["iter_num"] == 8
    run = resume(tmp_path / "out", max_iters=9)  # and so does omitting the key
    assert run.checkpoint()["config"]["optimizer"] == saved


def test_checkpoint_from_before_muon_resumes(train_tiny, resume, tmp_path):
    whole = train_tiny(tmp_path / "whole")
    run = train_tiny(tmp_path / "out", max_iters=3)
    checkpoint = torch.load(run.out_dir / "last.pt")
    new = ("optimizer", "muon_learning_rate", "muon_momentum", "schedule", "decay_frac")
    for key in new:
        del checkpoint["config"][key]
    for name in ("last.pt", "ckpt.pt"):
        save_checkpoint(checkpoint, run.out_dir / name)
    end, expected = (r.checkpoint() for r in (resume(run.out_dir, max_iters=7), whole))
    assert all(map(torch.equal, end["model"].values(), expected["model"].values()))
    assert end["config"]["optimizer"] == "adamw"


# ----------------------------------------------------------------------------- in a run


def test_muon_run_learns_and_follows_schedule(train_tiny, tmp_path):
    run = train_tiny(tmp_path / "out", optimizer="muon", max_iters=60, lr_decay_iters=90)
    losses = run.series("loss")
    assert losses[60] < losses[0] - 0.8
    hidden, embeddings, vectors = run.checkpoint()["optimizer"]["param_groups"]
    assert embeddings["lr"] == vectors["lr"] == run.series("lr")[60] < 1e-2
    assert hidden["lr"] == pytest.approx(0.02 * embeddings["lr"] / 1e-2)


def test_zero_learning_rate_changes_nothing(train_tiny, tmp_path):
    run = train_tiny(tmp_path / "out", optimizer="muon", learning_rate=0, min_lr=0)
    assert len(set(run.series("val_loss").values())) == 1


def test_wsd_is_constant_then_linear():
    class Settings:
        learning_rate, min_lr, warmup_iters, decay_lr = 1.0, 0.2, 9, True
        schedule, decay_frac = "wsd", 0.4

    rates = [get_lr(step, Settings, 100) for step in range(120)]
    assert rates[:9] == pytest.approx([(step + 1) / 10 for step in range(9)])
    assert set(rates[9:61]) == {1.0}
    assert rates[60:101] == pytest.approx([1 - 0.8 * k / 40 for k in range(41)])
    assert set(rates[100:]) == {0.2}
    # A longer run has the same rates up to where this one ends.
    assert [get_lr(step, Settings, 1000) for step in range(60)] == rates[:60]
