"""Models in Hugging Face directories, and GPT-2 on its hub: reading them, and writing them.

The families are `brisk/interop/gpt2.py` and `brisk/interop/qwen3.py`; files of weights are read in
`brisk/interop/weight_files.py`.
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
WRITER = {"format": "pt", "writer": "briskGPT"}  # tells an export of ours, untouched, from others


def load_pretrained(name_or_directory):
    """GPT-2 from the Hugging Face hub (or its cache on this machine), or GPT-2 or Qwen3 from a
    directory.

    Args:
        name_or_directory: one of `GPT2_NAMES`, or a directory with `config.json` and
            `model.safetensors` or `pytorch_model.bin`, in shards too.

    Returns:
        (config_args, state_dict): arguments of `GPTConfig`, and float32 weights under our names,
        a tied one under both of its own.

    Raises:
        UserError: neither a name nor a directory, nothing to be had from the hub, or a network
            that our model does not compute exactly.
    """
    folder = Path(name_or_directory)
    from_hub = name_or_directory in GPT2_NAMES and not (folder / "config.json").exists()
    if not from_hub and not folder.is_dir():
        known = ", ".join(GPT2_NAMES)
        near = did_you_mean(str(folder), GPT2_NAMES)
        raise UserError(f"{folder} is no directory and none of {known}{near}")

    def find(file):
        return hub_file(name_or_directory, file) if from_hub else folder / file

    config_args = to_config_args(read_json(find("config.json")), name_or_directory)
    weights = read_weights(find("model.safetensors")) if from_hub else read_folder(folder)
    return config_args, to_state_dict(weights, config_args, name_or_directory)


def to_config_args(theirs, source):
    """Arguments of `GPTConfig` for their config (a dict). Raises `UserError` that names the key
    which is invalid or which our model does not compute."""
    if not isinstance(theirs, dict):
        raise UserError(f"{source}: its config.json holds no config of a model")
    model_type = theirs.get("model_type")
    for family in FAMILIES:
        if model_type == family.MODEL_TYPE:
            return family.import_config(theirs, source)
    known = " or ".join(family.MODEL_TYPE for family in FAMILIES)
    raise UserError(f"{source}: its config says model_type={shown(model_type)}, wanted: {known}")


def to_state_dict(weights, config_args, source):
    """Their weights under our names, checked against the shapes that the config asks for."""
    family = qwen3 if config_args.get("position") == "rotary" else gpt2
    if config_args["n_layer"] > len(weights):  # before a claim of a billion is believed
        claim = f"its config says {config_args['n_layer']} layers"
        raise UserError(f"{source}: {claim}, its files have {len(weights)} weights")
    state = family.import_weights(weights, config_args, source)
    state = {name: weight.float().contiguous() for name, weight in state.items()}
    if config_args["tied"]:
        tied = state.get("transformer.wte.weight")
        if tied is not None and not torch.equal(state.setdefault("lm_head.weight", tied), tied):
            raise UserError(f"{source}: its head is not tied to its embeddings, this model's is")
        state["lm_head.weight"] = tied
    shapes = family.weight_shapes(**config_args)
    if odd := sorted(shapes.keys() ^ state.keys()):
        what = "has no" if odd[0] in shapes else f"has a weight unknown to {family.NAME},"
        raise UserError(f"{source} {what} {odd[0]} ({len(odd)} such weights)")
    for name, weight in state.items():
        if weight.shape != shapes[name]:
            found, wanted = tuple(weight.shape), tuple(shapes[name])
            raise UserError(f"{source}: {name} is {found}, its config asks for {wanted}")
    return state


def to_hugging_face(config, state, vocab_size):
    """Their config (a dict) and weights for our model; the inverse of the way in.

    Args:
        config: the model's `GPTConfig`.
        state: its weights under our names.
        vocab_size: rows of the vocabulary that are kept; those beyond only pad it.

    Raises `UserError` that names the fields of a model which neither GPT-2 nor Qwen3 computes.
    """
    family = qwen3 if config.position == "rotary" else gpt2
    computed = family.FIELDS if family is qwen3 else {**family.FIELDS, "n_kv_head": config.n_head}
    found = {**asdict(config), "n_kv_head": config.kv_heads}
    if odd := [key for key in computed if found[key] != computed[key]]:
        ours, wanted = (", ".join(f"{k}={args[k]}" for k in odd) for args in (found, computed))
        raise UserError(
            f"other programs cannot run this model: it has {ours} where {family.NAME} has {wanted}"
        )
    config = replace(config, vocab_size=vocab_size)
    rows = ("transformer.wte.weight", "lm_head.weight")
    state = {k: w[:vocab_size] if k in rows else w for k, w in state.items()}
    if config.tied:
        del state["lm_head.weight"]
    weights = family.export_weights(config, state)
    return family.export_config(config), {name: w.contiguous() for name, w in weights.items()}


def directory_files(theirs, tokenizer):
    """The contents (text), by name, of the files of a directory beside the weights.

    Raises `UserError` where the tokenizer cannot be written exactly.
    """
    block_size = theirs.get("n_positions") or theirs["max_position_embeddings"]
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    # A text ends where the context does, unless the caller says how many tokens it wants.
    generation = {**ends, "max_length": block_size}
    return {
        **tokenizer_files(tokenizer, block_size),
        "config.json": json.dumps({**theirs, **ends}, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
    }


def write_directory(folder, files, weights):
    """Write a model's weights, as `to_hugging_face` returns them, and its `directory_files` to an
    empty `folder`. Raises `UserError` where the disk does not take it."""
    path = folder / "model.safetensors"
    try:
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n", encoding="utf-8")
        save_file(weights, path, metadata=WRITER)
        shutil.copymode(folder / "config.json", path)  # safetensors lets nobody else read it
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"could not write to {folder}: {reason}") from error
    if saved.keys() != weights.keys() or any(not saved[k].equal(w) for k, w in weights.items()):
        raise UserError(f"{path} reads back otherwise than it was written; is the disk in order?")


def is_export(folder):
    """Whether `folder` is what `write_directory` wrote, nothing else in it."""
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
        remedy = "connect to the network, or name a directory that holds the model's files"
        raise UserError(
            f"{file} of {name} is not on this machine nor to be had: {remedy}"
        ) from error
