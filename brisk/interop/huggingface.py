"""Models in Hugging Face directories, and GPT-2 on its hub: reading their files, and writing them.

How their names and configs become ours is in `brisk/interop/families.py`.
"""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from brisk.checkpoint import is_weight, load_tensors, verify
from brisk.errors import UserError, did_you_mean
from brisk.interop.families import to_config_args, to_state_dict
from brisk.interop.tokenizer_json import tokenizer_files

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WRITER = {"format": "pt", "writer": "briskGPT"}  # tells an export of ours, untouched, from others


def load_pretrained(name_or_directory):
    """GPT-2 from the Hugging Face hub (or its cache on this machine), or GPT-2 or Qwen3 from a
    directory.

    Args:
        name_or_directory: one of `GPT2_NAMES`, or a directory with `config.json` and
            `model.safetensors` (in shards too) or `pytorch_model.bin`.

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

    theirs = read_json(find("config.json"))
    try:
        config_args = to_config_args(theirs, name_or_directory)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder / 'config.json'} is no config of a model: {error}") from error
    index = folder / "model.safetensors.index.json"
    if not from_hub and index.exists():
        shards = shards_in(index)
        weights = {k: w for shard in shards for k, w in read_weights(find(shard)).items()}
    elif not from_hub and not (folder / "model.safetensors").exists():
        weights = read_weights(find("pytorch_model.bin"))
    else:
        weights = read_weights(find("model.safetensors"))
    try:
        return config_args, to_state_dict(weights, config_args, name_or_directory)
    except (TypeError, ValueError) as error:  # sizes that are no integers
        raise UserError(f"{folder / 'config.json'} is no config of a model: {error}") from error


def shards_in(index):
    """The names of the files that an index of weights lists; they lie beside it."""
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
        strays = [name for name in shards if Path(name).name != name]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weights ({error!r})") from error
    if strays:
        raise UserError(f"{index} names a file outside its folder: {strays[0]}")
    return shards


def write_directory(folder, theirs, weights, tokenizer):
    """Write a model, as `to_hugging_face` returns it, and its tokenizer to an empty `folder`.

    Raises `UserError` where the tokenizer cannot be written exactly, or the disk does not take it.
    """
    block_size = theirs.get("n_positions") or theirs["max_position_embeddings"]
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    # A text ends where the context does, unless the caller says how many tokens it wants.
    generation = {**ends, "max_length": block_size}
    contents = {
        **tokenizer_files(tokenizer, block_size),
        "config.json": json.dumps({**theirs, **ends}, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
    }
    path = folder / "model.safetensors"
    try:
        for name, text in contents.items():
            (folder / name).write_text(f"{text}\n", encoding="utf-8")
        save_file(weights, path, metadata=WRITER)
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


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def read_weights(path):
    """The tensors in one file, by name."""
    try:
        if path.suffix == ".bin":
            if zipfile.is_zipfile(path):  # PyTorch's format since 1.6; before, it had no checksum
                verify(path)
            weights = load_tensors(path)
        else:
            weights = load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise any error there is
        raise UserError(f"{path} is damaged or holds something other than weights") from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"{path} holds something other than weights by name")
    is_mask = (".attn.bias", ".attn.masked_bias")  # of GPT-2, often as bytes
    if odd := [k for k, w in weights.items() if not k.endswith(is_mask) and not is_weight(w)]:
        raise UserError(f"{path}: {odd[0]} is no weight")
    return weights


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
