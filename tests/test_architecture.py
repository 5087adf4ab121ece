"""The rules of the house: who imports whom, what imports light, and that every module is packaged."""

import ast
import graphlib
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest

import mythos_edge
from mythos_edge.model.families.table import FAMILIES

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "model",
    "model/families",
    "model/families/dory",
    "model/families/looped_llama",
    "model/families/openmythos",
    "plugins",
    "plugins/kernels",
    "exporter",
    "exporter/lowering",
    "exporter/targets",
    "runtime",
    "runtime/backends",
    "runtime/integrations",
    "scripts",
    "scripts/lab",
)
# What is not installed under the name of its folder: the root package, and one in a namespace of another package.
RENAMED = {"scripts/package": "mythos_edge", "scripts/optimum_command": "optimum.commands.register"}
MAY_IMPORT = {
    "model": set(),
    "model/families": set(),
    "model/families/dory": set(),
    "model/families/looped_llama": set(),
    "model/families/openmythos": set(),
    "plugins": {"model"},
    "plugins/kernels": {"plugins"},
    "exporter": {"plugins", "model"},
    "exporter/lowering": {"plugins", "model"},
    "exporter/targets": {"plugins", "model"},
    "runtime": {"plugins", "model"},
    "runtime/backends": {"plugins", "model"},
    "runtime/integrations": {"plugins", "model"},
    "scripts": {"exporter", "runtime", "plugins", "model"},
    "scripts/lab": {"exporter", "runtime", "plugins", "model"},
    "scripts/optimum_command": set(),
    "scripts/package": {"runtime", "model"},
}
# A function that is longer wants to be two; Triton kernels cannot be cut.
MOST_LINES, MOST_LINES_OF_FUNCTION = 450, 60
# What the base install can run: neither torch nor onnx.
NEED_TORCH = {
    *(
        "checkpoint",
        "eager_ops",
        "entry_reader",
        "layers",
        "layout",
        "network",
        "recipes",
        "stored_checkpoint",
        "tensor_choice",
    ),
    "observed",
    "tensor_checks",
    "tensor_difference",
    "tensor_files",
    "rotary_recipes",
}
IMPORT_LIGHT = [
    *(f"model.{path.stem}" for path in sorted((ROOT / "model").glob("*.py")) if path.stem not in NEED_TORCH),
    "model.families.family",
    "model.families.table",
    "plugins.processor",
    "plugins.kernel_store",
    "plugins.kernels.variants",
    "plugins.launches",
    *(f"runtime.{path.stem}" for path in sorted((ROOT / "runtime").glob("*.py"))),
    *(f"runtime.backends.{path.stem}" for path in sorted((ROOT / "runtime" / "backends").glob("*.py"))),
    "runtime.integrations.transformers",
    "scripts.cli",
    "scripts.addition",
]
MODULES = [(folder, path.stem) for folder in (*FOLDERS, *RENAMED) for path in sorted((ROOT / folder).glob("*.py"))]


# The only modules that may need Triton; no process that runs a model imports them.
TRITON_SOURCES = {path for path in (ROOT / "plugins" / "kernels").glob("*.py") if path.stem != "variants"}


def _package(folder: str) -> str:
    return RENAMED.get(folder, f"mythos_edge.{folder.replace('/', '.')}")


