"""A sequence on disk: tokens, caches, pending states and random state in one .npz, tied to its weights."""

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import UsageError
from mythos_edge.model.output_files import writing
from mythos_edge.runtime.halting import Policy, ResolvedDepth
from mythos_edge.runtime.sampling import Sampler, SamplingParams
from mythos_edge.runtime.staircase import Staircase

_FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What a file written by ``write`` holds."""

    ids: list[int]
    depth: ResolvedDepth
    sampling: SamplingParams
    sampler_state: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def write(path: Path, weights: str, ids: list[int], sampler: Sampler, staircase: Staircase) -> None:
    """Writes the file, which appears whole or not at all; ``weights`` is their identity. Raises UsageError."""
    header = {
        "format": _FORMAT,
        "weights": weights,
        "ids": ids,
        "depth": asdict(staircase.depth),
        "sampling": asdict(sampler.params),
        "sampler_state": sampler.state(),
    }
    content: dict[str, Any] = {"header": np.array(json.dumps(header)), **staircase.state()}
    with writing(path, "the session") as file:
        np.savez(file, **content)


def read(path: Path, weights: str) -> Saved:
    """Raises UsageError when the file is missing, damaged, or of other weights."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        depth = ResolvedDepth(**{**header["depth"], "policy": Policy(header["depth"]["policy"])})
        saved = Saved(
            ids=[int(number) for number in header["ids"]],
            depth=depth,
            sampling=SamplingParams(**header["sampling"]),
            sampler_state=header["sampler_state"],
            arrays=arrays,
        )
    except OSError as error:
        raise UsageError(f"{path}: can not read the session: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not a saved session, or damaged: save it again") from error
    if header.get("weights") != weights:
        raise UsageError(f"{path}: was saved with another bundle or target: open it with the one it was made with")
    return saved
