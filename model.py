"""The GPT model. The default `GPTConfig` is GPT-2, with nanoGPT's code structure and weight names.

Later changes to the architecture are fields of `GPTConfig`, each with its source below.
config/model/modern.py sets those that make the network of Qwen3.

It needs PyTorch only. If the `brisk` package is present, it uses its faster kernels, sampling and
optimizers.

References: Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2), and
https://github.com/openai/gpt-2/blob/master/src/model.py

Shapes: B sequences, T tokens, n_embd channels, n_head query heads and n_kv_head key/value heads of
head_dim = n_embd // n_head channels.
"""

import importlib.util
import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.nn import functional as F

HAS_BRISK = importlib.util.find_spec("brisk") is not None

PositiveInt = Annotated[int, (1, math.inf)]  # inclusive bounds
NonNegativeInt = Annotated[int, (0, math.inf)]
NonNegativeFloat = Annotated[float, (0, math.inf)]
UnitFloat = Annotated[float, (0, 1)]


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of the network. The first seven fields are nanoGPT's, the defaults GPT-2 (124M).

    `TrainConfig` and `BenchConfig` inherit these fields; the trailing comments are their --help.

    Raises ValueError for a value that its type does not allow, and for incompatible values.
    """

    block_size: PositiveInt = 1024  # tokens in a sequence
    vocab_size: PositiveInt = 50304  # GPT-2's 50257 rounded up to a multiple of 64, for speed
    n_layer: PositiveInt = 12  # blocks
    n_head: PositiveInt = 12  # attention heads in a block
    n_embd: PositiveInt = 768  # channels
    dropout: UnitFloat = 0.0  # 0 for pretraining, 0.1 or more for finetuning
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2
    gelu: Literal["none", "tanh"] = "none"  # approximation: none (exact) in nanoGPT, tanh in GPT-2
    # later than GPT-2; config/model/modern.py sets most of these
    n_kv_head: NonNegativeInt = 0  # key/value heads (grouped-query attention); 0: n_head
    position: Literal["learned", "rotary"] = "learned"  # position embeddings
    rope_theta: NonNegativeFloat = 10000.0  # base of the rotary angles
    norm: Literal["layer", "rms"] = "layer"  # layer norm or RMS norm
    qk_norm: bool = False  # RMS norm of queries and keys, over head_dim
    mlp: Literal["gelu", "relu2", "swiglu"] = "gelu"  # activation of the MLP
    mlp_width: NonNegativeInt = 0  # hidden channels; 0: 4 n_embd, about 8/3 n_embd for swiglu
    tied: bool = True  # the output head shares the token embeddings
    zero_init: bool = False  # output projections and an untied head start at zero
    ngrams: PositiveInt = 1  # also embed n-grams of 2 to this many tokens; 1: off
    ngram_rows: PositiveInt = 16384  # hash buckets for each n-gram length
    ngram_dropout: UnitFloat = 0.0  # dropout probability of an n-gram embedding

    def __post_init__(self):
        if type(self) is not GPTConfig:  # a script's config: checked when the model is built
            return
        for key, kind in get_type_hints(GPTConfig, include_extras=True).items():
            check_value(key, getattr(self, key), kind)
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.n_head % self.kv_heads != 0:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.position == "rotary" and self.head_dim % 2 != 0:
            reason = f"n_embd / n_head = {self.head_dim} is odd"
            raise ValueError(f"position=rotary rotates pairs of channels, but {reason}")
        if not 0 < self.rope_theta <= torch.finfo(torch.float64).max:  # a Python int may exceed it
            raise ValueError(f"rope_theta={self.rope_theta} is not positive and finite")

    @classmethod
    def from_settings(cls, settings, **changes):
        """Build a config from the attributes of `settings`, with `changes` to them."""
        values = {field.name: getattr(settings, field.name) for field in fields(cls)}
        return cls(**{**values, **changes})

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def hidden_width(self):
        """Hidden channels of the MLP: `mlp_width`, or by default 4 n_embd. SwiGLU has a third
        matrix, so 8/3 n_embd gives it as many parameters (Shazeer 2020, section 2). That is rounded
        up to a multiple of 64 for speed, or of 8 for small models (n_embd < 256)."""
        if self.mlp_width or self.mlp != "swiglu":
            return self.mlp_width or 4 * self.n_embd
        multiple = 64 if self.n_embd >= 256 else 8
        return -(-8 * self.n_embd // (3 * multiple)) * multiple

    def to_args(self):
        """The config as a dict: nanoGPT's seven fields, and the others that are not the default."""
        defaults = {field.name: field.default for field in fields(self)}
        always = list(defaults)[:7]
        return {k: v for k, v in asdict(self).items() if k in always or v != defaults[k]}


