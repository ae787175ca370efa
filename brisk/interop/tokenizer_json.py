"""Convert tokenizers to and from Hugging Face's `tokenizer.json`.

There, bytes are represented by the characters of `byte_alphabet`, and a byte-pair encoding by a
list of merges, instead of tiktoken's token ranks. Only tokenizers that give the same ids for every
text are converted.
"""

import json
from itertools import pairwise
from pathlib import Path

from brisk.data.bpe import GPT2_PATTERN, GPT2_PATTERNS, BPETokenizer, byte_alphabet, tiktoken
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer
from brisk.errors import UserError

LETTERS = {byte: letter for letter, byte in byte_alphabet().items()}


def tokenizer_files(tokenizer, block_size):
    """Return {name: text} of the tokenizer's files in a Hugging Face directory.

    Raises `UserError` if the tokenizer cannot be converted exactly.
    """
    marks = ("bos_token", "eos_token", "pad_token") if tokenizer.eot is not None else ()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # True would change decoded text
        **dict.fromkeys(marks, EOT),
    }
    return {
        "tokenizer.json": to_tokenizers(tokenizer).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }


def to_tokenizers(tokenizer):
    """Convert to a `tokenizers.Tokenizer`. It encodes a literal <|endoftext|> as the id `eot`, as
    with `allow_eot=True`. Raises `UserError` if it cannot be converted exactly."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise UserError("writing a tokenizer needs tokenizers: pip install tokenizers") from error
    check_exact(tokenizer)
    if tokenizer.kind == "char":
        ids = {character: i for i, character in enumerate(tokenizer.characters)}
        built = Tokenizer(models.WordLevel(ids))
        built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        built.decoder = decoders.Fuse()
    else:
        tokens, merges = as_letters(tokenizer)
        ids = {token: i for i, token in enumerate(tokens) if i != tokenizer.eot}
        built = Tokenizer(models.BPE(ids, merges))
        # ByteLevel uses GPT2_PATTERN; for bytes the pattern does not matter, as there are no merges
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
    if tokenizer.eot is not None:
        built.add_special_tokens([AddedToken(EOT, normalized=False, special=True)])
    return built


def read_tokenizer(folder):
    """Read the tokenizer of a Hugging Face directory. Returns None without a `tokenizer.json`.

    Raises `UserError` unless it has the form that `to_tokenizers` writes.
    """
    path = Path(folder, "tokenizer.json")
    if not path.exists():
        return None
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        ids, kind = theirs["model"]["vocab"], theirs["model"]["type"]
        eot = EOT in [token["content"] for token in theirs["added_tokens"]]
        tokens = sorted(ids.keys() - {EOT} if eot else ids, key=ids.get)
        if kind == "WordLevel":
            ours = CharTokenizer(tokens, eot)
        elif not theirs["model"]["merges"]:
            ours = ByteTokenizer()
        else:
            ours = from_letters(tokens, eot)
        written = json.loads(to_tokenizers(ours).to_str())
        exact = relevant_parts(written) == relevant_parts(theirs)
    except UserError:
        raise
    except Exception as error:  # invalid JSON or contents; the tokenizers library raises anything
        raise UserError(f"cannot read the tokenizer {path} ({error!r})") from error
    if not exact:
        raise UserError(f"{path} splits text in a way that is not supported")
    return ours


def from_letters(tokens, eot):
    """Build a byte-pair encoding from tokens in letters of `byte_alphabet`, in order of their ids.
    `eot`: append <|endoftext|>."""
    alphabet = byte_alphabet()
    raw = [bytes(alphabet[letter] for letter in token) for token in tokens]
    encoding = tiktoken().Encoding(
        "bpe",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(raw)},
        special_tokens={EOT: len(raw)} if eot else {},
    )
    return BPETokenizer(encoding)


def relevant_parts(theirs):
    """The parts of a `tokenizer.json` that affect ids, in a form independent of its version."""
    model, cut = theirs["model"], theirs["pre_tokenizer"] or {}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    ids = {token["content"]: token["id"] for token in theirs["added_tokens"]} | model["vocab"]
    cutting = [cut.get(key) for key in ("type", "pattern", "add_prefix_space")]
    cutting.append(cut.get("use_regex", True))
    return model["type"], ids, merges, cutting, theirs["normalizer"]


def check_exact(tokenizer):
    """Raise `UserError` for a tokenizer that cannot be converted exactly."""
    kind = tokenizer.kind
    if kind == "word":
        raise UserError(
            "a word tokenizer cannot be exported, as other programs have none like it; train with "
            "another: --tokenizer=bpe or char"
        )
    if kind == "char":
        codes = {ord(character) for character in tokenizer.characters}
        if len(codes) < len(tokenizer.characters) or any(0xD800 <= c < 0xE000 for c in codes):
            raise UserError("the vocabulary has a duplicate character or a surrogate")
    elif kind == "bpe":
        encoding = tokenizer.encoding
        specials = {EOT: encoding.n_vocab - 1} if tokenizer.eot is not None else {}
        if encoding._pat_str not in GPT2_PATTERNS:
            raise UserError(f"the tokenizer {encoding.name} has a pattern other than GPT-2's")
        if encoding._special_tokens != specials:
            raise UserError(f"the tokenizer {encoding.name} has special tokens other than {EOT}")


def as_letters(tokenizer):
    """Return (tokens, merges): the bytes of each token in letters of `byte_alphabet`, in order of
    their ids (end-of-text unchanged), and the pairs to merge, in order of priority.

    The bytes of a character are merged from first to last. In UTF-8 a first byte never continues
    another character, so merging yields whole characters in any context; the intermediate
    sequences need no id.
    """
    raw = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    tokens = [in_letters(token) for token in raw]
    if tokenizer.eot is not None:
        tokens[tokenizer.eot] = EOT
    if tokenizer.kind == "bpe":
        ranks = tokenizer.encoding._mergeable_ranks
        pairs = [last_merge(token, ranks) for token in sorted(ranks, key=ranks.get)]
        pairs = [pair for pair in pairs if pair]
    else:
        ordinary = [token for i, token in enumerate(raw) if i != tokenizer.eot]
        cuts = [(token, end) for token in ordinary for end in range(1, len(token))]
        pairs = list(dict.fromkeys((token[:end], token[end : end + 1]) for token, end in cuts))
    return tokens, [(in_letters(left), in_letters(right)) for left, right in pairs]


def in_letters(token):
    return "".join(LETTERS[byte] for byte in token)


def last_merge(token, ranks):
    """Return the two tokens that merge to `token` (all in bytes), or None for a single byte.

    They result from applying all merges of lower rank to the bytes of the token: lowest rank first,
    and of equal ranks the leftmost.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in pairwise(parts)]
        first = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if ranks.get(pairs[first], len(ranks)) >= ranks[token]:
            raise UserError(f"the tokenizer has a token that no merge produces: {token!r}")
        parts[first : first + 2] = [pairs[first]]
    return tuple(parts) if len(parts) == 2 else None
