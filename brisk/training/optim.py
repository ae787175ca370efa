"""Parameter groups, AdamW, Muon, and the learning-rate schedules."""

import inspect
import math

import torch

from brisk.checkpoint import is_weight
from brisk.distributed.process_group import Ranks, is_sharded, local
from brisk.distributed.sharded_work import by_turns
from brisk.errors import UserError, is_out_of_memory

# What PyTorch raises on loading a state that is none, or of other weights.
ODD_STATE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum"})  # of a weight, in AdamW and in Muon
# a x + b x³ + c x⁵ for each of five steps, which together bring every x in [0.001, 1] to within
# 0.12 of 1, as near as five odd quintics can (Amsel et al. 2025, The Polar Express, section 3: each
# is the best on what the one before leaves). All but the last for values 1 % smaller, so that
# rounding cannot carry one out of the interval.
POLAR_EXPRESS = (
    (8.386464, -24.369650, 17.725117),
    (4.141420, -3.017275, 0.552427),
    (3.922631, -2.867185, 0.535652),
    (3.254046, -2.392233, 0.482733),
    (2.273750, -1.644660, 0.416191),
)


class Plain:
    """An optimizer's methods without the wrappers that keep torch.compile out of them: on their
    first call they import its machinery, which takes longer than the rest of a start. No optimizer
    is compiled here."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Plain, torch.optim.AdamW):
    """PyTorch's AdamW (Loshchilov & Hutter 2019)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(named_parameters, weight_decay, learning_rate, betas, device_type):
    """AdamW in nanoGPT's two groups and order: tensors of two or more dimensions decay, vectors
    (biases, norms) do not. Fused where the device has that kernel."""
    parameters = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device_type in ("cuda", "cpu", "mps")
    return AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def muon_adamw(
    model, weight_decay, learning_rate, betas, device_type, muon_rate, momentum, ranks=None
):
    """Muon for the matrices in the model's blocks, AdamW for embeddings, head and vectors.

    `muon_rate` is the matrices' learning rate, which is of another kind than AdamW's; both follow
    one schedule, and `lr_ratio` in the matrices' group is the one over the other. `ranks` are the
    processes that share Muon's work, a `Ranks`.
    """
    blocks = model.transformer.h
    matrices = [p for p in blocks.parameters() if p.dim() == 2 and p.requires_grad]
    fused = {  # queries, keys and values one under the other
        block.attn.c_attn.weight: [heads * block.attn.head_dim for heads in block.attn.heads]
        for block in blocks
    }
    group = {
        "params": matrices,
        "rows": [fused.get(p, [p.size(0)]) for p in matrices],
        "weight_decay": weight_decay,
        "lr": muon_rate,
        "lr_ratio": muon_rate / learning_rate if learning_rate else 0.0,
        "momentum": momentum,
        "rule": "muon",
    }
    hidden = {id(p) for p in matrices}
    others = [(name, p) for name, p in model.named_parameters() if id(p) not in hidden]
    inner = adamw(others, weight_decay, learning_rate, betas, device_type)
    return MuonAdamW(group, inner, product_dtype(device_type), torch.device(device_type), ranks)


def product_dtype(device_type):
    """bfloat16 on a GPU that computes in it, whose few digits are enough here; else float32."""
    if device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


