"""The custom ops, each declared once: name, inputs, attributes and a body of standard ONNX ops.

The body is written in ONNX's own text syntax and becomes a model-local function, so every ONNX runtime can run a
graph that holds these nodes; a runtime that knows a faster way (a TensorRT plugin, an ONNX Runtime kernel) replaces
the node. Other faces: ``reference`` (numpy oracle), ``torch_ops`` (tracing), ``exporter.lowering``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

DOMAIN = "mythos"
VERSION = 1
OPSET = 23
# The others are integers.
FLOAT_ATTRIBUTES = ("scale",)


@dataclass(frozen=True)
class OpSpec:
    """One op: its formal inputs in order, attribute names, outputs and body.

    ``optional`` inputs come last and are given all together or not at all; ``body`` maps whether they are given to
    the text of the function. Tensors are of one element type but for those ``types`` names: ``int64``, and ``codes``,
    rounded weights of any type that can be cast to a float. The ``extra`` attribute is 0 in a node that has none;
    ``extra_body`` is for graphs in which it is not 0 everywhere, so that the others do not pay for it.
    """

    name: str
    inputs: tuple[str, ...]
    optional: tuple[str, ...]
    attributes: tuple[str, ...]
    outputs: tuple[str, ...]
    body: dict[bool, str]
    types: Mapping[str, str] = field(default_factory=dict)
    extra: str = ""
    extra_body: str = ""

    @property
    def output(self) -> str:
        """The output of an op that has one."""
        (only,) = self.outputs
        return only

    @property
    def typed_by(self) -> str:
        """The first input of the element type."""
        return next(name for name in self.inputs if name not in self.types)

    def function_text(self, *, with_optional: bool, wide: bool = True, with_extra: bool = False) -> str:
        """The model-local function in ONNX text syntax; unless ``wide``, of a 16-bit element type.

        All nodes that call one ``with_extra`` must have that attribute. The body computes in float32 as every face of
        the op does; 16-bit values are cast on their way in and out.
        """
        inputs = self.inputs + (self.optional if with_optional else ())
        narrow = () if wide else tuple(name for name in (*inputs, *self.outputs) if name not in self.types)
        formal_inputs, formal_outputs = (
            ", ".join(f"{name}_narrow" if name in narrow else name for name in names)
            for names in (inputs, self.outputs)
        )
        header = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>'
        names = (*self.attributes, self.extra) if with_extra else self.attributes
        attributes = f" <{', '.join(names)}>" if names else ""
        body = self.extra_body if with_extra else self.body[with_optional]
        signature = f"{self.name}{attributes} ({formal_inputs}) => ({formal_outputs})"
        widened = "".join(f"{name} = Cast <to = 1> ({name}_narrow)\n" for name in narrow if name in inputs)
        narrowed = "".join(
            f"{name}_narrow = CastLike ({name}, {self.typed_by}_narrow)\n" for name in narrow if name in self.outputs
        )
        return f"{header}\n{signature}\n{{{widened}{body}{narrowed}}}"


# The first position that a row may look at.
_LOWEST = """
    lowest_position = Min (first_column, row_column)
"""

# The same where a row sees window_size positions, its own included, or all of them if that is 0.
_LOWEST_IN_WINDOW = """
    window_size_value = Constant <value_int: int = @window_size> ()
    is_bounded = Greater (window_size_value, zero)
    reach = Where (is_bounded, window_size_value, beyond)
    before_window = Sub (row_column, reach)
    window_column = Add (before_window, one)
    start_column = Max (first_column, window_column)
    lowest_position = Min (start_column, row_column)
"""

# Which columns (past, then new) each new row may look at, for both attentions: needs past_count, new_count (1,).
_VISIBLE = f"""
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    past_scalar = Squeeze (past_count)
    new_scalar = Squeeze (new_count)
    columns = Range (zero, past_scalar, one)
    filled = Less (columns, length)
    # Past columns that are not filled yet lie beyond every row; a padding row sees itself.
    beyond = Constant <value_int = 4611686018427387904> ()
    past_positions = Where (filled, columns, beyond)
    steps = Range (zero, new_scalar, one)
    row_positions = Add (steps, length)
    positions = Concat <axis = 0> (past_positions, row_positions)
    row_axis = Constant <value_ints = [1]> ()
    row_column = Unsqueeze (row_positions, row_axis)
    first_axes = Constant <value_ints = [1, 2]> ()
    first_column = Unsqueeze (first, first_axes)
    {_LOWEST}
    started = GreaterOrEqual (positions, lowest_position)
    causal = LessOrEqual (positions, row_column)
    visible = And (started, causal)
    hidden_score = Constant <value_float = -3.4028234e38> ()
    all_count = Shape (positions)
    counts = Concat <axis = 0> (past_count, new_count)