def check_value(key, value, kind):
    """Raise ValueError unless the annotated type `kind` allows `value`."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{key}={value} is not one of {', '.join(get_args(kind))}")
    elif kind is bool:
        if not isinstance(value, int) or value not in (0, 1):
            raise ValueError(f"{key}={value} is neither True nor False")
    else:
        number, (low, high) = get_args(kind)
        numbers, name = (Integral, "whole number") if number is int else (Real, "number")
        if not isinstance(value, numbers) or not low <= value <= high:
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{key}={value} is not a {name} {bounds}")


def make_norm(config):
    """Layer norm, or RMS norm, which has no mean and no bias (Zhang & Sennrich 2019)."""
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=1e-6)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rotary_cos_sin(positions, head_dim, theta):
    """Cosines and sines, each (..., T, 1, head_dim / 2), of the rotary angles at `positions`
    (..., T). In float32: bfloat16 rounds positions above 256."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[..., None, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def apply_rotary_emb(x, cos_sin):
    """Rotate x (B, T, heads, head_dim) by position (Su et al. 2021, RoFormer, section 3.2).
    Channel i is paired with i + head_dim / 2, as in GPT-NeoX and Llama."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def has_cpu_dropout(x, p):
    """Whether to use brisk's dropout for x, which is faster than PyTorch's on a CPU."""
    return HAS_BRISK and 0 < p < 1 and x.device.type == "cpu" and not torch.compiler.is_compiling()


class Dropout(nn.Dropout):
    def forward(self, x):
        if self.training and has_cpu_dropout(x, self.p):
            from brisk.cpu.dropout import dropout

            return dropout(x, self.p)
        return super().forward(x)


def has_grouped_kernel(q, mask):
    """Whether PyTorch has a fused attention kernel for fewer key/value than query heads. On CUDA
    only flash attention is one; the others need as many, or all scores are kept in memory."""
    if q.device.type != "cuda":
        return True
    is_flash = mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.size(-1) <= 256
    return is_flash and torch.cuda.get_device_properties(q.device).major >= 8  # Ampere


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention.

    Optional: grouped-query attention (Ainslie et al. 2023), and norms of queries and keys (Henry et
    al. 2020), here for each head, before the rotation, as in Qwen3.

    `cos_sin` rotates queries and keys, see `rotary_cos_sin`. `cache.update(k, v)` stores the new
    keys and values, (B, n_kv_head, T, head_dim) each, and returns all keys, all values and an
    additive mask or None.
    """

    def __init__(self, config):
        super().__init__()
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)  # queries, keys, values
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * self.head_dim, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def queries_keys_values(self, x, cos_sin=None):
        """Project x (B, T, n_embd) to q, k and v, (B, n_head or n_kv_head, T, head_dim) each."""
        q, k, v = self.c_attn(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        if self.qk_norm:  # autocast does not cast RMSNorm: its input must have the weight's dtype
            q = self.q_norm(q.type_as(self.q_norm.weight))
            k = self.k_norm(k.type_as(self.k_norm.weight))
        if cos_sin is not None:
            q, k = apply_rotary_emb(q, cos_sin), apply_rotary_emb(k, cos_sin)
        return q.type_as(v).transpose(1, 2), k.type_as(v).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, cache=None, cos_sin=None):
        B, T, C = x.shape
        q, k, v = self.queries_keys_values(x, cos_sin)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(k, v)
        causal = mask is None and k.size(2) == T  # a single new query attends to all cached keys
        dropout = self.dropout if self.training else 0.0
        if has_cpu_dropout(x, dropout):  # PyTorch's fused kernel has no dropout on a CPU
            from brisk.cpu.attention import attention

            y = attention(q, k, v, dropout)
        else:
            group = q.size(1) // k.size(1)
            if group > 1 and not has_grouped_kernel(q, mask):
                k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
            gqa = q.size(1) > k.size(1)
            y = F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, is_causal=causal, enable_gqa=gqa
            )
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with GELU, or with squared ReLU (So et al. 2021, Primer), between them."""

    def __init__(self, config):
        super().__init__()
        self.squared_relu = config.mlp == "relu2"
        self.c_fc = nn.Linear(config.n_embd, config.hidden_width, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = nn.Linear(config.hidden_width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        x = F.relu(x).square() if self.squared_relu else self.gelu(x)
        return self.dropout(self.c_proj(x))


class SwiGLU(nn.Module):
    """Gated MLP: down(SiLU(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.hidden_width, bias=config.bias)
        self.c_fc = nn.Linear(config.n_embd, config.hidden_width, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else MLP(config)

    def forward(self, x, cache=None, cos_sin=None):
        x = x + self.attn(self.ln_1(x), cache, cos_sin)
        x = x + self.mlp(self.ln_2(x))
        return x


def embedding(rows, channels):
    """An `nn.Embedding` without PyTorch's initialization, which `init_weights` would overwrite."""
    return nn.Embedding.from_pretrained(torch.empty(rows, channels), freeze=False)


def on_mps(x):
    return x.device.type == "mps"


class NgramEmbedding(nn.Module):
    """Hashed embeddings of the n-grams of 2 to `ngrams` tokens that end at each position, summed.

    They store common token sequences in a table rather than in the blocks (Huang et al. 2025,
    Over-Tokenized Transformer; Cheng et al. 2026, Engram; bigrams in modded-nanogpt). Each length
    has `ngram_rows` buckets, and n-grams that hash to one bucket share its embedding. Embeddings
    start at zero, so an unseen n-gram adds nothing. The sum is divided by the square root of the
    number of lengths, which also lowers their effective learning rate. `ngram_dropout` drops whole
    embeddings in training: otherwise they memorize the text in a second epoch.
    """

    def __init__(self, config):
        super().__init__()
        self.lengths, self.rows = config.ngrams - 1, config.ngram_rows  # n-gram lengths, buckets
        self.weight = nn.Parameter(torch.empty(self.lengths * self.rows, config.n_embd))
        self.dropout = config.ngram_dropout

    def forward(self, idx, before=None):
        """Embeddings (B, T, n_embd) for ids (B, T). `before` (B, ngrams - 1) has the preceding ids,
        -1 where there are none (the default)."""
        rows = self.hash_rows(idx, before).flatten(0, 1)
        scale = self.weight.new_full(rows.shape, self.lengths**-0.5)
        if self.training and self.dropout:
            scale = F.dropout(scale, self.dropout)
        if on_mps(idx):  # no embedding_bag before PyTorch 2.10
            x = (F.embedding(rows, self.weight) * scale[..., None]).sum(1)
        else:
            x = F.embedding_bag(rows, self.weight, mode="sum", per_sample_weights=scale)
        return x.view(*idx.shape, -1)

    def hash_rows(self, idx, before=None):
        """Rows (B, T, ngrams - 1) of the n-grams that end at each id, bigrams first: a polynomial
        hash modulo a prime, small enough not to overflow int64."""
        if before is None:
            before = idx.new_full((len(idx), self.lengths), -1)
        device = idx.device
        if on_mps(idx):  # its int64 remainder was rounded to float32 (pytorch issue 154171)
            idx, before = idx.cpu(), before.cpu()
        ids = torch.cat((before, idx), dim=1) + 1
        T, key, rows = idx.size(1), idx + 1, []
        for length in range(self.lengths):
            earlier = ids.narrow(1, self.lengths - 1 - length, T)
            key = (key * 1_103_515_245 + earlier) % (2**31 - 1)
            rows.append(key % self.rows + length * self.rows)
        return torch.stack(rows, dim=-1).to(device)


class GPT(nn.Module):
    """Embeddings, `n_layer` blocks, and an output head, tied to the token embeddings or not."""

    loss_kernel = None  # a compiled one, set from outside; see `brisk.training.loss`

    def __init__(self, config):
        super().__init__()
        self.config = config
        parts = {"wte": embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            parts["wpe"] = embedding(config.block_size, config.n_embd)
        if config.ngrams > 1:
            parts["ngrams"] = NgramEmbedding(config)
        parts["drop"] = Dropout(config.dropout)
        parts["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        parts["ln_f"] = make_norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @classmethod
    def uninitialized(cls, config):
        """A model on the CPU with uninitialized weights, for `init_weights` or `load_state_dict`.
        It skips the initialization of PyTorch's layers."""
        with torch.device("meta"):
            model = cls(config)
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape)))
        model.tie_weights()
        return model

    def tie_weights(self):
        if self.config.tied:
            self.transformer.wte.weight = self.lm_head.weight  # Press & Wolf 2017

    def init_weights(self):
        """Draw weights from N(0, 0.02²), projections into the residual stream with a standard
        deviation scaled by 1/√(2 n_layer) (GPT-2, section 2.3).

        `zero_init` sets those projections to zero, so that each block starts as the identity (Zhang
        et al. 2019, Fixup), and an untied head, so that the first prediction is uniform (Yang et
        al. 2022, D.2).
        """
        for name, parameter in self.named_parameters():
            residual = name.endswith("c_proj.weight")
            zeros = self.config.zero_init and (residual or name == "lm_head.weight")
            if zeros or ".ngrams." in name:
                nn.init.zeros_(parameter)
            elif parameter.dim() >= 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:  # the weight of a norm
                nn.init.ones_(parameter)

    def forward(self, idx, targets=None, return_logits=True, cache=None):
        """Compute logits, and the loss if `targets` are given.

        Args:
            idx: token ids (B, T), T at most `block_size`.
            targets: the next token at each position (B, T); -1 is ignored.
            return_logits: if False, compute the loss in chunks, without the logits of all
                positions in memory at once.
            cache: KV cache, see `backbone`.

        Returns:
            (logits, loss). With targets: logits (B, T, vocab_size) or None, and the mean
            cross-entropy in nats. Without: logits of the last position (B, 1, vocab_size), and
            None.

        Raises:
            ValueError: T exceeds `block_size`.
        """
        x = self.backbone(idx, cache)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if not return_logits and HAS_BRISK and not torch.compiler.is_compiling():
            from brisk.training.loss import linear_cross_entropy, loss_and_gradient

            head = self.lm_head.weight
            rows = (x.flatten(0, 1), head, targets.flatten())
            return None, linear_cross_entropy(*rows, kernel=self.loss_kernel or loss_and_gradient)
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits if return_logits else None, loss

    def backbone(self, idx, cache=None):
        """Final hidden states (B, T, n_embd), after the last norm, for token ids (B, T). With a
        `cache` (`kv_cache.CacheStep`), `idx` continues the cached sequences."""
        positions, before = (cache.positions, cache.before) if cache else (None, None)
        x, cos_sin = self.embed(idx, positions, before)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache.layer(i) if cache else None, cos_sin)
        return self.transformer.ln_f(x)

    def embed(self, idx, positions=None, before=None):
        """The input of the first block (B, T, n_embd), and `cos_sin` for rotary positions or None.
        `positions` is (T,) or (B, T), by default 0 to T - 1; `before` as in `NgramEmbedding`."""
        c, T = self.config, idx.size(1)
        if T > c.block_size:
            raise ValueError(f"a sequence of {T} tokens exceeds block_size={c.block_size}")
        if positions is None:
            positions = torch.arange(T, device=idx.device)
        x, cos_sin = self.transformer.wte(idx), None
        if c.position == "learned":
            x = x + self.transformer.wpe(positions)
        else:  # computed once for all blocks, and not a buffer: nothing to move or cast
            cos_sin = rotary_cos_sin(positions, c.head_dim, c.rope_theta)
        if c.ngrams > 1:
            x = x + self.transformer.ngrams(idx, before)
        return self.transformer.drop(x), cos_sin

    @torch.no_grad()
    def predict(self, idx, targets=True):
        """Logits (B, T, vocab_size) at every position, or with `targets=False` (B, 1, vocab_size)
        at the last one only."""
        x = self.backbone(idx)
        return self.lm_head(x if targets else x[:, -1:])

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Append `max_new_tokens` sampled tokens to the prompts idx (B, T). `temperature=0` is
        greedy. For the other options see `brisk.generation.generate`."""
        if HAS_BRISK:
            from brisk.generation.generate import generate

            return generate(self, idx, max_new_tokens, temperature, top_k, **options)
        if options:
            raise TypeError(f"without the brisk package generate has no {', '.join(options)}")
        was_training = self.training
        self.eval()
        if temperature == 0:
            temperature, top_k = 1.0, 1
        for _ in range(max_new_tokens):  # nanoGPT's loop, without a KV cache
            logits = self(idx[:, -self.config.block_size :])[0][:, -1] / temperature
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, new), dim=1)
        self.train(was_training)
        return idx

    @classmethod
    def from_pretrained(cls, name_or_directory, override_args=None):
        """Load GPT-2 from the Hugging Face hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or GPT-2
        or Qwen3 from a local Hugging Face directory, in eval mode. `override_args` may set
        `dropout`."""
        from brisk.interop.huggingface import load_pretrained

        model_args, state_dict = load_pretrained(name_or_directory)
        return cls.from_checkpoint({"model_args": model_args, "model": state_dict}, override_args)

    @classmethod
    def from_checkpoint(cls, checkpoint, override_args=None):
        """Load the model of a briskGPT or nanoGPT checkpoint, a path or a loaded dict, in eval
        mode. `override_args` may set `dropout` and `ngram_dropout`."""
        from brisk.checkpoint import load_checkpoint
        from brisk.errors import UserError

        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        try:
            return cls.from_state_dict(checkpoint["model_args"], checkpoint["model"], override_args)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the checkpoint does not hold a known model: {reason}") from error

    @classmethod
    def from_state_dict(cls, config_args, state_dict, override_args=None):
        """A model with the arguments `config_args` of `GPTConfig` and the weights `state_dict`, in
        eval mode. Raises ValueError or RuntimeError if they do not match."""
        if unknown := (override_args or {}).keys() - {"dropout", "ngram_dropout"}:
            raise ValueError(f"only dropouts can be overridden, not {', '.join(sorted(unknown))}")
        config = GPTConfig(**{**config_args, **(override_args or {})})
        layers = sum(name.endswith(".ln_1.weight") for name in state_dict)
        if layers != config.n_layer:  # checked before allocating: a file may claim a billion layers
            raise ValueError(f"n_layer={config.n_layer}, but there are weights of {layers} layers")
        model = cls.uninitialized(config)
        model.load_state_dict(state_dict)
        return model.eval()

    def crop_block_size(self, block_size):
        """Reduce the context length, for example to finetune GPT-2 on fewer than 1024 tokens."""
        if block_size > self.config.block_size:
            raise ValueError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config = replace(self.config, block_size=block_size)
        if self.config.position == "learned":
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach())

    def freeze_layers(self, count):
        """Freeze the embeddings, with a tied head, and the first `count` blocks. Frozen parts need
        no gradients, moments or stored activations. 0 freezes nothing."""
        if count == 0:
            return
        if count > len(self.transformer.h):
            raise ValueError(f"cannot freeze {count} of {len(self.transformer.h)} blocks")
        names = ("wte", "wpe", "ngrams")
        embeddings = [part for name, part in self.transformer.items() if name in names]
        for part in (*embeddings, *self.transformer.h[:count]):
            part.requires_grad_(False)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, by default without embeddings. Tied token embeddings are included:
        they are also the head."""
        total = sum(parameter.numel() for parameter in self.parameters())
        names = ("wpe", "ngrams") if self.config.tied else ("wte", "wpe", "ngrams")
        embeddings = [part for name, part in self.transformer.items() if name in names]
        return total - non_embedding * sum(part.weight.numel() for part in embeddings)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, muon=None):
        """AdamW with nanoGPT's two parameter groups: weight decay for matrices and embeddings, none
        for vectors. `muon`, (learning rate, momentum[, ranks]), selects Muon for the matrices of
        the blocks, its work divided among `ranks` (`brisk.distributed.process_group.Ranks`)."""
        if not HAS_BRISK and not muon:
            weights = [p for p in self.parameters() if p.requires_grad]
            decayed = {"params": [p for p in weights if p.dim() >= 2], "weight_decay": weight_decay}
            others = {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}
            return torch.optim.AdamW([decayed, others], lr=learning_rate, betas=betas)
        from brisk.training.muon import muon_adamw
        from brisk.training.optim import adamw

        if muon:
            return muon_adamw(self, weight_decay, learning_rate, betas, device_type, *muon)
        return adamw(self.named_parameters(), weight_decay, learning_rate, betas, device_type)

    def flops_per_token(self):
        """FLOPs of the forward and backward pass for one token: 6 N + 12 L H Q T, with N
        parameters, L layers, H query heads, Q = head_dim and T = block_size (Chowdhery et al. 2022,
        PaLM, appendix B). Frozen blocks count a third: they have no backward pass.
        """
        c = self.config
        blocks = [block for block in self.transformer.h if not block.ln_1.weight.requires_grad]
        frozen = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        layers = c.n_layer - len(blocks) * 2 / 3
        return 6 * self.get_num_params() - 4 * frozen + 12 * layers * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, flops_promised=312e12):
        """Model FLOPs utilization: the fraction of `flops_promised` (FLOP/s, by default an A100's
        in bfloat16) reached by `fwdbwd_per_iter` sequences in `dt` seconds."""
        flops = self.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        return flops / dt / flops_promised
