"""``serve`` on real sockets: the openai client, limits, keys, many clients, and those who behave badly."""

import asyncio
import base64
import json
import random as chance
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from command_line import Ran, refused
from served import Served

from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.decoding import Generation
from mythos_edge.runtime.session import Session

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GREEDY = {"temperature": 0, "max_tokens": 8}
TALK = [{"role": "system", "content": "Be a test. "}, {"role": "user", "content": "Return the "}]


@pytest.fixture(scope="module")
def served(text_bundle: Path) -> Iterator[Served]:
    with Served(text_bundle, "--chat-template", "chatml", "--slots", 4) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(text_bundle: Path) -> Iterator[Callable[..., Generation]]:
    with Session.open(text_bundle) as session:

        def generate(prompt: Any, **options: Any) -> Generation:
            return session.generate(prompt, **{"max_new_tokens": 8, **options})

        yield generate


def _talk_ids(bundle: Path, talk: list[dict[str, str]] = TALK) -> list[int]:
    with Session.open(bundle) as session:
        assert session.tokenizer is not None
        return ChatTemplate.of(session.bundle, "chatml").ids(session.tokenizer, talk)


def test_the_first_line_says_where(served: Served, text_bundle: Path) -> None:
    assert served.line == f"serving {text_bundle.name} (ort-cpu; chat template chatml) at {served.address}\n"
    assert httpx.get(f"{served.address}/health").json() == {"status": "ok"}


