"""Tokenize documents to a file on all cores, continuing after an interruption.

A document is a string, or an iterable of strings if it may be larger than memory. Workers get
batches of about a million characters, at most three batches each, so memory does not grow with the
corpus: about 300 MB for each process with GPT-2's vocabulary.

The progress is saved next to the file, with a checksum of the text tokenized so far. After an
interruption the text is read again and compared, which is fast, and only the rest is tokenized.
"""

import hashlib
import json
import os
import re
import signal
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from operator import length_hint

import numpy as np
from tqdm import tqdm

from brisk.data.saved_tokenizer import from_dict
from brisk.data.tokenizer import id_dtype
from brisk.errors import UserError

BATCH = 2**20  # characters in a batch
LONGEST = 4 * BATCH  # characters after which a document is split even inside a word
FEW_BATCHES = 8  # up to this number, starting workers takes longer than tokenizing
SAVE_EVERY = 1.0  # seconds between saves of the progress


def write_bin(path, tokenizer, documents, end_documents=False, workers=None):
    """Write the ids of `documents` to the file `path`, or continue an interrupted write.

    Returns a dict: the counts of tokens, bytes, characters and documents, and the SHA-256 of the
    file. Iterates `documents` once, or twice if a partial file is of another text.
    """
    progress = Progress(path)
    count = length_hint(documents, 0)
    unit = "documents" if count != 1 else "characters"
    options = {"desc": f"tokenizing {path.stem}", "unit": f" {unit}", "unit_scale": count == 1}
    options |= {"total": count if count > 1 else None}
    # `write` and `reset` show the bar at once; within its delay, `close` would not end its line
    with tqdm(delay=0 if progress.text else 1, **options) as bar:
        batches = progress.skip(batched(documents), bar)
        if batches is None:
            bar.reset()
            progress.forget()
            batches = batched(documents)
        elif progress.size:
            tqdm.write(f"continuing {path.stem} after {progress.total['tokens']:,} tokens")
        with open(path, "r+b" if progress.size else "wb") as file:
            file.truncate(progress.size)
            file.seek(progress.size)
            marked = progress.mark(batches)
            for ids, counts, mark in encode(tokenizer, marked, end_documents, workers):
                file.write(ids)
                file.flush()
                progress.add(ids, counts, mark)
                bar.set_postfix_str(f"{progress.total['tokens']:,} tokens", refresh=False)
                bar.update(counts[unit])
    progress.save()
    return {**progress.total, "sha256": progress.digest.hexdigest()}


class Progress:
    """The progress of writing a file: bytes written, counts, and a checksum of the text."""

    def __init__(self, path):
        self.path, self.note = path, path.with_suffix(".progress")
        self.forget()
        try:
            noted = json.loads(self.note.read_text(encoding="utf-8"))
            if path.stat().st_size >= noted["size"]:
                self.size, self.batches = noted["size"], noted["batches"]
                self.text, self.total = noted["text"], Counter(noted["total"])
                self.sha256 = noted["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            self.forget()  # missing or damaged: start again

    def forget(self):
        self.size = self.batches = 0
        self.text = ""  # chained checksum of the batches so far
        self.total = Counter(tokens=0, bytes=0, characters=0, documents=0)
        self.digest = hashlib.sha256()
        self.sha256 = self.digest.hexdigest()  # of the file when the progress was saved
        self.saved = time.monotonic()

    def skip(self, batches, bar):
        """Advance `batches` past those in the file and return it. Returns None if they are of
        another text, or the file is damaged."""
        text = ""
        for batch in islice(batches, self.batches):
            text = chain_checksum(text, batch)
            done = [ends if bar.unit == " documents" else len(part) for part, ends in batch]
            bar.update(sum(done))
        if text != self.text:
            return None
        with open(self.path, "ab+") as file:
            file.seek(0)
            while (left := self.size - file.tell()) > 0:
                self.digest.update(file.read(min(BATCH, left)))
        return batches if self.digest.hexdigest() == self.sha256 else None

    def mark(self, batches):
        """Yield each batch with the checksum of the text up to its end."""
        text = self.text
        for batch in batches:
            text = chain_checksum(text, batch)
            yield batch, text

    def add(self, ids, counts, mark):
        """Record a written batch."""
        self.digest.update(ids)
        self.total.update(counts)
        self.size += len(ids)
        self.batches += 1
        self.text = mark
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self):
        noted = {"size": self.size, "batches": self.batches, "total": self.total}
        noted |= {"text": self.text, "sha256": self.digest.hexdigest()}
        writing = self.note.with_suffix(".writing")
        writing.write_text(json.dumps(noted), encoding="utf-8")
        writing.replace(self.note)
        self.saved = time.monotonic()


