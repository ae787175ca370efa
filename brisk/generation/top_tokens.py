"""The most likely next tokens of a prompt, as numbers and as a table."""

import unicodedata

import torch

from brisk.generation.generate import mask_logits, suppressed_ids


@torch.no_grad()
def top_next_tokens(model, idx, n, *, vocab_size=None, suppress=()):
    """Ids (n,) and probabilities (n,) of the `n` most likely tokens after one prompt idx (1, T).

    The most likely comes first. Probabilities are those of temperature 1 over all tokens that
    `generate` samples from with the same `vocab_size` and `suppress`, given the newest `block_size`
    tokens; n is at most their number. The model should be in eval mode.
    """
    never = suppressed_ids(suppress, vocab_size, idx.device)
    logits = model(idx[:, -model.config.block_size :])[0][:, -1, :vocab_size]
    logits = mask_logits(logits, never)[0].float()
    probs, ids = torch.softmax(logits, dim=-1).topk(min(n, len(logits) - len(never)))
    return ids, probs


def as_table(ids, probs, tokenizer):
    """Lines of rank, token and probability in percent, aligned in a terminal."""
    names = [token_name(tokenizer.token_bytes(i)) for i in ids.tolist()]
    digits, width = len(str(len(names))), max(map(columns, names))
    lines = []
    for rank, (name, prob) in enumerate(zip(names, probs.tolist(), strict=True), 1):
        padding = " " * (width - columns(name))
        lines.append(f"{rank:>{digits}}  {name}{padding}  {prob:7.2%}")
    return "\n".join(lines)


def token_name(token):
    """The bytes of a token in quotes, invisible characters escaped."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:  # a part of a character
        return repr(token)


def columns(text):
    """The width of `text` in a terminal: 2 for a Chinese character, 0 for a combining accent."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
