"""The families of looped Llamas: Ouro and Nanbeige, one stack of layers that runs several times."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mythos_edge.model.families.family import Opening
from mythos_edge.model.families.hugging_face import names_model
from mythos_edge.model.families.looped_llama.config import NanbeigeConfig, OuroConfig, StackConfig
from mythos_edge.model.families.looped_llama.config_fields import config_from_fields


@dataclass
class LoopedLlama:
    """A family of looped Llamas, as the table of families knows it.

    Its config.json names its ``model_type``, which is ``name``, or the class ``architecture``; where no type is
    named, it is told by ``own_tensor``, which no other family has, if there is any.
    """

    name: str
    config: type[StackConfig]
    architecture: str
    own_tensor: str | None = None

    def recognises(self, names: Collection[str], config: Mapping[str, Any]) -> bool:
        if config.get("model_type") is None and self.own_tensor in names:
            return True
        return names_model(config, self.name, self.architecture)

    def config_from(self, values: Mapping[str, Any], origin: str) -> StackConfig:
        return config_from_fields(self.config, values, origin)

    def open(self, opening: Opening) -> Any:
        from mythos_edge.model.families.looped_llama.opening import open_looped_llama

        return open_looped_llama(self.config, opening)

    def recipes(self, config: StackConfig, max_context: int) -> list[Any]:
        from mythos_edge.model.families.looped_llama.layout import recipes

        return recipes(config, max_context)

    def network(self, config: StackConfig, max_context: int, ops: Any = None) -> Any:
        from mythos_edge.model.families.looped_llama.network import Network

        return Network(config, max_context, ops)


OURO = LoopedLlama("ouro", OuroConfig, "OuroForCausalLM", "model.early_exit_gate.weight")
NANBEIGE = LoopedLlama("nanbeige", NanbeigeConfig, "NanbeigeForCausalLM")
