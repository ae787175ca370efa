"""Text ↔ token ids: characters, bytes, words, byte-pair encodings (GPT-2's, or trained here).

Every tokenizer has the same few members, and nothing else is asked of one:

    kind, vocab_size    its name in a file; the number of ids it has
    eot                 the id that ends a document, or None
    unk                 the id of a word it does not know, or None where nothing is unknown
    encode(text)        ids as a numpy array of `id_dtype(vocab_size)`; with `allow_eot=True` a
                        literal <|endoftext|> in the text becomes the id `eot`, where there is one
    decode(ids)         the text; ids it does not have and broken UTF-8 become U+FFFD
    token_bytes(id)     the UTF-8 bytes of one token, which may be a part of a character
    to_dict()           all of it as plain values, for JSON or a checkpoint; back by `from_dict`
"""

import base64
import pickle
import re
from collections import Counter
from itertools import chain

import numpy as np

from brisk.errors import UserError

EOT = "<|endoftext|>"
UNK = "<|unknown|>"
WORD = re.compile(r"\.?\w[\w'’.&]*\w|\w\+*#?")
# How GPT-2 cuts text before pairs are merged: words, numbers, signs, white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def id_dtype(vocab_size):
    """The numpy type of token ids: uint16 where the vocabulary fits, else uint32."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class CharTokenizer:
    """One id for each character of `characters`, in that order, and one more with `eot=True`.

    `CharTokenizer.of(text)` numbers the characters of a text as nanoGPT does.
    """

    kind = "char"
    unk = None

    def __init__(self, characters, eot=False):
        self.characters = list(characters)
        self.eot = len(self.characters) if eot else None
        self.vocab_size = len(self.characters) + bool(eot)
        # A table from code point to id; its last entry stands for all code points past the end.
        codes = np.array([ord(character) for character in self.characters], dtype=np.int64)
        self.table = np.full(codes.max(initial=0) + 2, -1, dtype=np.int32)
        self.table[codes] = np.arange(len(codes))
        # The same for ASCII alone, where every id fits into a byte; 255 stands for the others.
        few = np.full(256, 255, dtype=np.uint8)
        few[: min(128, len(self.table) - 1)] = self.table[:-1][:128]  # -1 wraps around to 255
        self.ascii_table = few.tobytes() if self.vocab_size < 255 else None

    @classmethod
    def of(cls, text):
        """One for the characters that `text` has, in the order of their code points."""
        counts = np.bincount(code_points(text), minlength=1)
        return cls(map(chr, np.flatnonzero(counts)))

    def encode(self, text, allow_eot=False):
        """Raises `UserError` for characters outside the vocabulary."""
        return encode_around_eot(self, self.encode_ordinary, text, allow_eot)

    def encode_ordinary(self, text):
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
                f"characters: {shown}; leave them out"
            )
        return ids

    def decode(self, ids):
        return decode_tokens(self, ids)

    def token_bytes(self, token):
        if 0 <= token < len(self.characters):
            return self.characters[token].encode("utf-8", "surrogatepass")
        return EOT.encode() if token == self.eot else REPLACEMENT

    def to_dict(self):
        eot = self.eot is not None
        return {"kind": self.kind, "characters": "".join(self.characters), "eot": eot}


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for the end of a document: any text, nothing to learn."""

    kind = "byte"
    unk = None
    eot = 256
    vocab_size = 257

    def encode(self, text, allow_eot=False):
        return encode_around_eot(self, self.encode_ordinary, text, allow_eot)

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)

    def decode(self, ids):
        return decode_tokens(self, ids)

    def token_bytes(self, token):
        if 0 <= token < 256:
            return bytes([token])
        return EOT.encode() if token == self.eot else REPLACEMENT

    def to_dict(self):
        return {"kind": self.kind}


class WordTokenizer:
    """One id for each of `words`, then one for an unknown word, and one more with `eot=True`.

    A word is letters, digits and underscores, with what belongs to it in don't, .net, at&t, c++;
    whatever is between words is left out, so text comes back as its words with a space after
    each. Not for scripts without spaces.

    Args:
        words: the known words, none of them twice.
        stop_words: words that are left out of every text.
        lower: whether text is lower-cased first.
    """

    kind = "word"

    def __init__(self, words, stop_words=(), lower=True, eot=False):
        self.words, self.stop_words, self.lower = list(words), frozenset(stop_words), lower
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.unk = len(self.words)
        self.eot = self.unk + 1 if eot else None
        self.vocab_size = self.unk + 1 + bool(eot)

    def encode(self, text, allow_eot=False):
        return encode_around_eot(self, self.encode_ordinary, text, allow_eot)

    def encode_ordinary(self, text):
        words = find_words(text, self.stop_words, self.lower)
        return [self.ids.get(word, self.unk) for word in words]

    def decode(self, ids):
        return decode_tokens(self, ids)

    def token_bytes(self, token):
        if 0 <= token < len(self.words):
            return self.words[token].encode("utf-8", "surrogatepass") + b" "
        return {self.eot: EOT.encode(), self.unk: UNK.encode() + b" "}.get(token, REPLACEMENT)

    def to_dict(self):
        stop_words, eot = sorted(self.stop_words), self.eot is not None
        settings = {"stop_words": stop_words, "lower": self.lower, "eot": eot}
        return {"kind": self.kind, "words": self.words, **settings}


