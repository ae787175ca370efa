"""The HTTP API: OpenAI's requests and responses, limits and errors."""

import asyncio
import base64
import hashlib
import json
import os
import re
import sys
import threading
from itertools import zip_longest

import pytest
import torch
from networks import random_model

pytest.importorskip("starlette.testclient", exc_type=ImportError)

from starlette.testclient import TestClient

from brisk.data.tokenizer import ByteTokenizer, CharTokenizer
from brisk.serving import api
from brisk.serving.completions import ALLOWED, Served

TOKENIZER = CharTokenizer(map(chr, range(48, 48 + 61)))
PROMPT = "HELLO"
UNSUPPORTED = {"presence_penalty": 1, "frequency_penalty": -0.5, "logit_bias": {"5": 1}}
UNSUPPORTED |= {"suffix": "end", "echo": True, "best_of": 2}


@pytest.fixture
def app(engine, tmp_path):
    """`app(rows=8, queue=99, **options)`; its engine is `app.engine`."""

    def app(rows=8, queue=99, documents=False, model=None, tokenizer=TOKENIZER, **options):
        one = engine(model or random_model(), rows, queue, vocab_size=tokenizer.vocab_size)
        served = Served("tiny", tokenizer, documents, rows, max_tokens=100)
        made = api.make_app(one, served, runs_dir=tmp_path, **options)
        made.engine = one
        return made

    return app


@pytest.fixture
def client(app):
    with TestClient(app(hosts={"localhost"}), base_url="http://localhost:8000") as client:
        yield client


def ask(client, **body):
    return client.post("/v1/completions", json={"prompt": PROMPT, **body})


