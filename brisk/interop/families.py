"""GPT-2 and Qwen3, the families by which others know our models: weight names, shapes and configs
as Hugging Face has them, in terms of ours, both ways.

A classic model is a `GPT2LMHeadModel`, whose weight names ours are (nanoGPT took them over). Two
things differ: the files of the hub leave the prefix `transformer.` out, and their linear layers
("Conv1D") hold the weight as (inputs, outputs) where `nn.Linear` holds (outputs, inputs). A modern
model is a `Qwen3ForCausalLM`, which has names of its own, and queries, keys and values apart.
"""

from dataclasses import asdict, replace

import torch

from brisk.errors import UserError

GELUS = {  # their name of an activation: our GPTConfig.gelu
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "none",
}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# What a GPTConfig has to be for theirs to compute the same; the rest of its fields is free.
CLASSIC = {"position": "learned", "norm": "layer", "qk_norm": False, "mlp": "gelu", "ngrams": 1}
MODERN = {"position": "rotary", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "ngrams": 1}
MODERN |= {"bias": False}
QWEN3_BLOCK = {  # our name of a weight: theirs, one above another where ours is one matrix
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


def to_config_args(theirs, source):
    """Arguments of `GPTConfig` for their config (a dict), or a `UserError` that names what in it
    our model does not compute."""
    is_qwen3 = theirs.get("model_type") == "qwen3"
    args = (qwen3_config_args if is_qwen3 else gpt2_config_args)(theirs, source)
    for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mlp_width"):
        least = 0 if key == "mlp_width" else 1
        if type(args[key]) is not int or args[key] < least:
            raise UserError(f"{source}: its config makes {key} {args[key]!r}")
    return args


def gpt2_config_args(theirs, source):
    n_embd = theirs.get("n_embd", 768)
    computed = {  # their setting: (what it is where they leave it out, the values we compute)
        "model_type": (None, ("gpt2", "qwen3")),
        "activation_function": ("gelu_new", tuple(GELUS)),
        "layer_norm_epsilon": (1e-5, (1e-5,)),
        "scale_attn_weights": (True, (True,)),
        "scale_attn_by_inverse_layer_idx": (False, (False,)),
        "add_cross_attention": (False, (False,)),
    }
    check_computed(theirs, computed, source)
    width = theirs.get("n_inner") or 4 * n_embd
    return dict(
        block_size=theirs.get("n_positions", 1024),
        vocab_size=theirs.get("vocab_size", 50257),
        n_layer=theirs.get("n_layer", 12),
        n_head=theirs.get("n_head", 12),
        n_embd=n_embd,
        bias=True,
        gelu=GELUS[theirs.get("activation_function", "gelu_new")],
        mlp_width=0 if width == 4 * n_embd else width,
        tied=theirs.get("tie_word_embeddings", True),
    )


def qwen3_config_args(theirs, source):
    """`to_config_args` of a Qwen3. Its sizes stand in every config."""
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
        **{key: value for key, value in MODERN.items() if key != "ngrams"},
    )


def check_computed(theirs, computed, source):
    """Raise `UserError` where a setting of theirs is not among those that we compute."""
    for key, (default, values) in computed.items():
        if (value := theirs.get(key, default)) not in values:
            wanted = " or ".join(str(value) for value in values)
            raise UserError(f"{source}: its config says {key}={value}, this model has {wanted}")


def to_state_dict(weights, config_args, source):
    """Their weights under our names, checked against the shapes that the config asks for."""
    is_modern = config_args.get("position") == "rotary"
    family = "Qwen3" if is_modern else "GPT-2"
    if config_args["n_layer"] > len(weights):  # before a claim of a billion is believed
        claim = f"its config says {config_args['n_layer']} layers"
        raise UserError(f"{source}: {claim}, its files have {len(weights)} weights")
    state = from_qwen3(weights, config_args["n_layer"]) if is_modern else from_gpt2(weights)
    state = {name: weight.float().contiguous() for name, weight in state.items()}
    if config_args["tied"]:
        tied = state.get("transformer.wte.weight")
        if tied is not None and not torch.equal(state.setdefault("lm_head.weight", tied), tied):
            raise UserError(f"{source}: its head is not tied to its embeddings, this model's is")
        state["lm_head.weight"] = tied
    shapes = weight_shapes(**config_args)
    if odd := sorted(shapes.keys() ^ state.keys()):
        what = "has no" if odd[0] in shapes else f"has a weight unknown to {family},"
        raise UserError(f"{source} {what} {odd[0]} ({len(odd)} such weights)")
    for name, weight in state.items():
        if weight.shape != shapes[name]:
            found, wanted = tuple(weight.shape), tuple(shapes[name])
            raise UserError(f"{source}: {name} is {found}, its config asks for {wanted}")
    return state


