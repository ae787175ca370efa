"""Qwen3 in Hugging Face's terms: config, weight names and shapes, both ways.

A modern model (config/model/modern.py) is a `Qwen3ForCausalLM`, which has names of its own, and
queries, keys and values in three matrices where ours are one.
"""

import torch

from brisk.errors import UserError
from brisk.interop.foreign_config import check_computed

NAME = "Qwen3"

# The fields of a GPTConfig that a Qwen3 computes with these values only.
FIELDS = {"position": "rotary", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "ngrams": 1}
FIELDS |= {"bias": False}
BLOCK = {  # our name of a weight: theirs, one above another where ours is one matrix
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
    """Arguments of `GPTConfig` for a Qwen3's config (a dict), in which every size stands."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes += ("max_position_embeddings", "vocab_size")
    if missing := [key for key in sizes if key not in theirs]:
        raise UserError(f"{source}: its config does not state {', '.join(missing)}")
    # transformers 5 has one entry for all of the rotary position; before, there were two.
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    rope = {"rope_type": rope.get("type", "default"), **rope}
    n_embd, n_head = theirs["hidden_size"], theirs["num_attention_heads"]
    settings = {**theirs, "rope_type": rope["rope_type"]}
    settings["layer_types"] = sorted(set(theirs.get("layer_types") or ["full_attention"]))
    computed = {
        "head_dim": (128, (n_embd // n_head,)),
        "hidden_act": ("silu", ("silu",)),
        "rms_norm_eps": (1e-6, (1e-6,)),
        "attention_bias": (False, (False,)),
        "use_sliding_window": (False, (False,)),
        "layer_types": (None, (["full_attention"],)),
        "rope_type": ("default", ("default",)),
    }
    check_computed(settings, computed, source)
    return dict(
        block_size=theirs["max_position_embeddings"],
        vocab_size=theirs["vocab_size"],
        n_layer=theirs["num_hidden_layers"],
        n_head=n_head,
        n_kv_head=theirs.get("num_key_value_heads") or n_head,
        n_embd=n_embd,
        mlp_width=theirs["intermediate_size"],
        rope_theta=rope.get("rope_theta", theirs.get("rope_theta", 10000.0)),
        tied=theirs.get("tie_word_embeddings", False),
        **{key: value for key, value in FIELDS.items() if key != "ngrams"},
    )


def import_weights(weights, n_layer):
    """A Qwen3's weights under our names; a name that a Qwen3 of `n_layer` blocks does not have
    stays as it is."""
    weights, state = dict(weights), {}
    for ours, theirs in weight_names(n_layer).items():
        parts = [weights.pop(name) for name in theirs if name in weights]
        if len(parts) == len(theirs):
            state[ours] = torch.cat(parts)
    return {**weights, **state}


def export_config(config):
    """A Qwen3's config (a dict) for our `GPTConfig`."""
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
        "rope_theta": config.rope_theta,  # for what is older than transformers 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
        "dtype": "float32",
    }


def export_weights(config, state):
    """Our weights under a Qwen3's names."""
    weights, heads = {}, (config.n_head, config.kv_heads, config.kv_heads)
    for ours, theirs in weight_names(config.n_layer).items():
        if ours in state:
            rows = [len(state[ours])] if len(theirs) == 1 else [n * config.head_dim for n in heads]
            weights |= zip(theirs, state[ours].split(rows), strict=True)
    return weights


def weight_names(n_layer):
    """Our name of each weight of a Qwen3: their names of its parts."""
    names = {"transformer.wte.weight": ("model.embed_tokens.weight",)}
    for i in range(n_layer):
        for ours, theirs in BLOCK.items():
            parts = tuple(f"model.layers.{i}.{part}.weight" for part in theirs)
            names[f"transformer.h.{i}.{ours}.weight"] = parts
    names["transformer.ln_f.weight"] = ("model.norm.weight",)
    names["lm_head.weight"] = ("lm_head.weight",)
    return names


def weight_shapes(n_layer, n_head, n_kv_head, n_embd, vocab_size, mlp_width, **args):
    """Shape of each weight of a Qwen3, by our names, for arguments of `GPTConfig`."""
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
