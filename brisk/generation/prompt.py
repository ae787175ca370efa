"""Prompts as token ids, and the ids that may be drawn after them."""

from brisk.errors import UserError


def encode_prompt(text, tokenizer, documents):
    """The ids of a prompt, a list of one or more. A model needs one token to begin: a model of
    `documents` reads an end-of-text in front of every prompt, another one where the text has no
    token.

    Raises `UserError` for characters outside the vocabulary.
    """
    ids = encode_text(text, tokenizer, documents)
    if documents:
        return [tokenizer.eot, *ids]
    return ids or [tokenizer.eot or 0]


def encode_text(text, tokenizer, documents):
    """The ids of the prompt's own text, a list, maybe empty. A model of windows continues a newline
    after no text, if its vocabulary has one."""
    try:
        return tokenizer.encode(text if text or documents else "\n", allow_eot=True).tolist()
    except UserError:
        if text:
            raise
        return []


def drawable(tokenizer):
    """Arguments of `generate` by which unknown words, and ids that the tokenizer lacks, are never
    drawn."""
    suppress = () if tokenizer.unk is None else (tokenizer.unk,)
    return {"vocab_size": tokenizer.vocab_size, "suppress": suppress}
