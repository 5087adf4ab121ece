"""The few kernels the runtime itself needs between the engines: which columns run, and the output so far."""

import ctypes
from collections.abc import Mapping

from mythos_edge.plugins import kernel_store, launches
from mythos_edge.plugins.cuda_driver import Argument, Driver


class RuntimeKernels:
    """Kernels of the package for one GPU; loaded when they are needed first."""

    def __init__(self, driver: Driver, compute_capability: int) -> None:
        self._driver, self._compute_capability = driver, compute_capability
        self._loaded: dict[str, tuple[int, kernel_store.Kernel]] = {}

    def queue(self, program: launches.Program, pointers: Mapping[str, int], stream: int) -> None:
        """Queues a program without workspace. Raises BuildError for a GPU no kernels were compiled for."""
        assert not program.workspace_bytes
        for launch in program.launches:
            function, kernel = self._function(launch.kernel)
            arguments: list[Argument] = []
            for argument in launch.arguments:
                if isinstance(argument, launches.Pointer):
                    arguments.append(ctypes.c_void_p(pointers[argument.name]))
                else:
                    assert isinstance(argument, launches.Integer)
                    arguments.append(ctypes.c_int32(argument.value))
            # Triton's own two: scratch memory that none of these kernels needs.
            arguments += [ctypes.c_void_p(0), ctypes.c_void_p(0)]
            self._driver.launch(function, launch.grid, kernel.threads, kernel.shared_bytes, stream, arguments)

    def _function(self, name: str) -> tuple[int, kernel_store.Kernel]:
        if name not in self._loaded:
            kernel = kernel_store.kernel(name, self._compute_capability)
            module = self._driver.load_module(kernel.cubin)
            self._loaded[name] = self._driver.function(module, kernel.entry), kernel
        return self._loaded[name]
