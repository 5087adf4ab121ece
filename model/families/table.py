"""The families that are known. Adding one is a folder like its neighbours and a line here."""

from mythos_edge.model.errors import ConfigError
from mythos_edge.model.families.dory.family import Dory
from mythos_edge.model.families.family import Config, Family
from mythos_edge.model.families.looped_llama.family import NANBEIGE, OURO
from mythos_edge.model.families.openmythos.family import OpenMythos
from mythos_edge.model.manifest import Manifest

FAMILIES: dict[str, Family] = {family.name: family for family in (OpenMythos(), OURO, NANBEIGE, Dory())}


def family_named(name: str) -> Family:
    """The family of that name. Raises ConfigError."""
    if name not in FAMILIES:
        raise ConfigError(f"family is {name!r}, expected one of {', '.join(FAMILIES)}: upgrade mythos-edge")
    return FAMILIES[name]


def config_of(manifest: Manifest) -> Config:
    """The config of a bundle's model. Raises ConfigError for a family that is not known, and for a damaged config."""
    return family_named(manifest.family).config_from(manifest.config, "manifest.config")