def chain_checksum(text, batch):
    """Chain the checksum `text` of the previous batches with `batch`."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for part, ends in batch:
        digest.update(part.encode("utf-8", "surrogatepass") + (b"\xff" if ends else b"\xfe"))
    return digest.hexdigest()


def batched(documents):
    """Yield batches of about `BATCH` characters: lists of pairs (text, document ends here)."""
    batch, size = [], 0
    for document in documents:
        for text, ends in parts(document):
            batch.append((text, ends))
            size += len(text) + 100  # an empty string takes memory too
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def parts(document):
    """Split a document into pairs (text, document ends here) of about `BATCH` characters. Their
    concatenated ids are the ids of the document.

    A part ends with a letter or digit before white space. No token spans that position: since
    GPT-2, BPE patterns never put a letter or digit and the following white space in one piece, and
    words contain no white space. A document without such a position in `LONGEST` characters is
    split anyway: the ids there may differ, but they decode to the same text.
    """
    rest = ""
    for piece in [document] if isinstance(document, str) else document:
        rest += piece
        start = 0
        while len(rest) - start > BATCH:
            place = re.compile(r"[^\W_](?=\s)").search(rest, start + BATCH - 1)
            if not place and len(rest) - start < LONGEST:
                break  # the next piece may have one
            end = place.end() if place else start + LONGEST
            yield rest[start:end], False
            start = end
        rest = rest[start:]
    yield rest, True


def encode(tokenizer, batches, end_documents=False, workers=None):
    """Tokenize pairs (batch, mark), on all cores if there is enough text. Yields triples (ids as
    bytes, counts, mark) in order."""
    first = list(islice(batches, FEW_BATCHES + 1))
    workers = workers or cores()
    is_lookup = tokenizer.kind in ("char", "byte")  # faster than sending the text to a worker
    pool = None
    if len(first) > FEW_BATCHES and not is_lookup and workers > 1:
        pool = open_pool(workers, tokenizer, end_documents)
    if pool is None:
        for batch, mark in chain(first, batches):
            yield *encode_batch(tokenizer, batch, end_documents), mark
        return
    pending = deque()
    try:
        with pool:
            for batch, mark in chain(first, batches):
                pending.append((pool.submit(work, batch), mark))
                if len(pending) > 2 * workers:
                    result, mark = pending.popleft()
                    yield *result.result(), mark
            while pending:
                result, mark = pending.popleft()
                yield *result.result(), mark
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenizing process was killed, perhaps for lack of memory; run this again with a "
            "smaller --num_proc, and it continues from here"
        ) from error


def open_pool(workers, tokenizer, end_documents):
    """A pool of processes that run `work`. Returns None if the system has no semaphores, such as
    Linux without a writable /dev/shm."""
    initial = (tokenizer.to_dict(), end_documents)
    try:
        return ProcessPoolExecutor(workers, get_context("spawn"), start_worker, initial)
    except (OSError, NotImplementedError) as error:
        print(f"tokenizing in one process: this system has no semaphores ({error})")
        return None


def cores():
    """The number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def encode_batch(tokenizer, batch, end_documents):
    """Return the ids of a batch as bytes, and its counts for `meta.json`."""
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
        "bytes": sum(map(utf8_length, texts)),
        "characters": sum(map(len, texts)),
        "documents": sum(ends for _, ends in batch),
    }


def utf8_length(text):
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def start_worker(description, end_documents):
    """Initialize a worker process. It ignores Ctrl-C, which the main process handles."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    worker = (from_dict(description), end_documents)


def exit_with_parent():
    """Exit when the main process is killed; the worker would wait for work forever."""
    parent_process().join()
    os._exit(1)


def work(batch):
    tokenizer, end_documents = worker
    return encode_batch(tokenizer, batch, end_documents)