def _imported_folders(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = (
                [str(node.module)] if node.module != "mythos_edge" else [f"mythos_edge.{a.name}" for a in node.names]
            )
        found |= {name.split(".")[1] for name in names if name.startswith("mythos_edge.")}
    return found


@pytest.mark.parametrize(("folder", "module"), MODULES)
def test_imports_point_one_way(folder: str, module: str) -> None:
    foreign = _imported_folders(ROOT / folder / f"{module}.py") - {folder.partition("/")[0]}
    assert foreign <= MAY_IMPORT[folder]


def _imported_modules(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports anywhere, inside functions, too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & known


def test_no_files_import_each_other_in_a_circle() -> None:
    paths = {f"{_package(folder)}.{module}": ROOT / folder / f"{module}.py" for folder, module in MODULES}
    imports = {name: _imported_modules(path, set(paths)) - {name} for name, path in paths.items()}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


@pytest.mark.parametrize(("folder", "module"), MODULES)
def test_no_file_and_no_function_is_too_long_to_read(folder: str, module: str) -> None:
    text = (ROOT / folder / f"{module}.py").read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and folder != "plugins/kernels":
            assert (node.end_lineno or 0) - node.lineno < MOST_LINES_OF_FUNCTION, node.name


@pytest.mark.parametrize(("folder", "module"), MODULES)
def test_docstrings_stand_alone(folder: str, module: str) -> None:
    """A first sentence is read without the file around it, in the reference and in tooltips."""
    tree = ast.parse((ROOT / folder / f"{module}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    # The sources of kernels are as they were when they were compiled, to the letter.
    for node in ast.walk(tree) if folder != "plugins/kernels" else ():
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (told := ast.get_docstring(node)):
            assert not told.startswith(("What ", "See ")), told


KIND_OF_TARGET = re.compile(r"(ort-cpu|ort-cuda|rtx-sm|trt-sm|trt-this-gpu)[\w+.-]*")


@pytest.mark.parametrize(("folder", "module"), MODULES)
def test_targets_are_named_where_they_are_declared(folder: str, module: str) -> None:
    """Prose, as in an example of a command, has spaces and may name one."""
    if folder in ("exporter/targets", "runtime/backends", "scripts/lab"):
        return
    for node in ast.walk(ast.parse((ROOT / folder / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not KIND_OF_TARGET.fullmatch(node.value), node.value


OF_A_FAMILY = re.compile(r"mythos_edge\.model\.families\.\w+\.")


@pytest.mark.parametrize(("folder", "module"), MODULES)
def test_families_are_named_where_they_are_declared(folder: str, module: str) -> None:
    """Benches and training in the laboratory are of OpenMythos, whose package is the reference."""
    if folder.startswith("model/families") or folder == "scripts/lab":
        return
    for node in ast.walk(ast.parse((ROOT / folder / f"{module}.py").read_text(encoding="utf-8"))):
        named = isinstance(node, ast.ImportFrom) and bool(OF_A_FAMILY.match(str(node.module)))
        named |= isinstance(node, ast.Constant) and node.value in (*FAMILIES, "open_mythos")
        assert not named, ast.unparse(node)


def test_nothing_imports_the_integrations() -> None:
    for folder, module in MODULES:
        text = (ROOT / folder / f"{module}.py").read_text(encoding="utf-8")
        assert folder in ("runtime/integrations", "scripts/lab") or "integrations" not in text, f"{folder}/{module}.py"


def test_triton_is_imported_by_kernel_sources_alone() -> None:
    """And inside functions by the script that compiles them."""
    for folder, module in MODULES:
        path = ROOT / folder / f"{module}.py"
        at_import = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        names = {alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in at_import if isinstance(node, ast.ImportFrom)}
        uses = any(name.partition(".")[0] == "triton" or name.endswith("kernels.codes") for name in names)
        assert not uses or path in TRITON_SOURCES, f"{path} imports triton"


@pytest.mark.parametrize(("folder", "module"), MODULES)
def test_every_module_is_installed(folder: str, module: str) -> None:
    installed = resources.files(_package(folder)) / f"{module}.py"
    assert installed.is_file(), "reinstall after adding a file: pip install -e ."


@pytest.mark.parametrize(("folder", "module"), MODULES)
def test_no_module_bears_a_name_of_the_standard_library(folder: str, module: str) -> None:
    assert module not in sys.stdlib_module_names


def test_types_are_published() -> None:
    assert (resources.files("mythos_edge") / "py.typed").is_file()


def test_the_root_package_costs_nothing_until_it_is_used() -> None:
    script = "import sys, mythos_edge\nassert not {'numpy', 'importlib.metadata', 'onnxruntime'} & set(sys.modules)\n"
    script += "assert len(mythos_edge.__all__) == len({id(getattr(mythos_edge, n)) for n in mythos_edge.__all__})\n"
    script += "from mythos_edge import Session, __version__\nprint(Session.__module__, __version__)\n"
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["mythos_edge.runtime.session", metadata.version("mythos-edge")]


def test_the_root_package_tells_type_checkers_the_names_it_gives() -> None:
    """It resolves them lazily by a table of its own, which must say what its imports for type checkers say."""
    tree = ast.parse((ROOT / "scripts" / "package" / "__init__.py").read_text(encoding="utf-8"))
    declared = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mythos_edge.")
        for alias in node.names
    }
    assert {*declared, "__version__"} == {*mythos_edge.__all__}
    assert declared == {name: getattr(mythos_edge, name).__module__ for name in declared}
    assert "Session" in dir(mythos_edge)
    with pytest.raises(AttributeError, match="module 'mythos_edge' has no attribute 'Sessions'"):
        _ = mythos_edge.Sessions


def test_the_module_is_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "mythos_edge", "--version"], check=True, capture_output=True, text=True)
    assert ran.stdout == f"mythos-edge {metadata.version('mythos-edge')}\n"


def test_light_modules_import_without_torch_and_onnx() -> None:
    script = "import sys\n" + "".join(
        f"sys.modules[{name!r}] = None\n"
        for name in ("torch", "onnx", "onnx_ir", "onnxscript", "jaxtyping", "triton", "transformers")
    )
    script += "".join(f"import mythos_edge.{module}\n" for module in IMPORT_LIGHT)
    # onnxruntime and tokenizers are loaded when they are used, so that --help is quick.
    script += "assert not {'onnxruntime', 'tokenizers'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_base_install_asks_for_the_runtime_alone() -> None:
    required = [line for line in metadata.requires("mythos-edge") or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in required) == ["numpy", "onnxruntime", "tokenizers"]
