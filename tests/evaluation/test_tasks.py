"""Tasks match transformers, and invalid items end in one line."""

import json
import math

import numpy as np
import pytest
import torch

import evaluate
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer, learn_words
from brisk.device import open_device
from brisk.errors import UserError
from brisk.evaluation import tasks
from brisk.evaluation.scoring import batches
from configurator import configure
from model import GPT

CPU = open_device("cpu", "float32")
BLOCK_SIZE = 48


@pytest.fixture
def models(tmp_path):
    """`models(vocab_size)`: a small random GPT2LMHeadModel, and ours loaded from it."""
    transformers = pytest.importorskip("transformers")

    def make(vocab_size):
        torch.manual_seed(vocab_size)
        sizes = dict(n_layer=2, n_head=2, n_embd=32, n_positions=BLOCK_SIZE, vocab_size=vocab_size)
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        ).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():  # far from uniform, so that errors are visible
                parameter.add_(0.2 * torch.randn_like(parameter))
            # a tied head would predict repetitions
            theirs.transformer.wpe.weight.mul_(10)
        theirs.save_pretrained(tmp_path / "model")
        return theirs, GPT.from_pretrained(str(tmp_path / "model"))

    return make


@pytest.fixture
def write_items(tmp_path):
    """Write items (a list of objects, or the text of the file) to a file. Returns its path."""

    def write(items):
        path = tmp_path / "items.jsonl"
        if not isinstance(items, str):
            items = "".join(json.dumps(item) + "\n" for item in items)
        path.write_text(items, encoding="utf-8")
        return path

    return write


@torch.no_grad()
def reference(theirs, context, continuation):
    """With transformers and batch size 1: -ln p of a continuation (ids), and whether greedy
    decoding generates it."""
    whole = [*context, *continuation]
    ids = torch.tensor([whole[-BLOCK_SIZE - 1 :]])
    log_probs = theirs(ids[:, :-1]).logits[0].log_softmax(-1)[-len(continuation) :]
    targets = ids[0, -len(continuation) :]
    nats = -log_probs.gather(1, targets[:, None]).sum().item()
    return nats, bool((log_probs.argmax(-1) == targets).all())


def draw_words(rng, words, fewest, most):
    return " ".join(rng.choice(words, rng.integers(fewest, most + 1)))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_hellaswag_matches_transformers(models, write_items, text, batch_size, documents):
    theirs, ours = models(257)
    tokenizer, rng, words = ByteTokenizer(), np.random.default_rng(0), text.split()
    items = [
        {
            "ctx": draw_words(rng, words, 0 if n == 0 else 1, 12),
            "endings": [draw_words(rng, words, 1, 5) for _ in range(rng.integers(2, 6))],
        }
        for n in range(60)
    ]
    items[0]["ctx"] = ""
    items[1]["endings"][0] = "…é" * 3  # more bytes than characters
    nats, sizes, cut = [], [], 0
    for item in items:
        context = list(item["ctx"].encode())
        context = [256, *context] if documents or not context else context
        endings = [list(f" {ending}".encode()) for ending in item["endings"]]
        nats.append([reference(theirs, context, ending)[0] for ending in endings])
        sizes.append(([len(e) for e in item["endings"]], [len(e) for e in endings]))
        cut += len(context) + max(map(len, endings)) > BLOCK_SIZE + 1
    assert 5 < cut < 55  # some are truncated, some are not

    chosen = {
        "accuracy": [int(np.argmin(nll)) for nll in nats],
        "accuracy_norm": [
            int(np.argmin(np.array(n) / s[0])) for n, s in zip(nats, sizes, strict=True)
        ],
        "accuracy_norm_token": [
            int(np.argmin(np.array(n) / s[1])) for n, s in zip(nats, sizes, strict=True)
        ],
    }
    for name, answers in chosen.items():  # make the model's choice the right one
        for n, (item, answer) in enumerate(zip(items, answers, strict=True)):
            item["label"] = answer if n % 2 else str(answer)
        result = tasks.hellaswag(
            ours, tokenizer, write_items(items), batch_size, CPU, documents=documents
        )
        assert result["items"] == 60 and result["cut"] == cut
        for other, others in chosen.items():
            agreed = np.mean([a == b for a, b in zip(answers, others, strict=True)])
            assert result[other] == pytest.approx(agreed)
        assert result[name] == 1.0
    assert 0.1 < result["accuracy"] < 0.9  # the three measures differ


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_lambada_matches_transformers(models, write_items, batch_size, capsys):
    tokenizer = CharTokenizer("ab ", eot=True)  # with so few characters some guesses are right
    theirs, ours = models(tokenizer.vocab_size)
    rng = np.random.default_rng(1)
    texts = [draw_words(rng, ["a", "b", "ab", "ba"], 1, 40) for _ in range(80)]
    texts[3] += " \n"
    texts[4] = "\n".join(["a b", "ab"]).replace("\n", "  ")
    nll, hits, cut = [], [], 0
    for line in texts:
        before, _, word = line.strip().rpartition(" ")
        context = tokenizer.encode(before.rstrip()).tolist() or [tokenizer.eot]
        nats, hit = reference(theirs, context, tokenizer.encode(f" {word}").tolist())
        nll.append(nats)
        hits.append(hit)
        cut += len(context) + len(word) + 1 > BLOCK_SIZE + 1
    path = write_items([{"text": line} for line in texts])
    result = tasks.lambada(ours, tokenizer, path, batch_size, CPU)
    assert 0 < np.mean(hits) < 1 and 5 < cut < 75
    assert result["items"] == 80 and result["cut"] == cut
    assert result["accuracy"] == pytest.approx(np.mean(hits))
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-3)
    assert f"{cut} of 80 items are longer than block_size=48" in capsys.readouterr().err