def find_words(text, stop_words=frozenset(), lower=True):
    """The words of `text` as `WordTokenizer` sees them, in order."""
    words = WORD.findall(text.lower() if lower else text)
    return [word for word in words if word not in stop_words] if stop_words else words


def learn_words(texts, min_count=1, max_words=None, **settings):
    """A `WordTokenizer` of the words that `texts` (an iterable of strings) has at least `min_count`
    times, the most frequent first; `settings` are its other arguments."""
    seen = {key: settings[key] for key in ("stop_words", "lower") if key in settings}
    counts = Counter(chain.from_iterable(find_words(text, **seen) for text in texts))
    words = [word for word, count in counts.most_common(max_words) if count >= min_count]
    return WordTokenizer(words, **settings)


class BPETokenizer:
    """Byte-pair encoding (Sennrich et al. 2016; on bytes, Radford et al. 2019), run by tiktoken.

    Args:
        encoding: a `tiktoken.Encoding` whose ordinary tokens are numbered from 0 without a gap.

    Raises ValueError for one that has no id for some byte.
    """

    kind = "bpe"
    unk = None

    def __init__(self, encoding):
        if not all(bytes([byte]) in encoding._mergeable_ranks for byte in range(256)):
            raise ValueError("the byte pairs lack single bytes, so some text has no ids")
        self.encoding = encoding
        self.eot = encoding._special_tokens.get(EOT)
        self.vocab_size = encoding.n_vocab

    def encode(self, text, allow_eot=False):
        return encode_around_eot(self, self.encode_ordinary, text, allow_eot)

    def encode_ordinary(self, text):
        # As tiktoken's encode_ordinary, but without a Python int for each token.
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, which no UTF-8 has: U+FFFD, as there
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.encode_ordinary(whole)
        except ValueError as error:  # its regular expressions end at a million spaces in a row
            raise UserError(f"the tokenizer cannot cut this text: {error}") from error

    def decode(self, ids):
        return decode_tokens(self, ids)

    def token_bytes(self, token):
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return REPLACEMENT

    def to_dict(self):
        # tiktoken shows its tables under these names only, and its own README says to use them.
        ranks = self.encoding._mergeable_ranks
        tokens = [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)]
        return {
            "kind": self.kind,
            "name": self.encoding.name,
            "pattern": self.encoding._pat_str,
            "special_tokens": dict(self.encoding._special_tokens),
            "tokens": " ".join(tokens),
        }


def encode_around_eot(tokenizer, encode_ordinary, text, allow_eot):
    """The ids of `text`; with `allow_eot` each literal <|endoftext|> is the id `tokenizer.eot`."""
    dtype = id_dtype(tokenizer.vocab_size)
    if not allow_eot or tokenizer.eot is None:
        return np.asarray(encode_ordinary(text), dtype=dtype)
    first, *rest = text.split(EOT)
    pieces = [encode_ordinary(first)]
    for piece in rest:
        pieces += [[tokenizer.eot], encode_ordinary(piece)]
    return np.concatenate([np.asarray(piece, dtype=dtype) for piece in pieces])


def code_points(text):
    """The number of each character of `text`, an array."""
    if text.isascii():
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def decode_tokens(tokenizer, ids):
    """The text of `ids`, a sequence of ints, an array or a tensor on the CPU. Never fails."""
    tokens = map(tokenizer.token_bytes, np.asarray(ids).ravel().tolist())
    return b"".join(tokens).decode("utf-8", errors="replace")


def knows_documents(rows, tokenizer):
    """Whether a model trained on such `rows` knows where documents begin and end: it read them one
    by one, or its characters or words have an end-of-text, which they have for documents only."""
    return tokenizer.eot is not None and (rows == "documents" or tokenizer.kind in ("char", "word"))


