"""The loss is that of every token once, a sum is right to its last digit, bench.py runs."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import bench
import evaluate
from brisk.device import open_device
from brisk.errors import UserError
from brisk.tokenizer import EOT, CharTokenizer
from configurator import configure
from model import GPT, GPTConfig


@pytest.fixture
def evaluated(capsys):
    """Run evaluate.py's main on settings; its JSON as a dict."""

    def run(**settings):
        argv = [f"--{key}={value}" for key, value in {"device": "cpu", **settings}.items()]
        capsys.readouterr()
        evaluate.main(configure(evaluate.EvaluateConfig, [*argv, "--json=True"]))
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=1, n_head=2, n_embd=16)).eval()


@pytest.mark.parametrize("length", [2, 8, 9, 10, 64, 65, 66, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_token_counts_once(model, length, batch_size):
    tokens = np.random.default_rng(length).integers(0, 13, length).astype(np.uint16)
    nats = 0.0  # one window after another
    for start in range(0, length - 1, 8):
        ids = torch.from_numpy(tokens[start : start + 9].astype(np.int64))[None]
        logits = model.predict(ids[:, :-1])
        nats += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    counts = {"bytes": 2 * length, "characters": length}
    with torch.no_grad():
        result = evaluate.loss(model, tokens, counts, batch_size, open_device("cpu"))
    assert result["tokens"] == length - 1
    assert result["loss"] == pytest.approx(nats / (length - 1), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / (2 * length), rel=1e-5)
    assert result["bits_per_character"] == pytest.approx(2 * result["bits_per_byte"])


def test_a_run_is_evaluated_on_what_it_was_trained_on(train_tiny, evaluated, char_data, tmp_path):
    run = train_tiny(tmp_path / "out", eval_iters=50)
    result = evaluated(out_dir=tmp_path / "out")
    assert result["data"] == str(char_data / "val.bin")
    assert result["loss"] == pytest.approx(run.series("val_loss")[8], abs=0.1)
    assert evaluated(out_dir=tmp_path / "out", split="train")["loss"] != result["loss"]
    with pytest.raises(UserError, match="no sums"):
        evaluated(out_dir=tmp_path / "out", task="addition")


def test_data_of_another_tokenizer_is_refused(train_tiny, evaluated, lines_data, tmp_path):
    train_tiny(tmp_path / "out", max_iters=0)
    with pytest.raises(UserError, match="tokenized otherwise"):
        evaluated(out_dir=tmp_path / "out", data_dir=lines_data)


class Calculator:
    """In place of a model: adds, but errs where the first summand is 7."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, ids, max_new_tokens, temperature, vocab_size):
        assert temperature == 0 and vocab_size == self.tokenizer.vocab_size
        rows = []
        for row in ids:
            assert row[0] == self.tokenizer.eot  # as a document begins in training
            a, b = map(int, self.tokenizer.decode(row[1:-1]).split("+"))
            answer = self.tokenizer.encode(f"{a + b + 10 * (a == 7)}{EOT}", allow_eot=True)
            padded = [*answer.tolist(), *[0] * max_new_tokens][:max_new_tokens]
            rows.append([*row.tolist(), *padded])
        return torch.tensor(rows)


def test_a_sum_is_right_to_its_last_digit_or_wrong():
    tokenizer = CharTokenizer(sorted("0123456789+="), eot=True)
    sums = [(a, b) for a in (5, 7, 12, 95) for b in (3, 8, 44)]
    text = "".join(f"{a}+{b}={a + b}{EOT}" for a, b in sums)
    tokens = tokenizer.encode(text, allow_eot=True)
    result = evaluate.addition(Calculator(tokenizer), tokenizer, tokens, 2, open_device("cpu"))
    assert result == {"sums": 12, "right": 9, "accuracy": 0.75}


def test_bench_prints_ceilings_and_a_share_of_them(capsys):
    sizes = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--vocab_size=65"]
    bench.main(configure(bench.BenchConfig, [*sizes, "--device=cpu", "--steps=2"]))
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed.keys() >= {"products", "memory", "step", "speed", "MFU"}
    assert 0 < float(printed["MFU"].split("%")[0]) < 150


def test_a_model_of_documents_begins_and_ends_them_by_itself(
    train_tiny, lines_data, script, tmp_path
):
    train_tiny(tmp_path / "out", data_dir=lines_data, rows="documents", max_iters=40)
    run = script("sample.py", f"--out_dir={tmp_path / 'out'}", "--num_samples=4", "--start=Sh")
    assert run.returncode == 0, run.stderr
    samples = run.stdout.split("---------------\n")[:-1]
    assert len(samples) == 4 and all(sample.startswith("Sh") for sample in samples)
    assert EOT not in run.stdout and all(len(sample) < 200 for sample in samples)