def test_row_loss_is_independent_of_the_batch(models):
    theirs, ours = models(257)
    rng = np.random.default_rng(2)
    pairs = [
        tuple(rng.integers(0, 257, rng.integers(1, most)) for most in (60, 49)) for _ in range(70)
    ]
    nats, likeliest = tasks.score(ours, pairs, 2, CPU)
    for pair, cost, hit in zip(pairs, nats, likeliest, strict=True):
        expected, greedy = reference(theirs, *(ids.tolist() for ids in pair))
        assert cost == pytest.approx(expected, abs=1e-3) and hit == greedy


def test_chunked_logits_match(models, monkeypatch):
    _, ours = models(257)
    rng = np.random.default_rng(3)
    pairs = [(rng.integers(0, 257, 9), rng.integers(0, 257, 7)) for _ in range(20)]
    whole, _ = tasks.score(ours, pairs, 10, CPU)
    monkeypatch.setattr("brisk.evaluation.scoring.LOGITS_AT_ONCE", 257 * 4)
    parts, _ = tasks.score(ours, pairs, 10, CPU)
    assert parts == pytest.approx(whole, rel=1e-6)


def test_gpt2_tokens_and_a_hugging_face_folder(
    gpt2_tokenizer, models, write_items, text, tmp_path, capsys
):
    """From the command line, with the last word and its space in one token."""
    tokenizer = gpt2_tokenizer
    theirs, _ = models(50257)
    rng, words = np.random.default_rng(4), text.split()

    def run(task, path):
        source = f"--init_from={tmp_path / 'model'}"
        argv = [f"--task={task}", f"--file={path}", source, "--device=cpu", "--json=True"]
        capsys.readouterr()
        evaluate.main(configure(evaluate.EvaluateConfig, argv))
        return json.loads(capsys.readouterr().out)

    lines = [draw_words(rng, words, 2, 20) for _ in range(30)]
    pairs = [(line.rpartition(" ")[0], " " + line.rpartition(" ")[2]) for line in lines]
    found = [reference(theirs, *(tokenizer.encode(t).tolist() for t in pair)) for pair in pairs]
    result = run("lambada", write_items([{"text": line} for line in lines]))
    expected = np.mean([nats for nats, _ in found])
    assert math.log(result["perplexity"]) == pytest.approx(expected, abs=1e-3)
    assert result["data"] == str(tmp_path / "items.jsonl")

    items, right = [], 0
    for _ in range(30):
        context, endings = (
            draw_words(rng, words, 3, 12),
            [draw_words(rng, words, 1, 6) for _ in "1234"],
        )
        ids = [tokenizer.encode(f" {ending}").tolist() for ending in endings]
        nll = [reference(theirs, tokenizer.encode(context).tolist(), e)[0] for e in ids]
        items.append({"ctx": context, "endings": endings, "label": int(rng.integers(4))})
        right += np.argmin(nll) == items[-1]["label"]
    assert run("hellaswag", write_items(items))["accuracy"] == pytest.approx(right / 30)


