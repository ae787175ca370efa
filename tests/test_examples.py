"""The example files run, as far as they can here, and the README names tests that exist."""

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
from conftest import ROOT, free_port

from brisk.checkpoint import load_checkpoint
from configurator import configure
from train import TrainConfig

# Stand-ins: one node, which is this machine, and a queue that takes note of what comes back to it.
SLURM = {
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$2" >> requeued; fi',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_job_for_slurm_saves_before_its_time_is_up_and_is_requeued(settings, tmp_path):
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
    assert (tmp_path / "requeued").read_text() == "7\n"  # the end is the end


def test_the_job_for_kubernetes_says_what_train_py_takes(monkeypatch):
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


def test_what_the_readme_promises_has_the_tests_it_names():
    section = (ROOT / "README.md").read_text().split("## What it promises")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(test_\w+)\.py`: ((?:`test_\w+`(?:, )?)+)", row)
        assert named, row
        for file, tests in named:
            text = next((ROOT / "tests").rglob(f"{file}.py")).read_text()
            for test in re.findall(r"`(test_\w+)`", tests):
                assert f"\ndef {test}(" in text, f"{file}.py has no {test}"
