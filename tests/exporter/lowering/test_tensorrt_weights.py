"""How the weights of engines are packed."""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mythos_edge.exporter.lowering.tensorrt_weights import packed


def test_int4_is_packed_as_onnx_packs_it() -> None:
    codes = np.array([[-8, 7, 0, -1], [1, 2, 3, -4]], np.int8)
    tensor = ir.tensor(codes.astype(ml_dtypes.int4))
    assert packed(codes, ir.DataType.INT4).tobytes() == tensor.tobytes()
