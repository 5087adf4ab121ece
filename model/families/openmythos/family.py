"""The family of OpenMythos checkpoints, as ``open-mythos`` trains them."""

from collections.abc import Collection, Mapping
from typing import Any

from mythos_edge.model.families.family import Opening
from mythos_edge.model.families.openmythos.config import FAMILY, MythosConfig, config_from_dict

_PARTS = (".recurrent.", ".prelude.", ".coda.", ".blocks.", ".embed.")


class OpenMythos:
    """The family of OpenMythos, as the table of families knows it."""

    name = FAMILY

    def recognises(self, names: Collection[str], config: Mapping[str, Any]) -> bool:
        del config
        # Wrappers may stand before a name; variants without a loop are refused by name when they are opened.
        return any(part in f".{name}" for name in names for part in _PARTS)

    def config_from(self, values: Mapping[str, Any], origin: str) -> MythosConfig:
        return config_from_dict(values, origin=origin)

    def open(self, opening: Opening) -> Any:
        from mythos_edge.model.families.openmythos.opening import open_openmythos

        return open_openmythos(opening)

    def recipes(self, config: MythosConfig, max_context: int) -> list[Any]:
        from mythos_edge.model.families.openmythos.layout import recipes

        return list(recipes(config, max_context))

    def network(self, config: MythosConfig, max_context: int, ops: Any = None) -> Any:
        from mythos_edge.model.families.openmythos.network import Network

        return Network(config, max_context, ops)
