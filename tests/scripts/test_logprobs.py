"""``generate --logprobs``: as JSON, in a file of results, and for people."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran, refused

from mythos_edge.runtime.session import Session


def told(result: Any) -> list[list[dict[str, Any]]]:
    """The likeliest tokens of a generation as JSON has them."""
    return [[{"id": one.id, "text": one.text, "logprob": pytest.approx(one.logprob)} for one in top] for top in result]


def test_json_has_the_likeliest_beside_every_token(text_bundle: Path, run: Callable[..., Ran]) -> None:
    words = ("generate", text_bundle, "-p", "Return ", "--max-new-tokens", 5, "--temperature", 1.5, "--seed", 3)
    plain = run(*words, "--json").json
    with Session.open(text_bundle) as session:
        wanted = session.generate("Return ", max_new_tokens=5, temperature=1.5, seed=3, top_logprobs=3)
    for count in (0, 3):
        found = run(*words, "--logprobs", count, "--json").json
        assert (found["ids"], found["logprobs"]) == (plain["ids"], plain["logprobs"])
        assert found["token_texts"] == [chr(number) for number in plain["ids"]]
        assert found["top_logprobs"] == (told(wanted.top_logprobs) if count else [])
    assert not {"top_logprobs", "token_texts"} & set(plain)
    assert wanted.top_logprobs[0][0].text == chr(wanted.top_logprobs[0][0].id)


def test_the_table_for_people(text_bundle: Path, mla_bundle: Path, run: Callable[..., Ran]) -> None:
    words = ("generate", text_bundle, "-p", "Return ", "--max-new-tokens", 3)
    found = run(*words, "--logprobs", 2, "--json").json
    text, empty, header, *rows = run(*words, "--logprobs", 2).out.splitlines()
    assert (text, empty) == (found["text"], "")
    assert header.split() == ["id", "text", "logprob", "depth", "likeliest"]
    for at, row in enumerate(rows):
        first, second = found["top_logprobs"][at]
        quoted = [json.dumps(one["text"]) for one in (first, second)]
        assert row.lstrip().startswith(f"{found['ids'][at]}  {quoted[0]}")
        assert row.endswith(f"  {quoted[0]} {first['logprob']:.3f}  {quoted[1]} {second['logprob']:.3f}")
        assert f"{found['logprobs'][at]:.3f}  {found['depths'][at]:5}" in row
    assert len(rows) == 3
    # Ids are all that a bundle without a tokenizer can show.
    ids = run("generate", mla_bundle, "--ids", "1,2", "--max-new-tokens", 1, "--logprobs", 1)
    (number,) = ids.out.splitlines()[0].split(",")
    assert ids.out.splitlines()[-1].split()[0] == ids.out.splitlines()[-1].split()[-2] == number


def test_a_file_of_results_has_them(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts: list[dict[str, Any]] = [{"prompt": "Return "}, {"prompt": "The ", "logprobs": 1}]
    source.write_text("".join(json.dumps(one) + "\n" for one in prompts))
    words = ("generate", text_bundle, "--file", source, "-o", output, "--max-new-tokens", 4)
    for more, counts in (((), (None, 1)), (("--logprobs", 2), (2, 1)), (("--logprobs", 0), (0, 1))):
        output.unlink(missing_ok=True)
        assert run(*words, *more).code == 0
        for line, count in zip(output.read_text().splitlines(), counts, strict=True):
            result = json.loads(line)
            assert ("top_logprobs" in result) == ("token_texts" in result) == (count is not None)
            if count is not None:
                assert [len(top) for top in result["top_logprobs"]] == [count] * 4 * bool(count)
                assert "".join(result["token_texts"]) == result["text"]
    refused(run(*words), "was made with other options")


def test_counts_that_cannot_be(text_bundle: Path, run: Callable[..., Ran]) -> None:
    words = ("generate", text_bundle, "-p", "x", "--logprobs")
    refused(run(*words, -1), "top_logprobs is -1, expected 0 or more")
    refused(run(*words, 10_001), "top_logprobs is 10001, expected at most 10000")
