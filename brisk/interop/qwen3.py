"""Convert between our modern model (config/model/modern.py) and Hugging Face's `Qwen3ForCausalLM`.

Weight names differ, and queries, keys and values are three matrices there but one here.
"""

from dataclasses import replace

import torch

from brisk.errors import UserError
from brisk.interop.foreign_config import WEIGHT_FILES, Key, only, read_config, shown, size

NAME, MODEL_TYPE = "Qwen3", "qwen3"

THETA = Key(float, 10000.0, low=1e-6, high=1e30)  # its powers must not overflow float32

# The values that these fields of GPTConfig must have.
FIELDS = {"position": "rotary", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "ngrams": 1}
FIELDS |= {"bias": False}
CONFIG = {  # the keys of its config that affect the computation, with transformers' defaults
    "vocab_size": size(),
    "max_position_embeddings": size(),
    "hidden_size": size(),
    "intermediate_size": size(),
    "num_hidden_layers": size(),
    "num_attention_heads": size(),
    "num_key_value_heads": size(null=True),  # null: num_attention_heads
    "head_dim": size(128),
    "hidden_act": only("silu"),
    "rms_norm_eps": only(1e-6),
    "attention_bias": only(False),
    "use_sliding_window": only(False),
    "layer_types": Key(list, None, null=True),
    "rope_theta": THETA,
    "rope_parameters": Key(dict, None, null=True),
    "rope_scaling": Key(dict, None, null=True),  # before transformers 5
    "partial_rotary_factor": only(1.0),
    "tie_word_embeddings": Key(bool, False),
    **WEIGHT_FILES,
}
ROPE = {"rope_type": only("default"), "rope_theta": replace(THETA, default=None)}
BLOCK = {  # our name of a weight: their names, concatenated along the rows in ours
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_gate": ("mlp.gate_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


def import_config(theirs, source):
    """Convert a config (a dict) to arguments of `GPTConfig`. Raises `UserError`, prefixed with
    `source`, for an invalid or unsupported config."""
    config = read_config(theirs, CONFIG, source)
    n_embd, n_head = config["hidden_size"], config["num_attention_heads"]
    head_dim, n_layer = config["head_dim"], config["num_hidden_layers"]
    n_kv_head = config["num_key_value_heads"] or n_head
    if n_head * head_dim != n_embd or head_dim % 2 != 0:
        sizes = f"hidden_size={n_embd}, num_attention_heads={n_head}, head_dim={head_dim}"
        raise UserError(f"{source}: {sizes}; expected an even head_dim equal to their quotient")
    if n_head % n_kv_head != 0:
        sizes = f"num_attention_heads={n_head} is not divisible by num_key_value_heads={n_kv_head}"
        raise UserError(f"{source}: {sizes}")
    layers = config["layer_types"]
    if layers is not None and not layers.count("full_attention") == len(layers) == n_layer:
        types = f"full_attention for each of {n_layer} layers"
        raise UserError(f"{source}: its config has layer_types={shown(layers)}; expected {types}")
    return dict(
        block_size=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=n_embd,
        mlp_width=config["intermediate_size"],
        rope_theta=rope_theta(config, source),
        tied=config["tie_word_embeddings"],
        **{key: value for key, value in FIELDS.items() if key != "ngrams"},
    )


def rope_theta(config, source):
    """Base of the rotary angles. transformers 5 replaced the keys rope_theta and rope_scaling by
    rope_parameters; if both are present, transformers uses rope_scaling."""
    theta = config["rope_theta"]
    for name in ("rope_parameters", "rope_scaling"):
        if rope := config[name]:
            rope = {"rope_type": rope.get("type", "default"), **rope}
            known = read_config(rope, ROPE, f"{source}: {name}")
            further = [key for key in rope if key not in (*ROPE, "type") and rope[key] is not None]
            if further:  # parameters for each type of layer, or of a scaling method
                unknown = f"{shown(further[0])} in {name}"
                raise UserError(f"{source}: its config has {unknown}, which is not supported")
            theta = known["rope_theta"] or config["rope_theta"]
    return theta


def import_weights(weights, config_args, source):
    """Convert weights to our names. Unknown weights keep theirs."""
    weights, state = dict(weights), {}
    n_embd, head_dim = config_args["n_embd"], config_args["n_embd"] // config_args["n_head"]
    heads = [config_args[key] for key in ("n_head", "n_kv_head", "n_kv_head")]
    for ours, theirs in weight_names(config_args["n_layer"]).items():
        parts = {name: weights.pop(name) for name in theirs if name in weights}
        if len(parts) < len(theirs):
            continue
        for n, (name, part) in zip(heads, parts.items(), strict=False):  # queries, keys, values
            if len(parts) > 1 and part.shape != (n * head_dim, n_embd):
                found, expected = tuple(part.shape), (n * head_dim, n_embd)
                raise UserError(f"{source}: {name} is {found}, but its config implies {expected}")
        state[ours] = torch.cat(list(parts.values())) if len(parts) > 1 else parts[theirs[0]]
    return {**weights, **state}


def export_config(config):
    """Convert our `GPTConfig` to a config (a dict)."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.n_embd,
        "intermediate_size": config.hidden_width,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": config.rope_theta,  # for programs older than transformers 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
        "dtype": "float32",
    }


def export_weights(config, state):
    """Convert our weights to Qwen3's names."""
    weights, heads = {}, (config.n_head, config.kv_heads, config.kv_heads)
    for ours, theirs in weight_names(config.n_layer).items():
        if ours in state:
            rows = [len(state[ours])] if len(theirs) == 1 else [n * config.head_dim for n in heads]
            weights |= zip(theirs, state[ours].split(rows), strict=True)
    return weights


def weight_names(n_layer):
    """{our name: tuple of their names} of each weight."""
    names = {"transformer.wte.weight": ("model.embed_tokens.weight",)}
    for i in range(n_layer):
        for ours, theirs in BLOCK.items():
            parts = tuple(f"model.layers.{i}.{part}.weight" for part in theirs)
            names[f"transformer.h.{i}.{ours}.weight"] = parts
    names["transformer.ln_f.weight"] = ("model.norm.weight",)
    names["lm_head.weight"] = ("lm_head.weight",)
    return names


def weight_shapes(n_layer, n_head, n_kv_head, n_embd, vocab_size, mlp_width, **args):
    """{our name: shape} of each weight, for arguments of `GPTConfig`."""
    C, head_dim, width = n_embd, n_embd // n_head, mlp_width
    block = {
        "ln_1.weight": (C,),
        "attn.c_attn.weight": (C + 2 * n_kv_head * head_dim, C),
        "attn.q_norm.weight": (head_dim,),
        "attn.k_norm.weight": (head_dim,),
        "attn.c_proj.weight": (C, C),
        "ln_2.weight": (C,),
        "mlp.c_gate.weight": (width, C),
        "mlp.c_fc.weight": (width, C),
        "mlp.c_proj.weight": (C, width),
    }
    return {
        "transformer.wte.weight": (vocab_size, C),
        **{f"transformer.h.{i}.{name}": block[name] for i in range(n_layer) for name in block},
        "transformer.ln_f.weight": (C,),
        "lm_head.weight": (vocab_size, C),
    }
