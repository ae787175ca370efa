"""Convert between our classic model and Hugging Face's `GPT2LMHeadModel`.

The weight names are the same, as nanoGPT took them from there, except that files on the hub omit
the prefix `transformer.`. Hugging Face's linear layers ("Conv1D") store weights as (inputs,
outputs), `nn.Linear` as (outputs, inputs).
"""

from dataclasses import asdict

import torch

from brisk.errors import UserError
from brisk.interop.foreign_config import WEIGHT_FILES, Key, only, read_config, size

NAME, MODEL_TYPE = "GPT-2", "gpt2"
GELUS = {  # their name of an activation: our GPTConfig.gelu
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "none",
}
CONFIG = {  # the keys of its config that affect the computation, with transformers' defaults
    "vocab_size": size(50257),
    "n_positions": size(1024, alias="max_position_embeddings"),
    "n_embd": size(768, alias="hidden_size"),
    "n_layer": size(12, alias="num_hidden_layers"),
    "n_head": size(12, alias="num_attention_heads"),
    "n_inner": size(None, null=True),  # null: 4 n_embd
    "activation_function": only(*GELUS),
    "layer_norm_epsilon": only(1e-5),
    "scale_attn_weights": only(True),
    "scale_attn_by_inverse_layer_idx": only(False),
    "add_cross_attention": only(False),
    "tie_word_embeddings": Key(bool, True),
    **WEIGHT_FILES,
}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# The values that these fields of GPTConfig must have.
FIELDS = {"position": "learned", "norm": "layer", "qk_norm": False, "mlp": "gelu", "ngrams": 1}


def import_config(theirs, source):
    """Convert a config (a dict) to arguments of `GPTConfig`. Raises `UserError`, prefixed with
    `source`, for an invalid or unsupported config."""
    config = read_config(theirs, CONFIG, source)
    n_embd, n_head = config["n_embd"], config["n_head"]
    if n_embd % n_head != 0:
        raise UserError(f"{source}: n_embd={n_embd} is not divisible by n_head={n_head}")
    width = config["n_inner"] or 4 * n_embd
    return dict(
        block_size=config["n_positions"],
        vocab_size=config["vocab_size"],
        n_layer=config["n_layer"],
        n_head=n_head,
        n_embd=n_embd,
        bias=True,
        gelu=GELUS[config["activation_function"]],
        mlp_width=0 if width == 4 * n_embd else width,
        tied=config["tie_word_embeddings"],
    )


def import_weights(weights, config_args, source):
    """Convert weights to our names and shapes."""
    state = {}
    for name, weight in weights.items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks, not weights
            state[name] = transpose_conv1d(name, weight)
    return state


def export_config(config):
    """Convert our `GPTConfig` to a config (a dict)."""
    names = {ours: theirs for theirs, ours in reversed(GELUS.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # the name that llama.cpp's converter reads
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.mlp_width or None,
        "activation_function": names[config.gelu],
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        "tie_word_embeddings": config.tied,
        "dtype": "float32",
    }


def export_weights(config, state):
    """Convert our weights. Missing biases become zeros."""
    weights = {}
    for name, shape in weight_shapes(**asdict(config)).items():
        if name in state:
            weights[name] = transpose_conv1d(name, state[name])
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
    return weights


def transpose_conv1d(name, weight):
    """Transpose the weight of a linear layer, in either direction. Others are unchanged."""
    return weight.t() if name.endswith(CONV1D) and weight.dim() == 2 else weight


def weight_shapes(n_layer, n_embd, vocab_size, block_size, mlp_width=0, **args):
    """{our name: shape} of each weight of a GPT-2 with biases, for arguments of `GPTConfig`."""
    C, width = n_embd, mlp_width or 4 * n_embd
    block = {
        "ln_1.weight": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_proj.weight": (C, C),
        "ln_2.weight": (C,),
        "mlp.c_fc.weight": (width, C),
        "mlp.c_proj.weight": (C, width),
    }  # and a bias for each output channel
    block |= {name.replace("weight", "bias"): shape[:1] for name, shape in block.items()}
    return {
        "transformer.wte.weight": (vocab_size, C),
        "transformer.wpe.weight": (block_size, C),
        **{f"transformer.h.{i}.{name}": block[name] for i in range(n_layer) for name in block},
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
        "lm_head.weight": (vocab_size, C),
    }
