"""One more position of each sequence, in as few operations as the network needs.

A step of generation reads every weight for a handful of vectors. On a CPU a small model spends
such a step on the way from one operation to the next: modules called, views made, kernels chosen
for shapes they were not written for. `Decoder` is the network of model.py once more, for this case
alone: plain operations on tensors laid out for it. It computes what the network does, up to
rounding.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn import functional as F

IN_CACHE = 2**20  # weights: up to here a transposed copy pays, beyond it memory sets the pace


@dataclass
class Norm:
    """A layer norm or RMS norm over the last dimension."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool

    @classmethod
    def of(cls, module):
        rms = isinstance(module, torch.nn.RMSNorm)
        return cls(module.weight, None if rms else module.bias, module.eps, rms)

    def __call__(self, x):
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Linear:
    """A linear map (B, in) → (B, out), with what is to be added to it."""

    def __init__(self, module):
        weight = module.weight.detach().t()
        self.weight = weight.contiguous() if weight.numel() <= IN_CACHE else weight
        self.bias = module.bias

    def __call__(self, x):
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual, x):
        """Add the map of `x` to `residual`, in place."""
        residual.addmm_(x, self.weight)
        if self.bias is not None:
            residual.add_(self.bias)


class Decoder:
    """The weights of `model`, a `GPT` in float32 on the CPU, laid out for `logits_after`."""

    @classmethod
    def of(cls, model, device):
        """One for `model`, or None where the model's own way is the measured one: on a GPU, and in
        less than float32."""
        plain = device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return cls(model) if plain and model.lm_head.weight.dtype == torch.float32 else None

    def __init__(self, model):
        self.config, parts = model.config, model.transformer
        self.wte, self.wpe, self.angles = parts.wte.weight, None, None
        if self.config.position == "learned":
            self.wpe = parts.wpe.weight
        else:
            every = torch.zeros(1, self.config.block_size, dtype=torch.long)
            cos, sin = (part.squeeze(1) for part in model.embed(every)[1])
            self.angles = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        self.ngrams = parts.ngrams if self.config.ngrams > 1 else None
        self.layers = [self.layer(block) for block in parts.h]
        self.norm, self.head = Norm.of(parts.ln_f), Linear(model.lm_head)

    def layer(self, block):
        attn, mlp = block.attn, block.mlp
        gated = self.config.mlp == "swiglu"
        return SimpleNamespace(
            norm_1=Norm.of(block.ln_1),
            qkv=Linear(attn.c_attn),
            q_norm=Norm.of(attn.q_norm) if attn.qk_norm else None,
            k_norm=Norm.of(attn.k_norm) if attn.qk_norm else None,
            out=Linear(attn.c_proj),
            norm_2=Norm.of(block.ln_2),
            gate=Linear(mlp.c_gate) if gated else None,
            up=Linear(mlp.c_fc),
            down=Linear(mlp.c_proj),
        )

    def logits_after(self, ids, cache):
        """Logits (B, vocab_size) of the token after `ids` (B, 1), which stand at the next position
        of each row of `cache`, a `KVCache` that takes them in."""
        position, before = cache.step(ids)
        x = F.embedding(ids, self.wte)
        if self.ngrams is not None:
            x += self.ngrams(ids, before)
        if self.wpe is not None:
            x += self.wpe[position]
        x, angles = x.squeeze(1), None
        if self.angles:
            angles = [table[position] for table in self.angles]
        mask = self.mask(cache.layers[0].mask)
        for layer, memory in zip(self.layers, cache.layers, strict=True):
            layer.out.add_to(x, self.attention(layer, layer.norm_1(x), memory, angles, mask))
            layer.down.add_to(x, self.hidden(layer, layer.norm_2(x)))
        return self.head(self.norm(x))

    def mask(self, mask):
        """What is added to the scores: a cache's mask with heads in the place of sequences, and
        zero where it has none."""
        if mask is None:
            return torch.zeros(1, 1, 1)
        return mask.expand(-1, self.config.kv_heads, -1, -1).flatten(0, 1)

    def attention(self, layer, x, memory, angles, mask):
        """What the new position reads from all so far, heads side by side: (B, n_embd)."""
        B, D, heads, kv = len(x), self.config.head_dim, self.config.n_head, self.config.kv_heads
        qkv = layer.qkv(x).view(B, heads + 2 * kv, D)
        if layer.q_norm:
            for part, norm in ((qkv[:, :heads], layer.q_norm), (qkv[:, heads:-kv], layer.k_norm)):
                part.copy_(norm(part))
        if angles:
            qk = qkv[:, :-kv]
            qk.copy_(rotated(qk, angles))
        new = qkv[:, heads:].view(B, 2, kv, D).transpose(0, 1)
        keys, values = memory.append(new).flatten(1, 2)  # (B * kv, T, D) each
        q = qkv[:, :heads].reshape(B * kv, heads // kv, D)  # the queries that share a key
        shares = torch.baddbmm(mask, q, keys.mT, alpha=D**-0.5).softmax(-1)
        return torch.bmm(shares, values).view(B, heads * D)

    def hidden(self, layer, x):
        """The hidden channels of the MLP, (B, hidden_width)."""
        if layer.gate:
            return F.silu(layer.gate(x)).mul_(layer.up(x))
        x = layer.up(x)
        if self.config.mlp == "relu2":
            return x.relu_().square_()
        # On its transpose: the kernel that PyTorch takes for rows as they lie costs more to start.
        return F.gelu(x.t(), approximate=self.config.gelu).t()


def rotated(x, angles):
    """Heads x (B, heads, head_dim) turned as in model.py, in fewer operations: by the cosines
    of `angles` and by their sines with the sign they have there, each twice."""
    cos, sin = angles
    halves_swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, halves_swapped, sin)