"""

_LATENT_ATTENTION = f"""
    minus_one = Constant <value_ints = [-1]> ()
    keep_rest = Constant <value_ints = [0, -1]> ()
    batch_rows = Shape <start = 0, end = 2> (q)
    new_count = Shape <start = 1, end = 2> (q)
    heads = Shape <start = 2, end = 3> (q)
    width = Shape <start = 3, end = 4> (q)
    past_count = Shape <start = 1, end = 2> (past)
    {_VISIBLE}
    # Heads are rows: one product over the cached rows serves them all. The cache stands left, which is the faster
    # order for few rows, and the scores are joined instead of the caches.
    scale_value = Constant <value_float: float = @scale> ()
    q_scaled = Mul (q, scale_value)
    head_rows = Concat <axis = 0> (keep_rest, width)
    q_rows = Reshape (q_scaled, head_rows)
    q_columns = Transpose <perm = [0, 2, 1]> (q_rows)
    past_scores = MatMul (past, q_columns)
    new_scores = MatMul (rows, q_columns)
    scores_left = Concat <axis = 1> (past_scores, new_scores)
    scores_rows = Transpose <perm = [0, 2, 1]> (scores_left)
    per_head = Concat <axis = 0> (batch_rows, heads, minus_one)
    scores = Reshape (scores_rows, per_head)
    head_axis = Constant <value_ints = [2]> ()
    visible_per_head = Unsqueeze (visible, head_axis)
    masked = Where (visible_per_head, scores, hidden_score)
    softmax = Softmax <axis = -1> (masked)
    weight_rows = Concat <axis = 0> (keep_rest, all_count)
    weights = Reshape (softmax, weight_rows)
    past_weights, new_weights = Split <axis = 2> (weights, counts)
    past_mixed = MatMul (past_weights, past)
    new_mixed = MatMul (new_weights, rows)
    mixed_rows = Add (past_mixed, new_mixed)
    q_shape = Shape (q)
    mixed_whole = Reshape (mixed_rows, q_shape)
    value_dim_value = Constant <value_int: int = @value_dim> ()
    value_end = Reshape (value_dim_value, minus_one)
    value_start = Constant <value_ints = [0]> ()
    value_axis = Constant <value_ints = [3]> ()
    mixed = Slice (mixed_whole, value_start, value_end, value_axis)
"""

_GROUPED_QUERY_ATTENTION = f"""
    minus_one = Constant <value_ints = [-1]> ()
    keep_two = Constant <value_ints = [0, 0]> ()
    new_count = Shape <start = 1, end = 2> (q)
    head_dim = Shape <start = 3, end = 4> (q)
    past_count = Shape <start = 1, end = 2> (past)
    {_VISIBLE}
    # The query heads of a group are rows of one product, so that keys and values are never repeated.
    kv_heads_value = Constant <value_int: int = @kv_heads> ()
    groups = Reshape (kv_heads_value, minus_one)
    scale_value = Constant <value_float: float = @scale> ()
    q_scaled = Mul (q, scale_value)
    grouped = Concat <axis = 0> (keep_two, groups, minus_one, head_dim)
    q_grouped = Reshape (q_scaled, grouped)
    q_by_group = Transpose <perm = [0, 2, 1, 3, 4]> (q_grouped)
    flat_rows = Concat <axis = 0> (keep_two, minus_one, head_dim)
    q_rows = Reshape (q_by_group, flat_rows)

    per_group = Concat <axis = 0> (keep_two, groups, head_dim)
    past_keys_flat, past_values_flat = Split <axis = 2, num_outputs = 2> (past)
    past_keys_rows = Reshape (past_keys_flat, per_group)
    past_keys = Transpose <perm = [0, 2, 3, 1]> (past_keys_rows)
    past_values_rows = Reshape (past_values_flat, per_group)
    past_values = Transpose <perm = [0, 2, 1, 3]> (past_values_rows)
    new_keys_flat, new_values_flat = Split <axis = 2, num_outputs = 2> (rows)
    new_keys_rows = Reshape (new_keys_flat, per_group)
    new_keys = Transpose <perm = [0, 2, 3, 1]> (new_keys_rows)
    new_values_rows = Reshape (new_values_flat, per_group)
    new_values = Transpose <perm = [0, 2, 1, 3]> (new_values_rows)

    past_scores = MatMul (q_rows, past_keys)
    new_scores = MatMul (q_rows, new_keys)
    scores_rows = Concat <axis = 3> (past_scores, new_scores)
    per_row = Concat <axis = 0> (keep_two, new_count, minus_one, all_count)
    scores = Reshape (scores_rows, per_row)
    group_axes = Constant <value_ints = [1, 3]> ()
    visible_per_head = Unsqueeze (visible, group_axes)
    masked = Where (visible_per_head, scores, hidden_score)
    softmax = Softmax <axis = -1> (masked)
    scores_shape = Shape (scores_rows)
    weights = Reshape (softmax, scores_shape)
    past_weights, new_weights = Split <axis = 3> (weights, counts)
    past_mixed = MatMul (past_weights, past_values)
    new_mixed = MatMul (new_weights, new_values)
    mixed_rows = Add (past_mixed, new_mixed)
    by_row = Concat <axis = 0> (keep_two, new_count, minus_one, head_dim)
    mixed_by_group = Reshape (mixed_rows, by_row)
    mixed_by_row = Transpose <perm = [0, 2, 1, 3, 4]> (mixed_by_group)
    q_shape = Shape (q)
    mixed = Reshape (mixed_by_row, q_shape)
