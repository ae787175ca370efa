"""Read and write data sets: `train.bin`, `val.bin` and `meta.json`.

The .bin files are raw little-endian token ids. `meta.json` describes them:

    {"format": 1, "dtype": "uint16", "vocab_size": 65, "source": "tinyshakespeare.txt",
     "splits": {"train": {"tokens": …, "bytes": …, "characters": …, "documents": …, "sha256": …},
                "val": {…}},
     "tokenizer": {…}}

`bytes` (in UTF-8) and `characters` count the text, `tokens` the ids.
"""

import hashlib
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from brisk.data.raw_files import bytes_of, checksum
from brisk.data.saved_tokenizer import from_dict, read_meta_pkl
from brisk.data.tokenize_files import write_bin
from brisk.data.tokenizer import EOT, id_dtype
from brisk.errors import UserError

FORMAT = 1


# ----------------------------------------------------------------------------- reading a data set


def read_meta(data_dir):
    """Read and check `data_dir/meta.json`. Returns None if it is missing, as for nanoGPT's data.

    Raises `UserError` if it is damaged, or if the size of a .bin file does not match it.
    """
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        return None
    script = path.parent / "prepare.py"
    again = f"run again: python {script}" if script.exists() else "prepare it again"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        known = meta["format"] == FORMAT
        splits = meta["splits"]
        sizes = {split: counts["tokens"] for split, counts in splits.items()}
        itemsize = {"uint16": 2, "uint32": 4}[meta["dtype"]]
        numbers = [meta["vocab_size"], *sizes.values()]
        may_be_0 = [counts[key] for counts in splits.values() for key in ("bytes", "characters")]
        whole = isinstance(meta["tokenizer"], dict) and splits.keys() >= {"train", "val"}
        whole = whole and all(type(number) is int for number in [*numbers, *may_be_0])
        whole = whole and min(numbers) > 0 and min(may_be_0) >= 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {again}") from error
    if not known or not whole:
        raise UserError(f"{path} is not a data set description of format {FORMAT}; {again}")
    for split, tokens in sizes.items():
        file = path.parent / f"{split}.bin"
        if file.exists() and file.stat().st_size != tokens * itemsize:
            raise UserError(f"{file} does not match meta.json: writing was interrupted; {again}")
    return meta


def verify_data(data_dir, meta):
    """Raise `UserError` unless each .bin file in `data_dir` has the checksum in `meta`, its
    `meta.json`. Reads the files completely."""
    if meta is None:
        raise UserError(f"{data_dir} has no meta.json, so there are no checksums to verify")
    for split, counts in meta["splits"].items():
        file = Path(data_dir, f"{split}.bin")
        if file.exists() and checksum(file) != counts.get("sha256"):
            raise UserError(f"{file} is damaged: its checksum does not match meta.json")


def load_tokenizer(data_dir, meta=None):
    """Load the tokenizer of a data set from its `meta.json`, else from nanoGPT's `meta.pkl`.
    Returns None if both are missing, as in nanoGPT's GPT-2 data sets.

    `meta` is the contents of `meta.json` if they have been read already.
    """
    if meta := meta or read_meta(data_dir):
        tokenizer = from_dict(meta["tokenizer"])
        if tokenizer.vocab_size != meta["vocab_size"]:
            sizes = f"{meta['vocab_size']}, but its tokenizer has {tokenizer.vocab_size} tokens"
            raise UserError(f"{Path(data_dir, 'meta.json')} is damaged: vocab_size is {sizes}")
        return tokenizer
    meta_pkl = Path(data_dir) / "meta.pkl"
    return read_meta_pkl(meta_pkl) if meta_pkl.exists() else None


# ----------------------------------------------------------------------------- writing a data set


def split_text(text, share=0.1):
    """Split a text: the last fraction `share` of it is for validation, as in nanoGPT."""
    n = int(len(text) * (1 - share))
    return {"train": [text[:n]], "val": [text[n:]]}


