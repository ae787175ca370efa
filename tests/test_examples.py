"""Example files and documented commands run, and the tests named in the pages exist."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, TEXT, free_port

from brisk.checkpoint import load_checkpoint
from configurator import configure
from train import TrainConfig

# Fake Slurm commands: one node, which is this machine, and a queue that records requeued jobs.
SLURM = {
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$2" >> requeued; fi',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_slurm_job_saves_and_is_requeued(settings, tmp_path):
    for name, body in SLURM.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1"}
    job |= {"GPUS_PER_NODE": "2", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def submit(**changes):
        (tmp_path / "train.py").unlink(missing_ok=True)
        (tmp_path / "train.py").symlink_to(ROOT / "train.py")
        command = ["bash", ROOT / "examples" / "slurm.sbatch", *settings("out", **changes)]
        out = open(tmp_path / "log", "w")
        env = {**os.environ, **job, "PATH": path}
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=out)

    length = {"max_iters": 100000, "eval_interval": 100000, "log_interval": 1}
    process, until = submit(**length), time.monotonic() + 120
    try:
        while "iter 20:" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) != 0
    finally:
        process.kill()
    log = (tmp_path / "log").read_text()
    step = load_checkpoint(tmp_path / "out" / "last.pt")["iter_num"]
    assert step > 20 and f"saved step {step}" in log
    assert (tmp_path / "requeued").read_text() == "7\n"

    assert submit(**{**length, "max_iters": step + 3}).wait(120) == 0
    log = (tmp_path / "log").read_text()
    assert f"at step {step}" in log and f"iter {step + 3}:" in log
    assert (tmp_path / "requeued").read_text() == "7\n"  # a finished job is not requeued


def test_kubernetes_job_has_valid_arguments(monkeypatch):
    monkeypatch.chdir(ROOT)
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text())
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    shell, dash_c, line = container["command"]
    assert (shell, dash_c) == ("/bin/sh", "-c")
    subprocess.run(["sh", "-n", "-c", line], check=True)
    torchrun, train, argv = line.partition(" train.py ")
    config = configure(TrainConfig, shlex.split(argv))
    assert train and config.init_from == "auto" and config.out_dir.startswith("/data/")
    nodes = int(re.search(r"--nnodes=(\d+)", torchrun)[1])
    assert nodes == job["spec"]["completions"] == job["spec"]["parallelism"]


# ----------------------------------------------------------------------------- the pages

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
NOT_HERE = "torchrun|init_from=gpt2|finetune|openwebtext|data/shakespeare/|interactive|serve"
# Arguments that shorten a command to a second, by script; the last match is used.
SHORTER = {
    "prepare.py": "--input=my.txt --data_dir=data/shakespeare_char",
    "train.py": "--max_iters=2 --eval_iters=1 --eval_interval=2 --batch_size=1 --device=cpu",
    "train.py --init_from=resume": "--max_iters=4 --device=cpu",
    "train.py --input=my.txt --init_from=resume": "--max_iters=4 --device=cpu",
    "sample.py": "--num_samples=1 --max_new_tokens=5 --device=cpu",
    "evaluate.py": "--device=cpu",
}


def blocks(page, language):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page):
    """The shell commands of a page, each a list of words."""
    for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("<this repository>", "URL"), comments=True)
        while "&&" in words:
            cut = words.index("&&")
            yield words[:cut]
            words = words[cut + 1 :]
        if words:
            yield words


def settings_class(script):
    """The dataclass of a script's settings."""
    spec = importlib.util.spec_from_file_location("script_of_a_page", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = [kind for kind in vars(module).values() if getattr(kind, "__module__", "") == spec.name]
    return next(kind for kind in own if kind.__name__.endswith("Config"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_scripts_accept_the_commands(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    classes, seen = {"train.py": TrainConfig}, 0
    for words in commands(page):
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        if words[0] not in ("python", "torchrun") or words[1] == "-m":
            continue
        first = next(i for i, word in enumerate(words[1:], 1) if word.endswith(".py"))
        script, argv = words[first], words[first + 1 :]
        if script not in classes:
            classes[script] = settings_class(script)
        keys = [word for word in argv if word.startswith("-") or word.endswith(".py")]
        if "--help" not in keys:
            configure(classes[script], keys)
        seen += 1
    assert seen or page.stem in ("architecture", "guarantees"), page


def test_readme_commands_run(quick_script, tmp_path):
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "my.txt").write_text("ROMEO:\nThe answer, def " + 30 * TEXT)
    demo = "python train.py config/train_python_source.py --dataset=shakespeare_char"
    demo = shlex.split(f"{demo} --out_dir=out-demo")  # instead of `make demo`
    run, ran = list(commands(ROOT / "README.md")), 0
    run.insert(1 + next(i for i, words in enumerate(run) if "prepare.py" in words[-1]), demo)
    for words in run:
        line = " ".join(words[1:])
        if words[0] != "python" or words[1] == "-m" or re.search(NOT_HERE, line):
            continue
        fits = [more for start, more in SHORTER.items() if re.match(rf"(\S*/)?{start}", line)]
        argv = [*words[2:], *(fits[-1].split() if fits and "--dry_run" not in words else [])]
        ended = quick_script(words[1], *argv, cwd=tmp_path)
        assert ended.returncode == 0, f"{line}\n{ended.stderr}"
        ran += 1
    assert ran > 10 and (tmp_path / "loss.png").exists() and (tmp_path / "my-model").is_dir()


@pytest.mark.parametrize("page", ["sampling", "data"])
def test_python_in_pages_runs(page, train_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT)
    train_tiny(tmp_path / "out-shakespeare-char-fast")
    for block in blocks(ROOT / "docs" / f"{page}.md", "python"):
        exec(block.replace('"ROMEO:"', '"Rough"'), {})


def test_guarantees_name_existing_tests():
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    section = page.split("## Promises and their tests")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(test_\w+)\.py`: ((?:`test_\w+`(?:, )?)+)", row)
        assert named, row
        for file, tests in named:
            text = next((ROOT / "tests").rglob(f"{file}.py")).read_text()
            for test in re.findall(r"`(test_\w+)`", tests):
                assert f"\ndef {test}(" in text, f"{file}.py has no {test}"
