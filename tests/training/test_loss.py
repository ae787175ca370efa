"""The chunked loss: its gradients, its memory, and the bytes that it moves."""

import logging

import pytest
import torch
from test_compiling import compiler
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from brisk.training.loss import (
    chunk_size,
    fusible_loss_and_gradient,
    linear_cross_entropy,
    loss_and_gradient,
)

N, C, V = 50, 16, 37


@pytest.fixture
def tensors(device):
    torch.manual_seed(0)
    x, weight, targets = torch.randn(N, C), torch.randn(V, C), torch.randint(V, (N,))
    targets[::7] = -1
    x, weight, targets = (t.to(device.device) for t in (x, weight, targets))
    return x.requires_grad_(), weight.requires_grad_(), targets


def reference(x, weight, targets):
    return F.cross_entropy((x @ weight.T).float(), targets, ignore_index=-1)


def grads(loss, *tensors):
    return torch.autograd.grad(3 * loss, tensors)


KERNELS = [loss_and_gradient, fusible_loss_and_gradient]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 7, N, 2 * N])
def test_loss_and_gradients_match_pytorch(tensors, rows, kernel):
    x, weight, targets = tensors
    ours = linear_cross_entropy(x, weight, targets, chunk=rows * V, kernel=kernel)
    theirs = reference(x, weight, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads(ours, x, weight), grads(theirs, x, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_extreme_logits_stay_finite(tensors, kernel):
    x, weight, targets = tensors
    ours = linear_cross_entropy(1000 * x, weight, targets, kernel=kernel)
    assert ours.item() == pytest.approx(reference(1000 * x, weight, targets).item(), rel=1e-5)


def test_gradients_only_where_required(tensors):
    x, weight, targets = tensors
    frozen = weight.detach()
    (grad,) = torch.autograd.grad(linear_cross_entropy(x, frozen, targets), [x])
    (whole,) = torch.autograd.grad(reference(x, frozen, targets), [x])
    torch.testing.assert_close(grad, whole, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad


def test_no_valid_target_is_nan(tensors):
    x, weight, targets = tensors
    nothing = torch.full_like(targets, -1)
    assert linear_cross_entropy(x, weight, nothing).isnan()
    assert reference(x, weight, nothing).isnan()


def test_autocast_dtypes(tensors, device):
    x, weight, targets = tensors
    with torch.autocast(device.type, torch.bfloat16):
        ours = linear_cross_entropy(x, weight, targets, chunk=7 * V)
        theirs = reference(x, weight, targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-2)
    assert ours.item() != linear_cross_entropy(x, weight, targets).item()
    for a, b in zip(grads(ours, x, weight), grads(theirs, x, weight), strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)


def test_logits_are_chunked(tensors):
    """The largest tensor of any operation has at most the requested number of entries."""
    x, weight, targets = tensors
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(x, weight, targets, chunk=20 * V).backward()
    assert largest == max(20 * V, N * C)  # all logits would be N * V


class ByteCount(TorchDispatchMode):
    """Counts the bytes that operations read and write. gather and scatter touch a value a row."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not any(n in str(func) for n in ("empty", "gather", "scatter")):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.total += sum(t.nbytes for t in tensors)
        return out


SCALE = 16  # of each dimension: bytes are 1/256 of those at 12 x 1024 tokens of GPT-2


def gigabytes(chunk, kernel):
    """Read and written by head and loss of 12 x 1024 tokens of GPT-2, forward and backward, under
    autocast to bfloat16."""
    N, V, C = 12 * 1024 // SCALE, 50304 // SCALE, 768 // SCALE
    x, weight = (torch.randn(size, C, requires_grad=True) for size in (N, V))
    targets = torch.randint(V, (N,))
    with ByteCount() as count, torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(x, weight, targets, chunk // SCALE**2, kernel).backward()
    return count.total * SCALE**2 / 1e9


@compiler
def test_bytes_moved(monkeypatch):
    """On a GPU, bandwidth limits the loss. Compiled, in large chunks, it moves a third as much."""
    from torch._inductor import compile_fx, config, metrics

    if not hasattr(compile_fx, "inductor_metrics_log"):
        pytest.skip("this PyTorch counts no bytes")
    monkeypatch.setattr(config, "force_disable_caches", True)
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "level", logging.INFO)
    compile_fx.inductor_metrics_log.manager._clear_cache()
    torch.compiler.reset(), metrics.reset()
    rows = (torch.randn(40, 3144).bfloat16(), torch.randint(3144, (40,)))
    torch.compile(fusible_loss_and_gradient)(*rows, True)
    per_logit = metrics.num_bytes_accessed / rows[0].numel()
    assert 4 <= per_logit < 8.1  # by how much PyTorch fuses

    logits = 0

    def products_only(part, targets, needs_gradient):
        nonlocal logits
        logits += part.numel()
        with _disable_current_modes():
            return torch.zeros(()), torch.zeros_like(part)

    eager = gigabytes(chunk_size("cpu", compiled=False), loss_and_gradient)
    compiled = gigabytes(chunk_size("cuda", compiled=True), products_only)
    compiled += per_logit * logits * SCALE**2 / 1e9
    assert 30 < eager < 40
    assert compiled < 12
