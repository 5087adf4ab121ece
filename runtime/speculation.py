"""Self-speculation: the model drafts tokens with few loop steps, then takes the drafted positions to the end at once.

A draft's cache rows are final values, so nothing of it is computed again: with every token accepted, k tokens drafted
at d of D loop steps take k * d + (D - d) runs of the recurrent block instead of k * D. Drawn tokens have exactly the
distribution of plain decoding; greedy ones are the same tokens.

Source: Leviathan et al., ICML 2023, "Fast inference from transformers via speculative decoding", Algorithm 1. Differs:
draft and target are one model, so no token is drawn beyond the drafted ones: it would have no cache rows yet.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.halting import Policy, ResolvedDepth
from mythos_edge.runtime.sampling import Likely, Sampler, likeliest
from mythos_edge.runtime.staircase import Fed, Staircase
from mythos_edge.runtime.together import Work

AUTO = "auto"


class Draft(NamedTuple):
    """How to draft: ``tokens`` positions, each with ``depth`` loop steps."""

    depth: int
    tokens: int


class Drawn(NamedTuple):
    """A token, its natural-log probability, the depth of the position that predicted it, and the likeliest there."""

    id: int
    logprob: float
    depth: int
    top: tuple[Likely, ...] = ()


class Round(NamedTuple):
    """The result of one round: ``drawn`` tokens, and how many of the ``drafted`` were ``accepted``."""

    drawn: list[Drawn]
    drafted: int
    accepted: int


def speculating(
    staircase: Staircase, sampler: Sampler, ids: Sequence[int], draft: Draft, top_logprobs: int = 0
) -> Work[Round]:
    """The work of one round after ``ids``: at least one and at most ``draft.tokens`` tokens, with as many likeliest.

    A position that has halted within the draft's depth needs no verification: its token is drawn as in plain decoding,
    and a draft begins with the first that has not.
    """
    start, history = staircase.columns, list(ids)
    drafted = []
    try:
        for _ in range(draft.tokens):
            fed = yield from staircase.drafting(history[-1], draft.depth)
            if not staircase.drafted:
                return Round([drawn_from(fed, sampler, history, top_logprobs)], 0, 0)
            drafted.append(sampler.draft(fed.logits[0, 0], history))
            history.append(drafted[-1].token)
        fed = yield from staircase.verifying()
    except BaseException:
        staircase.rollback(start)
        raise
    drawn: list[Drawn] = []
    del history[len(ids) :]
    for row, guess in enumerate(drafted):
        token, logprob = sampler.verify(guess, fed.logits[0, row], history)
        drawn.append(Drawn(token, logprob, int(fed.depth[0, row]), likeliest(fed.logits[0, row], top_logprobs)))
        history.append(token)
        if token != guess.token:
            break
    accepted = sum(one.id == guess.token for one, guess in zip(drawn, drafted, strict=False))
    yield from staircase.keeping(start, start + len(drawn))
    return Round(drawn, len(drafted), accepted)


def drawn_from(fed: Fed, sampler: Sampler, history: Sequence[int], top_logprobs: int) -> Drawn:
    """The token that the only row of logits gives after ``history``, and the depth of the last column."""
    logits = fed.logits[0, 0]
    token, logprob = sampler.sample(logits, history)
    return Drawn(token, logprob, int(fed.depth[0, -1]), likeliest(logits, top_logprobs))


def check_draft(depth: int | str | None, bounds: ResolvedDepth) -> None:
    """Raises UsageError when a draft at ``depth`` loop steps (None for no draft) is not possible within ``bounds``."""
    if depth is None:
        return
    if bounds.policy is Policy.LAST:
        raise UsageError("policy is last, which keeps no exact cache rows to verify a draft with: use exact or full")
    if isinstance(depth, int) and not bounds.min_depth <= depth < bounds.max_depth:
        raise UsageError(
            f"draft_depth is {depth}, expected {bounds.min_depth} .. {bounds.max_depth - 1}: "
            "at least min_depth and less than max_depth"
        )