"""

_SHARED_EXPERTS = """
    shared_both = Gemm <transB = 1> (x, shared_gate_up)
    shared_gate, shared_up = Split <axis = -1, num_outputs = 2> (shared_both)
    shared_sigmoid = Sigmoid (shared_gate)
    shared_silu = Mul (shared_gate, shared_sigmoid)
    shared_hidden = Mul (shared_silu, shared_up)
    start = Gemm <transB = 1> (shared_hidden, shared_down)
"""

_NO_SHARED_EXPERTS = """
    nothing = Constant <value_float = 0.0> ()
    start = Mul (x, nothing)
"""

# Loops over the experts that were chosen at all and computes each for the rows that chose it: the weights of an
# expert are read once whether one row or a whole prompt asks for it, and the others are not read.
_ROUTED_EXPERTS = """
    logits = Gemm <transB = 1> (x, router)
    # The bias is for the choice only.
    biased = Add (logits, router_bias)
    top_k_axis = Constant <value_ints = [-1]> ()
    top_k_value = Constant <value_int: int = @top_k> ()
    k = Reshape (top_k_value, top_k_axis)
    chosen_biased, chosen = TopK <axis = -1> (biased, k)
    chosen_logits = GatherElements <axis = -1> (logits, chosen)
    weights = Softmax <axis = -1> (chosen_logits)
    experts = Unique <sorted = 1> (chosen)
    count = Size (experts)
    forward = Constant <value = bool {1}> ()
    y = Loop (count, forward, start) <body = one_expert (int64 i, bool go, float[N, D] sum)
        => (bool go_on, float[N, D] new_sum) {
        go_on = Constant <value = bool {1}> ()
        zero = Constant <value_float = 0.0> ()
        front = Constant <value_ints = [0]> ()
        expert = Gather (experts, i)
        hits = Equal (chosen, expert)
        own_weights = Where (hits, weights, zero)
        choice_axis = Constant <value_ints = [-1]> ()
        row_weight = ReduceSum <keepdims = 1> (own_weights, choice_axis)
        hits_int = Cast <to = 6> (hits)
        hit_rows = ReduceMax <keepdims = 0> (hits_int, choice_axis)
        row_list = NonZero (hit_rows)
        row_index = Squeeze (row_list, front)
        taken = Gather (x, row_index)
        gate_up = Gather (fc1, expert)
        both = Gemm <transB = 1> (taken, gate_up)
        # Gate and up are interleaved.
        last = Constant <value_ints = [-1]> ()
        pair = Constant <value_ints = [0, -1, 2]> ()
        pairs = Reshape (both, pair)
        gate_pair, up_pair = Split <axis = -1, num_outputs = 2> (pairs)
        gate = Squeeze (gate_pair, last)
        up = Squeeze (up_pair, last)
        gate_sigmoid = Sigmoid (gate)
        silu = Mul (gate, gate_sigmoid)
        hidden = Mul (silu, up)
        down = Gather (fc2, expert)
        made = Gemm <transB = 1> (hidden, down)
        taken_weight = Gather (row_weight, row_index)
        weighed = Mul (made, taken_weight)
        row_axis = Constant <value_ints = [1]> ()
        scatter_index = Unsqueeze (row_index, row_axis)
        new_sum = ScatterND <reduction = "add"> (sum, scatter_index, weighed)
    }>
