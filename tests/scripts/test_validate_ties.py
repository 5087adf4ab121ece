"""Which random sequence ``validate --against`` decides on when ties of the router leave some undecided."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.scripts import validate
from mythos_edge.scripts.console import Console

TIE = [{"row": 0, "position": 3, "step_index": 1, "margin": 5e-5}]


def _report(passed: bool, compared: float = 1.0, inconclusive: float = 0.0, tied: bool = True) -> dict[str, Any]:
    route = {"router_ties": TIE if tied else [], "compared": compared, "inconclusive": inconclusive}
    sound = {"router_ties": [], "compared": 1.0, "inconclusive": 0.0}
    return {"passed": passed, "routes": {"full": sound, "exact": route}}


FLIPPED = _report(False, inconclusive=0.5)
EXCUSED = _report(True, compared=0.5)
SOUND = _report(True, tied=False)
WRONG = _report(False, tied=False)
HALTED = _report(True, compared=0.5, tied=False)


@pytest.fixture
def bundle(mla_bundle: Any) -> Bundle:
    return open_bundle(mla_bundle)


@pytest.mark.parametrize(
    ("reports", "given", "used"),
    [
        ([SOUND], False, 0),
        ([WRONG], False, 0),
        ([HALTED], False, 0),
        ([FLIPPED, SOUND], False, 1),
        ([EXCUSED, WRONG], False, 1),
        ([EXCUSED, EXCUSED, FLIPPED, EXCUSED], False, 2),
        ([EXCUSED] * 4, False, 0),
        ([FLIPPED], True, 0),
        ([EXCUSED], True, 0),
    ],
)
def test_random_tokens_are_drawn_again_until_no_tie_counts(
    reports: list[dict[str, Any]], given: bool, used: int, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: Iterator[dict[str, Any]] = iter(reports)
    seen: list[NDArray[np.int64]] = []

    def compare_on(args: Namespace, checkpoint: Any, session: Any, ids: NDArray[np.int64], _: Any) -> dict[str, Any]:
        seen.append(ids)
        return next(left)

    monkeypatch.setattr(validate, "_compare_on", compare_on)
    args = Namespace(ids="ids.npy" if given else None, text=None, seed=7, positions=12)
    ids = validate._random_ids(args, bundle, 7)
    made = validate._compare(args, None, Namespace(bundle=bundle), ids, Console(as_json=False))  # type: ignore[arg-type]
    assert made is reports[used]
    assert len(seen) == len(reports)
    assert len({tokens.tobytes() for tokens in seen}) == len(reports), "every attempt is on other tokens"
