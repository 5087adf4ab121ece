"""The HTTP side of a server: OpenAI's paths over an engine, limits, keys, figures and the page.

A request is read and checked in a thread beside, so that a long prompt or a slow template holds up nobody.
"""

import asyncio
import base64
import binascii
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from mythos_edge.model.bounded_files import parse_json
from mythos_edge.model.errors import CapacityError, MythosEdgeError, UsageError
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.decoding import Generation, Token
from mythos_edge.runtime.serving import api, engine
from mythos_edge.runtime.serving.figures import prometheus
from mythos_edge.runtime.session import Session

# Resolved, for an editable install is a tree of links, which lacks files that are newer than itself.
PAGE = Path(__file__).resolve().parent / "page"
# What a page of ours may load: nothing of any other host.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_LEAVING_S = 10.0


@dataclass(frozen=True)
class Limits:
    """Bounds of one request: bytes of its body, seconds to send it, seconds until it must be done."""

    body_bytes: int = 4 << 20
    body_s: float = 30.0
    request_s: float = 600.0


@dataclass(frozen=True)
class Serving:
    """All that a server is made of. ``keys`` are those that a client may give; none asks for one."""

    session: Session
    engine: engine.Engine
    template: ChatTemplate
    name: str
    target: str
    defaults: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    limits: Limits = Limits()
    ready: Callable[[], None] = lambda: None


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def app_of(serving: Serving) -> Starlette:
    """The application; its lifespan ends the engine."""
    server = _Server(serving)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        serving.ready()
        yield
        await run_in_threadpool(serving.engine.close, _LEAVING_S)

    routes: list[BaseRoute] = [
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    # A route for each file, not a folder at /, so that other paths and methods are refused as ever.
    routes += [_file_route("/", PAGE / "index.html"), *(_file_route(f"/{file.name}", file) for file in PAGE.iterdir())]
    cors = Middleware(CORSMiddleware, allow_origins=serving.origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    # Browsers ask for leave without a key, and read a refusal only where its headers let them.
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[*([cors] if serving.origins else []), Middleware(_Gate, keys=serving.keys)],
        exception_handlers={HTTPException: _http_error, Exception: _fault},
    )


def _file_route(path: str, file: Path) -> Route:
    async def read(request: Request) -> Response:
        del request
        return FileResponse(file)

    return Route(path, read)


class _Gate:
    """Lets nobody in without a key where there are any, except to /health, and puts headers on everything."""

    def __init__(self, app: Any, keys: Sequence[str]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._keys and scope["path"] != "/health" and not self._knows(Request(scope)):
            refusal = _Refused(
                401,
                "a valid API key is needed: send it as Authorization: Bearer KEY",
                "invalid_api_key",
                WWW_Authenticate='Basic realm="mythos-edge: any name, the API key as password"',
            )
            await _error(refusal)(scope, receive, send)
            return
        name = Request(scope).url.hostname or ""
        if not self._keys and _is_local((scope.get("server") or ("",))[0]) and not _is_local(name):
            # A page of another host can give its own name this machine's address, and then reads all answers.
            refusal = _Refused(403, f"the host is {name!r}, expected localhost: start the server with --api-key-file")
            await _error(refusal)(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in _PAGE_HEADERS.items()]
            await send(message)

        await self._app(scope, receive, sending)

    def _knows(self, request: Request) -> bool:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1")  # as headers were decoded
        if kind.lower() == "basic":  # as browsers ask their people for it
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != "bearer":
            return False
        # All are compared, each in constant time.
        return sum(hmac.compare_digest(key, known) for known in self._keys) > 0


def _is_local(host: str) -> bool:
    """Whether a name or address is that of this machine to itself."""
    return host in ("localhost", "::1") or (host.startswith("127.") and host.replace(".", "").isdigit())


class _Server:
    """The endpoints."""

    def __init__(self, serving: Serving) -> None:
        self._it = serving

    async def health(self, request: Request) -> Response:
        del request
        failed = self._it.engine.failed
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def models(self, request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._it.name:
            return _error(_Refused(404, f"model {name!r} is not here, expected {self._it.name!r}", "model_not_found"))
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        it, model = self._it, self._it.session.model
        return {
            "id": it.name,
            "object": "model",
            "created": 0,
            "owned_by": "mythos-edge",
            "family": it.session.bundle.manifest.family,
            "target": it.target,
            "max_depth": model.max_depth,
            "threshold": model.threshold,
            "max_context": it.session.max_context,
            "chat_template": it.template.name,
            "tokenizer": it.session.tokenizer is not None,
            "defaults": it.defaults,
        }

    async def metrics(self, request: Request) -> Response:
        del request
        return Response(prometheus(self._it.engine), media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request) -> Response:
        it = self._it
        context = it.engine.fair_context
        return await self._answer(
            request, lambda body: api.chat_wanted(body, it.session, it.template, it.defaults, context)
        )

    async def completions(self, request: Request) -> Response:
        it = self._it
        return await self._answer(request, lambda body: api.completion_wanted(body, it.session, it.defaults))

    async def _answer(self, request: Request, read: Callable[[dict[str, Any]], api.Wanted]) -> Response:
        try:
            body = await _body(request, self._it.limits)
            wanted = await run_in_threadpool(read, body)
            answer = _Answer(self._it, wanted)
        except (MythosEdgeError, _Refused) as error:
            return _error(error)
        headers = {"X-Mythos-Chat-Template": self._it.template.name} if wanted.chat else {}
        if wanted.ignored:
            # A header holds no other characters than ASCII's that can be seen.
            names = [name.encode("ascii", "backslashreplace").decode() for name in wanted.ignored[:20]]
            headers["X-Mythos-Ignored"] = ", ".join("".join(filter(str.isprintable, name))[:64] for name in names)
        if wanted.stream:
            headers["Cache-Control"] = "no-store"
            return _Stream(answer, headers)
        try:
            return JSONResponse(await _unless_left(request, answer.whole()), headers=headers)
        except (MythosEdgeError, _Refused) as error:
            return _error(error)
        finally:
            answer.cancel()


class _Answer:
    """The answers to one request, while they are computed."""

    def __init__(self, serving: Serving, wanted: api.Wanted) -> None:
        self._it, self._wanted = serving, wanted
        self._started = time.monotonic()
        self._heard: asyncio.Queue[tuple[int, engine.Event]] = asyncio.Queue()
        self._results: dict[int, Generation] = {}
        self._tickets: list[engine.Ticket] = []
        self._choices: list[api.Choice] = []
        loop = asyncio.get_running_loop()
        deadline = self._started + serving.limits.request_s
        asked_for, most = wanted.n * len(wanted.prompts), serving.engine.slots + serving.engine.queue
        if asked_for > most:
            raise _Refused(400, f"{asked_for} answers are asked for at once, this server takes {most}: ask for fewer")
        try:
            for ids in wanted.prompts:
                for choice in range(wanted.n):
                    listener = _listener(loop, self._heard, len(self._tickets))
                    asked = engine.Request(ids, wanted.options_of(choice), wanted.logit_bias, deadline)
                    self._tickets.append(serving.engine.submit(asked, listener))
                    self._choices.append(api.Choice(wanted, serving.session))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends what is not done; nothing where all is."""
        for number, ticket in enumerate(self._tickets):
            if number not in self._results:
                ticket.cancel()

    async def whole(self) -> dict[str, Any]:
        """The object of the whole answer. Raises what ended one of its choices."""
        async for _ in self._tokens():
            pass
        choices = [{"index": at, **one.whole(self._results[at])} for at, one in enumerate(self._choices)]
        return {**api.envelope(self._wanted, self._it.name, choices), "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            if self._wanted.chat:
                for at in range(len(self._choices)):
                    yield self._chunk(at, {"delta": {"role": "assistant", "content": ""}, "depths": []})
            async for at, token in self._tokens():
                if token is None:
                    last = self._choices[at].rest()
                    if self._wanted.chat and not last["depths"]:
                        last["delta"] = {}
                    yield self._chunk(at, last, api.finish_reason(self._results[at]))
                elif (piece := self._choices[at].piece(token)) is not None:
                    yield self._chunk(at, piece)
            if self._wanted.include_usage:
                yield _event({**api.envelope(self._wanted, self._it.name, [], chunk=True), "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already, so that it can only be told here
            yield _event(_told(error)[1])

    async def _tokens(self) -> AsyncIterator[tuple[int, Token | None]]:
        """Every token with the number of its choice; None at the end of one."""
        while len(self._results) < len(self._tickets):
            at, event = await self._heard.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Generation):
                self._results[at] = event
            yield at, event if isinstance(event, Token) else None

    def _chunk(self, at: int, fields: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": at, "finish_reason": finish, "logprobs": None, **fields}
        made = api.envelope(self._wanted, self._it.name, [choice], chunk=True)
        return _event({**made, "usage": None} if self._wanted.include_usage else made)

    def _usage(self) -> dict[str, Any]:
        cached = sum(ticket.cached_tokens for ticket in self._tickets[:: self._wanted.n])
        results = [self._results[at] for at in range(len(self._tickets))]
        return api.usage_of(self._wanted, results, cached, time.monotonic() - self._started)


class _Stream(StreamingResponse):
    """An answer as server-sent events; it is cancelled with the response, be it that nothing of it was ever read."""

    def __init__(self, answer: _Answer, headers: Mapping[str, str]) -> None:
        super().__init__(answer.events(), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def _listener(
    loop: asyncio.AbstractEventLoop, heard: "asyncio.Queue[tuple[int, engine.Event]]", at: int
) -> engine.Listener:
    def hear(event: engine.Event) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(heard.put_nowait, (at, event))

    return hear


async def _body(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object that a request holds."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other hosts can send the kinds that need no asking first.
        raise _Refused(415, f"the content is {kind or 'of no type'}, expected Content-Type: application/json")
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.stream():
                data += piece
                if len(data) > limits.body_bytes:
                    raise _Refused(413, f"the body has more than {limits.body_bytes} bytes", Connection="close")
    except TimeoutError:
        raise _Refused(408, f"the body took longer than {limits.body_s:g} s", Connection="close") from None
    except ClientDisconnect:
        raise _Refused(400, "the client left") from None
    try:
        values = parse_json(bytes(data))
    except ValueError as error:
        raise _Refused(400, f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise _Refused(400, f"the body is a JSON {type(values).__name__}, expected an object")
    return values


async def _unless_left(request: Request, answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The answer, unless the client leaves before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(left())
    try:
        await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _Refused(499, "the client left")
        return work.result()
    finally:
        work.cancel()
        leaving.cancel()


def _told(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status of an error and the object that tells it, in OpenAI's shape."""
    status, code = 500, None
    if isinstance(error, _Refused):
        status, code = error.status, error.code
    elif isinstance(error, engine.QueueFull):
        status, code = 503, "queue_full"
    elif isinstance(error, engine.TimedOut):
        status, code = 504, "timeout"
    elif isinstance(error, CapacityError):
        status, code = 400, "context_length_exceeded"
    elif isinstance(error, UsageError):
        status = 400
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = str(error) if isinstance(error, MythosEdgeError | _Refused) else f"internal error: {type(error).__name__}"
    # A message about a field begins with its name.
    first = message.partition(" ")[0].partition("[")[0].partition(".")[0]
    param = first if status == 400 and first in api.FIELDS else None
    # Half of a pair of characters cannot be sent.
    message = message.encode(errors="backslashreplace").decode()
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(error: Exception) -> Response:
    status, values = _told(error)
    headers = error.headers if isinstance(error, _Refused) else {}
    if status == 503:
        headers = {**headers, "Retry-After": "1"}
    return JSONResponse(values, status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.scope['path']}: {error.detail}"
    return _error(_Refused(error.status_code, told, **(error.headers or {})))


async def _fault(request: Request, error: Exception) -> Response:
    del request
    return _error(error)


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"