"""


def _dequantized_body(stack: str) -> str:
    """The weights ``stack`` from its codes and scales."""
    return f"""
    {stack}_numbers = Cast <to = 1> ({stack}_codes)
    {stack}_shape = Shape ({stack}_codes)
    {stack}_blocks = Shape ({stack}_scale)
    {stack}_rest = Constant <value_ints = [-1]> ()
    {stack}_split = Concat <axis = 0> ({stack}_blocks, {stack}_rest)
    {stack}_grouped = Reshape ({stack}_numbers, {stack}_split)
    {stack}_each = Unsqueeze ({stack}_scale, {stack}_rest)
    {stack}_scaled = Mul ({stack}_grouped, {stack}_each)
    {stack} = Reshape ({stack}_scaled, {stack}_shape)
"""


LATENT_ATTENTION = OpSpec(
    name="LatentAttention",
    # q (B, S, H, W) absorbed query; rows (B, S, W) new cache rows; past (B, C, W); length () filled columns of past;
    # first (B,) padding columns at the left. Output (B, S, H, value_dim): softmax(scale * q k) v, where the keys are
    # the rows and the values their leading value_dim channels.
    inputs=("q", "rows", "past", "length", "first"),
    optional=(),
    attributes=("scale", "value_dim"),
    outputs=("mixed",),
    body={False: _LATENT_ATTENTION},
    types={"length": "int64", "first": "int64"},
)

GROUPED_QUERY_ATTENTION = OpSpec(
    name="GroupedQueryAttention",
    # q (B, S, H, head_dim); rows (B, S, W) and past (B, C, W): keys | values of all key/value heads, so
    # W = 2 * kv_heads * head_dim; length, first as above. Output (B, S, H, head_dim). A row sees window_size positions,
    # its own included; all if that is 0.
    inputs=("q", "rows", "past", "length", "first"),
    optional=(),
    attributes=("scale", "kv_heads"),
    outputs=("mixed",),
    body={False: _GROUPED_QUERY_ATTENTION},
    types={"length": "int64", "first": "int64"},
    extra="window_size",
    extra_body=_GROUPED_QUERY_ATTENTION.replace(_LOWEST, _LOWEST_IN_WINDOW),
)

SPARSE_MOE = OpSpec(
    name="SparseMoE",
    # x (N, D); router (E, D); router_bias (E,) added for the choice only; fc1 (E, 2F, D) with gate and up rows
    # interleaved; fc2 (E, D, F); shared_gate_up (2G, D) gate rows then up rows; shared_down (D, G).
    inputs=("x", "router", "router_bias", "fc1", "fc2"),
    optional=("shared_gate_up", "shared_down"),
    attributes=("top_k",),
    outputs=("y",),
    body={False: _NO_SHARED_EXPERTS + _ROUTED_EXPERTS, True: _SHARED_EXPERTS + _ROUTED_EXPERTS},
)

QUANTIZED_SPARSE_MOE = OpSpec(
    name="QuantizedSparseMoE",
    # As SparseMoE without shared experts; fc1 and fc2 are int8, int4 or float8 codes of the same shapes, and
    # fc1_scale (E, 2F, blocks), fc2_scale (E, D, blocks) say what one of a code is worth in each block of a row.
    inputs=("x", "router", "router_bias", "fc1_codes", "fc1_scale", "fc2_codes", "fc2_scale"),
    optional=(),
    attributes=("top_k",),
    outputs=("y",),
    body={False: _dequantized_body("fc1") + _dequantized_body("fc2") + _NO_SHARED_EXPERTS + _ROUTED_EXPERTS},
    types={"fc1_codes": "codes", "fc2_codes": "codes"},
)

OPS: dict[str, OpSpec] = {
    spec.name: spec for spec in (LATENT_ATTENTION, GROUPED_QUERY_ATTENTION, SPARSE_MOE, QUANTIZED_SPARSE_MOE)
}
