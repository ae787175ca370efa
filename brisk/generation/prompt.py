"""Prompts as token ids."""

from brisk.errors import UserError


def encode_prompt(text, tokenizer, documents):
    """The ids of a prompt, a list of one or more. After no text a model goes on from a newline. A
    model of `documents` reads the end of the one before in front of it, and that alone for no text.

    Raises `UserError` for characters outside the vocabulary.
    """
    if documents:
        return [tokenizer.eot, *tokenizer.encode(text, allow_eot=True).tolist()]
    try:
        ids = tokenizer.encode(text or "\n", allow_eot=True).tolist()
    except UserError:
        if text:
            raise
        ids = []  # it knows no newline
    return ids or [tokenizer.eot or 0]
