"""The page in headless Chromium: what it shows is what the server answers, and people can use it by every means."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT
from engines import needed
from served import Served

from mythos_edge.scripts.lab.browser import WEB, Browser, browser, missing

PAGE = ROOT / "runtime" / "serving" / "page"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DEPTHS = "[...document.querySelectorAll('{}.answer')].map(answer => [...answer.querySelectorAll('.token')]"
DEPTHS += ".flatMap(span => span.dataset.depths.split(' ').filter(Boolean).map(Number)))"
TEXTS = "[...document.querySelectorAll('{}.answer')].map(answer => [...answer.querySelectorAll('.token')]"
TEXTS += ".map(span => span.textContent).join(''))"
DONE = "document.getElementById('stop').hidden && document.querySelectorAll('.answer:not(.working)').length >= {}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    needed(missing())
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
    assert "ended byyou" in page.js("document.querySelector('.figures').textContent")
    assert not page.js("document.getElementById('send').hidden")
    _idle(served)


def _idle(served: Served) -> None:
    """Waits until the server has all its slots back."""
    until = time.monotonic() + 30
    while served.figures()["requests_running"]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_events_are_parsed_wherever_the_stream_is_cut() -> None:
    needed(None if shutil.which("node") else "node is not on the path")
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


def test_an_error_is_told_in_one_line(page: Browser) -> None:
    _ask(page, "x" * 9000)
    error = page.js("document.querySelector('.error').textContent")
    assert "tokens, this model takes 512" in error
    assert "\n" not in error
    assert page.js("document.querySelectorAll('.token').length") == 0
    # What failed is no part of the talk.
    _ask(page, "Return ", 2)
    assert [message["content"] for message in _asked(page)[1]["messages"]] == ["Return "]
    assert ["400" in one for one in page.call("forget")] == [True]  # by the browser itself


def test_a_server_that_ends_is_told(chromium: Browser, text_bundle: Path) -> None:
    with Served(text_bundle, "--chat-template", "chatml") as server:
        _open(chromium, server)
        _set(chromium, "sampling-max_tokens", 450)
        chromium.call("fill", "#prompt", "Return the ")
        chromium.call("press", "#prompt", "Enter")
        chromium.wait("document.querySelectorAll('.token').length > 2")
        server.end(signal.SIGKILL)
        chromium.wait(DONE.format(1))
        assert chromium.js("document.querySelector('.error').textContent") == "The connection to the server was lost."
        assert chromium.js("document.querySelectorAll('.token').length") > 2
        _ask(chromium, "And ", 2)
        assert chromium.js("document.querySelectorAll('.error')[1].textContent") == "The server cannot be reached."


def test_a_key_is_the_browsers_own_to_give(chromium: Browser, text_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("open sesame\n")
    with Served(text_bundle, "--api-key-file", tmp_path / "keys") as server:
        _open(chromium, server, httpCredentials={"username": "me", "password": "open sesame"})
        _ask(chromium, "Return the ")
        assert chromium.js("document.querySelectorAll('.token').length") > 0
        assert chromium.call("heard")["complaints"] == []


def test_a_model_without_a_template_says_so(chromium: Browser, text_bundle: Path) -> None:
    with Served(text_bundle, "--max-depth", 3, "--threshold", 0.5) as server:
        _open(chromium, server)
        assert "This model has no chat template" in chromium.js("document.getElementById('welcome').textContent")
        assert chromium.js("document.querySelector('[name=mode]:checked').value") == "completion"
        # The server's own depth is where the sliders stand.
        assert chromium.call("inputValue", "#answer-1-max_depth") == "3"
        assert chromium.call("inputValue", "#answer-1-threshold") == "0.5"
        chromium.call("click", "text=Chat")
        _ask(chromium, "Return the ")
        (asked,) = _asked(chromium)
        assert asked["messages"] == [{"role": "user", "content": "Return the "}]
        assert not {"max_depth", "threshold", "policy"} & set(asked)


def test_a_model_without_a_tokenizer_takes_ids(chromium: Browser, demo_bundle: Path) -> None:
    with Served(demo_bundle) as server:
        _open(chromium, server)
        _set(chromium, "sampling-temperature", 0)
        _set(chromium, "sampling-max_tokens", 5)
        _ask(chromium, "90, 90 91 15")
        (asked,) = _asked(chromium)
        assert asked["prompt"] == [90, 90, 91, 15]
        body = {name: value for name, value in asked.items() if "stream" not in name}
        (choice,) = server.post(COMPLETIONS, body).json()["choices"]
        assert chromium.js(DEPTHS.format("")) == [choice["depths"]]
        assert chromium.js(TEXTS.format("")) == ["".join(f"{number} " for number in choice["token_ids"])]
        assert chromium.call("isDisabled", "[value=chat]")


def test_everything_is_within_reach_of_the_keyboard(page: Browser) -> None:
    page.call("reload")
    page.wait("document.body.classList.contains('ready')")
    page.call("keyboard.type", "Return the ")  # the field has the focus from the start
    page.call("keyboard.press", "Shift+Enter")
    page.call("keyboard.type", "next")
    page.call("keyboard.press", "Control+Enter")
    page.wait(DONE.format(1))
    assert _asked(page)[0]["messages"][0]["content"] == "Return the \nnext"
    seen = set()
    for _ in range(60):
        page.call("keyboard.press", "Tab")
        focused = "document.activeElement"
        seen.add(page.js(f"{focused}.id || {focused}.name || {focused}.className"))
        assert page.js(f"{focused} === document.body || {focused}.matches(':focus-visible')")
    controls = {"theme", "heat", "mode", "tokens", "prompt", "retry", "edit", "clear", "send", "compare"}
    controls |= {f"answer-1-{name}" for name in ("max_depth", "threshold", "policy")}
    controls |= {f"sampling-{name}" for name in ("temperature", "max_tokens", "seed")}
    assert controls <= seen
    # Arrow keys walk through the tokens of an answer.
    page.call("focus", ".tokens")
    for _ in range(3):
        page.call("keyboard.press", "ArrowRight")
    (depths,) = page.js(DEPTHS.format(""))
    tip = page.js("document.getElementById('tip').textContent")
    assert tip.startswith(f"token 3 · depth {depths[2]} of 4")
    assert f"token 3 · depth {depths[2]} of 4" in page.js("document.getElementById('announcer').textContent")
    page.call("keyboard.press", "Escape")
    assert page.js("document.getElementById('tip').hidden")
    # A screen reader hears the answer.
    assert page.js("document.getElementById('live').textContent") == page.js(TEXTS.format(""))[0]


def test_the_pointer_shows_depth_and_probabilities(page: Browser) -> None:
    _ask(page, "Return the ")
    page.call("hover", ".token >> nth=2")
    tip = page.js("document.getElementById('tip').textContent")
    assert tip.startswith("token 3 · depth")
    shares = page.js("[...document.querySelectorAll('#tip li')].map(one => one.style.getPropertyValue('--share'))")
    assert len(shares) in (3, 4)
    assert 0 < sum(map(float, shares)) <= 1.001
    assert float(shares[0]) == pytest.approx(max(map(float, shares)))  # at temperature 0 the likeliest is taken
    page.call("hover", ".bars")
    middle = page.js("document.getElementById('tip').textContent").split()[1]
    assert abs(int(middle) - page.js("document.querySelectorAll('.bars rect').length")) < 26


CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
      return value <= 10 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Array.from({ length: 101 }, (_, heat) => {
    const step = document.createElement("span");
    step.className = "step heat";
    step.style.setProperty("--heat", heat / 100);
    document.getElementById("scale").append(step);
    const { backgroundColor, color } = getComputedStyle(step);
    return [luminance(backgroundColor), luminance(color)];
  });
})()
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_depth_can_be_told_and_read(chromium: Browser, theme: str, served: Served) -> None:
    _open(chromium, served, colorScheme=theme)
    both = chromium.js(CONTRAST)
    for ground, ink in both:
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 4.5
    # Lightness goes in one direction only, and far enough for eight steps that a colour-blind eye sees too.
    grounds = [ground + 0.05 for ground, _ in both]
    ratios = [b / a if theme == "dark" else a / b for a, b in pairwise(grounds[::14])]
    assert min(ratios) > 1.15


def test_the_theme_is_the_systems_until_it_is_chosen(chromium: Browser, served: Served) -> None:
    shown = "getComputedStyle(document.body).backgroundColor"
    grounds = {}
    for theme in ("light", "dark"):
        _open(chromium, served, colorScheme=theme)
        grounds[theme] = chromium.js(shown)
    assert grounds["light"] != grounds["dark"]
    chromium.call("click", "#theme")
    assert chromium.js(shown) == grounds["light"]
    chromium.call("reload")
    assert chromium.js(shown) == grounds["light"]
    chromium.call("click", "#theme")
    assert chromium.js(shown) == grounds["dark"]


def test_settings_are_remembered_and_rubbish_is_not(page: Browser, served: Served) -> None:
    _set(page, "answer-1-max_depth", 2)
    page.call("check", "#compare")
    page.call("uncheck", "#heat")
    page.call("reload")
    page.wait("document.body.classList.contains('ready')")
    assert page.call("inputValue", "#answer-1-max_depth") == "2"
    assert page.call("inputValue", "#sampling-max_tokens") == "24"
    assert page.call("isVisible", "#answer-2-max_depth")
    assert not page.js("document.body.classList.contains('heated')")
    for rubbish in ("{", "7", "null", '{"first": 3, "second": {"max_depth": 1e9, "policy": "x"}, "mode": "?"}'):
        page.js(f"Object.keys(localStorage).forEach(name => localStorage.setItem(name, {rubbish!r}))")
        page.call("reload")
        page.wait("document.body.classList.contains('ready')")
        assert page.call("inputValue", "#answer-1-max_depth") == "4"
        assert page.call("inputValue", "#answer-2-max_depth") in ("2", "4")


def test_answers_are_tried_again_taken_back_and_copied(page: Browser) -> None:
    _ask(page, "Return the ")
    first = page.js(TEXTS.format(""))
    page.call("click", "#retry")
    page.wait(DONE.format(1))
    assert page.js(TEXTS.format("")) == first
    _ask(page, "And ", 2)
    page.call("click", "#edit")
    assert page.call("inputValue", "#prompt") == "And "
    assert page.js(TEXTS.format("")) == first
    page.call("click", ".copy")
    page.wait("document.querySelector('.copy').textContent !== 'Copy'")
    assert page.js("getSelection().toString() || document.querySelector('.copy').textContent") in (*first, "Copied")
    page.call("click", "#clear")
    assert page.js("document.querySelectorAll('.turn').length") == 0
    assert page.call("isVisible", "#welcome")
    page.call("click", "text=Completion")
    _ask(page, "Return the ")
    # Tried again as it was asked, whatever is chosen by now.
    completed = page.js(TEXTS.format(""))
    page.call("click", "text=Chat")
    page.call("click", "#retry")
    page.wait(DONE.format(1))
    assert page.js(TEXTS.format("")) == completed
    page.call("click", ".keep")
    assert page.call("inputValue", "#prompt") == "Return the " + page.js(TEXTS.format(""))[0]


def test_a_narrow_screen_has_room_for_all(chromium: Browser, served: Served) -> None:
    _open(chromium, served, viewport={"width": 360, "height": 700})
    chromium.call("click", "#open-settings")
    chromium.call("check", "#compare")
    _set(chromium, "sampling-max_tokens", 40)
    chromium.call("click", "#open-settings")
    _ask(chromium, "Return the ", 2)
    assert chromium.js("document.documentElement.scrollWidth") <= 360
    first, second = chromium.js("[...document.querySelectorAll('.answer')].map(one => one.getBoundingClientRect().top)")
    assert second > first
    assert chromium.call("isVisible", "#send")