def chunks(response):
    """The data of server-sent events. Checks the final one."""
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 3},
        {"seed": 4, "temperature": 0.7, "top_p": 0.8, "max_tokens": 60},
        {"seed": 5, "n": 3, "top_k": 5, "max_tokens": 30},
        {"temperature": 0, "max_tokens": 40},
        {"seed": 6, "prompt": ["A", "BCD", "A"], "n": 2},
        {"seed": 6, "prompt": [3, 1, 4]},
        {"seed": 6, "prompt": [[3, 1], [4]]},
        {"seed": 7, "prompt": ""},
    ],
    ids=str,
)
def test_text_matches_generate(client, options):
    found = ask(client, **options).json()
    prompts = options.get("prompt", PROMPT)
    prompts = [prompts] if isinstance(prompts, str) or isinstance(prompts[0], int) else prompts
    ids = [TOKENIZER.encode(p).tolist() if isinstance(p, str) else p for p in prompts]
    ids = [i or [0] for i in ids]  # the vocabulary has no newline
    n, count = options.get("n", 1), options.get("max_tokens", 16)
    expected = random_model().generate(
        [i for i in ids for _ in range(n)],
        count,
        options.get("temperature", 1.0),
        options.get("top_k"),
        top_p=options.get("top_p"),
        seed=options.get("seed", 0),
        samples=[*range(n)] * len(ids),
    )
    texts = [TOKENIZER.decode(row[-count:]) for row in expected]
    assert [choice["text"] for choice in found["choices"]] == texts
    assert [choice["index"] for choice in found["choices"]] == [*range(len(texts))]
    read, drawn = sum(map(len, ids)), count * len(texts)
    totals = {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
    assert found["usage"] == totals


@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_stream_matches_the_whole_answer(client, logprobs):
    options = dict(seed=1, n=3, max_tokens=90, logprobs=logprobs, return_token_ids=True)
    whole = ask(client, **options).json()
    response = ask(client, **options, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream"
    *parts, last = chunks(response)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in parts if p["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine if part["finish_reason"]] == ["length"]
        assert [i for part in mine for i in part["token_ids"]] == choice["token_ids"]
        for key, values in (choice["logprobs"] or {}).items():
            assert [value for part in mine for value in part["logprobs"][key]] == values


def test_logprobs_have_openai_format(client):
    found = ask(client, seed=1, logprobs=3, max_tokens=8).json()["choices"][0]
    logprobs, text = found["logprobs"], found["text"]
    assert logprobs["tokens"] == [*text] and logprobs["text_offset"] == [*range(8)]
    for i, (token, logprob, top) in enumerate(
        zip(text, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    ):
        idx = TOKENIZER.encode(PROMPT + text[:i])
        values = random_model().predict(torch.tensor(idx.tolist())[None], targets=False)
        values = values[0, -1].log_softmax(-1)
        assert logprob == pytest.approx(values[TOKENIZER.encode(token)[0]].item(), abs=1e-4)
        assert len(top) == 3 and max(top.values()) == pytest.approx(values.max().item(), abs=1e-4)


def test_partial_character_is_shown_as_bytes(app):
    model = random_model(vocab_size=257, block_size=24)
    with TestClient(app(model=model, tokenizer=ByteTokenizer())) as client:
        found = ask(client, prompt="é", temperature=2, max_tokens=50, logprobs=1, seed=2).json()
    names = found["choices"][0]["logprobs"]["tokens"]
    assert any(re.fullmatch(r"bytes:\\x[89a-f][0-9a-f]", name) for name in names)


def test_documents_begin_and_end_with_eot(app):
    tokenizer = CharTokenizer(map(chr, range(48, 48 + 60)), eot=True)
    with TestClient(app(documents=True, tokenizer=tokenizer)) as client:
        options = dict(return_token_ids=True, max_tokens=100, temperature=2)
        found = [ask(client, seed=seed, **options).json()["choices"][0] for seed in range(9)]
    assert {choice["prompt_token_ids"][0] for choice in found} == {60}
    ended = [choice for choice in found if choice["finish_reason"] == "stop"]
    assert ended and all(choice["token_ids"][-1] == 60 for choice in ended)
    assert all("<|endoftext|>" not in choice["text"] for choice in ended)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *UNSUPPORTED.items(),
        *[("max_tokens", value) for value in (0, 101, -1, 1.5, "9", True, 10**400)],
        *[("temperature", value) for value in (-0.1, 2.1, "hot", False, [1])],
        *[("top_p", value) for value in (-0.1, 1.1)],
        *[("n", value) for value in (0, 9)],
        *[("logprobs", value) for value in (-1, 21, True)],
        *[("seed", value) for value in (2**64, 0.5, "a")],
        *[("stop", value) for value in (["a"] * 5, [1], "", {})],
        *[("prompt", value) for value in ([], [[]], [61], [-1], ["a", 1], [True], {}, 5, "\n")],
        *[("prompt", value) for value in ("1" * 70_000, [[1]] * 9, ["a", [1]], "\ud800")],
        *[("stream", value) for value in (1, "yes")],
        *[("stream_options", value) for value in ({"usage": True}, {"include_usage": "no"}, [])],
        *[("functions", []), ("max_completion_tokens", 5), ("Prompt", "a")],
    ],
    ids=lambda value: str(value)[:20],
)
def test_unsupported_field_is_refused(client, field, value):
    body = json.dumps({"prompt": PROMPT, field: value})
    headers = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=body, headers=headers)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert field in error["message"] or error["param"] in (field, "n", "prompt")
    assert len(error["message"]) < 500


def test_refusals_say_how_a_field_is_meant(client):
    for field, value, words in [
        ("stream", 1, "stream is true or false"),
        ("temperature", "1", "temperature is a number from 0 to 2"),
        ("n", 1.5, "n is a whole number from 1 to 8"),
        ("echo", True, "echo must be one of [False]"),
    ]:
        assert ask(client, **{field: value}).json()["error"]["message"] == words


def test_neutral_values_and_null_are_the_default(client):
    plain = ask(client, seed=1).json()["choices"]
    for values in zip_longest(*ALLOWED.values()):
        fields = {**dict(zip(ALLOWED, values, strict=True)), "user": "me", "model": "tiny"}
        assert ask(client, seed=1, **fields).json()["choices"] == plain
    assert ask(client, seed=1, **dict.fromkeys(UNSUPPORTED)).json()["choices"] == plain


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "text/plain", 415),
        (b"prompt=a", "application/x-www-form-urlencoded", 415),
        (b"{", "application/json", 400),
        (b"\xff", "application/json; charset=utf-8", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"prompt": "' + b"1" * 2**20 + b'"}', "application/json", 413),
    ],
    ids=lambda value: str(value)[:20],
)
def test_invalid_body_is_refused(client, content, kind, status):
    response = client.post("/v1/completions", content=content, headers={"content-type": kind})
    assert response.status_code == status and "message" in response.json()["error"]


