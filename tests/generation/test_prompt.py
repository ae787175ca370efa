"""Prompts as token ids: the same ones as in sample.py."""

import pytest

import sample
from brisk.data.tokenizer import ByteTokenizer, CharTokenizer, WordTokenizer
from brisk.errors import UserError
from brisk.generation.prompt import encode_prompt

LETTERS = CharTokenizer("ab", eot=True)


@pytest.mark.parametrize("text", ["", "ab", "<|endoftext|>a", "b<|endoftext|>"])
@pytest.mark.parametrize(
    ("tokenizer", "documents"),
    [
        *[(LETTERS, True), (LETTERS, False), (CharTokenizer("\n<|endoftx>ab"), False)],
        *[(ByteTokenizer(), True), (ByteTokenizer(), False), (WordTokenizer(["ab"]), False)],
    ],
)
def test_prompt_is_read_as_by_sample(text, tokenizer, documents):
    ids = encode_prompt(text, tokenizer, documents)
    assert ids == sample.encode_prompt(text, tokenizer, documents)[0].tolist() and ids


@pytest.mark.parametrize("documents", [True, False])
def test_unknown_characters_are_an_error(documents):
    with pytest.raises(UserError, match="'c'"):
        encode_prompt("abc", LETTERS, documents)