class MuonAdamW(Plain, torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices (Jordan et al. 2024, Muon); AdamW for the rest.

    The first group, of rule "muon", has the matrices and, in `rows`, the heights of the maps that
    each is made of: a map is orthogonalised by itself. The groups after it are those of `adamw`, a
    `torch.optim.AdamW`, and stay shared with it. Maps of one shape, turned or not, are one batched
    product in `dtype` on `device`, and each of the `ranks` does it for its share of the matrices.

    The update of a map is its orthogonal factor times sqrt(max(1, rows / columns)), Jordan's scale:
    it changes the map's outputs by as much at every width (Yang et al. 2023, A Spectral Condition),
    so that one learning rate can be a default. (The other usual scale, 0.2 sqrt(max(rows, columns))
    of Liu et al. 2025, lends AdamW's rate to the matrices; at AdamW's best on the characters of
    Shakespeare they still learned far more slowly than at twice that.)
    """

    def __init__(self, group, adamw, dtype, device, ranks=None):
        super().__init__([group, *adamw.param_groups], {})
        self.adamw, self.dtype, self.device, self.ranks = adamw, dtype, device, ranks or Ranks()
        self.share_with_adamw()

    def share_with_adamw(self):
        """AdamW's groups and state are these, not copies of them: saved, loaded and set here."""
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share_with_adamw()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skipped = getattr(self, "found_inf", None)  # of `step_if_finite`
        self.muon_step(self.param_groups[0], skipped)
        self.adamw.found_inf = skipped
        self.adamw.step()
        return loss

    def muon_step(self, group, skipped=None):
        """Nesterov momentum, orthogonalised map by map; decoupled weight decay.

        `skipped` is as in `step_if_finite`: a gradient equal to the mean leaves the mean as it is.
        Of sharded weights (FSDP) all is done to this process's rows, but for the orthogonalising.
        """
        pairs = zip(group["params"], group["rows"], strict=True)
        trained = [(p, rows) for p, rows in pairs if p.grad is not None]
        if not trained:
            return
        for p, _ in trained:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        weights, gradients = [local(p) for p, _ in trained], [local(p.grad) for p, _ in trained]
        means = [local(self.state[p]["momentum"]) for p, _ in trained]
        decay = 1 - group["lr"] * group["weight_decay"]
        if skipped is not None:
            pairs = zip(means, gradients, strict=True)
            gradients = [torch.where(skipped > 0, mean, g) for mean, g in pairs]
            decay = torch.where(skipped > 0, 1.0, decay)
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, means, group["momentum"])
        torch._foreach_mul_(weights, decay)

        shapes = [tuple(p.shape) for p, _ in trained]
        parts = [update.to(self.device, self.dtype) for update in updates]
        directions = by_turns(
            self.ranks,
            parts,
            shapes,
            lambda numbers, wholes: orthogonal_maps(wholes, [trained[i][1] for i in numbers]),
        )
        for weight, (p, rows), direction in zip(weights, trained, directions, strict=True):
            if skipped is not None:
                direction = direction * (1 - skipped).to(direction)
            # several maps in one matrix are no higher than wide
            scale = max(1, max(rows) / p.size(1)) ** 0.5
            weight.add_(direction.to(weight.device), alpha=-group["lr"] * scale)


def orthogonal_maps(matrices, rows):
    """The orthogonal factor of every map in `matrices`, of as many rows each as `rows` says for
    its matrix; laid out as they are."""
    results = [torch.empty_like(matrix) for matrix in matrices]
    stacks = {}  # (rows, columns), no more rows than columns: [(map, where its factor goes)]
    for matrix, result, heights in zip(matrices, results, rows, strict=True):
        for part, factor in zip(matrix.split(heights), result.split(heights), strict=True):
            if part.size(0) > part.size(1):
                part, factor = part.mT, factor.mT
            stacks.setdefault(part.shape, []).append((part, factor))
    for stack in stacks.values():
        found = orthogonalize(torch.stack([part for part, _ in stack]))
        for (_, factor), direction in zip(stack, found, strict=True):
            factor.copy_(direction)
    return results


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


def orthogonalize(matrices):
    """The orthogonal factor U Vᵀ of each matrix U S Vᵀ, nearly: (batch, rows, columns) with no more
    rows than columns, in and out.

    Singular values of at least a thousandth of the matrix's Frobenius norm come to within 0.12 of
    1 (a little more in bfloat16), smaller ones to less than that. In products alone: five
    quintics, three products each. A matrix of zeros stays one.
    """
    norms = matrices.norm(dim=(1, 2), keepdim=True)
    x = matrices / (1.02 * norms).clamp_min(1e-20)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


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
    except ODD_STATE as error:
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
    "wsd": at `learning_rate` until the last `decay_share` of `decay_steps`, then along a line
    (warmup-stable-decay: Hu et al. 2024, MiniCPM, section 4; Hägele et al. 2024, section 3).
    """
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= decay_steps:
        return config.min_lr
    if config.schedule == "wsd":
        start = max(config.warmup_iters, decay_steps * (1 - config.decay_share))
        if step <= start:
            return config.learning_rate
        height = (decay_steps - step) / (decay_steps - start)
    else:
        progress = (step - config.warmup_iters) / (decay_steps - config.warmup_iters)
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + height * (config.learning_rate - config.min_lr)
