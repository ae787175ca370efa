"""Documents → token ids in a file, on all cores, going on after a kill.

A document is a string, or an iterable of strings (its pieces in order) where it may be larger than
memory. Text is handed out in batches of about a million characters, at most three batches to a
worker, so a process never holds more than a few of them: about 300 MB in each, with GPT-2's
vocabulary, whatever the size of the corpus.

What a killed run has done is not done again: beside the file lies how far it came, and a checksum
of the text up to there. The text is read again and compared, which is quick; what follows is
tokenized.
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

BATCH = 2**20  # characters handed to a worker at a time
LONGEST = 4 * BATCH  # a document is cut here even where no place is safe
FEW_BATCHES = 8  # up to this many, starting workers takes longer than the work
SAVE_EVERY = 1.0  # seconds between notes of how far a file has come


def write_bin(path, tokenizer, documents, end_documents=False, workers=None):
    """Write the ids of `documents` to the file `path`, or go on with it after a kill.

    Returns counts of tokens, bytes, characters and documents, and the file's SHA-256. `documents`
    is gone through once, or twice where a half-written file turns out to be of another text.
    """
    progress = Progress(path)
    count = length_hint(documents, 0)
    unit = "documents" if count != 1 else "characters"
    options = {"desc": f"tokenizing {path.stem}", "unit": f" {unit}", "unit_scale": count == 1}
    options |= {"total": count if count > 1 else None}
    # Messages and `reset` show the bar at once; within its delay `close` would not end its line.
    with tqdm(delay=0 if progress.text else 1, **options) as bar:
        batches = progress.skip(batched(documents), bar)
        if batches is None:
            bar.reset()
            progress.forget()
            batches = batched(documents)
        elif progress.size:
            tqdm.write(f"going on with {path.stem} after {progress.total['tokens']:,} tokens")
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
    """How far the file `path` has come: bytes written, counts, and a checksum of the text."""

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
            self.forget()  # nothing to go on with

    def forget(self):
        self.size = self.batches = 0
        self.text = ""  # checksum of the batches so far, each hashed with the one before
        self.total = Counter(tokens=0, bytes=0, characters=0, documents=0)
        self.digest = hashlib.sha256()
        self.sha256 = self.digest.hexdigest()  # of the file so far, as noted
        self.saved = time.monotonic()

    def skip(self, batches, bar):
        """What is left of `batches` after those in the file; None if they are of another text,
        or the file is damaged."""
        text = ""
        for batch in islice(batches, self.batches):
            text = following(text, batch)
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
        """Pairs of each batch and the checksum of the text up to its end."""
        text = self.text
        for batch in batches:
            text = following(text, batch)
            yield batch, text

    def add(self, ids, counts, mark):
        """A batch has been written."""
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


def following(text, batch):
    """The checksum of a batch after the checksum `text` of all before it."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for part, ends in batch:
        digest.update(part.encode("utf-8", "surrogatepass") + (b"\xff" if ends else b"\xfe"))
    return digest.hexdigest()


def batched(documents):
    """Documents → lists of about `BATCH` characters, of pairs (text, whether a document ends)."""
    batch, size = [], 0
    for document in documents:
        for text, ends in parts(document):
            batch.append((text, ends))
            size += len(text) + 100  # an empty one takes memory too
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def parts(document):
    """A document in pairs (text of about `BATCH` characters, whether the document ends), whose
    ids put together are the document's own.

    A part ends with a letter or digit before white space. No token reaches over that place: BPE
    patterns since GPT-2's never put a letter or digit and white space after it into one piece,
    and no word has white space in it. (A document without such a place for `LONGEST` characters
    is cut nevertheless: its ids may then differ at the cut, the text they stand for does not.)
    """
    rest = ""
    for piece in [document] if isinstance(document, str) else document:
        rest += piece
        start = 0
        while len(rest) - start > BATCH:
            place = re.compile(r"[^\W_](?=\s)").search(rest, start + BATCH - 1)
            if not place and len(rest) - start < LONGEST:
                break  # wait for more of it
            end = place.end() if place else start + LONGEST
            yield rest[start:end], False
            start = end
        rest = rest[start:]
    yield rest, True


def encode(tokenizer, batches, end_documents=False, workers=None):
    """Triples (ids as bytes, counts, mark) of the pairs (batch, mark), in order, on all cores
    where there is enough text."""
    first = list(islice(batches, FEW_BATCHES + 1))
    workers = workers or cores()
    is_lookup = tokenizer.kind in ("char", "byte")  # faster than handing the text to a worker
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
            "a process that tokenized was killed (was memory short?); run this again, with a "
            "smaller --num_proc: it goes on from here"
        ) from error


def open_pool(workers, tokenizer, end_documents):
    """Processes that run `work`; None where the system has no semaphores for them, as Linux without
    a writable /dev/shm."""
    initial = (tokenizer.to_dict(), end_documents)
    try:
        return ProcessPoolExecutor(workers, get_context("spawn"), start_worker, initial)
    except (OSError, NotImplementedError) as error:
        print(f"tokenizing in one process: this system gives no semaphores ({error})")
        return None


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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
        "bytes": sum(map(utf8_length, texts)),
        "characters": sum(map(len, texts)),
        "documents": sum(ends for _, ends in batch),
    }


def utf8_length(text):
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def start_worker(description, end_documents):
    """In a new process: build the tokenizer once. Ctrl-C is the first process's to answer."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    worker = (from_dict(description), end_documents)


def leave_with_parent():
    """End this process when the first one was killed: it would wait for work forever."""
    parent_process().join()
    os._exit(1)


def work(batch):
    tokenizer, end_documents = worker
    return encode_batch(tokenizer, batch, end_documents)
