"""``generate`` with prompts from stdin, a file, or a file of JSON lines."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import PROGRAM, Ran, refused

from mythos_edge.model.file_locks import try_lock, unlock
from mythos_edge.runtime.session import Session

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "Return the ", "id": "first"},
    {"ids": [82, 101], "max_new_tokens": 3, "id": 2},
    {"prompt": "naïve — 合計", "temperature": 0.9, "seed": 5},
    {"prompt": "The class", "stop": ["e"], "id": None},
    {"prompt": "x", "temperature": 1.1, "seed": 6, "stop": "t", "max_new_tokens": 9},
]
# Of a run; and in other company a product may round its sums otherwise.
OF_A_RUN = ("ttft_ms", "decode_tokens_per_s", "batch_runs", "logprobs")


def written(path: Path, lines: list[dict[str, Any]] = PROMPTS) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_any_run(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in one.items() if key not in OF_A_RUN} for one in results]


def test_a_prompt_from_stdin_and_from_a_file_is_that_of_the_command_line(
    text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    prompt = "Return naïve\n合計"
    words = ("generate", text_bundle, "--max-new-tokens", 5, "--json")
    wanted = run(*words, "-p", prompt).json["ids"]
    command = [*PROGRAM, *map(str, words)]
    for more in ([], ["-p", "-"]):
        for end in ("", "\n", "\r\n"):
            piped = subprocess.run([*command, *more], input=(prompt + end).encode(), capture_output=True, check=True)
            assert json.loads(piped.stdout)["ids"] == wanted, (more, end)
    for end in ("", "\n", "\r\n"):
        (tmp_path / "prompt.txt").write_bytes((prompt + end).encode())
        assert run(*words, "-f", tmp_path / "prompt.txt").json["ids"] == wanted
    (tmp_path / "prompt.txt").write_bytes((prompt + "\n\n").encode())
    two = run(*words, "-f", tmp_path / "prompt.txt").json["ids"]
    assert two == run(*words, "-p", prompt + "\n").json["ids"]
    with (tmp_path / "prompt.txt").open() as file:
        redirected = subprocess.run(command, stdin=file, capture_output=True, check=True)
    assert json.loads(redirected.stdout)["ids"] == two
    nothing = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert nothing.returncode == 1
    assert "there is no prompt: give -p TEXT" in nothing.stderr
    # What is given counts, whatever stdin is.
    given = subprocess.run([*command, "--ids", "1"], input=b"other", capture_output=True, check=True)
    assert json.loads(given.stdout)["ids"] == run(*words, "--ids", "1").json["ids"]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_each_result_is_that_of_its_prompt_alone(
    batch: int, text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    source, output = written(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    ran = run(
        "generate", text_bundle, "--file", source, "-o", output, "--batch", batch, "--max-new-tokens", 7, "--json"
    )
    assert ran.code == 0, ran.err
    results = read(output)
    with Session.open(text_bundle) as session:
        for line, result in zip(PROMPTS, results, strict=True):
            own = {"stop_strings" if key == "stop" else key: value for key, value in line.items()}
            prompt = own.pop("ids", None) or own.pop("prompt")
            own.pop("id", None)
            alone = session.generate(prompt, **{"max_new_tokens": 7, **own})
            assert (result["ids"], result["text"]) == (alone.ids, alone.text)
            assert (result["depths"], result["finish_reason"]) == (alone.depths, alone.finish_reason)
            assert ("id" in result) == ("id" in line)
            assert result.get("id") == line.get("id")
    assert ran.json["new_tokens"] == sum(len(one["ids"]) for one in results)
    assert (ran.json["results"], ran.json["kept"]) == (5, 0)


def test_a_run_that_was_cut_short_is_gone_on_with(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    source, output = written(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    words = ("generate", text_bundle, "--file", source, "-o", output, "--max-new-tokens", 7, "--batch", 2)
    assert run(*words).code == 0
    whole = output.read_bytes()
    results = read(output)
    lines = whole.splitlines(keepends=True)
    marked = lines[0].replace(b'"finish_reason": "', b'"finish_reason": "kept, ')
    for left in (marked, marked + lines[1][:50], marked + lines[1][:-1], b"", whole):
        output.write_bytes(left)
        ran = run(*words, "--json")
        assert ran.code == 0, ran.err
        kept = left.count(b"\n")
        assert ran.json["kept"] == kept
        assert ("half written" in ran.err) == (not left.endswith(b"\n") and bool(left))
        assert output.read_bytes().startswith(b"".join(left.splitlines(keepends=True)[:kept]))
        found = read(output)
        for one in found:
            one["finish_reason"] = one["finish_reason"].removeprefix("kept, ")
        assert of_any_run(found) == of_any_run(results)
        for one, wanted in zip(found, results, strict=True):
            assert one["logprobs"] == pytest.approx(wanted["logprobs"], rel=1e-5)
    # More prompts are more to do.
    written(source, [*PROMPTS, {"ids": [7]}])
    assert run(*words, "--json").json["kept"] == 5
    assert len(read(output)) == 6


def test_a_killed_run_leaves_whole_lines(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    many = [{"prompt": f"Return {number} ", "id": number} for number in range(60)]
    source, output = written(tmp_path / "prompts.jsonl", many), tmp_path / "out.jsonl"
    words = ("generate", text_bundle, "--file", source, "-o", output, "--max-new-tokens", 40, "--batch", 2)
    with subprocess.Popen(
        [*PROGRAM, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    left = output.read_bytes()
    assert 0 < left.count(b"\n") < 60
    ran = run(*words, "--json")
    assert (ran.json["kept"], ran.json["results"]) == (left.count(b"\n"), 60)
    assert [one["id"] for one in read(output)] == list(range(60))


def test_results_of_something_else_are_refused(
    text_bundle: Path, mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    source, output = written(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    words = ("generate", text_bundle, "--file", source, "-o", output, "--max-new-tokens", 2)
    assert run(*words).code == 0
    whole = output.read_bytes()

    def unchanged(ran: Ran, *message: str) -> None:
        refused(ran, *message, "choose another output")
        assert output.read_bytes() == whole

    for changed in ({"prompt": "Return a "}, {"seed": 9}, {"id": "other"}):
        written(source, [{**PROMPTS[0], **changed}, *PROMPTS[1:]])
        unchanged(run(*words), "out.jsonl:1: is the result of another prompt than", "prompts.jsonl:1")
    written(source, PROMPTS[:3])
    unchanged(run(*words), "has 5 results, there are 3 prompts")
    written(source)
    for more in (("--temperature", 1, "--seed", 1), ("--max-depth", 2), ("--stop", "q")):
        unchanged(run(*words, *more), "out.jsonl:1: was made with other options or another bundle")
    written(source, [{"ids": [1]}])
    output.unlink()
    assert run(*words).code == 0
    whole = output.read_bytes()
    unchanged(run("generate", mla_bundle, *words[2:]), "out.jsonl:1: was made with other options or another bundle")
    for other in (b"{}\n", b"[1]\n", b"hello\n", source.read_bytes()):
        output.write_bytes(other)
        refused(run(*words), "out.jsonl:1: is no result of mythos-edge generate")
        assert output.read_bytes() == other
    output.write_bytes(whole)
    held = try_lock(output)
    assert held is not None
    unchanged_text = output.read_bytes()
    refused(run(*words), "another process writes it")
    unlock(held)
    assert output.read_bytes() == unchanged_text


MALFORMED = {
    b"": ":2: is no JSON (Expecting value, character 1), expected {",
    b"[1": ":2: is no JSON (",
    b'{"prompt": "\xff"}': ":2: is no JSON (",
    b"[1]": ":2: is [1], expected {",
    b"{}": ":2: has no prompt",
    b'{"prompt": "a", "ids": [1]}': ":2: has both a prompt and ids",
    b'{"prompt": "a", "prompt": "b"}': ":2: is no JSON (the key 'prompt' stands there twice)",
    b'{"prompt": "a", "top": 1}': ":2: has the key 'top', expected some of prompt, ids, max_new_tokens",
    b'{"prompt": 5}': ":2: prompt is 5, expected a text",
    b'{"ids": "1,2"}': ":2: ids are '1,2', expected a list of token ids",
    b'{"ids": [1, true]}': ":2: a token id of the prompt is True",
    b'{"ids": [99999]}': ":2: token id 99999 is out of range",
    b'{"ids": []}': ":2: the prompt is empty",
    b'{"prompt": ""}': ":2: the prompt is empty",
    b'{"prompt": "a", "max_new_tokens": 0}': ":2: max_new_tokens is 0, expected at least 1",
    b'{"prompt": "a", "temperature": "hot"}': ":2: temperature is 'hot', expected a number",
    b'{"prompt": "a", "temperature": NaN}': ":2: temperature is nan, expected a finite number",
    b'{"prompt": "a", "seed": 1.5}': ":2: seed is 1.5, expected a whole number",
    b'{"prompt": "a", "stop": 3}': ":2: stop_strings is 3, expected text",
    b'{"prompt": "a", "id": [1]}': ":2: id is [1], expected a text or a number",
    b'{"prompt": "a\\ud800"}': ":2: the tokenizer cannot encode the prompt",
}


def test_a_malformed_line_is_one_error_before_anything_runs(
    text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    monkeypatch.setattr(Session, "generate", lambda *_, **__: pytest.fail("generated"))
    for line, message in MALFORMED.items():
        source.write_bytes(b'{"prompt": "good"}\n' + line + b'\n{"prompt": "good"}\n')
        refused(run("generate", text_bundle, "--file", source, "-o", output), f"{source}{message}")
        assert not output.exists()
    source.write_bytes(b"")
    refused(run("generate", text_bundle, "--file", source, "-o", output), "is empty, expected a JSON object a line")
    refused(
        run("generate", text_bundle, "--file", tmp_path / "absent", "-o", output), "cannot read the prompts: No such"
    )
    assert not output.exists()


def test_options_that_do_not_go_together(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    source, output = written(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    words = ("generate", text_bundle, "--file", source)
    refused(run(*words), "there is no place for them: add -o JSONL")
    refused(run(*words, "-o", output, "--show-depth"), "--show-depth is about the text of one prompt")
    refused(run(*words, "-o", output, "--batch", 0), "--batch is 0, expected at least 1")
    refused(run("generate", text_bundle, "-p", "x", "-o", output), "--output is about a file of prompts")
    refused(run("generate", text_bundle, "-p", "x", "--batch", 2), "--batch is about a file of prompts")
    refused(run(*words, "-o", tmp_path), "cannot write the results")
    refused(run(*words, "-o", tmp_path / "absent" / "out"), "cannot write the results: No such file")
    os.mkfifo(tmp_path / "pipe")
    refused(run(*words, "-o", tmp_path / "pipe"), "cannot write the results: is a pipe")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pipe", "prompts.jsonl"]
