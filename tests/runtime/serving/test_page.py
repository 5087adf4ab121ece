"""The page in headless Chromium: what it shows is what the server answers, and people can use it by every means."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT
from served import Served

from mythos_edge.scripts.lab.browser import WEB, Browser, browser, missing

PAGE = ROOT / "runtime" / "serving" / "page"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DEPTHS = "[...document.querySelectorAll('{}.answer')].map(answer => [...answer.querySelectorAll('.token')]"
DEPTHS += ".flatMap(span => span.dataset.depths.split(' ').filter(Boolean).map(Number)))"
TEXTS = "[...document.querySelectorAll('{}.answer')].map(answer => [...answer.querySelectorAll('.token')]"
TEXTS += ".map(span => span.textContent).join(''))"
DONE = "document.getElementById('stop').hidden && document.querySelectorAll('.answer:not(.working)').length >= {}"


def _no_skip_in_ci(lack: str | None) -> None:
    if lack is not None:
        assert not os.environ.get("MYTHOS_EDGE_REQUIRE_NODE"), lack
        pytest.skip(lack)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    _no_skip_in_ci(missing())
    with browser() as driven:
        yield driven


@pytest.fixture(scope="module")
def served(text_bundle: Path) -> Iterator[Served]:
    with Served(text_bundle, "--chat-template", "chatml") as server:
        yield server


@pytest.fixture
def page(chromium: Browser, served: Served) -> Iterator[Browser]:
    """The page as it is at first, at temperature 0; afterwards nothing may have gone wrong in it."""
    _open(chromium, served)
    _set(chromium, "sampling-temperature", 0)
    _set(chromium, "sampling-max_tokens", 24)
    yield chromium
    heard = chromium.call("heard")
    assert heard["complaints"] == []
    assert [url for url, _ in heard["requests"] if not url.startswith(served.address + "/")] == []


def _open(page: Browser, server: Served, **context: Any) -> None:
    page.open(server.address, **{"viewport": {"width": 1300, "height": 800}, **context})
    page.wait("document.body.classList.contains('ready')")


def _set(page: Browser, control: str, value: object) -> None:
    page.call("fill", f"#{control}", str(value))
    page.js(f"document.getElementById('{control}').dispatchEvent(new Event('change'))")


def _ask(page: Browser, prompt: str, answers: int = 1) -> None:
    page.call("fill", "#prompt", prompt)
    page.call("press", "#prompt", "Enter")
    page.wait(DONE.format(answers))


def _asked(page: Browser) -> list[dict[str, Any]]:
    return [json.loads(body) for _, body in page.call("heard")["requests"] if body]


def _answered(server: Served, path: str, asked: dict[str, Any]) -> tuple[str, list[int]]:
    """The text and depths of the server's whole answer to what the page asked."""
    body = {name: value for name, value in asked.items() if name not in ("stream", "stream_options")}
    (choice,) = server.post(path, body).json()["choices"]
    return choice["message"]["content"] if path == CHAT else choice["text"], choice["depths"]


