"""Inputs that people and clients give beside a model, for ``fuzz``: tokenizers, templates, ids, sessions, requests.

Each ``x(folder, bundle)`` gives what reads one input in ``folder``, and valid inputs.
"""

import asyncio
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import numpy as np

from mythos_edge.exporter.tokenizer_files import tokenizer_for
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.runtime import template_process
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.decoding import Generation
from mythos_edge.runtime.prompts import checked_ids
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.text import Tokenizer
from mythos_edge.scripts import given_tokens, prompt_file
from mythos_edge.scripts.lab import fuzz_mutations as change

# Resolved, for an editable install is a tree of links.
FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
Read: TypeAlias = Callable[[bytes], object]


def tokenizer(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    del bundle
    path = folder / "tokenizer.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        tokenizer = Tokenizer(path)
        ids = tokenizer.encode("Hello \n world, ä 日本 \u202e 1234")
        tokenizer.decode(ids)
        tokenizer.added_to_prompt()
        for number in ids[:5]:
            tokenizer.text_alone(number)
        tokenizer_for(path, (), 40_000)

    return read, [file.read_bytes() for file in sorted((FIXTURES / "tokenizers").glob("*.json"))]


def tokenizer_config(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    """An input is the name of a file beside tokenizer.json in a line, and its content."""
    del bundle
    shutil.copy(FIXTURES / "tokenizers" / "llama2.json", folder / "tokenizer.json")
    seeds = [
        b"tokenizer_config.json\n" + json.dumps({
            "bos_token": {"content": "<s>"}, "eos_token": "</s>",
            "chat_template": [{"name": "default", "template": "x"}],
        }).encode(),
        b"generation_config.json\n" + json.dumps({"eos_token_id": [1, 2], "bos_token_id": 1}).encode(),
    ]  # fmt: skip

    def read(data: bytes) -> None:
        name, _, content = data.partition(b"\n")
        (folder / name.decode()).write_bytes(content)
        try:
            tokenizer_for(folder, (), 40_000)
        finally:
            (folder / name.decode()).unlink()

    return read, seeds


_TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "é"}]
_TEMPLATES = (
    b"{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim }}{% endfor %}",
    b"{%- for m in messages %}{%- if m.role == 'system' %}{{- '<<SYS>>' ~ m.content }}{%- continue %}{%- endif %}"
    b"{{ m | tojson(indent=2) }}{%- endfor %}{% if enable_thinking is defined %}<think>{% endif %}",
    b"{% set ns = namespace(n=0) %}{% macro f(n) %}{{ n * 2 }}{% endmacro %}{% for m in messages %}"
    b"{% set ns.n = ns.n + 1 %}{{ f(ns.n) }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
)


