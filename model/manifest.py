"""The manifest of a bundle: everything it says, and that it says nothing which cannot be. Standard library only.

Reading a manifest runs nothing of the bundle. It names every file with its size and sha256; names cannot leave the
folder. Non-goals: the files themselves (``bundle``), and writing them (``bundle_writer``).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import Any

from mythos_edge.model.errors import BundleError, ConfigError
from mythos_edge.model.looped import MOST_DEPTH, NARROW_CACHES, LoopedModel
from mythos_edge.model.stages import OWN, STAGES, StageTensor
from mythos_edge.model.typed_json import dataclass_from_json

SCHEMA_VERSION = 8
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
# Ends the names of graphs in standard ops alone, which are for other engines: no session runs them.
STANDARD_OPS = ".portable"
# Where the rotary table comes from: made from the config, or as the checkpoint stores it.
ROPE_TABLE_SOURCES = ("config", "stored")
# What the large weights can be stored in.
STORAGE_DTYPES = ("fp32", "fp16", "bf16")
# Positions are float32 numbers in the tables of angles, as in the reference: from here on not every one is exact.
MOST_CONTEXT = 1 << 24
# Why another kernel may come to other numbers than a golden sample's: what decides was too close to call.
TIES = ("", "router", "halting")
# Halting mass this close to the threshold, and experts this close for the router, can fall either way in float32.
NEAR_TIE_MARGIN = 1e-4
# Experts this close for the router are the same but for the rounding of their own sums.
EXACT_TIE_MARGIN = 1e-6
MOST_MANIFEST_BYTES = 4_000_000
_MOST_SAMPLE_TOKENS = 64
# What states and cached rows can be computed in; all of a bundle are of one.
_COMPUTED = ("float32", "float16", "bfloat16")
# The fields of the model that are left out where they say nothing.
_OPTIONAL = ("slot_windows", "cache_parts")
# They follow from the config.
_NOT_IN_IDENTITY = ("cache_parts",)


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; ``dtype`` is numpy's name, a string in ``shape`` is a free axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """A portable graph of the bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def graph_key(stage: str, cache: str | None = None, *, many: bool = False) -> str:
    """The key of a stage's graph in a target: for cached rows in the target's own form, or in one of NARROW_CACHES."""
    return ".".join([stage, *([cache] if cache in NARROW_CACHES else []), *(["many"] if many else [])])


@dataclass(frozen=True)
class TargetRecord:
    """The stages lowered for one kind of backend: stage name -> file.

    ``prelude``, ``step`` and ``coda`` have the inputs and outputs of the portable graph of their stage, for a batch of
    one; ``prelude.many`` and so on, where there are any, run the rows of several sequences at once, and those named by
    ``graph_key`` for one of ``NARROW_CACHES`` keep cached rows in that. ``model`` alone is
    one graph with the loop inside. ``weights`` says for each part of the model the form of its large matrices (fp32,
    fp16, bf16, int8, int4, fp8). ``fixed_bytes`` of weights are read once a token, ``step_bytes`` at each loop step (of
    the experts, the chosen ones). ``bundle`` is the identity of the bundle it was built from. ``summary`` is one line
    for people, ``note`` a warning. ``options`` are the fields of the ``kind``, which only its builder and its backend
    know (``target_options``).
    """

    kind: str
    graphs: dict[str, str]
    compute_dtype: str
    weights: dict[str, str]
    fixed_bytes: int
    step_bytes: int
    bundle: str
    summary: str
    note: str
    options: dict[str, Any]

    @property
    def is_native(self) -> bool:
        """Whether its graphs are native code."""
        return any(not file.endswith(".onnx") for file in self.graphs.values())

    @property
    def own_cache(self) -> str:
        """The form in which its own graphs keep cached rows."""
        return self.compute_dtype if self.is_native else "fp32"

    @property
    def caches(self) -> tuple[str, ...]:
        """The forms in which it can keep cached rows, its own first."""
        return (self.own_cache, *(cache for cache in NARROW_CACHES if graph_key("step", cache) in self.graphs))

    @property
    def has_loop_inside(self) -> bool:
        """Whether one graph runs all loop steps, without a cache."""
        return set(self.graphs) == {"model"}


@dataclass(frozen=True)
class Preset:
    """Depth parameters with a name, found by ``mythos-edge tune``, and what they were measured to give there.

    ``kl`` is the mean KL divergence to full depth in nats, ``speedup`` the time per token of full depth over theirs.
    """

    target: str
    max_depth: int
    threshold: float
    kl: float
    top1_agreement: float
    mean_depth: float
    speedup: float


@dataclass(frozen=True)
class FileRecord:
    """Size and hash a file must have."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from; ``sha256`` is over its tensors in the order they were read."""

    name: str
    kind: str
    sha256: str
    step: int | None


