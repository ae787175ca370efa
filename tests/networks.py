"""Small models of every architecture, with random weights."""

import torch

from model import GPT, GPTConfig

MODERN = dict(position="rotary", norm="rms", qk_norm=True, mlp="swiglu", bias=False, zero_init=True)
VARIANTS = [
    {"n_kv_head": 2},
    {"n_kv_head": 1, "bias": False},
    {"position": "rotary"},
    {"position": "rotary", "n_kv_head": 2, "rope_theta": 100.0},
    {"norm": "rms"},
    {"qk_norm": True},
    {"mlp": "swiglu"},
    {"mlp": "relu2", "mlp_width": 48},
    {"tied": False},
    {"ngrams": 3, "ngram_rows": 50},
    {"position": "rotary", "ngrams": 2, "ngram_rows": 7, "n_kv_head": 2},
    MODERN,
    {**MODERN, "n_kv_head": 2, "tied": False, "ngrams": 5},
]

SIZES = dict(block_size=24, vocab_size=61, n_layer=3, n_head=4, n_embd=32)


def random_model(**settings):
    """A small model in eval mode with all parameters random, including biases and norms."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def random_ids(B=2, T=24):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))
