"""Text of your own → a data set: what `data/custom/prepare.py` and a run on a text file share."""

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
TINY, SMALL_CJK = 20e3, 2e6  # bytes below which characters are the tokens
FEW = 16  # different characters up to which they are, too: sums, DNA
BPE_SIZES = [(0.5e6, 1024), (2e6, 2048), (8e6, 4096), (float("inf"), 8192)]  # below so many bytes
MOST_WORDS = 8192  # known words where no number is given
# Code points of scripts that put no space between words, or that have thousands of characters.
CJK = [(0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)]


@dataclass(frozen=True)
class TextStats:
    """Size and script of a text; `bytes` and `characters` are estimates unless `is_whole`."""

    bytes: int  # in UTF-8
    characters: int
    is_whole: bool  # whether all of the text was read
    distinct: int  # different characters in what was read
    cjk: float  # share of Chinese, Japanese and Korean characters
    letters: float  # share of alphabetic characters, those included


def measure_text(corpus, size=0, limit=SAMPLE):
    """The `TextStats` of a corpus, from its first `limit` characters; where there are more, the
    total is estimated from `size`, the bytes of its files."""
    counts, length, characters, is_whole = np.zeros(0x110000, dtype=np.int64), 0, 0, True
    for text in in_large_pieces(corpus):
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


def in_large_pieces(documents, size=2**20):
    """The text of all documents in strings of at least `size` characters, but for the last."""
    waiting, length = [], 0
    for piece in pieces(documents):
        waiting.append(piece)
        length += len(piece)
        if length >= size:
            yield "".join(waiting)
            waiting, length = [], 0
    yield "".join(waiting)


def choose_tokenizer(stats):
    """The tokenizer for a text of such `TextStats`: ("char", 0), or ("bpe", its vocab_size).

    Bits per byte of validation text after 60 s of one core, divided by those with characters (the
    model of config/train_shakespeare_char_cpu.py, one seed, two cores shared with other work):

        text                        bpe of 512  1024  2048  4096
        English abstracts, 50 kB          0.90  0.86
        Chinese reviews, 0.3 MB           1.13  1.04  1.00  1.00
        Shakespeare, 1.1 MB               0.89  0.86  0.84  0.84

    So a BPE learns alphabetic text faster, and Chinese characters are as good as its tokens. In
    180 s characters reach 0.95 on the abstracts, the lowest before they overfit: the BPE stays
    ahead. Texts above 1.1 MB were not measured; the sizes continue the trend.
    """
    small = SMALL_CJK if stats.cjk > 0.3 else TINY
    if stats.bytes < small or stats.distinct <= FEW:
        return "char", 0
    return "bpe", bpe_size(stats)


def bpe_size(stats):
    """The vocabulary of a BPE by the size of its text: four times the text, twice the tokens."""
    if stats.cjk > 0.3:  # thousands of characters come before any word
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
    """Make a data set of `inputs` and return the path of its folder.

    Args:
        inputs: files, folders, patterns, separated by commas, or a data set on the hub.
        folder: where to write; if empty, data/<name of the first input>, or data/<name>-2 and so
            on where that has another text or was made with other choices.
        tokenizer: auto (see `choose_tokenizer`), char, byte, word, bpe or gpt2.
        vocab_size: of a BPE, or the most words; 0: by the size of the text.
        column, documents, encoding: see `Corpus`.
        val_share: share of the documents for validation; of a single one, its end.
        bpe_sample: MB of training text that a BPE is learned from.
        min_count: rarer words are unknown.
        num_proc: processes that tokenize; one for each core if 0.
        reuse: keep a set in the folder that was made from the same contents with the same choices,
            and refuse to replace another; otherwise whatever is there is replaced.

    Raises `UserError` where the inputs cannot be used.
    """
    if not inputs.strip(", "):
        raise UserError("name a file, a folder or a data set on the hub: --input=PATH")
    files = find_files(inputs)
    before = stamps(files)
    wanted = {"sha256": checksum_of(files, inputs), "asked": [tokenizer, vocab_size]}
    wanted |= {"column": column, "documents": documents, "encoding": encoding}
    wanted |= {"val_share": val_share, "bpe_sample": bpe_sample, "min_count": min_count}
    if reuse:
        folder, is_made = find_folder(folder, inputs, wanted)
        if is_made:
            print(f"{folder} was made from this text; using it as it is")
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
            print(f"vocab_size={vocab_size}: {len(made.words):,} words are there often enough")
    elif tokenizer == "bpe":
        made = train_bpe(sample_evenly(splits["train"], bpe_sample), vocab_size)
    else:
        made = ByteTokenizer() if tokenizer == "byte" else gpt2()
    print(f"{tokenizer} tokens, {made.vocab_size:,} of them")
    splits["val"] = Unchanged(splits["val"], files, before)
    source = Path(inputs).name if os.path.exists(inputs) else inputs
    write_dataset(folder, made, splits, source, not is_one, num_proc, extra={"made_from": wanted})
    return Path(folder)


def resolve(tokenizer, vocab_size, corpus, size):
    """The tokenizer and vocabulary that auto and 0 stand for; `size` is the bytes of the files."""
    if tokenizer not in ("auto", "bpe") or (tokenizer == "bpe" and vocab_size):
        return tokenizer, vocab_size
    stats = measure_text(corpus, size)
    if tokenizer == "auto":
        tokenizer = choose_tokenizer(stats)[0]
        if tokenizer == "bpe" and not find_spec("tokenizers"):
            note("characters instead of a BPE, which needs tokenizers: pip install tokenizers")
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
    """Documents of files that must not change before all of them are read."""

    def __init__(self, documents, files, before):
        self.documents, self.files, self.before = documents, files, before

    def __iter__(self):
        yield from self.documents
        now = stamps(self.files)
        if changed := [file for file, *_ in set(self.before) - set(now)]:
            raise UserError(f"{min(changed)} changed while it was read; run this again")

    def __length_hint__(self):
        return length_hint(self.documents, 0)


def stamps(files):
    """(name, size, time of change) of each file."""
    found = ((file, file.stat()) for file in files if file.exists())
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def checksum_of(files, inputs):
    """A SHA-256 of the contents of the files, and of the suffixes by which they are read; a data
    set on the hub is known by its name alone."""
    try:
        parts = [f"{''.join(file.suffixes)} {checksum(file)}" for file in files]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return hashlib.sha256(
        "\n".join(parts or [inputs]).encode("utf-8", "surrogateescape")
    ).hexdigest()


def find_folder(folder, inputs, wanted):
    """The folder to write to, and whether it already holds the set that is `wanted`.

    Raises `UserError` where the folder was named and holds another set.
    """
    name = re.sub(r"[^\w-]+", "_", first_name(inputs)).strip("_") or "text"
    names = [folder] if folder else [f"data/{name}", *(f"data/{name}-{i}" for i in range(2, 1000))]
    for path in map(Path, names):
        state = state_of(path, wanted)
        if state != "other":
            if not folder and path.name != name:
                print(f"data/{name} has another text or other tokens; this one is in {path}")
            return path, state == "made"
    raise UserError(
        f"{names[0]} has another text, or one made with other choices; name another folder, or "
        "remove it"
    )


def first_name(inputs):
    """The name of the first of the inputs, without its suffixes."""
    first = Path(inputs if os.path.exists(inputs) else inputs.split(",")[0].strip())
    name = first.resolve().name if first.exists() else first.name
    return name.split(".")[0] or name


def state_of(folder, wanted):
    """made: a folder has the set that is `wanted`; free: it has none, or a damaged one made from
    the same; other: anything else."""
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
