"""Measure all GPU figures, in short sections.

    $ python benchmarks/gpu.py --sections=correct --out=rows.jsonl
    $ python benchmarks/gpu.py --sections=gpt2,small,decode --peer=path/to/nanoGPT --out=rows.jsonl
    $ python benchmarks/gpu.py --sections=learn --parts=modern --minutes=8 --out=rows.jsonl
    $ python benchmarks/gpu.py --table=rows.jsonl
    $ python benchmarks/gpu.py --tiny --device=cpu

A section is a process with a time limit. Its parts run in order; a part that fails leaves a row
with the error. Each row is appended to `--out` at once, so an interruption loses only the current
part.

    correct  limits of this device; the numerical tests on it (BRISK_TEST_DEVICE); predicted and
             measured memory; CUDA graphs against eager execution
    gpt2     124M, 12x1024, and nanoGPT; larger batches; DDP with one process; the loss, attention
             and all kernels of a step; gpt2-xl in 80 GB
    small    train_shakespeare_char and nanoGPT, compiled, eager and as CUDA graphs
    decode   124M: 1 and 64 samples; nanoGPT one by one and as a batch; with weights cast once, and
             as CUDA graphs
    learn    whole runs: shakespeare_char to a loss of 1.4697, and the 124M recipes for some minutes

Steps are timed by CUDA events around `steps` steps, after `warm_up`, in `rounds`; two sides
alternate. A figure is the median of the rounds, with the lowest and the highest in brackets.
`--tiny` only tests this script, in seconds on a CPU.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.errors import UserError, did_you_mean, one_line_errors
from configurator import PositiveInt, configure
from gpu_sections.job import Job, describe_machine

# time limits in minutes; learn also gets time for --minutes
SECTIONS = {"correct": 7, "gpt2": 8, "small": 6, "decode": 6, "learn": 6}


@dataclass
class GpuConfig:
    sections: str = "correct,gpt2,small,decode,learn"  # sections to run
    parts: str = ""  # parts to run; if empty, all
    out: str = "gpu.jsonl"  # file to append the rows to
    peer: str = ""  # checkout of nanoGPT; if empty, $NANOGPT, if set
    device: str = "auto"  # cpu, cuda, cuda:1
    rounds: PositiveInt = 3  # rounds for each figure
    warm_up: PositiveInt = 20  # steps before the first round
    steps: PositiveInt = 50  # steps in a round
    minutes: PositiveInt = 8  # minutes for each 124M recipe in learn
    text: str = ""  # text for learn; if empty, the largest in $BRISK_DATA and the Python packages
    tiny: bool = False  # use tiny sizes, to test this script
    table: str = ""  # print the rows of this file as tables, without measuring
    run: str = ""  # internal: run this section in this process


# ----------------------------------------------------------------------------- measuring


def run_parts(config, name):
    """Measure the parts of a section in this process."""
    module, job = importlib.import_module(f"gpu_sections.{name}"), Job(config)
    for part, measure in module.PARTS.items():
        if config.parts and part not in config.parts.split(","):
            continue
        began = time.time()
        try:
            for row in measure(job):
                append(config.out, {"section": name, "part": part, **row})
        except Exception as error:  # any exception: the next parts run anyway
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[0]
            failed = f"{type(error).__name__}: {reason}"
            append(config.out, {"section": name, "part": part, "what": part, "failed": failed})
        job.clean_up()
        print(f"  ({name}, {part}: {time.time() - began:.0f} s)", flush=True)


def append(path, row):
    """Append a row to the file, and print it."""
    row = {**row, "at": round(time.time(), 1)}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(as_line(row), flush=True)


def run_section(config, name, argv):
    """Measure a section in a separate process, killed with its children at the time limit."""
    limit = 60 * (SECTIONS[name] + (2 * config.minutes if name == "learn" else 0))
    command = [sys.executable, __file__, *argv, f"--run={name}"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        if process.wait(limit):
            append(config.out, {"section": name, "what": name, "failed": "the process failed"})
    except subprocess.TimeoutExpired:
        append(config.out, {"section": name, "what": name, "failed": f"stopped after {limit} s"})
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ----------------------------------------------------------------------------- tables


def read_rows(path):
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--table={path}: {error}") from error


def tables(rows):
    """Format the rows as Markdown, with a table for each section."""
    lines = []
    for name in SECTIONS:
        mine = [row for row in rows if row["section"] == name]
        if not mine:
            continue
        lines += [f"## {name}", ""]
        lines += [f"{row['machine']}", ""] if (row := find_machine(rows)) else []
        lines += ["| | figure | nanoGPT's | ratio | |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(cells(row))} |" for row in mine] + [""]
    return "\n".join(lines)


def find_machine(rows):
    return next((row for row in rows if "machine" in row), None)


def cells(row):
    """The cells of a row: label, our figure, nanoGPT's, their ratio (above 1 ours is better), and
    details."""
    if "failed" in row:
        return [row["what"], f"failed: {row['failed']}", "", "", ""]
    ours, theirs = row["values"], row.get("peer")
    ratio = ""
    if theirs:
        turn = (lambda a, b: b / a) if row["unit"] in ("ms", "s", "GB") else (lambda a, b: a / b)
        ratio = in_brackets([turn(a, b) for a, b in zip(ours, theirs, strict=True)])
    more = ", ".join(f"{key} {number(value)}" for key, value in row.get("more", {}).items())
    unit = row["unit"]
    figures = (f"{in_brackets(side)} {unit}".strip() if side else "" for side in (ours, theirs))
    return [row["what"], *figures, ratio, more]


def in_brackets(values):
    if len(values) == 1:
        return number(values[0])
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})"


def number(value):
    """Format a number with four significant digits."""
    if not isinstance(value, float):
        return (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def as_line(row):
    return "  ".join(cell for cell in [row["section"], *cells(row)] if cell)


def main(config, argv):
    if config.table:
        print(tables(read_rows(config.table)))
        return
    config.peer = config.peer or os.environ.get("NANOGPT", "")
    if config.run:
        return run_parts(config, config.run)
    names = [name.strip() for name in config.sections.split(",")]
    for name in names:
        if name not in SECTIONS:
            raise UserError(f"--sections: unknown section {name}{did_you_mean(name, SECTIONS)}")
    known = {
        part for name in names for part in importlib.import_module(f"gpu_sections.{name}").PARTS
    }
    for part in filter(None, config.parts.split(",")):
        if part not in known:
            raise UserError(f"--parts: unknown part {part}{did_you_mean(part, known)}")
    machine = describe_machine(Job(config).device)
    append(
        config.out, {"section": "", "what": "machine", "machine": machine, "values": [], "unit": ""}
    )
    for name in names:
        run_section(config, name, argv)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(GpuConfig, sys.argv[1:]), sys.argv[1:])
