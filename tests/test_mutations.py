"""Randomly damaged files are refused in one line, or read correctly.

Seeded changes: truncation, appended bytes, flipped bits, zeros, duplicated and missing parts,
another file, an empty file, a folder; in structured files (JSON, checkpoints) also values of a
different type or size, with valid checksums. For formats with a checksum, "correctly" means equal
to the original; otherwise (a Hugging Face directory, characters in a meta.json) complete and
usable.
"""

import copy
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, exit_line

import export
import train
from brisk.checkpoint import load_checkpoint
from brisk.data.dataset import load_tokenizer, read_meta, verify_data
from brisk.data.loader import TokenFile
from brisk.data.saved_tokenizer import from_dict
from brisk.device import open_device
from brisk.errors import UserError
from brisk.evaluation.tasks import lambada
from brisk.interop.tokenizer_json import read_tokenizer
from brisk.reporting.curves import draw, read_runs
from brisk.training.optim import load_optimizer
from configurator import configure
from model import GPT

KINDS = ("ckpt.pt", "train.bin", "meta.json", "meta.pkl", "safetensors", "config.json")
KINDS += ("tokenizer.json", "jsonl", "metrics")
HOSTILE = [10**18, 2**63, -1, 0, 1, 1e308, math.nan, math.inf, 10**400, True, None, "", "x", "\0"]
HOSTILE += ["../..", "é" * 1000, [], {}, [[]], {"": None}, [1, "2"]]


# ----------------------------------------------------------------------------- changes


