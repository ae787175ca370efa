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
import os
import pickle
import re
import shutil
import signal
import sys
import urllib.request
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from http.client import HTTPException
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from brisk.errors import UserError
from brisk.tokenizer import EOT, from_dict, id_dtype, read_meta_pkl

FORMAT = 1
BATCH = 2**20  # characters handed to a worker at a time
FEW_BATCHES = 8  # up to this many, starting workers takes longer than the work


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
        sizes = {split: counts["tokens"] for split, counts in meta["splits"].items()}
        itemsize = {"uint16": 2, "uint32": 4}[meta["dtype"]]
        whole = isinstance(meta["tokenizer"], dict) and all(
            isinstance(number, int) for number in (meta["vocab_size"], *sizes.values())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {again}") from error
    if not known or not whole:
        raise UserError(f"{path} is not a description of format {FORMAT}; {again}")
    for split, tokens in sizes.items():
        file = path.parent / f"{split}.bin"
        if file.exists() and file.stat().st_size != tokens * itemsize:
            raise UserError(f"{file} does not match meta.json: writing was interrupted; {again}")
    return meta


def load_tokenizer(data_dir):
    """The tokenizer of a prepared data set: from its `meta.json`, else from nanoGPT's `meta.pkl`,
    else None (nanoGPT's GPT-2 sets, and those without any text)."""
    if meta := read_meta(data_dir):
        return from_dict(meta["tokenizer"])
    meta_pkl = Path(data_dir) / "meta.pkl"
    return read_meta_pkl(meta_pkl) if meta_pkl.exists() else None


# ----------------------------------------------------------------------------- finding the text


def find_text(given, here, filename, url, sha256):
    """The raw text of a data set, and a word on where it comes from.

    Looks at the path `given` (if not empty), `here/input.txt`, `$BRISK_DATA/filename`, then `url`,
    whose bytes must have the checksum `sha256` (hex) and are kept as `here/input.txt`. Line ends
    become "\\n", as in nanoGPT.

    Returns (text, source); source is `url` if the checksum is the known one, else the file's name.
    Raises `UserError` where there is no text, or it is not UTF-8.
    """
    places = [Path(here) / "input.txt"]
    if os.environ.get("BRISK_DATA"):
        places.append(Path(os.environ["BRISK_DATA"]) / filename)
    try:
        if given:
            path = Path(given)
        else:
            path = next(filter(Path.exists, places), None) or download(url, sha256, places)
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot use {error.filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; convert it first") from error
    known = hashlib.sha256(raw).hexdigest() == sha256
    return text.replace("\r\n", "\n").replace("\r", "\n"), url if known else path.name


def download(url, sha256, places):
    """Keep the bytes at `url` at the first of `places`, where it was looked for in vain."""
    kept = places[0]
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            raw = response.read()
    except (OSError, HTTPException) as error:
        looked = ", ".join(map(str, places))
        print(f"looked for the text at {looked} and {url} ({error})", file=sys.stderr)
        print("to use a file of your own: --input=PATH", file=sys.stderr)
        raise UserError(f"no text found; download {url} and save it as {kept}") from error
    if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
        raise UserError(f"what {url} sent is damaged (its checksum is wrong); try again")
    part = kept.with_suffix(".part")
    part.write_bytes(raw)
    return part.replace(kept)


def split_text(text):
    """The first 90 % of the characters for training and the rest for validation, as in nanoGPT."""
    n = int(len(text) * 0.9)
    return {"train": [text[:n]], "val": [text[n:]]}


# ----------------------------------------------------------------------------- writing a data set


def write_dataset(
    directory, tokenizer, splits, source, end_documents=False, workers=None, extra=None
):
    """Tokenize documents and write `directory/<split>.bin` and `meta.json`.

    Ids go to disk as they come, so memory does not grow with the text. Everything is written to
    a temporary folder first; `meta.json` moves in before the bins.

    Args:
        splits: name → documents, an iterable of strings ("train" and "val").
        source: where the text comes from, in words.
        end_documents: whether `tokenizer.eot` follows each document.
        workers: processes that tokenize; one for each core by default.
        extra: further entries of `meta.json`.

    Returns the contents of `meta.json`. Raises `UserError` for a split without tokens, and where
    the files cannot be written.
    """
    dtype = np.dtype(id_dtype(tokenizer.vocab_size)).name
    meta = {"format": FORMAT, "dtype": dtype, "vocab_size": tokenizer.vocab_size, "source": source}
    meta |= {**(extra or {}), "splits": {}, "tokenizer": tokenizer.to_dict()}
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".writing-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        with TemporaryDirectory(prefix=".writing-", dir=directory) as temporary:
            for split, documents in splits.items():
                results = encode_documents(tokenizer, documents, end_documents, workers)
                counts = write_bin(Path(temporary) / f"{split}.bin", results, split, documents)
                if not counts["tokens"]:
                    raise UserError(f"there is too little text: none of it falls to {split}")
                print(f"{split} has {counts['tokens']:,} tokens")
                meta["splits"][split] = counts
            write_description(temporary, meta, tokenizer)
            # Away with the old first: none of it can be taken for what the new meta.json describes.
            for name in ["meta.pkl", *(f"{split}.bin" for split in splits)]:
                (directory / name).unlink(missing_ok=True)
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.suffix == ".bin"):
                file.replace(directory / file.name)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    return meta


def write_bin(path, results, split, documents):
    """Write the ids of `results`, pairs (ids, counts), to one file; the sum of their counts, with
    the file's checksum."""
    total = Counter(tokens=0, bytes=0, characters=0, documents=0)
    digest = hashlib.sha256()
    known = len(documents) if hasattr(documents, "__len__") else None
    bar = tqdm(total=known, desc=f"tokenizing {split}", unit=" documents", delay=1)
    with open(path, "wb") as file, bar:
        for ids, counts in results:
            file.write(ids)
            digest.update(ids)
            total.update(counts)
            bar.set_postfix_str(f"{total['tokens']:,} tokens", refresh=False)
            bar.update(counts["documents"])
    return {**total, "sha256": digest.hexdigest()}


def write_description(directory, meta, tokenizer):
    """Write `meta.json`, and for characters nanoGPT's `meta.pkl`, which its scripts read."""
    text = json.dumps(meta, indent=1)
    (Path(directory) / "meta.json").write_text(text + "\n", encoding="utf-8")
    if tokenizer.kind == "char":
        itos = dict(enumerate(tokenizer.characters + [EOT] * (tokenizer.eot is not None)))
        stoi = {character: i for i, character in itos.items()}
        with open(Path(directory) / "meta.pkl", "wb") as file:
            pickle.dump({"vocab_size": len(itos), "itos": itos, "stoi": stoi}, file)


# ----------------------------------------------------------------------------- tokenizing


def encode_documents(tokenizer, documents, end_documents=False, workers=None):
    """The ids of all documents in order, a batch at a time: pairs (ids as bytes, counts).

    On all cores where there is enough text; at most two batches wait for each worker.
    """
    batches = batched(documents)
    first = list(islice(batches, FEW_BATCHES + 1))
    workers = workers or cores()
    is_lookup = tokenizer.kind in ("char", "byte")  # faster than handing the text to a worker
    if len(first) <= FEW_BATCHES or is_lookup or workers == 1:
        for batch in chain(first, batches):
            yield encode_batch(tokenizer, batch, end_documents)
        return
    pending = deque()
    with ProcessPoolExecutor(
        workers, get_context("spawn"), start_worker, (tokenizer.to_dict(), end_documents)
    ) as pool:
        for batch in chain(first, batches):
            pending.append(pool.submit(work, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def batched(documents):
    """Documents → lists of about `BATCH` characters, of pairs (text, whether a document ends)."""
    batch, size = [], 0
    for document in documents:
        *parts, last = cut(document)
        for text, ends in [*((part, False) for part in parts), (last, True)]:
            batch.append((text, ends))
            size += len(text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def cut(document):
    """A long document in parts of about `BATCH` characters, whose ids put together are its own.

    A part ends with a letter or digit before a line end. No token reaches over that place: BPE
    patterns since GPT-2's never put a letter or digit and a line end after it into one piece.
    """
    start = 0
    while len(document) - start > BATCH:
        place = re.compile(r"[^\W_](?=\n)").search(document, start + BATCH - 1)
        if not place:
            break
        yield document[start : place.end()]
        start = place.end()
    yield document[start:]


def encode_batch(tokenizer, batch, end_documents):
    """The ids of a batch as bytes, and the counts that `meta.json` keeps."""
    dtype = np.dtype(id_dtype(tokenizer.vocab_size)).newbyteorder("<")
    pieces = [np.empty(0, dtype)]
    for text, ends in batch:
        pieces.append(tokenizer.encode(text))
        if ends and end_documents:
            pieces.append([tokenizer.eot])
    ids = np.concatenate(pieces, dtype=dtype, casting="unsafe")
    texts = [text for text, _ in batch]
    return ids.tobytes(), {
        "tokens": len(ids),
        "bytes": sum(len(text.encode("utf-8", "surrogatepass")) for text in texts),
        "characters": sum(map(len, texts)),
        "documents": sum(ends for _, ends in batch),
    }


def start_worker(description, end_documents):
    """In a new process: build the tokenizer once. Ctrl-C is the first process's to answer."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = (from_dict(description), end_documents)


def work(batch):
    tokenizer, end_documents = worker
    return encode_batch(tokenizer, batch, end_documents)
