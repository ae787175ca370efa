"""Import and export models in Hugging Face format.

Each supported model family has a file: `brisk/interop/gpt2.py` and `brisk/interop/qwen3.py`.
"""

import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from brisk.errors import UserError, did_you_mean
from brisk.interop import gpt2, qwen3
from brisk.interop.foreign_config import shown
from brisk.interop.tokenizer_json import tokenizer_files
from brisk.interop.weight_files import read_folder, read_json, read_weights

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FAMILIES = (gpt2, qwen3)
WRITER = {"format": "pt", "writer": "briskGPT"}  # metadata by which `is_export` finds our exports


def load_pretrained(name_or_directory):
    """Load GPT-2 from the Hugging Face hub or its local cache, or GPT-2 or Qwen3 from a directory.

    Args:
        name_or_directory: one of `GPT2_NAMES`, or a directory with `config.json` and
            `model.safetensors` or `pytorch_model.bin`, possibly in shards.

    Returns:
        (config_args, state_dict): arguments of `GPTConfig`, and float32 weights under our names. A
        tied weight is under both of its names.

    Raises:
        UserError: neither a known name nor a directory, a failed download, or an architecture that
            our model does not reproduce exactly.
    """
    folder = Path(name_or_directory)
    from_hub = name_or_directory in GPT2_NAMES and not (folder / "config.json").exists()
    if not from_hub and not folder.is_dir():
        known = ", ".join(GPT2_NAMES)
        near = did_you_mean(str(folder), GPT2_NAMES)
        raise UserError(f"{folder} is not a directory or one of {known}{near}")

    def find(file):
        return hub_file(name_or_directory, file) if from_hub else folder / file

    config_args = to_config_args(read_json(find("config.json")), name_or_directory)
    weights = read_weights(find("model.safetensors")) if from_hub else read_folder(folder)
    return config_args, to_state_dict(weights, config_args, name_or_directory)


def to_config_args(theirs, source):
    """Convert a Hugging Face config (a dict) to arguments of `GPTConfig`. Raises `UserError` for an
    invalid or unsupported key."""
    if not isinstance(theirs, dict):
        raise UserError(f"{source}: its config.json is not a model config")
    model_type = theirs.get("model_type")
    for family in FAMILIES:
        if model_type == family.MODEL_TYPE:
            return family.import_config(theirs, source)
    known = " or ".join(family.MODEL_TYPE for family in FAMILIES)
    raise UserError(f"{source}: its config has model_type={shown(model_type)}; expected {known}")


def to_state_dict(weights, config_args, source):
    """Convert weights to our names and check their shapes against the config."""
    family = qwen3 if config_args.get("position") == "rotary" else gpt2
    if config_args["n_layer"] > len(weights):  # a forged config may claim a billion layers
        claim = f"its config has {config_args['n_layer']} layers"
        raise UserError(f"{source}: {claim}, but its files have {len(weights)} weights")
    state = family.import_weights(weights, config_args, source)
    state = {name: weight.float().contiguous() for name, weight in state.items()}
    if config_args["tied"]:
        tied = state.get("transformer.wte.weight")
        if tied is not None and not torch.equal(state.setdefault("lm_head.weight", tied), tied):
            raise UserError(f"{source}: its config ties head and embeddings, but they differ")
        state["lm_head.weight"] = tied
    shapes = family.weight_shapes(**config_args)
    if wrong := sorted(shapes.keys() ^ state.keys()):
        problem = "has no" if wrong[0] in shapes else f"has a weight unknown to {family.NAME}:"
        raise UserError(f"{source} {problem} {wrong[0]} ({len(wrong)} such weights)")
    for name, weight in state.items():
        if weight.shape != shapes[name]:
            found, expected = tuple(weight.shape), tuple(shapes[name])
            raise UserError(f"{source}: {name} is {found}, but its config implies {expected}")
    return state


def to_hugging_face(config, state, vocab_size):
    """Convert our model to a Hugging Face config (a dict) and weights.

    Args:
        config: the model's `GPTConfig`.
        state: its weights under our names.
        vocab_size: rows of the vocabulary to keep; the others are padding.

    Raises `UserError` if neither GPT-2 nor Qwen3 has this architecture.
    """
    family = qwen3 if config.position == "rotary" else gpt2
    computed = family.FIELDS if family is qwen3 else {**family.FIELDS, "n_kv_head": config.n_head}
    found = {**asdict(config), "n_kv_head": config.kv_heads}
    if wrong := [key for key in computed if found[key] != computed[key]]:
        ours, theirs = (", ".join(f"{k}={args[k]}" for k in wrong) for args in (found, computed))
        raise UserError(
            f"other programs cannot run this model: it has {ours} where {family.NAME} has {theirs}"
        )
    config = replace(config, vocab_size=vocab_size)
    rows = ("transformer.wte.weight", "lm_head.weight")
    state = {k: w[:vocab_size] if k in rows else w for k, w in state.items()}
    if config.tied:
        del state["lm_head.weight"]
    weights = family.export_weights(config, state)
    return family.export_config(config), {name: w.contiguous() for name, w in weights.items()}


def directory_files(theirs, tokenizer):
    """Return {name: text} of the files in a Hugging Face directory except the weights.

    Raises `UserError` if the tokenizer cannot be converted exactly.
    """
    block_size = theirs.get("n_positions") or theirs["max_position_embeddings"]
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    # without max_new_tokens, transformers' default would end a text after 20 tokens
    generation = {**ends, "max_length": block_size}
    return {
        **tokenizer_files(tokenizer, block_size),
        "config.json": json.dumps({**theirs, **ends}, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
    }


def write_directory(folder, files, weights):
    """Write the weights that `to_hugging_face` returns, and the `directory_files`, to an empty
    `folder`. Raises `UserError` if writing fails."""
    path = folder / "model.safetensors"
    try:
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n", encoding="utf-8")
        save_file(weights, path, metadata=WRITER)
        shutil.copymode(folder / "config.json", path)  # safetensors creates it with mode 600
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"could not write to {folder}: {reason}") from error
    if saved.keys() != weights.keys() or any(not saved[k].equal(w) for k, w in weights.items()):
        raise UserError(f"{path} differs from what was written; check the disk")


def is_export(folder):
    """Whether `folder` was written by `write_directory` and has no other files."""
    names = {"config.json", "generation_config.json", "model.safetensors"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != names:
        return False
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return file.metadata() == WRITER
    except (OSError, SafetensorError):
        return False


def hub_file(name, file):
    """Path of a file of a hub model in the local cache, downloaded if necessary."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no warnings about retries
    try:
        try:
            return Path(hf_hub_download(name, file, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(name, file))
    except Exception as error:  # each of the hub's transports raises different exceptions
        remedy = "connect to the network, or name a directory with the model's files"
        raise UserError(f"cannot download {file} of {name}; {remedy}") from error
