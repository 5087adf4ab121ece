"""The application without sockets: what bodies, headers and clients that left do to it."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.serving.app import Serving, app_of
from mythos_edge.runtime.serving.engine import Engine
from mythos_edge.runtime.session import Session

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TALK = [{"role": "user", "content": "Return the "}]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def serving_of(text_bundle: Path) -> Iterator[Callable[..., Serving]]:
    with Session.open(text_bundle) as session:
        running = Engine(session, slots=4, queue=8)

        def make(**more: Any) -> Serving:
            more.setdefault("template", ChatTemplate.of(session.bundle, "chatml"))
            return Serving(session=session, engine=running, name="text", target="ort-cpu", **more)

        yield make
        running.close()


@pytest.fixture
def ask(serving_of: Callable[..., Serving]) -> Callable[..., httpx.Response]:
    """One request to an application of its own; ``serving`` are values of that."""

    def call(method: str, path: str, serving: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app_of(serving_of(**(serving or {}))))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, timeout=60, **options)

        return asyncio.run(run())

    return call


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"reasoning_effort": []}, "reasoning_effort is []"),
        (CHAT, {"chat_template_kwargs": {"messages": 1}}, "not for the caller to say"),
        (COMPLETIONS, {"stop": ["x"] * 17}, "stop has 17 texts"),
        (COMPLETIONS, {"stop": "x" * 1001}, "1001 characters"),
        (COMPLETIONS, {"prompt": ["x"] * 129}, "prompt is a list of 129"),
        (COMPLETIONS, {"n": 13}, "13 answers are asked for at once, this server takes 12"),
        (COMPLETIONS, {"draft_depth": 4, "draft_tokens": 2}, "draft_depth is 4, expected 1 .. 3"),
        (COMPLETIONS, {"draft_depth": 1, "draft_tokens": 2, "policy": "last"}, "policy is last"),
    ],
)
def test_what_cannot_be_is_refused(ask: Callable[..., httpx.Response], path: str, body: Any, words: str) -> None:
    common = {"messages": TALK} if path == CHAT else {"prompt": "Return "}
    answer = ask("POST", path, json={**common, "max_tokens": 3, **body})
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True), answer.text


def test_a_chat_without_a_limit_takes_no_more_than_every_slot_has_memory_for(
    ask: Callable[..., httpx.Response], serving_of: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a long context and large caches, nothing else would be let in, or the chat itself refused."""
    it = serving_of()
    prompt = ask("POST", CHAT, json={"messages": TALK, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert it.engine.fair_context == it.session.max_context
    one = it.session.plan(context=prompt + 10, max_depth=it.session.model.max_depth).worst_bytes
    monkeypatch.setattr(it.engine, "_room", one * it.engine.slots)
    # The end token is barred, so that the limit ends the answer.
    barred = {str(token.id): -100 for token in it.session.bundle.manifest.end_tokens}
    answer = ask("POST", CHAT, json={"messages": TALK, "temperature": 0, "logit_bias": barred}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 10


def test_null_is_a_field_that_is_not_there(ask: Callable[..., httpx.Response]) -> None:
    chat = {"messages": TALK, "max_completion_tokens": None, "max_tokens": 2, "stream_options": {"include_usage": None}}
    assert ask("POST", CHAT, json={**chat, "logit_bias": {"7": 100}}).json()["usage"]["completion_tokens"] == 2
    text = {"prompt": "Return ", "max_tokens": None, "logit_bias": {"7": 100}}
    assert ask("POST", COMPLETIONS, json=text).json()["usage"]["completion_tokens"] == 16


def test_a_template_may_be_told_anything(ask: Callable[..., httpx.Response]) -> None:
    more = {"self": 1, "tokenizer": 2, "enable_thinking": False}
    answer = ask("POST", CHAT, json={"messages": TALK, "max_tokens": 2, "chat_template_kwargs": more})
    assert answer.status_code == 200, answer.text


def test_a_header_holds_what_headers_may(ask: Callable[..., httpx.Response]) -> None:
    body = {"prompt": "Return ", "max_tokens": 2, "odd\x00\x1f\x7f\r\nEvil: 1": 1, "ä": 2}
    assert ask("POST", COMPLETIONS, json=body).headers["x-mythos-ignored"] == "oddEvil: 1, \\xe4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ raise_exception(messages[0].content) }}", "no \\ud800"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_a_template_that_refuses_is_an_error_of_openais_shape(
    ask: Callable[..., httpx.Response], text: str, words: str
) -> None:
    content = b'{"messages": [{"role": "user", "content": "no \\ud800"}]}'
    answer = ask("POST", CHAT, serving={"template": ChatTemplate(text, "own")}, content=content, headers=JSON)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": [1], "temperature": 0, "temperature": 2}', "the key 'temperature' stands there twice"),
        (b'{"prompt": [1], "temperature": NaN}', "temperature is nan, expected a finite number"),
        (b'{"prompt": [1], "logit_bias": {"1": 1e999}}', "logit_bias is inf, expected a finite number"),
        (b"[" * 100_000, "the body is no JSON: it is nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "the body is no JSON: Exceeds the limit"),
        (b"\xff", "the body is no JSON"),
    ],
)
def test_a_body_that_no_client_writes_is_refused(
    ask: Callable[..., httpx.Response], content: bytes, words: str
) -> None:
    answer = ask("POST", COMPLETIONS, content=content, headers=JSON)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_figures_are_exact(serving_of: Callable[..., Serving], ask: Callable[..., httpx.Response]) -> None:
    serving_of().engine.counts["generated_tokens"] += 123_456_789
    text = ask("GET", "/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith("mythos_edge_generated_tokens_total ")]
    assert int(line.split()[1]) >= 123_456_789
    serving_of().engine.counts["generated_tokens"] -= 123_456_789


def test_a_browser_may_ask_for_leave_without_a_key(ask: Callable[..., httpx.Response]) -> None:
    origin = {"Origin": "http://page"}
    asking = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    open_to = {"keys": ("ä key",), "origins": ("http://page",)}
    assert ask("OPTIONS", CHAT, headers=asking, serving={"keys": ("ä key",)}).status_code == 401
    leave = ask("OPTIONS", CHAT, headers=asking, serving=open_to)
    assert (leave.status_code, leave.headers["access-control-allow-origin"]) == (200, "http://page")
    refused = ask("GET", "/v1/models", headers=origin, serving=open_to)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://page")
    known = {"Authorization": "Bearer ä key".encode()}
    assert ask("GET", "/v1/models", headers=known, serving=open_to).status_code == 200


def test_who_left_before_the_first_byte_leaves_no_request_behind(serving_of: Callable[..., Serving]) -> None:
    """As uvicorn tells it, to a response of which nothing was sent yet."""
    serving = serving_of()
    body = json.dumps({"prompt": "Return ", "stream": True, "max_tokens": 400, "policy": "full"}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}

    async def receive() -> Any:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(message: Any) -> None:
        del message

    before = serving.engine.counts["cancelled"]
    asyncio.run(app_of(serving)({**scope, "asgi": {"spec_version": "2.3"}}, receive, send))
    for _ in range(200):
        if not any(serving.engine.load):
            break
        time.sleep(0.005)
    assert serving.engine.counts["cancelled"] == before + 1


def test_a_method_that_is_not_taken_names_those_that_are(ask: Callable[..., httpx.Response]) -> None:
    answer = ask("GET", CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
