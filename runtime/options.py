"""The options of a request, declared once: a field's annotation is its rule.

The typed dictionaries say the same to editors and type checkers, for calls with keywords; a test holds them to the
fields.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.halting import LOOP_STEPS, Depth
from mythos_edge.runtime.request_values import Within, check_fields, token_ids
from mythos_edge.runtime.sampling import SamplingParams
from mythos_edge.runtime.speculation import AUTO, Draft

Whole: TypeAlias = int | np.integer[Any]
Real: TypeAlias = float | np.floating[Any] | np.integer[Any]
_COUNT = Within(least=1)
# More for every token is a distribution, which Session.score gives whole.
_ALTERNATIVES = Within(least=0, most=10_000)


@dataclass(frozen=True)
class Options(Depth, SamplingParams):
    """The options of a request. Raises UsageError for values of another type or out of range.

    Depth: see ``halting.Depth``. Sampling: see ``sampling.SamplingParams`` (temperature 0 is greedy).
    ``stop_ids``: tokens that end the text; by default the bundle's end tokens. ``stop_strings``: texts that end it; one
    that is a special token becomes a stop id beside those. ``special_tokens``: whether these are shown in the text, the
    one that ends it included. ``chunk``: prompt positions run at once. ``max_lag``: positions a loop step may fall
    behind before it is caught up in the background, one call a token; by default it catches up only when needed.
    ``top_logprobs``: how many of the likeliest tokens are given beside every generated one, with what the model alone
    makes of them: no temperature, penalty or filter; all where the model knows no more.
    ``draft_depth`` and ``draft_tokens``: self-speculation with that many tokens drafted at that many loop steps, see
    ``speculation``; ``"auto"`` chooses what is fastest, plain decoding included, which makes sampling depend on the
    machine's pace whatever the seed.
    """

    max_new_tokens: Annotated[int, _COUNT] = 128
    stop_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    special_tokens: bool = False
    chunk: Annotated[int, _COUNT] = 512
    max_lag: Annotated[int | None, _COUNT] = None
    top_logprobs: Annotated[int, _ALTERNATIVES] = 0
    draft_depth: Annotated[int | Literal["auto"] | None, LOOP_STEPS] = None
    draft_tokens: Annotated[int | Literal["auto"] | None, _COUNT] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.draft_tokens is not None and self.draft_depth is None:
            raise UsageError(f"draft_tokens is {self.draft_tokens} without draft_depth: give both, or neither")
        if self.draft_tokens is None and self.draft_depth is not None:
            object.__setattr__(self, "draft_tokens", AUTO)

    @property
    def depth(self) -> Depth:
        return Depth(**{item.name: getattr(self, item.name) for item in fields(Depth)})

    @property
    def draft(self) -> Draft | None:
        """The draft of every round, when it is given in numbers."""
        depth, tokens = self.draft_depth, self.draft_tokens
        return Draft(depth, tokens) if isinstance(depth, int) and isinstance(tokens, int) else None

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(**{item.name: getattr(self, item.name) for item in fields(SamplingParams)})


class DepthOptions(TypedDict, total=False):
    """The fields of ``halting.Depth`` as keywords."""

    policy: str
    max_depth: Whole | None
    min_depth: Whole
    threshold: Real | None


class ScoreOptions(DepthOptions, total=False):
    """The keywords of ``Session.score``: how deep, and how soon loop steps are caught up."""

    max_lag: Whole | None


class RequestOptions(ScoreOptions, total=False):
    """The fields of ``Options`` as keywords."""

    temperature: Real
    top_k: Whole
    top_p: Real
    min_p: Real
    repetition_penalty: Real
    seed: Whole | None
    max_new_tokens: Whole
    stop_ids: Sequence[int] | AbstractSet[int] | NDArray[np.integer[Any]] | None
    stop_strings: str | Sequence[str]
    special_tokens: bool
    chunk: Whole
    top_logprobs: Whole
    draft_depth: Whole | Literal["auto"] | None
    draft_tokens: Whole | Literal["auto"] | None


def options_of_each(
    prompts: int, options: RequestOptions, each: Sequence[RequestOptions] | None, seeds: Sequence[int] | None
) -> list[dict[str, object]]:
    """The options of every prompt: those of all, with its own of ``each`` and of ``seeds``.

    Raises UsageError unless there are as many of either as prompts.
    """
    own: list[dict[str, object]] = [{**options} for _ in range(prompts)]
    if each is not None:
        if len(each) != prompts:
            raise UsageError(f"each has options for {len(each)} prompts, there are {prompts}: give one for each")
        own = [{**one, **beside} for one, beside in zip(own, each, strict=True)]
    if seeds is not None:
        numbers = token_ids("seeds", seeds, of="seed")
        if len(numbers) != prompts or any(one.get("seed") is not None for one in own):
            raise UsageError(f"seeds are {len(numbers)} for {prompts} prompts: give one for each, and no seed beside")
        own = [{**one, "seed": seed} for one, seed in zip(own, numbers, strict=True)]
    return own
