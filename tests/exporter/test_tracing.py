"""Tracing: the same graphs every time, no weights in them, and ops that torch's exporter must take apart."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import SMALL
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from mythos_edge.exporter import tracing
from mythos_edge.exporter.weights import is_unwritten
from mythos_edge.model.errors import ExportError
from mythos_edge.model.families.openmythos.network import Network
from mythos_edge.model.stages import STAGES


def _bytes(models: dict[str, ir.Model]) -> dict[str, bytes]:
    return {stage: ir.to_proto(model).SerializeToString(deterministic=True) for stage, model in models.items()}


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_tracing_gives_the_same_every_time_and_no_weights(attn_type: str) -> None:
    config = dataclasses.replace(SMALL, attn_type=attn_type, prelude_layers=2, coda_layers=1)
    traced = tracing._trace(config, 32, torch.float16, True)
    assert _bytes(traced) == _bytes(tracing._trace(config, 32, torch.float16, True))
    names = {
        name for model in traced.values() for name, value in model.graph.initializers.items() if is_unwritten(value)
    }
    assert names == set(dict(Network(config, 32).named_parameters()))
    for stage in STAGES:
        graph = traced[stage].graph
        assert {str(size) for value in graph.inputs for size in value.shape or () if not isinstance(size, int)} <= {
            *("chunk", "context", "logit_count")
        }
        assert not any("/" in str(value.name) for value in [*graph.inputs, *graph.outputs])


def test_what_fails_in_tracing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("first line\nthe tracer broke")

    monkeypatch.setattr(Network, "coda", fail)
    with pytest.raises(ExportError, match="tracing the model failed: ") as caught:
        tracing._trace(SMALL, 32, torch.float32, False)
    assert "\n" not in str(caught.value)


def test_attentions_are_traced_once_only_where_they_differ_in_weights_alone() -> None:
    with torch.device("meta"):
        tracing._Stages(Network(SMALL, 32))
        network = Network(SMALL, 32)
    (attention,) = (part for name, part in network.attentions().items() if name == "coda_blocks.0.attn")
    for name, other in {
        "config": dataclasses.replace(SMALL, qk_nope_head_dim=SMALL.qk_nope_head_dim // 2),
        "wo": nn.Parameter(torch.empty(1, 2)),
        "norm": nn.LayerNorm(3),
    }.items():
        before = getattr(attention, name, None)
        setattr(attention, name, other)
        with pytest.raises(AssertionError, match=r"coda_blocks\.0\.attn.* differ in more than weights"):
            tracing._Stages(network)
        setattr(attention, name, before)


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        return y


class _Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.xlog1py(x, x.abs())


class _Reversed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.5 - x.to(torch.float64)


@pytest.mark.parametrize("module", [_InPlace(), _Unknown(), _Reversed()])
def test_ops_that_the_exporter_knows_only_decomposed(module: nn.Module) -> None:
    x = torch.tensor([0.5, -1.5, 3.0])
    with tracing._undisturbed():
        model = tracing._in_onnx(torch.export.export(module, (x,)), ["x"], ["y"])
    made = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(made[0], module(x).numpy(), rtol=1e-6)