def write_dataset(
    directory, tokenizer, splits, source, end_documents=False, workers=None, extra=None
):
    """Tokenize documents and write `directory/<split>.bin` and `meta.json`.

    Memory use does not grow with the text (see `tokenize_files`). Files are written to
    `directory/.writing` first, so that a killed process can be continued, and then moved:
    `meta.json` before the .bin files.

    Args:
        splits: {"train": documents, "val": documents}. Documents are a re-iterable collection of
            strings, or of iterables of strings if a document may be larger than memory.
        source: origin of the text, for `meta.json`.
        end_documents: append `tokenizer.eot` to each document.
        workers: number of processes that tokenize. Default: one for each core.
        extra: further entries of `meta.json`.

    Returns the contents of `meta.json`. Raises `UserError` for a split without tokens, and if the
    files cannot be written.
    """
    from filelock import FileLock, Timeout  # not needed to read a data set

    dtype = np.dtype(id_dtype(tokenizer.vocab_size)).name
    meta = {"format": FORMAT, "dtype": dtype, "vocab_size": tokenizer.vocab_size, "source": source}
    meta |= {**(extra or {}), "splits": {}, "tokenizer": tokenizer.to_dict()}
    directory = Path(directory)
    writing = directory / ".writing"
    try:
        writing.mkdir(parents=True, exist_ok=True)
        with FileLock(writing / "lock", blocking=False):
            remove_stale_files(writing, meta, end_documents)
            for split, documents in splits.items():
                file = writing / f"{split}.bin"
                counts = write_bin(file, tokenizer, documents, end_documents, workers)
                if not counts["tokens"]:
                    shutil.rmtree(writing, ignore_errors=True)
                    raise UserError(f"the text is too short: no tokens are left for {split}")
                print(f"{split} has {counts['tokens']:,} tokens")
                meta["splits"][split] = counts
            move_files(directory, writing, meta, tokenizer)
    except UserError:
        if not any(writing.glob("*.progress")):  # nothing to continue from
            shutil.rmtree(writing, ignore_errors=True)
        raise
    except Timeout as error:
        raise UserError(f"another process is writing to {directory}; wait for its end") from error
    except BrokenPipeError:  # `prepare.py | head`; see `one_line_errors`
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {directory}: {reason}") from error
    shutil.rmtree(writing, ignore_errors=True)
    if (fewest := min(counts["tokens"] for counts in meta["splits"].values())) <= 256:
        print(f"note: a split has only {fewest} tokens; block_size must be smaller than that")
    return meta


def join_datasets(directory, folders, source):
    """Concatenate the data sets in `folders`, which share a tokenizer, to one in `directory`.

    Returns the contents of its `meta.json`. Raises `UserError` if their tokenizers differ, or if
    the files cannot be written.
    """
    metas = [read_meta(folder) for folder in folders]
    if any(meta["tokenizer"] != metas[0]["tokenizer"] for meta in metas):
        raise UserError(f"the sets in {Path(folders[0]).parent} have different tokenizers")
    joined = {**metas[0], "source": source, "splits": {}}
    directory = Path(directory)
    for leftover in directory.glob(".writing-*"):  # from a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with TemporaryDirectory(prefix=".writing-", dir=directory) as temporary:
            for split in metas[0]["splits"]:
                total, digest = Counter(), hashlib.sha256()
                with open(Path(temporary, f"{split}.bin"), "wb") as file:
                    for folder, meta in zip(folders, metas, strict=True):
                        counts = meta["splits"][split]
                        total.update({k: v for k, v in counts.items() if k != "sha256"})
                        for block in bytes_of(Path(folder, f"{split}.bin")):
                            digest.update(block)
                            file.write(block)
                joined["splits"][split] = {**total, "sha256": digest.hexdigest()}
                print(f"{split} has {total['tokens']:,} tokens")
            move_files(directory, Path(temporary), joined, from_dict(joined["tokenizer"]))
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    return joined


def remove_stale_files(writing, meta, end_documents):
    """Delete the files in `writing` unless they were made with this format and tokenizer."""
    identity = json.dumps([meta["format"], meta["tokenizer"], end_documents])
    note = writing / "made-with"
    if not note.exists() or note.read_text(encoding="utf-8") != identity:
        for leftover in writing.iterdir():
            if leftover.name != "lock":
                leftover.unlink()
        note.write_text(identity, encoding="utf-8")


def move_files(directory, writing, meta, tokenizer):
    """Move the finished files from `writing` to `directory`, `meta.json` first."""
    write_meta(writing, meta, tokenizer)
    bins = [f"{split}.bin" for split in meta["splits"]]
    # delete the old files first: the new meta.json must never describe them
    for name in ["meta.pkl", *bins]:
        (directory / name).unlink(missing_ok=True)
    descriptions = ["meta.json"] + ["meta.pkl"] * (writing / "meta.pkl").exists()
    for name in descriptions + bins:
        (writing / name).replace(directory / name)


def write_meta(directory, meta, tokenizer):
    """Write `meta.json`, and for a character tokenizer also `meta.pkl`, which nanoGPT reads."""
    text = json.dumps(meta, indent=1)
    (Path(directory) / "meta.json").write_text(text + "\n", encoding="utf-8")
    if tokenizer.kind == "char":
        itos = dict(enumerate(tokenizer.characters + [EOT] * (tokenizer.eot is not None)))
        stoi = {character: i for i, character in itos.items()}
        with open(Path(directory) / "meta.pkl", "wb") as file:
            pickle.dump({"vocab_size": len(itos), "itos": itos, "stoi": stoi}, file)
