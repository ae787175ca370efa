"""The checkpoint file: atomic saves, loads verified by checksum.

A checkpoint is nanoGPT's dict (`model`, `optimizer`, `model_args`, `iter_num`, `best_val_loss`,
`config`) with further keys for bit-exact resume and for sampling on another machine. In a run's
folder `ckpt.pt` is the best checkpoint (or the newest, with `always_save_checkpoint`) and `last.pt`
the newest; if they are the same, one is a hard link to the other.

`torch.save` writes a zip archive with a CRC-32 of every record, which `torch.load` does not check.
Here the checksums are verified after every save and before every load.
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

ENTRY_TYPES = {  # types of optional entries
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
NESTED_TYPES = {  # types of the required keys inside these entries
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
    """Write the dict `checkpoint` to `path` atomically: after a crash, `path` is the old file or
    the new one. Creates the folder if necessary.

    `also` lists further names to link to the new file, in this order, before `path`. Put names that
    a run can resume from last: a resume takes the one with the highest step, so a process killed
    between two links loses nothing.

    Raises `UserError` if the file cannot be written; the old file is then unchanged.
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
        raise UserError(f"could not save {path}: {reason}; the old file is unchanged") from error


def reason_of(error):
    """Why a write failed: PyTorch hides the operating system's error in its own."""
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return getattr(cause, "strerror", None) or str(error).splitlines()[0]


def room_for(checkpoint, folder):
    """The size of `checkpoint` and the free space in `folder`, in words."""
    needed = f"it needs about {format_bytes(sum(storages(checkpoint).values()))}"
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{needed}, {format_bytes(shutil.disk_usage(folder).free)} are free"
    except OSError:
        return needed


def storages(value):
    """{address: bytes} of the storages of all tensors in nested dicts."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    parts = value.values() if isinstance(value, dict) else ()
    return {address: size for part in parts for address, size in storages(part).items()}


def link_checkpoint(path, name):
    """Hard-link `name` to the checkpoint at `path`; copy where links are not supported."""
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
    """Load the checkpoint at `path`, with its tensors on the CPU.

    nanoGPT's files load too: the prefix `_orig_mod.` of compiled models and the mask buffers of old
    versions are removed, and a tied weight is present under both of its names.

    Raises `UserError` for a file that is missing, damaged or not a checkpoint.
    """
    verify(path)
    checkpoint = read(path)
    state = {name.removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()}
    state = {name: w for name, w in state.items() if not name.endswith(".attn.bias")}
    if checkpoint["model_args"].get("tied", True):
        tied = state.get("lm_head.weight", state.get("transformer.wte.weight"))
        state["lm_head.weight"] = state["transformer.wte.weight"] = tied
    if invalid := [name for name, weight in state.items() if not is_weight(weight)]:
        raise UserError(f"{path} cannot be loaded: {invalid[0]} is not a weight")
    checkpoint["model"] = state
    return checkpoint


def read(path, mmap=False):
    """Load the dict at `path` and check its keys. With `mmap`, tensors are not read yet."""
    try:
        checkpoint = load_tensors(path, mmap)
    except Exception as error:  # a damaged pickle can raise any exception
        reason = "it holds something other than tensors and plain values, or is damaged"
        raise UserError(f"{path} cannot be loaded: {reason}") from error
    parts = [checkpoint.get(key) for key in ("model", "model_args")] if is_dict(checkpoint) else []
    if not parts or not all(map(is_dict, parts)):
        raise UserError(f"{path} is not a checkpoint of briskGPT or nanoGPT: no model in it")
    if missing := [key for key in MODEL_ARGS if key not in checkpoint["model_args"]]:
        raise UserError(f"{path} is not a GPT checkpoint: no {', '.join(missing)} in model_args")
    if invalid := invalid_entries(checkpoint):
        raise UserError(f"{path} cannot be loaded: invalid {', '.join(invalid)}")
    return checkpoint


def load_tensors(path, mmap=False):
    """`torch.load` restricted to tensors and plain values, so that no code in the file runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickles, which end in an error of ours
        try:
            str(path).encode()
        except UnicodeEncodeError:  # PyTorch cannot open a path that is not valid UTF-8
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def invalid_entries(checkpoint):
    """Names of the entries of the wrong type, or out of bounds, among those that loading uses."""
    types = ENTRY_TYPES
    bad = [key for key in types if not isinstance(checkpoint.get(key, types[key][0]()), types[key])]
    if bad:
        return bad
    config, sizes = checkpoint.get("config", {}), checkpoint["model_args"]
    counts = {key: checkpoint.get(key, 0) for key in ("iter_num", "position", "evals_since_best")}
    best = torch.as_tensor(checkpoint.get("best_val_loss", 0.0))
    bad = [key for key, number in counts.items() if not 0 <= number < 2**63]
    bad += [key for key in SIZES if not isinstance(sizes[key], int)]
    bad += [key for key, kinds in NESTED_TYPES.items() if not has_types(checkpoint.get(key), kinds)]
    bad += ["given"] * any(not isinstance(key, str) for key in checkpoint.get("given", ()))
    bad += [key for key in ("dataset", "data_dir") if not isinstance(config.get(key, ""), str)]
    bad += [repr(name) for name in (*checkpoint["model"], *config) if not isinstance(name, str)]
    return bad + ["best_val_loss"] * (best.numel() != 1 or best.is_meta)