def test_a_chat_answer_shows_the_depth_of_every_token(page: Browser, served: Served) -> None:
    _set(page, "answer-1-threshold", 0.3)
    _ask(page, "Return the ")
    (asked,) = _asked(page)
    assert asked["messages"] == [{"role": "user", "content": "Return the "}]
    assert (asked["threshold"], asked["temperature"], asked["max_tokens"]) == (0.3, 0, 24)
    assert "max_depth" not in asked  # the model's own is left to the server
    text, depths = _answered(served, CHAT, asked)
    assert page.js(DEPTHS.format("")) == [depths]
    assert page.js(TEXTS.format("")) == [text]
    # Deeper is darker, and told in numbers.
    heat = page.js("[...document.querySelectorAll('.token')].map(span => span.style.getPropertyValue('--heat'))")
    assert [float(one) for one in heat] == pytest.approx([(depth - 1) / 3 for depth in depths], abs=1e-3)
    assert page.js("document.querySelectorAll('.bars rect').length") == len(depths)
    figures = page.js("document.querySelector('.figures').textContent")
    assert f"mean depth{sum(depths) / len(depths):.2f}" in figures
    _ask(page, "And ", 2)
    messages = _asked(page)[1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == text


def test_a_completion_continues_the_text(page: Browser, served: Served) -> None:
    page.call("click", "text=Completion")
    _ask(page, "Return the ")
    (asked,) = _asked(page)
    assert asked["prompt"] == "Return the "
    text, depths = _answered(served, COMPLETIONS, asked)
    assert page.js(DEPTHS.format("")) == [depths]
    assert page.js("document.querySelector('.tokens').textContent") == "Return the " + text


def test_the_slider_sets_the_depth(page: Browser) -> None:
    assert page.js("['min', 'max', 'value'].map(name => document.getElementById('answer-1-max_depth')[name])") == [
        "1",
        "4",
        "4",
    ]
    page.call("press", "#answer-1-max_depth", "ArrowLeft")
    page.call("press", "#answer-1-max_depth", "ArrowLeft")
    _ask(page, "Return the ")
    assert _asked(page)[0]["max_depth"] == 2
    (depths,) = page.js(DEPTHS.format(""))
    assert set(depths) == {2}
    page.call("click", "#settings .reset >> nth=0")
    _ask(page, "Return the ", 2)
    assert set(page.js(DEPTHS.format(""))[1]) == {4}


def test_two_answers_beside_each_other(page: Browser, served: Served) -> None:
    page.call("check", "#compare")
    _set(page, "answer-2-max_depth", 1)
    _ask(page, "Return the ", 2)
    first, second = sorted(_asked(page), key=lambda asked: asked.get("max_depth", 99), reverse=True)
    assert second["max_depth"] == 1
    assert first["seed"] == second["seed"]
    wanted = [_answered(served, CHAT, asked) for asked in (first, second)]
    assert page.js(TEXTS.format("")) == [text for text, _ in wanted]
    assert page.js(DEPTHS.format("")) == [depths for _, depths in wanted]
    left, right = page.js("[...document.querySelectorAll('.answer')].map(one => one.getBoundingClientRect().toJSON())")
    assert left["right"] < right["left"]
    assert left["top"] == right["top"]
    told = page.js("document.querySelector('.comparison').textContent")
    parts = page.js("[...document.querySelectorAll('.parts')].map(span => span.textContent)")
    if wanted[0][0] == wanted[1][0]:
        assert told.startswith("The same text")
        assert parts == []
    else:
        assert "part" in told
        assert len(parts) == 2
        assert parts[0] != parts[1]
    # The talk goes on with the one that is chosen.
    page.call("click", ".answer:nth-child(2) .keep")
    _ask(page, "And ", 4)
    assert _asked(page)[-1]["messages"][1]["content"] == wanted[1][0]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_an_answer_is_stopped(page: Browser, served: Served, way: str) -> None:
    _set(page, "sampling-max_tokens", 450)
    page.call("fill", "#prompt", "Return the ")
    page.call("press", "#prompt", "Enter")
    page.wait("document.querySelectorAll('.token').length > 2")
    if way == "button":
        page.call("click", "#stop")
    else:
        page.call("keyboard.press", "Escape")
    page.wait(DONE.format(1))
    assert 2 < page.js("document.querySelectorAll('.token').length") < 450
    assert "stopped by you" in page.js("document.querySelector('.figures').textContent")
    assert not page.js("document.getElementById('send').hidden")
    # The server has its slot back.
    for _ in range(100):
        if served.figures()["requests_running"] == 0:
            break
    assert served.figures()["requests_running"] == 0


def test_events_are_parsed_wherever_the_stream_is_cut(tmp_path: Path) -> None:
    from shutil import which

    _no_skip_in_ci(None if which("node") else "node is not on the path")
    stream = (
        'data: {"a":"ä€😀"}\r\n\r\n: note\ndata: one\ndata: two\n\ndata:three\r\revent: x\nid\n\n\ndata: [DONE]\n\n'
    )
    data = ("﻿" + stream).encode()
    cuts = [[data[:at], data[at:]] for at in range(len(data) + 1)] + [[bytes([byte]) for byte in data]]
    command = ["node", str(WEB / "sse.mjs"), str(PAGE / "sse.js")]
    sent = json.dumps([[piece.hex() for piece in pieces] for pieces in cuts])
    ran = subprocess.run(command, input=sent, capture_output=True, text=True, timeout=60, check=True)
    made = json.loads(ran.stdout)
    assert len(made) == len(data) + 2
    assert {tuple(events) for events in made} == {('{"a":"ä€😀"}', "one\ntwo", "three", "[DONE]")}


def test_the_page_is_served_with_nothing_of_other_hosts(served: Served) -> None:
    answer = httpx.get(served.address)
    assert answer.headers["content-security-policy"] == "default-src 'self'"
    assert answer.headers["cache-control"] == "no-cache"
    for file in PAGE.iterdir():
        got = httpx.get(f"{served.address}/{file.name}")
        assert got.content == file.read_bytes(), file
        # Of other hosts only the name of SVG's language.
        assert "//" not in file.read_text().replace("http://www.w3.org/2000/svg", "").replace("// ", "")
