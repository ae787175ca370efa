"""Checkpoints: dicts of tensors and plain values, saved so that a whole one is always there.

A checkpoint is nanoGPT's dict (`model`, `optimizer`, `model_args`, `iter_num`, `best_val_loss`,
`config`) and, beside those keys, what resuming to the bit and sampling elsewhere need. In a run's
folder `ckpt.pt` is the best so far (or the latest, with `always_save_checkpoint`) and `last.pt`
the newest; where both are the same, one is a hard link to the other.

`torch.save` writes a zip archive that holds a CRC-32 of every record, but `torch.load` does not
look at them. Here they are checked after every save and before every load.
"""

import os
import shutil
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch

from brisk.errors import UserError, format_bytes, one_line

PARTS = {  # what loading relies on, where it is there
    "optimizer": (dict,),
    "config": (dict,),
    "scaler": (dict,),
    "iter_num": (int,),
    "position": (int,),
    "evals_since_best": (int,),
    "precision": (tuple,),  # of version 0.1
    "given": (tuple, list),
    "resolved": (dict,),
    "data": (dict,),
    "best_val_loss": (float, torch.Tensor),
}
INNER = {  # and what in these dicts
    "resolved": {
        "device": (str,),
        "dtype": (str,),
        "compile": (bool,),
        "last_step": (int,),
        "decay_steps": (int,),
        "basis": (list,),
    },
    "data": {"tokens": (int,), "sha256": (str, type(None))},
}
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def save_checkpoint(checkpoint, path, also=()):
    """Write `checkpoint` (a dict) to `path`; whatever happens, `path` is the old file or the new.

    Its folder is made if it is not there. `also` are further names of the new file, made in this
    order and before `path`: a process killed between two of them loses none if those that a run
    may be resumed from come last, since it goes on from whichever is further.

    Raises `UserError` where it cannot be written; the old file is then untouched.
    """
    path = Path(path)
    writing = path.with_name(f"{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(writing, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        verify(writing)
        for name in also:
            link_checkpoint(writing, name)
        os.replace(writing, path)
        sync_directory(path.parent)
    except (OSError, RuntimeError, UserError) as error:
        with suppress(OSError):
            writing.unlink(missing_ok=True)
        reason = f"{reason_of(error)} ({room_for(checkpoint, path.parent)})"
        raise UserError(
            f"could not save {path}: {reason}; what was there before is kept"
        ) from error


def reason_of(error):
    """Why a write failed: torch hides the system's reason in an error of its own."""
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return getattr(cause, "strerror", None) or str(error).splitlines()[0]


def room_for(checkpoint, folder):
    """The bytes that `checkpoint` takes beside an older one, and those that are free, in words."""
    needed = f"it needs about {format_bytes(sum(storages(checkpoint).values()))}"
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{needed}, {format_bytes(shutil.disk_usage(folder).free)} are free"
    except OSError:
        return needed


def storages(value):
    """{address: bytes} of the memory behind the tensors of a dict of dicts."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    parts = value.values() if isinstance(value, dict) else ()
    return {address: size for part in parts for address, size in storages(part).items()}


def link_checkpoint(path, name):
    """Make `name` another name of the checkpoint at `path`, a copy where links are not possible."""
    path, name = Path(path), Path(name)
    writing = name.with_name(f"{name.name}.writing")
    writing.unlink(missing_ok=True)
    try:
        os.link(path, writing)
    except OSError:
        try:
            shutil.copyfile(path, writing)
        except OSError:
            writing.unlink(missing_ok=True)
            raise
    os.replace(writing, name)
    sync_directory(name.parent)


def load_checkpoint(path):
    """The checkpoint at `path` with its tensors on the CPU and its weight names made clean.

    nanoGPT's files are read too: `_orig_mod.` (compiled) and the mask buffers of old versions are
    dropped, and a tied weight is there under both its names.

    Raises `UserError` for a file that is missing, damaged or no checkpoint.
    """
    verify(path)
    checkpoint = read(path)
    state = {name.removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()}
    state = {name: w for name, w in state.items() if not name.endswith(".attn.bias")}
    if checkpoint["model_args"].get("tied", True):
        tied = state.get("lm_head.weight", state.get("transformer.wte.weight"))
        state["lm_head.weight"] = state["transformer.wte.weight"] = tied
    if odd := [name for name, weight in state.items() if not is_weight(weight)]:
        raise UserError(f"{path} cannot be loaded: {odd[0]} is no weight")
    checkpoint["model"] = state
    return checkpoint


def read(path, mmap=False):
    """The dict in the file at `path`, its keys checked; with `mmap` no tensor is read yet."""
    try:
        checkpoint = load_tensors(path, mmap)
    except Exception as error:  # a damaged pickle can raise any error there is
        reason = "it holds something other than tensors and plain values, or is damaged"
        raise UserError(f"{path} cannot be loaded: {reason}") from error
    parts = [checkpoint.get(key) for key in ("model", "model_args")] if is_dict(checkpoint) else []
    if not parts or not all(map(is_dict, parts)):
        raise UserError(f"{path} is not a checkpoint of briskGPT or nanoGPT: no model in it")
    if missing := [key for key in MODEL_ARGS if key not in checkpoint["model_args"]]:
        raise UserError(f"{path} is not a GPT checkpoint: it does not state {', '.join(missing)}")
    if odd := invalid_entries(checkpoint):
        raise UserError(f"{path} cannot be loaded: {', '.join(odd)} in it cannot be right")
    return checkpoint


def load_tensors(path, mmap=False):
    """What `torch.save` wrote to `path`, if it is tensors and plain values: no code in it runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd pickles: what comes of them is told in one line
        try:
            str(path).encode()
        except UnicodeEncodeError:  # PyTorch opens no path that is not UTF-8
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def invalid_entries(checkpoint):
    """Names of what is not of the kind, or in the bounds, that loading relies on."""
    odd = [key for key in PARTS if not isinstance(checkpoint.get(key, PARTS[key][0]()), PARTS[key])]
    if odd:
        return odd
    config, sizes = checkpoint.get("config", {}), checkpoint["model_args"]
    counts = {key: checkpoint.get(key, 0) for key in ("iter_num", "position", "evals_since_best")}
    best = torch.as_tensor(checkpoint.get("best_val_loss", 0.0))
    odd = [key for key, number in counts.items() if not 0 <= number < 2**63]
    odd += [key for key in SIZES if not isinstance(sizes[key], int)]
    odd += [name for name, kinds in INNER.items() if not holds(checkpoint.get(name), kinds)]
    odd += ["given"] * any(not isinstance(key, str) for key in checkpoint.get("given", ()))
    odd += [key for key in ("dataset", "data_dir") if not isinstance(config.get(key, ""), str)]
    odd += [repr(name) for name in (*checkpoint["model"], *config) if not isinstance(name, str)]
    return odd + ["best_val_loss"] * (best.numel() != 1 or best.is_meta)


def holds(values, kinds):
    """Whether a dict, if it is there, has an entry for each key of `kinds`, of one of its types;
    whole numbers are such as can be counted with, and lists hold plain values."""
    if values is None:
        return True
    numbers = [value for value in values.values() if type(value) is int]
    plain = [part for value in values.values() if type(value) is list for part in value]
    return (
        all(type(values.get(key, kinds)) in types for key, types in kinds.items())
        and all(abs(number) < 2**63 for number in numbers)
        and all(type(part) in (int, float, str) for part in plain)
    )


def is_dict(value):
    return isinstance(value, dict)


def is_weight(value):
    """Whether it is a tensor of numbers that are all in the file: no view that repeats a few of
    them without end, none without any (PyTorch's meta tensors)."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    if value.layout is not torch.strided or value.is_meta:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def verify(path):
    """Raise `UserError` unless the file at `path` is whole, by the checksum of every record."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(f.file_size for f in archive.infolist()) > os.path.getsize(path):
                raise zipfile.BadZipFile("its records are more than itself")  # overlap, or unpack
            # torch leaves both fields 0; set, they change how its reader takes a record
            odd = [f.filename for f in archive.infolist() if f.flag_bits & 1 or f.external_attr]
            damaged = odd[0] if odd else archive.testzip()
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged, or no checkpoint at all: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} does not match")


