"""The documents: generated pages are current, links lead somewhere, and the English is plain."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from mythos_edge.scripts.lab import write_reference

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_LONGEST_README = 130


@pytest.mark.parametrize("name", write_reference.PAGES)
def test_generated_pages_are_current(name: str) -> None:
    current = (write_reference.DOCS / name).read_text(encoding="utf-8")
    assert current == write_reference.PAGES[name](), "run python -m mythos_edge.scripts.lab.write_reference"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_one_spelling(page: Path) -> None:
    assert not re.search(r"\bcan not\b", page.read_text(encoding="utf-8"), re.IGNORECASE)


def test_the_readme_is_read_in_two_minutes() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= _LONGEST_README


def test_the_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Modules")[0]
    for name in re.findall(r"`((?:model|plugins|exporter|runtime|scripts|tests)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
