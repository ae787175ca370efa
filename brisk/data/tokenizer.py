"""Tokenizer interface, and tokenizers for characters, bytes and words."""

import re
from collections import Counter
from itertools import chain

import numpy as np

from brisk.errors import UserError

EOT = "<|endoftext|>"
UNK = "<|unknown|>"
WORD = re.compile(r"\.?\w[\w'’.&]*\w|\w\+*#?")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def id_dtype(vocab_size):
    """The numpy type of token ids: uint16 if the vocabulary fits, else uint32."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class Tokenizer:
    """Base class of all tokenizers. A subclass has:

    kind, vocab_size    its name in a file; the number of ids
    encode_ordinary(t)  ids of a text, without special tokens
    token_bytes(id)     the UTF-8 bytes of one token, possibly part of a character
    to_dict()           a dict of plain values for JSON or a checkpoint; the inverse is
                        `brisk.data.saved_tokenizer.from_dict`
    """

    eot = None  # the id of <|endoftext|>, if any
    unk = None  # the id of unknown words, if any

    def encode(self, text, allow_eot=False):
        """Encode a text to a numpy array of `id_dtype(vocab_size)`. With `allow_eot`, a literal
        <|endoftext|> in the text becomes the id `eot`, if there is one."""
        dtype = id_dtype(self.vocab_size)
        if not allow_eot or self.eot is None:
            return np.asarray(self.encode_ordinary(text), dtype=dtype)
        first, *rest = text.split(EOT)
        pieces = [self.encode_ordinary(first)]
        for piece in rest:
            pieces += [[self.eot], self.encode_ordinary(piece)]
        return np.concatenate([np.asarray(piece, dtype=dtype) for piece in pieces])

    def decode(self, ids):
        """Decode `ids`: a sequence of ints, an array or a CPU tensor. Unknown ids and invalid UTF-8
        become U+FFFD."""
        tokens = map(self.token_bytes, np.asarray(ids).ravel().tolist())
        return b"".join(tokens).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One id for each of `characters`, in order; with `eot=True`, followed by <|endoftext|>."""

    kind = "char"

    def __init__(self, characters, eot=False):
        self.characters = list(characters)
        self.eot = len(self.characters) if eot else None
        self.vocab_size = len(self.characters) + bool(eot)
        # Table from code point to id; the last entry is for all code points past its end.
        codes = np.array([ord(character) for character in self.characters], dtype=np.int64)
        self.table = np.full(codes.max(initial=0) + 2, -1, dtype=np.int32)
        self.table[codes] = np.arange(len(codes))
        # The same for ASCII, if all ids fit in a byte; 255 means unknown.
        few = np.full(256, 255, dtype=np.uint8)
        few[: min(128, len(self.table) - 1)] = self.table[:-1][:128]  # -1 wraps around to 255
        self.ascii_table = few.tobytes() if self.vocab_size < 255 else None

    @classmethod
    def of(cls, text):
        """The tokenizer for the characters of `text`, sorted by code point as in nanoGPT."""
        counts = np.bincount(code_points(text), minlength=1)
        return cls(map(chr, np.flatnonzero(counts)))

    def encode_ordinary(self, text):
        """Encode a text. Raises `UserError` for characters outside the vocabulary."""
        if self.ascii_table and text.isascii():
            ids = np.frombuffer(text.encode().translate(self.ascii_table), dtype=np.uint8)
            if 255 not in ids:
                return ids
        codes = code_points(text)
        ids = self.table[np.minimum(codes, np.uint32(len(self.table) - 1))]
        if (ids < 0).any():
            unknown = [chr(code) for code in np.unique(codes[ids < 0])]
            shown = ", ".join(map(repr, unknown[:10])) + (", …" if len(unknown) > 10 else "")
            raise UserError(
                f"the text has characters outside the vocabulary of {len(self.characters)} "
                f"characters: {shown}; remove them"
            )
        return ids

    def token_bytes(self, token):
        if 0 <= token < len(self.characters):
            return self.characters[token].encode("utf-8", "surrogatepass")
        return EOT.encode() if token == self.eot else REPLACEMENT

    def to_dict(self):
        eot = self.eot is not None
        return {"kind": self.kind, "characters": "".join(self.characters), "eot": eot}


class ByteTokenizer(Tokenizer):
    """One id for each byte of UTF-8, and 256 for <|endoftext|>. It encodes any text."""

    kind = "byte"
    eot = 256
    vocab_size = 257

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)

    def token_bytes(self, token):
        if 0 <= token < 256:
            return bytes([token])
        return EOT.encode() if token == self.eot else REPLACEMENT

    def to_dict(self):
        return {"kind": self.kind}


class WordTokenizer(Tokenizer):
    """One id for each of `words`, then one for unknown words; with `eot=True`, <|endoftext|> last.

    A word is letters, digits and underscores, and the punctuation in don't, .net, at&t, c++. All
    other characters are dropped: a decoded text is its words, each followed by a space. Not for
    scripts without spaces.

    Args:
        words: the known words, without duplicates.
        stop_words: words to drop from every text.
        lower: convert text to lower case first.
    """

    kind = "word"

    def __init__(self, words, stop_words=(), lower=True, eot=False):
        self.words, self.stop_words, self.lower = list(words), frozenset(stop_words), lower
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.unk = len(self.words)
        self.eot = self.unk + 1 if eot else None
        self.vocab_size = self.unk + 1 + bool(eot)

    def encode_ordinary(self, text):
        words = find_words(text, self.stop_words, self.lower)
        return [self.ids.get(word, self.unk) for word in words]

    def token_bytes(self, token):
        if 0 <= token < len(self.words):
            return self.words[token].encode("utf-8", "surrogatepass") + b" "
        return {self.eot: EOT.encode(), self.unk: UNK.encode() + b" "}.get(token, REPLACEMENT)

    def to_dict(self):
        stop_words, eot = sorted(self.stop_words), self.eot is not None
        settings = {"stop_words": stop_words, "lower": self.lower, "eot": eot}
        return {"kind": self.kind, "words": self.words, **settings}


def find_words(text, stop_words=frozenset(), lower=True):
    """The words of `text`, in order, as defined in `WordTokenizer`."""
    words = WORD.findall(text.lower() if lower else text)
    return [word for word in words if word not in stop_words] if stop_words else words


def learn_words(texts, min_count=1, max_words=None, **settings):
    """Build a `WordTokenizer` with the words that occur at least `min_count` times in `texts` (an
    iterable of strings), most frequent first. `settings` are its other arguments.

    Raises `UserError` if there are no such words.
    """
    seen = {key: settings[key] for key in ("stop_words", "lower") if key in settings}
    counts = Counter(chain.from_iterable(find_words(text, **seen) for text in texts))
    words = [word for word, count in counts.most_common(max_words) if count >= min_count]
    if not counts:
        besides = " except stop words" if settings.get("stop_words") else ""
        raise UserError(f"the training text has no words{besides}")
    if not words:
        times = f"{min_count} times in the training text"
        raise UserError(f"no word occurs {times}; use a smaller --min_count")
    return WordTokenizer(words, **settings)


def code_points(text):
    """The code points of the characters of `text`, as an array."""
    if text.isascii():
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def knows_documents(rows, tokenizer):
    """Whether a model trained on `rows` has seen document boundaries: it was trained on single
    documents, or its char or word tokenizer has an end-of-text, as only sets of documents do."""
    return tokenizer.eot is not None and (rows == "documents" or tokenizer.kind in ("char", "word"))
