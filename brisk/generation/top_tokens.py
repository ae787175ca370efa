"""What a model expects next: its likeliest tokens, as numbers and as a table."""

import unicodedata

import torch

from brisk.generation.generate import never_drawn, without


@torch.no_grad()
def likeliest_next(model, idx, n, *, vocab_size=None, suppress=()):
    """The `n` likeliest tokens after one prompt `idx` (1, T), or all where there are fewer.

    Returns their ids (n,) and probabilities (n,), likeliest first. The probabilities are the
    model's own, those of temperature 1, over all tokens that `generate` may draw with the same
    `vocab_size` and `suppress`, after the newest `block_size` tokens. The model should be in eval
    mode.
    """
    never = never_drawn(suppress, vocab_size, idx.device)
    logits = model(idx[:, -model.config.block_size :])[0][:, -1, :vocab_size]
    logits = without(logits, never)[0].float()
    probs, ids = torch.softmax(logits, dim=-1).topk(min(n, len(logits) - len(never)))
    return ids, probs


def as_table(ids, probs, tokenizer):
    """Lines of rank, token and probability in percent, the columns even in a terminal."""
    names = [token_name(tokenizer.token_bytes(i)) for i in ids.tolist()]
    digits, width = len(str(len(names))), max(map(columns, names))
    lines = []
    for rank, (name, prob) in enumerate(zip(names, probs.tolist(), strict=True), 1):
        padding = " " * (width - columns(name))
        lines.append(f"{rank:>{digits}}  {name}{padding}  {prob:7.2%}")
    return "\n".join(lines)


def token_name(token):
    """The bytes of a token in quotes, with escapes for what cannot be seen."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:  # a part of a character
        return repr(token)


def columns(text):
    """The width of `text` in a terminal: 2 for a Chinese character, 0 for a combining accent."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