def template(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    """The work of a template's process in place, and now and then in such a process."""
    del folder, bundle
    values = {"messages": _TALK, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}

    def read(data: bytes) -> None:
        text = data.decode(errors="replace")
        if int.from_bytes(hashlib.sha256(data).digest()[:2], "little") < 64:
            ChatTemplate(text, "bundle").render(_TALK)
            return
        answer = template_process._answer(text, values, [])
        if "error" in answer:
            raise UsageError(answer["error"])

    return read, list(_TEMPLATES)


def ids(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    model = open_bundle(bundle).manifest.model
    path, seeds = folder / "ids.npy", []
    for array in (
        np.arange(6).reshape(2, 3),
        np.array([[1]], np.uint8),
        np.zeros((2, 2), ">i4"),
        np.zeros((1, 3), "F").T,
    ):
        stream = BytesIO()
        np.save(stream, array)
        seeds.append(stream.getvalue())
    np.savez(stream := BytesIO(), np.arange(3))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        checked_ids(given_tokens.ids_from_file(str(path)), model)

    return read, [*seeds, stream.getvalue()]


def array_changed(random: Random, data: bytes, other: bytes) -> bytes:
    """A .npy file with another header, or changed as bytes."""
    if random.random() < 0.5:
        return change.bytes_changed(random, data, other)
    kind = random.choice(
        ("<i8", "|O", "<U99", ">f8", "|V8", "M8[ns]", "<i9", "[('a','<i8')]", "i8, O", "9" * 500, "<c16")
    )
    shape = random.choice(
        ("(2, 3)", "(9999999999999,)", "(-1,)", "()", "(0,)", "(2**99,)", "(1,)*99", "((1,),)", "'x'")
    )
    order = random.choice(("False", "True", "None", "1", "[" * 150))
    header = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}"
    header = random.choice((header, header[:-3], header * 2, "(" * 3000, "-" * 9000 + "1", "{" + "1:1," * 3000 + "}"))
    size = random.choice((len(header), len(header), 0, 65535))
    version = random.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"))
    return b"\x93NUMPY" + version + size.to_bytes(2 if version[0] == 1 else 4, "little") + header.encode() + data[-48:]


def text(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    del bundle
    path = folder / "text.txt"
    tokenizer = Tokenizer(FIXTURES / "tokenizers" / "llama2.json")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        ids = tokenizer.encode(given_tokens.text_from_file(str(path)))
        given_tokens.rows_of(np.array(ids or [0]), 8)
        tokenizer.decode(ids)

    return read, [b"Hello world\n", "ä \u2028 日本 \U0001f600".encode(), b"</s> <s> a\0b"]


def prompts(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    path = folder / "prompts.jsonl"
    session = Session.open(bundle)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for line in prompt_file.read_lines(path):
            prompt_file._checked(line, {}, session)

    lines = ({"prompt": "1 2", "id": 7}, {"ids": [1, 2], "max_new_tokens": 3, "temperature": 0.5, "seed": 1})
    more = {"ids": [3], "stop": ["x", "y"], "logprobs": 2, "id": "name"}
    return read, [json.dumps(line).encode() for line in (*lines, more)]


def session(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    """An input is the archive that a session is saved as."""
    session = Session.open(bundle)
    session.generate([1, 2, 3], max_new_tokens=3, temperature=1.0, seed=1)
    path = folder / "saved.npz"
    session.save(path)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        session.restore(path)

    return read, [path.read_bytes()]


def saved_changed(random: Random, data: bytes, other: bytes) -> bytes:
    """A saved session with its header changed as JSON, an array replaced, or its bytes changed."""
    if random.random() < 0.4:
        return change.bytes_changed(random, data, other)
    try:
        with np.load(BytesIO(data)) as archive:
            arrays = dict(archive)
        header = str(arrays["header"]).encode()
    # Whatever a changed archive has become.
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, TypeError,
            SyntaxError, OverflowError, MemoryError):  # fmt: skip
        return change.bytes_changed(random, data, other)
    if random.random() < 0.6:
        arrays["header"] = np.array(change.json_changed(random, header, header).decode(errors="replace"))
    for name in random.sample(sorted(arrays), random.randrange(3)):
        old = arrays[name]
        arrays[name] = random.choice(
            (old[..., :-1] if old.ndim else old, old.astype("f8") if old.dtype.kind in "fiu" else old, np.array(-1),
             np.array(2**62), np.full(4, 2**62), np.zeros((0, 3), "f4"), np.array("x"), old.reshape(-1))
        )  # fmt: skip
    np.savez(made := BytesIO(), **arrays)
    return made.getvalue()


def server(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    """An input is a path in a line, and the body that is posted there; the engine answers at once."""
    del folder
    from mythos_edge.runtime.serving.app import Serving, app_of
    from mythos_edge.runtime.serving.engine import Engine, Listener, Request, Ticket

    class Idle(Engine):
        def submit(self, request: Request, listener: Listener) -> Ticket:
            ticket = super().submit(request, listener)
            self._waiting.clear()
            listener(Generation(text="x"))
            return ticket

        def _serve(self) -> None:
            """Computes nothing."""

    session = Session.open(bundle)
    serving = Serving(session, Idle(session), ChatTemplate.of(session.bundle, "chatml"), "x", "ort-cpu")
    app, loop = app_of(serving), asyncio.new_event_loop()

    def read(data: bytes) -> None:
        path, _, body = data.partition(b"\n")
        status, answer = loop.run_until_complete(_posted(app, path.decode(), body))
        if status >= 500 and b"queue" not in answer:
            raise AssertionError(f"{status}: {answer[:200]!r}")
        if status >= 400:
            raise UsageError(json.loads(answer)["error"]["message"])

    chat = {"model": "x", "messages": _TALK, "max_tokens": 3, "temperature": 0.5, "stop": ["a"], "logprobs": True,
            "top_logprobs": 2, "reasoning_effort": "low", "n": 2, "logit_bias": {"3": 1.5}, "stream": False,
            "chat_template_kwargs": {"enable_thinking": True}, "seed": 3,
            "stream_options": {"include_usage": True}}  # fmt: skip
    plain = {"prompt": [1, 2], "max_tokens": 2, "max_depth": 2, "threshold": 0.9, "policy": "fresh", "top_p": 0.9,
             "draft_depth": 1, "draft_tokens": 2, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}  # fmt: skip
    bodies = (
        ("chat/completions", chat),
        ("completions", plain),
        ("completions", {"prompt": ["1 2", "3"], "stream": True}),
    )
    return read, [f"/v1/{path}\n{json.dumps(body)}".encode() for path, body in bodies]


async def _posted(app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and content of the answer to a POST."""
    sent: list[dict[str, Any]] = []
    pieces = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.Event().wait()
        return pieces.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers,
             "query_string": b"", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "scheme": "http",
             "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.4"}, "root_path": ""}  # fmt: skip
    await app(scope, receive, send)
    return int(sent[0]["status"]), b"".join(message.get("body", b"") for message in sent[1:])
