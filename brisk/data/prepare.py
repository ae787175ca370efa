"""Make a data set from any text, for `data/custom/prepare.py` and `train.py --input`."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from operator import length_hint
from pathlib import Path

import numpy as np

from brisk.data.bpe import gpt2, train_bpe
from brisk.data.dataset import read_meta, write_dataset
from brisk.data.documents import Corpus, find_files, pieces, sample_evenly, split_documents
from brisk.data.raw_files import checksum
from brisk.data.tokenize_files import parts, utf8_length
from brisk.data.tokenizer import ByteTokenizer, CharTokenizer, code_points, learn_words
from brisk.errors import UserError, note

SAMPLE = 2**24  # characters that `measure_text` reads
TINY, SMALL_CJK = 20e3, 2e6  # bytes; smaller texts are tokenized by character
FEW = 16  # texts with at most this many different characters too: sums, DNA
BPE_SIZES = [(0.5e6, 1024), (2e6, 2048), (8e6, 4096), (float("inf"), 8192)]  # (bytes, vocab_size)
MOST_WORDS = 8192  # default vocabulary of words
# Code points of scripts without spaces between words, or with thousands of characters.
CJK = [(0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)]


@dataclass(frozen=True)
class TextStats:
    """Size and script of a text. `bytes` and `characters` are estimates unless `is_whole`."""

    bytes: int  # in UTF-8
    characters: int
    is_whole: bool  # whether all of the text was read
    distinct: int  # different characters in the text read
    cjk: float  # fraction of Chinese, Japanese and Korean characters
    letters: float  # fraction of alphabetic characters, including CJK


def measure_text(corpus, size=0, limit=SAMPLE):
    """Compute the `TextStats` of a corpus from its first `limit` characters. The totals of a longer
    corpus are estimated from `size`, the number of bytes in its files."""
    counts, length, characters, is_whole = np.zeros(0x110000, dtype=np.int64), 0, 0, True
    for text in large_pieces(corpus):
        if characters >= limit:
            is_whole = False
            break
        counts += np.bincount(code_points(text), minlength=len(counts))
        length, characters = length + utf8_length(text), characters + len(text)
    seen = np.flatnonzero(counts)
    letters = sum(int(counts[code]) for code in seen if chr(code).isalpha())
    cjk = sum(int(counts[first : last + 1].sum()) for first, last in CJK)
    share = 1.0 if is_whole else max(1.0, size / length)
    return TextStats(
        bytes=round(length * share),
        characters=round(characters * share),
        is_whole=is_whole,
        distinct=len(seen),
        cjk=cjk / max(1, characters),
        letters=letters / max(1, characters),
    )


def large_pieces(documents, size=2**20):
    """Yield the text of all documents in strings of at least `size` characters except the last."""
    waiting, length = [], 0
    for piece in pieces(documents):
        waiting.append(piece)
        length += len(piece)
        if length >= size:
            yield "".join(waiting)
            waiting, length = [], 0
    yield "".join(waiting)


def choose_tokenizer(stats):
    """Choose a tokenizer from `TextStats`: ("char", 0), or ("bpe", vocab_size).

    Measured: bits per byte of validation text after 60 s of training on one core, relative to
    character tokens (the model of config/train_shakespeare_char_cpu.py, one seed, shared machine).

        text                        bpe of 512  1024  2048  4096
        English abstracts, 50 kB          0.90  0.86
        Chinese reviews, 0.3 MB           1.13  1.04  1.00  1.00
        Shakespeare, 1.1 MB               0.89  0.86  0.84  0.84

    A BPE learns alphabetic text faster; on Chinese text it is no better than characters. On the
    abstracts characters reach 0.95 after 180 s and then overfit, so the BPE stays ahead. Texts
    above 1.1 MB were not measured; their sizes extrapolate the trend.
    """
    small = SMALL_CJK if stats.cjk > 0.3 else TINY
    if stats.bytes < small or stats.distinct <= FEW:
        return "char", 0
    return "bpe", bpe_size(stats)


def bpe_size(stats):
    """Vocabulary size of a BPE. It doubles when the text is four times as large."""
    if stats.cjk > 0.3:  # thousands of characters need an id before any word
        return BPE_SIZES[-1][1]
    return next(size for limit, size in BPE_SIZES if stats.bytes < limit)


def prepare(
    inputs,
    folder="",
    *,
    tokenizer="auto",
    vocab_size=0,
    column="",
    documents="files",
    encoding="auto",
    val_share=0.1,
    bpe_sample=8,
    min_count=2,
    num_proc=0,
    reuse=True,
):
    """Make a data set from `inputs` and return its folder.

    Args:
        inputs: files, folders and patterns, separated by commas; or a data set on the hub.
        folder: output folder; if empty, data/<name of the first input>. If that was made from
            another text or with other arguments: data/<name>-2, and so on.
        tokenizer: auto (see `choose_tokenizer`), char, byte, word, bpe or gpt2.
        vocab_size: vocabulary of a BPE, or maximum number of words; 0: depends on the text size.
        column, documents, encoding: see `Corpus`.
        val_share: fraction of the documents for validation; of a single one, its end.
        bpe_sample: MB of training text to train a BPE on.
        min_count: rarer words are unknown.
        num_proc: number of processes that tokenize; 0: one for each core.
        reuse: keep a data set that was made from the same contents with the same arguments, and
            refuse to replace a different one. Otherwise replace it.

    Raises `UserError` if the inputs cannot be used.
    """
    if not inputs.strip(", "):
        raise UserError("name a file, a folder or a data set on the hub: --input=PATH")
    files = find_files(inputs)
    before = file_stats(files)
    wanted = {"sha256": checksum_of(files, inputs), "asked": [tokenizer, vocab_size]}
    wanted |= {"column": column, "documents": documents, "encoding": encoding}
    wanted |= {"val_share": val_share, "bpe_sample": bpe_sample, "min_count": min_count}
    if reuse:
        folder, is_made = find_folder(folder, inputs, wanted)
        if is_made:
            print(f"{folder} was made from this text; using it")
            return folder
    corpus = Corpus(inputs, column, encoding, lines=documents == "lines")
    size = sum(size for _, size, _ in before)
    tokenizer, vocab_size = resolve(tokenizer, vocab_size, corpus, size)
    is_one = len(list(islice(corpus, 2))) == 1
    splits = split_documents(corpus, val_share)
    if tokenizer == "char":
        made = CharTokenizer(characters_of(corpus), eot=not is_one)
    elif tokenizer == "word":
        words = (text for document in splits["train"] for text, _ in parts(document))
        made = learn_words(words, min_count, vocab_size or MOST_WORDS, eot=not is_one)
        if len(made.words) < vocab_size:
            found = f"only {len(made.words):,} words occur at least {min_count} times"
            print(f"vocab_size={vocab_size}: {found}")
    elif tokenizer == "bpe":
        made = train_bpe(sample_evenly(splits["train"], bpe_sample), vocab_size)
    else:
        made = ByteTokenizer() if tokenizer == "byte" else gpt2()
    print(f"tokenizer: {tokenizer}, {made.vocab_size:,} tokens")
    splits["val"] = Unchanged(splits["val"], files, before)
    source = Path(inputs).name if os.path.exists(inputs) else inputs
    write_dataset(folder, made, splits, source, not is_one, num_proc, extra={"made_from": wanted})
    return Path(folder)


def resolve(tokenizer, vocab_size, corpus, size):
    """Return (tokenizer, vocab_size) with auto and 0 resolved. `size`: bytes in the files."""
    if tokenizer not in ("auto", "bpe") or (tokenizer == "bpe" and vocab_size):
        return tokenizer, vocab_size
    stats = measure_text(corpus, size)
    if tokenizer == "auto":
        tokenizer = choose_tokenizer(stats)[0]
        if tokenizer == "bpe" and not find_spec("tokenizers"):
            note("using characters: a BPE needs tokenizers: pip install tokenizers")
            tokenizer = "char"
    return tokenizer, vocab_size or bpe_size(stats)


def characters_of(documents):
    """The different characters of all documents, sorted."""
    characters = set()
    for piece in pieces(documents):
        characters.update(piece)
    return sorted(characters)


# ----------------------------------------------------------------------------- existing sets


class Unchanged:
    """The documents of files. Raises `UserError` at the end if a file changed since `before`."""

    def __init__(self, documents, files, before):
        self.documents, self.files, self.before = documents, files, before

    def __iter__(self):
        yield from self.documents
        now = file_stats(self.files)
        if changed := [file for file, *_ in set(self.before) - set(now)]:
            raise UserError(f"{min(changed)} changed during reading; run this again")

    def __length_hint__(self):
        return length_hint(self.documents, 0)


def file_stats(files):
    """(name, size, modification time) of each file."""
    found = ((file, file.stat()) for file in files if file.exists())
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def checksum_of(files, inputs):
    """SHA-256 of the contents and suffixes of the files; of the name of a data set on the hub."""
    try:
        parts = [f"{''.join(file.suffixes)} {checksum(file)}" for file in files]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return hashlib.sha256(
        "\n".join(parts or [inputs]).encode("utf-8", "surrogateescape")
    ).hexdigest()


def find_folder(folder, inputs, wanted):
    """Return the folder to write to, and whether it already has the data set `wanted`.

    Raises `UserError` if `folder` is given and has a different data set.
    """
    name = re.sub(r"[^\w-]+", "_", first_name(inputs)).strip("_") or "text"
    names = [folder] if folder else [f"data/{name}", *(f"data/{name}-{i}" for i in range(2, 1000))]
    for path in map(Path, names):
        state = state_of(path, wanted)
        if state != "other":
            if not folder and path.name != name:
                print(f"data/{name} has another text or tokenizer; using {path}")
            return path, state == "made"
    raise UserError(
        f"{names[0]} was made from another text or with other arguments; name another folder, or "
        "remove it"
    )


def first_name(inputs):
    """The name of the first input, without suffixes."""
    first = Path(inputs if os.path.exists(inputs) else inputs.split(",")[0].strip())
    name = first.resolve().name if first.exists() else first.name
    return name.split(".")[0] or name


def state_of(folder, wanted):
    """The state of a folder: "made" if it has the data set `wanted`; "free" if it has no data set,
    or a damaged one made the same way; otherwise "other"."""
    names = ("meta.json", "meta.pkl", "train.bin", "val.bin", "prepare.py")
    if not folder.is_file() and not any((folder / name).exists() for name in names):
        return "free"
    try:
        made_from = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        return "other"
    if made_from != wanted:
        return "other"
    try:
        whole = read_meta(folder) and all((folder / f"{s}.bin").exists() for s in ("train", "val"))
    except UserError:
        whole = False
    return "made" if whole else "free"