def from_gpt2(weights):
    state = {}
    for name, weight in weights.items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks, not weights
            state[name] = turned(name, weight)
    return state


def from_qwen3(weights, n_layer):
    """Ours of theirs; a name that a Qwen3 of so many layers does not have stays as it is."""
    weights, state = dict(weights), {}
    for ours, theirs in qwen3_names(n_layer).items():
        parts = [weights.pop(name) for name in theirs if name in weights]
        if len(parts) == len(theirs):
            state[ours] = torch.cat(parts)
    return {**weights, **state}


def qwen3_names(n_layer):
    """Our name of each weight of a Qwen3: their names of its parts."""
    names = {"transformer.wte.weight": ("model.embed_tokens.weight",)}
    for i in range(n_layer):
        for ours, theirs in QWEN3_BLOCK.items():
            parts = tuple(f"model.layers.{i}.{part}.weight" for part in theirs)
            names[f"transformer.h.{i}.{ours}.weight"] = parts
    names["transformer.ln_f.weight"] = ("model.norm.weight",)
    names["lm_head.weight"] = ("lm_head.weight",)
    return names


def turned(name, weight):
    """`weight` as the other side stores it: a linear layer's transposed. Its own inverse."""
    return weight.t() if name.endswith(CONV1D) else weight


def to_hugging_face(config, state, vocab_size):
    """Their config (a dict) and weights for our model; the inverse of the way in.

    Args:
        config: the model's `GPTConfig`.
        state: its weights under our names.
        vocab_size: rows of the vocabulary that are kept; those beyond only pad it.

    Raises `UserError` that names the fields of a model which neither GPT-2 nor Qwen3 computes.
    """
    is_modern = config.position == "rotary"
    family = "Qwen3" if is_modern else "GPT-2"
    computed = MODERN if is_modern else {**CLASSIC, "n_kv_head": config.n_head}
    found = {**asdict(config), "n_kv_head": config.kv_heads}
    if odd := [key for key in computed if found[key] != computed[key]]:
        ours, wanted = (", ".join(f"{k}={args[k]}" for k in odd) for args in (found, computed))
        raise UserError(
            f"other programs cannot run this model: it has {ours} where {family} has {wanted}"
        )
    config = replace(config, vocab_size=vocab_size)
    rows = ("transformer.wte.weight", "lm_head.weight")
    state = {k: w[:vocab_size] if k in rows else w for k, w in state.items()}
    if config.tied:
        del state["lm_head.weight"]
    weights = to_qwen3(config, state) if is_modern else to_gpt2(config, state)
    theirs = qwen3_config(config) if is_modern else gpt2_config(config)
    return theirs, {name: weight.contiguous() for name, weight in weights.items()}


def to_gpt2(config, state):
    """GPT-2's weights; biases that the model does not have are zero there."""
    weights = {}
    for name, shape in weight_shapes(**asdict(config)).items():
        if name in state:
            weights[name] = turned(name, state[name])
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
    return weights


def gpt2_config(config):
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


def to_qwen3(config, state):
    weights, heads = {}, (config.n_head, config.kv_heads, config.kv_heads)
    for ours, theirs in qwen3_names(config.n_layer).items():
        if ours in state:
            rows = [len(state[ours])] if len(theirs) == 1 else [n * config.head_dim for n in heads]
            weights |= zip(theirs, state[ours].split(rows), strict=True)
    return weights


def qwen3_config(config):
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


def weight_shapes(n_layer, n_embd, vocab_size, block_size, n_head, position="learned", **args):
    """Name and shape of each weight of a GPT-2 with biases, or with `position` "rotary" of a Qwen3,
    in our names and shapes."""
    C, width = n_embd, args.get("mlp_width") or 4 * n_embd
    kv = C // n_head * (args.get("n_kv_head") or n_head)
    block = {
        "ln_1.weight": (C,),
        "attn.c_attn.weight": (C + 2 * kv, C),
        "attn.c_proj.weight": (C, C),
        "ln_2.weight": (C,),
        "mlp.c_fc.weight": (width, C),
        "mlp.c_proj.weight": (C, width),
    }
    last = {"transformer.ln_f.weight": (C,)}
    if position == "rotary":
        block |= {f"attn.{name}_norm.weight": (C // n_head,) for name in "qk"}
        block["mlp.c_gate.weight"] = (width, C)
        embeddings = {}
    else:  # a bias for each row, or channel
        block |= {k.replace("weight", "bias"): shape[:1] for k, shape in block.items()}
        last["transformer.ln_f.bias"] = (C,)
        embeddings = {"transformer.wpe.weight": (block_size, C)}
    return {
        "transformer.wte.weight": (vocab_size, C),
        **embeddings,
        **{f"transformer.h.{i}.{name}": block[name] for i in range(n_layer) for name in block},
        **last,
        "lm_head.weight": (vocab_size, C),
    }
