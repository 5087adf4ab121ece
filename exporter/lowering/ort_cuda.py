"""Lowering for ONNX Runtime's CUDA provider: products of the large matrices in float16 or of rounded weights.

All else stays float32: norms, rotation, attention, the residual stream, the router and halting decide what is
computed and are small, and the caches are float32. Every op here has a kernel of the CUDA provider and one of the CPU
provider, so that a test can run the graph without a GPU.

    mythos::LatentAttention            products, see ``ort_attention``
    mythos::GroupedQueryAttention      likewise
    mythos::SparseMoE                  com.microsoft::MoE
    mythos::SparseMoE in blocks        com.microsoft::QMoE (float16 only)
    a product with a large matrix      Gemm or MatMul in float16 between two Casts
    a product with a rounded matrix    com.microsoft::MatMulNBits between two Casts
    rows of a rounded embedding        com.microsoft::GatherBlockQuantized

Not here: whether the installed ONNX Runtime has those kernels (``runtime.backends.ort_cuda`` asks it).
"""

from collections.abc import Mapping, Set

import onnx_ir as ir

from mythos_edge.exporter.graph_checks import graph_pass, has_no, one_sequence
from mythos_edge.exporter.graph_writer import GraphWriter
from mythos_edge.exporter.lowering.ort_attention import grouped_query_attention, latent_attention
from mythos_edge.exporter.lowering.ort_cpu import Experts, Lowering, Packs, Rule, lowered_by, stored_name
from mythos_edge.exporter.lowering.ort_kernels import FUSED_EXPERTS, MICROSOFT
from mythos_edge.model.target_options import ON_SHAPES
from mythos_edge.plugins import ops

# ONNX Runtime leaves these to the CPU where they are arithmetic on shapes, a few integers each.
_SHAPE_OPS = frozenset(["Concat", "Greater", "Reshape", "Shape", "Split", "Squeeze", "Sub", "Unsqueeze"])
# The float16 number that the router's kernel turns into a weight of 0.
_NEVER_CHOSEN = -65504.0

Narrowed = Mapping[str, ir.TensorProtocol]


@graph_pass(
    requires=[one_sequence],
    ensures=[has_no(ops.LATENT_ATTENTION.name, ops.GROUPED_QUERY_ATTENTION.name, ops.SPARSE_MOE.name)],
)
def lower_for_ort_cuda(model: ir.Model, narrowed: Narrowed | None = None, packs: Packs | None = None) -> ir.Model:
    """A copy of ``model`` on kernels of the CUDA provider.

    ``narrowed`` maps the large matrices to their float16 form; without it all is float32. Matrices named in ``packs``
    are replaced by those, which takes float16: the CUDA kernel of QMoE has no float32 form.
    """
    assert not packs or narrowed is not None, "rounded weights take float16"
    made = lowered_by(lambda graph: _CudaLowering(graph, narrowed, packs or {}), model)
    for node in made.graph.all_nodes():
        if _is_on_shapes(node):
            node.name = f"{ON_SHAPES}{node.name}"
    return made


def _is_on_shapes(node: ir.Node) -> bool:
    return node.op_type == "Shape" or (node.op_type in _SHAPE_OPS and all(map(_is_integer, node.inputs)))


def _is_integer(value: ir.Value | None) -> bool:
    """Whether a value is known to be integers; what is written here has no type, but comes of what has."""
    if value is None or value.dtype is not None:
        return value is None or value.dtype == ir.DataType.INT64
    node = value.producer()
    return node is not None and _is_on_shapes(node)


