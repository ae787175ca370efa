"""Read weight files of the Hugging Face hub: safetensors or PyTorch format, single or sharded."""

import json
import zipfile
from pathlib import Path

from safetensors.torch import load_file

from brisk.checkpoint import is_weight, load_tensors, verify
from brisk.errors import UserError

NAMES = ("model.safetensors", "pytorch_model.bin")  # if both exist, transformers takes the first


def read_folder(folder):
    """Return {name: tensor} of the model in a directory, from the file that transformers takes:
    safetensors before PyTorch format, a single file before shards."""
    for name in NAMES:
        if (folder / name).exists():
            return read_weights(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            shards = [read_weights(folder / shard) for shard in shards_in(index)]
            return {name: weight for shard in shards for name, weight in shard.items()}
    raise UserError(f"{folder} has no weights: neither {' nor '.join(NAMES)}, single or sharded")


def shards_in(index):
    """The names of the files listed in a weight index, all in its folder."""
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
        strays = [name for name in shards if Path(name).name != name]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a weight index ({error!r})") from error
    if strays:
        raise UserError(f"{index} names a file outside its folder: {strays[0]}")
    return shards


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def read_weights(path):
    """Return {name: tensor} of one file."""
    try:
        if path.suffix == ".bin":
            if zipfile.is_zipfile(path):  # the format since PyTorch 1.6; older ones lack checksums
                verify(path)
            weights = load_tensors(path)
        else:
            weights = load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{path} is damaged, or has something other than weights") from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"{path} is not a dict of weights")
    masks = (".attn.bias", ".attn.masked_bias")  # buffers of GPT-2, often uint8
    if invalid := [k for k, w in weights.items() if not k.endswith(masks) and not is_weight(w)]:
        raise UserError(f"{path}: {invalid[0]} is not a weight")
    return weights
