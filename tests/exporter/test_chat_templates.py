"""The chat template of a tokenizer's folder, in each of the forms that it is kept in."""

import json
from pathlib import Path
from typing import Any

import pytest

from mythos_edge.exporter.chat_templates import ChatText, chat_text_of
from mythos_edge.model.errors import ConfigError


def _found(folder: Path, config: dict[str, Any]) -> tuple[ChatText | None, list[str]]:
    notes: list[str] = []
    return chat_text_of(folder / "tokenizer.json", config, notes.append), notes


def test_the_file_stands_above_the_config(tmp_path: Path) -> None:
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    assert _found(tmp_path, tokens) == (None, [])
    config = {**tokens, "chat_template": "of the config"}
    assert _found(tmp_path, config) == (ChatText("of the config", "<s>", "</s>"), [])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfof the file\r\n")
    assert _found(tmp_path, config) == (ChatText("of the file\r\n", "<s>", "</s>"), [])
    assert _found(tmp_path, {"bos_token": None}) == (ChatText("of the file\r\n", "", ""), [])


def test_of_several_the_default_is_taken(tmp_path: Path) -> None:
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    found, notes = _found(tmp_path, {"chat_template": several})
    assert found == ChatText("a", "", "")
    assert "'default' is taken along, not tool_use" in notes[0]


@pytest.mark.parametrize(
    "value", [7, [], [1], [{"name": "rag", "template": "b"}], {"default": "a"}, [{"name": "default"}]]
)
def test_what_is_no_template_is_one_line(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: chat_template is of type") as caught:
        _found(tmp_path, {"chat_template": value})
    assert "\n" not in str(caught.value)


def test_a_template_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        _found(tmp_path, {})
    file.write_bytes(b" " * 1_000_001)
    with pytest.raises(ConfigError, match="a chat template has at most 1 MB"):
        _found(tmp_path, {})
    with pytest.raises(ConfigError, match="is of type int, expected a text"):
        _found(tmp_path / "other", {"chat_template": [{"name": "default", "template": 7}]})


def test_it_travels_with_the_bundle(text_model: tuple[Path, Path], run: Any, tmp_path: Path) -> None:
    checkpoint, tokenizer = text_model
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ bos_token }}ä\r\n", "bos_token": "<b>"})
    )
    assert run("export", checkpoint, "-o", tmp_path / "b", "--tokenizer", folder).code == 0
    for bundle in (tmp_path / "b", tmp_path / "small"):
        manifest = run("inspect", bundle, "--json").json["manifest"] if bundle.exists() else None
        if manifest is None:
            assert run("pack", tmp_path / "b", "--target", "ort-cpu", "-o", bundle).code == 0
            manifest = run("inspect", bundle, "--json").json["manifest"]
        assert manifest["chat_template"] == {"file": "chat_template.jinja", "bos_token": "<b>", "eos_token": ""}
        assert (bundle / "chat_template.jinja").read_bytes() == "{{ bos_token }}ä\r\n".encode()
    assert "chat       template" in run("inspect", tmp_path / "small").out