def best_checkpoint(out_dir):
    """Path of the checkpoint to sample from or evaluate: `ckpt.pt`, else `last.pt`."""
    for name in ("ckpt.pt", "last.pt"):
        if (path := Path(out_dir, name)).exists():
            return path
    raise UserError(f"no checkpoint in {out_dir}; train first, or name the run with --out_dir")


def latest_checkpoint(out_dir):
    """Path of the checkpoint to resume from: of `last.pt` and `ckpt.pt` whichever is further.

    A damaged one is passed over with a notice, as long as the other is whole.
    """
    best_checkpoint(out_dir)  # or its error
    found, errors = [], []
    for name in ("last.pt", "ckpt.pt"):
        path = Path(out_dir, name)
        linked = found and path.exists() and path.samefile(found[0][1])  # one file, read once
        if path.exists() and not linked:
            try:
                verify(path)
                found.append((int(read(path, mmap=True).get("iter_num", 0)), path))
            except UserError as error:
                errors.append(error)
    if not found:
        raise errors[0]
    for error in errors:
        print(f"note: {one_line(str(error))}; using {found[0][1]}")
    return max(found, key=lambda item: item[0])[1]


def remove_partial(out_dir):
    """Remove what a killed process was writing: it may be large, and nobody will read it."""
    for path in Path(out_dir).glob("*.pt.writing"):
        path.unlink(missing_ok=True)


def archive_previous_run(out_dir, names):
    """Move an earlier run's files out of the way, to `earlier/` (or `earlier-2/`, …) in `out_dir`.

    `names` may be patterns. Returns the folder they went to, None where there was nothing to move.
    """
    files = [path for name in names for path in sorted(Path(out_dir).glob(name))]
    if not files:
        return None
    number, folder = 1, Path(out_dir, "earlier")
    while folder.exists():
        number += 1
        folder = Path(out_dir, f"earlier-{number}")
    folder.mkdir()
    for path in files:
        os.replace(path, folder / path.name)
    return folder


def sync_directory(folder):
    """Make a rename in `folder` durable, where the system lets a directory be flushed."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
