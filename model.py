"""The whole network: GPT-2 as nanoGPT writes it, weight names included.

Readable alone: nothing here knows of files, ranks, precision or text. What a trained model needs
from outside (pretrained weights, a checkpoint, an optimizer, a way to generate) is asked of the
`brisk` package when it is called for; the network itself can be copied out and used without.

Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2), and
https://github.com/openai/gpt-2/blob/master/src/model.py

Shapes: B sequences of T tokens, n_embd channels, n_head heads of head_dim = n_embd // n_head.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """Sizes of the network. The first seven fields are nanoGPT's."""

    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which is faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in the linear layers and layer norms, as GPT-2 has them
    gelu: str = "none"  # approximation of GELU: "none" is erf as in nanoGPT, "tanh" as in GPT-2

    def __post_init__(self):
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")

    def to_args(self):
        """The fields as a dict: nanoGPT's seven always, a further one where it is not default."""
        defaults = {field.name: field.default for field in fields(self)}
        kept = list(defaults)[:7]
        return {k: v for k, v in asdict(self).items() if k in kept or v != defaults[k]}


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before it.

    With a `cache`, what came before includes the positions read in earlier calls: its
    `extend(k, v)` adds these keys and values, (B, n_head, T, head_dim) each, and returns all.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(dim=2)
        q, k, v = (
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
        )  # (B, n_head, T, head_dim)
        causal = True
        if cache is not None:
            k, v = cache.extend(k, v)
            if T == 1:
                causal = False  # one query sees every key
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with GELU between them, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy and added back (pre-norm residuals)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Token and position embeddings, `n_layer` blocks, and a head tied to the embeddings."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: Press & Wolf 2017
        self.init_weights()

    def init_weights(self):
        """Normal with deviation 0.02, less for what adds to the residual stream (GPT-2, 2.3)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None, return_logits=True, cache=None):
        """Logits, and the loss where there are targets.

        Args:
            idx: token ids (B, T), T at most `block_size`.
            targets: the token after each one (B, T); positions with -1 are ignored.
            return_logits: training says False, which leaves the loss free to be computed in parts.
            cache: one for each block, with the positions before `idx`; see `hidden`.

        Returns:
            (logits, loss): with targets, logits (B, T, vocab_size) (or None) and the mean
            cross-entropy in nats over the targets that are not -1; without, the logits of the
            last position (B, 1, vocab_size) and None.

        Raises:
            ValueError: T exceeds `block_size`.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1
        )
        return (logits if return_logits else None), loss

    def hidden(self, idx, cache=None):
        """The normalised output of the last block (B, T, n_embd) for token ids (B, T).

        `cache` has an entry for each block that holds the keys and values of the `length`
        positions before `idx`, and takes in those of `idx` (`brisk.generation.KVCache`).
        """
        start = cache[0].length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(
                f"a sequence of {end} tokens exceeds block_size={self.config.block_size}"
            )
        positions = torch.arange(start, end, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache[i] if cache else None)
        return self.transformer.ln_f(x)

    @torch.no_grad()
    def predict(self, idx, targets=True):
        """Logits of the next token: after every position (B, T, vocab_size), or, with
        `targets=False`, after the last one only (B, 1, vocab_size)."""
        x = self.hidden(idx)
        return self.lm_head(x if targets else x[:, -1:])

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """The ids (B, T) with `max_new_tokens` more drawn after them (B, T + max_new_tokens).

        `temperature=0` takes the likeliest token. Further options: `brisk.generation.generate`.
        """
        from brisk.generation import generate

        return generate(self, idx, max_new_tokens, temperature, top_k, **options)

    @classmethod
    def from_pretrained(cls, name_or_directory, override_args=None):
        """GPT-2 from the Hugging Face hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a directory
        that `save_pretrained` wrote, in eval mode. `override_args` may set `dropout`."""
        from brisk.huggingface import load_gpt2

        config_args, state_dict = load_gpt2(name_or_directory)
        return cls.with_weights(config_args, state_dict, override_args)

    @classmethod
    def from_checkpoint(cls, checkpoint, override_args=None):
        """The model inside a checkpoint, a file (one of nanoGPT's too) or the dict loaded from it,
        in eval mode. `override_args` may set `dropout`."""
        from brisk.checkpoint import load_checkpoint
        from brisk.errors import UserError

        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        try:
            return cls.with_weights(checkpoint["model_args"], checkpoint["model"], override_args)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the checkpoint is not of a model known here: {reason}") from error

    @classmethod
    def with_weights(cls, config_args, state_dict, override_args=None):
        """A model with these arguments of `GPTConfig` and these weights."""
        if unknown := (override_args or {}).keys() - {"dropout"}:
            raise ValueError(f"only dropout can be overridden, not {', '.join(sorted(unknown))}")
        model = cls(GPTConfig(**{**config_args, **(override_args or {})}))
        model.load_state_dict(state_dict)
        return model.eval()

    def crop_block_size(self, block_size):
        """Shorten the context, for instance to finetune GPT-2 on fewer than its 1024 tokens."""
        if block_size > self.config.block_size:
            raise ValueError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(
            self.transformer.wpe.weight[:block_size].detach()
        )

    def get_num_params(self, non_embedding=True):
        """Number of parameters, by default without the position embeddings (the token embeddings
        stay in: they are also the head)."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in nanoGPT's two groups: matrices and embeddings decay, vectors do not."""
        from brisk.optim import adamw

        return adamw(self.named_parameters(), weight_decay, learning_rate, betas, device_type)

    def flops_per_token(self):
        """Floating-point operations of a forward and backward pass for one token: 6 N + 12 L H Q T
        (Chowdhery et al. 2022, PaLM, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, flops_promised=312e12):
        """Model FLOPs utilisation: the share of `flops_promised` per second (an A100's in bfloat16
        by default) that `fwdbwd_per_iter` sequences in `dt` seconds come to."""
        flops = self.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        return flops / dt / flops_promised
