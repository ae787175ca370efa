"""Byte-pair encoding: GPT-2's vocabulary, and training a new one."""

import base64
import random
import time
from functools import cache
from itertools import product

from brisk.data.tokenizer import EOT, REPLACEMENT, Tokenizer
from brisk.errors import UserError

# GPT-2 splits text into words, numbers, punctuation and white space before it merges pairs.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# tiktoken's spelling of it: equivalent, but faster.
TIKTOKEN_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
GPT2_PATTERNS = (GPT2_PATTERN, TIKTOKEN_PATTERN)
# One character of each Unicode category (except surrogates, which UTF-8 cannot encode), and others
# that patterns distinguish.
KINDS = "aAǅʰ中\u0301\u0903\u20dd1Ⅷ²_-()«»!+$^©\u2028\u2029 \x00\u200b\ue000\u0378"
KINDS += "'’stſ\n\r\t\x0b\x1c\x85\xa0\u3000\u200d\ufeff/.🙂éא"


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016; on bytes, Radford et al. 2019) with tiktoken.

    Args:
        encoding: a `tiktoken.Encoding`. The ids of its ordinary tokens start at 0 and have no gaps.

    Raises ValueError if a byte has no id.
    """

    kind = "bpe"

    def __init__(self, encoding):
        if not all(bytes([byte]) in encoding._mergeable_ranks for byte in range(256)):
            raise ValueError("the vocabulary lacks single bytes, so some text cannot be encoded")
        self.encoding = encoding
        self.eot = encoding._special_tokens.get(EOT)
        self.vocab_size = encoding.n_vocab

    def encode_ordinary(self, text):
        # like tiktoken's encode_ordinary, but without a Python int for each token
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate: replaced by U+FFFD, as tiktoken does
            valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.encode_ordinary(valid)
        except ValueError as error:  # its regex engine fails on a million spaces in a row
            raise UserError(f"the tokenizer cannot split this text: {error}") from error

    def token_bytes(self, token):
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return REPLACEMENT

    def to_dict(self):
        # tiktoken has no public names for these; its README uses the private ones
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
        """Rebuild a tokenizer from the dict of `to_dict`. Raises ValueError if it is damaged."""
        tokens = [base64.b64decode(token) for token in description["tokens"].split(" ")]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        encoding = tiktoken().Encoding(
            description["name"],
            pat_str=description["pattern"],
            mergeable_ranks=ranks,
            special_tokens=description["special_tokens"],
        )
        if len(ranks) < len(tokens):
            raise ValueError("a token occurs twice")
        tokenizer = cls(encoding)
        if not splits_all_text(encoding):
            raise ValueError("its pattern does not match all text")
        return tokenizer


def splits_all_text(encoding):
    """Whether the pattern of a `tiktoken.Encoding` splits any text into pieces without omissions.
    With a pattern that does not, tiktoken drops text or aborts the process.

    This cannot be proved for every pattern, so it is tested: on characters of every category,
    alone, in pairs, in runs and mixed, and on consecutive code points. It takes about 40 ms.
    """
    import regex  # tiktoken's fallback engine

    pattern = encoding._pat_str
    if pattern in GPT2_PATTERNS:
        return True
    end = time.monotonic() + 2

    def left():  # seconds; a pattern may backtrack for hours
        return max(end - time.monotonic(), 0.001)

    try:
        # atomic and possessive: each piece starts where the last one ended, without backtracking
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
    return encoding.decode(encoding.encode_ordinary(long[0])) == long[0]  # with tiktoken's engine


@cache
def trial_texts():
    """Return (short, long): lists of texts for `splits_all_text`."""
    words = [*KINDS, "it's", "WE'LL", "don’t", "12,345.6", "a_b", "\r\n", "\n\n", "  \n", "://"]
    runs = [kind * length for kind in KINDS for length in (3, 4, 5, 8, 17, 64)]
    mix = "".join(random.Random(0).choices([*words, *runs[::6]], k=5000))
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 64)]
    pairs = ["".join(pair) for pair in product(KINDS, repeat=2)]
    ascii_pairs = "".join(chr(a) + chr(b) for a in range(128) for b in range(128))
    return ["", *KINDS, *runs], [mix, ascii_pairs, "".join(map(chr, codes)), *pairs]


def gpt2():
    """GPT-2's tokenizer: 50257 ids, <|endoftext|> last. Raises `UserError` without a network."""
    try:
        return BPETokenizer(tiktoken().get_encoding("gpt2"))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            "cannot download GPT-2's vocabulary; set TIKTOKEN_CACHE_DIR to a folder where tiktoken "
            f"has stored it ({type(error).__name__})"
        ) from error


def train_bpe(texts, vocab_size):
    """Train a byte-pair encoding on `texts` (an iterable of strings) and return its tokenizer.

    Its `vocab_size` ids are the 256 bytes, the merged pairs and <|endoftext|>; fewer if the text
    has too few pairs. Raises `UserError` if `vocab_size` is below 257.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size} is below 257: a BPE has 256 bytes and {EOT}")
    ids = train_merges(texts, vocab_size - 1).get_vocab()
    if len(ids) < vocab_size - 1:
        print(f"vocab_size={vocab_size}: this text has too few pairs, using {len(ids) + 1}")
        vocab_size = len(ids) + 1
    alphabet = byte_alphabet()
    ranks = {bytes(alphabet[letter] for letter in token): ids[token] for token in ids}
    special = {EOT: vocab_size - 1}
    return BPETokenizer(
        tiktoken().Encoding(
            "trained", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
    )


def train_merges(texts, vocab_size):
    """Train a `tokenizers.Tokenizer` with `vocab_size` ids on `texts`."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError("training a BPE needs tokenizers: pip install tokenizers") from error
    pieces = pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # a run of a million letters would take hours, so training splits it into pieces of 64
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
    """{character: byte}: the 256 characters by which the tokenizers library represents bytes, as
    in GPT-2's encoder.py. Printable bytes represent themselves, the others start at U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    shown = {chr(byte): byte for byte in visible}
    return shown | {chr(256 + number): byte for number, byte in enumerate(hidden)}


def tiktoken():
    """Import tiktoken, which only a BPE needs. Raises `UserError` if it is not installed."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError("this tokenizer needs tiktoken: pip install tiktoken") from error
    return tiktoken
