"""The HTTP API: an ASGI application over an `Engine`. Needs Starlette."""

import asyncio
import base64
import hashlib
import json
import re
import secrets
import time
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from brisk.errors import UserError
from brisk.reporting.live_curves import draw_runs, list_runs
from brisk.serving.completions import ApiError, Completion
from brisk.serving.scheduler import QueueFull

BODY_BYTES = 2**20
IDLE = 20  # seconds that a client may take to send a request, or to take a part of the response
PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; script-src 'sha256-{}'; style-src 'unsafe-inline'; img-src blob:; "
POLICY += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def make_app(engine, served, *, runs_dir, api_key="", hosts=()):
    """The application, which closes `engine` at its end.

    Args:
        served: a `completions.Served`.
        runs_dir: the folder of the runs whose loss curves are shown.
        api_key: asked of every request but for the page and /health; "" for none.
        hosts: the names of this machine in the Host header; () for any. Another name is that of a
            page elsewhere that has its own name resolved to this machine (DNS rebinding).
    """

    async def completions(request):
        asked = await asyncio.to_thread(Completion, await read_json(request), served)
        events, loop = asyncio.Queue(), asyncio.get_running_loop()
        samples = asked.samples(lambda *e: loop.call_soon_threadsafe(events.put_nowait, e))
        answer = Answer(asked, [*samples], events)
        try:
            engine.submit(answer.samples)
        except QueueFull as error:
            busy = {"kind": "rate_limit_exceeded", "headers": {"Retry-After": "1"}}
            raise ApiError(429, "too many requests are waiting", **busy) from error
        except RuntimeError as error:
            raise ApiError(503, str(error), kind="server_error") from error
        return answer

    async def models(request):
        model = {"id": served.name, "object": "model", "created": 0, "owned_by": "briskgpt"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request):
        state = {"status": engine.failure or "ok", "running": len(engine.samples)}
        state |= {"waiting": len(engine.waiting), "rows": engine.rows, "tokens": engine.drawn}
        return JSONResponse(state, 503 if engine.failure else 200)

    async def runs(request):
        return JSONResponse({"runs": await asyncio.to_thread(list_runs, runs_dir)})

    async def loss_curves(request):
        known = await asyncio.to_thread(list_runs, runs_dir)
        names = request.query_params.getlist("run")
        if not 1 <= len(names) <= 8 or not known.keys() >= {*names}:
            raise ApiError(404, "/runs lists the runs; up to 8 are drawn", "run")
        stamps = tuple((name, known[name]) for name in names)
        try:
            picture = await asyncio.to_thread(draw_runs, runs_dir, stamps)
        except UserError as error:
            raise ApiError(404, str(error), "run") from error
        return Response(picture, media_type="image/svg+xml")

    @asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(engine.close)

    gets = {"/": page, "/health": health, "/v1/models": models, "/runs": runs}
    gets["/runs/loss.svg"] = loss_curves
    posts = {"/v1/completions": completions, "/v1/chat/completions": chat}
    routes = [Route(path, endpoint) for path, endpoint in gets.items()]
    routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
    handlers = {ApiError: on_error, HTTPException: on_error}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return Guard(app, api_key, hosts)


async def chat(request):
    raise ApiError(400, "the checkpoint has no chat template; /v1/completions continues a text")


async def page(request):
    html = PAGE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return HTMLResponse(html, headers={"Content-Security-Policy": POLICY.format(digest)})


async def on_error(request, error):
    if isinstance(error, HTTPException):  # Starlette's own
        error = ApiError(error.status_code, error.detail, headers=error.headers)
    return JSONResponse(error.body, error.status, error.headers)


class Guard:
    """An ASGI application behind the checks that every request has to pass."""

    def __init__(self, app, api_key, hosts):
        self.app, self.hosts, self.key = app, hosts, f"Bearer {api_key}" if api_key else ""

    async def __call__(self, scope, receive, send):
        error = self.refusal(scope) if scope["type"] == "http" else None
        app = JSONResponse(error.body, error.status) if error else self.app
        await app(scope, receive, send)

    def refusal(self, scope):
        """The `ApiError` that a request is refused with, or None."""
        headers, is_open = Headers(scope=scope), scope["path"] in ("/", "/health")
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if self.hosts and host not in self.hosts:
            return ApiError(403, f"the Host header is none of {', '.join(sorted(self.hosts))}")
        given = headers.get("authorization", "").encode()
        if self.key and not is_open and not secrets.compare_digest(given, self.key.encode()):
            return ApiError(401, "the API key is missing or wrong", kind="authentication_error")
        return None


async def read_json(request):
    """The body of a request. Raises `ApiError`: no JSON, too long, or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "the body's Content-Type is not application/json")

    async def read():
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES:
                raise ApiError(413, f"the body has more than {BODY_BYTES} bytes")
        return body

    try:
        return json.loads(await asyncio.wait_for(read(), IDLE))
    except asyncio.TimeoutError as error:
        raise ApiError(408, "the body took too long") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON") from error


class Answer:
    """The response to a `Completion`, in one piece or as server-sent events. When it ends, however
    it does, its samples give their rows back."""

    def __init__(self, asked, samples, events):
        self.asked, self.samples, self.events = asked, samples, events
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        self.head |= {"created": int(time.time()), "model": asked.served.name}

    async def __call__(self, scope, receive, send):
        task = asyncio.current_task()

        async def watch():
            await receive()  # what comes after the body is the end of the connection
            task.cancel()

        watching = asyncio.create_task(watch())
        try:
            if self.asked.stream:
                await self.stream(send)
            else:
                await (await self.whole())(scope, receive, send)
        except asyncio.CancelledError:
            pass  # nobody is there to answer
        finally:
            watching.cancel()
            for sample in self.samples:
                sample.cancelled = True

    async def received(self):
        """The events (index, text, tokens, finish), until all samples have ended."""
        ended = 0
        while ended < len(self.samples):
            event = await self.events.get()
            if event[-1] == "error":
                raise ApiError(500, "the model has failed", kind="server_error")
            ended += event[-1] is not None
            yield event

    async def whole(self):
        """The response in one piece."""
        parts = [("", [], None) for _ in self.samples]
        try:
            async for index, text, tokens, finish in self.received():
                parts[index] = parts[index][0] + text, parts[index][1] + tokens, finish
        except ApiError as error:
            return JSONResponse(error.body, error.status)
        choices = [self.asked.choice(i, *part) for i, part in enumerate(parts)]
        usage = self.asked.usage(sum(len(tokens) for _, tokens, _ in parts))
        return JSONResponse({**self.head, "choices": choices, "usage": usage})

    async def stream(self, send):
        """Send chunks as they come, until the client does not take one."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        async def chunk(data, more=True):
            text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
            body = {"type": "http.response.body", "body": f"data: {text}\n\n".encode()}
            timer = loop.call_later(IDLE, task.cancel)  # wait_for takes as long as the chunk itself
            await send({**body, "more_body": more})
            timer.cancel()

        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        offsets, drawn = [0] * len(self.samples), 0
        try:
            async for index, text, tokens, finish in self.received():
                choice = self.asked.choice(index, text, tokens, finish, offsets[index])
                if choice["logprobs"]:
                    offsets[index] += sum(map(len, choice["logprobs"]["tokens"]))
                drawn += len(tokens)
                await chunk({**self.head, "choices": [choice]})
            if self.asked.include_usage:
                await chunk({**self.head, "choices": [], "usage": self.asked.usage(drawn)})
        except ApiError as error:
            await chunk(error.body)
        await chunk("[DONE]", more=False)
