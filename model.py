"""The whole network: GPT-2 as nanoGPT writes it, weight names included.

What came after GPT-2 is there by further fields of `GPTConfig`, each with its source; their
defaults leave GPT-2. The fields of config/model/modern.py together make the network of Qwen3.

Nothing here knows of files, ranks, precision or text. Faster kernels, samplers and optimizers come
from the `brisk` package. Copied out alone, this file trains and generates in plain PyTorch.

Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2), and
https://github.com/openai/gpt-2/blob/master/src/model.py

Shapes: B sequences of T tokens, n_embd channels, n_head heads of head_dim = n_embd // n_head,
and as many heads of keys and values (n_kv_head) unless the config says fewer.
"""

import importlib.util
import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.nn import functional as F

HAS_BRISK = importlib.util.find_spec("brisk") is not None  # False where this file is alone

PositiveInt = Annotated[int, (1, math.inf)]  # (lowest, highest), both allowed
NonNegativeInt = Annotated[int, (0, math.inf)]
NonNegativeFloat = Annotated[float, (0, math.inf)]
UnitFloat = Annotated[float, (0, 1)]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the network. The first seven fields are nanoGPT's; the defaults are GPT-2 (124M).

    This is the only list of these fields: the settings of train.py and bench.py inherit it, and
    each trailing comment is a line of their help.

    Raises ValueError for a value that its type does not allow, or values that do not go together.
    """

    block_size: PositiveInt = 1024  # tokens in a sequence
    vocab_size: PositiveInt = 50304  # rows of the vocabulary: GPT-2's 50257, to a multiple of 64
    n_layer: PositiveInt = 12  # blocks
    n_head: PositiveInt = 12  # attention heads in a block
    n_embd: PositiveInt = 768  # channels
    dropout: UnitFloat = 0.0  # 0 for pretraining, 0.1 or more for finetuning
    bias: bool = True  # biases in linear layers and layer norms, as GPT-2 has them
    gelu: Literal["none", "tanh"] = "none"  # approximation: none is erf as in nanoGPT, tanh GPT-2's
    # what came after GPT-2; config/model/modern.py sets most of it
    n_kv_head: NonNegativeInt = 0  # key/value heads, each for some query heads (GQA); 0: n_head
    position: Literal["learned", "rotary"] = "learned"  # embeddings of positions, or rotations
    rope_theta: NonNegativeFloat = 10000.0  # base of the rotary angles
    norm: Literal["layer", "rms"] = "layer"  # layer norm, or RMS norm
    qk_norm: bool = False  # RMS norms over head_dim of queries and of keys
    mlp: Literal["gelu", "relu2", "swiglu"] = "gelu"  # activation between the linear layers
    mlp_width: NonNegativeInt = 0  # channels there; 0: 4 n_embd, for swiglu about 8/3 n_embd
    tied: bool = True  # the head is the token embedding
    zero_init: bool = False  # output projections, and an untied head, start at zero
    ngrams: PositiveInt = 1  # n-grams of 2 to this many tokens have embeddings too
    ngram_rows: PositiveInt = 16384  # embeddings for each length, which runs share by hashing
    ngram_dropout: UnitFloat = 0.0  # share of them that training leaves out

    def __post_init__(self):
        if type(self) is not GPTConfig:  # the settings of a script: checked when the model is built
            return
        for key, kind in get_type_hints(GPTConfig, include_extras=True).items():
            check_value(key, getattr(self, key), kind)
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.n_head % self.kv_heads != 0:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.position == "rotary" and self.head_dim % 2 != 0:
            odd = f"n_embd / n_head = {self.head_dim} is odd"
            raise ValueError(f"position=rotary turns channels of a head in pairs, and {odd}")
        if not 0 < self.rope_theta <= torch.finfo(torch.float64).max:  # an int may be above it
            raise ValueError(f"rope_theta={self.rope_theta} is not positive and finite")

    @classmethod
    def from_settings(cls, settings, **changes):
        """The fields of this class among the attributes of `settings`, with `changes`."""
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
        """Hidden channels of the MLP: `mlp_width`, else 4 n_embd. SwiGLU has a third matrix, so
        8/3 n_embd makes it as large (Shazeer 2020, section 2), rounded up to a multiple of 64,
        which is faster, or of 8 where n_embd is below 256 and 64 would be much."""
        if self.mlp_width or self.mlp != "swiglu":
            return self.mlp_width or 4 * self.n_embd
        multiple = 64 if self.n_embd >= 256 else 8
        return -(-8 * self.n_embd // (3 * multiple)) * multiple

    def to_args(self):
        """The fields as a dict: nanoGPT's seven always, a further one where it is not default."""
        defaults = {field.name: field.default for field in fields(self)}
        kept = list(defaults)[:7]
        return {k: v for k, v in asdict(self).items() if k in kept or v != defaults[k]}


