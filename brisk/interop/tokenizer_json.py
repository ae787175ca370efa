"""Our tokenizers as other programs read them: Hugging Face's `tokenizer.json`, tables of tokens.

Both write bytes as the letters of `byte_alphabet`, and a byte-pair encoding as a list of merges,
a pair of tokens each, where tiktoken has the rank of each token. A tokenizer that cannot be
written so that it gives the same ids for every text is refused.
"""

import json
from itertools import pairwise
from pathlib import Path

from brisk.data.bpe import GPT2_PATTERN, GPT2_PATTERNS, BPETokenizer, byte_alphabet, tiktoken
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer
from brisk.errors import UserError

LETTERS = {byte: letter for letter, byte in byte_alphabet().items()}


def tokenizer_files(tokenizer, block_size):
    """The contents (text) of the tokenizer's files in a Hugging Face directory, by name.

    Raises `UserError` where it cannot be written exactly.
    """
    marks = ("bos_token", "eos_token", "pad_token") if tokenizer.eot is not None else ()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # it would change the text
        **dict.fromkeys(marks, EOT),
    }
    return {
        "tokenizer.json": to_tokenizers(tokenizer).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }


def to_tokenizers(tokenizer):
    """The same tokenizer as a `tokenizers.Tokenizer`. A literal <|endoftext|> becomes the id `eot`,
    as with `allow_eot=True`; a character that it does not know is an error there too."""
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
        # Its own pattern is GPT2_PATTERN; for bytes any would do, as nothing is merged.
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
    if tokenizer.eot is not None:
        built.add_special_tokens([AddedToken(EOT, normalized=False, special=True)])
    return built


def read_tokenizer(folder):
    """The tokenizer in a Hugging Face directory, None where it has no `tokenizer.json`.

    Raises `UserError` for one that is none of ours: it has to be written as `to_tokenizers` does.
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
            ours = of_letters(tokens, eot)
        written = json.loads(to_tokenizers(ours).to_str())
        exact = parts_that_count(written) == parts_that_count(theirs)
    except UserError:
        raise
    except Exception as error:  # of JSON, of what is in it, and of the tokenizers library
        raise UserError(f"cannot read the tokenizer {path} ({error!r})") from error
    if not exact:
        raise UserError(f"{path} cuts text in a way that none of the tokenizers here does")
    return ours


def of_letters(tokens, eot):
    """The byte-pair encoding of these tokens, in letters and in the order of their ids."""
    alphabet = byte_alphabet()
    raw = [bytes(alphabet[letter] for letter in token) for token in tokens]
    encoding = tiktoken().Encoding(
        "bpe",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(raw)},
        special_tokens={EOT: len(raw)} if eot else {},
    )
    return BPETokenizer(encoding)


def parts_that_count(theirs):
    """What of a `tokenizer.json` decides about ids, the same however old the file."""
    model, cut = theirs["model"], theirs["pre_tokenizer"] or {}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    ids = {token["content"]: token["id"] for token in theirs["added_tokens"]} | model["vocab"]
    cutting = [cut.get(key) for key in ("type", "pattern", "add_prefix_space")]
    cutting.append(cut.get("use_regex", True))
    return model["type"], ids, merges, cutting, theirs["normalizer"]


def check_exact(tokenizer):
    """Raise `UserError` for a tokenizer that others do not have exactly."""
    kind = tokenizer.kind
    if kind == "word":
        raise UserError(
            "a word tokenizer leaves out what is between words, and no other program's cuts text "
            "as it does; train on another to export: --tokenizer=bpe or char"
        )
    if kind == "char":
        codes = {ord(character) for character in tokenizer.characters}
        if len(codes) < len(tokenizer.characters) or any(0xD800 <= c < 0xE000 for c in codes):
            raise UserError("the vocabulary has a character twice, or half of a surrogate pair")
    elif kind == "bpe":
        encoding = tokenizer.encoding
        specials = {EOT: encoding.n_vocab - 1} if tokenizer.eot is not None else {}
        if encoding._pat_str not in GPT2_PATTERNS:
            raise UserError(f"the tokenizer {encoding.name} cuts text otherwise than GPT-2's")
        if encoding._special_tokens != specials:
            raise UserError(f"the tokenizer {encoding.name} has other special tokens than {EOT}")


def as_letters(tokenizer):
    """(tokens, merges): each token's bytes in letters (end-of-text as it is), in the order of their
    ids; and the merges that make them, most urgent first, as pairs of letters.

    A character's bytes are merged from the first to the last. No byte of UTF-8 that begins a
    character goes on with another, so merging makes whole characters, whatever is beside them;
    what lies between a first byte and a whole character needs no id.
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
    """The two tokens that `token` (bytes) is merged from, as bytes; None for a single byte.

    They are what its bytes become by the merges more urgent than its own: of all pairs in it that
    are tokens, the one of the lowest rank is merged first, the leftmost of equal ones.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in pairwise(parts)]
        first = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if ranks.get(pairs[first], len(ranks)) >= ranks[token]:
            raise UserError(f"the tokenizer has a token that no merge makes: {token!r}")
        parts[first : first + 2] = [pairs[first]]
    return tuple(parts) if len(parts) == 2 else None
