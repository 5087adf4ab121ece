"""Launch programs as data: which kernels, grids and workspace a call gets, and the errors for calls nobody serves."""

import itertools

import pytest

from mythos_edge.model.errors import BuildError
from mythos_edge.model.families.openmythos.config import VARIANTS as MODELS
from mythos_edge.plugins.kernels.variants import VARIANTS, grid_size
from mythos_edge.plugins.launches import Integer, Pointer, Program, Workspace, program, variants

EXPERTS = {"x": (1, 64), "router": (8, 64), "router_bias": (8,), "fc1": (8, 96, 64), "fc2": (8, 64, 48)}
ATTENTION = {"q": (1, 1, 4, 48), "rows": (1, 1, 48), "past": (1, 300, 48), "length": (), "first": (1,)}
_LATENT = {"value_dim": 32, "scale": 0.5}


def _of(op: str, shapes: dict[str, tuple[int, ...]], dtype: str = "fp16", **attributes: float) -> Program:
    return program(op, shapes, dict.fromkeys(shapes, dtype), attributes)


def _quantized(rows: int, blocks: tuple[int, int] = (2, 3), codes: str = "int4") -> tuple[dict, dict]:
    shapes = {"x": (rows, 64), "router": (8, 64), "router_bias": (8,), "fc1_codes": (8, 192, 64)}
    shapes |= {"fc1_scale": (8, 192, blocks[0]), "fc2_codes": (8, 64, 96), "fc2_scale": (8, 64, blocks[1])}
    return shapes, {name: codes if name.endswith("codes") else "bf16" for name in shapes}


@pytest.mark.parametrize(
    ("rule", "size"), [("1", 1), ("rows*top_k", 6), ("rows*top_k/4", 2), ("rows*top_k/4+experts", 7), ("rows", 3)]
)
def test_a_grid_rule_reads_from_left_to_right(rule: str, size: int) -> None:
    assert grid_size(rule, {"rows": 3, "top_k": 2, "experts": 5}) == size


def test_few_rows_of_experts() -> None:
    made = _of("SparseMoE", EXPERTS | {"x": (3, 64)}, top_k=2)
    assert [launch.kernel for launch in made.launches] == [
        "router_logits_fp16",
        "router_top_k_fp16",
        "decode_gate_up_fp16",
        "decode_down_fp16",
    ]
    assert [launch.grid for launch in made.launches] == [(3, 2, 1), (3, 1, 1), (6, 6, 1), (3, 16, 1)]
    hidden = made.launches[2].arguments[3]
    assert isinstance(hidden, Workspace)
    assert made.launches[2].arguments == (
        Pointer("x"),
        made.launches[1].arguments[2],
        Pointer("fc1"),
        hidden,
        Integer(8),
        Integer(2),
        Integer(64),
        Integer(48),
    )
    assert made.launches[3].arguments[0] == hidden
    assert made.launches[3].arguments[4] == Pointer("y")
    # Logits, chosen, weights in 256 bytes each; 6 pairs of 48 hidden units in float32.
    assert made.workspace_bytes == 3 * 256 + 1280


def test_many_rows_are_grouped_by_expert() -> None:
    made = _of("SparseMoE", EXPERTS | {"x": (100, 64)}, top_k=2)
    kernels = [launch.kernel for launch in made.launches[2:]]
    assert kernels == ["group_pairs", "prefill_gate_up_fp16", "prefill_down_fp16", "combine_choices_fp16"]
    assert made.launches[3].grid == (7 + 8, 1, 1)
    # The kernel that numbers the tiles is told how many programs there are.
    assert made.launches[2].arguments[-1] == Integer(15)


