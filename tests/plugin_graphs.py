"""Graphs of one plugin node each, as the lowering writes them for TensorRT, and how to build them.

Run as a script, in a process of its own, it builds every graph named on the command line and prints what
became of it as JSON.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fakes.kernels import fake_kernel

from mythos_edge.plugins import carried_kernels, trt_bindings, trt_plugins
from mythos_edge.plugins.ops import DOMAIN, OPS, OPSET, VERSION

MAX_ROWS, MAX_CONTEXT = 48, 256
HEADS, WIDTH, VALUE_DIM = 4, 80, 64
EXPERTS, TOP_K, DIM, UNITS, BLOCK = 8, 2, 64, 96, 32
ATTRIBUTES: dict[str, dict[str, int | float]] = {
    "LatentAttention": {"scale": 0.125, "value_dim": VALUE_DIM},
    "SparseMoE": {"top_k": TOP_K},
    "QuantizedSparseMoE": {"top_k": TOP_K},
}
# -1 is the number of rows, -2 the context.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "LatentAttention": {
        "q": (1, -1, HEADS, WIDTH),
        "rows": (1, -1, WIDTH),
        "past": (1, -2, WIDTH),
        "length": (),
        "first": (1,),
    },
    "SparseMoE": {
        "x": (-1, DIM),
        "router": (EXPERTS, DIM),
        "router_bias": (EXPERTS,),
        "fc1": (EXPERTS, 2 * UNITS, DIM),
        "fc2": (EXPERTS, DIM, UNITS),
    },
    "QuantizedSparseMoE": {
        "x": (-1, DIM),
        "router": (EXPERTS, DIM),
        "router_bias": (EXPERTS,),
        "fc1_codes": (EXPERTS, 2 * UNITS, DIM),
        "fc1_scale": (EXPERTS, 2 * UNITS, DIM // BLOCK),
        "fc2_codes": (EXPERTS, DIM, UNITS),
        "fc2_scale": (EXPERTS, DIM, UNITS // BLOCK),
    },
}
CASES = [
    *((op, dtype, "") for op in ("LatentAttention", "SparseMoE") for dtype in ("fp16", "bf16", "fp32")),
    *(("QuantizedSparseMoE", dtype, codes) for dtype in ("fp16", "bf16", "fp32") for codes in ("int8", "int4", "fp8")),
]


def sized(op: str, rows: int, context: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the op's inputs for so many rows and columns."""
    sizes = {-1: rows, -2: context}
    return {name: tuple(sizes.get(size, size) for size in shape) for name, shape in SHAPES[op].items()}


def dtypes(op: str, dtype: str, codes: str) -> dict[str, str]:
    """The dtypes of the op's inputs, as launches name them."""
    spec = OPS[op]
    kinds = {"": dtype, "codes": codes}
    own = {name: spec.types.get(name, "") for name in spec.inputs}
    return {name: kinds.get(kind, kind) for name, kind in own.items()}


def graph(op: str, dtype: str, codes: str, attributes: dict[str, int | float] | None = None) -> bytes:
    """One node between two that TensorRT knows; inputs of fixed shape but ``length`` and ``first`` are constants."""
    import onnx
    from onnx import TensorProto as T
    from onnx import helper

    kinds = {
        "fp16": T.FLOAT16,
        "bf16": T.BFLOAT16,
        "fp32": T.FLOAT,
        "int64": T.INT64,
        "int8": T.INT8,
        "int4": T.INT4,
        "fp8": T.FLOAT8E4M3FN,
    }
    inputs, constants = [], []
    for name, kind in dtypes(op, dtype, codes).items():
        shape = SHAPES[op][name]
        if -1 in shape or -2 in shape or kind == "int64":
            named = [{-1: "rows", -2: "context"}.get(size, size) for size in shape]
            inputs.append(helper.make_tensor_value_info(name, kinds[kind], named))
        else:
            constants.append(helper.make_tensor(name, kinds[kind], shape, np.ones(shape).ravel()))
    spec = OPS[op]
    given = ATTRIBUTES[op] if attributes is None else attributes
    node = helper.make_node(
        op, spec.inputs, [spec.output], "the_node", domain=DOMAIN, plugin_namespace=trt_plugins.NAMESPACE, **given
    )
    after = helper.make_node("Relu", [spec.output], ["after"])
    output = helper.make_tensor_value_info(
        "after", kinds[dtype], ["rows", *["other"] * (len(inputs[0].type.tensor_type.shape.dim) - 1)]
    )
    body = helper.make_graph([node, after], op, inputs, [output], constants)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model: onnx.ModelProto = helper.make_model(body, opset_imports=imports, ir_version=10)
    return model.SerializeToString()


def build(trt: Any, model: bytes, op: str, compute_capabilities: Sequence[int]) -> dict[str, Any]:
    """What became of one graph: plugins in the network, the plan (bytes or None), errors."""
    logger = trt_bindings.logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(trt_bindings.strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        return {"plugins": 0, "plan": None, "parser": [str(parser.get_error(i)) for i in range(parser.num_errors)]}
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(compute_capabilities)
    for index, number in enumerate(compute_capabilities):
        config.set_compute_capability(trt_bindings.compute_capability_member(trt, number), index)
    for rows in (1, MAX_ROWS):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            shapes = (sized(op, 1, 1), sized(op, rows, 64), sized(op, rows, MAX_CONTEXT + MAX_ROWS))
            profile.set_shape(name, *(shape[name] for shape in shapes))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return {"plugins": kinds.count(trt.LayerType.PLUGIN_V3), "plan": None if plan is None else bytes(plan)}


def main(folder: Path, wanted: Sequence[dict[str, Any]]) -> None:
    carried_kernels.kernel_store.kernel = fake_kernel
    trt = trt_bindings.load("rtx")
    trt_plugins.register(trt)
    trt_plugins.register(trt)
    results = []
    for number, case in enumerate(wanted):
        before = len(trt_bindings.messages(trt).errors())
        result: dict[str, Any] = {}
        try:
            with trt_plugins.carrying(case["compute_capabilities"], MAX_ROWS):
                model = graph(case["op"], case["dtype"], case["codes"], case.get("attributes"))
                result = build(trt, model, case["op"], case["compute_capabilities"])
        except Exception as error:
            result["raised"] = f"{type(error).__name__}: {error}"
        plan = result.pop("plan", None)
        if plan is not None:
            (folder / f"{number}.plan").write_bytes(plan)
        results.append({**result, "has_plan": plan is not None, "errors": trt_bindings.messages(trt).errors()[before:]})
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