def test_a_chat_through_the_openai_client(
    client: openai.OpenAI, alone: Callable[..., Generation], text_bundle: Path
) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    answer = client.chat.completions.create(model=model.id, messages=TALK, logprobs=True, **GREEDY)
    wanted = alone(_talk_ids(text_bundle), stop_strings=["<|im_end|>"])
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
    assert choice.finish_reason == {"length": "length"}.get(wanted.finish_reason, "stop")
    assert choice.depths == wanted.depths
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(_talk_ids(text_bundle))
    assert answer.usage.completion_tokens == len(wanted.ids)
    assert answer.usage.mean_depth == pytest.approx(sum(wanted.depths) / len(wanted.depths))
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(wanted.logprobs, abs=1e-4)
    chunks = list(
        client.chat.completions.create(
            model=model.id, messages=TALK, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted.text
    assert [depth for chunk in chunks if chunk.choices for depth in chunk.choices[0].depths] == wanted.depths
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == choice.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(wanted.ids)


def test_completions_through_the_openai_client(client: openai.OpenAI, alone: Callable[..., Generation]) -> None:
    prompts: list[Any] = ["Return the ", [1, 2, 3], ["def ", "class "], [[5, 6], [7, 8, 9]]]
    for prompt in prompts:
        answer = client.completions.create(model="any", prompt=prompt, **GREEDY)
        singles = prompt if isinstance(prompt[0], list | str) and isinstance(prompt, list) else [prompt]
        assert [choice.text for choice in answer.choices] == [alone(one).text for one in singles]
        assert [choice.index for choice in answer.choices] == list(range(len(singles)))
    text = "".join(
        chunk.choices[0].text for chunk in client.completions.create(model="m", prompt="ä", stream=True, **GREEDY)
    )
    assert text == alone("ä").text


def test_a_model_without_a_tokenizer_gives_ids(mla_bundle: Path) -> None:
    with Session.open(mla_bundle) as session, Served(mla_bundle) as server:
        wanted = session.generate([1, 2, 3], max_new_tokens=8)
        body = {"prompt": [1, 2, 3], **GREEDY}
        (choice,) = server.post(COMPLETIONS, body).json()["choices"]
        assert (choice["token_ids"], choice["depths"], choice["text"]) == (wanted.ids, wanted.depths, "")
        chunks = server.events(COMPLETIONS, body)
        assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[one] for one in wanted.ids] + [[]]
        for path, refused_body in ((CHAT, {"messages": TALK}), (COMPLETIONS, {"prompt": "text"})):
            answer = server.post(path, refused_body)
            assert answer.status_code == 400
            assert "tokenizer" in answer.json()["error"]["message"]


def test_options_do_what_they_say(served: Served, alone: Callable[..., Generation]) -> None:
    def choices(**more: Any) -> list[dict[str, Any]]:
        answer = served.post(COMPLETIONS, {"prompt": "Return ", **GREEDY, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]  # type: ignore[no-any-return]

    sampled = {"temperature": 1.2, "seed": 11, "top_p": 0.9}
    several = choices(n=3, **sampled)
    wanted = [alone("Return ", **{**sampled, "seed": 11 + at}).text for at in range(3)]
    assert [choice["text"] for choice in several] == wanted
    assert len(set(wanted)) > 1
    whole = alone("Return ").text or ""
    (stopped,) = choices(stop=whole[3:5])
    assert stopped["text"] == whole[: whole.index(whole[3:5])]
    assert stopped["finish_reason"] == "stop"
    for effort, depth in {"minimal": 1, "low": 1, "medium": 2, "high": 4, "max": 4}.items():
        (choice,) = choices(reasoning_effort=effort, policy="full")
        assert set(choice["depths"]) == {depth}
    (choice,) = choices(reasoning_effort="minimal", max_depth=3, policy="full")
    assert set(choice["depths"]) == {3}
    (choice,) = choices(threshold=0.3, min_depth=2)
    assert choice["depths"] == alone("Return ", threshold=0.3, min_depth=2).depths
    (choice,) = choices(logit_bias={"7": 100}, logprobs=1)
    assert len(set(choice["logprobs"]["tokens"])) == 1
    drafted = served.post(COMPLETIONS, {"prompt": "Return ", **GREEDY, "draft_depth": 1, "draft_tokens": 3}).json()
    assert drafted["choices"][0]["text"] == whole
    details = drafted["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0


def test_log_probabilities_of_the_likeliest(client: openai.OpenAI, alone: Callable[..., Generation]) -> None:
    wanted = alone("Return ", top_logprobs=3)
    expected = [[(one.text, pytest.approx(one.logprob, abs=1e-4)) for one in top] for top in wanted.top_logprobs]
    talk: Any = [{"role": "user", "content": "Return "}]
    chat = client.chat.completions.create(model="m", messages=talk, logprobs=True, top_logprobs=2, **GREEDY)
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert bytes(entry.bytes).decode() == entry.token
    text = client.completions.create(model="m", prompt="Return ", logprobs=3, **GREEDY)
    told = text.choices[0].logprobs
    assert [list(top.items()) for top in told.top_logprobs] == expected
    places = zip(told.text_offset, told.tokens, strict=True)
    assert all(text.choices[0].text[at:].startswith(token) for at, token in places)
    pieces = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(model="m", prompt="Return ", logprobs=3, stream=True, **GREEDY)
    ]
    streamed = {name: [one for piece in pieces for one in getattr(piece, name)] for name in ("tokens", "text_offset")}
    assert streamed == {"tokens": told.tokens, "text_offset": told.text_offset}
    assert [one for piece in pieces for one in piece.token_logprobs] == pytest.approx(told.token_logprobs, abs=1e-4)
    assert [list(top) for piece in pieces for top in piece.top_logprobs] == [list(top) for top in told.top_logprobs]
    plain = client.completions.create(model="m", prompt="Return ", logprobs=0, **GREEDY).choices[0].logprobs
    assert (plain.tokens, plain.top_logprobs) == (told.tokens, None)


def test_headers_tell_what_meant_nothing(served: Served) -> None:
    answer = served.post(CHAT, {"messages": TALK, "max_completion_tokens": 2, "frobnicate": 1, "ä\n": 2, "user": "x"})
    assert answer.headers["x-mythos-ignored"] == "frobnicate, \\xe4"
    assert answer.headers["x-mythos-chat-template"] == "chatml"
    assert "x-mythos-ignored" not in served.post(CHAT, {"messages": TALK, "max_tokens": 2}).headers


@pytest.mark.parametrize(
    ("path", "body", "words", "param"),
    [
        (CHAT, {}, "messages is None, expected a list", "messages"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "content that is no text",
            "messages",
        ),
        (CHAT, {"messages": TALK, "temperature": -1}, "temperature is -1", "temperature"),
        (CHAT, {"messages": TALK, "n": 1000}, "n is 1000", "n"),
        (CHAT, {"messages": TALK, "max_depth": 0}, "max_depth is 0", "max_depth"),
        (CHAT, {"messages": TALK, "reasoning_effort": "huge"}, "reasoning_effort is 'huge'", "reasoning_effort"),
        (CHAT, {"messages": TALK, "logit_bias": {"x": 1}}, "logit_bias has 'x'", "logit_bias"),
        (CHAT, {"messages": TALK, "logit_bias": {"99999": 1}}, "logit_bias of token 99999", "logit_bias"),
        (CHAT, {"messages": TALK, "draft_depth": "auto"}, "both as numbers", "draft_depth"),
        (CHAT, {"messages": TALK, "top_logprobs": 2}, "which needs logprobs: true", "top_logprobs"),
        (CHAT, {"messages": TALK, "logprobs": 2}, "logprobs is 2", "logprobs"),
        (CHAT, {"messages": TALK, "logprobs": True, "top_logprobs": 21}, "top_logprobs is 21", "top_logprobs"),
        (COMPLETIONS, {"prompt": "x", "logprobs": True}, "logprobs is True", "logprobs"),
        (CHAT, {"messages": TALK, "stop": [""]}, "stop string is empty", None),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 9000}]}, "tokens, this model takes 512", None),
        (COMPLETIONS, {}, "prompt is missing", "prompt"),
        (COMPLETIONS, {"prompt": [99999]}, "99999 is out of range", None),
        (COMPLETIONS, {"prompt": ""}, "prompt is empty", "prompt"),
        (COMPLETIONS, [], "a JSON list, expected an object", None),
    ],
)
def test_errors_are_of_openais_shape(served: Served, path: str, body: Any, words: str, param: str | None) -> None:
    answer = served.post(path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_the_client_raises_the_errors_it_has(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client.chat.completions.create(model="m", messages=TALK, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="m", input="x")
    with pytest.raises(openai.NotFoundError, match="model 'other' is not here"):
        client.models.retrieve("other")
    assert httpx.get(f"{served.address}{CHAT}").status_code == 405
    assert httpx.post(f"{served.address}{CHAT}", content=b"{}").status_code == 415
    for content in (b"{", b"\xff", b"[" * 100_000, b'"x"'):
        answer = httpx.post(f"{served.address}{CHAT}", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, content[:10]


def test_a_key_is_asked_for_by_everything_but_health(text_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\ufefffirst\n\n second \n", encoding="utf-8")
    with Served(text_bundle, "--api-key-file", tmp_path / "keys") as server:
        paths = ("/", "/metrics", "/v1/models", "/nothing", "/index.html")
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic !"},
            {"Authorization": "x first"},
        ):
            assert {httpx.get(server.address + path, headers=headers).status_code for path in paths} == {401}
            assert server.post(CHAT, {"messages": TALK}, headers=headers).status_code == 401
        assert httpx.get(f"{server.address}/health").status_code == 200
        basic = base64.b64encode(b"me:second").decode()
        for given in ("Bearer first", "bearer second", f"Basic {basic}"):
            assert httpx.get(f"{server.address}/v1/models", headers={"Authorization": given}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.address}/v1", api_key="no", max_retries=0).models.list()


def test_a_page_that_gives_its_own_name_this_address_is_refused(served: Served) -> None:
    port = served.address.rpartition(":")[2]
    for host, code in ((f"localhost:{port}", 200), ("127.0.0.1", 200), ("evil.example", 403), ("127.0.0.1.evil", 403)):
        answer = httpx.get(f"{served.address}/v1/models", headers={"Host": host})
        assert answer.status_code == code, host
    assert "expected localhost: start the server with --api-key-file" in answer.json()["error"]["message"]


def test_a_known_beginning_is_not_computed_again(served: Served) -> None:
    system = [{"role": "system", "content": "All work and no play. " * 8}]
    used = []
    for text in ("a", "b", "c"):
        answer = served.post(CHAT, {"messages": [*system, {"role": "user", "content": text}], **GREEDY}).json()
        used.append(answer["usage"])
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in used]
    assert cached[0] < 50
    assert min(cached[1:]) > used[0]["prompt_tokens"] * 0.8


def test_a_full_queue_says_when_to_come_again(text_bundle: Path) -> None:
    async def ask(server: Served) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"prompt": "Return ", "temperature": 0, "max_tokens": 200, "policy": "full"}
            return await asyncio.gather(*(client.post(server.address + COMPLETIONS, json=body) for _ in range(8)))

    with Served(text_bundle, "--slots", 1, "--queue", 1) as server:
        answers = asyncio.run(ask(server))
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * codes.count(200) + [503] * codes.count(503)
    assert 2 <= codes.count(200) < 8
    full = next(answer for answer in answers if answer.status_code == 503)
    assert full.headers["retry-after"] == "1"
    assert full.json()["error"]["code"] == "queue_full"


@pytest.mark.slow
def test_many_clients_at_once(text_bundle: Path, alone: Callable[..., Generation]) -> None:
    """64 clients on 8 slots, 1,000 requests: each is answered as it would be alone, none is lost, memory stays flat."""
    random = chance.Random(1)
    bodies = []
    for _ in range(100):
        prompt = [random.randrange(200) for _ in range(random.randrange(2, 40))]
        depth = random.choice([{}, {}, {"threshold": 0.5}, {"max_depth": 2}])
        bodies.append({"prompt": prompt, "temperature": 0, "max_tokens": random.randrange(1, 12), **depth})
    options = [{"max_new_tokens": body["max_tokens"]} for body in bodies]
    for body, more in zip(bodies, options, strict=True):
        more |= {name: body[name] for name in ("threshold", "max_depth") if name in body}
    wanted = [alone(body["prompt"], **more) for body, more in zip(bodies, options, strict=True)]

    async def client(session: httpx.AsyncClient, server: Served, numbers: list[int]) -> None:
        for number in numbers:
            answer = await session.post(server.address + COMPLETIONS, json=bodies[number])
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            assert (choice["text"], choice["depths"]) == (wanted[number].text, wanted[number].depths)

    async def all_of(server: Served, requests: int) -> None:
        numbers = [at % len(bodies) for at in range(requests)]
        random.shuffle(numbers)
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=120, limits=limits) as session:
            await asyncio.gather(*(client(session, server, numbers[at::64]) for at in range(64)))

    def resident(server: Served) -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    with Served(text_bundle, "--cache-memory", "20MB", "--queue", 64) as server:
        asyncio.run(all_of(server, 300))
        before = resident(server)
        asyncio.run(all_of(server, 700))
        figures = server.figures()
        assert figures['requests_total{how="done"}'] == 1000
        assert figures["requests_running"] == figures["requests_waiting"] == 0
        assert figures["prompt_cache_bytes"] <= 20e6
        assert resident(server) < before * 1.2 + 20_000


