"""Files of weights as the Hugging Face hub has them: safetensors, PyTorch's, whole or in shards."""

import json
import zipfile
from pathlib import Path

from safetensors.torch import load_file

from brisk.checkpoint import is_weight, load_tensors, verify
from brisk.errors import UserError

NAMES = ("model.safetensors", "pytorch_model.bin")  # where both are, transformers takes the first


def read_folder(folder):
    """The tensors, by name, of the model in a directory: from the file that transformers takes.
    A file comes before its index of shards, safetensors before PyTorch's format."""
    for name in NAMES:
        if (folder / name).exists():
            return read_weights(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            shards = [read_weights(folder / shard) for shard in shards_in(index)]
            return {name: weight for shard in shards for name, weight in shard.items()}
    raise UserError(f"{folder} has neither {' nor '.join(NAMES)}, whole or in shards")


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
