"""``scripts/build_kernels``: compiles every kernel for every GPU, no GPU needed; ``--check`` compares with what ships.

One process per GPU, two at a time: LLVM ends the process when it cannot go on, and that becomes one error. The output
depends on the sources, on Triton's version and on nothing of the machine; archives are compared by their contents.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mythos_edge.model.errors import BackendUnavailable, BuildError, MythosEdgeError
from mythos_edge.model.output_files import writing
from mythos_edge.plugins.kernel_store import MANIFEST_NAME, archive_name
from mythos_edge.plugins.kernels import variants
from mythos_edge.plugins.kernels.variants import VARIANTS, Variant

SOURCES = Path(variants.__file__).resolve().parent
BUILT = SOURCES / "built"
# The most shared memory a program may have, in KiB. Source: CUDA programming guide, technical specifications.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 110: 227, 120: 99, 121: 99}
# The oldest version of PTX that knows the GPU: a newer one only asks for a newer driver.
_PTX_VERSION = {100: 86, 110: 90, 120: 87, 121: 88}
_OLDEST_PTX = 80
# Triton brings two assemblers. Code of the newer one wants a driver of CUDA 13 at least, and only Thor needs it.
_NEWER_ASSEMBLER_FOR = (110,)
_PROCESSES = 2


def source_sha256(folder: Path = SOURCES) -> dict[str, str]:
    """The digest of every source the kernels are made from, by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}


def build(gpus: Iterable[int], output: Path) -> dict[str, Any]:
    """The manifest of all kernels for ``gpus``; it and their archives are written into ``output``.

    Raises BuildError when a kernel does not compile or asks for more shared memory than its GPU has.
    """
    with ThreadPoolExecutor(_PROCESSES) as pool:
        made = dict(zip(gpus, pool.map(_built_apart, gpus), strict=True))
    manifest = {
        "schema": 1,
        "triton": metadata.version("triton"),
        "sources": source_sha256(),
        "kernels": {name: _described(variant, made) for name, variant in VARIANTS.items()},
        "gpus": {str(gpu): {name: record for name, (record, _) in made[gpu].items()} for gpu in made},
    }
    output.mkdir(parents=True, exist_ok=True)
    for gpu, kernels in made.items():
        _replace(output / archive_name(gpu), _packed({k: v for _, files in kernels.values() for k, v in files.items()}))
    _replace(output / MANIFEST_NAME, _manifest_text(manifest).encode())
    return manifest


def differences(gpus: Iterable[int], shipped: Path, sources: Path = SOURCES) -> list[str]:
    """The differences of ``shipped`` from what ``sources`` make, one phrase each; compiles only if sources match."""
    manifest = json.loads((shipped / MANIFEST_NAME).read_text())
    found = metadata.version("triton")
    if manifest["triton"] != found:
        raise BuildError(f"the kernels were built with triton {manifest['triton']}, got {found}: install that version")
    now = source_sha256(sources)
    if changed := sorted(name for name in now | manifest["sources"] if now.get(name) != manifest["sources"].get(name)):
        return [f"{name} changed" for name in changed]
    found_differences = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = build(gpus, Path(folder))
        if fresh["kernels"] != manifest["kernels"]:
            found_differences.append("the table of kernels")
        for gpu in gpus:
            old, new = manifest["gpus"].get(str(gpu), {}), fresh["gpus"][str(gpu)]
            names = sorted(name for name in old | new if old.get(name) != new.get(name))
            found_differences += [f"{name} for SM {gpu}" for name in names]
            path = archive_name(gpu)
            if not names and _unpacked(shipped / path) != _unpacked(Path(folder) / path):
                found_differences.append(path)
    return found_differences


