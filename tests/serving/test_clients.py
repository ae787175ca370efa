"""Clients that misbehave on a socket: the server stays up, and no row and no connection stays."""

import json
import re
import socket
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from brisk.serving import http


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port))
    connection.settimeout(20)
    return connection


def request(more="", **body):
    """The bytes of a request for a completion; `more` are further header lines."""
    data = json.dumps({"prompt": "HELLO", **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{more}"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def read_all(connection):
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


CLOSE = "Connection: close\r\n"


def status(port, data):
    """The status of the answer to these bytes; the connection is closed by the server."""
    with connect(port) as connection:
        connection.sendall(data)
        return int(read_all(connection).split(b" ", 2)[1])


@pytest.mark.parametrize(
    "body",
    [b'{"\\ud800": 1}', b'{"prompt": "\\ud800"}', b'{"model": "\\ud800"}', b'{"stop": "\\ud800"}'],
    ids=str,
)
def test_half_a_character_is_no_failure(serve, body, capfd):
    _, port = serve()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{CLOSE}"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    assert status(port, head.encode() + body) in (200, 400, 404)
    assert capfd.readouterr().err == ""


def test_long_name_of_a_field_is_not_repeated(serve):
    _, port = serve()
    with connect(port) as connection:
        connection.sendall(request(CLOSE, **{"x" * 100_000: 1}))
        assert len(read_all(connection)) < 1000


@pytest.mark.parametrize("part", [60, 100, 200])
def test_client_that_leaves_in_its_request_is_no_error(serve, part, capfd):
    """Within the headers, at their end, or within the body."""
    _, port = serve()
    data = request(user="x" * 200)
    for _ in range(3):
        with connect(port) as connection:
            connection.sendall(data[:part])
            time.sleep(0.05)
    assert status(port, request(CLOSE, max_tokens=1)) == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", ["close", "half", "reset", "pipelined"])
def test_whoever_leaves_gives_the_row_back(serve, stream, leave):
    engine, port = serve(rows=1)
    original = engine.batch.step

    def slow_step():
        time.sleep(0.02)
        return original()

    engine.batch.step = slow_step
    with connect(port) as connection:
        connection.sendall(request(max_tokens=10_000, stream=stream))
        wait_until(lambda: engine.samples)
        if leave == "pipelined":  # the next request waits behind this one
            connection.sendall(request())
            time.sleep(0.1)
        elif leave == "half":
            connection.shutdown(socket.SHUT_WR)
        elif leave == "reset":
            linger = b"\1\0\0\0\0\0\0\0"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if leave == "half":
            wait_until(lambda: not engine.samples, 5)
    wait_until(lambda: not engine.samples and not engine.waiting, 5)


def test_connections_are_bounded(serve, monkeypatch):
    monkeypatch.setattr(http, "CONNECTIONS", 3)
    _, port = serve()
    held = [connect(port) for _ in range(3)]
    with connect(port) as fourth:
        try:
            assert fourth.recv(1) == b""
        except ConnectionResetError:
            pass
    held.pop().close(), held.pop().close()
    wait_until(lambda: ask_health(port))
    held.pop().close()


def ask_health(port):
    try:
        return status(port, f"GET /health HTTP/1.1\r\nHost: a\r\n{CLOSE}\r\n".encode()) == 200
    except (OSError, IndexError):
        return False


def test_pipelined_requests_are_answered_in_order(serve):
    _, port = serve()
    asked = [request("" if i < 2 else CLOSE, max_tokens=3 - i, seed=1) for i in range(3)]
    with connect(port) as connection:
        connection.sendall(b"".join(asked))
        answers = read_all(connection).split(b"HTTP/1.1 200 OK")[1:]
    bodies = [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in answers]
    assert [body["usage"]["completion_tokens"] for body in bodies] == [3, 2, 1]


def test_what_comes_behind_a_request_is_bounded(serve):
    """A client that sends on and on while its answer is computed is dropped."""
    engine, port = serve(rows=1)
    with connect(port) as connection:
        connection.sendall(request(max_tokens=10_000))
        wait_until(lambda: engine.samples)
        connection.settimeout(2)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"x" * 65536)
        wait_until(lambda: not engine.samples, 5)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_reads_nothing_is_dropped(serve, stream, monkeypatch):
    monkeypatch.setattr(http, "IDLE", 0.5)
    engine, port = serve(rows=8)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    with connection:
        big = dict(max_tokens=3000, logprobs=20, return_token_ids=True, n=8)
        connection.sendall(request(**big, stream=stream))
        wait_until(lambda: engine.samples)
        wait_until(lambda: not engine.samples, 60)
        time.sleep(1)
        connection.settimeout(20)
        received = read_all(connection)
    if stream:
        assert b"[DONE]" not in received
    else:
        head, _, body = received.partition(b"\r\n\r\n")
        assert len(body) < int(re.search(rb"content-length: (\d+)", head)[1])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", None),
        (b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (request("Content-Length: 5\r\n" + CLOSE), 400),
        (request("Transfer-Encoding: chunked\r\n" + CLOSE), 400),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_http_is_refused(serve, data, expected, capfd):
    engine, port = serve()
    with connect(port) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        try:
            received = read_all(connection)
        except ConnectionResetError:
            received = b""
        if expected and received:
            assert int(received.split(b" ", 2)[1]) == expected
    assert status(port, request(CLOSE, max_tokens=1)) == 200 and not engine.samples
    assert "Traceback" not in capfd.readouterr().err