@dataclass(frozen=True)
class GoldenSample:
    """A self-test: the depth of each position after ``ids``, and the largest logits of the last.

    ``tie`` is "router" when two experts were equally good (within float32) at the edge of the chosen ones, "halting"
    when halting mass met the threshold, else empty: with a tie another kernel may rightly come to other numbers.
    """

    ids: tuple[int, ...]
    max_depth: int
    threshold: float
    depth: tuple[int, ...]
    top_ids: tuple[int, ...]
    top_logits: tuple[float, ...]
    tie: str = ""


@dataclass(frozen=True)
class EndToken:
    """A token that ends a text: its id, and what the tokenizer calls it; no ``text`` where there is none that does."""

    id: int
    text: str

    @property
    def name(self) -> str:
        """Its text, or its id where it has none."""
        return self.text or str(self.id)

    def __str__(self) -> str:
        shown = self.text if self.text.isprintable() else repr(self.text)
        return f"{shown} ({self.id})" if self.text else str(self.id)


@dataclass(frozen=True)
class ChatTemplate:
    """The Jinja template in ``file`` that makes a prompt of a talk, and the tokens that it may name, as texts."""

    file: str
    bos_token: str
    eos_token: str


@dataclass(frozen=True)
class Manifest:
    """All there is to know about a bundle; ``dtype`` is the storage dtype of the large weights."""

    family: str
    model: LoopedModel
    config: dict[str, Any]
    dtype: str
    max_context: int
    graphs: dict[str, GraphSpec]
    targets: dict[str, TargetRecord]
    files: dict[str, FileRecord]
    versions: dict[str, str]
    source: Source
    sample: GoldenSample
    tokenizer: str | None
    end_tokens: tuple[EndToken, ...]
    chat_template: ChatTemplate | None
    rope_table: str
    presets: dict[str, Preset]
    created: str

    @property
    def identity(self) -> str:
        """Equal for bundles whose caches mean the same: same weights as stored, config and longest context."""
        return bundle_identity(self.source, self.dtype, self.max_context, self.family, self.config, self.model)

    @property
    def default_target(self) -> str:
        """The target that runs when none is asked for: the first."""
        return next(iter(self.targets))

    def files_of(self, target: str) -> set[str]:
        """The files that belong to a target."""
        beginnings = (f"weights.{target}.", f"build.{target}.")
        graphs = set(self.targets[target].graphs.values())
        return graphs | {name for name in self.files if name.startswith(beginnings)}

    @property
    def shared_files(self) -> set[str]:
        """The files that belong to no target, and that every target may read."""
        return set(self.files).difference(*map(self.files_of, self.targets)) | self._named()

    @property
    def text_files(self) -> set[str]:
        """The files that text needs, whatever the target: tokenizer and chat template."""
        template = None if self.chat_template is None else self.chat_template.file
        return {file for file in (self.tokenizer, template) if file is not None}

    @property
    def is_packed(self) -> bool:
        """Whether it holds some targets alone, without the graphs and weights that others are built from."""
        return not self.graphs

    def _named(self) -> set[str]:
        weights = () if self.is_packed else (WEIGHTS_FILE,)
        return {*weights, *(graph.file for graph in self.graphs.values()), *self.text_files}

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE_DTYPES:
            raise BundleError(f"dtype is {self.dtype!r}, expected one of {', '.join(STORAGE_DTYPES)}")
        if self.rope_table not in ROPE_TABLE_SOURCES:
            raise BundleError(f"rope_table is {self.rope_table!r}, expected one of {', '.join(ROPE_TABLE_SOURCES)}")
        if not 1 <= self.max_context <= MOST_CONTEXT:
            raise BundleError(f"max_context is {self.max_context}, expected 1 to {MOST_CONTEXT}")
        _check_sample(self.sample, self.model, self.max_context)
        _check_stages(self.graphs, self.model)
        if not self.targets:
            raise BundleError("targets is empty, expected at least one target")
        for name, preset in self.presets.items():
            if not 1 <= preset.max_depth <= MOST_DEPTH:
                raise BundleError(f"presets.{name}.max_depth is {preset.max_depth}, expected 1 to {MOST_DEPTH}")
        used = self._named().union(*(target.graphs.values() for target in self.targets.values()))
        for name in [*self.files, *used]:
            _check_name(name, "file")
        # Files of a target are named after it.
        for name in self.targets:
            _check_name(name, "target")
        unlisted = sorted(used - set(self.files))
        if unlisted:
            raise BundleError(f"files does not list {unlisted[0]!r}, which the manifest uses")
        for name, record in self.files.items():
            if len(record.sha256) != 64 or set(record.sha256) - set("0123456789abcdef"):
                raise BundleError(f"files.{name}.sha256 is {record.sha256!r}, expected 64 hexadecimal digits")