def _described(variant: Variant, made: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The properties of a variant that are the same on every GPU."""
    hidden = {kernels[variant.name][0].pop("hidden_pointers") for kernels in made.values() if variant.name in kernels}
    assert len(hidden) <= 1, f"{variant.name} takes different arguments on different GPUs"
    return {
        "source": variant.source,
        "entry": variant.source.partition(":")[2],
        "arguments": [list(argument) for argument in variant.arguments],
        "hidden_pointers": hidden.pop() if hidden else 0,
        "grid": list(variant.grid),
    }


Built = dict[str, tuple[dict[str, Any], dict[str, bytes]]]


def _built_apart(gpu: int) -> Built:
    """Record and files of every kernel for one GPU, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        # Paths, caches and switches of this process must not reach the output.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {"TRITON_CACHE_DIR": str(Path(folder) / "cache"), "TRITON_DISABLE_LINE_INFO": "1"}
        if gpu not in _NEWER_ASSEMBLER_FOR:
            environment["TRITON_PTXAS_BLACKWELL_PATH"] = str(_older_assembler())
        command = [
            sys.executable,
            "-m",
            "mythos_edge.scripts.lab.build_kernels",
            "--worker",
            str(gpu),
            "--output",
            folder,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            at = done.stdout.split()[-1] if done.stdout.split() else "the start"
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BuildError(f"compiling {at} for SM {gpu} ended with {done.returncode}: {why}")
        records = json.loads((Path(folder) / "records.json").read_text())
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix in (".cubin", ".ptx")}
    return {
        name: (record, {f"{name}.{ending}": files[f"{name}.{ending}"] for ending in ("cubin", "ptx")})
        for name, record in records.items()
    }


def _older_assembler() -> Path:
    found = find_spec("triton")
    if found is None or found.origin is None:
        raise BackendUnavailable("compiling kernels needs triton, which is not installed", "pip install triton==3.9.0")
    return Path(found.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"


def _work(gpu: int, output: Path) -> None:
    """The worker: compiles all kernels for ``gpu`` into ``output``, saying the name of each before it begins."""
    records = {}
    for variant in VARIANTS.values():
        if gpu >= variant.oldest:
            print(variant.name, flush=True)
            records[variant.name] = _compiled(variant, gpu, output)
    (output / "records.json").write_text(json.dumps(records))


def _compiled(variant: Variant, gpu: int, output: Path) -> dict[str, Any]:
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tuned = variant.tuned(gpu)
    module, function = variant.source.split(":")
    source = getattr(import_module(f"mythos_edge.plugins.kernels.{module}"), function)
    # One source serves plain weights and codes.
    types = {name.removesuffix("_codes"): kind for name, kind in variant.arguments}
    types |= dict.fromkeys(tuned.constants, "constexpr")
    assert [*types] == source.arg_names, f"{variant.name}: the table says {[*types]}, the source {source.arg_names}"
    hints = _hints(variant)
    made = compiled(
        ASTSource(source, types, constexprs=dict(tuned.constants), attrs=hints),
        target=GPUTarget("cuda", gpu, 32),
        options={
            "num_warps": tuned.warps,
            "num_stages": tuned.stages,
            "ptx_version": _PTX_VERSION.get(gpu, _OLDEST_PTX),
            # Products and sums in one instruction, with one rounding.
            "enable_fp_fusion": True,
        },
    )
    shared = int(made.metadata.shared)
    if shared > SHARED_KIB[gpu] * 1024:
        raise BuildError(f"{variant.name} takes {shared} bytes of shared memory, SM {gpu} has {SHARED_KIB[gpu]} KiB")
    assert made.metadata.global_scratch_size == 0, f"{variant.name} wants scratch memory, which nobody gives it"
    cubin, text = made.asm["cubin"], made.asm["ptx"].encode("ascii")
    (output / f"{variant.name}.cubin").write_bytes(cubin)
    (output / f"{variant.name}.ptx").write_bytes(text)
    registers, spilled = _resources(output / f"{variant.name}.cubin")
    return {
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "ptx_sha256": hashlib.sha256(text).hexdigest(),
        "threads": 32 * int(made.metadata.num_warps),
        "shared_bytes": shared,
        "registers": registers,
        "spill_bytes": spilled,
        "hidden_pointers": _parameters(text.decode("ascii")) - len(variant.arguments),
    }


def _hints(variant: Variant) -> dict[tuple[int], list[list[Any]]]:
    """Facts that the compiler may take for granted of each argument, by its place."""
    hints: dict[tuple[int], list[list[Any]]] = {}
    for place, (name, kind) in enumerate(variant.arguments):
        multiple = 16 if variant.multiples and kind.startswith("*") else variant.multiples.get(name)
        if multiple:
            hints[(place,)] = [["tt.divisibility", multiple]]
    return hints


def _parameters(text: str) -> int:
    """How many parameters the kernel in PTX ``text`` takes."""
    found = re.search(r"\.visible \.entry \w+\((.*?)\)\n", text, re.DOTALL)
    assert found, "PTX without an entry"
    return len(re.findall(r"\.param \.", found[1]))


def _resources(cubin: Path) -> tuple[int, int]:
    """Registers a thread takes, and bytes of them that did not fit."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump has changed its words: {text}"
    return int(found[1]), int(found[2])


def _packed(files: Mapping[str, bytes]) -> bytes:
    """A tar archive of ``files`` without times and owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=9) as archive:
        # Kernels of one ending after each other: they resemble one another.
        for name in sorted(files, key=lambda name: (name.rpartition(".")[2], name)):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))
    return buffer.getvalue()


def _unpacked(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    """JSON with a line for each kernel, so that a change of one is a change of one line."""
    sections = []
    for key, value in manifest.items():
        if key not in ("kernels", "gpus"):
            sections.append(f"{json.dumps(key)}: {json.dumps(value, indent=1)}")
            continue
        groups = value.items() if key == "gpus" else [("", value)]
        texts = []
        for group, records in groups:
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(record)}" for name, record in records.items())
            texts.append(f"{json.dumps(group)}: {{\n{lines}}}" if group else lines)
        sections.append(f"{json.dumps(key)}: {{\n" + ",\n".join(texts) + "}")
    return "{\n" + ",\n".join(sections) + "}\n"


def _replace(path: Path, content: bytes) -> None:
    with writing(path, "the kernels") as file:
        file.write(content)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/build_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compile, and compare with what ships; write nothing")
    parser.add_argument(
        "--sm", type=int, action="append", choices=[*SHARED_KIB], help="this GPU only (may be repeated)"
    )
    parser.add_argument("--output", type=Path, default=BUILT, help="where the kernels are, or go to")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    gpus = arguments.sm or [*SHARED_KIB]
    try:
        if arguments.worker is not None:
            _work(arguments.worker, arguments.output)
        elif arguments.check:
            if found := differences(gpus, arguments.output):
                rest = f" and {len(found) - 5} more" if len(found) > 5 else ""
                raise BuildError(
                    f"{arguments.output} is stale: {', '.join(found[:5])}{rest}: run scripts/build_kernels"
                )
            print(f"{arguments.output} is what the sources make")
        else:
            build(gpus, arguments.output)
            size = sum(path.stat().st_size for path in arguments.output.iterdir())
            print(f"{len(VARIANTS)} kernels for SM {', '.join(map(str, gpus))}: {size / 1e6:.1f} MB")
    except MythosEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