def test_batches_have_every_row_once():
    lengths = np.random.default_rng(6).integers(1, 49, 500)
    found = batches(lengths, 4 * BLOCK_SIZE)
    assert sorted(np.concatenate(found).tolist()) == list(range(500))
    sizes = [len(batch) * lengths[batch].max() for batch in found]
    assert max(sizes) <= 4 * BLOCK_SIZE
    assert sum(sizes) < 1.1 * lengths.sum()  # little padding
    assert [len(batch) for batch in batches(np.array([9, 50, 9]), 20)] == [1, 2]


def test_long_item_is_truncated(capsys):
    """The last token is a target only, so block_size + 1 fit."""
    assert tasks.count_cut([(range(40), range(9))], BLOCK_SIZE, "words") == (0, 0)
    assert capsys.readouterr().err == ""
    pairs = [(range(41), range(9)), (range(40), range(9)), (range(1), range(48))]
    assert tasks.count_cut(pairs, BLOCK_SIZE, "words") == (1, 0)
    assert "1 of 3 items" in capsys.readouterr().err
    assert tasks.count_cut([*pairs, (range(1), range(49))], BLOCK_SIZE, "words") == (2, 1)
    assert "their beginnings are truncated, and the words of 1 of them" in capsys.readouterr().err


def test_long_ending_is_truncated_and_counted(models, write_items, capsys):
    tokenizer, rng = ByteTokenizer(), np.random.default_rng(7)
    theirs, ours = models(257)
    letters = [bytes(rng.integers(97, 123, n)).decode() for n in (30, 60, 47, 48, 200)]
    rows = [f"ab {ending}".encode() for ending in letters]
    scored = np.minimum([len(ending) + 1 for ending in letters], BLOCK_SIZE)
    nats = [reference(theirs, row[:-n], row[-n:])[0] for row, n in zip(rows, scored, strict=True)]
    characters = [len(e) * n / (len(e) + 1) for n, e in zip(scored, letters, strict=True)]
    by = {"accuracy": 1, "accuracy_norm": characters, "accuracy_norm_token": scored}
    for name, lengths in by.items():
        label = int(np.argmin(np.array(nats) / lengths))
        items = [{"ctx": "ab", "endings": letters, "label": label}]
        items += [{"ctx": "ab", "endings": ["a", "b"], "label": 0}]
        result = tasks.hellaswag(ours, tokenizer, write_items(items), 4, CPU)
        assert result[name] >= 0.5 and result["cut"] == result["cut_endings"] == 1
        assert "1 of 2 items are longer than block_size=48" in capsys.readouterr().err


def test_long_word_is_truncated_and_counted(models, write_items):
    tokenizer = ByteTokenizer()
    theirs, ours = models(257)
    pairs = [("she reads", "w" * 60), ("she", "reads"), ("she reads " * 9, "books")]
    path = write_items([{"text": " ".join(pair)} for pair in pairs])
    rows = [" ".join((before.strip(), word)).encode() for before, word in pairs]
    scored = [min(BLOCK_SIZE, len(word) + 1) for _, word in pairs]
    found = [reference(theirs, row[:-n], row[-n:]) for row, n in zip(rows, scored, strict=True)]
    result = tasks.lambada(ours, tokenizer, path, 2, CPU)
    assert math.log(result["perplexity"]) == pytest.approx(np.mean([n for n, _ in found]), abs=1e-3)
    assert (result["items"], result["cut"], result["cut_words"]) == (3, 2, 1)


GOOD = json.dumps({"ctx": "a b", "endings": ["a", "b"], "label": 1, "text": "a b ab"})


