"""Documents → token files in GPT-2's byte pairs: this repository, nanoGPT, and tiktoken alone.

    $ python benchmarks/compare_tokenizing.py --peer=path/to/nanoGPT --megabytes=240

Each side is a whole process, from a file of JSON lines to train.bin, in turn, several rounds:

    brisk     python data/openwebtext/prepare.py --source=…
    nanogpt   the data/openwebtext/prepare.py of the checkout, as it is, given the same documents
    tiktoken  one process: encode_ordinary on each document, the ids written to a file

The documents are the Python files of this machine's packages. Prints each side's median time and
its ratio to brisk's, with the smallest and the largest ratio of a round, as text or JSON; and how
much faster tokenizing and writing alone is than tiktoken in one process.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.data.bpe import gpt2
from brisk.data.dataset import write_dataset
from brisk.errors import UserError, one_line_errors
from configurator import PositiveInt, configure

ROOT = Path(__file__).resolve().parents[1]
PAGE = 5000  # characters of a document, as many as a web page has
VAL_SHARE = 0.1
ALONE = """
import json, sys
import numpy as np, tiktoken
encoder = tiktoken.get_encoding("gpt2")
with open(sys.argv[1], encoding="utf-8") as lines, open("train.bin", "wb") as file:
    for line in lines:
        ids = encoder.encode_ordinary(json.loads(line)["text"]) + [encoder.eot_token]
        file.write(np.array(ids, dtype=np.uint16).tobytes())
"""
# nanoGPT's script asks the hub for its documents; here the hub is a file. It takes 0.0005 of them
# to validate on, and fails where these are fewer than 1,024: here it takes more, and so does ours.
AS_IT_IS = """
import runpy, sys
import datasets
load, split = datasets.load_dataset, datasets.Dataset.train_test_split
def load_dataset(name, num_proc=None):
    return load("json", data_files=sys.argv[1])
def train_test_split(self, test_size, **options):
    return split(self, test_size=float(sys.argv[2]), **options)
datasets.load_dataset, datasets.Dataset.train_test_split = load_dataset, train_test_split
runpy.run_path("prepare.py", run_name="__main__")
"""


@dataclass(frozen=True)
class CompareConfig:
    peer: str = ""  # a checkout of nanoGPT; left out if empty
    megabytes: PositiveInt = 240  # of text
    rounds: PositiveInt = 3  # each side runs once in each
    json: bool = False  # print one JSON object instead of text


def write_documents(path, megabytes):
    """Python files, cut into pages, as JSON lines; the number of bytes of their text."""
    size = 0
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")])
    with open(path, "w", encoding="utf-8") as lines:
        for file in (file for folder in folders for file in sorted(Path(folder).rglob("*.py"))):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            for start in range(0, len(text), PAGE):
                lines.write(json.dumps({"text": text[start : start + PAGE]}) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                break
    return size


def sides(config, documents):
    """Name → (command, the folder it runs in, a folder to copy there first or None)."""
    prepare = ROOT / "data" / "openwebtext" / "prepare.py"
    ours = [str(prepare), f"--source={documents}", "--data_dir=.", f"--test_size={VAL_SHARE}"]
    found = {"brisk": (ours, None), "tiktoken": (["-c", ALONE, str(documents)], None)}
    if config.peer:
        folder = Path(config.peer, "data", "openwebtext")
        if not (folder / "prepare.py").exists():
            raise UserError(f"--peer={config.peer} is no checkout of nanoGPT")
        found["nanogpt"] = (["-c", AS_IT_IS, str(documents), str(VAL_SHARE)], folder)
    return found


def timed(command, folder):
    """Seconds of a whole process in a folder, and a cache, of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary, "work")
        shutil.copytree(folder, work) if folder else work.mkdir()
        environment = {**os.environ, "HF_HOME": str(Path(temporary, "cache"))}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise UserError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
        files = [work / "train.bin", work / "val.bin"]
        return seconds, sum(file.stat().st_size for file in files if file.exists()) // 2


def rate_ratio(documents):
    """How many times as fast as tiktoken in one process tokenizing and writing is by itself, with
    the documents in memory and the start of its workers counted."""
    encoder, tokenizer = tiktoken.get_encoding("gpt2"), gpt2()
    with open(documents, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with open(Path(folder, "alone.bin"), "wb") as file:
            for text in texts:
                ids = [*encoder.encode_ordinary(text), encoder.eot_token]
                file.write(np.array(ids, dtype=np.uint16).tobytes())
        alone = time.perf_counter() - began
        began = time.perf_counter()
        write_dataset(folder, tokenizer, {"train": texts}, "", end_documents=True)
        return alone / (time.perf_counter() - began)


def main(config):
    with tempfile.TemporaryDirectory() as temporary:
        documents = Path(temporary, "documents.jsonl")
        size = write_documents(documents, config.megabytes)
        runs = {name: [] for name in sides(config, documents)}
        for number in range(config.rounds):
            for name, (command, folder) in sides(config, documents).items():
                seconds, tokens = timed(command, folder)
                runs[name].append(seconds)
                print(f"round {number + 1}: {name} {seconds:.1f} s, {tokens:,} tokens")
        rates = [rate_ratio(documents) for _ in range(config.rounds)]
    result = {"megabytes": size / 1e6, "cores": os.cpu_count()}
    result["tokenizing_alone"] = {
        "ratio": median(rates),
        "lowest": min(rates),
        "highest": max(rates),
    }
    for name, seconds in runs.items():
        ratios = [other / ours for other, ours in zip(seconds, runs["brisk"], strict=True)]
        figures = {"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        result[name] = {"seconds": median(seconds), **figures}
    if config.json:
        print(json.dumps(result))
    else:
        for name in runs:
            of = result[name]
            spread = f"{of['lowest']:.2f} to {of['highest']:.2f}"
            print(f"{name:<10} {of['ratio']:.2f} times the time of brisk ({spread})")
        alone = f"{median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
        print(
            f"tokenizing and writing alone, beside tiktoken in one process: {alone} times as fast"
        )


if __name__ == "__main__":
    with one_line_errors():
        main(configure(CompareConfig, sys.argv[1:]))