def _check_sample(sample: GoldenSample, model: LoopedModel, max_context: int) -> None:
    """Raises BundleError for a self-test that no export can have written."""
    tokens, most, vocab = len(sample.ids), min(max_context, _MOST_SAMPLE_TOKENS), range(model.vocab_size)
    checks = {
        f"{tokens} ids, expected 1 to {most}": 1 <= tokens <= most,
        f"ids that are not in 0 .. {vocab[-1]}": all(number in vocab for number in sample.ids),
        f"{len(sample.depth)} depths for {tokens} ids": len(sample.depth) == tokens,
        f"max_depth {sample.max_depth}, expected 1 to {model.max_depth}": (1 <= sample.max_depth <= model.max_depth),
        f"depths that are not in 1 .. {sample.max_depth}": all(
            1 <= depth <= sample.max_depth for depth in sample.depth
        ),
        f"threshold {sample.threshold}, expected {model.threshold}": sample.threshold == model.threshold,
        f"top_ids that are not in 0 .. {vocab[-1]}": all(number in vocab for number in sample.top_ids),
        f"{len(sample.top_logits)} top_logits for {len(sample.top_ids)} top_ids": (
            len(sample.top_logits) == len(sample.top_ids) > 0
        ),
        f"tie {sample.tie[:40]!r}, expected one of {', '.join(map(repr, TIES))}": sample.tie in TIES,
    }
    wrong = next((what for what, good in checks.items() if not good), None)
    if wrong is not None:
        raise BundleError(f"sample has {wrong}: it was damaged or edited")


def _check_stages(graphs: Mapping[str, GraphSpec], model: LoopedModel) -> None:
    """Raises BundleError for a graph of a stage whose inputs and outputs are not those that ``STAGES`` declares."""
    present = [graphs[name] for name in STAGES if name in graphs]
    own = next((one.dtype for graph in present for one in graph.inputs if one.name.startswith("past")), "float32")
    if own not in _COMPUTED:
        raise BundleError(f"graphs compute in {own!r}, expected one of {', '.join(_COMPUTED)}")
    for stage in (STAGES[name] for name in graphs if name in STAGES):
        graph, slots = graphs[stage.name], model.slots[stage.name]
        for kind, found, tensors in (("input", graph.inputs, stage.inputs), ("output", graph.outputs, stage.outputs)):
            expected = [_spec(name, tensor, model, own) for name, tensor in stage.names_of(tensors, slots)]
            for one, wanted in zip_longest(found, expected):
                if one != wanted:
                    raise BundleError(
                        f"graphs.{stage.name} has {_told(one)} where the {kind} {_told(wanted)} is expected: "
                        "it was damaged or edited"
                    )


def _spec(name: str, tensor: StageTensor, model: LoopedModel, own: str) -> TensorSpec:
    shape = tuple(getattr(model, axis) if hasattr(model, axis) else axis for axis in tensor.axes)
    return TensorSpec(name, own if tensor.dtype == OWN else tensor.dtype, shape)


def _told(spec: TensorSpec | None) -> str:
    return "nothing" if spec is None else f"{spec.name} ({spec.dtype}, {list(spec.shape)})"


def bundle_identity(
    source: Source, dtype: str, max_context: int, family: str, config: Mapping[str, Any], model: LoopedModel
) -> str:
    """A hash that is equal for bundles whose caches mean the same; see ``Manifest.identity``."""
    fields = {name: value for name, value in _of_model(model).items() if name not in _NOT_IN_IDENTITY}
    parts = [source.sha256, dtype, max_context, family, dict(config), fields]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def manifest_to_dict(manifest: Manifest) -> dict[str, Any]:
    """The JSON object that is written as manifest.json."""
    return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(manifest), "model": _of_model(manifest.model)}


def _of_model(model: LoopedModel) -> dict[str, Any]:
    """The fields of a model; without those that say nothing as versions that did not know them wrote it."""
    fields = dataclasses.asdict(model)
    return {name: value for name, value in fields.items() if value or name not in _OPTIONAL}


def manifest_from_dict(values: Mapping[str, Any], *, origin: str) -> Manifest:
    """The manifest in ``values``; ``origin`` names it in errors. Raises BundleError for anything unexpected."""
    version = values.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise BundleError(f"{origin}: schema_version is {version!r}, expected {SCHEMA_VERSION}")
    if version < SCHEMA_VERSION:
        raise BundleError(
            f"{origin}: made by an older mythos-edge (schema {version}, this one reads {SCHEMA_VERSION}): export again"
        )
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{origin}: made by a newer mythos-edge (schema {version}, this one reads {SCHEMA_VERSION}): upgrade it"
        )
    rest = {name: value for name, value in values.items() if name != "schema_version"}
    if isinstance(model := rest.get("model"), dict):
        rest["model"] = {**{name: [] for name in _OPTIONAL}, **model}
    try:
        return dataclass_from_json(Manifest, rest, "manifest")
    except (BundleError, ConfigError) as error:
        raise BundleError(f"{origin}: {error}") from None


def _check_name(name: str, kind: str) -> None:
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name
    if unsafe or not path.parts or name == MANIFEST_FILE:
        raise BundleError(f"{kind} name {name!r} leaves the bundle's folder: do not trust this bundle")