@pytest.mark.slow
def test_bad_manners_leave_nothing_behind(served: Served, alone: Callable[..., Generation]) -> None:
    """Clients that leave, send rubbish, send slowly or read slowly, at once; then the server is as it was."""
    host, port = "127.0.0.1", int(served.address.rpartition(":")[2])
    random = chance.Random(2)
    before = served.figures()

    def head(body: bytes, length: int | None = None) -> bytes:
        size = len(body) if length is None else length
        lines = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {size}", "", "")
        return "\r\n".join((f"POST {COMPLETIONS} HTTP/1.1", *lines)).encode() + body

    async def leaving(stream: bool) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        body = {"prompt": "Return ", "max_tokens": 300, "policy": "full", "stream": stream}
        writer.write(head(json.dumps(body).encode()))
        await writer.drain()
        if stream:
            await reader.read(200)
        await asyncio.sleep(random.random() * 0.05)
        writer.transport.abort()

    async def rubbish() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(
            random.choice([b"\x00\xff" * 100, b"GET / HTTP/9\r\n\r\n", head(b"{"), head(b"[1]"), head(b"", 10)])
        )
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.close()
        del reader

    async def slow_reader() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(head(json.dumps({"prompt": "Return ", "max_tokens": 40, "stream": True}).encode()))
        data = b""
        while b"[DONE]" not in data:
            data += (piece := await reader.read(64))
            assert piece, data
            await asyncio.sleep(0.001)
        writer.close()

    async def soak() -> None:
        kinds: list[Callable[[], Any]] = [lambda: leaving(True), lambda: leaving(False), rubbish, slow_reader]
        for _ in range(6):
            await asyncio.gather(*(random.choice(kinds)() for _ in range(16)))

    asyncio.run(asyncio.wait_for(soak(), 60))
    for _ in range(200):
        figures = served.figures()
        if figures["requests_running"] == figures["requests_waiting"] == 0:
            break
        time.sleep(0.05)
    assert figures["requests_running"] == figures["requests_waiting"] == 0
    assert figures['requests_total{how="cancelled"}'] > before['requests_total{how="cancelled"}']
    assert figures['requests_total{how="failed"}'] == before['requests_total{how="failed"}']
    answer = served.post(COMPLETIONS, {"prompt": "Return ", **GREEDY}).json()
    assert answer["choices"][0]["text"] == alone("Return ").text


