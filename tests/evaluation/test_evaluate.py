"""evaluate.py scores every token once and matches transformers; bench.py runs."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import evaluate
from brisk.checkpoint import load_checkpoint
from brisk.data.loader import TokenFile
from brisk.data.saved_tokenizer import from_dict
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer
from brisk.device import open_device
from brisk.errors import UserError
from configurator import configure
from model import GPT, GPTConfig

CPU = open_device("cpu", "float32")


@pytest.fixture
def evaluated(capsys):
    """`evaluated(**settings)`: run evaluate.py. Returns its JSON as a dict."""

    def run(**settings):
        argv = [f"--{key}={value}" for key, value in {"device": "cpu", **settings}.items()]
        capsys.readouterr()
        evaluate.main(configure(evaluate.EvaluateConfig, [*argv, "--json=True"]))
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that errors are visible
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def write_tokens(tmp_path):
    """Write token ids to a file. Returns its `TokenFile` with the model's vocabulary."""

    def write(tokens, **options):
        np.asarray(tokens, dtype="<u2").tofile(tmp_path / "val.bin")
        return TokenFile(tmp_path / "val.bin", 1, 13, **options)

    return write


def random_tokens(length):
    return np.random.default_rng(length).integers(0, 13, length)


@pytest.mark.parametrize("length", [2, 8, 9, 10, 64, 65, 66, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_token_is_scored_once(model, write_tokens, length, batch_size):
    tokens = random_tokens(length)
    nats = 0.0  # one window after another
    for start in range(0, length - 1, 8):
        ids = torch.from_numpy(tokens[start : start + 9])[None]
        logits = model.predict(ids[:, :-1])
        nats += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    counts = {"bytes": 2 * length, "characters": length}
    result = evaluate.loss(model, write_tokens(tokens), counts, CPU, batch_size)
    assert result["tokens"] == length - 1
    assert result["loss"] == pytest.approx(nats / (length - 1), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / (2 * length), rel=1e-5)
    assert result["bits_per_character"] == pytest.approx(2 * result["bits_per_byte"])
    assert result["loss_per_character"] == pytest.approx(nats / length, rel=1e-5)


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """The same weights in transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=13)
    config = transformers.GPT2Config(
        **sizes, bos_token_id=0, eos_token_id=0, activation_function="gelu"
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {k: w.t() if k.endswith(turned) else w for k, w in model.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs


@torch.no_grad()
def strided_nats(theirs, ids, stride, all_positions=False):
    """The loss of each target of `ids` with transformers, in Hugging Face's loop over windows of 8
    inputs, without scoring the overlap again."""
    nll, counted = [], 0
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + 8, len(ids) - 1)
        logits = theirs(torch.tensor([ids[begin:end]])).logits[0]
        targets = torch.tensor(ids[begin + 1 : end + 1])
        nats = F.cross_entropy(logits, targets, reduction="none").tolist()
        nll += nats if all_positions else nats[counted - begin :] if counted else nats
        counted = end
        if end == len(ids) - 1:
            break
    return nll


@pytest.mark.parametrize("length", [2, 8, 9, 10, 40, 101])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("all_positions", [False, True])
def test_strided_loss_matches_transformers(
    model, theirs, write_tokens, length, stride, all_positions
):
    tokens = random_tokens(length)
    nll = strided_nats(theirs, tokens.tolist(), stride, all_positions)
    counts = {"bytes": length, "characters": length}
    result = evaluate.loss(model, write_tokens(tokens), counts, CPU, 3, stride, all_positions)
    assert result["tokens"] == len(nll)
    assert result["loss"] == pytest.approx(np.mean(nll), abs=1e-4)
    assert all_positions or len(nll) == length - 1
    # bits per byte are undefined if tokens are scored twice
    assert ("bits_per_byte" in result) == (len(nll) == length - 1)


def test_small_stride_gives_more_context(model, write_tokens):
    """A copy of the token seven positions earlier is predictable only if both are in the window."""
    seen = [evaluate.windows(np.array([30]), 8, stride) for stride in (8, 2)]
    contexts = [
        [t - b for b, e, n in zip(*window[1:], strict=True) for t in range(n, e)] for window in seen
    ]
    assert [len(context) for context in contexts] == [30, 30]
    assert min(contexts[0][8:]) == 0 and min(contexts[1][8:]) == 6


def documents_and_file(write_tokens):
    """Documents of 1 to 30 tokens with empty ones between them, and their file."""
    rng = np.random.default_rng(5)
    documents = [rng.integers(0, 12, n).tolist() for n in [*range(1, 31), 8, 7, 9, 16, 15, 17]]
    stream = [12]  # an empty document
    for n, document in enumerate(documents):
        stream += [*document, 12] + [12] * (n % 10 == 0)
    return documents, write_tokens([*stream, 3, 4], rows="documents", eot=12)


@pytest.mark.parametrize("stride", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_documents_are_scored_separately(model, theirs, write_tokens, stride, batch_size):
    documents, file = documents_and_file(write_tokens)
    nll = [strided_nats(theirs, [12, *d, 12], stride or 8) for d in documents]
    characters = sum(map(len, documents))
    counts = {"bytes": 2 * characters, "characters": characters}
    result = evaluate.loss(model, file, counts, CPU, batch_size, stride)
    assert result["tokens"] == characters + len(documents)
    assert result["loss"] == pytest.approx(np.mean(np.concatenate(nll)), abs=1e-4)
    of_text = sum(sum(nats[:-1]) for nats in nll) / characters
    assert result["loss_per_character"] == pytest.approx(of_text, abs=1e-4)
    assert result["bits_per_character"] == pytest.approx(of_text / math.log(2), abs=1e-4)
    assert result["bits_per_byte"] == pytest.approx(of_text / 2 / math.log(2), abs=1e-4)


def test_first_document_starts_like_the_others(model, theirs, write_tokens):
    """The file does not start with an end-of-text; all other documents follow one."""
    file = write_tokens([1, 2, 3, 12, 4, 5, 12], rows="documents", eot=12)
    nll = strided_nats(theirs, [12, 1, 2, 3, 12], 8) + strided_nats(theirs, [12, 4, 5, 12], 8)
    assert evaluate.loss(model, file, {}, CPU)["loss"] == pytest.approx(np.mean(nll), abs=1e-4)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("aé—😀", eot=True)])
def test_text_counts_without_meta_json(tokenizer, tmp_path, monkeypatch):
    documents = ["aé—", "😀", "aaaé😀"]
    text = "".join(document + EOT for document in documents)
    tokenizer.encode(text, allow_eot=True).astype("<u2").tofile(tmp_path / "val.bin")
    vocab_size, eot = tokenizer.vocab_size, tokenizer.eot
    file = TokenFile(tmp_path / "val.bin", 1, vocab_size, rows="documents", eot=eot)
    monkeypatch.setattr(evaluate, "SCAN", 4)
    whole = "".join(documents)
    expected = {"bytes": len(whole.encode()), "characters": len(whole)}
    assert evaluate.count_text(file, tokenizer) == expected


def test_document_model_is_scored_by_document(train_tiny, evaluated, lines_data, tmp_path):
    train_tiny(tmp_path / "out", data_dir=lines_data, rows="documents")
    checkpoint = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    model, nats, nats_of_text = GPT.from_checkpoint(checkpoint), 0.0, 0.0
    tokenizer = from_dict(checkpoint["tokenizer"])
    ids = np.fromfile(lines_data / "val.bin", dtype="<u2")
    lines = [line for line in tokenizer.decode(ids).split(EOT) if line]
    for line in lines:  # of up to three windows of 16
        row = [tokenizer.eot, *tokenizer.encode(line).tolist(), tokenizer.eot]
        for start in range(0, len(row) - 1, 16):
            part = torch.tensor([row[start : start + 17]])
            nll = F.cross_entropy(model.predict(part[:, :-1])[0], part[0, 1:], reduction="none")
            nats += nll.sum().item()
            nats_of_text += nll[part[0, 1:] != tokenizer.eot].sum().item()
    out = tmp_path / "out"
    result = evaluated(out_dir=out)
    characters = sum(map(len, lines))
    assert result["tokens"] == characters + len(lines)
    assert result["loss"] == pytest.approx(nats / result["tokens"], abs=1e-4)
    assert result["loss_per_character"] == pytest.approx(nats_of_text / characters, abs=1e-4)
    assert evaluated(out_dir=out, rows="documents") == result
    assert evaluated(out_dir=out, rows="windows")["tokens"] == len(ids) - 1
    # the same files as prepared by nanoGPT, with a meta.pkl only
    shutil.copytree(lines_data, tmp_path / "bare", ignore=shutil.ignore_patterns("meta.json"))
    bare = evaluated(out_dir=out, data_dir=tmp_path / "bare")
    assert {**bare, "data": ""} == {**result, "data": ""}


def test_text_and_json_have_the_same_numbers(train_tiny, evaluated, tmp_path, capsys):
    train_tiny(tmp_path / "out", max_iters=0)
    result = evaluated(out_dir=tmp_path / "out", stride=5)
    argv = [f"--out_dir={tmp_path / 'out'}", "--stride=5", "--device=cpu"]
    evaluate.main(configure(evaluate.EvaluateConfig, argv))
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed.keys() == result.keys()
    for name in result.keys() - {"data"}:
        assert float(printed[name].replace(",", "")) == pytest.approx(result[name], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stride": 17}, ["stride=17", "block_size=16"]),
        ({"rows": "documents"}, ["no end-of-text"]),
        ({"task": "hellaswag"}, ["task=hellaswag", "--file"]),
        ({"task": "lambada", "file": "missing.jsonl"}, ["cannot read missing.jsonl"]),
        ({"file": "text.txt"}, ["--file is for --task=hellaswag or --task=lambada"]),
    ],
)
def test_wrong_settings_are_refused(train_tiny, evaluated, tmp_path, changes, words):
    train_tiny(tmp_path / "out", max_iters=0)
    with pytest.raises(UserError) as caught:
        evaluated(out_dir=tmp_path / "out", **changes)
    assert all(word in str(caught.value) for word in words)


def test_damaged_items_are_one_line_and_status_2(train_tiny, quick_script, tmp_path):
    train_tiny(tmp_path / "out", max_iters=0)
    (tmp_path / "items.jsonl").write_text('{"text": "so long"}\n{"text": so long}\n')
    argv = [f"--out_dir={tmp_path / 'out'}", "--task=lambada", f"--file={tmp_path}/items.jsonl"]
    run = quick_script("evaluate.py", *argv, "--device=cpu")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path}/items.jsonl, line 2: not JSON"
    )
    assert "Traceback" not in run.stderr


def test_ids_beyond_the_vocabulary_are_found(model, write_tokens, monkeypatch):
    monkeypatch.setattr("brisk.data.loader.SCAN", 4)
    file = write_tokens([1, 2, 3, 4, 5, 13, 1])
    with pytest.raises(UserError, match="token id 13"):
        evaluate.loss(model, file, {}, CPU)


def test_default_data_is_the_training_data(train_tiny, evaluated, char_data, tmp_path):
    run = train_tiny(tmp_path / "out", eval_iters=50)
    result = evaluated(out_dir=tmp_path / "out")
    assert result["data"] == str(char_data / "val.bin")
    assert result["loss"] == pytest.approx(run.series("val_loss")[8], abs=0.1)
    assert evaluated(out_dir=tmp_path / "out", split="train")["loss"] != result["loss"]
    with pytest.raises(UserError, match="no sums"):
        evaluated(out_dir=tmp_path / "out", task="addition")


def test_data_with_another_tokenizer_is_refused(train_tiny, evaluated, lines_data, tmp_path):
    train_tiny(tmp_path / "out", max_iters=0)
    with pytest.raises(UserError, match="different tokenizer"):
        evaluated(out_dir=tmp_path / "out", data_dir=lines_data)


def test_document_model_begins_and_ends_documents(train_tiny, lines_data, script, tmp_path):
    train_tiny(tmp_path / "out", data_dir=lines_data, rows="documents", max_iters=150)
    run = script("sample.py", f"--out_dir={tmp_path / 'out'}", "--num_samples=4", "--start=Sh")
    assert run.returncode == 0, run.stderr
    samples = run.stdout.split("---------------\n")[:-1]
    assert len(samples) == 4 and all(sample.startswith("Sh") for sample in samples)
    assert EOT not in run.stdout and all(len(sample) < 200 for sample in samples)