def check_value(key, value, kind):
    """Raise ValueError where a field of `GPTConfig` has a value that its type does not allow."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{key}={value} is none of {', '.join(get_args(kind))}")
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
    """Layer norm, or RMS norm, which leaves the mean and the bias out (Zhang & Sennrich 2019)."""
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=1e-6)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rotary_cos_sin(positions, head_dim, theta):
    """Cosines and sines, each (..., T, 1, head_dim / 2), of the rotation at `positions` (..., T).
    In float32: bfloat16 cannot tell position 1000 from 1001."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[..., None, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def apply_rotary_emb(x, cos_sin):
    """Rotate heads x (B, T, heads, head_dim) by position, channel i paired with i + head_dim / 2
    as in GPT-NeoX and Llama (Su et al. 2021, section 3.2)."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def has_cpu_dropout(x, p):
    """Whether `brisk` has a faster kernel for dropout of x: PyTorch's is slow on a CPU."""
    return HAS_BRISK and 0 < p < 1 and x.device.type == "cpu" and not torch.compiler.is_compiling()


class Dropout(nn.Dropout):
    """Each channel is zero with probability p in training, and the others are scaled up."""

    def forward(self, x):
        if self.training and has_cpu_dropout(x, self.p):
            from brisk.cpu.dropout import dropout

            return dropout(x, self.p)
        return super().forward(x)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention.

    With a `cache`, queries also attend to earlier calls' positions: `cache.update(k, v)` stores the
    new keys and values, (B, n_kv_head, T, head_dim) each, and returns all keys, all values and the
    mask to add to the scores, or None.
    With `cos_sin` (see `rotary_cos_sin`) queries and keys are rotated by position.

    Fewer heads of keys and values than of queries: Ainslie et al. 2023 (GQA). Norms of queries
    and keys: Henry et al. 2020, here over each head before the rotation, as in Qwen3.
    """

    def __init__(self, config):
        super().__init__()
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)  # of queries, keys, values
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
        """Of x (B, T, n_embd): (B, n_head or n_kv_head, T, head_dim) each."""
        q, k, v = self.c_attn(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        if self.qk_norm:  # in the precision of the weights: autocast leaves norms as they come
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
        causal = mask is None and k.size(2) == T  # one query with more keys attends to all of them
        dropout = self.dropout if self.training else 0.0
        if has_cpu_dropout(x, dropout):
            from brisk.cpu.attention import (
                attention,  # PyTorch's fused kernel has no dropout on a CPU
            )

            y = attention(q, k, v, dropout)
        else:
            shared = q.size(1) > k.size(1)  # the kernel lets several queries read one key
            y = F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, is_causal=causal, enable_gqa=shared
            )
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with GELU between them, four times as wide inside; or with the square of
    ReLU (So et al. 2021, Primer)."""

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
    """An MLP whose hidden channels are opened and shut by as many gates (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.hidden_width, bias=config.bias)
        self.c_fc = nn.Linear(config.n_embd, config.hidden_width, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy and added back (pre-norm residuals)."""

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
    """A table of vectors with nothing in it yet: PyTorch would draw one that is drawn again."""
    return nn.Embedding.from_pretrained(torch.empty(rows, channels), freeze=False)


class NgramEmbedding(nn.Module):
    """Vectors of the runs of 2, 3, … `ngrams` tokens that end at each position, added up.

    What often stands together is known at once, without the blocks (Huang et al. 2025,
    Over-Tokenized Transformer; Cheng et al. 2026, Engram; pairs in the speedrun of nanoGPT). A
    run's row is a hash of its ids, so several may share one. All rows begin at zero: a run that was
    never met says nothing. The sum is over the root of their number, by which they also learn more
    slowly than tokens. Training leaves a share of them out (`ngram_dropout`): what is seen a second
    time would otherwise be known by heart.
    """

    def __init__(self, config):
        super().__init__()
        self.lengths, self.rows = config.ngrams - 1, config.ngram_rows  # so many tables, of so many
        self.weight = nn.Parameter(torch.empty(self.lengths * self.rows, config.n_embd))
        self.dropout = config.ngram_dropout

    def forward(self, idx, before=None):
        """Vectors (B, T, n_embd) for ids (B, T) and the `ngrams` - 1 ids before them, -1 where
        there are none (as everywhere by default)."""
        rows = self.rows_of(idx, before).flatten(0, 1)
        shares = self.weight.new_full(rows.shape, self.lengths**-0.5)
        if self.training and self.dropout:
            shares = F.dropout(shares, self.dropout)
        x = F.embedding_bag(rows, self.weight, mode="sum", per_sample_weights=shares)
        return x.view(*idx.shape, -1)

    def rows_of(self, idx, before=None):
        """The rows (B, T, ngrams - 1) of the runs that end at each of the ids (B, T), the pairs'
        first: polynomials of the ids modulo a prime, which 64 bits hold without overflow."""
        if before is None:
            before = idx.new_full((len(idx), self.lengths), -1)
        ids = torch.cat((before, idx), dim=1) + 1
        T, key, rows = idx.size(1), idx + 1, []
        for length in range(self.lengths):
            earlier = ids.narrow(1, self.lengths - 1 - length, T)
            key = (key * 1_103_515_245 + earlier) % (2**31 - 1)
            rows.append(key % self.rows + length * self.rows)
        return torch.stack(rows, dim=-1)


