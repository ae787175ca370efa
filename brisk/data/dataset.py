"""Raw text → `train.bin`, `val.bin` and `meta.json`: what every `prepare.py` shares.

The bins are raw little-endian token ids, and `meta.json` says all there is to know of them:

    {"format": 1, "dtype": "uint16", "vocab_size": 65, "source": "tinyshakespeare.txt",
     "splits": {"train": {"tokens": …, "bytes": …, "characters": …, "documents": …, "sha256": …},
                "val": {…}},
     "tokenizer": {…}}

`bytes` and `characters` count the text before it was tokenized (UTF-8), `tokens` the ids.
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
    """The contents of `data_dir/meta.json`, checked; None where there is no such file, as in a
    data set that nanoGPT prepared.

    Raises `UserError` for a damaged file, and where a bin beside it has another size than it says.
    """
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        return None
    again = f"run again: python {path.parent / 'prepare.py'}"
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
        raise UserError(f"{path} is not a description of format {FORMAT}; {again}")
    for split, tokens in sizes.items():
        file = path.parent / f"{split}.bin"
        if file.exists() and file.stat().st_size != tokens * itemsize:
            raise UserError(f"{file} does not match meta.json: writing was interrupted; {again}")
    return meta


def verify_data(data_dir, meta):
    """Raise `UserError` unless each bin in `data_dir` has the checksum that `meta`, the contents of
    its `meta.json`, states. Reads all of both."""
    if meta is None:
        raise UserError(f"{data_dir} has no meta.json, and so no checksums to verify the data by")
    for split, counts in meta["splits"].items():
        file = Path(data_dir, f"{split}.bin")
        if file.exists() and checksum(file) != counts.get("sha256"):
            raise UserError(f"{file} is damaged: its checksum is not the one in meta.json")


def load_tokenizer(data_dir, meta=None):
    """The tokenizer of a prepared data set: from its `meta.json`, else from nanoGPT's `meta.pkl`,
    else None (nanoGPT's GPT-2 sets, and those without any text). `meta` is the contents of
    `meta.json`, where they have been read."""
    if meta := meta or read_meta(data_dir):
        tokenizer = from_dict(meta["tokenizer"])
        if tokenizer.vocab_size != meta["vocab_size"]:
            sizes = f"{meta['vocab_size']} tokens, its tokenizer {tokenizer.vocab_size}"
            raise UserError(f"{Path(data_dir, 'meta.json')} is damaged: it says {sizes}")
        return tokenizer
    meta_pkl = Path(data_dir) / "meta.pkl"
    return read_meta_pkl(meta_pkl) if meta_pkl.exists() else None


# ----------------------------------------------------------------------------- writing a data set


def split_text(text, share=0.1):
    """The first characters for training and the last `share` for validation, as in nanoGPT."""
    n = int(len(text) * (1 - share))
    return {"train": [text[:n]], "val": [text[n:]]}


def write_dataset(
    directory, tokenizer, splits, source, end_documents=False, workers=None, extra=None
):
    """Tokenize documents and write `directory/<split>.bin` and `meta.json`.

    Ids go to disk as they come, so memory does not grow with the text (see `tokenize_files`).
    Everything is written to `directory/.writing` first, where a run that was killed is gone on
    with; `meta.json` moves in before the bins.

    Args:
        splits: name → documents ("train" and "val"): a collection, not an iterator, of strings,
            or of iterables of strings for documents that may be larger than memory.
        source: where the text comes from, in words.
        end_documents: whether `tokenizer.eot` follows each document.
        workers: processes that tokenize; one for each core by default.
        extra: further entries of `meta.json`.

    Returns the contents of `meta.json`. Raises `UserError` for a split without tokens, and where
    the files cannot be written.
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
            keep_what_fits(writing, meta, end_documents)
            for split, documents in splits.items():
                file = writing / f"{split}.bin"
                counts = write_bin(file, tokenizer, documents, end_documents, workers)
                if not counts["tokens"]:
                    shutil.rmtree(writing, ignore_errors=True)
                    raise UserError(f"there is too little text: none of it falls to {split}")
                print(f"{split} has {counts['tokens']:,} tokens")
                meta["splits"][split] = counts
            move_in(directory, writing, meta, tokenizer)
    except UserError:
        if not any(writing.glob("*.progress")):  # nothing that took long
            shutil.rmtree(writing, ignore_errors=True)
        raise
    except Timeout as error:
        raise UserError(f"another process is preparing {directory} at this moment") from error
    except BrokenPipeError:  # nobody reads what is printed
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {directory}: {reason}") from error
    shutil.rmtree(writing, ignore_errors=True)
    if (fewest := min(counts["tokens"] for counts in meta["splits"].values())) <= 256:
        print(f"note: a split of {fewest} tokens is short: block_size must be smaller than that")
    return meta


def join_datasets(directory, folders, source):
    """Put prepared data sets of one tokenizer together, in order, as one in `directory`.

    Returns the contents of its `meta.json`. Raises `UserError` where they do not go together.
    """
    metas = [read_meta(folder) for folder in folders]
    if any(meta["tokenizer"] != metas[0]["tokenizer"] for meta in metas):
        raise UserError(f"the sets in {Path(folders[0]).parent} have different tokenizers")
    joined = {**metas[0], "source": source, "splits": {}}
    directory = Path(directory)
    for leftover in directory.glob(".writing-*"):  # of a process that was killed
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
            move_in(directory, Path(temporary), joined, from_dict(joined["tokenizer"]))
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    return joined


def keep_what_fits(writing, meta, end_documents):
    """Empty the folder `writing` of what another tokenizer, or another version, wrote there."""
    identity = json.dumps([meta["format"], meta["tokenizer"], end_documents])
    note = writing / "made-with"
    if not note.exists() or note.read_text(encoding="utf-8") != identity:
        for leftover in writing.iterdir():
            if leftover.name != "lock":
                leftover.unlink()
        note.write_text(identity, encoding="utf-8")


def move_in(directory, writing, meta, tokenizer):
    """Put the finished files in their place, with the description first."""
    write_description(writing, meta, tokenizer)
    bins = [f"{split}.bin" for split in meta["splits"]]
    # Away with the old first: none of it can be taken for what the new meta.json describes.
    for name in ["meta.pkl", *bins]:
        (directory / name).unlink(missing_ok=True)
    descriptions = ["meta.json"] + ["meta.pkl"] * (writing / "meta.pkl").exists()
    for name in descriptions + bins:
        (writing / name).replace(directory / name)


def write_description(directory, meta, tokenizer):
    """Write `meta.json`, and for characters nanoGPT's `meta.pkl`, which its scripts read."""
    text = json.dumps(meta, indent=1)
    (Path(directory) / "meta.json").write_text(text + "\n", encoding="utf-8")
    if tokenizer.kind == "char":
        itos = dict(enumerate(tokenizer.characters + [EOT] * (tokenizer.eot is not None)))
        stoi = {character: i for i, character in itos.items()}
        with open(Path(directory) / "meta.pkl", "wb") as file:
            pickle.dump({"vocab_size": len(itos), "itos": itos, "stoi": stoi}, file)
