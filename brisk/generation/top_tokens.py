"""The most likely next tokens of a prompt, as numbers and as a table."""

import unicodedata

import torch

from brisk.generation.generate import mask_logits, suppressed_ids


@torch.no_grad()
def top_next_tokens(model, idx, n, *, vocab_size=None, suppress=()):
    """Ids (n,) and probabilities (n,) of the `n` most likely tokens after one prompt idx (1, T), in
    descending order.

    Probabilities are at temperature 1, over the tokens that `generate` can sample with the same
    `vocab_size` and `suppress`; there may be fewer than n. The model sees the newest `block_size`
    tokens, and should be in eval mode.
    """
    suppressed = suppressed_ids(suppress, vocab_size, idx.device)
    logits = model(idx[:, -model.config.block_size :])[0][:, -1, :vocab_size]
    logits = mask_logits(logits, suppressed)[0].float()
    probs, ids = torch.softmax(logits, dim=-1).topk(min(n, len(logits) - len(suppressed)))
    return ids, probs


def as_table(ids, probs, tokenizer):
    """A table of rank, token and probability in percent, aligned in a terminal."""
    names = [token_name(tokenizer.token_bytes(i)) for i in ids.tolist()]
    digits, width = len(str(len(names))), max(map(columns, names))
    lines = []
    for rank, (name, prob) in enumerate(zip(names, probs.tolist(), strict=True), 1):
        padding = " " * (width - columns(name))
        lines.append(f"{rank:>{digits}}  {name}{padding}  {prob:7.2%}")
    return "\n".join(lines)


def token_name(token):
    """The bytes of a token in quotes, with invisible characters escaped."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:  # part of a character
        return repr(token)


def columns(text):
    """Width of `text` in a terminal: 2 for a Chinese character, 0 for a combining accent."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
