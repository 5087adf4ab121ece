"""The models that tests lower for TensorRT, and for how many positions."""

from collections.abc import Callable

from conftest import FIXTURES, GOLDENS, ROOT

from mythos_edge.exporter.lowering.tensorrt import LoweredForTensorRT

Lower = Callable[..., LoweredForTensorRT]
CHECKPOINTS = {name: FIXTURES / name for name in (*GOLDENS, "dory-small")}
CHECKPOINTS["demo"] = ROOT / "scripts" / "assets" / "carry_adder.pt"
CONTEXT, ROWS = 64, 8