def from_dict(description):
    """The tokenizer that `to_dict` described; needs no files and no network.

    Raises `UserError` where the description is not one.
    """
    try:
        kind = description["kind"]
        if kind == "char":
            return CharTokenizer(description["characters"], eot=description["eot"])
        if kind == "byte":
            return ByteTokenizer()
        if kind == "word":
            settings = (description[key] for key in ("words", "stop_words", "lower", "eot"))
            return WordTokenizer(*settings)
        if kind == "bpe":
            tokens = [base64.b64decode(token) for token in description["tokens"].split(" ")]
            ranks = {token: rank for rank, token in enumerate(tokens)}
            encoding = tiktoken().Encoding(
                description["name"],
                pat_str=description["pattern"],
                mergeable_ranks=ranks,
                special_tokens=description["special_tokens"],
            )
            if len(ranks) < len(tokens):
                raise ValueError("a token is there twice")
            if not cuts_all(description["pattern"]):
                raise ValueError("its pattern does not cut text into pieces")
            return BPETokenizer(encoding)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"the description of the tokenizer is damaged ({error!r})") from error
    raise UserError(f"there is no tokenizer of kind {kind!r} here; a newer version may have it")


def cuts_all(pattern):
    """Whether a regular expression cuts text into pieces and leaves nothing out: with another,
    tiktoken drops text, or ends the process."""
    import regex  # as tiktoken does

    text = "".join(map(chr, range(256))) + " it's 12 naïve\r\n\n 中文 🙂\t "
    try:
        pieces = [match[0] for match in regex.finditer(pattern, text, timeout=1)]
    except (regex.error, TimeoutError):
        return False
    return all(pieces) and "".join(pieces) == text


def gpt2():
    """GPT-2's tokenizer: 50257 ids, the last of them <|endoftext|>."""
    try:
        return BPETokenizer(tiktoken().get_encoding("gpt2"))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            "cannot get GPT-2's vocabulary from the network; set TIKTOKEN_CACHE_DIR to a folder "
            f"where tiktoken has stored it before ({type(error).__name__})"
        ) from error


def train_bpe(texts, vocab_size):
    """A byte-pair encoding learned from `texts` (an iterable of strings), with `vocab_size` ids:
    the 256 bytes, the merged pairs, and <|endoftext|>.

    Raises `UserError` where the vocabulary has no room for that, or the text too few pairs.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: a BPE has at least the 256 bytes and {EOT}")
    ids = learn_pairs(texts, vocab_size - 1).get_vocab()
    if len(ids) < vocab_size - 1:
        most = len(ids) + 1
        raise UserError(
            f"vocab_size={vocab_size}: this text has pairs for {most} at the most, take fewer"
        )
    alphabet = byte_alphabet()
    ranks = {bytes(alphabet[letter] for letter in token): ids[token] for token in ids}
    special = {EOT: vocab_size - 1}
    return BPETokenizer(
        tiktoken().Encoding(
            "trained", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
    )


def learn_pairs(texts, vocab_size):
    """A `tokenizers.Tokenizer` with the bytes and the most frequent pairs of `texts`."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError("training a BPE needs tokenizers: pip install tokenizers") from error
    pieces = pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # A run of a million letters would take hours: learning looks at this much of it at a time.
    short = pre_tokenizers.Split(Regex(r"[\s\S]{1,64}"), "isolated")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([pieces, short, as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=list(byte_alphabet()), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learner.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    return learner


def byte_alphabet():
    """The 256 characters as which the tokenizers library writes bytes (GPT-2's encoder.py):
    visible ones stand for themselves, the others are numbered from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    shown = {chr(byte): byte for byte in visible}
    return shown | {chr(256 + number): byte for number, byte in enumerate(hidden)}


def tiktoken():
    """The module tiktoken, imported when a BPE is asked for: characters and bytes do without."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError("this tokenizer needs tiktoken: pip install tiktoken") from error
    return tiktoken


def read_meta_pkl(path):
    """The tokenizer of a character set that nanoGPT prepared, from its `meta.pkl`.

    Raises `UserError` for a file that is damaged or holds anything but plain values.
    """
    try:
        with open(path, "rb") as file:
            itos = PlainUnpickler(file).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        eot = characters[-1:] == [EOT]
        return CharTokenizer(characters[:-1] if eot else characters, eot)
    except Exception as error:  # a damaged pickle can raise any error there is
        raise UserError(f"cannot read the characters in {path}: {error!r}") from error


class PlainUnpickler(pickle._Unpickler):
    """Admits dicts, lists, tuples, strings, numbers, and numpy integers, which become ints.

    A pickle may name any function to be called; here a name finds one of two stand-ins for
    numpy's own, or an error. It is the unpickler written in Python: the one in C makes a table as
    long as the largest number that a few bytes in the file say.
    """

    def find_class(self, module, name):
        class IntegerType:
            def __init__(self, code, *_):
                if code[0] not in "iu":
                    raise pickle.UnpicklingError(f"numpy type {code} is not an integer")
                self.signed = code[0] == "i"

            def __setstate__(self, state):
                self.byteorder = "big" if state[1] == ">" else "little"

        def integer(dtype, raw):
            return int.from_bytes(raw, dtype.byteorder, signed=dtype.signed)

        if (module, name) == ("numpy", "dtype"):
            return IntegerType
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return integer
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")
