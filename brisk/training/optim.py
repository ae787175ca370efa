"""Parameter groups, AdamW, Muon, and the learning-rate schedules."""

import inspect
import math

import torch

from brisk.checkpoint import is_weight
from brisk.distributed.process_group import is_sharded
from brisk.errors import UserError, is_out_of_memory

# What PyTorch raises on loading a state that is none, or of other weights.
STATE_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum"})  # of a weight, in AdamW and in Muon


class Plain:
    """An optimizer's methods without the wrappers that keep torch.compile out of them: on their
    first call they import its machinery, which takes as long as importing torch (one second on
    the CPUs where it was measured; these methods take 4 ms). No optimizer is compiled here."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Plain, torch.optim.AdamW):
    """PyTorch's AdamW (Loshchilov & Hutter 2019)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(named_parameters, weight_decay, learning_rate, betas, device_type):
    """AdamW in nanoGPT's two groups and order: tensors of two or more dimensions decay, vectors
    (biases, norms) do not. Fused where the device has that kernel and it heeds `step_if_finite`;
    that of MPS does not."""
    parameters = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device_type in ("cuda", "cpu")
    return AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def step_if_finite(skipped, optimizer):
    """One step of `optimizer`, or none where `skipped`, a tensor () on the device, is 1: weights,
    moments and counts of steps then stay as they are.

    The fused kernels read it themselves, as they do a gradient scaler's, so that the host need not
    wait for the device; without them it does.
    """
    if optimizer.param_groups[-1].get("fused"):
        weight = optimizer.param_groups[-1]["params"][0]  # on the host, where FSDP keeps them there
        optimizer.found_inf = skipped.to(weight.device)
        optimizer.step()
        del optimizer.found_inf
    elif not skipped.item():
        optimizer.step()


def load_optimizer(optimizer, state):
    """Load a saved `state`, but let the hyper-parameters given now win over the saved ones.

    Raises `UserError` where it is the state of another optimizer, or of another model's.
    """
    try:
        check_rules(optimizer, state)
        given = [{**group} for group in optimizer.param_groups]
        for group, before in zip(given, state["param_groups"], strict=True):
            group["params"] = before["params"]
        moments = fitted_moments(optimizer, state)
        optimizer.load_state_dict({"state": moments, "param_groups": given})
    except STATE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the checkpoint's optimizer cannot go on with this model ({error!r}); "
            "start anew from the weights: --init_from=<the checkpoint's path>"
        ) from error


def fitted_moments(optimizer, state):
    """The moments in a saved `state`, cut to the positions that a shorter block_size left, and
    sharded where the weights are. Raises ValueError for those of other weights."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    weights, fitted = dict(zip(numbers, weights, strict=True)), {}
    for number, kept in state["state"].items():
        weight, moments = weights[number], {key: kept[key] for key in kept.keys() - {"step"}}
        for key, moment in sorted(moments.items()):
            if len(moment) > len(weight):
                moments[key] = moment = moment[: len(weight)].clone()
            if not is_weight(moment) or moment.shape != weight.shape or {*kept} not in STATES:
                raise ValueError(f"odd state of a weight of shape {tuple(weight.shape)}")
            if is_sharded(weight):
                from brisk.distributed.fsdp import shard_like

                moments[key] = shard_like(moment, weight)
        fitted[number] = {**kept, **moments}
    return fitted


def load_scaler(scaler, state):
    """Load the saved `state` of a gradient scaler; `UserError` where it is none."""
    try:
        if not all(isinstance(value, int | float) for value in state.values()):
            raise TypeError("more than numbers")
        scaler.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint's gradient scaler is damaged ({error!r})") from error


def check_rules(optimizer, state):
    """Raise `UserError` where `state` is that of another kind of optimizer."""
    saved, now = (
        [group.get("rule", "adamw") for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if saved != now:
        raise UserError(
            f"the checkpoint's optimizer is {saved[0]}, --optimizer={now[0]} cannot go on with it; "
            "leave the key out, or start anew from the weights: --init_from=<the checkpoint's path>"
        )


def get_lr(step, config, decay_steps):
    """The learning rate of `step` (from 0): a linear warm-up over `warmup_iters`, then, by
    `schedule`, down to `min_lr` at `decay_steps`; constant where `decay_lr` is False.

    "cosine": along a cosine from the warm-up's end (SGDR, Loshchilov & Hutter 2017, one cycle).
    "wsd": at `learning_rate` until the last `decay_frac` of `decay_steps`, then along a line
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
        height = (decay_steps - step) / (decay_steps - start)
    else:
        progress = (step - config.warmup_iters) / (decay_steps - config.warmup_iters)
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + height * (config.learning_rate - config.min_lr)
