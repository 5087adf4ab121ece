"""One GPU as a backend holds it: its context, and the package's own kernels that answer the runtime."""

import contextlib
from collections.abc import Callable

from mythos_edge.model.errors import BackendUnavailable, MythosEdgeError
from mythos_edge.plugins import kernel_store
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.plugins.kernel_launch import LoadedKernels, PreparedProgram
from mythos_edge.plugins.launches import Program


class Gpu:
    """The GPU number ``device`` of those that are visible, until ``close``.

    Raises BackendUnavailable without a driver or that GPU.
    """

    def __init__(self, driver: Driver | None = None, device: int = 0) -> None:
        self.driver, self.device = driver or Driver.load(), device
        count = self.driver.device_count()
        if not 0 <= device < count:
            raise BackendUnavailable(f"device is {device}, expected less than {count}, the GPUs here", "nvidia-smi")
        self.compute_capability = self.driver.compute_capability(device)
        self.name = self.driver.device_name(device)
        self.driver.retain_primary_context(device)
        self._kernels = LoadedKernels(self.driver)
        self._closed = False

    def use(self) -> None:
        """Makes the GPU current in the calling thread, which may not be the one that opened it."""
        if not self._closed:
            self.driver.use_context(self.device)

    def prepare(self, program: Program) -> PreparedProgram:
        """A program of the package's own kernels, loaded. Raises BuildError for a GPU none were compiled for."""
        built = [kernel_store.kernel(launch.kernel, self.compute_capability) for launch in program.launches]
        return PreparedProgram(self.driver, program, self._kernels.load(built))

    def close(self) -> None:
        """Gives the kernels and the context back."""
        if self._closed:
            return
        self._closed = True
        give_back(self._kernels.close, lambda: self.driver.release_primary_context(self.device))


def give_back(*actions: Callable[[], object]) -> None:
    """Does each of ``actions``, as far as the driver still works.

    After an error of CUDA it refuses everything. Whoever waited for the work was told; here that must neither keep the
    rest from being given back nor take the first error's place.
    """
    for action in actions:
        with contextlib.suppress(MythosEdgeError):
            action()