def test_foreign_host_is_refused(client):
    for host in ("evil.example", "localhost.evil.example", "localhost:80:80", ""):
        response = client.get("/health", headers={"host": host})
        assert response.status_code == 403
    assert client.get("/health", headers={"host": "LOCALHOST:1"}).status_code == 200
    assert "access-control-allow-origin" not in client.get("/health").headers
    assert client.options("/v1/completions").status_code == 405


def test_api_key_is_required(app):
    with TestClient(app(api_key="secret")) as client:
        for path in ("/v1/models", "/runs", "/nothing"):
            assert client.get(path).status_code == 401
            wrong = {"authorization": b"Bearer secre\xff"}
            assert client.get(path, headers=wrong).status_code == 401
        assert ask(client).status_code == 401
        assert client.get("/").status_code == client.get("/health").status_code == 200
        client.headers["authorization"] = "Bearer secret"
        assert ask(client).status_code == client.get("/v1/models").status_code == 200


def test_key_may_have_any_characters(app):
    with TestClient(app(api_key="schlüssel")) as client:
        headers = {"authorization": "Bearer schlüssel".encode()}
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_models_chat_and_unknown_paths(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    chat = client.post("/v1/chat/completions", json={"messages": []})
    assert chat.status_code == 400 and "no chat template" in chat.json()["error"]["message"]
    assert ask(client, model="gpt-4").status_code == 404
    assert client.get("/v1/completions").status_code == 405
    for path in ("/v1/engines", "/page.html", "/../serve.py", "/v1/completions/"):
        assert client.get(path, follow_redirects=False).status_code in (404, 307)


async def call(app, body=None, receive=None, send=None):
    """Send a request to an ASGI application. Returns the messages of its response. `receive` is
    called after the body."""
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""}
    sent, asked = [], [{"type": "http.request", "body": json.dumps(body).encode()}] if body else []

    async def read():
        if asked:
            return asked.pop()
        message = await (receive() if receive else asyncio.Event().wait())
        return message if body is None else {"type": "http.disconnect"}

    async def write(message):
        sent.append(message)
        if send:
            await send(message)

    await app(scope, read, write)
    return sent


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_frees_its_row(app, stream):
    made = app(rows=1)

    async def leave():
        gone = asyncio.Event()
        body = {"prompt": PROMPT, "max_tokens": 100, "stream": stream, "n": 1}
        steps, original = [], made.engine.batch.step

        def slow_step():
            steps.append(made.engine.samples.copy())
            if len(steps) == 4:
                loop.call_soon_threadsafe(gone.set)
            threading.Event().wait(0.05)
            return original()

        loop, made.engine.batch.step = asyncio.get_running_loop(), slow_step
        await call(made, body, gone.wait)
        seen = len(steps)
        await asyncio.sleep(0.3)
        assert len(steps) <= seen + 1 and not made.engine.samples
        made.engine.batch.step = original
        return await call(made, {"prompt": PROMPT, "max_tokens": 2})

    assert asyncio.run(leave())[0]["status"] == 200


