"""The HTTP API: an ASGI application over an `Engine`. Needs Starlette."""

import asyncio
import json
import re
import secrets
import time
from operator import itemgetter
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from brisk.errors import UserError
from brisk.reporting.live_curves import draw_runs, list_runs
from brisk.serving.completions import ApiError, Completion

BODY_BYTES = 2**20
IDLE = 20  # seconds that a client may take to send a request or to read a part of the response
STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {"X-Frame-Options": "DENY", "Cache-Control": "no-cache"}


def make_app(engine, served, *, runs_dir, api_key="", hosts=()):
    """Create the ASGI application.

    Args:
        served: a `completions.Served`, the model's description.
        runs_dir: folder with the runs whose loss curves are shown.
        api_key: required of every request except the page and /health; "" for none.
        hosts: allowed Host headers; () allows any. The check prevents DNS rebinding, where a
            foreign page makes its own name resolve to this machine.
    """

    async def completions(request):
        asked = await asyncio.to_thread(Completion, await read_json(request), served)
        answer = Answer(asked)
        if not engine.submit(answer.samples):
            why = (503, engine.failure) if engine.failure else (429, "too many requests wait")
            raise ApiError(*why, headers={"Retry-After": "1"})
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
        names = request.query_params.getlist("run")
        try:
            picture = await asyncio.to_thread(draw_runs, runs_dir, names)
        except UserError as error:
            raise ApiError(404, str(error), "run") from error
        return Response(picture, media_type="image/svg+xml")

    routes = [
        Route("/", lambda request: FileResponse(PAGE, headers=PAGE_HEADERS)),
        Route("/health", health),
        Route("/runs", runs),
        Route("/runs/loss.svg", loss_curves),
        Route("/v1/models", models),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    routes = [Mount("/", routes=routes, middleware=[Middleware(guard, api_key, hosts)])]
    handlers = {ApiError: on_error, HTTPException: on_error}
    return Starlette(routes=routes, exception_handlers=handlers)


async def chat(request):
    raise ApiError(400, "the checkpoint has no chat template; /v1/completions continues a text")


async def on_error(request, error):
    if isinstance(error, HTTPException):  # Starlette's own
        error = ApiError(error.status_code, error.detail, headers=error.headers)
    return JSONResponse(error.body, error.status, error.headers)


def guard(app, api_key, hosts):
    """Wrap the ASGI application `app` in checks of the Host header and the API key."""

    async def checked(scope, receive, send):
        headers = Headers(scope=scope)
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if hosts and host not in hosts:
            raise ApiError(403, f"the Host header is none of {', '.join(sorted(hosts))}")
        given = headers.get("authorization", "").encode("latin-1")
        is_open = not api_key or scope["path"] in ("/", "/health")
        if not is_open and not secrets.compare_digest(given, f"Bearer {api_key}".encode()):
            raise ApiError(401, "the API key is missing or wrong")
        await app(scope, receive, send)

    return checked


async def read_json(request):
    """Parse the body of a request. Raises `ApiError` if it is not JSON, truncated, too long or too
    slow."""
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
    except (ValueError, RecursionError, ClientDisconnect) as error:
        raise ApiError(400, "the body is not JSON") from error


class Answer:
    """The response to a `Completion`, as JSON or as server-sent events. Its samples are cancelled
    when it ends in any way."""

    def __init__(self, asked):
        self.asked, self.queue = asked, asyncio.Queue()
        put, loop = self.queue.put_nowait, asyncio.get_running_loop()
        self.samples = [*asked.samples(lambda *event: loop.call_soon_threadsafe(put, event))]
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        self.head |= {"created": int(time.time()), "model": asked.served.name}

    async def __call__(self, scope, receive, send):
        task = asyncio.current_task()
        gone = asyncio.ensure_future(receive())  # after the body, the only message is a disconnect
        gone.add_done_callback(lambda _: gone.cancelled() or task.cancel())
        try:
            if self.asked.stream:
                stream = StreamingResponse(self.events(), headers=STREAM_HEADERS)
                await stream.stream_response(send)
            else:
                *parts, last = [part async for part in self.parts()]
                choices = sorted((part["choices"][0] for part in parts), key=itemgetter("index"))
                await JSONResponse({**last, "choices": choices})(scope, receive, send)
        except asyncio.CancelledError:
            pass  # the client is gone
        finally:
            gone.cancel()
            for sample in self.samples:
                sample.cancelled = True

    async def parts(self):
        """Parts of the response, dicts of one choice each, and one of the usage at the end."""
        ended = 0
        while ended < len(self.samples):
            event = await self.queue.get()
            if event[-1] == "error":
                raise ApiError(500, "the model has failed, or the server is closing")
            ended += event[-1] is not None
            yield {**self.head, "choices": [self.asked.choice(*event)]}
        read, drawn = sum(map(len, self.asked.prompts)), sum(s.drawn for s in self.samples)
        usage = dict(prompt_tokens=read, completion_tokens=drawn, total_tokens=read + drawn)
        yield {**self.head, "choices": [], "usage": usage}

    async def events(self):
        """The response as server-sent events."""
        try:
            async for part in self.parts():
                if part["choices"] or self.asked.include_usage:
                    yield f"data: {json.dumps(part)}\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        yield "data: [DONE]\n\n"
