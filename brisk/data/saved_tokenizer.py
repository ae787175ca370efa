"""Tokenizers in files: as a dict in `meta.json` and checkpoints, and nanoGPT's `meta.pkl`."""

import pickle

from brisk.data.bpe import GPT2_PATTERN, GPT2_PATTERNS, BPETokenizer
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer, WordTokenizer
from brisk.errors import UserError


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
            return BPETokenizer.from_dict(description)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"the description of the tokenizer is damaged ({error!r})") from error
    raise UserError(f"there is no tokenizer of kind {kind!r} here; a newer version may have it")


def same_tokenizer(a, b):
    """Whether two tokenizers give every text the same ids. Neither the label of a byte-pair
    encoding nor the spelling of GPT-2's pattern counts: a tokenizer.json keeps neither."""
    return comparable(a) == comparable(b)


def comparable(tokenizer):
    """The description of a tokenizer without the parts that change no id."""
    description = tokenizer.to_dict()
    description.pop("name", None)
    if description.get("pattern") in GPT2_PATTERNS:
        description["pattern"] = GPT2_PATTERN
    return description


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