class _CudaLowering(Lowering):
    """Without ``narrowed`` the Casts and the products' rules do nothing."""

    def __init__(self, graph: ir.Graph, narrowed: Narrowed | None, packs: Packs) -> None:
        super().__init__(graph, packs)
        self._narrowed = narrowed
        # Products with the same rows share their Cast.
        self._casts: dict[str, ir.Value] = {}

    @property
    def replaced(self) -> Set[str]:
        return super().replaced | (self._narrowed or {}).keys()

    def rules(self) -> dict[tuple[str, str], Rule]:
        return super().rules() | {
            (ops.DOMAIN, ops.LATENT_ATTENTION.name): latent_attention,
            (ops.DOMAIN, ops.GROUPED_QUERY_ATTENTION.name): grouped_query_attention,
            ("", "MatMul"): self._product_by_head,
        }

    def _narrow(self, writer: GraphWriter, x: ir.Value) -> ir.Value:
        if self._narrowed is None:
            return x
        name = str(x.name)
        if name not in self._casts:
            self._casts[name] = writer.add("Cast", [x], to=ir.DataType.FLOAT16)
        return self._casts[name]

    def _wide(self, writer: GraphWriter, y: ir.Value) -> ir.Value:
        return y if self._narrowed is None else writer.add("Cast", [y], to=ir.DataType.FLOAT)

    def _weight(self, writer: GraphWriter, matrix: ir.Value) -> ir.Value:
        """``matrix`` in the type of the products."""
        name = stored_name(matrix)
        return matrix if self._narrowed is None else writer.tensor(self._narrowed[name], f"{name}.fp16")

    def _is_large(self, matrix: ir.Value) -> bool:
        name = stored_name(matrix)
        return name in self._packs or (self._narrowed is not None and name in self._narrowed)

    def _product(self, writer: GraphWriter, node: ir.Node) -> ir.Value | None:
        x, matrix = node.inputs[:2]
        assert x is not None
        assert matrix is not None
        if not self._is_large(matrix):
            return None
        return self._wide(writer, self._multiplied(writer, self._narrow(writer, x), matrix))

    def _product_by_head(self, writer: GraphWriter, node: ir.Node) -> ir.Value | None:
        x, matrices = node.inputs
        assert x is not None
        assert matrices is not None
        if not self._is_large(matrices):
            return None
        return self._wide(writer, writer.add("MatMul", [self._narrow(writer, x), self._weight(writer, matrices)]))

    def _multiplied(self, writer: GraphWriter, x: ir.Value, matrix: ir.Value) -> ir.Value:
        """``x @ matrix.T`` in the type of ``x``, which is that of the products."""
        name, pack = stored_name(matrix), self._pack(matrix)
        if pack is None:
            return writer.add("Gemm", [x, self._weight(writer, matrix)], transB=1)
        inputs = [x, writer.tensor(pack.values, f"{name}.q"), self._scales(writer, name)]
        sizes = {"K": pack.columns, "N": pack.scales.shape.numpy()[0]}
        return writer.add("MatMulNBits", inputs, MICROSOFT, bits=pack.bits, block_size=pack.block, **sizes)

    def _scales(self, writer: GraphWriter, name: str) -> ir.Value:
        """The scales of a rounded matrix in float16, as kernels of float16 want them; narrowed when loaded."""
        stored = writer.tensor(self._packs[name].scales, f"{name}.scale")
        return writer.add("Cast", [stored], to=ir.DataType.FLOAT16)

    def _embedding(self, writer: GraphWriter, node: ir.Node) -> ir.Value | None:
        table, rows = node.inputs
        if table is not None and stored_name(table) not in self._packs and self._is_large(table):
            # One copy of the table: the head multiplies by the same one.
            return self._wide(writer, writer.add("Gather", [self._weight(writer, table), rows]))
        return super()._embedding(writer, node)

    def _routed(self, writer: GraphWriter, experts: Experts) -> ir.Value:
        routing = self._routing(writer, experts)
        return self._wide(writer, self._fused(writer, self._narrow(writer, experts.x), routing, experts))

    def _shared_expert(self, writer: GraphWriter, x: ir.Value, gate_up: ir.Value, down: ir.Value) -> ir.Value:
        return self._wide(writer, super()._shared_expert(writer, self._narrow(writer, x), gate_up, down))

    def _routing(self, writer: GraphWriter, experts: Experts) -> ir.Value:
        """Logits (N, E) by which the kernels choose by the biased logits and weigh by the unbiased ones.

        The logarithm of its weight for a chosen expert, next to nothing for the others. The choice is made in float32
        whatever the kernel computes in, and a logarithm near 0 keeps its digits in float16.
        """
        if self._narrowed is None and experts.bias is None:
            return experts.logits
        scores, chosen = experts.chosen(writer)
        logarithms = writer.add("LogSoftmax", [scores], axis=-1)
        others = writer.add("Expand", [writer.number(_NEVER_CHOSEN), writer.add("Shape", [experts.logits])])
        return self._narrow(writer, writer.add("ScatterElements", [others, chosen, logarithms], axis=1))

    def _fused(self, writer: GraphWriter, x: ir.Value, routing: ir.Value, experts: Experts) -> ir.Value:
        pack = self._pack(experts.stacks[0])
        if pack is None:
            fc1, fc2 = (self._weight(writer, stack) for stack in experts.stacks)
            return writer.add("MoE", [x, routing, fc1, None, fc2], MICROSOFT, **FUSED_EXPERTS, k=experts.top_k)
        weights: list[ir.Value | None] = []
        for name in map(stored_name, experts.stacks):
            weights += [writer.tensor(self._packs[name].values, f"{name}.q"), self._scales(writer, name), None]
        # 0: the weights are as the quantiser leaves them, and the kernel brings them into its own order when loaded.
        sizes = {"expert_weight_bits": pack.bits, "block_size": pack.block, "weights_prepacked": 0}
        return writer.add("QMoE", [x, routing, *weights], MICROSOFT, **FUSED_EXPERTS, **sizes, k=experts.top_k)