def change_bytes(rng, data, others):
    """Apply a random change to `data` (bytes). `others` are the contents of other files."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in "ab")
    b = min(b, a + rng.choice((1, 2, 8, 100, 10**9)))
    noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    way = rng.randrange(10)
    if way == 0:
        return data[:a]
    if way == 1:
        return data + (noise if rng.random() < 0.5 else data[a:])
    if way == 2:
        return data[:a] + bytes(b - a) + data[b:]
    if way == 3:
        return data[:a] + noise + data[a + len(noise) :]
    if way == 4:
        return data[:a] + data[b:]
    if way == 5:
        return data[:b] + data[a:]
    if way == 6:
        return data[:a] + noise + data[a:]
    if way == 7 and rng.random() < 0.3:
        return rng.choice([b"", b"\0", b"{}", b"[" * 100_000, noise, *others])
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def change_value(rng, value):
    """A copy of nested dicts and lists with one value, at any depth, changed or removed."""
    value = copy.deepcopy(value)
    inside, places = [value], []
    while inside:
        here = inside.pop()
        keys = here.keys() if isinstance(here, dict) else range(len(here))
        places += [(here, key) for key in keys]
        inside += [here[key] for key in keys if isinstance(here[key], dict | list)]
    here, key = rng.choice(places)
    if rng.random() < 0.2:
        del here[key]
    elif isinstance(here[key], int) and rng.random() < 0.3:
        here[key] += rng.choice((-1, 1, 1000, -1000))
    else:
        here[key] = rng.choice(HOSTILE)
    return value


class Files:
    """Intact files of every kind, their damaged copies, and their readers."""

    def __init__(self, folder, data):
        self.folder, self.number = folder, 0
        self.data = shutil.copytree(data, folder / "data")
        given = {**TINY, "data_dir": self.data, "out_dir": folder / "out", "max_iters": 1}
        train.main(configure(train.TrainConfig, [f"--{k}={v}" for k, v in given.items()]))
        argv = [f"--out_dir={folder / 'out'}", f"--to={folder / 'hf'}"]
        export.main(configure(export.ExportConfig, argv))
        items = [json.dumps({"text": line}) for line in TEXT.splitlines() if line]
        (folder / "items.jsonl").write_text("\n".join(items))
        self.checkpoint = load_checkpoint(folder / "out" / "ckpt.pt")
        self.model = GPT.from_checkpoint(self.checkpoint)
        self.tokenizer = load_tokenizer(self.data)
        self.ids = np.fromfile(self.data / "train.bin", dtype="<u2")
        self.paths = {
            "ckpt.pt": folder / "out" / "ckpt.pt",
            "train.bin": self.data / "train.bin",
            "meta.json": self.data / "meta.json",
            "meta.pkl": self.data / "meta.pkl",
            "safetensors": folder / "hf" / "model.safetensors",
            "config.json": folder / "hf" / "config.json",
            "tokenizer.json": folder / "hf" / "tokenizer.json",
            "jsonl": folder / "items.jsonl",
            "metrics": folder / "out" / "metrics.jsonl",
        }
        self.whole = {kind: path.read_bytes() for kind, path in self.paths.items()}

    def damage(self, kind, rng):
        """Copy the files of a `kind` to a folder and damage one. Returns its path."""
        self.number += 1
        folder, path = self.paths[kind].parent, self.paths[kind]
        copied = self.folder / f"copy-{self.number}"
        skipped = ["copy-*", "data", "out", "hf"] if folder == self.folder else ["last.pt", "*.png"]
        shutil.copytree(folder, copied, ignore=shutil.ignore_patterns(*skipped))
        if kind == "meta.pkl":
            (copied / "meta.json").unlink()
        target = copied / path.name
        if rng.random() < 0.01:
            target.unlink()
            target.mkdir()
        elif rng.random() < 0.5 and (target.suffix == ".json" or kind in ("jsonl", "metrics")):
            lines = target.read_text().split("\n") if "jsonl" in path.name else [target.read_text()]
            number = rng.choice([i for i, line in enumerate(lines) if line])
            lines[number] = json.dumps(change_value(rng, json.loads(lines[number])))
            target.write_text("\n".join(lines))
        elif rng.random() < 0.5 and kind == "ckpt.pt":
            checkpoint = torch.load(path, weights_only=True)
            torch.save(change_value(rng, checkpoint), target)
        else:
            others = [self.whole[other] for other in KINDS]
            target.write_bytes(change_bytes(rng, self.whole[kind], others))
        return target

    # Readers: each raises `UserError` or satisfies the assertions.

    def read_ckpt(self, path):
        checkpoint = load_checkpoint(path)
        for name, weight in checkpoint["model"].items():  # checked by its checksum
            assert torch.equal(weight, self.checkpoint["model"][name])
        argv = ["--init_from=resume", f"--out_dir={path.parent}", "--device=cpu", "--dry_run"]
        train.main(configure(train.TrainConfig, argv))
        model = GPT.from_checkpoint(checkpoint)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        load_optimizer(optimizer, checkpoint["optimizer"])
        idx = torch.zeros((1, 4), dtype=torch.int64)
        model(idx, idx)[1].backward()
        optimizer.step()

    def read_data(self, path, verify=True):
        meta, tokenizer = read_meta(path.parent), load_tokenizer(path.parent)
        if verify and meta:
            verify_data(path.parent, meta)
        dtype = meta["dtype"] if meta else "uint16"
        tokens = TokenFile(path.parent / "train.bin", 16, tokenizer.vocab_size, dtype)
        for position in range(0, tokens.rows, 8):
            x, _ = tokens.batch(position, 8)
            assert x.max() < tokenizer.vocab_size
        if verify and meta:
            assert np.array_equal(tokens.tokens, self.ids)
            assert tokenizer.vocab_size == self.tokenizer.vocab_size
        tokenizer.decode(self.ids[:100])

    def read_directory(self, path):
        model, tokenizer = GPT.from_pretrained(path.parent), read_tokenizer(path.parent)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError("refused by sample.py")
        assert tokenizer.decode(tokenizer.encode("Shall")) == "Shall"
        logits = model.predict(torch.zeros((1, 4), dtype=torch.int64))
        assert logits.shape == (1, 4, model.config.vocab_size)

    def read_items(self, path):
        device = open_device("cpu", "float32")
        result = lambada(self.model, self.tokenizer, path, 16, device)
        assert 0 <= result["accuracy"] <= 1

    def read_metrics(self, path):
        draw(read_runs([path]))

    def read(self, kind, path):
        readers = {"ckpt.pt": self.read_ckpt, "jsonl": self.read_items}
        readers |= {"metrics": self.read_metrics}
        readers |= dict.fromkeys(("train.bin", "meta.json", "meta.pkl"), self.read_data)
        return readers.get(kind, self.read_directory)(path)

    def script(self, kind, path):
        """(script, arguments) that read the damaged file."""
        folder, run = path.parent, self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        sampling = ["--device=cpu", "--num_samples=1", "--max_new_tokens=4", "--start=a"]
        if kind in ("train.bin", "meta.json", "meta.pkl"):
            given = {**TINY, "data_dir": folder, "out_dir": run, "max_iters": 2}
            return "train.py", [f"--{key}={value}" for key, value in given.items()]
        if kind == "ckpt.pt":
            return "train.py", ["--init_from=resume", f"--out_dir={folder}", "--max_iters=2"]
        if kind == "jsonl":
            task = ["--task=lambada", f"--file={path}", "--device=cpu"]
            return "evaluate.py", [f"--out_dir={self.folder / 'out'}", *task]
        if kind == "metrics":
            return "plot.py", [str(folder)]
        return "sample.py", [f"--init_from={folder}", *sampling]


@pytest.fixture(scope="module")
def files(tmp_path_factory, char_data):
    return Files(tmp_path_factory.mktemp("files"), char_data)


def counted(files, kind, seeds):
    """Damage a file of `kind` once for each of `seeds`. Returns the numbers read and refused."""
    read = refused = 0
    for seed in seeds:
        path = files.damage(kind, random.Random(f"{kind} {seed}"))
        try:
            error = exit_line(files.read, kind, path)
        except Exception as failure:
            raise AssertionError(f"{kind}, seed {seed}: {failure!r}") from failure
        read, refused = read + (error is None), refused + (error is not None)
        shutil.rmtree(path.parent)
    return read, refused


def in_processes(files, forked, kind, seeds):
    """Run the script that reads files of `kind` on damaged ones, once for each of `seeds`."""
    for seed in seeds:
        path = files.damage(kind, random.Random(f"{kind} {seed}"))
        script, argv = files.script(kind, path)
        result = forked(script, argv, files.folder, seconds=60)
        lines = result.stderr.splitlines()
        assert result.returncode in (0, 2), (seed, result.returncode, result.stderr)
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == (result.returncode == 2), (seed, result.stderr)
        assert "Traceback" not in result.stderr + result.stdout, (seed, result.stderr)
        shutil.rmtree(path.parent)


# In the slow variant 2,000 of each kind; drawing takes a tenth of a second.
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_file_is_refused_or_read_right(files, kind):
    few = {"metrics": 10, "ckpt.pt": 25}.get(kind, 100)
    read, refused = counted(files, kind, range(few))
    assert read > 0 or kind == "train.bin"  # some damage is harmless
    assert refused > 0 or kind == "metrics"  # there, damaged lines are skipped


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_damaged_files(files, kind):
    read, refused = counted(files, kind, range(1000, 3000))
    print(f"{kind}: {refused} refused, {read} read")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_file_in_a_script(files, forked, kind):
    in_processes(files, forked, kind, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_damaged_files_in_a_script(files, forked, kind):
    in_processes(files, forked, kind, range(1000, 1050))


# ----------------------------------------------------------------------------- of another set


def test_bins_of_another_set_are_detected(files, tmp_path):
    """Always by their sizes; with equal sizes by --verify_data."""
    for change, noticed in (
        (lambda ids: ids[:-1], "does not match meta.json"),
        (lambda ids: np.roll(ids, 1), "its checksum does not match meta.json"),
    ):
        data = shutil.copytree(files.data, tmp_path / noticed[:4], dirs_exist_ok=True)
        change(files.ids).tofile(data / "train.bin")
        given = {**TINY, "data_dir": data, "out_dir": tmp_path / "out", "verify_data": True}
        argv = [f"--{key}={value}" for key, value in given.items()]
        assert noticed in exit_line(lambda a=argv: train.main(configure(train.TrainConfig, a)))
        assert not (tmp_path / "out").exists()


def test_whole_data_is_verified_and_trained_on(files, tmp_path, main, settings):
    run = main(settings(tmp_path / "out", verify_data=True, max_iters=1))
    assert 1 in run.series("loss")


def test_verify_needs_a_meta_json(files, tmp_path, settings):
    data = shutil.copytree(files.data, tmp_path / "data")
    (data / "meta.json").unlink()
    argv = settings(tmp_path / "out", data_dir=data, verify_data=True)
    assert "no meta.json" in exit_line(lambda: train.main(configure(train.TrainConfig, argv)))


def test_swapped_train_and_val_are_detected(files, tmp_path):
    data = shutil.copytree(files.data, tmp_path / "data")
    shutil.move(data / "train.bin", data / "kept")
    shutil.move(data / "val.bin", data / "train.bin")
    shutil.move(data / "kept", data / "val.bin")
    assert "does not match meta.json" in exit_line(read_meta, data)


def test_other_vocab_size_is_detected(files, tmp_path):
    data = shutil.copytree(files.data, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    meta["tokenizer"]["characters"] = meta["tokenizer"]["characters"][:-1]
    (data / "meta.json").write_text(json.dumps(meta))
    assert "its tokenizer" in exit_line(load_tokenizer, data)


# ----------------------------------------------------------------------------- byte pairs


def test_bpe_without_all_bytes_is_refused(trained_pairs):
    """tiktoken would accept them, and abort the process at the first text with such a byte."""
    tokens = trained_pairs["tokens"].split(" ")
    for odd in (tokens[1:], [*tokens, tokens[5]], tokens[256:], ["", *tokens[1:]]):
        assert exit_line(from_dict, {**trained_pairs, "tokens": " ".join(odd)})


@pytest.fixture(scope="module")
def trained_pairs():
    from brisk.data.bpe import train_bpe

    return train_bpe([TEXT], 300).to_dict()


def test_two_hundred_damaged_bpe_dicts(trained_pairs):
    for seed in range(200):
        rng = random.Random(seed)
        description = change_value(rng, trained_pairs)
        if rng.random() < 0.5:
            raw = change_bytes(rng, trained_pairs["tokens"].encode(), [])
            description["tokens"] = raw.decode("latin-1")

        def use(description=description):
            tokenizer = from_dict(description)
            ids = tokenizer.encode(TEXT + "é\0", allow_eot=True)
            assert tokenizer.decode(ids) == TEXT + "é\0"

        exit_line(use)
