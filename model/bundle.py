"""The bundle: one folder with a manifest, where exporter and runtime meet. Standard library only.

Reading a bundle runs nothing of it. The manifest names every file with its size and sha256; names cannot leave the
folder. A file may be a link out of it, as in a cache of downloads, if what it leads to has the sha256 that is listed.

A bundle may be replaced, and a target built again, while others read it (``bundle_writer`` says how). So what is opened
after the manifest was read is opened within ``Bundle.unchanged``, which compares the manifest again, afterwards: what
was opened is what this manifest lists, or a BundleError. Not here: writing a bundle (``bundle_writer``).
"""

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mythos_edge.model.bounded_files import open_regular, read_json
from mythos_edge.model.config import MOST_DEPTH, MythosConfig
from mythos_edge.model.errors import BundleError, ConfigError, MythosEdgeError
from mythos_edge.model.foreign_files import foreign_kind
from mythos_edge.model.typed_json import dataclass_from_json

SCHEMA_VERSION = 5
MANIFEST_FILE = "manifest.json"
# What every export has; built targets add what their weights are.
TARGET = "ort-cpu"
WEIGHTS_FILE = "weights.safetensors"
# Ends the names of graphs in standard ops alone, which are for other engines: no session runs them.
STANDARD_OPS = ".portable"
# Where the rotary table comes from: made from the config, or as the checkpoint stores it.
ROPE_TABLE_SOURCES = ("config", "stored")
# What the large weights can be stored in.
STORAGE_DTYPES = ("fp32", "fp16", "bf16")
# What the targets of ONNX Runtime's CUDA provider begin with.
CUDA_TARGET = "ort-cuda"
# ONNX Runtime's names of what runs a graph's nodes.
CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
# What the names of nodes begin with that compute with shapes alone: of a graph for a GPU, what the CPU may run.
ON_SHAPES = "on_shapes/"
STAGES = ("prelude", "step", "coda")
# Sequences that one run of a target's ``.many`` graphs can serve.
MAX_TOGETHER = 8
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
_HASH_CHUNK_BYTES = 4 << 20
# What makes files of the links that a cache of downloads is made of.
COPY_LINKS = "download it with `hf download REPOSITORY --local-dir FOLDER`, or copy it with `cp -rL`"


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


@dataclass(frozen=True)
class Profile:
    """Rows of a chunk that an engine was tuned for: ``max_rows`` at most, ``opt_rows`` best."""

    opt_rows: int
    max_rows: int