@pytest.mark.parametrize(
    ("task", "line", "words"),
    [
        ("hellaswag", '{"ctx": "a", "endings": ["a"', ["line 3", "not JSON"]),
        ("hellaswag", "[" * 100_000, ["line 3", "not JSON"]),
        ("hellaswag", "[1, 2]", ["line 3", "ctx"]),
        ("hellaswag", '{"endings": ["a", "b"], "label": 0}', ["line 3", "ctx"]),
        ("hellaswag", '{"ctx": 7, "endings": ["a", "b"], "label": 0}', ["line 3", "ctx"]),
        ("hellaswag", '{"ctx": "a", "label": 0}', ["line 3", "endings"]),
        ("hellaswag", '{"ctx": "a", "endings": [], "label": 0}', ["line 3", "endings"]),
        ("hellaswag", '{"ctx": "a", "endings": ["a", ""], "label": 0}', ["line 3", "endings"]),
        ("hellaswag", '{"ctx": "a", "endings": ["a", 5], "label": 0}', ["line 3", "endings"]),
        ("hellaswag", '{"ctx": "a", "endings": ["a", "b"]}', ["line 3", "label=null"]),
        ("hellaswag", '{"ctx": "a", "endings": ["a", "b"], "label": 2}', ["line 3", "label=2"]),
        ("hellaswag", '{"ctx": "a", "endings": ["a", "b"], "label": -1}', ["label=-1", "0 to 1"]),
        ("hellaswag", '{"ctx": "a", "endings": ["a", "b"], "label": ""}', ['label=""']),
        ("hellaswag", '{"ctx": "a", "endings": ["a", "b"], "label": true}', ["label=true"]),
        ("hellaswag", '{"ctx": "", "endings": ["a", "b"], "label": 0}', ["line 3", "end-of-text"]),
        ("hellaswag", '{"ctx": "x", "endings": ["a", "b"], "label": 0}', ["line 3", "'x'"]),
        ("hellaswag", '{"ctx": "a", "endings": ["a", "x"], "label": 0}', ["line 3", "'x'"]),
        ("lambada", '{"ctx": "a b"}', ["line 3", "text"]),
        ("lambada", '{"text": null}', ["line 3", "text"]),
        ("lambada", '{"text": " \\n"}', ["line 3", "no words"]),
        ("lambada", '{"text": "ab"}', ["line 3", "end-of-text"]),
        ("lambada", '{"text": "a b xyz"}', ["line 3", "'x', 'y', 'z'"]),
    ],
)
def test_invalid_item_names_its_line(models, write_items, task, line, words):
    tokenizer = CharTokenizer("ab ")
    _, ours = models(tokenizer.vocab_size)
    path = write_items(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as caught:
        getattr(tasks, task)(ours, tokenizer, path, 4, CPU)
    assert all(word in str(caught.value) for word in [str(path), *words])


def test_ending_without_tokens_is_refused(models, write_items):
    tokenizer = learn_words(["she reads a book"], eot=True)  # punctuation is not a word
    _, ours = models(tokenizer.vocab_size)
    path = write_items([{"ctx": "she reads", "endings": ["a book", "…"], "label": 0}])
    with pytest.raises(UserError, match="line 1: the tokenizer returns no tokens for '…'"):
        tasks.hellaswag(ours, tokenizer, path, 4, CPU)


def test_unreadable_file_is_refused(models, write_items, tmp_path):
    tokenizer = CharTokenizer("ab ")
    _, ours = models(tokenizer.vocab_size)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.jsonl", "binary", "model"):  # the last is a folder
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            tasks.lambada(ours, tokenizer, tmp_path / name, 4, CPU)
    with pytest.raises(UserError, match="there are no items"):
        tasks.lambada(ours, tokenizer, write_items("\n \n"), 4, CPU)


class Calculator:
    """A fake model that adds, but is wrong if the first summand is 7."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, ids, max_new_tokens, temperature, vocab_size):
        assert temperature == 0 and vocab_size == self.tokenizer.vocab_size
        rows = []
        for row in ids:
            assert row[0] == self.tokenizer.eot  # as in training
            a, b = map(int, self.tokenizer.decode(row[1:-1]).split("+"))
            answer = self.tokenizer.encode(f"{a + b + 10 * (a == 7)}{EOT}", allow_eot=True)
            padded = [*answer.tolist(), *[0] * max_new_tokens][:max_new_tokens]
            rows.append(torch.tensor([*row.tolist(), *padded]))
        return rows


def test_sum_must_be_completely_right():
    tokenizer = CharTokenizer(sorted("0123456789+="), eot=True)
    sums = [(a, b) for a in (5, 7, 12, 95) for b in (3, 8, 44)]
    text = "".join(f"{a}+{b}={a + b}{EOT}" for a, b in sums)
    tokens = tokenizer.encode(text, allow_eot=True)
    result = tasks.addition(Calculator(tokenizer), tokenizer, tokens, 2, CPU)
    assert result == {"sums": 12, "right": 9, "accuracy": 0.75}
