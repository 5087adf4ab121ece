"""HTML pages of verbs, read as a browser would, and held to what each of them must be."""

import re
from html.parser import HTMLParser

_EMPTY = {"meta", "img", "br"}


class Page(HTMLParser):
    """The text of a page, the cells of its tables, and the figures beside its bars.

    A page whose elements do not nest, that needs another file or host, or that has no dark colours is a failure.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self._texts: list[str] = []
        self.bars: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, "an element is not closed"
        assert "prefers-color-scheme: dark" in text
        assert "default-src 'none'" in text
        assert "<script" not in text
        assert not re.search(r"url\(|@import|https?:", text)

    @property
    def text(self) -> str:
        return " ".join(self._texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert (given.get("src") or "data:").startswith("data:")
        assert "href" not in given
        if tag == "img":
            assert given["alt"]
        if tag not in _EMPTY:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif inside == "span" and re.fullmatch(r"[\d.e+-]+", data):
            self.bars.append(data)
        elif inside not in ("style", "") and data.strip():
            self._texts.append(data)
