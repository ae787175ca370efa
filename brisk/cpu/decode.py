"""One decode step on a CPU: the network of model.py in fewer operations.

A decode step reads every weight for a few tokens. On a CPU, a small model spends most of that time
on overhead: module calls, views, kernels made for longer sequences. `Decoder` runs plain operations
on transposed weights. Its logits equal the network's up to rounding.

Speedup over the network in CPU time: medians by benchmarks/decode_ratio.py, on one thread of an AMD
EPYC (Zen 4) with PyTorch 2.13 (layers x channels, vocabulary of 65):

    rows                       1      8     64
    4 x 128                 2.21   2.15   1.25
    6 x 384                 1.22   1.21   1.10
    6 x 384, modern         1.30   1.10   1.06
    GPT-2 (12 x 768)        1.05   1.05   1.09

It is kept for models small enough to train on a CPU. Larger ones are bound by memory bandwidth.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn import functional as F

MAX_COPIED = 2**20  # weights of a matrix; reading a larger one is bound by memory in any layout


@dataclass
class Norm:
    """A layer norm or RMS norm over the last dimension."""

    shape: torch.Size
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool

    @classmethod
    def of(cls, module):
        rms = isinstance(module, torch.nn.RMSNorm)
        bias = None if rms else module.bias
        return cls(module.weight.shape, module.weight, bias, module.eps, rms)

    def __call__(self, x):
        if self.rms:
            return torch.rms_norm(x, self.shape, self.weight, self.eps)
        return torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class Linear:
    """A linear layer (B, in) → (B, out)."""

    def __init__(self, module):
        weight = module.weight.detach().t()
        self.weight = weight.contiguous() if weight.numel() <= MAX_COPIED else weight
        self.bias = module.bias

    def __call__(self, x):
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual, x):
        """Add the output for `x` to `residual`, in place."""
        residual.addmm_(x, self.weight)
        if self.bias is not None:
            residual.add_(self.bias)


class Decoder:
    """The weights of `model`, a `GPT` in float32 on the CPU, laid out for `decode_step`.

    It copies weights: create a new one when they change.
    """

    @classmethod
    def of(cls, model):
        """A decoder for `model`, or None on a GPU or below float32, where it was not measured."""
        device = model.lm_head.weight.device
        plain = device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return cls(model) if plain and model.lm_head.weight.dtype == torch.float32 else None

    def __init__(self, model):
        self.config, parts = model.config, model.transformer
        self.wte, self.wpe, self.cos_sin = parts.wte.weight, None, None
        if self.config.position == "learned":
            self.wpe = parts.wpe.weight
        else:
            window = torch.zeros(1, self.config.block_size, dtype=torch.long)
            cos, sin = (table.squeeze(1) for table in model.embed(window)[1])
            self.cos_sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        self.ngrams = parts.ngrams if self.config.ngrams > 1 else None
        self.layers = [self.layer(block) for block in parts.h]
        self.norm, self.head = Norm.of(parts.ln_f), Linear(model.lm_head)
        self.no_mask = torch.zeros(1, 1, 1)

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

    def decode_step(self, ids, step):
        """Logits (B, vocab_size) after `ids` (B, 1). `step` is a `CacheStep` of B rows."""
        position = step.positions if step.start is None else step.start
        x = F.embedding(ids, self.wte)
        if self.ngrams is not None:
            x += self.ngrams(ids, step.before)
        if self.wpe is not None:
            x += self.wpe[position]
        x, cos_sin = x.squeeze(1), None
        if self.cos_sin:
            cos_sin = [table[position] for table in self.cos_sin]
        mask = self.mask(step.mask)
        for i, layer in enumerate(self.layers):
            layer.out.add_to(x, self.attention(layer, layer.norm_1(x), step, i, cos_sin, mask))
            layer.down.add_to(x, self.hidden(layer, layer.norm_2(x)))
        return self.head(self.norm(x))

    def mask(self, mask):
        """The mask of a `CacheStep`, repeated for each key/value head; `no_mask` for None."""
        if mask is None:
            return self.no_mask
        return mask.expand(-1, self.config.kv_heads, -1, -1).flatten(0, 1)

    def attention(self, layer, x, step, i, cos_sin, mask):
        """Attention of layer i, without its output projection: (B, n_embd)."""
        B, D, heads, kv = len(x), self.config.head_dim, self.config.n_head, self.config.kv_heads
        qkv = layer.qkv(x).view(B, heads + 2 * kv, D)
        if layer.q_norm:
            for part, norm in ((qkv[:, :heads], layer.q_norm), (qkv[:, heads:-kv], layer.k_norm)):
                part.copy_(norm(part))
        if cos_sin:
            qk = qkv[:, :-kv]
            qk.copy_(apply_rotary_emb(qk, cos_sin))
        memory = step.memory[i]
        step.write(memory, qkv[:, heads:].view(B, 2, kv, 1, D).transpose(0, 1))
        keys, values = step.read(memory).flatten(1, 2).unbind()  # (B * kv, T, D) each
        q = qkv[:, :heads].reshape(B * kv, heads // kv, D)  # grouped by key/value head
        beta = 0 if mask is self.no_mask else 1  # 0: the mask is not read
        probs = torch.baddbmm(mask, q, keys.mT, beta=beta, alpha=D**-0.5).softmax(-1)
        return torch.bmm(probs, values).view(B, heads * D)

    def hidden(self, layer, x):
        """Hidden activations of the MLP: (B, hidden_width)."""
        if layer.gate:
            return F.silu(layer.gate(x)).mul_(layer.up(x))
        x = layer.up(x)
        if self.config.mlp == "relu2":
            return x.relu_().square_()
        # On the transpose: PyTorch's kernel for contiguous rows has more overhead.
        return F.gelu(x.t(), approximate=self.config.gelu).t()


def apply_rotary_emb(x, cos_sin):
    """Rotate x (B, heads, head_dim) as model.py does, in fewer operations. `cos_sin` are cosines
    and signed sines (..., head_dim), repeated for both halves."""
    cos, sin = cos_sin
    halves_swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, halves_swapped, sin)
