"""Muon: orthogonalized momentum for the matrices of a model's blocks (Jordan et al. 2024)."""

import torch

from brisk.distributed.process_group import Ranks, to_local
from brisk.distributed.sharded_work import distribute_work
from brisk.training.optim import Uncompiled, adamw

# Coefficients (a, b, c) of five polynomials a x + b x³ + c x⁵, applied in turn. They map [0.001, 1]
# to within 0.12 of 1, the optimum for five steps (Amsel et al. 2025, The Polar Express, section 3).
# All but the last are scaled for values 1 % smaller: rounding must not leave the interval.
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
    """Muon for the matrices of the model's blocks, AdamW for embeddings, head and vectors.

    `muon_rate` is the learning rate of the matrices. Both rates follow one schedule: `lr_ratio` in
    the parameter group of the matrices is their ratio. Muon's work is divided among `ranks`, a
    `Ranks`.
    """
    blocks = model.transformer.h
    matrices = [p for p in blocks.parameters() if p.dim() == 2 and p.requires_grad]
    fused = {  # c_attn is three maps: queries, keys and values
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
    """bfloat16 on a GPU that supports it, which is precise enough for Muon, else float32."""
    if device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


class MuonAdamW(Uncompiled, torch.optim.Optimizer):
    """Muon for matrices (Jordan et al. 2024), AdamW for the other parameters.

    The first parameter group, with rule "muon", has the matrices. Its `rows` list the heights of
    the linear maps in each matrix; each map is orthogonalized separately. The other groups belong
    to `adamw`, a `torch.optim.AdamW`, and are shared with it. Maps of one shape, transposed or not,
    are orthogonalized as one batch, in `dtype` on `device`, each rank doing part of the matrices.

    The update is the orthogonal factor times sqrt(max(1, rows / columns)), Jordan's scale: its
    effect on the outputs does not depend on the width (Yang et al. 2023, A Spectral Condition), so
    one default learning rate works for all sizes. The alternative, 0.2 sqrt(max(rows, columns))
    with AdamW's learning rate (Liu et al. 2025), learned far more slowly on Shakespeare characters
    at AdamW's best rate than at twice that rate.
    """

    def __init__(self, group, adamw, dtype, device, ranks=None):
        super().__init__([group, *adamw.param_groups], {})
        self.adamw, self.dtype, self.device, self.ranks = adamw, dtype, device, ranks or Ranks()
        self.share_with_adamw()

    def share_with_adamw(self):
        """Make AdamW use the groups and the state of this optimizer, which saves and loads them."""
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
        skipped = getattr(self, "found_inf", None)  # set by `step_if_finite`
        self.muon_step(self.param_groups[0], skipped)
        self.adamw.found_inf = skipped
        self.adamw.step()
        return loss

    def muon_step(self, group, skipped=None):
        """One Muon step: Nesterov momentum, orthogonalized, and decoupled weight decay.

        `skipped` is as in `step_if_finite`. With FSDP each rank updates its own rows; only the
        orthogonalization uses whole matrices.
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
        if skipped is not None:  # a gradient equal to the mean does not change the mean
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
            lambda indices, full: orthogonalize_maps(full, [trained[i][1] for i in indices]),
        )
        for weight, (p, rows), direction in zip(weights, trained, directions, strict=True):
            if skipped is not None:
                direction = direction * (1 - skipped).to(direction)
            # maps that share a matrix have no more rows than columns
            scale = max(1, max(rows) / p.size(1)) ** 0.5
            if isinstance(group["lr"], torch.Tensor):  # in a CUDA graph
                weight.addcmul_(direction.to(weight), group["lr"], value=-scale)
            else:
                weight.add_(direction.to(weight.device), alpha=-group["lr"] * scale)


def orthogonalize_maps(matrices, rows):
    """Orthogonalize each map in `matrices`. `rows` has, for each matrix, the heights of its maps.
    Returns matrices of the same shapes."""
    results = [torch.empty_like(matrix) for matrix in matrices]
    stacks = {}  # {shape: [(map, its view in the result)]}, transposed to rows <= columns
    for matrix, result, heights in zip(matrices, results, rows, strict=True):
        for part, view in zip(matrix.split(heights), result.split(heights), strict=True):
            if part.size(0) > part.size(1):
                part, view = part.mT, view.mT
            stacks.setdefault(part.shape, []).append((part, view))
    for stack in stacks.values():
        factors = orthogonalize(torch.stack([part for part, _ in stack]))
        for (_, result), factor in zip(stack, factors, strict=True):
            result.copy_(factor)
    return results


def orthogonalize(matrices):
    """Approximate the orthogonal factor U Vᵀ of each matrix U S Vᵀ, (batch, rows, columns) with
    rows <= columns, in five steps of three matrix products.

    Singular values above 0.001 times the Frobenius norm become 1 ± 0.12 (slightly worse in
    bfloat16), smaller ones stay below that. A zero matrix stays zero.
    """
    norms = matrices.norm(dim=(1, 2), keepdim=True)
    x = matrices / (1.02 * norms).clamp_min(1e-20)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
