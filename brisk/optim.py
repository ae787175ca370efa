"""Parameter groups, AdamW, and the learning-rate schedule."""

import math

import torch


def adamw(named_parameters, weight_decay, learning_rate, betas, device_type):
    """AdamW (Loshchilov & Hutter 2019) in nanoGPT's two groups and order: tensors of two or more
    dimensions decay, vectors (biases, norms) do not. Fused where the device has that kernel."""
    parameters = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device_type in ("cuda", "cpu", "mps")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def load_optimizer(optimizer, state, weight_decay, betas):
    """Load a saved `state`, but let the hyper-parameters given now win over the saved ones."""
    fused = {"fused": optimizer.param_groups[0]["fused"], "foreach": None}  # of this machine
    groups = [{**group, **fused, "betas": betas} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def learning_rate_at(step, config):
    """The learning rate of `step` (from 0): a linear warm-up over `warmup_iters`, then a cosine
    from `learning_rate` down to `min_lr` at `lr_decay_iters`; constant where `decay_lr` is False.
    (SGDR, Loshchilov & Hutter 2017, with one cycle.)"""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    progress = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)
