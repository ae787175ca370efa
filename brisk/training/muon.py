"""Muon: momentum, orthogonalized, for the matrices of a model's blocks (Jordan et al. 2024)."""

import torch

from brisk.distributed.process_group import Ranks, to_local
from brisk.distributed.sharded_work import distribute_work
from brisk.training.optim import Plain, adamw

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
        weights, gradients = (
            [to_local(p) for p, _ in trained],
            [to_local(p.grad) for p, _ in trained],
        )
        means = [to_local(self.state[p]["momentum"]) for p, _ in trained]
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
        directions = distribute_work(
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
