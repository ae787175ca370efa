"""Accuracy on tasks: HellaSwag, LAMBADA, addition.

`hellaswag` and `lambada` read items from a file with one JSON object on each line. Context and
continuation are tokenized separately, as usual for these tasks. An item longer than the model's
context is truncated at its beginning: `cut` counts such items, and `cut_endings` or `cut_words`
those whose continuation is truncated too. A model of documents (`documents=True`) gets an
end-of-text token before each context, as in training; any model gets one before an empty context.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from brisk.data.tokenizer import EOT
from brisk.errors import UserError
from brisk.evaluation.scoring import batches, collate, token_losses


def hellaswag(model, tokenizer, path, batch_size, device, documents=False):
    """Accuracy of choosing the right ending of a context (Zellers et al. 2019, HellaSwag).

    An item has a text `ctx`, a list of texts `endings`, and `label`, the index of the right one.
    The model chooses the ending with the highest log-probability of " " + ending:

        accuracy             summed over its tokens
        accuracy_norm        divided by the characters of the ending, without the leading space:
                             acc_norm of EleutherAI's lm-evaluation-harness
        accuracy_norm_token  divided by its tokens: acc_norm of karpathy's llm.c

    For a truncated ending, only the scored tokens count, and its characters in proportion.
    """
    block_size = model.config.block_size

    def parse(item):
        context = context_ids(tokenizer, text_of(item, "ctx"), documents)
        endings, label = item.get("endings"), item.get("label")
        if not isinstance(endings, list) or not endings:
            raise UserError("the key endings is not a list of texts")
        if not all(isinstance(ending, str) and ending for ending in endings):
            raise UserError("one of the endings is empty or not a text")
        if str(label) not in (labels := [str(number) for number in range(len(endings))]):
            raise UserError(
                f"label={json.dumps(label)} is not the index of an ending, 0 to {len(labels) - 1}"
            )
        ids = [continuation_ids(tokenizer, ending) for ending in endings]
        return context, ids, endings, labels.index(str(label))

    items = read_items(path, parse)
    pairs = [(context, ids) for context, endings, _, _ in items for ids in endings]
    nats, _ = score(model, pairs, batch_size, device)
    right, first = np.zeros(3), 0
    for _, ids, endings, label in items:
        mine, first = nats[first : first + len(ids)], first + len(ids)
        tokens = np.array([len(ending) for ending in ids])
        scored = np.minimum(tokens, block_size)
        characters = np.array([len(ending) for ending in endings]) * scored / tokens
        for number, lengths in enumerate((1, characters, scored)):
            right[number] += np.argmin(mine / lengths) == label
    names = ("accuracy", "accuracy_norm", "accuracy_norm_token")
    shares = dict(zip(names, (right / len(items)).tolist(), strict=True))
    longest = [(context, max(ids, key=len)) for context, ids, _, _ in items]
    cut, cut_endings = count_cut(longest, block_size, "endings")
    return {"items": len(items), **shares, "cut": cut, "cut_endings": cut_endings}


def lambada(model, tokenizer, path, batch_size, device, documents=False):
    """Prediction of the last word of each item's `text` (Paperno et al. 2016, LAMBADA).

    The word is scored as " " + word after the rest of the text.

        accuracy    fraction of words whose tokens are all the most likely ones
        perplexity  exp of the mean of -ln p(word), which is summed over the tokens of a word
                    (Radford et al. 2019, table 3)
    """

    def parse(item):
        text = text_of(item, "text")
        if not (words := text.split()):
            raise UserError("the text has no words")
        before = text.rstrip()[: -len(words[-1])].rstrip()
        context = context_ids(tokenizer, before, documents)
        return context, continuation_ids(tokenizer, words[-1])

    pairs = read_items(path, parse)
    nats, likeliest = score(model, pairs, batch_size, device)
    cut, cut_words = count_cut(pairs, model.config.block_size, "words")
    return {
        "items": len(pairs),
        "accuracy": float(likeliest.mean()),
        "perplexity": math.exp(min(700.0, nats.mean())),
        "cut": cut,
        "cut_words": cut_words,
    }


def addition(model, tokenizer, tokens, batch_size, device):
    """Accuracy of greedy answers to the sums in `tokens` (documents such as 12+34=46). An answer
    counts if all of its digits and the end-of-text are right."""
    sums = []
    for document in tokenizer.decode(tokens).split(EOT):
        question, equals, answer = document.partition("=")
        if equals:
            sums.append((EOT + question + equals, answer + EOT))
    if not sums:
        raise UserError("task=addition: this data set has no sums; use data/addition")
    right = 0
    for first in tqdm(range(0, len(sums), batch_size), unit="batch", disable=None):
        batch = sums[first : first + batch_size]
        prompts = [
            torch.from_numpy(tokenizer.encode(question, True).astype(np.int64)).to(device.device)
            for question, _ in batch
        ]
        longest = max(len(tokenizer.encode(answer, True)) for _, answer in batch)
        drawn = model.generate(prompts, longest, temperature=0, vocab_size=tokenizer.vocab_size)
        for row, prompt, (_, answer) in zip(drawn, prompts, batch, strict=True):
            right += tokenizer.decode(row[len(prompt) :].cpu()).startswith(answer)
    return {"sums": len(sums), "right": right, "accuracy": right / len(sums)}


def score(model, pairs, batch_size, device):
    """Score `pairs` of (context ids, continuation ids).

    Returns two arrays with an entry for each pair: -ln p of the continuation after its context, and
    whether all of its tokens are the most likely ones. Only the last `block_size` tokens of a
    continuation are scored. A batch has at most `batch_size * block_size` tokens.
    """
    T = model.config.block_size
    rows = [np.concatenate(pair)[-T - 1 :] for pair in pairs]
    lengths = np.array([len(row) - 1 for row in rows])
    nats, likeliest = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    for batch in tqdm(batches(lengths, batch_size * T), unit="batch", disable=None):
        scored = [min(T, len(pairs[i][1])) for i in batch]
        inputs, targets = collate([rows[i] for i in batch], scored, device.device)
        nll, hits = token_losses(model, inputs, targets)
        nats[batch], likeliest[batch] = nll.sum(dim=1).cpu(), hits.all(dim=1).cpu()
    return nats, likeliest


def count_cut(pairs, block_size, name):
    """Count the `pairs` of (context ids, continuation ids) longer than the model's context, and
    those whose continuation alone is longer. Prints a note if there are any."""
    cut = sum(len(before) + len(after) > block_size + 1 for before, after in pairs)
    inside = sum(len(after) > block_size for _, after in pairs)
    if cut:
        note = f"{cut} of {len(pairs)} items are longer than block_size={block_size}"
        note += f"; their beginnings are truncated, and the {name} of {inside} of them"
        print(note, file=sys.stderr)
    return cut, inside


def context_ids(tokenizer, text, documents):
    """The ids of a context, at least one."""
    ids = tokenizer.encode(text)
    if len(ids) and not documents:
        return ids
    if tokenizer.eot is None:
        raise UserError("the context is empty, and this tokenizer has no end-of-text to begin with")
    return np.append(np.array([tokenizer.eot], dtype=ids.dtype), ids)


def continuation_ids(tokenizer, text):
    """The ids of " " + text, at least one."""
    ids = tokenizer.encode(f" {text}")
    if len(ids) == 0:
        raise UserError(f"the tokenizer returns no tokens for {text[:40]!r}")
    return ids


def text_of(item, key):
    if not isinstance(item, dict) or not isinstance(item.get(key), str):
        raise UserError(f"the item has no text with the key {key}")
    return item[key]


def read_items(path, parse):
    """Return a list of `parse(object)` for the JSON object on each non-empty line of a file.

    Raises `UserError` with the line number for invalid JSON or an error of `parse`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an invalid path
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); each line must be one object"
            ) from error
        try:
            items.append(parse(item))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    if not items:
        raise UserError(f"there are no items in {path}")
    return items
