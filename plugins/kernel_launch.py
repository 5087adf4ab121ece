"""Runs the programs of ``launches`` on a GPU: loads kernels once, and fills in pointers at each run.

Preparing may load and allocate; running does neither, and does not wait, so that a CUDA graph can capture it.
"""

import ctypes
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mythos_edge.model.errors import BundleError
from mythos_edge.plugins.cuda_driver import Argument, Driver
from mythos_edge.plugins.launches import Float, Integer, Launch, Pointer, Program, Workspace

# More has to be asked for.
_SHARED_BYTES_WITHOUT_ASKING = 48 << 10


class CompiledKernel(Protocol):
    """Everything that is needed to load and launch a kernel."""

    @property
    def name(self) -> str: ...
    @property
    def entry(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def hidden_pointers(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    @property
    def cubin(self) -> bytes: ...


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel on a GPU, with what each launch of it needs; ``hidden_pointers`` follow its arguments, all null."""

    function: int
    threads: int
    shared_bytes: int
    hidden_pointers: int


class LoadedKernels:
    """Kernels, each loaded once a GPU and kept until ``close``, or until the process ends."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._modules: dict[tuple[int, str], int] = {}
        self._loaded: dict[tuple[int, str, str], LoadedKernel] = {}

    def compute_capability(self) -> int:
        """Of the GPU that is current in this thread."""
        return self.driver.compute_capability(self.driver.current_device())

    def load(self, kernels: Iterable[CompiledKernel]) -> dict[str, LoadedKernel]:
        """The kernels by name, on the current GPU."""
        device = self.driver.current_device()
        return {kernel.name: self._load(device, kernel) for kernel in kernels}

    def close(self) -> None:
        """Unloads the kernels of the GPU that is current in this thread; again is nothing.

        No work that was queued may still want them, and no ``PreparedProgram`` of them may run again.
        """
        if not self._modules:
            return
        device = self.driver.current_device()
        self._loaded = {key: loaded for key, loaded in self._loaded.items() if key[0] != device}
        for key in [key for key in self._modules if key[0] == device]:
            self.driver.unload_module(self._modules.pop(key))

    def _load(self, device: int, kernel: CompiledKernel) -> LoadedKernel:
        key = (device, kernel.sha256, kernel.entry)
        if key not in self._loaded:
            if key[:2] not in self._modules:
                self._modules[key[:2]] = self.driver.load_module(kernel.cubin)
            function = self.driver.function(self._modules[key[:2]], kernel.entry)
            if kernel.shared_bytes > _SHARED_BYTES_WITHOUT_ASKING:
                self.driver.set_shared_bytes(function, kernel.shared_bytes)
            self._loaded[key] = LoadedKernel(function, kernel.threads, kernel.shared_bytes, kernel.hidden_pointers)
        return self._loaded[key]


class Scratch:
    """Device memory of one owner's programs, in one stream, that only grows.

    What was given before stays until the owner goes: a CUDA graph that was captured with it may run again.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._size, self._pointers = 0, [0]
        weakref.finalize(self, _free, driver, self._pointers)

    def at_least(self, size: int) -> int:
        """A pointer to ``size`` bytes."""
        if size > self._size:
            self._size = max(size, 2 * self._size)
            self._pointers.append(self._driver.allocate(self._size))
        return self._pointers[-1]


def _free(driver: Driver, pointers: list[int]) -> None:
    for pointer in pointers[1:]:
        driver.free(pointer)


class PreparedProgram:
    """A program whose kernels are loaded. Not for two threads at once. Raises BundleError for a missing kernel."""

    def __init__(self, driver: Driver, program: Program, kernels: Mapping[str, LoadedKernel]) -> None:
        self._driver = driver
        self._launches = [_PreparedLaunch(launch, kernels) for launch in program.launches]

    def run(self, pointers: Mapping[str, int], workspace: int, stream: int) -> None:
        """Queues all launches; ``pointers`` are by the formal names of the op's inputs and output."""
        for launch in self._launches:
            for place, name in launch.pointers:
                place.value = pointers[name]
            for place, offset in launch.offsets:
                place.value = workspace + offset
            kernel = launch.kernel
            self._driver.launch(
                kernel.function, launch.grid, kernel.threads, kernel.shared_bytes, stream, launch.arguments
            )


class _PreparedLaunch:
    """One launch; its arguments are made once and written again at each run."""

    def __init__(self, launch: Launch, kernels: Mapping[str, LoadedKernel]) -> None:
        if launch.kernel not in kernels:
            raise BundleError(
                f"kernel {launch.kernel} is asked for and not carried, only {', '.join(sorted(kernels))}: "
                "build the target with a larger --max-rows, or feed fewer rows"
            )
        self.kernel, self.grid = kernels[launch.kernel], launch.grid
        self.pointers: list[tuple[ctypes.c_void_p, str]] = []
        self.offsets: list[tuple[ctypes.c_void_p, int]] = []
        self.arguments: list[Argument] = []
        for argument in launch.arguments:
            if isinstance(argument, Integer):
                self.arguments.append(ctypes.c_int32(argument.value))
            elif isinstance(argument, Float):
                self.arguments.append(ctypes.c_float(argument.value))
            else:
                place = ctypes.c_void_p()
                self.arguments.append(place)
                self._remember(place, argument)
        # Scratch memory that Triton may give a kernel and ours do not use.
        self.arguments += [ctypes.c_void_p() for _ in range(self.kernel.hidden_pointers)]

    def _remember(self, place: ctypes.c_void_p, argument: Pointer | Workspace) -> None:
        if isinstance(argument, Pointer):
            self.pointers.append((place, argument.name))
        else:
            self.offsets.append((place, argument.offset_bytes))
