"""Evaluate a checkpoint: exact loss over a whole split, or accuracy on a task.

    $ python evaluate.py --out_dir=out-shakespeare-char
    $ python evaluate.py --out_dir=out-shakespeare-char --stride=32
    $ python evaluate.py --init_from=gpt2 --dataset=shakespeare --split=train
    $ python evaluate.py --out_dir=out-addition --task=addition
    $ python evaluate.py --init_from=gpt2 --task=hellaswag --file=hellaswag_val.jsonl
    $ python evaluate.py --init_from=gpt2 --task=lambada --file=lambada_test.jsonl --json

`train.py` estimates the loss from a sample of windows; this script scores every token once, in
windows of block_size. A model trained with rows=documents, or on characters or words with an
end-of-text, is scored on each document separately. Standard output has only the result. Its figures
are defined in `loss` and brisk/evaluation/tasks.py.
"""

import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from brisk.data.dataset import load_tokenizer, read_meta
from brisk.data.loader import SCAN, TokenFile, find_data_dir
from brisk.data.saved_tokenizer import same_tokenizer
from brisk.data.tokenizer import knows_documents
from brisk.device import open_device
from brisk.errors import UserError, one_line_errors
from brisk.evaluation.scoring import batches, collate, token_losses, windows
from brisk.evaluation.tasks import addition, hellaswag, lambada
from brisk.interop.pretrained import read_pretrained
from configurator import NonNegativeInt, PositiveInt, configure
from model import GPT

FILE_TASKS = {"hellaswag": hellaswag, "lambada": lambada}  # tasks with items in --file


@dataclass(frozen=True)
class EvaluateConfig:
    # model
    init_from: str = "resume"  # resume, gpt2*, a checkpoint, or a Hugging Face folder
    out_dir: str = "out"  # folder of the run, for init_from=resume; ckpt.pt is read, else last.pt
    # task
    task: Literal["loss", "addition", "hellaswag", "lambada"] = "loss"  # quantity to measure
    file: str = ""  # items of hellaswag (ctx, endings, label) or lambada (text), as JSON lines
    # data
    dataset: str = ""  # evaluate on data/<dataset>; if empty, the training data set
    data_dir: str = ""  # folder of the token files, instead of data/<dataset>
    split: Literal["val", "train"] = "val"  # val.bin or train.bin
    rows: Literal["auto", "windows", "documents"] = "auto"  # auto: as the model was trained
    # loss
    stride: NonNegativeInt = 0  # distance between windows in tokens; 0: block_size, no overlap
    all_positions: bool = False  # score overlapping tokens in every window, not only once
    # output
    json: bool = False  # print one JSON object instead of text
    # system
    batch_size: PositiveInt = 16  # windows in a batch; more if they are shorter than block_size
    device: str = "auto"  # cpu, cuda, cuda:1, mps or auto
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of autocast


def main(config):
    task = FILE_TASKS.get(config.task)
    if task and not config.file:
        raise UserError(f"task={config.task} reads its items from a file: --file=PATH.jsonl")
    if config.file and not task:
        raise UserError(f"--file is for --task={' or --task='.join(FILE_TASKS)} only")
    with redirect_stdout(sys.stderr):
        device = open_device(config.device, config.dtype)
        start = read_pretrained(config.init_from, config.out_dir)
        model, tokenizer = GPT.from_checkpoint(start.checkpoint), start.tokenizer
        trained_with = start.settings
        model.to(device.device).eval()
        rows = config.rows
        if rows == "auto":
            documents = knows_documents(trained_with.get("rows"), tokenizer)
            rows = "documents" if documents else "windows"
        if not task:
            file, counts = open_split(config, trained_with, model, tokenizer, rows)
            is_lossless = tokenizer.unk is None  # words drop punctuation and unknown words

    with torch.no_grad(), device.autocast():
        if task:
            documents = rows == "documents"
            result = task(model, tokenizer, config.file, config.batch_size, device, documents)
        elif config.task == "addition":
            result = addition(model, tokenizer, file.tokens, config.batch_size, device)
        else:
            if not is_lossless:
                counts = {}
            elif rows == "documents" and not counts:
                counts = count_text(file, tokenizer)
            options = (config.batch_size, config.stride, config.all_positions)
            result = loss(model, file, counts, device, *options)
    result = {"data": config.file if task else str(file.path), **result}
    if config.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<20} {value:,.4f}" if isinstance(value, float) else f"{name:<20} {value}")


