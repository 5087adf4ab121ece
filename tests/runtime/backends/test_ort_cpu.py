"""How the CPU backend loads its graphs."""

from pathlib import Path
from typing import Any

import pytest

from mythos_edge.runtime.backends import ort_cpu
from mythos_edge.runtime.session import Session


def test_weights_are_packed_for_graphs_of_several_sequences_alone(
    mla_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: dict[str, bool] = {}
    load = ort_cpu.ort_session

    def noting(path: Path, threads: int, prepack: bool, *rest: Any) -> Any:
        packed[path.name.split(".")[0] + (".many" if "many" in path.name else "")] = prepack
        return load(path, threads, prepack, *rest)

    monkeypatch.setattr(ort_cpu, "ort_session", noting)
    with Session.open(mla_bundle) as session:
        assert packed == dict.fromkeys(("prelude", "step", "coda"), False)
        alone = [session.generate([prompt], max_new_tokens=4, stop_ids=())[0].ids for prompt in ([1, 2, 3], [4, 5])]
        together = session.generate([[1, 2, 3], [4, 5]], max_new_tokens=4, stop_ids=())
    assert [one.ids for one in together] == alone
    several = {name: prepack for name, prepack in packed.items() if name.endswith(".many")}
    assert several == dict.fromkeys(("prelude.many", "step.many", "coda.many"), True)
