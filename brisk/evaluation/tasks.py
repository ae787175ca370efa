"""Tasks that a model solves or not: HellaSwag, LAMBADA, sums.

The items of `hellaswag` and `lambada` come from a file with a JSON object on each line. In both, a
context and its continuation are tokenized separately, as their usual evaluations do. An item that
is longer than the model's context loses its beginning: `cut` counts these, and `cut_endings` or
`cut_words` those of them that lost a part of an ending, or of the word, which then is scored by the
rest. A model of documents (`documents=True`) gets the end-of-text token before each context, as in
training, and so does any model before an empty one.
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
    """The share of items whose right ending the model holds to be the likeliest (Zellers et al.
    2019, HellaSwag).

    An item has a text `ctx`, a list of texts `endings`, and `label`, the number of the right one,
    counted from 0. An ending is scored as " " + ending after the context, by its log-probability:

        accuracy             summed over its tokens
        accuracy_norm        that, divided by the ending's characters without the space in front:
                             the acc_norm of EleutherAI's lm-evaluation-harness
        accuracy_norm_token  divided by its tokens: the acc_norm of karpathy's llm.c

    If an ending is cut, only the tokens that are scored count, and its characters in proportion.
    """
    block_size = model.config.block_size

    def parse(item):
        context = context_ids(tokenizer, text_of(item, "ctx"), documents)
        endings, label = item.get("endings"), item.get("label")
        if not isinstance(endings, list) or not endings:
            raise UserError("the item has no list of texts under the key endings")
        if not all(isinstance(ending, str) and ending for ending in endings):
            raise UserError("every one of the endings must be a text that is not empty")
        if str(label) not in (labels := [str(number) for number in range(len(endings))]):
            raise UserError(
                f"label={json.dumps(label)} is not the number of an ending, 0 to {len(labels) - 1}"
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
    """How well the model foretells the last word of each item's `text` (Paperno et al. 2016).

    The word is scored as " " + word after all that stands before it.

        accuracy    the share of words of which every token is the likeliest
        perplexity  of a word: exp of the mean over the words of -ln p(word), which is summed over
                    the tokens of a word (Radford et al. 2019, table 3)
    """

    def parse(item):
        text = text_of(item, "text")
        if not (words := text.split()):
            raise UserError("there is no word in the text")
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
    """The share of the sums in `tokens` (documents such as 12+34=46) that the likeliest tokens
    answer to the last digit and the end of the document."""
    sums = []
    for document in tokenizer.decode(tokens).split(EOT):
        question, equals, answer = document.partition("=")
        if equals:
            sums.append((EOT + question + equals, answer + EOT))
    if not sums:
        raise UserError("task=addition: there are no sums in this data set; see data/addition")
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
    """-ln p of each continuation after its context, and whether each of its tokens is the
    likeliest: two arrays with an entry for each of the `pairs` (context ids, continuation ids).
    Of a continuation longer than `block_size` the last `block_size` tokens are scored.

    A batch has at most the tokens of `batch_size` windows of `block_size`.
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


def count_cut(pairs, block_size, what):
    """How many of the `pairs` (context ids, continuation ids) are longer than the model's context,
    and how many of them by their continuation alone; a notice if there are any."""
    cut = sum(len(before) + len(after) > block_size + 1 for before, after in pairs)
    inside = sum(len(after) > block_size for _, after in pairs)
    if cut:
        note = f"{cut} of {len(pairs)} items are longer than block_size={block_size}"
        note += f": they lost their beginning, {inside} a part of their {what} too"
        print(note, file=sys.stderr)
    return cut, inside


def context_ids(tokenizer, text, documents):
    """The ids of a context, one at least."""
    ids = tokenizer.encode(text)
    if len(ids) and not documents:
        return ids
    if tokenizer.eot is None:
        raise UserError(
            "the context is empty, and this tokenizer has no end-of-text to stand there"
        )
    return np.append(np.array([tokenizer.eot], dtype=ids.dtype), ids)


def continuation_ids(tokenizer, text):
    """The ids of `text` with a space before it, one at least."""
    ids = tokenizer.encode(f" {text}")
    if len(ids) == 0:
        raise UserError(f"the tokenizer finds no token in {text[:40]!r}")
    return ids


def text_of(item, key):
    if not isinstance(item, dict) or not isinstance(item.get(key), str):
        raise UserError(f"the item has no text under the key {key}")
    return item[key]


def read_items(path, parse):
    """`parse(object)` for the JSON object on each line of a file; empty lines do not count.

    Raises `UserError`, with the number of the line, for what is no JSON or what `parse` refuses.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or what is no path at all
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
                f"{path}, line {number}: no JSON ({error}); each line is an object of its own"
            ) from error
        try:
            items.append(parse(item))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    if not items:
        raise UserError(f"there are no items in {path}")
    return items
