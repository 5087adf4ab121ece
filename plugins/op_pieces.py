"""The pieces that ops fall into where a plugin may be one kernel: ops themselves, with bodies, in ``CHAINS``.

What lies between two kernels of a call is workspace to ``trt_plugins``; here it is tensors of the graph. The bodies
are for checking such a graph: they read the weights of an expert again for every row that chose it. Not here: which
kernels compute the pieces (``trt_aot``).
"""

from mythos_edge.plugins.ops import (
    LATENT_ATTENTION,
    LATENT_MIXTURE_BODY,
    LATENT_SCORES_BODY,
    QUANTIZED_SPARSE_MOE,
    ROUTER_LOGITS_BODY,
    SPARSE_MOE,
    SWIGLU_BODY,
    OpSpec,
    choice_body,
    dequantized_body,
)

_PART = f"""
    {LATENT_SCORES_BODY}
    # Which part a column is in. A part with nothing to see weighs nothing beside the others.
    splits_value = Constant <value_int: int = @splits> ()
    part_one = Constant <value_int = 1> ()
    column_count = Squeeze (all_count)
    column_numbers = Range (zero, column_count, part_one)
    scaled_numbers = Mul (column_numbers, splits_value)
    part_of_column = Div (scaled_numbers, column_count)
    part_numbers = Range (zero, splits_value, part_one)
    part_column = Unsqueeze (part_numbers, row_axis)
    inside = Equal (part_of_column, part_column)
    part_axis = Constant <value_ints = [3]> ()
    all_scores = Unsqueeze (masked, part_axis)
    part_scores = Where (inside, all_scores, hidden_score)
    softmax = Softmax <axis = -1> (part_scores)
    {LATENT_MIXTURE_BODY}
    sums_axes = Constant <value_ints = [-1]> ()
    sums_natural = ReduceLogSumExp <keepdims = 0> (part_scores, sums_axes)
    log2_e = Constant <value_float = 1.442695> ()
    sums_log = Mul (sums_natural, log2_e)
    part_count = Reshape (splits_value, minus_one)
    partial_shape = Concat <axis = 0> (batch_rows, heads, part_count, width)
    partial_rows = Reshape (mixed_rows, partial_shape)
    value_dim_value = Constant <value_int: int = @value_dim> ()
    value_end = Reshape (value_dim_value, minus_one)
    front = Constant <value_ints = [0]> ()
    value_axis = Constant <value_ints = [4]> ()
    partials = Slice (partial_rows, front, value_end, value_axis)
    # Nobody may take one part for the whole.
    first_part = Gather <axis = 3> (partials, zero)
    nothing = Constant <value_float = 0.0> ()
    not_a_number = Div (nothing, nothing)
    is_whole = Equal (splits_value, part_one)
    mixed = Where (is_whole, first_part, not_a_number)
"""

_MERGE = """
    ln_2 = Constant <value_float = 0.6931472> ()
    sums_natural = Mul (sums_log, ln_2)
    shares = Softmax <axis = -1> (sums_natural)
    last = Constant <value_ints = [-1]> ()
    share_column = Unsqueeze (shares, last)
    weighed = Mul (partials, share_column)
    part_axis = Constant <value_ints = [3]> ()
    mixed = ReduceSum <keepdims = 0> (weighed, part_axis)
"""

_TOP_K = f"""
    {choice_body("chosen_wide")}
    chosen = Cast <to = 6> (chosen_wide)
"""

# The rows of x once for each choice, (N * K, D, 1), times the matrices of the choices.
_GATE_UP = f"""
    minus_one = Constant <value_ints = [-1]> ()
    flat_choices = Reshape (chosen, minus_one)
    matrices = Gather (fc1, flat_choices)
    one_axis = Constant <value_ints = [1]> ()
    row_and_choice = Shape (chosen)
    width = Shape <start = 1> (x)
    repeated = Concat <axis = 0> (row_and_choice, width)
    x_row = Unsqueeze (x, one_axis)
    x_rows = Expand (x_row, repeated)
    x_column_shape = Concat <axis = 0> (minus_one, width, one_axis)
    x_columns = Reshape (x_rows, x_column_shape)
    products = MatMul (matrices, x_columns)
    both = Squeeze (products, minus_one)
    {SWIGLU_BODY}
"""

