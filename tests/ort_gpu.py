"""What tests of ONNX Runtime's GPU providers share: names, prompts, and where engines are kept."""

from pathlib import Path

import numpy as np

from mythos_edge.runtime.session import Session

CUDA, TENSORRT = "ort-cuda-fp32", "ort-cuda-fp32-tensorrt"
PROMPT = [90, 90, 91, 15]


def engines_folder(tmp_path: Path) -> Path:
    return tmp_path / "user" / "mythos-edge" / "ort-tensorrt"


def kept_engines(tmp_path: Path) -> list[Path]:
    """The folders of engines, whole or not."""
    return list(engines_folder(tmp_path).iterdir()) if engines_folder(tmp_path).exists() else []


def random_prompt(session: Session, count: int) -> list[int]:
    return np.random.default_rng(3).integers(0, session.config.vocab_size, count).tolist()