def test_stalled_client_frees_its_row(app, monkeypatch):
    monkeypatch.setattr(api, "IDLE", 0.2)
    made = app(rows=1)

    async def stuck(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    body = {"prompt": PROMPT, "max_tokens": 100, "stream": True}
    asyncio.run(asyncio.wait_for(call(made, body, send=stuck), 20))
    assert not made.engine.waiting and all(s.cancelled for s in made.engine.samples.values())


def test_slow_body_is_refused(app, monkeypatch):
    monkeypatch.setattr(api, "IDLE", 0.2)

    async def drip():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": True}

    assert asyncio.run(call(app(), receive=drip))[0]["status"] == 408


def test_full_queue_is_429_with_retry_after(app):
    made = app(rows=1, queue=1)

    async def crowd():
        body = {"prompt": PROMPT, "max_tokens": 100, "temperature": 1}
        return await asyncio.gather(*(call(made, body) for _ in range(12)))

    answers = [messages[0] for messages in asyncio.run(crowd())]
    statuses = [answer["status"] for answer in answers]
    assert statuses.count(200) >= 2 and set(statuses) == {200, 429}
    busy = next(answer for answer in answers if answer["status"] == 429)
    assert (b"retry-after", b"1") in busy["headers"]


@pytest.mark.parametrize("stream", [True, False])
def test_model_failure_fails_requests_and_health(app, stream, monkeypatch):
    made = app()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(made.engine.batch, "step", lambda: 1 / 0)
    with TestClient(made) as client:
        assert client.get("/health").json()["status"] == "ok"
        response = ask(client, stream=stream)
        error = chunks(response)[-1] if stream else response.json()
        assert error["error"]["type"] == "server_error"
        assert stream or response.status_code == 500
        made.engine.thread.join(10)
        assert ask(client).status_code == client.get("/health").status_code == 503
        assert "ZeroDivisionError" in client.get("/health").json()["status"]


# ------------------------------------------------------------------------------------ page and runs


def a_run(folder, losses=(3, 2, 1)):
    folder.mkdir()
    lines = [json.dumps({"step": i, "val_loss": loss}) for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_loss_curves_of_listed_runs_only(app, tmp_path):
    pytest.importorskip("matplotlib")
    a_run(tmp_path / "one"), a_run(tmp_path / "two & <b>"), (tmp_path / "empty").mkdir()
    a_run(tmp_path / "none", losses=())
    if sys.platform == "linux":
        a_run(tmp_path / os.fsdecode(b"no \xff text"))
    with TestClient(app()) as client:
        assert [*client.get("/runs").json()["runs"]] == ["none", "one", "two & <b>"]
        picture = client.get("/runs/loss.svg", params={"run": ["one", "two & <b>"]})
        assert picture.headers["content-type"] == "image/svg+xml" and "<svg" in picture.text
        again = client.get("/runs/loss.svg", params={"run": ["one", "two & <b>"]})
        assert again.content == picture.content
        a_run(tmp_path / "three", losses=(3, 2, 1, 0.5))
        assert "three" in client.get("/runs").json()["runs"]
        for run in (["../one"], ["one/../one"], [str(tmp_path / "one")], ["empty"], [], ["none"]):
            assert client.get("/runs/loss.svg", params={"run": run}).status_code == 404


def test_page_has_no_external_resources(client):
    response = client.get("/")
    html = response.text
    assert response.headers["x-frame-options"] == "DENY"
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', html, re.DOTALL)[1]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.findall(r"https?://|//[a-z]|@import|url\(|<link|src=", html)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", html)
    assert not re.findall(r"\son\w+=", html)  # no handlers in attributes: the policy forbids them
    for control in re.findall(r"<(?:input|textarea|select)\b[^>]*", html):
        name = re.search(r'\bid="([\w-]+)"', control)[1]
        assert f'for="{name}"' in html, f"{name} has no label"