_DOWN = """
    minus_one = Constant <value_ints = [-1]> ()
    flat_choices = Reshape (chosen, minus_one)
    matrices = Gather (fc2, flat_choices)
    hidden_columns = Unsqueeze (hidden, minus_one)
    products = MatMul (matrices, hidden_columns)
    row_and_choice = Shape (chosen)
    by_row = Concat <axis = 0> (row_and_choice, minus_one)
    made = Reshape (products, by_row)
    shares = Unsqueeze (weights, minus_one)
    weighed = Mul (made, shares)
    choice_axis = Constant <value_ints = [1]> ()
    y = ReduceSum <keepdims = 0> (weighed, choice_axis)
"""

LATENT_ATTENTION_PART = OpSpec(
    name="LatentAttentionPart",
    # Inputs as of LatentAttention. What a row sees is cut into ``splits`` parts; each leaves its mixture, partials
    # (B, S, H, splits, value_dim), and the log2 of its sum of exponentials, sums_log (B, S, H, splits). One part is the
    # whole and stands in mixed (B, S, H, value_dim) instead.
    inputs=LATENT_ATTENTION.inputs,
    optional=(),
    attributes=(*LATENT_ATTENTION.attributes, "splits"),
    outputs=("mixed", "partials", "sums_log"),
    body={False: _PART},
    types={**LATENT_ATTENTION.types, "partials": "fp32", "sums_log": "fp32"},
)

MERGE_SPLITS = OpSpec(
    name="MergeSplits",
    # q lends its dtype.
    inputs=("partials", "sums_log", "q"),
    optional=(),
    attributes=(),
    outputs=("mixed",),
    body={False: _MERGE},
    types={"partials": "fp32", "sums_log": "fp32"},
)

ROUTER_LOGITS = OpSpec(
    name="RouterLogits",
    # logits (N, E)
    inputs=("x", "router"),
    optional=(),
    attributes=(),
    outputs=("logits",),
    body={False: ROUTER_LOGITS_BODY},
    types={"logits": "fp32"},
)

_CHOICE = {"chosen": "int32", "weights": "fp32"}
ROUTER_TOP_K = OpSpec(
    name="RouterTopK",
    # chosen and weights (N, K)
    inputs=("logits", "router_bias"),
    optional=(),
    attributes=("top_k",),
    outputs=("chosen", "weights"),
    body={False: _TOP_K},
    types={"logits": "fp32", **_CHOICE},
)


def _experts(name: str, inputs: tuple[str, ...], output: str, body: str) -> OpSpec:
    """x -> hidden (N * K, F) of the chosen experts, or hidden -> y (N, D)."""
    codes = {stack: "codes" for stack in inputs if stack.endswith("_codes")}
    types = {**_CHOICE, "hidden": "fp32", **codes}
    own = {tensor: kind for tensor, kind in types.items() if tensor in (*inputs, output)}
    return OpSpec(name, inputs, (), ("top_k",), (output,), {False: body}, own)


EXPERTS_GATE_UP = _experts("ExpertsGateUp", ("x", "chosen", "fc1"), "hidden", _GATE_UP)
EXPERTS_DOWN = _experts("ExpertsDown", ("hidden", "chosen", "weights", "fc2"), "y", _DOWN)
EXPERTS_GATE_UP_CODES = _experts(
    "ExpertsGateUpCodes", ("x", "chosen", "fc1_codes", "fc1_scale"), "hidden", dequantized_body("fc1") + _GATE_UP
)
EXPERTS_DOWN_CODES = _experts(
    "ExpertsDownCodes",
    ("hidden", "chosen", "weights", "fc2_codes", "fc2_scale"),
    "y",
    dequantized_body("fc2") + _DOWN,
)

# The pieces of each op in order; tensors of one name are one tensor. With one split there is nothing to merge.
CHAINS = {
    LATENT_ATTENTION.name: (LATENT_ATTENTION_PART, MERGE_SPLITS),
    SPARSE_MOE.name: (ROUTER_LOGITS, ROUTER_TOP_K, EXPERTS_GATE_UP, EXPERTS_DOWN),
    QUANTIZED_SPARSE_MOE.name: (ROUTER_LOGITS, ROUTER_TOP_K, EXPERTS_GATE_UP_CODES, EXPERTS_DOWN_CODES),
}
PIECES = {piece.name: piece for chain in CHAINS.values() for piece in chain}