def test_a_body_has_bounds(served: Served) -> None:
    answer = httpx.post(
        f"{served.address}{CHAT}", content=b" " * 5_000_000, headers={"content-type": "application/json"}, timeout=30
    )
    assert answer.status_code == 413
    assert "more than 4194304 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_what_runs_is_done(text_bundle: Path, sent: signal.Signals) -> None:
    server = Served(text_bundle)
    body = {"prompt": "Return ", "max_tokens": 200, "stream": True, "temperature": 0, "policy": "full"}
    with httpx.stream("POST", server.address + COMPLETIONS, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(sent)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    _, errors = server.process.communicate(timeout=30)
    assert (server.process.returncode, errors) == (0, "")


def test_a_request_takes_its_time_and_no_more(text_bundle: Path) -> None:
    with Served(text_bundle, "--timeout", 0.05) as server:
        # Without its end token, which sampling may draw at once.
        body = {"prompt": "Return ", "max_tokens": 400, "policy": "full", "logit_bias": {"256": -100}}
        answer = server.post(COMPLETIONS, body)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"


def test_depth_on_the_command_line_is_the_default(text_bundle: Path) -> None:
    with Served(text_bundle, "--max-depth", 1, "--threshold", 1) as server:
        (model,) = httpx.get(f"{server.address}/v1/models").json()["data"]
        assert model["defaults"] == {"max_depth": 1, "threshold": 1.0}
        (choice,) = server.post(COMPLETIONS, {"prompt": "Return ", **GREEDY}).json()["choices"]
        assert set(choice["depths"]) == {1}


def test_mistakes_are_one_line(run: Callable[..., Ran], text_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    taken = socket.create_server(("127.0.0.1", 0))
    for words, message in [
        (("--port", taken.getsockname()[1]), "choose another --port"),
        (("--port", 99999), "--port is 99999, expected 0 to 65535"),
        (("--host", "nowhere.invalid"), "cannot serve at nowhere.invalid"),
        (("--host", "x" * 80), "cannot serve at xxx"),
        (("--slots", 0), "--slots is 0, expected at least 1"),
        (("--queue", -1), "--queue is -1, expected at least 0"),
        (("--cache-memory", "much"), "--cache-memory is 'much', expected a size"),
        (("--timeout", "nan"), "--timeout is nan"),
        (("--api-key-file", tmp_path / "empty"), "has no API key"),
        (("--api-key-file", tmp_path), "cannot read the API keys"),
        (("--chat-template", "absent"), "cannot read the chat template"),
        (("--max-depth", 0), "max_depth is 0"),
        (("--target", "ort-tpu"), "no target 'ort-tpu'"),
    ]:
        refused(run("serve", text_bundle, *words), message)
    taken.close()
