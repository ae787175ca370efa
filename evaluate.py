"""How good a checkpoint is: exact loss over a whole split, or its share of right answers.

    $ python evaluate.py --out_dir=out-shakespeare-char
    $ python evaluate.py --init_from=gpt2 --dataset=shakespeare --split=train
    $ python evaluate.py --out_dir=out-addition --task=addition

`train.py` estimates the loss from some windows; this reads every token once.
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

from brisk.corpus import load_tokenizer, read_meta
from brisk.device import open_device
from brisk.errors import UserError, one_line_errors
from brisk.loader import TokenFile, find_data_dir
from brisk.tokenizer import EOT
from configurator import PositiveInt, configure
from sample import load


@dataclass
class EvaluateConfig:
    init_from: str = "resume"  # or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a directory, a file
    out_dir: str = "out"  # the run whose best checkpoint is taken, with init_from=resume
    dataset: str = ""  # evaluate on data/<dataset>; what the checkpoint was trained on if empty
    data_dir: str = ""  # folder of the token files, instead of data/<dataset>
    split: Literal["val", "train"] = "val"  # which of its two files
    task: Literal["loss", "addition"] = "loss"  # loss and perplexity, or sums answered right
    batch_size: PositiveInt = 16  # windows, or prompts, at a time
    json: bool = False  # print one JSON object instead of text
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of the products


def main(config):
    with redirect_stdout(sys.stderr):
        device = open_device(config.device, config.dtype)
        model, tokenizer, trained_with = load(config)
        model.to(device.device).eval()
        data_dir = config.data_dir or ("" if config.dataset else trained_with.get("data_dir", ""))
        dataset = config.dataset or trained_with.get("dataset", "")
        if not data_dir and not dataset:
            raise UserError("on what text? name a data set that is prepared: --dataset=NAME")
        data_dir = find_data_dir(data_dir, dataset)
        theirs = load_tokenizer(data_dir)
        if theirs and theirs.to_dict() != tokenizer.to_dict():
            raise UserError(
                f"{data_dir} is tokenized otherwise than what this model was trained on"
            )
        meta = read_meta(data_dir)
        dtype = meta["dtype"] if meta else "uint16"
        path, sizes = data_dir / f"{config.split}.bin", model.config
        block_size = 1 if config.task == "addition" else sizes.block_size
        tokens = TokenFile(path, block_size, sizes.vocab_size, dtype).tokens

    with torch.no_grad(), device.autocast():
        if config.task == "addition":
            result = addition(model, tokenizer, tokens, config.batch_size, device)
        else:
            counts = meta["splits"][config.split] if meta else {}
            result = loss(model, tokens, counts, config.batch_size, device)
    result = {"data": str(path), **result}
    if config.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<20} {value:,.4f}" if isinstance(value, float) else f"{name:<20} {value}")


def loss(model, tokens, counts, batch_size, device):
    """Cross-entropy over all of `tokens` in windows of `block_size` that do not overlap.

    `counts` may have the split's `bytes` and `characters`, which make the loss comparable between
    tokenizers (bits per byte: nats / ln 2 / bytes of UTF-8).
    """
    T = model.config.block_size
    starts = range(0, len(tokens) - 1, T)
    nats = 0.0
    for first in tqdm(range(0, len(starts), batch_size), unit="batch", disable=None):
        rows = [tokens[s : s + T + 1].astype(np.int64) for s in starts[first : first + batch_size]]
        tail = len(rows) > 1 and len(rows[-1]) < T + 1  # the last window is shorter
        for group in (rows[:-1], rows[-1:]) if tail else (rows,):
            ids = torch.from_numpy(np.stack(group)).to(device.device)
            _, mean = model(ids[:, :-1], ids[:, 1:], return_logits=False)
            nats += mean.item() * ids[:, 1:].numel()
    n_targets = len(tokens) - 1
    result = {"tokens": n_targets, "loss": nats / n_targets}
    result["perplexity"] = math.exp(min(700.0, nats / n_targets))
    if counts:
        result["bits_per_byte"] = nats / math.log(2) / counts["bytes"]
        result["bits_per_character"] = nats / math.log(2) / counts["characters"]
    return result


def addition(model, tokenizer, tokens, batch_size, device):
    """The share of the sums in `tokens` (documents such as 12+34=46) that the likeliest tokens
    answer to the last digit and the end of the document."""
    by_length = {}  # prompts of one length make a batch
    for document in tokenizer.decode(tokens).split(EOT):
        question, equals, answer = document.partition("=")
        if equals:
            sums = by_length.setdefault(len(question), [])
            sums.append((EOT + question + equals, answer + EOT))
    if not by_length:
        raise UserError("task=addition: there are no sums in this data set; see data/addition")
    right = total = 0
    for sums in tqdm(by_length.values(), unit="length", disable=None):
        for first in range(0, len(sums), batch_size):
            batch = sums[first : first + batch_size]
            prompts = np.stack([tokenizer.encode(question, True) for question, _ in batch])
            ids = torch.from_numpy(prompts.astype(np.int64)).to(device.device)
            longest = max(len(tokenizer.encode(answer, True)) for _, answer in batch)
            drawn = model.generate(ids, longest, temperature=0, vocab_size=tokenizer.vocab_size)
            for row, (_, answer) in zip(drawn[:, ids.size(1) :].cpu(), batch, strict=True):
                right += tokenizer.decode(row).startswith(answer)
                total += 1
    return {"sums": total, "right": right, "accuracy": right / total}


if __name__ == "__main__":
    with one_line_errors():
        main(configure(EvaluateConfig, sys.argv[1:]))
