"""``generate --save-session`` and ``--session``: what was cut in two is as if it had not been."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import PROGRAM, Ran, refused

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.manifest import Preset
from mythos_edge.runtime.session import Session

SAMPLED = ("--temperature", 1.2, "--top-k", 50, "--seed", 5)


@pytest.mark.parametrize(
    "begun",
    [(), SAMPLED, ("--max-depth", 2, "--policy", "full", *SAMPLED), ("--min-depth", 2, "--threshold", 0.3, *SAMPLED)],
    ids=["plain", "sampled", "depth", "halting"],
)
def test_the_parts_are_the_uninterrupted_whole(
    begun: tuple[Any, ...], text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    words, file = ("generate", text_bundle, "--json"), tmp_path / "talk.npz"
    whole = run(*words, "-p", "Return ", *begun, "--max-new-tokens", 12).json
    parts = [run(*words, "-p", "Return ", *begun, "--max-new-tokens", 5, "--save-session", file).json]
    # Neither the prompt nor the options are said again; options that are the same change nothing.
    parts += [run(*words, "--session", file, "--max-new-tokens", 4, "--save-session", file).json]
    parts += [run(*words, "--session", file, "--max-new-tokens", 3, *begun).json]
    for key in ("ids", "depths"):
        assert [one for part in parts for one in part[key]] == whole[key]
    assert "".join(part["text"] for part in parts) == whole["text"]
    usual = run(*words, "-p", "Return ", "--max-new-tokens", 12).json
    assert not begun or [whole[key] for key in ("ids", "depths")] != [usual[key] for key in ("ids", "depths")]
    # Nothing of the past is computed again.
    assert parts[2]["block_calls"] <= 3 * 4


def test_a_prompt_is_appended(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    words, file = ("generate", text_bundle, "--json"), tmp_path / "talk.npz"
    run(*words, "-p", "Return ", "--max-new-tokens", 5, "--save-session", file)
    with Session.open(text_bundle) as session:
        session.generate("Return ", max_new_tokens=5)
        wanted = session.generate(" naïve", resume=True, max_new_tokens=6)
        (tmp_path / "more.txt").write_text(" naïve\n", encoding="utf-8")
        for more in (("-p", " naïve"), ("-f", tmp_path / "more.txt")):
            found = run(*words, "--session", file, *more, "--max-new-tokens", 6).json
            assert (found["ids"], found["text"]) == (wanted.ids, wanted.text)
    command = [*PROGRAM, *map(str, (*words, "--session", file, "--max-new-tokens", 6))]
    piped = subprocess.run([*command, "-p", "-"], input=" naïve\n".encode(), capture_output=True, check=True)
    assert Ran(0, piped.stdout.decode(), "").json["ids"] == wanted.ids
    # A pipe that nobody asked for is not read, so that one which never ends is not waited for.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.wait(60) == 0


def test_other_options_are_told_or_taken(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    words, file = ("generate", text_bundle), tmp_path / "talk.npz"
    run(*words, "-p", "Return ", "--max-new-tokens", 2, "--max-depth", 2, "--save-session", file)
    again = (*words, "--session", file, "--max-new-tokens", 2)
    refused(run(*again, "--max-depth", 3), "max_depth is 3, but the sequence was begun with 2")
    refused(run(*again, "--policy", "full"), "policy is full, but the sequence was begun with exact")
    hot = [run(*again, "--temperature", 5, "--seed", seed, "--json").json["ids"] for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_a_preset_must_be_the_sessions(text_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    bundle, file = tmp_path / "copy.bundle", tmp_path / "talk.npz"
    shutil.copytree(text_bundle, bundle)
    presets = {name: Preset("ort-cpu", depth, 0.9, 0.0, 1.0, 2.0, 1.5) for name, depth in (("fast", 2), ("slow", 3))}
    update_manifest(open_bundle(bundle), presets=presets)
    words = ("generate", bundle, "--max-new-tokens", 2)
    run(*words, "-p", "x", "--preset", "fast", "--save-session", file)
    assert run(*words, "--session", file, "--preset", "fast").code == 0
    assert run(*words, "--session", file).code == 0
    refused(run(*words, "--session", file, "--preset", "slow"), "max_depth is 3, but the sequence was begun with 2")


def test_files_of_something_else_are_one_line(
    text_bundle: Path, mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    words, file = ("generate", text_bundle, "--max-new-tokens", 2), tmp_path / "talk.npz"
    assert run("generate", mla_bundle, "--ids", "1,2", "--max-new-tokens", 2, "--save-session", file).code == 0
    kept = file.read_bytes()
    other = run(*words, "--session", file, "--save-session", file)
    refused(other, f"{file}: was saved with another bundle or target: open it with the one it was made with")
    assert file.read_bytes() == kept
    refused(run(*words, "--session", tmp_path / "absent"), "absent: cannot read the session: No such file")
    (tmp_path / "text").write_text("hello")
    refused(run(*words, "--session", tmp_path / "text"), "not a saved session, or damaged")
    refused(run(*words, "-p", "x", "--save-session", tmp_path / "absent" / "x"), "cannot write the session")
    refused(run(*words, "-p", "x", "--save-session", "/dev/stdout"), "/dev/stdout: is where the text goes")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    many = (*words, "--file", tmp_path / "prompts.jsonl", "-o", tmp_path / "out.jsonl")
    for option in ("--session", "--save-session"):
        refused(run(*many, option, file), f"{option} is about one prompt")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["prompts.jsonl", "talk.npz", "text"]
