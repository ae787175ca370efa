"""Chunked cross-entropy of a linear head.

The logits are by far the largest tensor of GPT-2: 50304 for each token, against 768 channels. Here
they are computed for a few hundred tokens at a time. The loss is the last operation of the forward
pass, so its gradients are computed in the same pass. The backward pass needs only two tensors, of
the sizes of input and weight, and recomputes nothing (Hsu et al. 2024, Liger Kernel, section 3.2).
"""

import torch

CHUNK = 2**25  # logits in memory at a time: enough for matrix products at full speed


def linear_cross_entropy(x, weight, targets, chunk=CHUNK):
    """Mean cross-entropy in nats of the logits `x @ weight.T` over the targets that are not -1.

    Args:
        x: (N, n_embd), the input of the head.
        weight: (vocab_size, n_embd).
        targets: (N,), ids; -1 is ignored.
        chunk: logits in memory at a time.

    Returns:
        A float32 scalar, NaN if every target is -1. Products are computed in the autocast dtype,
        everything else in float32.
    """
    return LinearCrossEntropy.apply(x, weight, targets, chunk, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, chunk, grad_enabled):
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
                logits = (part @ head.T).float()
                valid, index = (target >= 0)[:, None], target.clamp(min=0)[:, None]
                target_logit, highest = logits.gather(1, index), logits.amax(1, keepdim=True)
                probability = torch.softmax(logits, 1, out=logits)
                log_sum_exp = highest - probability.amax(1, keepdim=True).log()
                nats += ((log_sum_exp - target_logit) * valid).sum()
                if not (needs_x or needs_weight):
                    continue
                # gradient of the summed loss with respect to the logits: probability - one-hot
                minus_one = torch.full_like(log_sum_exp, -1.0)
                grad = probability.scatter_add_(1, index, minus_one).to(dtype)
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
        return grad_x, grad_weight, None, None, None