def test_workspaces_do_not_overlap() -> None:
    made = _of("SparseMoE", EXPERTS | {"x": (100, 64)}, "fp32", top_k=2)
    places = {
        argument.offset_bytes
        for launch in made.launches
        for argument in launch.arguments
        if isinstance(argument, Workspace)
    }
    assert len(places) == 8
    assert all(offset % 256 == 0 for offset in places)
    # Logits, three lists of pairs, hidden, starts, tiles, made.
    sizes = [100 * 8, 200, 200, 200 * 48, 200, 9, 15, 200 * 64]
    assert made.workspace_bytes == sum(-(-4 * size // 256) * 256 for size in sizes)


def test_the_context_is_split_by_capacity_alone() -> None:
    made = _of("LatentAttention", ATTENTION, **_LATENT)
    assert [launch.kernel for launch in made.launches] == ["latent_attention_fp16_64", "merge_splits_fp16"]
    assert [launch.grid for launch in made.launches] == [(1, 4, 1), (4, 1, 1)]
    assert made.workspace_bytes == 4 * 4 * 32 * 4 + 256
    short = _of("LatentAttention", ATTENTION | {"past": (1, 60, 48)}, **_LATENT)
    assert len(short.launches) == 1
    assert short.workspace_bytes == 0
    # Many rows keep the GPU busy as they are.
    prompt = {"q": (1, 2048, 4, 48), "rows": (1, 2048, 48), "past": (1, 4096, 48)}
    assert len(_of("LatentAttention", ATTENTION | prompt, **_LATENT).launches) == 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_published_model_has_aligned_kernels(name: str, dtype: str) -> None:
    config = MODELS[name]
    dim, experts, units = config.dim, config.n_experts, config.expert_dim
    shapes = {"x": (-1, dim), "router": (experts, dim), "router_bias": (experts,)}
    shapes |= {"fc1": (experts, 2 * units, dim), "fc2": (experts, dim, units)}
    kernels = variants("SparseMoE", shapes, dict.fromkeys(shapes, dtype), {"top_k": config.n_experts_per_tok}, 512)
    assert len(kernels) == 8
    width = config.cache_width
    shapes = {"q": (1, -1, config.n_heads, width), "rows": (1, -1, width), "past": (1, -1, width), "first": (1,)}
    attributes = {"value_dim": config.kv_lora_rank, "scale": 1.0}
    attention = variants("LatentAttention", shapes, dict.fromkeys(shapes, dtype), attributes, 512)
    assert len(attention) == 2
    assert not [kernel for kernel in kernels + attention if kernel.endswith("_any")]


@pytest.mark.parametrize("max_rows", [1, 8, 64])
def test_variants_are_all_that_any_call_asks_for(max_rows: int) -> None:
    shapes, dtypes = _quantized(1)
    told = set(variants("QuantizedSparseMoE", shapes, dtypes, {"top_k": 2}, max_rows))
    asked = set()
    for rows in range(1, max_rows + 1):
        made = program("QuantizedSparseMoE", _quantized(rows)[0], dtypes, {"top_k": 2})
        asked |= {launch.kernel for launch in made.launches}
    assert told == asked


def test_every_kernel_of_the_table_is_asked_for_by_some_call() -> None:
    asked = {launch.kernel for launch in _of("RunningColumns", {"halt_mass": (1, 5)}, "fp32").launches}
    for dtype in ("fp16", "bf16", "fp32"):
        shapes: dict[str, tuple[int, ...]] = {"out": (1, 5, 8), "halt_mass": (1, 5)}
        asked |= {k.kernel for k in program("OutputSoFar", shapes, {"out": dtype, "halt_mass": "fp32"}, {}).launches}
        for odd in (0, 1):
            shapes = {"x": (1, 64 + odd), "router": (8, 64 + odd), "router_bias": (8,)}
            shapes |= {"fc1": (8, 96, 64 + odd), "fc2": (8, 64 + odd, 48)}
            asked |= {*variants("SparseMoE", shapes, dict.fromkeys(shapes, dtype), {"top_k": 2}, 64)}
        for rank in (64, 256, 512, 1024, 33, 511):
            if (dtype, rank) != ("fp32", 1024):
                shapes = {"q": (1, 1, 4, rank + 8), "rows": (1, 1, rank + 8), "past": (1, 0, rank + 8), "first": (1,)}
                attributes = {"value_dim": rank, "scale": 1.0}
                asked |= {*variants("LatentAttention", shapes, dict.fromkeys(shapes, dtype), attributes, 64)}
        for codes in ("int8", "int4", "fp8"):
            shapes, dtypes = _quantized(1, codes=codes)
            dtypes = {name: dtype if kind == "bf16" else kind for name, kind in dtypes.items()}
            asked |= {*variants("QuantizedSparseMoE", shapes, dtypes, {"top_k": 2}, 64)}
    assert asked == set(VARIANTS)


def _refused(op: str, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], **attributes: float) -> str:
    with pytest.raises(BuildError) as caught:
        program(op, shapes, dtypes, attributes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_no_kernel_serves_is_said_in_one_line() -> None:
    fp16 = dict.fromkeys(EXPERTS, "fp16")
    assert "no kernels for GroupedQueryAttention" in _refused("GroupedQueryAttention", {}, {})
    assert "'fc2': 'int8'" in _refused("SparseMoE", EXPERTS, fp16 | {"fc2": "int8"}, top_k=2)
    assert "fc2 is (8, 64, 40), expected (8, 64, 48)" in _refused(
        "SparseMoE", EXPERTS | {"fc2": (8, 64, 40)}, fp16, top_k=2
    )
    assert "best 9 of 8 experts" in _refused("SparseMoE", EXPERTS, fp16, top_k=9)
    shared = {"shared_gate_up": (32, 64), "shared_down": (64, 16)}
    assert "has shared experts" in _refused("SparseMoE", EXPERTS | shared, fp16, top_k=2)
    wide = {"q": (1, 1, 4, 2048), "rows": (1, 1, 2048), "past": (1, 9, 2048), "first": (1,)}
    refused = _refused("LatentAttention", wide, dict.fromkeys(wide, "fp16"), value_dim=1984, scale=1.0)
    assert "latent rank of 1984 and 64 rotary channels has no kernel, expected at most 1024 and 64" in refused
    assert refused.endswith(": build with --target ort-cuda, or use --target ort-cpu")
    assert "halt_mass is fp16" in _refused("RunningColumns", {"halt_mass": (1, 2)}, {"halt_mass": "fp16"})


def test_codes_in_odd_blocks_are_refused() -> None:
    shapes, dtypes = _quantized(1, blocks=(4, 3))
    refused = _refused("QuantizedSparseMoE", shapes, dtypes, top_k=2)
    assert (
        "64 codes in 4 blocks have no kernel, expected blocks of a multiple of 32: build with --weights none" in refused
    )
    shapes, dtypes = _quantized(1)
    refused = _refused("QuantizedSparseMoE", shapes, dtypes | {"fc2_codes": "int8"}, top_k=2)
    assert "codes of int4 and int8" in refused


def test_a_prompt_of_any_length_stays_inside_the_grid() -> None:
    """Axes y and z of a grid end at 65535."""
    for rows, op in itertools.product((1, 8, 9, 20000), ("fp16", "bf16")):
        for launch in _of("SparseMoE", EXPERTS | {"x": (rows, 64)}, op, top_k=2).launches:
            assert all(1 <= size <= 65535 for size in launch.grid[1:])
