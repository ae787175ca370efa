"""The default model is GPT-2 as in nanoGPT, and attention is causal."""

import importlib.util
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from networks import SIZES, random_ids, random_model
from torch.nn import functional as F

from model import GPT, GPTConfig


def reference_logits(model, idx):
    """GPT-2 by its definition, in float64, from the weights of the model."""
    w = {name: weight.double() for name, weight in model.state_dict().items()}
    B, T = idx.shape
    C, H = model.config.n_embd, model.config.n_head

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def gelu(x):
        if model.config.gelu == "tanh":
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for layer in range(model.config.n_layer):
        h = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(C, dim=-1)
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv)
        scores = q @ k.transpose(-1, -2) / math.sqrt(C // H)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).reshape(B, T, C), f"{h}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_logits_match_the_definition(bias, gelu):
    model = random_model(bias=bias, gelu=gelu)
    assert (model.predict(random_ids()) - reference_logits(model, random_ids())).abs().max() < 1e-4


def test_forward_contract():
    model, idx = random_model(), random_ids()
    targets = random_ids(T=25)[:, 1:].clone()
    targets[0, :7] = targets[1, 20:] = -1

    logits, loss = model(idx, targets)
    assert logits.shape == (2, 24, 61)
    valid = targets != -1
    chosen = logits.log_softmax(-1)[valid].gather(1, targets[valid][:, None])
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)

    nothing, same_loss = model(idx, targets, return_logits=False)
    assert nothing is None and same_loss.item() == pytest.approx(loss.item(), rel=1e-6)

    last, no_loss = model(idx)
    assert no_loss is None and torch.allclose(last, logits[:, -1:], atol=1e-5)

    assert torch.allclose(model.predict(idx), logits, atol=1e-5)
    assert torch.allclose(model.predict(idx, targets=False), last, atol=1e-5)
    with pytest.raises(ValueError, match="block_size=24"):
        model(random_ids(T=25))


@pytest.mark.parametrize("position", [0, 11, 23])
def test_attention_is_causal(position):
    model, idx = random_model(), random_ids(B=1)
    changed = idx.clone()
    changed[0, position] = (idx[0, position] + 1) % 61
    difference = (model.predict(idx) - model.predict(changed)).abs().amax(dim=(0, 2))
    assert (difference[:position] == 0).all() and (difference[position:] > 0).all()


def test_initial_loss_is_uniform():
    torch.manual_seed(0)
    _, loss = GPT(GPTConfig(**SIZES))(random_ids(8), random_ids(8, T=24).flip(1))
    assert loss.item() == pytest.approx(math.log(61), abs=0.1)


def test_crop_block_size():
    model, idx = random_model(), random_ids(T=10)
    before = model.predict(idx)
    model.crop_block_size(10)
    assert model.predict(idx).equal(before)
    assert model.config.block_size == 10 and model.transformer.wpe.weight.shape == (10, 32)
    assert model.transformer.wpe.weight.requires_grad
    with pytest.raises(ValueError):
        model(random_ids(T=11))
    with pytest.raises(ValueError):
        model.crop_block_size(11)


def test_head_and_embeddings_are_tied():
    model = random_model()
    model(random_ids(), random_ids())[1].backward()
    assert model.lm_head.weight is model.transformer.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) and "lm_head.weight" not in names
    assert {"lm_head.weight", "transformer.wte.weight"} <= model.state_dict().keys()


def test_num_params_match_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    V, T, C, L = 50257, 1024, 768, 12
    block = 2 * 2 * C + (C * 3 * C + 3 * C) + (C * C + C) + (C * 4 * C + 4 * C) + (4 * C * C + C)
    assert model.get_num_params(non_embedding=False) == V * C + T * C + L * block + 2 * C
    assert model.get_num_params(non_embedding=False) == 124_439_808  # GPT-2's "124M"
    assert model.get_num_params() == 124_439_808 - T * C


def test_config_is_checked():
    with pytest.raises(ValueError, match="n_embd=32 is not divisible by n_head=5"):
        GPTConfig(n_embd=32, n_head=5)
    classic = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}
    assert GPTConfig().to_args().keys() == classic
    assert GPTConfig(gelu="tanh").to_args().keys() == classic | {"gelu"}


def test_mfu_follows_palm():
    model = GPT(GPTConfig(**SIZES))
    N = model.get_num_params()
    assert model.flops_per_token() == 6 * N + 12 * 3 * 4 * 8 * 24
    one_second = model.estimate_mfu(2, dt=1.0, flops_promised=1e9)
    assert one_second == pytest.approx(model.flops_per_token() * 24 * 2 / 1e9)


@pytest.fixture(scope="module")
def nanogpt():
    """nanoGPT's model.py as a module, from a checkout of it."""
    if "NANOGPT" not in os.environ:
        pytest.skip("compares with nanoGPT: set NANOGPT to a checkout of it")
    spec = importlib.util.spec_from_file_location(
        "nanogpt_model", Path(os.environ["NANOGPT"], "model.py")
    )
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_weights_and_logits_match_nanogpt(nanogpt, bias):
    ours = random_model(bias=bias)
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**ours.config.to_args())).eval()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    idx, targets = random_ids(), random_ids().flip(1)
    with torch.no_grad():
        (logits, loss), (expected, expected_loss) = ours(idx, targets), theirs(idx, targets)
    assert (logits - expected).abs().max() < 1e-5
    assert F.l1_loss(loss, expected_loss) < 1e-5
    assert ours.get_num_params() == theirs.get_num_params()
    assert ours.estimate_mfu(3, 0.5) == pytest.approx(theirs.estimate_mfu(3, 0.5))
    greedy = theirs.generate(idx[:1], 40, temperature=1.0, top_k=1)
    found = ours.generate(idx[:1], 40, temperature=1.0, top_k=1, exact_window=True)
    assert found.equal(greedy)


def test_frozen_layers_have_no_gradients():
    model = random_model()
    whole = model.flops_per_token()
    model.freeze_layers(2)
    _, loss = model(random_ids(), random_ids())
    loss.backward()
    learned = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert all(name.startswith(("transformer.h.2.", "transformer.ln_f.")) for name in learned)
    assert len(learned) == 2 + len(list(model.transformer.h[2].parameters()))
    block = sum(weight.numel() for weight in model.transformer.h[0].parameters())
    attention = 12 * model.config.n_embd * model.config.block_size
    assert model.flops_per_token() == pytest.approx(whole - 2 * (4 * block + attention * 2 / 3))
    with pytest.raises(ValueError, match="4 of 3"):
        model.freeze_layers(4)
