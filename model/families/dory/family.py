"""The family of Dory checkpoints: looped normalised transformers of NVIDIA."""

from collections.abc import Collection, Mapping
from typing import Any

from mythos_edge.model.families.dory.config import FAMILY, DoryConfig
from mythos_edge.model.families.dory.config_reading import config_from_dict
from mythos_edge.model.families.family import Opening
from mythos_edge.model.families.hugging_face import names_model


class Dory:
    """The family of Dory, as the table of families knows it."""

    name = FAMILY

    def recognises(self, names: Collection[str], config: Mapping[str, Any]) -> bool:
        if config.get("model_type") is None and "lm_head.logit_scale" in names:
            return True
        return names_model(config, FAMILY, "DoryForCausalLM")

    def config_from(self, values: Mapping[str, Any], origin: str) -> DoryConfig:
        return config_from_dict(values, origin)

    def open(self, opening: Opening) -> Any:
        from mythos_edge.model.families.dory.opening import open_dory

        return open_dory(opening)

    def recipes(self, config: DoryConfig, max_context: int) -> list[Any]:
        from mythos_edge.model.families.dory.layout import recipes

        return list(recipes(config, max_context))

    def network(self, config: DoryConfig, max_context: int, ops: Any = None) -> Any:
        from mythos_edge.model.families.dory.network import Network

        return Network(config, max_context, ops)
