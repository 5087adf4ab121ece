"""Reading a Hugging Face ``tokenizer.json``, which export and runtime both do. The library loads at first use."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from mythos_edge.model.bounded_files import read_bounded
from mythos_edge.model.errors import one_line, unavailable
from mythos_edge.model.foreign_files import foreign_kind

# Several times the largest there are; the library unpacks one to many times its size.
_MOST_BYTES = 256_000_000
# Characters that take long to encode: other threads run meanwhile where the library gets a batch, and there alone.
_LONG = 20_000


def read_tokenizer(path: Path) -> tuple[Any, bytes, list[str]]:
    """The library's tokenizer, the file's bytes, and what the file would do to prompts of its own, which is off now.

    Raises ValueError that says why the file is no tokenizer, OSError, and BackendUnavailable without the library.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise unavailable(error, "text", "pip install tokenizers") from error
    data = read_bounded(path, _MOST_BYTES, "a tokenizer")
    if known := foreign_kind(data[:512]):
        raise ValueError(f"it is {known}")
    text = data.decode("utf-8-sig")  # a byte order mark is no error
    with _library_errors():
        library = Tokenizer.from_str(text)
        return library, data, _switched_off(library)


@contextmanager
def _library_errors() -> Iterator[None]:
    """Raises whatever the library raises as a ValueError: plain Exception, or a panic of its Rust code.

    Source: pyo3's PanicException derives from BaseException and lies in no module, so that only its name tells it.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(one_line(error)) from error


def _switched_off(library: Any) -> list[str]:
    """Ends what a tokenizer does to prompts beside encoding them, and says what that was."""
    found = []
    if library.truncation is not None:
        found.append(f"cuts prompts to {library.truncation['max_length']} tokens")
        library.no_truncation()
    if library.padding is not None:
        length = library.padding["length"]
        found.append(f"pads them to {length}" if length else "pads them")
        library.no_padding()
    if getattr(library.model, "dropout", None) is not None:
        found.append("leaves out merges at random")
        library.model.dropout = None
    return found


def encoding(library: Any, text: str, *, around: bool) -> Any:
    """The library's encoding of ``text``, with what is put ``around`` a prompt or without.

    Raises ValueError that says why the tokenizer cannot encode it.
    """
    try:
        with _library_errors():
            if len(text) > _LONG:
                return library.encode_batch([text], add_special_tokens=around)[0]
            return library.encode(text, add_special_tokens=around)
    except ValueError as error:
        if isinstance(error.__cause__, TypeError):  # lone surrogates, which stand for bytes of a command line
            raise ValueError("it holds bytes that are no UTF-8") from error
        raise


def decoding(library: Any, ids: Sequence[int], *, special_tokens: bool) -> str:
    """The text of ``ids``, with special tokens or without. Raises ValueError that says why they cannot be decoded."""
    with _library_errors():
        return str(library.decode(list(ids), skip_special_tokens=not special_tokens))


def tokens_around_prompt(library: Any) -> tuple[list[str], list[str]]:
    """The tokens that the tokenizer puts before and after the text of every prompt."""
    made = None
    # Some know few letters, and then one of their own tokens is text to them.
    sources = (lambda: ("a", "0"), lambda: library.get_vocab(with_added_tokens=False))
    for text in chain.from_iterable(source() for source in sources):
        with suppress(ValueError):
            made = encoding(library, text, around=True)
            if own := [place for place, added in enumerate(made.special_tokens_mask) if not added]:
                return list(made.tokens[: own[0]]), list(made.tokens[own[-1] + 1 :])
    return [] if made is None else list(made.tokens), []
