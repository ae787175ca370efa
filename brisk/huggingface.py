"""GPT-2 as Hugging Face stores it: its weight names, shapes and config, in terms of ours.

Our weight names are those of `GPT2LMHeadModel`, which nanoGPT took over. Two things differ: the
files of the hub leave the prefix `transformer.` out, and their linear layers ("Conv1D") hold the
weight as (inputs, outputs) where `nn.Linear` holds (outputs, inputs).
"""

import json
import logging
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from brisk.errors import UserError, nearest

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GELUS = {  # their name of an activation: our GPTConfig.gelu
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "none",
}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_gpt2(name_or_directory):
    """GPT-2 from the Hugging Face hub (or its cache on this machine), or from a directory.

    Args:
        name_or_directory: one of `GPT2_NAMES`, or a directory with `config.json` and
            `model.safetensors` (in shards too) or `pytorch_model.bin`.

    Returns:
        (config_args, state_dict): arguments of `GPTConfig`, and float32 weights under our names,
        the tied one under both of its own.

    Raises:
        UserError: neither a name nor a directory, nothing to be had from the hub, or a network
            that our model does not compute exactly.
    """
    folder = Path(name_or_directory)
    from_hub = name_or_directory in GPT2_NAMES and not (folder / "config.json").exists()
    if not from_hub and not folder.is_dir():
        known = ", ".join(GPT2_NAMES)
        near = nearest(str(folder), GPT2_NAMES)
        raise UserError(f"{folder} is no directory and none of {known}{near}")

    def find(file):
        return hub_file(name_or_directory, file) if from_hub else folder / file

    config_args = to_config_args(read_json(find("config.json")), name_or_directory)
    index = folder / "model.safetensors.index.json"
    if not from_hub and index.exists():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        weights = {k: w for shard in shards for k, w in read_weights(find(shard)).items()}
    elif not from_hub and not (folder / "model.safetensors").exists():
        weights = read_weights(find("pytorch_model.bin"))
    else:
        weights = read_weights(find("model.safetensors"))
    return config_args, to_state_dict(weights, config_args, name_or_directory)


def to_config_args(theirs, source):
    """Arguments of `GPTConfig` for their config (a dict), or a `UserError` that names what in it
    our model does not compute."""
    n_embd = theirs.get("n_embd", 768)
    computed = {  # their setting: (what it is where they leave it out, the values we compute)
        "model_type": (None, ("gpt2",)),
        "activation_function": ("gelu_new", tuple(GELUS)),
        "layer_norm_epsilon": (1e-5, (1e-5,)),
        "n_inner": (None, (None, 4 * n_embd)),
        "scale_attn_weights": (True, (True,)),
        "scale_attn_by_inverse_layer_idx": (False, (False,)),
        "add_cross_attention": (False, (False,)),
        "tie_word_embeddings": (True, (True,)),
    }
    for key, (default, values) in computed.items():
        if (value := theirs.get(key, default)) not in values:
            wanted = " or ".join(str(value) for value in values)
            raise UserError(f"{source}: its config says {key}={value}, this model has {wanted}")
    return dict(
        block_size=theirs.get("n_positions", 1024),
        vocab_size=theirs.get("vocab_size", 50257),
        n_layer=theirs.get("n_layer", 12),
        n_head=theirs.get("n_head", 12),
        n_embd=n_embd,
        bias=True,
        gelu=GELUS[theirs.get("activation_function", "gelu_new")],
    )


def to_state_dict(weights, config_args, source):
    """Their weights under our names, checked against the shapes that the config asks for."""
    shapes = weight_shapes(**config_args)
    state = {}
    for name, weight in weights.items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks, not weights
            state[name] = turned(name, weight).float().contiguous()
    tied = state.get("transformer.wte.weight")
    if tied is not None and not torch.equal(state.setdefault("lm_head.weight", tied), tied):
        raise UserError(f"{source}: its head is not tied to its embeddings, this model's is")
    state["lm_head.weight"] = tied
    if odd := sorted(shapes.keys() ^ state.keys()):
        what = "has no" if odd[0] in shapes else "has a weight unknown to GPT-2,"
        raise UserError(f"{source} {what} {odd[0]} ({len(odd)} such weights)")
    for name, weight in state.items():
        if weight.shape != shapes[name]:
            found, wanted = tuple(weight.shape), tuple(shapes[name])
            raise UserError(f"{source}: {name} is {found}, its config asks for {wanted}")
    return state


def turned(name, weight):
    """`weight` as the other side stores it: a linear layer's transposed. Its own inverse."""
    return weight.t() if name.endswith(CONV1D) else weight


def weight_shapes(n_layer, n_embd, vocab_size, block_size, **_):
    """Name and shape of each weight of a GPT-2 with biases, in our names and shapes."""
    C = n_embd
    block = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }
    return {
        "transformer.wte.weight": (vocab_size, C),
        "transformer.wpe.weight": (block_size, C),
        **{f"transformer.h.{i}.{name}": block[name] for i in range(n_layer) for name in block},
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
        "lm_head.weight": (vocab_size, C),
    }


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def read_weights(path):
    """The tensors in one file, by name."""
    damage = (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError)
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except damage as error:
        raise UserError(f"{path} is damaged or holds something other than weights") from error


def hub_file(name, file):
    """Path of a hub model's file in the local cache, downloaded if it is not there yet."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; told in one line
    try:
        try:
            return Path(hf_hub_download(name, file, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(name, file))
    except Exception as error:  # each of the hub's transports has errors of its own
        mend = "connect to the network, or name a directory that holds the model's files"
        raise UserError(f"{file} of {name} is not on this machine nor to be had: {mend}") from error
