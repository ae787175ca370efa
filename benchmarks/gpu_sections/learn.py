"""Whole runs of train.py, including compilation: time to a loss, and loss after a time."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from statistics import median

from brisk.errors import UserError
from gpu_sections.job import row
from sides import DATASET, ROOT, lay_out_text, prepare_command, run

TARGET = 1.4697  # nanoGPT's README: the best validation loss of config/train_shakespeare_char.py
LINE = "To be, or not to be: that is the question.\n"
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2"]
TINY += ["--eval_iters=2", "--warmup_iters=1"]


def shakespeare_char(job):
    """Seconds from the start of the process to a validation loss of TARGET."""
    argv = ["config/train_shakespeare_char.py", f"--device={job.device.type}"]
    argv += [*TINY, "--max_iters=4", "--eval_interval=2", "--compile=False"] if job.tiny else []
    target, sides = job.pick(TARGET, 5.0), job.sides()
    text = job.folder / "text.txt"
    text.write_text(LINE * 400)
    job.config.input = str(text) if job.tiny else ""
    lay_out_text(job.config, sides)
    found = {name: [] for name in sides}
    for side in sides.values():
        run(prepare_command(side), side)
    for number in range(job.rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            found[name].append(time_to(target, sides[name], argv))
    times = {name: [seconds for seconds, *_ in found[name]] for name in found}
    more = {f"steps, {name}": str([step for _, step, _ in found[name]]) for name in found}
    more |= {f"losses, {name}": str([loss for *_, loss in found[name]]) for name in found}
    what = f"shakespeare_char to a validation loss of {target}"
    yield row(what, "s", times["brisk"], times.get("nanogpt"), **more)


def time_to(target, side, argv):
    """(seconds, step, loss) of the first evaluation at or below `target`, or of the last."""
    where = [f"--data_dir={side.folder / 'data' / DATASET}"] if side.is_brisk else []
    command = [sys.executable, "-u", side.root / "train.py", *argv, *where, "--out_dir=out"]
    began, reached, lines = time.perf_counter(), None, []
    process = subprocess.Popen(
        command, cwd=side.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        lines.append(line)
        if evaluated := re.match(r"step (\d+): train loss .*, val loss ([\d.]+)", line):
            step, loss = int(evaluated[1]), float(evaluated[2])
            reached = (time.perf_counter() - began, step, loss)
            if loss <= target:
                break
    process.kill()
    process.wait()
    if reached is None:
        raise UserError(f"{side.name}'s train.py: {''.join(lines[-3:]).strip()[-300:]}")
    return reached


def recipe(job, name):
    """A 124M recipe for `minutes`, schedule included, on the largest text found."""
    data, about = text_for(job)
    out = job.folder / name
    argv = [ROOT / "config" / f"{name}.py", f"--data_dir={data}", f"--out_dir={out}"]
    argv += [f"--device={job.config.device}", "--wandb_log=False"]
    more = [*TINY, "--gradient_accumulation_steps=1", "--max_iters=4", "--eval_interval=2"]
    argv += more if job.tiny else [f"--minutes={job.minutes}"]
    began = time.perf_counter()
    command = [sys.executable, ROOT / "train.py", *argv]
    done = subprocess.run(command, cwd=job.folder, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"train.py: {(done.stderr.strip().splitlines() or [''])[-1]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]
    last = [record for record in records if "val_loss" in record][-1]
    speed = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    more = {"whole process s": seconds, "steps": last["step"], "tokens": last["tokens"]}
    more |= {"tokens/s": median(speed), "training loss": last["train_loss"], "text": about}
    more |= {f"at step {r['step']}": r["val_loss"] for r in records if "val_loss" in r}
    yield row(f"{name}, validation loss", "nats", [last["val_loss"]], **more)
    shutil.rmtree(out)


def text_for(job):
    """(folder of GPT-2 tokens, source) of --text, or of the largest text found."""
    given = Path(job.config.text or largest_text())
    if job.tiny:
        given = job.folder / "tiny.txt"
        given.write_text(LINE * 400)
    folder = (job.folder if job.tiny else job.folder.parent) / f"gpu-text-{given.name}"
    if not (folder / "train.bin").exists():
        prepare = [sys.executable, ROOT / "data" / "custom" / "prepare.py", f"--input={given}"]
        kinds = ["char"] if job.tiny else ["gpt2", "bpe"]  # GPT-2's vocabulary may not be had
        for kind in kinds:
            command = [*prepare, f"--tokenizer={kind}", f"--data_dir={folder}", "--val_share=0.02"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            raise UserError(f"prepare.py: {(done.stderr.strip().splitlines() or [''])[-1]}")
    tokens = (folder / "train.bin").stat().st_size // 2
    return folder, f"{given.name}, {tokens / 1e6:.1f} M tokens"


def largest_text():
    """The largest file in BRISK_DATA, or the installed Python packages."""
    packages = Path(sysconfig.get_path("purelib"))
    sizes = {packages: sum(file.stat().st_size for file in packages.rglob("*.py"))}
    if os.environ.get("BRISK_DATA"):
        files = Path(os.environ["BRISK_DATA"]).rglob("*.txt")
        sizes |= {file: file.stat().st_size for file in files}
    return max(sizes, key=sizes.get)


def gpt2(job):
    yield from recipe(job, "train_gpt2")


def modern(job):
    yield from recipe(job, "train_gpt2_modern")


PARTS = {"shakespeare_char": shakespeare_char, "gpt2": gpt2, "modern": modern}
