"""Byte-pair encodings: GPT-2's, and those trained here."""

import base64
import random
import time
from functools import cache
from itertools import product

from brisk.data.tokenizer import EOT, REPLACEMENT, Tokenizer
from brisk.errors import UserError

# How GPT-2 cuts text before pairs are merged: words, numbers, signs, white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# As tiktoken writes it: it cuts every text in the same way, but is faster.
TIKTOKENS_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
GPT2_PATTERNS = (GPT2_PATTERN, TIKTOKENS_PATTERN)
# A character of each category of Unicode (but surrogates, which no text in UTF-8 has), and further
# ones that patterns tell apart.
KINDS = "aAǅʰ中\u0301\u0903\u20dd1Ⅷ²_-()«»!+$^©\u2028\u2029 \x00\u200b\ue000\u0378"
KINDS += "'’stſ\n\r\t\x0b\x1c\x85\xa0\u3000\u200d\ufeff/.🙂éא"


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016; on bytes, Radford et al. 2019), run by tiktoken.

    Args:
        encoding: a `tiktoken.Encoding` whose ordinary tokens are numbered from 0 without a gap.

    Raises ValueError for one that has no id for some byte.
    """

    kind = "bpe"

    def __init__(self, encoding):
        if not all(bytes([byte]) in encoding._mergeable_ranks for byte in range(256)):
            raise ValueError("the byte pairs lack single bytes, so some text has no ids")
        self.encoding = encoding
        self.eot = encoding._special_tokens.get(EOT)
        self.vocab_size = encoding.n_vocab

    def encode_ordinary(self, text):
        # As tiktoken's encode_ordinary, but without a Python int for each token.
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, which no UTF-8 has: U+FFFD, as there
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.encode_ordinary(whole)
        except ValueError as error:  # its regular expressions end at a million spaces in a row
            raise UserError(f"the tokenizer cannot cut this text: {error}") from error

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

    @classmethod
    def from_dict(cls, description):
        """The tokenizer that `to_dict` described. Raises ValueError for a damaged description."""
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
        tokenizer = cls(encoding)
        if not cuts_all(encoding):
            raise ValueError("its pattern does not cut text into pieces")
        return tokenizer


def cuts_all(encoding):
    """Whether the pattern of a `tiktoken.Encoding` cuts any text into pieces and leaves nothing
    out: with another, tiktoken drops text, or ends the process.

    This cannot be proved of every pattern, so it is tried: on characters of every kind, alone, in
    pairs, in runs and mixed, and on code points in their order. It takes about 40 ms.
    """
    import regex  # as tiktoken does

    pattern = encoding._pat_str
    if pattern in GPT2_PATTERNS:
        return True
    end = time.monotonic() + 2

    def left():
        return max(end - time.monotonic(), 0.001)

    try:
        # Atomic and possessive: each piece begins where the last one ends, nothing is tried again.
        piece, pieces = regex.compile(pattern), regex.compile(f"(?>{pattern})++")
        short, long = trial_texts()
        for text in short:
            found = [match[0] for match in piece.finditer(text, timeout=left())]
            if not all(found) or "".join(found) != text:
                return False
        if not all(pieces.fullmatch(text, timeout=left()) for text in long):
            return False
    except (regex.error, TimeoutError, RecursionError):
        return False
    return encoding.decode(encoding.encode_ordinary(long[0])) == long[0]  # the engine in use


@cache
def trial_texts():
    """(short, long) texts for `cuts_all`."""
    words = [*KINDS, "it's", "WE'LL", "don’t", "12,345.6", "a_b", "\r\n", "\n\n", "  \n", "://"]
    runs = [kind * length for kind in KINDS for length in (3, 4, 5, 8, 17, 64)]
    mix = "".join(random.Random(0).choices([*words, *runs[::6]], k=5000))
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 64)]
    pairs = ["".join(pair) for pair in product(KINDS, repeat=2)]
    ascii_pairs = "".join(chr(a) + chr(b) for a in range(128) for b in range(128))
    return ["", *KINDS, *runs], [mix, ascii_pairs, "".join(map(chr, codes)), *pairs]


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
    the 256 bytes, the merged pairs, and <|endoftext|>. Where the text has fewer pairs, so has it.

    Raises `UserError` where the vocabulary has no room for the bytes.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: a BPE has at least the 256 bytes and {EOT}")
    ids = learn_pairs(texts, vocab_size - 1).get_vocab()
    if len(ids) < vocab_size - 1:
        print(f"vocab_size={vocab_size}: this text has too few pairs, taking {len(ids) + 1}")
        vocab_size = len(ids) + 1
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
