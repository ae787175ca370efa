"""Text from the same weights: this repository and nanoGPT.

    $ python benchmarks/compare_sampling.py --peer=path/to/nanoGPT
    $ python benchmarks/compare_sampling.py --peer=path/to/nanoGPT --n_layer=12 --n_head=12 \\
          --n_embd=768 --block_size=1024 --samples=1 --tokens=200

The weights are those of the checkpoint `--ckpt`, or random in the given sizes, for GPT-2's
vocabulary where n_embd is 768 or more and 65 characters else. Both sides draw as many samples of
as many tokens, in turn, several rounds:

    process     each side's sample.py, a whole process, which reads the same checkpoint
    generation  `model.generate` alone, in one process: ours side by side, nanoGPT's in turn

Prints each side's median seconds and tokens a second, and the median ratio of a round with the
smallest and the largest, as text or as JSON.
"""

import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.checkpoint import load_checkpoint
from brisk.errors import UserError, one_line_errors
from configurator import PositiveInt, configure
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
CHARACTERS = "\n !$&',-.3:;?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz"


@dataclass
class CompareConfig:
    peer: str = ""  # a checkout of nanoGPT
    ckpt: str = ""  # a checkpoint of characters, in nanoGPT's format; empty: random weights
    n_layer: PositiveInt = 4  # sizes of the random weights
    n_head: PositiveInt = 4
    n_embd: PositiveInt = 128
    block_size: PositiveInt = 64
    samples: PositiveInt = 10
    tokens: PositiveInt = 500  # of each sample
    exact_window: bool = False  # ours sees a whole window past block_size too
    rounds: PositiveInt = 3  # each side runs once in each
    processes: bool = True  # time whole processes too
    json: bool = False  # print one JSON object instead of text


def weights(config):
    """A checkpoint's arguments of the model and its weights."""
    if config.ckpt:
        checkpoint = load_checkpoint(config.ckpt)
        state = checkpoint["model"]
        return checkpoint["model_args"], {k.removeprefix("_orig_mod."): v for k, v in state.items()}
    torch.manual_seed(1337)
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    vocab_size = 50304 if config.n_embd >= 768 else len(CHARACTERS)
    model = GPT(GPTConfig(vocab_size=vocab_size, **sizes))
    return model.config.to_args(), model.state_dict()


def write_run(folder, model_args, state):
    """A checkpoint that both read, in `folder`/out, and for characters their meta.pkl."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    checkpoint = {"model": state, "model_args": model_args, "config": {"dataset": "letters"}}
    torch.save({**checkpoint, "iter_num": 0, "best_val_loss": 0.0}, folder / "out" / "ckpt.pt")
    if model_args["vocab_size"] == len(CHARACTERS):
        itos = dict(enumerate(CHARACTERS))
        meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
        data = folder / "data" / "letters"
        data.mkdir(parents=True, exist_ok=True)
        (data / "meta.pkl").write_bytes(pickle.dumps(meta))


def process_seconds(config, script, folder):
    """Seconds of a whole process of a sample.py."""
    argv = [f"--num_samples={config.samples}", f"--max_new_tokens={config.tokens}", "--start=A"]
    argv += ["--device=cpu", "--dtype=float32", "--out_dir=out"]
    if script.parent == ROOT:
        argv.append(f"--exact_window={config.exact_window}")
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, script, *argv], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{script} failed: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - began


def generation_seconds(config, model, batch_size, **options):
    """Seconds of `model.generate` alone, for all samples, `batch_size` side by side."""
    idx = torch.zeros(batch_size, 1, dtype=torch.long)
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(config.samples // batch_size):
            model.generate(idx, config.tokens, temperature=0.8, top_k=200, **options)
    return time.perf_counter() - began


def nanogpt(path):
    """The module model.py of a checkout."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(config):
    peer = Path(config.peer, "model.py")
    if not config.peer or not peer.exists():
        raise UserError(f"--peer={config.peer} is no checkout of nanoGPT")
    model_args, state = weights(config)
    ours, module = GPT.with_weights(model_args, state), nanogpt(peer)
    theirs = module.GPT(module.GPTConfig(**model_args)).eval()
    theirs.load_state_dict(state)
    kinds = ["generation", "process"] if config.processes else ["generation"]
    runs = {kind: {"brisk": [], "nanogpt": []} for kind in kinds}
    with tempfile.TemporaryDirectory() as temporary:
        checkout = Path(temporary, "nanogpt")
        shutil.copytree(config.peer, checkout, ignore=shutil.ignore_patterns(".git"))
        for folder in (checkout, Path(temporary, "brisk")):
            write_run(folder, model_args, state)
        for _ in range(config.rounds):
            options = {"exact_window": config.exact_window}
            seconds = generation_seconds(config, ours, config.samples, **options)
            runs["generation"]["brisk"].append(seconds)
            runs["generation"]["nanogpt"].append(generation_seconds(config, theirs, 1))
            if config.processes:
                for name, root in (("brisk", ROOT), ("nanogpt", checkout)):
                    seconds = process_seconds(config, root / "sample.py", checkout.parent / name)
                    runs["process"][name].append(seconds)
    result = {"samples": config.samples, "tokens": config.tokens}
    result |= {"threads": torch.get_num_threads(), "parameters": ours.get_num_params()}
    for kind, sides in runs.items():
        ratios = [n / b for b, n in zip(sides["brisk"], sides["nanogpt"], strict=True)]
        figures = {"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        for name, seconds in sides.items():
            rate = config.samples * config.tokens / median(seconds)
            figures[name] = {"seconds": median(seconds), "tokens_per_second": rate}
        result[kind] = figures
    print(json.dumps(result) if config.json else as_text(result, kinds))


def as_text(result, kinds):
    lines = []
    for kind in kinds:
        of = result[kind]
        rates = [f"{n} {of[n]['tokens_per_second']:,.0f}" for n in ("brisk", "nanogpt")]
        spread = f"{of['lowest']:.1f} to {of['highest']:.1f}"
        lines.append(f"{kind:<11}{of['ratio']:5.1f} times as fast ({spread}); tokens a second: ")
        lines[-1] += ", ".join(rates)
    return "\n".join(lines)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(CompareConfig, sys.argv[1:]))
