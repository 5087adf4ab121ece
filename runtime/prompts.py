"""Makes the prompts or tokens that a caller gives into token ids of the model. Not here: encoding (``text``)."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.model.looped import LoopedModel
from mythos_edge.runtime.request_values import as_array, shown, token_ids
from mythos_edge.runtime.text import Tokenizer

Int64: TypeAlias = NDArray[np.int64]
Prompt: TypeAlias = str | Sequence[int] | NDArray[np.integer[Any]]
# Not Sequence[str], which a text is.
Prompts: TypeAlias = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[NDArray[np.integer[Any]]]


def separate(prompt: Any) -> tuple[list[Any], bool]:
    """The single prompts in what was given, and whether it was several. Raises UsageError for what is neither.

    A prompt is text, or token ids in a list or an array of one axis; several are a list of those, or an array of two
    axes.
    """
    if isinstance(prompt, str):
        return [prompt], False
    if hasattr(prompt, "__array__"):
        array = as_array("the prompt", prompt)
        if array.ndim != 2:
            return [array], False
        if not len(array):
            raise UsageError(f"the prompts are an array of shape {array.shape}, expected at least one row")
        return list(array), True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise UsageError(
            f"the prompt is of type {type(prompt).__name__}, expected text, a list of token ids, or a list of prompts"
        )
    nested = [isinstance(item, Sequence) or getattr(item, "ndim", 0) > 0 for item in prompt]
    if not any(nested):
        return [prompt], False
    if not all(nested):
        odd = prompt[nested.index(False)]
        raise UsageError(f"the prompts hold {shown(odd)}, expected each to be text or a list of token ids")
    return list(prompt), True


def ids_of(prompt: Any, model: LoopedModel, tokenizer: Tokenizer | None, first: bool) -> list[int]:
    """The token ids of one prompt; text that is the ``first`` of its sequence with what the tokenizer puts around it.

    Raises UsageError.
    """
    if not isinstance(prompt, str):
        ids = token_ids("the prompt", prompt)
        check_range(ids, model)
        return ids
    if tokenizer is None:
        raise UsageError("this bundle has no tokenizer: give token ids, or export with --tokenizer")
    ids = tokenizer.encode(prompt, first=first)
    unknown = next((number for number in ids if number >= model.vocab_size), None)
    if unknown is not None:
        raise UsageError(
            f"the prompt holds the token {tokenizer.token(unknown)!r} (id {unknown}), which this model does not "
            f"know: its ids are 0 .. {model.vocab_size - 1}; leave the token out"
        )
    return ids


def checked_ids(ids: Any, model: LoopedModel) -> Int64:
    """``ids`` as an int64 array (batch, positions). Raises UsageError when they are no tokens of the model."""
    given = as_array("ids", ids)
    if not given.size:
        raise UsageError(f"ids are empty, of shape {given.shape}: expected at least one token")
    if given.ndim != 2 or given.dtype.kind not in "iu":
        mend = ": ids[None] makes a batch of them" if given.ndim == 1 and given.dtype.kind in "iu" else ""
        raise UsageError(f"ids are {given.dtype} of shape {given.shape}, expected integers (batch, positions){mend}")
    if not hasattr(ids, "__array__"):
        # Numpy takes a bool among integers for one.
        for row in ids:
            token_ids("ids", row)
    check_range([int(given.min()), int(given.max())], model)
    return np.ascontiguousarray(given, np.int64)


def check_length(tokens: int, limit: int) -> None:
    """Raises UsageError for a prompt of no tokens, and CapacityError for one of more than ``limit``."""
    if not tokens:
        raise UsageError("the prompt is empty: give at least one token")
    if tokens > limit:
        raise CapacityError(
            f"the prompt has {tokens} tokens; this bundle was exported for {limit}: "
            f"export with --max-context {tokens} or shorten it"
        )


def check_range(ids: Sequence[int], model: LoopedModel, what: str = "token id") -> None:
    """Raises UsageError for an id that the model does not know."""
    wrong = next((number for number in ids if not 0 <= number < model.vocab_size), None)
    if wrong is not None:
        raise UsageError(f"{what} {shown(wrong)} is out of range: this model knows 0 .. {model.vocab_size - 1}")


def common_length(before: Sequence[int], now: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
