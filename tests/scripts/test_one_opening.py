"""A verb runs the bundle that it looked at, or says that another stands there now."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Ran, refused

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.scripts import demo, score


@pytest.mark.parametrize("verb", [demo, score])
def test_a_bundle_that_is_replaced_after_it_was_looked_at_is_refused(
    demo_bundle: Path,
    mla_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Ran],
    verb: Any,
) -> None:
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "some.bundle"))
    ids, output = tmp_path / "ids.npy", tmp_path / "scores.npz"
    np.save(ids, np.array([[1, 2, 3]]))

    def overtaken(*given: Any, **options: Any) -> Bundle:
        opened = open_bundle(*given, **options)
        shutil.rmtree(bundle)
        shutil.copytree(mla_bundle, bundle)
        return opened

    monkeypatch.setattr(verb, "open_bundle", overtaken)
    argv = {
        demo: ("demo", "add", 7, 8, "--bundle", bundle),
        score: ("score", bundle, "--ids", ids, "-o", output, "--target", "ort-cpu"),
    }[verb]
    refused(run(*argv), "the bundle was replaced while it was open: open it again")
    assert not output.exists()
