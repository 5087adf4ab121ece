"""How the weights of engines are rounded and packed."""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mythos_edge.exporter.lowering.tensorrt_weights import packed, round_symmetrically


def test_symmetric_rounding(random: np.random.Generator) -> None:
    rows = random.standard_normal((6, 64)).astype(np.float32)
    rows[0] = 0
    rows[1] = 1e-9
    for codes, worst in ((ir.DataType.INT8, 0.01), (ir.DataType.INT4, 0.12), (ir.DataType.FLOAT8E4M3FN, 0.05)):
        for scale in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT):
            made, scales = round_symmetrically(rows, codes, scale)
            assert scales.dtype == scale.numpy()
            assert (scales.astype(np.float32) > 0).all()
            back = made.astype(np.float32) * scales.astype(np.float32)[:, None]
            assert not back[0].any()
            assert np.linalg.norm(back - rows) < worst * np.linalg.norm(rows)
            assert np.abs(made.astype(np.float32)).max() <= {"INT8": 127, "INT4": 8}.get(codes.name, 448)


def test_int4_of_a_search_is_no_worse_than_to_nearest(random: np.random.Generator) -> None:
    rows = random.standard_normal((50, 64)).astype(np.float32)
    codes, scales = round_symmetrically(rows, ir.DataType.INT4, ir.DataType.FLOAT)
    plain = np.abs(rows).max(axis=1, keepdims=True) / 7
    error = np.square(codes * scales[:, None] - rows).sum(axis=1)
    nearest = np.square(np.rint(rows / plain) * plain - rows).sum(axis=1)
    assert (error <= nearest * 1.0001).all()
    assert error.sum() < 0.9 * nearest.sum()


def test_int4_is_packed_as_onnx_packs_it() -> None:
    codes = np.array([[-8, 7, 0, -1], [1, 2, 3, -4]], np.int8)
    tensor = ir.tensor(codes.astype(ml_dtypes.int4))
    assert packed(codes, ir.DataType.INT4) == tensor.tobytes()