class GPT(nn.Module):
    """Token and position embeddings, `n_layer` blocks, and a head tied to the embeddings.

    With position="rotary" there are no position embeddings; with tied=False the head has weights
    of its own; with ngrams there are embeddings of runs of tokens besides.
    """

    loss_kernel = None  # a compiled one, set from outside; see `brisk.training.loss`

    def __init__(self, config):
        super().__init__()
        self.config = config
        embeddings = dict(wte=embedding(config.vocab_size, config.n_embd))
        if config.position == "learned":
            embeddings["wpe"] = embedding(config.block_size, config.n_embd)
        if config.ngrams > 1:
            embeddings["ngrams"] = NgramEmbedding(config)
        self.transformer = nn.ModuleDict(
            dict(
                **embeddings,
                drop=Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=make_norm(config),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @classmethod
    def uninitialized(cls, config):
        """A model on the CPU whose weights are not initialized, for `init_weights` or
        `load_state_dict`: the values that PyTorch's layers would draw first are not drawn."""
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
        """Normal with deviation 0.02, less for what adds to the residual stream (GPT-2, 2.3).

        With `zero_init` that is zero, so that each block begins as the identity (Zhang et al.
        2019, Fixup), and so is an untied head: all tokens begin as likely (Yang et al. 2022, D.2).
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
            else:  # of a norm
                nn.init.ones_(parameter)

    def forward(self, idx, targets=None, return_logits=True, cache=None):
        """Logits, and the loss where there are targets.

        Args:
            idx: token ids (B, T), T at most `block_size`.
            targets: the token after each one (B, T); positions with -1 are ignored.
            return_logits: training says False, and the loss is computed in parts, without
                the logits of all positions in memory at once.
            cache: keys and values of earlier positions; see `backbone`.

        Returns:
            (logits, loss): with targets, logits (B, T, vocab_size) (or None) and the mean
            cross-entropy in nats over the targets that are not -1; without, the logits of the
            last position (B, 1, vocab_size) and None.

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
        """The normalised output of the last block (B, T, n_embd) for token ids (B, T).

        With a `cache` (`kv_cache.CacheStep`) the ids follow the positions that it holds.
        """
        positions, before = (cache.positions, cache.before) if cache else (None, None)
        x, cos_sin = self.embed(idx, positions, before)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache.layer(i) if cache else None, cos_sin)
        return self.transformer.ln_f(x)

    def embed(self, idx, positions=None, before=None):
        """The input of the first block: vectors (B, T, n_embd) of the ids (B, T), and the cosines
        and sines of rotary positions, or None. `positions` is (T,) or (B, T), by default 0 to
        T - 1; `before` is as in `NgramEmbedding`."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(
                f"a sequence of {T} tokens exceeds block_size={self.config.block_size}"
            )
        if positions is None:
            positions = torch.arange(T, device=idx.device)
        x, cos_sin = self.transformer.wte(idx), None
        if self.config.position == "learned":
            x = x + self.transformer.wpe(positions)
        else:  # once for all blocks, from the positions alone: nothing to store, move or cast
            cos_sin = rotary_cos_sin(positions, self.config.head_dim, self.config.rope_theta)
        if self.config.ngrams > 1:
            x = x + self.transformer.ngrams(idx, before)
        return self.transformer.drop(x), cos_sin

    @torch.no_grad()
    def predict(self, idx, targets=True):
        """Logits of the next token: after every position (B, T, vocab_size), or, with
        `targets=False`, after the last one only (B, 1, vocab_size)."""
        x = self.backbone(idx)
        return self.lm_head(x if targets else x[:, -1:])

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Append `max_new_tokens` sampled tokens to the prompts idx (B, T); `temperature=0` takes
        the likeliest. For further options see `brisk.generation.generate`."""
        if HAS_BRISK:
            from brisk.generation.generate import generate

            return generate(self, idx, max_new_tokens, temperature, top_k, **options)
        if options:
            raise TypeError(f"without the brisk package generate has no {', '.join(options)}")
        was_training = self.training
        self.eval()
        if temperature == 0:
            temperature, top_k = 1.0, 1
        for _ in range(max_new_tokens):  # nanoGPT's loop, which reads the whole window every time
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
        """GPT-2 from the Hugging Face hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a GPT-2 or
        Qwen3 from a directory such as export.py writes, in eval mode. `override_args` may set
        `dropout`."""
        from brisk.interop.huggingface import load_pretrained

        model_args, state_dict = load_pretrained(name_or_directory)
        return cls.from_checkpoint({"model_args": model_args, "model": state_dict}, override_args)

    @classmethod
    def from_checkpoint(cls, checkpoint, override_args=None):
        """The model inside a checkpoint, a file (one of nanoGPT's too) or the dict loaded from it,
        in eval mode. `override_args` may set `dropout` and `ngram_dropout`."""
        from brisk.checkpoint import load_checkpoint
        from brisk.errors import UserError

        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        try:
            return cls.from_state_dict(checkpoint["model_args"], checkpoint["model"], override_args)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the checkpoint is not of a model known here: {reason}") from error

    @classmethod
    def from_state_dict(cls, config_args, state_dict, override_args=None):
        """A model with these arguments of `GPTConfig` and these weights."""
        if unknown := (override_args or {}).keys() - {"dropout", "ngram_dropout"}:
            raise ValueError(f"only dropouts can be overridden, not {', '.join(sorted(unknown))}")
        config = GPTConfig(**{**config_args, **(override_args or {})})
        layers = sum(name.endswith(".ln_1.weight") for name in state_dict)
        if layers != config.n_layer:  # before a claim of a billion is believed
            raise ValueError(f"n_layer={config.n_layer}, and the weights are of {layers} layers")
        model = cls.uninitialized(config)
        model.load_state_dict(state_dict)
        return model.eval()

    def crop_block_size(self, block_size):
        """Shorten the context, for instance to finetune GPT-2 on fewer than its 1024 tokens."""
        if block_size > self.config.block_size:
            raise ValueError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config = replace(self.config, block_size=block_size)
        if self.config.position == "learned":
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach())

    def freeze_layers(self, count):
        """Keep the embeddings and the first `count` blocks as they are: they then take neither
        gradients nor moments, and their activations are not kept. A tied head is kept as well."""
        if count == 0:
            return
        if count > len(self.transformer.h):
            raise ValueError(f"cannot freeze {count} of {len(self.transformer.h)} blocks")
        tables = ("wte", "wpe", "ngrams")
        lower = [part for name, part in self.transformer.items() if name in tables]
        for part in (*lower, *self.transformer.h[:count]):
            part.requires_grad_(False)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, by default without the embeddings of positions and n-grams (those
        of tokens stay in where they are also the head, and are left out where it has weights of its
        own)."""
        total = sum(parameter.numel() for parameter in self.parameters())
        looked_up = []
        if self.config.position == "learned":
            looked_up.append(self.transformer.wpe)
        if self.config.ngrams > 1:
            looked_up.append(self.transformer.ngrams)
        if not self.config.tied:
            looked_up.append(self.transformer.wte)
        embeddings = sum(embedding.weight.numel() for embedding in looked_up)
        return total - embeddings if non_embedding else total

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, muon=None):
        """AdamW in nanoGPT's two groups: matrices and embeddings decay, vectors do not. With
        `muon`, its (learning rate, momentum), Muon for the matrices in the blocks; a third entry
        is the processes that share its work, a `brisk.distributed.process_group.Ranks`."""
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
        """Floating-point operations of a forward and backward pass for one token: 6 N + 12 L H Q T
        (Chowdhery et al. 2022, PaLM, appendix B), a third of it for blocks that are frozen.

        N counts the weights that are multiplied: the head, once, and no embedding that is only
        looked up. H is the number of query heads: sharing keys and values spares no product of
        attention, only its memory.
        """
        c = self.config
        frozen = [block for block in self.transformer.h if not block.ln_1.weight.requires_grad]
        spared = sum(parameter.numel() for block in frozen for parameter in block.parameters())
        layers = c.n_layer - len(frozen) * 2 / 3
        return 6 * self.get_num_params() - 4 * spared + 12 * layers * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, flops_promised=312e12):
        """Model FLOPs utilisation: the share of `flops_promised` per second (an A100's in bfloat16
        by default) that `fwdbwd_per_iter` sequences in `dt` seconds come to."""
        flops = self.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        return flops / dt / flops_promised
