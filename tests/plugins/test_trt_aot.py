"""The ahead-of-time plugins: a chain of pieces launches what the op's program does, and its PTX assembles."""

import re
import subprocess
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from plugin_graphs import ATTRIBUTES, CASES, DIM, HEADS, VALUE_DIM, dtypes, sized

from mythos_edge.model.errors import BackendUnavailable, BuildError
from mythos_edge.plugins import kernel_store, launches, ptx_parameters, trt_aot
from mythos_edge.plugins.kernels.variants import VARIANTS
from mythos_edge.plugins.launches import Float, Integer
from mythos_edge.plugins.op_pieces import CHAINS, PIECES
from mythos_edge.plugins.ops import OPS
from mythos_edge.plugins.trt_aot import PLUGINS, launch_of, ptx_of

BY_NAME = {plugin.spec.name: plugin for plugin in PLUGINS}


def _never_divided(first: Any, second: Any) -> Any:
    raise AssertionError("numbers are divided as numbers")


@pytest.mark.parametrize(("op", "dtype", "codes"), CASES)
@pytest.mark.parametrize(("rows", "context"), [(1, 1), (1, 300), (5, 64), (8, 200)])
def test_a_chain_is_the_program_of_its_op(op: str, dtype: str, codes: str, rows: int, context: int) -> None:
    shapes: dict[str, Any] = dict(sized(op, rows, context))
    kinds, attributes = dtypes(op, dtype, codes), dict(ATTRIBUTES[op])
    program = launches.program(op, shapes, kinds, attributes)
    if op == "LatentAttention":
        # The number of splits is the program's choice; it says it in its last integer.
        attributes["splits"] = _numbers(program.launches[0])[-1]
    chain = CHAINS[op][: len(program.launches)]
    for spec, launch in zip(chain, program.launches, strict=True):
        plugin = BY_NAME[spec.name]
        given = {name: shapes[name] for name in spec.inputs}
        own = {name: attributes[name] for name in spec.attributes}
        made = launch_of(plugin, launch.kernel, given, own, _never_divided)
        assert made.grid == launch.grid
        assert list(made.scalars.values()) == _numbers(launch)
        sizes = plugin.sizes(given, own)
        for output, shape in zip(spec.outputs, plugin.shapes(sizes), strict=True):
            shapes[output], kinds[output] = shape, spec.types.get(output, dtype)
    wanted = (1, rows, HEADS, VALUE_DIM) if op == "LatentAttention" else (rows, DIM)
    assert shapes[OPS[op].output] == wanted


def _numbers(launch: launches.Launch) -> list[int | float]:
    return [argument.value for argument in launch.arguments if isinstance(argument, Integer | Float)]


def _kernels_of_pieces() -> list[tuple[str, str]]:
    patterns = {
        "LatentAttentionPart": r"latent_attention_",
        "MergeSplits": r"merge_splits_",
        "RouterLogits": r"router_logits_",
        "RouterTopK": r"router_top_k_",
        "ExpertsGateUp": r"decode_gate_up_(fp16|bf16|fp32)(_any)?$",
        "ExpertsDown": r"decode_down_(fp16|bf16|fp32)(_any)?$",
        "ExpertsGateUpCodes": r"decode_gate_up_\w+_(int8|int4|fp8)$",
        "ExpertsDownCodes": r"decode_down_\w+_(int8|int4|fp8)$",
    }
    return [(piece, kernel) for piece, pattern in patterns.items() for kernel in VARIANTS if re.match(pattern, kernel)]


def test_parameters_are_inputs_then_integers_then_outputs() -> None:
    pairs = _kernels_of_pieces()
    assert {piece for piece, _ in pairs} == set(BY_NAME)
    for name, kernel in pairs:
        spec, arguments = PIECES[name], VARIANTS[kernel].arguments
        text = ptx_of(spec, kernel, 89)
        entry = kernel_store.kernel(kernel, 89).entry
        (declared,) = re.findall(rf"\.entry {entry}\(\n(.*?)\n\)", text, re.DOTALL)
        found = re.findall(r"\.param \.(\w+) .*?(\w+)(?=,|$)", declared, re.MULTILINE)
        taken = [kernel_name for _, kernel_name in found]
        numbers = [int(place.rsplit("_", 1)[1]) if "_param_" in place else None for place in taken]
        names = [None if number is None else arguments[number][0] for number in numbers]
        scalars = [argument for argument, kind in arguments if not kind.startswith("*")]
        first, last = len(spec.inputs), len(spec.inputs) + len(scalars)
        assert [given or wanted for given, wanted in zip(names[:first], spec.inputs, strict=True)] == list(spec.inputs)
        assert names[first:last] == scalars
        assert names[last:] == list(spec.outputs)
        assert [kind for kind, _ in found[:first]] == ["u64"] * first
        assert {kind for kind, _ in found[first:last]} <= {"u32", "f32"}
        # Nothing the kernel takes is left out but Triton's scratch memory.
        assert {name for name in names if name} == {argument for argument, _ in arguments}


def test_the_rearranged_ptx_assembles(tmp_path: Path) -> None:
    triton = util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("needs the assembler that comes with triton")
    assembler = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    for piece, kernel in (
        ("LatentAttentionPart", "latent_attention_fp16_64"),
        ("MergeSplits", "merge_splits_bf16"),
        ("RouterTopK", "router_top_k_fp32"),
        ("ExpertsDownCodes", "decode_down_fp16_int4"),
    ):
        source = tmp_path / f"{kernel}.ptx"
        source.write_text(ptx_of(PIECES[piece], kernel, 89))
        command = [str(assembler), "-arch=sm_89", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_parameter_that_is_read_can_not_be_left_out() -> None:
    ptx = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u32 f_param_1\n)\n{ ld.param.b32 %r1, [f_param_1]; }"
    swapped = ptx_parameters.rearranged(ptx, "f", [1, None, 0])
    assert "(\n\t.param .u32 f_param_1,\n\t.param .u64 f_ignored_1,\n\t.param .u64 f_param_0\n)" in swapped
    assert "param_0" not in ptx_parameters.rearranged(ptx, "f", [1])
    with pytest.raises(BuildError, match="kernel f reads parameter 1"):
        ptx_parameters.rearranged(ptx, "f", [0])
    with pytest.raises(BuildError, match=r"no kernel g .*reinstall mythos-edge$"):
        ptx_parameters.rearranged(ptx, "g", [0])


def test_a_float_travels_as_its_bits() -> None:
    assert trt_aot.bits_of(1.0) == 0x3F800000
    assert trt_aot.bits_of(-0.0) == -(2**31)


def test_rtx_has_no_such_plugins() -> None:
    trt: ModuleType = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    with pytest.raises(BackendUnavailable, match="has no ahead-of-time plugins"):
        trt_aot.register(trt, 89)
