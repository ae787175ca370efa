import pytest
import torch
from torch.nn import functional as F

from brisk.cpu import attention as module
from brisk.cpu.attention import attention
from model import GPT, GPTConfig


def heads(B=2, H=4, T=150, D=8, kv_heads=4, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(B, T, n, D) for n in (H, kv_heads, kv_heads)]
    return [torch.randn(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


def reference(q, k, v, keep):
    """Attention by its definition. `keep` (B, n_head, T, T) is 0 or the dropout factor."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    T = q.size(2)
    scores = q @ k.mT * q.size(3) ** -0.5
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) * keep) @ v


def kept_by(run, T):
    """The probabilities that dropout kept, found with values that are one-hot by position."""
    B, H = 2, 4
    q, k = torch.zeros(B, H, T, T), torch.zeros(B, H, T, T)
    shares = run(q, k, torch.eye(T).expand(B, H, T, T).contiguous())
    uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    return torch.where(uniform > 0, shares / uniform, 0.0)


@pytest.mark.parametrize("block", [2**8, 2**12, 2**20])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_output_and_gradients_match_the_formula(monkeypatch, block, kv_heads):
    monkeypatch.setattr(module, "BLOCK", block)
    q, k, v = heads(kv_heads=kv_heads)

    def run(q, k, v, seed=7):
        torch.manual_seed(seed)
        return attention(q, k, v, 0.3)

    keep = kept_by(run, q.size(2))
    assert {round(n, 3) for n in keep.unique().tolist()} == {0.0, 1.429}  # 1 / 0.7
    ours, theirs = run(q, k, v), reference(q, k, v, keep)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_dropout_matches_sdpa():
    q, k, v = heads()
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention(q, k, v, 0.0), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.01, 0.2, 0.9])
def test_dropout_rate_and_independence(dropout):
    torch.manual_seed(1)
    keep = kept_by(lambda q, k, v: attention(q, k, v, dropout), 400) > 0
    seen = torch.ones(400, 400, dtype=torch.bool).tril()
    share = 1 - keep[..., seen].double().mean().item()
    assert share == pytest.approx(dropout, abs=5 * (dropout * (1 - dropout) / 640_000) ** 0.5)
    lower = seen.clone()
    lower[:, -1] = False
    both = (keep[..., :-1] & keep[..., 1:])[..., seen[:, 1:]].double().mean().item()
    assert both == pytest.approx((1 - dropout) ** 2, abs=0.005)


def test_bfloat16_autocast_is_close():
    q, k, v = heads(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, k, v, 0.0)
    assert y.dtype == torch.bfloat16
    exact = attention(q.float(), k.float(), v.float(), 0.0)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_loss_depends_only_on_the_seed():
    config = GPTConfig(block_size=32, vocab_size=11, n_layer=2, n_head=2, n_embd=16, dropout=0.5)
    torch.manual_seed(0)
    model, idx = GPT(config), torch.randint(11, (3, 32))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(idx, idx)[1].item())
    assert losses[0] == losses[1] != losses[2]