@dataclass(frozen=True)
class EngineSpec:
    """What must be so for the TensorRT engines of a target to be loaded.

    ``flavour`` is ``rtx`` (TensorRT for RTX) or ``trt``, ``version`` the one that built them, ``compute_capabilities``
    the GPUs they were built for (89 for SM 8.9), ``device`` the one GPU model that the plans of ``trt`` are for ("" for
    ``rtx``). ``layout`` is ``step`` (an engine a stage) or ``loop`` (one with the
    loop inside). Caches have room for ``max_context`` columns and ``max_rows`` beyond, which the padding of a chunk
    may touch. ``plugin_layers`` counts the plugins of each engine, and ``kernels`` is the sha256 of the manifest of the
    kernels they carry.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[int, ...]
    device: str
    layout: str
    max_context: int
    max_rows: int
    profiles: tuple[Profile, ...]
    plugin_layers: dict[str, int]
    kernels: str


@dataclass(frozen=True)
class TargetSpec:
    """The stages lowered for one backend: stage name -> file.

    ``prelude``, ``step`` and ``coda`` have the inputs and outputs of the portable graph of their stage, for a batch of
    one; ``prelude.many`` and so on, where there are any, run the rows of several sequences at once.
    ``weights`` is fp32, int8 or int4, in blocks of ``block`` values that share a scale (0 for fp32), ``method`` how
    they were rounded, and ``kept`` names the parts that stay fp32. ``prepacked`` weights are copied into the kernels'
    own layout when loaded, others are read from the mapped file. ``fixed_bytes`` of weights are read once a token,
    ``step_bytes`` at each loop step (of the experts, the chosen ones). ``bundle`` is the identity of the bundle it was
    built from. ``providers`` of ONNX Runtime run it, the first that can each node; none for TensorRT's targets, which
    have ``engine`` and whose graphs are engines: one a stage, or ``model`` alone.
    """

    graphs: dict[str, str]
    compute_dtype: str
    weights: str
    block: int
    method: str
    kept: tuple[str, ...]
    prepacked: bool
    fixed_bytes: int
    step_bytes: int
    bundle: str
    note: str
    engine: EngineSpec | None
    providers: tuple[str, ...] = ()


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
class Manifest:
    """All there is to know about a bundle; ``dtype`` is the storage dtype of the large weights."""

    config: MythosConfig
    dtype: str
    max_context: int
    graphs: dict[str, GraphSpec]
    targets: dict[str, TargetSpec]
    files: dict[str, FileRecord]
    versions: dict[str, str]
    source: Source
    sample: GoldenSample
    tokenizer: str | None
    end_tokens: tuple[EndToken, ...]
    rope_table: str
    presets: dict[str, Preset]
    created: str

    @property
    def identity(self) -> str:
        """Equal for bundles whose caches mean the same: same weights as stored, config and longest context."""
        return bundle_identity(self.source, self.dtype, self.max_context, self.config)

    def files_of(self, target: str) -> set[str]:
        """The files that were built with a target; for ``TARGET`` those of the export, which every target may read."""
        if target == TARGET:
            built = [self.files_of(name) for name in self.targets if name != TARGET]
            return set(self.files).difference(*built) | self._exported()
        graphs = set(self.targets[target].graphs.values())
        beginnings = (f"weights.{target}.", f"build.{target}.")
        return graphs | {name for name in self.files if name.startswith(beginnings)}

    def _exported(self) -> set[str]:
        graphs = self.targets[TARGET].graphs.values() if TARGET in self.targets else ()
        tokenizer = () if self.tokenizer is None else (self.tokenizer,)
        return {WEIGHTS_FILE, *(graph.file for graph in self.graphs.values()), *graphs, *tokenizer}

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE_DTYPES:
            raise BundleError(f"dtype is {self.dtype!r}, expected one of {', '.join(STORAGE_DTYPES)}")
        if self.rope_table not in ROPE_TABLE_SOURCES:
            raise BundleError(f"rope_table is {self.rope_table!r}, expected one of {', '.join(ROPE_TABLE_SOURCES)}")
        if not 1 <= self.max_context <= MOST_CONTEXT:
            raise BundleError(f"max_context is {self.max_context}, expected 1 to {MOST_CONTEXT}")
        _check_sample(self.sample, self.config, self.max_context)
        for name, preset in self.presets.items():
            if not 1 <= preset.max_depth <= MOST_DEPTH:
                raise BundleError(f"presets.{name}.max_depth is {preset.max_depth}, expected 1 to {MOST_DEPTH}")
        used = self._exported().union(*(target.graphs.values() for target in self.targets.values()))
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


def _check_sample(sample: GoldenSample, config: MythosConfig, max_context: int) -> None:
    """Raises BundleError for a self-test that no export can have written."""
    tokens, most, vocab = len(sample.ids), min(max_context, _MOST_SAMPLE_TOKENS), range(config.vocab_size)
    checks = {
        f"{tokens} ids, expected 1 to {most}": 1 <= tokens <= most,
        f"ids that are not in 0 .. {vocab[-1]}": all(number in vocab for number in sample.ids),
        f"{len(sample.depth)} depths for {tokens} ids": len(sample.depth) == tokens,
        f"max_depth {sample.max_depth}, expected 1 to {config.max_loop_iters}": (
            1 <= sample.max_depth <= config.max_loop_iters
        ),
        f"depths that are not in 1 .. {sample.max_depth}": all(
            1 <= depth <= sample.max_depth for depth in sample.depth
        ),
        f"threshold {sample.threshold}, expected {config.act_threshold}": sample.threshold == config.act_threshold,
        f"top_ids that are not in 0 .. {vocab[-1]}": all(number in vocab for number in sample.top_ids),
        f"{len(sample.top_logits)} top_logits for {len(sample.top_ids)} top_ids": (
            len(sample.top_logits) == len(sample.top_ids) > 0
        ),
        f"tie {sample.tie[:40]!r}, expected one of {', '.join(map(repr, TIES))}": sample.tie in TIES,
    }
    wrong = next((what for what, good in checks.items() if not good), None)
    if wrong is not None:
        raise BundleError(f"sample has {wrong}: it was damaged or edited")


def bundle_identity(source: Source, dtype: str, max_context: int, config: MythosConfig) -> str:
    """See ``Manifest.identity``."""
    parts = [source.sha256, dtype, max_context, config.to_dict()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def manifest_to_dict(manifest: Manifest) -> dict[str, Any]:
    """What is written as manifest.json."""
    return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(manifest)}


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
    try:
        return dataclass_from_json(Manifest, rest, "manifest")
    except (BundleError, ConfigError) as error:
        raise BundleError(f"{origin}: {error}") from None


def _check_name(name: str, kind: str) -> None:
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name
    if unsafe or not path.parts or name == MANIFEST_FILE:
        raise BundleError(f"{kind} name {name!r} leaves the bundle's folder: do not trust this bundle")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: where it is and what it says.

    With ``trust_engines`` TensorRT engines may be other files than those listed.
    """

    path: Path
    manifest: Manifest
    trust_engines: bool = False
    # By name of a link out of the folder: the file that was found to be the one listed, for copies of this, too.
    _followed: dict[str, tuple[object, ...]] = field(default_factory=dict, compare=False, repr=False)

    def target(self, name: str) -> TargetSpec:
        """The target of that name, with the presence and size of its own files checked.

        Raises BundleError when there is none, it was built from another bundle or a file of it is damaged.
        """
        targets, identity = self.manifest.targets, self.manifest.identity
        if name not in targets:
            known = ", ".join(targets) or "none"
            raise BundleError(f"{self.path}: has no target {name!r}, only {known}: mythos-edge build makes one")
        if TARGET in targets and targets[TARGET].bundle != identity:
            raise BundleError(
                f"{self.path / MANIFEST_FILE}: config, dtype, max_context or source are not those of the export: "
                "export the bundle again"
            )
        if targets[name].bundle != identity:
            raise BundleError(
                f"{self.path}: target {name!r} was built from another version of this bundle: build it again"
            )
        if name != TARGET:
            self._check_files_of(name)
        return targets[name]

    def at_absolute_path(self) -> "Bundle":
        """The same bundle, for work to come: another working folder does not move it."""
        return dataclasses.replace(self, path=self.path.absolute())

    def _check_files_of(self, target: str) -> None:
        """Raises BundleError as ``check_files`` does, or because the files are of another bundle by now."""
        try:
            check_files(self, self.manifest.files_of(target))
        except BundleError:
            self.require_unchanged(target)
            raise

    def weights_identity(self, target: str) -> str:
        """Equal for targets whose caches mean the same: the same weights, rounded alike."""
        spec = self.manifest.targets[target]
        if spec.engine is not None:
            parts = [self.manifest.identity, spec.compute_dtype, spec.weights, spec.method, str(spec.block)]
            return hashlib.sha256(" ".join(parts).encode()).hexdigest()
        own = self.own_weights(target)
        if not own:
            return self.manifest.identity
        # By content: the names of files are others where a target was built again.
        parts = [self.manifest.identity, *sorted(record.sha256 for record in own.values())]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def own_weights(self, target: str) -> dict[str, FileRecord]:
        """The files of weights that only the target has: rounded or narrowed ones."""
        return {name: record for name, record in self.manifest.files.items() if name.startswith(f"weights.{target}.")}

    def file(self, name: str) -> Path:
        """The path of a listed file.

        Raises BundleError when it is not listed, or is a link out of the folder to another file than the one listed.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r}")
        if self.leads_out(name) and name not in _trusted(self):
            self._follow(name, self.path / name)
        return self.path / name

    def require_own_files(self) -> None:
        """Raises BundleError for a bundle of links out of its folder, which may be a cache that others share."""
        if any(self.leads_out(name) for name in self.manifest.files_of(TARGET)):
            raise BundleError(
                f"{self.path}: is a bundle of links out of its folder, in which nothing is changed: {COPY_LINKS}"
            )

    def leads_out(self, name: str) -> bool:
        """Whether a listed file is a link out of the folder. Raises BundleError where that cannot be told."""
        try:
            return not (self.path / name).resolve().is_relative_to(self.path.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # a link to itself is a RuntimeError before Python 3.13
            raise BundleError(f"{self.path}: file name {name[:80]!r} cannot be used: {error}") from None

    def _follow(self, name: str, link: Path) -> None:
        """Raises BundleError unless a link out of the folder leads to the file that is listed.

        Its size tells most others at once; the right one is read, once for each opened bundle.
        """
        listed = self.manifest.files[name]
        try:
            found = link.stat()
            file = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            marks = (*file, listed.sha256)
            if self._followed.get(name) == marks:
                return
            same = stat.S_ISREG(found.st_mode) and found.st_size == listed.bytes and sha256_of(link) == listed.sha256
        except FileNotFoundError:
            raise BundleError(f"{link}: is a link to a file that is missing: {COPY_LINKS}") from None
        except OSError as error:
            raise BundleError(f"{link}: cannot be read: {error.strerror}") from error
        if not same:
            raise BundleError(
                f"{link}: is a link out of the bundle's folder, to another file than the manifest lists: do not trust "
                f"this bundle, or {COPY_LINKS}"
            )
        self._followed[name] = marks

    @contextmanager
    def unchanged(self, target: str = TARGET) -> Iterator[None]:
        """Holds what the block opens to this manifest: the files of the export, and those of ``target``.

        Raises BundleError where the bundle on the disk is another one now, or the target was built again.
        """
        try:
            yield
        except (MythosEdgeError, OSError):
            # Where files were replaced, that is the reason, and not what came of it.
            self.require_unchanged(target)
            raise
        self.require_unchanged(target)

    def require_unchanged(self, target: str) -> None:
        """Raises BundleError where the bundle on the disk is another one now, or the target was built again."""
        mend = "while it was open: open it again"
        try:
            now = read_manifest(self.path)
        except BundleError as error:
            raise BundleError(f"{self.path}: the bundle was replaced or removed {mend}") from error
        if now.identity != self.manifest.identity or self.differs_from(now, TARGET):
            raise BundleError(f"{self.path}: the bundle was replaced {mend}")
        if self.differs_from(now, target):
            raise BundleError(f"{self.path}: target {target!r} was built again {mend}")

    def differs_from(self, now: Manifest, target: str) -> bool:
        """Whether the manifest ``now`` says otherwise of a target, or of a file that was built with it."""
        own = self.manifest
        if own.targets.get(target) != now.targets.get(target):
            return True
        # Made again from the others at any time, which concerns nobody who has the bundle open.
        remade = {graph.file for name, graph in own.graphs.items() if name.endswith(STANDARD_OPS)}
        return any(now.files.get(name) != own.files[name] for name in own.files_of(target) - remade)


def open_bundle(path: Path | str, hashes: bool = False, trust_engines: bool = False) -> Bundle:
    """The bundle at ``path``, with the presence and size of the export's files checked, and on request every sha256.

    A built target's own files are checked by ``Bundle.target``: a damaged one keeps no other from running, and can be
    built again. With ``trust_engines`` TensorRT engines may be other files than those listed. Raises BundleError.
    """
    bundle = Bundle(Path(path), read_manifest(Path(path)), trust_engines)
    bundle._check_files_of(TARGET)
    if hashes:
        verify_hashes(bundle)
    return bundle


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of the bundle at ``path`` and looks at no other file. Raises BundleError."""
    manifest_path = path / MANIFEST_FILE
    if not has_manifest(path):
        what = "has no manifest.json" if path.is_dir() else "is no bundle folder" if path.exists() else "does not exist"
        raise BundleError(f"{path} {what}: make a bundle with mythos-edge export")
    try:
        values = read_json(manifest_path, MOST_MANIFEST_BYTES, "a manifest")
    except OSError as error:
        raise BundleError(f"{manifest_path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        known = _foreign(manifest_path)
        raise BundleError(f"{manifest_path}: {f'is {known}' if known else f'cannot be read: {error}'}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{manifest_path}: expected a JSON object, got {type(values).__name__}")
    return manifest_from_dict(values, origin=str(manifest_path))


def has_manifest(path: Path) -> bool:
    """Whether ``path`` is a folder with a manifest. Raises BundleError when it does not let itself be looked into."""
    try:
        return stat.S_ISREG((path / MANIFEST_FILE).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def _trusted(bundle: Bundle) -> set[str]:
    """The files that may differ from those listed."""
    engines = [spec for spec in bundle.manifest.targets.values() if bundle.trust_engines and spec.engine is not None]
    return {name for spec in engines for name in spec.graphs.values()}


def check_files(bundle: Bundle, names: Collection[str]) -> None:
    """Raises BundleError unless the files are there, can be read and have the sizes that are listed."""
    trusted = _trusted(bundle)
    for name in sorted(names):
        file, listed = bundle.file(name), bundle.manifest.files[name].bytes
        try:
            size = _size(file)
        except OSError as error:
            raise BundleError(f"{file}: cannot be read: {error.strerror}") from error
        if size is None:
            raise BundleError(f"{file}: is missing: {_mend(bundle, name)}")
        if size != listed and name not in trusted and (known := _foreign(file)):
            raise BundleError(f"{file}: is {known}")
        if size != listed and name not in trusted:
            raise BundleError(f"{file}: has {size} bytes, the manifest says {listed}: {_mend(bundle, name)}")


def _foreign(file: Path) -> str | None:
    """The kind of a file that stands in place of another, such as a pointer to it, and what to do about it."""
    with open_regular(file) as opened:
        return foreign_kind(opened.read(512))


def _size(file: Path) -> int | None:
    """Bytes of a file that can be opened; None where there is none. Raises OSError."""
    if not file.is_file():
        return None
    # Native code that maps it would say less clearly that it may not.
    with file.open("rb") as opened:
        return os.fstat(opened.fileno()).st_size


def _mend(bundle: Bundle, name: str) -> str:
    """What brings a file back."""
    exported = name in bundle.manifest.files_of(TARGET)
    return "export the bundle again" if exported else "build the target again"


def verify_hashes(
    bundle: Bundle, progress: Callable[[str], None] = lambda name: None, names: Collection[str] | None = None
) -> None:
    """Reads the files, all unless named, and compares each sha256; ``progress`` hears the names. Raises BundleError."""
    names = set(bundle.manifest.files if names is None else names)
    check_files(bundle, names)
    for name in sorted(names - _trusted(bundle)):
        progress(name)
        try:
            found = sha256_of(bundle.file(name))
        except OSError as error:
            raise BundleError(f"{bundle.path / name}: cannot be read: {error.strerror}") from error
        listed = bundle.manifest.files[name].sha256
        if found != listed:
            raise BundleError(
                f"{bundle.path / name}: has changed: sha256 {found[:12]}..., the manifest says {listed[:12]}...: "
                f"{_mend(bundle, name)}"
            )


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
