"""Prompts as token ids."""

import pytest

from brisk.data.tokenizer import ByteTokenizer, CharTokenizer, WordTokenizer
from brisk.errors import UserError
from brisk.generation.prompt import encode_prompt, encode_text

LETTERS = CharTokenizer("ab", eot=True)
NEWLINE = CharTokenizer("\n<|endoftx>ab")


@pytest.mark.parametrize(
    ("tokenizer", "documents", "text", "ids", "own"),
    [
        (LETTERS, True, "", [2], []),
        (LETTERS, True, "ab", [2, 0, 1], [0, 1]),
        (LETTERS, True, "<|endoftext|>a", [2, 2, 0], [2, 0]),
        (LETTERS, False, "", [2], []),  # no newline in its vocabulary
        (LETTERS, False, "b<|endoftext|>", [1, 2], [1, 2]),
        (NEWLINE, False, "", [0], [0]),
        (NEWLINE, False, "<|", [1, 2], [1, 2]),
        (ByteTokenizer(), False, "", [10], [10]),
        (ByteTokenizer(), True, "", [256], []),
        (WordTokenizer(["ab"]), False, "", [0], []),
        (WordTokenizer(["ab"], stop_words=["the"]), False, "the", [0], []),
        (WordTokenizer(["ab"], stop_words=["the"], eot=True), True, "the", [2], []),
    ],
)
def test_prompt_has_at_least_one_token(tokenizer, documents, text, ids, own):
    assert encode_prompt(text, tokenizer, documents) == ids
    assert encode_text(text, tokenizer, documents) == own


@pytest.mark.parametrize("documents", [True, False])
def test_unknown_characters_are_an_error(documents):
    with pytest.raises(UserError, match="'c'"):
        encode_prompt("abc", LETTERS, documents)