def has_types(values, kinds):
    """Whether the dict `values`, or None, has every key of `kinds` with one of its types. Integers
    must fit in int64, and lists must hold plain values."""
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
    """Whether `value` is a floating-point tensor with all of its data in the file. Expanded views
    and meta tensors are not: they claim sizes without data."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    if value.layout is not torch.strided or value.is_meta:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def verify(path):
    """Verify the checksum of every record in the file at `path`. Raises `UserError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(f.file_size for f in archive.infolist()) > os.path.getsize(path):
                raise zipfile.BadZipFile("its records are larger than the file")  # overlapping
            # torch.save leaves both fields 0; otherwise its reader treats a record differently
            bad = [f.filename for f in archive.infolist() if f.flag_bits & 1 or f.external_attr]
            damaged = bad[0] if bad else archive.testzip()
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        reason = "it is empty" if os.path.getsize(path) == 0 else error
        raise UserError(f"{path} is damaged or not a checkpoint: {reason}") from error
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


def has_checkpoint(folder):
    return any(Path(folder, name).exists() for name in ("ckpt.pt", "last.pt"))


def checkpoint_of(source):
    """The checkpoint to read if `source` is the folder of a run, else `source`."""
    is_exported = Path(source, "config.json").exists()  # a Hugging Face directory
    return best_checkpoint(source) if has_checkpoint(source) and not is_exported else source


def latest_checkpoint(out_dir):
    """Path of the checkpoint to resume from: `last.pt` or `ckpt.pt`, whichever has the higher step.

    A damaged one is skipped with a note if the other is intact. Raises `UserError` if none is.
    """
    best_checkpoint(out_dir)  # raises if both are missing
    found, errors = [], []
    for name in ("last.pt", "ckpt.pt"):
        path = Path(out_dir, name)
        linked = found and path.exists() and path.samefile(found[0][1])  # verify it only once
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
    """Remove the partial files of a process that was killed while it saved."""
    for path in Path(out_dir).glob("*.pt.writing"):
        path.unlink(missing_ok=True)


def archive_previous_run(out_dir, names):
    """Move the files of an earlier run to `earlier/` (or `earlier-2/`, …) in `out_dir`.

    `names` may be glob patterns. Returns the new folder, or None if there was nothing to move.
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
    """Make a rename in `folder` durable. On POSIX only: Windows cannot fsync a directory."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
