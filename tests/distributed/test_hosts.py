"""Two hosts with separate folders train as one and survive failures of the link between them.

A host is a network namespace of Linux: its own address, reached by a pair of virtual cables only.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_data_parallel import assert_same_run

from brisk.checkpoint import load_checkpoint

PATIENCE = 120  # seconds; it takes a few on an idle machine
LENGTH = {"max_iters": 60, "lr_decay_iters": 60, "eval_interval": 20, "log_interval": 1}
LENGTH |= {"learning_rate": 1e-3, "min_lr": 1e-4}  # larger ones amplify rounding differences
BATCH = {"gradient_accumulation_steps": 2, "batch_size": 3}


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """Two namespaces, the cable between them, and their processes."""

    def __init__(self, folder):
        self.names = [f"brisk{os.getpid()}-{n}" for n in (0, 1)]
        self.cables = [f"bk{os.getpid()}-{n}" for n in (0, 1)]
        self.folders = [folder / f"host{n}" for n in (0, 1)]
        self.processes = []

    def plug(self):
        for name in self.names:
            ip("netns", "add", name)
        one, two = self.cables
        ip("link", "add", one, "netns", self.names[0], "type", "veth", "peer", "name", two)
        ip("link", "set", two, "netns", self.names[1])
        for number, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", self.cables[number])
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", self.cables[number], "up")
            self.folders[number].mkdir(exist_ok=True)

    def cable(self, state, end=0):
        ip("-n", self.names[end], "link", "set", self.cables[end], state)

    def torchrun(self, number, settings, **launcher):
        """Start torchrun with one process on a host, in its folder."""
        launcher = {"nnodes": 2, "nproc_per_node": 1, **launcher}
        options = [f"--{key}={value}" for key, value in launcher.items()]
        command = ["ip", "netns", "exec", self.names[number], sys.executable]
        command += ["-m", "torch.distributed.run", *options, str(ROOT / "train.py"), *settings]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cables[number]}
        out, err = (open(self.folders[number] / name, "w") for name in ("out.txt", "err.txt"))
        with out, err:
            process = subprocess.Popen(
                command, cwd=self.folders[number], env=env, stdout=out, stderr=err
            )
        self.processes.append(process)
        return process

    def train(self, settings):
        """The command of the README on both hosts."""
        where = {"master_addr": "10.77.0.1", "master_port": 29500}
        return [self.torchrun(n, settings, node_rank=n, **where) for n in (0, 1)]

    def said(self, number=0, name="out.txt"):
        return (self.folders[number] / name).read_text(encoding="utf-8")

    def wait_for(self, text):
        until = time.monotonic() + PATIENCE
        while text not in self.said():
            assert time.monotonic() < until, self.said() + self.said(name="err.txt")
            assert all(p.poll() is None for p in self.processes), self.said(name="err.txt")
            time.sleep(0.005)

    def unplug(self):
        for process in self.processes:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def hosts(tmp_path):
    if not shutil.which("ip"):
        pytest.skip("needs `ip`, and the right to make network namespaces")
    pair = Hosts(tmp_path)
    try:
        try:
            pair.plug()
        except OSError as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        yield pair
    finally:
        pair.unplug()


@pytest.fixture
def ends(hosts):
    def ends(processes):
        return [process.wait(PATIENCE) for process in processes]

    return ends


def files(hosts, number):
    """The files on a host, except its redirected output."""
    return {path.name for path in hosts.folders[number].iterdir()} - {"out.txt", "err.txt"}


def test_two_hosts_survive_a_short_link_failure(hosts, ends, settings, train_tiny, tmp_path):
    whole = train_tiny(tmp_path / "whole", **LENGTH, **BATCH).out_dir
    processes = hosts.train(settings("out", **LENGTH, **BATCH))
    hosts.wait_for("iter 30:")
    hosts.cable("down")
    time.sleep(0.5)  # let the current step finish
    before = hosts.said()
    time.sleep(2)
    assert hosts.said() == before  # neither trains on alone
    hosts.cable("up")
    assert ends(processes) == [0, 0], hosts.said(name="err.txt") + hosts.said(1, "err.txt")
    assert_same_run(whole, hosts.folders[0] / "out")
    assert files(hosts, 0) == {"out"} and files(hosts, 1) == set()  # one of them writes


@pytest.mark.slow
def test_long_link_failure_ends_and_restarts(hosts, ends, settings, train_tiny, tmp_path):
    whole = train_tiny(tmp_path / "whole", **LENGTH, **BATCH).out_dir
    command = settings("out", **LENGTH, **BATCH, timeout=10, init_from="auto")
    processes = hosts.train(command)
    hosts.wait_for("iter 30:")
    hosts.cable("down")
    began = time.monotonic()
    assert 0 not in ends(processes)
    assert time.monotonic() - began < 100  # torchrun may take half of it to stop its processes
    for number in (0, 1):
        errors = hosts.said(number, "err.txt").splitlines()
        lines = [line for line in errors if line.startswith("error: ")]
        assert len(lines) == 1 and "lost the run's other processes" in lines[0], errors
    step = load_checkpoint(hosts.folders[0] / "out" / "last.pt")["iter_num"]
    assert step == 20 and files(hosts, 1) == set()

    hosts.cable("up")
    assert ends(hosts.train(command)) == [0, 0], hosts.said(name="err.txt")
    assert f"Resuming training from out at step {step}" in hosts.said()
    assert_same_run(whole, hosts.folders[0] / "out")


@pytest.mark.slow
def test_run_continues_without_a_lost_host(hosts, settings, train_tiny, tmp_path):
    """`--nnodes=1:2`: the run continues with the remaining host, on the same batches."""
    length = {**LENGTH, "max_iters": 400, "lr_decay_iters": 400}
    whole = train_tiny(tmp_path / "whole", **length, **BATCH).out_dir
    command = settings("out", **length, **BATCH, timeout=10, init_from="auto")
    meeting = {"nnodes": "1:2", "max_restarts": 3, "rdzv_backend": "c10d", "rdzv_id": "run"}
    meeting["rdzv_endpoint"] = "10.77.0.1:29500"
    first, second = (
        hosts.torchrun(n, command, **meeting, rdzv_conf=f"is_host={1 - n}", local_addr=address)
        for n, address in enumerate(("10.77.0.1", "10.77.0.2"))
    )
    hosts.wait_for("iter 50:")
    assert "device: 2 processes" in hosts.said()
    hosts.cable("down", end=1)
    second.kill()  # its training process exits after a timeout
    hosts.processes.remove(second)
    assert first.wait(PATIENCE) == 0, hosts.said(name="err.txt")
    assert "Resuming training from out at step" in hosts.said()
    assert hosts.said().count("device: 2 processes") == 1  # and then one
    assert_same_run(whole, hosts.folders[0] / "out")
