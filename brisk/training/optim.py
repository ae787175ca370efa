"""AdamW, loading of optimizer state, and learning-rate schedules."""

import inspect
import math

import torch

from brisk.checkpoint import is_weight
from brisk.distributed.process_group import is_sharded
from brisk.errors import UserError, is_out_of_memory

# What PyTorch raises on loading an invalid state, or the state of other weights.
STATE_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum"})  # of a weight, in AdamW and in Muon


class Uncompiled:
    """Optimizer methods without `torch._disable_dynamo`: that wrapper imports the compiler on the
    first call, which takes about a second on a CPU. No optimizer is compiled here."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Uncompiled, torch.optim.AdamW):
    """PyTorch's AdamW (Loshchilov & Hutter 2019)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(named_parameters, weight_decay, learning_rate, betas, device_type):
    """AdamW with nanoGPT's two parameter groups, in its order: weight decay for tensors of two or
    more dimensions, none for vectors (biases, norms). Fused where the kernel supports
    `step_if_finite`; that of MPS does not."""
    parameters = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device_type in ("cuda", "cpu")
    return AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def step_optimizer(optimizer, scaler, is_spike=None):
    """Make a step and update `scaler`. `is_spike` is from `SpikeWatch.check`: 1 skips the step, and
    None is for modes that skip none."""
    if is_spike is None:
        scaler.step(optimizer)
    else:
        # Skips non-finite gradients as scaler.step would. scaler.update lowers the scale by what
        # unscale_ found, whether or not the step was made.
        step_if_finite(is_spike, optimizer)
    scaler.update()


def step_if_finite(skipped, optimizer):
    """Call `optimizer.step()`, but change nothing if `skipped`, a tensor () on the device, is 1.

    Fused kernels read `skipped` on the device, as they do for a gradient scaler. Without them the
    host waits for it.
    """
    if optimizer.param_groups[-1].get("fused"):
        weight = optimizer.param_groups[-1]["params"][0]  # in host memory with --cpu_offload
        optimizer.found_inf = skipped.to(weight.device)
        optimizer.step()
        del optimizer.found_inf
    elif not skipped.item():
        optimizer.step()


def load_optimizer(optimizer, state):
    """Load the moments of a saved `state`; the current hyperparameters stay.

    Raises `UserError` if the state is of another optimizer or model.
    """
    try:
        check_rules(optimizer, state)
        given = [{**group} for group in optimizer.param_groups]
        for group, before in zip(given, state["param_groups"], strict=True):
            group["params"] = before["params"]
        moments = fit_moments(optimizer, state)
        optimizer.load_state_dict({"state": moments, "param_groups": given})
    except STATE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the checkpoint's optimizer state does not fit this model ({error!r}); "
            "start a new run from the weights: --init_from=<the checkpoint's path>"
        ) from error


def fit_moments(optimizer, state):
    """The moments in a saved `state`, cropped with the position embeddings if block_size is smaller
    now, and sharded like the weights. Raises ValueError if they are of other weights."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    weights, fitted = dict(zip(numbers, weights, strict=True)), {}
    for number, kept in state["state"].items():
        weight, moments = weights[number], {key: kept[key] for key in kept.keys() - {"step"}}
        for key, moment in sorted(moments.items()):
            if len(moment) > len(weight):
                moments[key] = moment = moment[: len(weight)].clone()
            if not is_weight(moment) or moment.shape != weight.shape or {*kept} not in STATES:
                raise ValueError(f"invalid state for a weight of shape {tuple(weight.shape)}")
            if is_sharded(weight):
                from brisk.distributed.fsdp import shard_like

                moments[key] = shard_like(moment, weight)
        fitted[number] = {**kept, **moments}
    return fitted


def load_scaler(scaler, state):
    """Load the saved `state` of a gradient scaler. Raises `UserError` if it is invalid."""
    try:
        if not all(isinstance(value, int | float) for value in state.values()):
            raise TypeError("not only numbers")
        scaler.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint's gradient scaler is damaged ({error!r})") from error


def check_rules(optimizer, state):
    """Raise `UserError` if `state` is of another kind of optimizer."""
    saved, now = (
        [group.get("rule", "adamw") for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if saved != now:
        raise UserError(
            f"the checkpoint's optimizer is {saved[0]}, not --optimizer={now[0]}; remove the key, "
            "or start a new run from the weights: --init_from=<the checkpoint's path>"
        )


def get_lr(step, config, decay_steps):
    """The learning rate at `step`, counted from 0: linear warmup over `warmup_iters`, then decay to
    `min_lr` at `decay_steps` by `schedule`. Constant if `decay_lr` is False.

    "cosine": cosine decay (one cycle of SGDR, Loshchilov & Hutter 2017).
    "wsd": constant, then linear decay over the last `decay_frac` of `decay_steps`
    (warmup-stable-decay: Hu et al. 2024, MiniCPM, section 4; Hägele et al. 2024, section 3).
    """
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= decay_steps:
        return config.min_lr
    if config.schedule == "wsd":
        start = max(config.warmup_iters, decay_steps * (1 - config.decay_frac))
        if step <= start:
            return config.learning_rate
        coeff = (decay_steps - step) / (decay_steps - start)
    else:
        decay_ratio = (step - config.warmup_iters) / (decay_steps - config.warmup_iters)
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return config.min_lr + coeff * (config.learning_rate - config.min_lr)
