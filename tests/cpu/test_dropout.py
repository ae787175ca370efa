import pytest
import torch

from brisk.cpu.dropout import dropout


@pytest.mark.parametrize("p", [0.01, 0.2, 0.9])
def test_dropout_rate_and_scale(p):
    torch.manual_seed(0)
    y = dropout(torch.ones(1000, 1001), p)
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-3)
    deviation = (p * (1 - p) / y.numel()) ** 0.5
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * deviation + 2**-16)
    both = (y[:, 1:] == 0) & (y[:, :-1] == 0)  # neighbours share a draw of 64 bits
    assert both.double().mean().item() == pytest.approx(p * p, abs=0.002)
    below = (y[1:] == 0) & (y[:-1] == 0)
    assert below.double().mean().item() == pytest.approx(p * p, abs=0.002)


def test_gradient_uses_the_same_mask():
    torch.manual_seed(0)
    x = torch.randn(37, 11, requires_grad=True)
    y = dropout(x, 0.3)
    y.sum().backward()
    kept = y != 0
    assert 0.5 < kept.double().mean() < 0.9
    torch.testing.assert_close(y, x * x.grad)
    assert x.grad[~kept].eq(0).all() and x.grad[kept].unique().numel() == 1


def test_seed_and_dtype():
    x = torch.ones(50, 50, dtype=torch.bfloat16)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(dropout(x, 0.5))
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
