"""Limits of the device, and correctness of its results."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import torch

from brisk.device import DTYPES, Device, matmul_flops
from brisk.errors import UserError
from gpu_sections.job import GPT2, SMALL, row
from model import GPT, GPTConfig
from one_side import seconds_of
from sides import ROOT
from trainer import open_trainer

SECONDS_OF_TESTS = 240


def ceilings(job):
    """Speed of a large matrix product and a large copy, to which other figures are relative."""
    for name in DTYPES if job.on_gpu else ["float32"]:
        device, size = Device(job.device.device, name), job.pick(8192, 256)
        rates = [matmul_flops(device, size, job.pick(1.0, 0.01)) / 1e12 for _ in range(job.rounds)]
        what = "float32 as TF32" if job.on_gpu and name == "float32" else name
        yield row(f"product of {size}x{size}, {what}", "TFLOP/s", rates)
    source = torch.randn(job.pick(2**30, 2**18), device=job.device.device)
    target, rates = torch.empty_like(source), []
    for _ in range(job.rounds + 1):
        rates.append(2 * source.nbytes / seconds_of(lambda: target.copy_(source)) / 1e9)
    yield row("copy, bytes read and written", "GB/s", rates[1:])


def tests(job):
    """Run the tests that take a `device`; a row for each that does not pass."""
    report = job.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "device", f"--junitxml={report}"]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and job.on_gpu:
        command += ["-n", "6"]
    command += ["-k", "test_attention and 4"] if job.tiny else []
    environment = {**os.environ, "BRISK_TEST_DEVICE": job.device.type}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        process.wait(SECONDS_OF_TESTS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it then reports on the tests that are done
        process.wait(30)
    if not report.exists():
        raise UserError("pytest left no report")
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {"passed": 0, "failed": 0, "skipped": 0}
    for case in cases:
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        if failure is not None:
            outcomes["failed"] += 1
            reason = (failure.get("message") or "").strip().splitlines()[:1]
            yield row(f"{case.get('name')}", "", [], failed_with="".join(reason)[:200])
        else:
            outcomes["skipped" if case.find("skipped") is not None else "passed"] += 1
    yield row("tests of numbers that passed", "", [outcomes.pop("passed")], **outcomes)


def memory(job):
    """Memory in GB that the plan expects, and the peak of three steps."""
    modern = [str(ROOT / "config" / "model" / "modern.py")]
    cases = {
        "eager": (["--compile=False"], 12),
        "eager, modern": ([*modern, "--compile=False"], 12),
        "eager, 2 micro-batches": (["--compile=False", "--gradient_accumulation_steps=2"], 12),
        "recomputed": (["--compile=False", "--activation_checkpointing=True"], 12),
        "compiled": (["--compile=auto"], 12),
    }
    for what, (more, batch_size) in cases.items():
        argv = [*more[:-1], *job.argv(GPT2, job.pick(batch_size, 2)), more[-1]]
        job.clean_up()
        with open_trainer(argv) as trainer:
            for _ in range(3):
                trainer.step()
            job.device.synchronize()
            (number, unit), *_ = re.findall(r"about ([\d.]+) (MB|GB)", trainer.plan.lines[-1])
            expected = float(number) / (1000 if unit == "MB" else 1)
            if job.on_gpu:
                taken = torch.cuda.max_memory_allocated() / 1e9
                share = {"taken GB": taken, "expected by taken": expected / taken}
            else:
                share = {}
            yield row(f"memory expected, {what}", "GB", [expected], **share)


def graphs(job):
    """Losses and ids with and without CUDA graphs. Fails if they differ beyond the tolerance."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for optimizer in ("adamw", "muon"):
            yield from losses_of_graphs(job, optimizer)
        yield from ids_of_graphs(job)
    finally:
        torch.set_float32_matmul_precision(precision)


def losses_of_graphs(job, optimizer):
    found = []
    for on in (False, job.on_gpu):
        keys = {"dtype": "float32", "compile": False, "dropout": 0.1, "optimizer": optimizer}
        keys |= {"gradient_accumulation_steps": 2, "cuda_graph": on}
        job.clean_up()
        with open_trainer(job.argv(SMALL, job.pick(16, 2), **keys)) as trainer:
            found.append(torch.stack([trainer.step()[0] for _ in range(20)]).double().cpu())
    differences = (found[1] / found[0] - 1).abs()
    # Muon's products are in bfloat16 on a GPU
    limit = 1e-4 if optimizer == "adamw" else 1e-2
    alike = (differences < limit).double().mean().item()
    what = f"losses of 20 steps alike as CUDA graphs, {optimizer}"
    yield row(what, "", [alike], **{"largest difference": differences.max().item()})
    if alike < 1:
        raise UserError(f"{what}: a difference of {differences.max().item():.2g}")


def ids_of_graphs(job):
    args = job.model_args({**SMALL, "vocab_size": 65})
    torch.manual_seed(0)
    model = GPT(GPTConfig(**args)).to(job.device.device)
    prompts = [[1, 2, 3], [5], [7] * 20]
    for options in ({"temperature": 0}, {"top_k": 20, "seed": 1}):
        texts = []
        for on in (False, True):
            drawn = model.generate(prompts, job.pick(400, 40), cuda_graph=on, **options)
            texts.append(torch.cat(drawn))
        alike = (texts[0] == texts[1]).double().mean().item()
        what = f"ids alike as CUDA graphs, {options}"
        yield row(what, "", [alike])
        if alike < 1:
            raise UserError(f"{what}: {alike:.3g} of them")


PARTS = {"ceilings": ceilings, "memory": memory, "graphs": graphs, "tests": tests}
