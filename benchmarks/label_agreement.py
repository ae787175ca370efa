"""Test whether generated reviews have the requested label, by a classifier of real reviews.

    $ python data/reviews/prepare.py --label_prompt --balance --data_dir=data/asked
    $ python train.py config/train_reviews_cpu.py --dataset=asked --out_dir=out-asked
    $ python benchmarks/label_agreement.py --out_dir=out-asked --data_dir=data/asked

The classifier is naive Bayes over characters and character pairs, trained on the distinct reviews
in train.bin. For each label, prints its agreement with the labels of held-out real reviews and of
generated ones, and their ratio.
"""

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.checkpoint import best_checkpoint, load_checkpoint
from brisk.data.dataset import load_tokenizer, read_meta
from brisk.data.tokenizer import EOT
from brisk.errors import UserError, one_line_errors
from configurator import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, configure
from model import GPT


@dataclass(frozen=True)
class AgreementConfig:
    out_dir: str = "out-asked"  # folder of the run
    data_dir: str = "data/asked"  # its data set
    prompts: str = "好评：,差评："  # the prompt of each label
    count: PositiveInt = 200  # reviews to generate for each label
    temperature: NonNegativeFloat = 0.8  # as in sample.py
    top_k: NonNegativeInt = 200  # as in sample.py
    seed: Seed = 1337  # seed of the generated reviews
    json: bool = False  # print one JSON object instead of a table


class NaiveBayes:
    """Multinomial naive Bayes over characters and character pairs, with a uniform prior and
    additive smoothing by `alpha`."""

    def __init__(self, texts_by_label, alpha=0.1):
        self.counts = {
            label: Counter(feature for text in texts for feature in self.features(text))
            for label, texts in texts_by_label.items()
        }
        self.alpha, self.known = alpha, set().union(*self.counts.values())
        self.totals = {label: sum(c.values()) for label, c in self.counts.items()}

    def features(self, text):
        return [*text, *map("".join, pairwise(text))]

    def label(self, text):
        features = [feature for feature in self.features(text) if feature in self.known]

        def likelihood(label):
            total = self.totals[label] + self.alpha * len(self.known)
            return sum(math.log((self.counts[label][f] + self.alpha) / total) for f in features)

        return max(self.counts, key=likelihood)


def read_texts(data_dir, split, prompts, tokenizer):
    """{prompt: the distinct texts after it, in the order of the file}"""
    dtype = np.dtype(read_meta(data_dir)["dtype"])
    text = tokenizer.decode(np.fromfile(Path(data_dir, f"{split}.bin"), dtype))
    documents = dict.fromkeys(text.split(EOT))
    found = {p: [d.removeprefix(p) for d in documents if d.startswith(p)] for p in prompts}
    for prompt, texts in found.items():
        if not texts:
            raise UserError(f"{data_dir} has no document with the prompt {prompt}")
    return found


def write_reviews(model, tokenizer, prompt, config):
    """Generate `config.count` texts after `prompt`."""
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(prompt).tolist()]])
    most = model.config.block_size - ids.size(1)
    options = {"vocab_size": tokenizer.vocab_size, "stop_ids": [tokenizer.eot]}
    drawn = model.generate(
        ids.repeat(config.count, 1),
        most,
        config.temperature,
        config.top_k,
        seed=config.seed,
        **options,
    )
    return [tokenizer.decode(row).split(EOT)[0] for row in drawn[:, ids.size(1) :]]


def main(config):
    prompts = config.prompts.split(",")
    tokenizer = load_tokenizer(config.data_dir)
    if tokenizer is None or tokenizer.eot is None:
        raise UserError(f"{config.data_dir} is not a prepared data set of documents")
    classifier = NaiveBayes(read_texts(config.data_dir, "train", prompts, tokenizer))
    real = read_texts(config.data_dir, "val", prompts, tokenizer)
    model = GPT.from_checkpoint(load_checkpoint(best_checkpoint(config.out_dir)))
    result = {}
    for prompt in prompts:
        written = write_reviews(model, tokenizer, prompt, config)
        on_real, on_written = (
            float(np.mean([classifier.label(text) == prompt for text in texts]))
            for texts in (real[prompt], written)
        )
        result[prompt] = {"real": on_real, "written": on_written, "ratio": on_written / on_real}
        result[prompt] |= {"n_real": len(real[prompt]), "n_written": len(written)}
    if config.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print(f"{'prompt':<9} {'agreement: real':>18}   {'generated':<12}   ratio")
    for prompt, of in result.items():
        real_share = f"{of['real']:.3f} of {of['n_real']}"
        print(f"{prompt:<9} {real_share:>18}   {of['written']:.3f} of {of['n_written']}", end="")
        print(f"   {of['ratio']:.2f}")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(AgreementConfig, sys.argv[1:]))
