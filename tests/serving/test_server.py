"""serve.py and uvicorn over sockets: OpenAI's client, connections, the command line."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, run_script

pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import openai

from brisk.serving import http

RUN = ROOT / "tests" / "fixtures" / "runs" / "classic"


def client_of(port, **options):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", **options)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_openai_client(serve):
    _, port = serve()
    client = client_of(port)
    assert client.models.list().data[0].id == "tiny"
    options = dict(model="tiny", prompt="HELLO", max_tokens=50, seed=1, logprobs=2, n=2)
    whole = client.completions.create(**options)
    assert whole.usage.completion_tokens == 100 and len(whole.choices[1].logprobs.tokens) == 50
    texts = ["", ""]
    for part in client.completions.create(**options, stream=True):
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) == 2
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="tiny", prompt="A", echo=True)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="A")


def test_closed_streams_free_their_rows(serve):
    """Some clients close their stream early, another reads to the end."""
    engine, port = serve(rows=4)
    client = client_of(port, max_retries=0)
    options = dict(model="tiny", prompt="AB", seed=2, stream=True)
    alone = "".join(
        part.choices[0].text for part in client.completions.create(**options, max_tokens=200)
    )
    stays = client.completions.create(**options, max_tokens=200)
    for _ in range(12):
        stream = client.completions.create(**{**options, "seed": None}, max_tokens=10_000)
        next(stream)
        stream.close()
    assert "".join(part.choices[0].text for part in stays) == alone
    wait_until(lambda: not engine.samples and len(engine.batch.free) == 4)
    assert not engine.batch.reading and not engine.waiting


def test_many_requests_at_once(serve):
    engine, port = serve(rows=4)
    texts, client = {}, client_of(port)

    def ask(seed):
        options = dict(model="tiny", prompt="HELLO", max_tokens=40, stream=seed % 2 == 0)
        answer = client.completions.create(**options, seed=seed)
        parts = answer if options["stream"] else [answer]
        return "".join(part.choices[0].text for part in parts)

    threads = [threading.Thread(target=lambda i=i: texts.setdefault(i, ask(i))) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engine.batch.free) == 4
    assert [texts[i] for i in range(16)] == [ask(i) for i in range(16)]


def test_idle_connection_is_closed(serve, monkeypatch):
    monkeypatch.setattr(http, "IDLE", 0.3)
    _, port = serve()
    for begin in (
        b"",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: ",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(10)
            connection.sendall(begin)
            received = b""
            while part := connection.recv(4096):
                received += part
            assert (b"200 OK" in received) == begin.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("signals", [1, 2])
def test_script_serves_a_run_and_stops_on_ctrl_c(tmp_path, signals):
    """At once, with one line for a stream that is open, and nothing on standard error."""
    command = [sys.executable, ROOT / "serve.py", RUN, "--port=0", "--device=cpu", "--max_batch=4"]
    command.append("--max_tokens=65536")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=environment, cwd=tmp_path) as process:
        try:
            lines = iter(process.stdout.readline, "")
            found = next(filter(None, (re.search(r"http://127.0.0.1:(\d+)", s) for s in lines)))
            client = client_of(int(found[1]))
            model = client.models.list().data[0].id
            assert model == "classic"
            options = dict(model=model, prompt="Shall I")
            answer = client.completions.create(**options, max_tokens=5)
            assert len(answer.choices[0].text) == 5
            stream = client.completions.create(**options, max_tokens=65536, stream=True)
            next(stream)
            for _ in range(signals):
                process.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIError, match="closing"):
                for _ in stream:
                    pass
            assert process.wait(20) == 0 and process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host=0.0.0.0"], "give --api_key too"),
        (["--out_dir=nothing"], "nothing"),
        (["--max_batch=0"], "max_batch"),
        (["--port=70000"], "port"),
        (["--host=no.such.host.example", "--api_key=a"], "no.such.host.example"),
    ],
    ids=str,
)
def test_wrong_settings_end_in_one_line(arguments, reason, tmp_path):
    ended = run_script("serve.py", "--port=0", *arguments, cwd=tmp_path)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("error: ") and reason in ended.stderr


def test_port_in_use_ends_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_script("serve.py", RUN, f"--port={port}", cwd=tmp_path)
    assert ended.returncode == 2 and f"--port={port}" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_missing_package_is_one_line(missing, tmp_path):
    (tmp_path / f"{missing}.py").write_text("raise ImportError('No module named')")
    ended = run_script("serve.py", RUN, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "pip install starlette uvicorn" in ended.stderr