def open_split(config, trained_with, model, tokenizer, rows):
    """Return the `TokenFile` to evaluate on, and the counts of its text from `meta.json`, or {}."""
    data_dir = config.data_dir or ("" if config.dataset else trained_with.get("data_dir", ""))
    dataset = config.dataset or trained_with.get("dataset", "")
    if not data_dir and not dataset:
        raise UserError(
            "this model does not name its training data; choose a data set: --dataset=NAME"
        )
    data_dir = find_data_dir(data_dir, dataset)
    theirs = load_tokenizer(data_dir)
    if theirs and not same_tokenizer(theirs, tokenizer):
        raise UserError(f"{data_dir} has a different tokenizer than this model's training data")
    meta = read_meta(data_dir)
    dtype = meta["dtype"] if meta else "uint16"
    path, vocab_size = data_dir / f"{config.split}.bin", model.config.vocab_size
    # `loss` makes its own windows; with block_size=1, a short text passes the check of TokenFile
    file = TokenFile(path, 1, vocab_size, dtype, rows=rows, eot=tokenizer.eot)
    return file, meta["splits"][config.split] if meta else {}


def loss(model, file, counts, device, batch_size=16, stride=0, all_positions=False):
    """Compute the cross-entropy over all of a `TokenFile`, scoring each token once.

    Windows of `block_size` start every `stride` tokens (0: `block_size`, no overlap). A token is
    scored in the window with the longest context for it. A smaller stride takes longer and gives
    more context. With `all_positions`, every position of every window is scored, as in training.

    A file opened with rows="windows" is one text. Its first token has no context and is not scored.
    With rows="documents", each document is a text: its context begins with an end-of-text token,
    its last target is its own end-of-text, and windows do not cross its end.

    Returns:
        A dict with `tokens`, the number of targets; `loss`, the mean in nats; `perplexity`,
        exp(loss). If `counts` has the `bytes` (of UTF-8) and `characters` of the text, and no token
        is scored twice, also measures that do not depend on the tokenizer: `loss_per_character` in
        nats, `bits_per_character` and `bits_per_byte`. For documents, these leave out the nats of
        the end-of-text tokens, which are not part of the text.
    """
    T, tokens = model.config.block_size, file.tokens
    if stride > T:
        raise UserError(f"stride={stride} skips tokens; it must be at most block_size={T}")
    of_documents = file.documents is not None
    starts, ends = np.array([1]), np.array([len(tokens)])  # of the targets in the file
    if of_documents:
        starts, ends = file.documents.T
    text, begin, end, new = windows(ends - starts, T, stride or T)
    scored = end - (begin if all_positions else new)
    first, last = starts[text] + begin - 1, starts[text] + end  # tokens of each window

    nats = nats_of_eot = n_targets = 0
    for batch in tqdm(batches(end - begin, batch_size * T), unit="batch", disable=None):
        rows = [tokens[max(0, first[i]) : last[i]].astype(np.int64) for i in batch]
        for number in np.flatnonzero(first[batch] < 0):  # the first document has none before it
            rows[number] = np.append(file.eot, rows[number])
        file.check(np.concatenate(rows))
        inputs, targets = collate(rows, scored[batch], device.device)
        nll, _ = token_losses(model, inputs, targets)
        nats += nll.sum().item()
        n_targets += int(scored[batch].sum())
        if of_documents:
            nats_of_eot += nll[targets == file.eot].sum().item()

    result = {"tokens": n_targets, "loss": nats / n_targets}
    result["perplexity"] = math.exp(min(700.0, nats / n_targets))
    if counts and counts["bytes"] and n_targets == (ends - starts).sum():
        of_text = nats - nats_of_eot
        result["loss_per_character"] = of_text / counts["characters"]
        result["bits_per_byte"] = of_text / math.log(2) / counts["bytes"]
        result["bits_per_character"] = of_text / math.log(2) / counts["characters"]
    return result


def count_text(file, tokenizer):
    """Count the bytes and characters in the documents of a file without a meta.json."""
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    pieces[file.eot] = b""
    often = np.zeros(len(pieces), dtype=np.int64)
    end = file.documents[-1, 1]
    for first in range(0, end, SCAN):
        part = file.tokens[first : min(first + SCAN, end)]
        often += np.bincount(part, minlength=len(pieces))[: len(pieces)]
    # in UTF-8, all bytes of a character except the first are 10xxxxxx
    characters = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces]
    return {"bytes": int(often @ list(map(len, pieces))), "characters": int(often @ characters)}


if __name__ == "__main__":
    with one_line_errors():
        main(configure(EvaluateConfig, sys.argv[1:]))
