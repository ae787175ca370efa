"""Chunked cross-entropy of a linear head.

The logits are by far the largest tensor of GPT-2: 50304 for each token, against 768 channels. Here
they are computed for a few hundred tokens at a time. The loss is the last operation of the forward
pass, so its gradients are computed in the same pass. The backward pass needs only two tensors, of
the sizes of input and weight, and recomputes nothing (Hsu et al. 2024, Liger Kernel, section 3.2).
"""

import torch

CHUNK = 2**25  # logits in memory at a time: enough for matrix products at full speed


def chunk_size(device_type, compiled):
    """Logits in memory at a time. Every chunk reads and writes the gradient of the head: a GPU,
    limited by its memory bandwidth, takes few and large ones. Those of a compiled kernel have half
    the bytes for each logit."""
    if device_type != "cuda":
        return CHUNK
    return 2**28 if compiled else 2**27


def loss_and_gradient(logits, targets, needs_gradient):
    """Cross-entropy of a chunk of logits, one operation at a time.

    Args:
        logits: (rows, vocab_size).
        targets: (rows,), ids; -1 is ignored.

    Returns:
        (loss, gradient): the summed loss in nats, a float32 scalar, and its gradient with respect
        to the logits, in their dtype, or None. The gradient of ignored rows is not zero.
    """
    dtype, logits = logits.dtype, logits.float()
    valid, index = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    target_logit, highest = logits.gather(1, index), logits.amax(1, keepdim=True)
    probability = torch.softmax(logits, 1, out=logits)
    log_sum_exp = highest - probability.amax(1, keepdim=True).log()
    loss = ((log_sum_exp - target_logit) * valid).sum()
    if not needs_gradient:
        return loss, None
    # probability - one-hot
    gradient = probability.scatter_add_(1, index, torch.full_like(log_sum_exp, -1.0))
    return loss, gradient.to(dtype)


def fusible_loss_and_gradient(logits, targets, needs_gradient):
    """`loss_and_gradient` without in-place operations, for torch.compile. Compiled, it only reads
    the logits and writes the gradient: 8 bytes for each logit in bfloat16 instead of 32."""
    logits32 = logits.float()
    valid, index = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    log_sum_exp = torch.logsumexp(logits32, 1, keepdim=True)
    loss = ((log_sum_exp - logits32.gather(1, index)) * valid).sum()
    if not needs_gradient:
        return loss, None
    columns = torch.arange(logits.size(1), device=logits.device)
    gradient = torch.exp(logits32 - log_sum_exp) - (columns == index).float()
    return loss, gradient.to(logits.dtype)


def linear_cross_entropy(x, weight, targets, chunk=None, kernel=loss_and_gradient):
    """Mean cross-entropy in nats of the logits `x @ weight.T` over the targets that are not -1.

    Args:
        x: (N, n_embd), the input of the head.
        weight: (vocab_size, n_embd).
        targets: (N,), ids; -1 is ignored.
        chunk: logits in memory at a time; None: `chunk_size`.
        kernel: `loss_and_gradient`, or `fusible_loss_and_gradient` compiled.

    Returns:
        A float32 scalar, NaN if every target is -1. Products are computed in the autocast dtype,
        everything else in float32.
    """
    chunk = chunk or chunk_size(x.device.type, compiled=kernel is not loss_and_gradient)
    return LinearCrossEntropy.apply(x, weight, targets, chunk, kernel, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, chunk, kernel, grad_enabled):
        needs_x, needs_weight = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            inputs, head = x.to(dtype), weight.to(dtype)
            nats = torch.zeros((), device=x.device, dtype=torch.float32)
            grad_x = torch.empty_like(inputs) if needs_x else None
            sum_dtype = torch.promote_types(weight.dtype, torch.float32)  # FSDP's is bfloat16
            grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
            rows = max(1, chunk // len(weight))
            for start in range(0, len(x), rows):
                part, target = inputs[start : start + rows], targets[start : start + rows]
                loss, grad = kernel(part @ head.T, target, needs_x or needs_weight)
                nats += loss
                valid = (target >= 0)[:, None]
                if needs_x:
                    torch.mm(grad, head, out=grad_x[start : start + rows]).mul_(valid)
                if needs_weight:
                    part = part * valid
                    if dtype == sum_dtype:
                        grad_weight.addmm_(grad.T, part)
                    else:
                        grad_weight += grad.T @ part
            count = (targets >= 0).sum()
        ctx.save_for_backward(grad_x, grad_weight, count)
        ctx.weight_dtype = weight.dtype
        return nats / count

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        grad_x = grad_x * scale if grad_x is not None else None
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None, None
