"""Load tokenizers from `meta.json` and checkpoints, and from nanoGPT's `meta.pkl`."""

import pickle

from brisk.data.bpe import GPT2_PATTERN, GPT2_PATTERNS, BPETokenizer
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer, WordTokenizer
from brisk.errors import UserError


def from_dict(description):
    """Build a tokenizer from the dict that its `to_dict` returned. Needs no files or network.

    Raises `UserError` if the dict is damaged.
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
    raise UserError(f"unknown tokenizer kind {kind!r}; a newer version may support it")


def same_tokenizer(a, b):
    """Whether two tokenizers encode every text to the same ids."""
    return comparable(a) == comparable(b)


def comparable(tokenizer):
    """The dict of a tokenizer without the parts that do not affect ids: the name of a BPE, and the
    spelling of GPT-2's pattern. A tokenizer.json does not keep them."""
    description = tokenizer.to_dict()
    description.pop("name", None)
    if description.get("pattern") in GPT2_PATTERNS:
        description["pattern"] = GPT2_PATTERN
    return description


def read_meta_pkl(path):
    """Load the character tokenizer in nanoGPT's `meta.pkl`.

    Raises `UserError` if the file is damaged or has anything except plain values.
    """
    try:
        with open(path, "rb") as file:
            itos = PlainUnpickler(file).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        eot = characters[-1:] == [EOT]
        return CharTokenizer(characters[:-1] if eot else characters, eot)
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"cannot read the characters in {path}: {error!r}") from error


class PlainUnpickler(pickle._Unpickler):
    """Unpickler for dicts, lists, tuples, strings, numbers and numpy integers, which become ints.

    A pickle can name any function to call. Here the only names are two that load numpy integers,
    and each is replaced by a harmless function. The base class is the unpickler in Python: the one
    in C allocates a memo table as large as any index in the file.
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
