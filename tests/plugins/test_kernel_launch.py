"""Loading kernels once, and giving them back."""

import ctypes

import pytest
from fakes.driver import FakeDriver

from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.plugins.kernel_launch import LoadedKernels
from mythos_edge.plugins.kernel_store import Kernel


def _kernel(name: str) -> Kernel:
    return Kernel(
        name=name,
        entry=name,
        cubin=f"cubin of {name}".encode(),
        shared_bytes=0,
        threads=32,
        hidden_pointers=0,
        arguments=(),
        sha256=f"sha256 of {name}",
    )


KERNELS = [_kernel("double"), _kernel("halve")]


def test_closing_unloads_every_module_once() -> None:
    driver = FakeDriver()
    driver.retain_primary_context(0)
    other = driver.load_module(b"cubin of another owner")
    loaded = LoadedKernels(driver)
    stream, function = driver.stream(), loaded.load(KERNELS)["double"].function
    driver.launch(function, (1, 1, 1), 32, 0, stream, (ctypes.c_int32(1),))
    assert len(driver.modules) == 3
    loaded.close()
    assert list(driver.modules) == [other]
    with pytest.raises(AssertionError, match="no kernel of a loaded module"):
        driver.launch(function, (1, 1, 1), 32, 0, stream, (ctypes.c_int32(1),))
    loaded.close()
    # What is loaded after that is loaded anew.
    again = loaded.load(KERNELS)["double"].function
    driver.launch(again, (1, 1, 1), 32, 0, stream, (ctypes.c_int32(1),))
    loaded.close()
    assert list(driver.modules) == [other]


def test_closing_is_for_the_gpu_at_hand() -> None:
    driver = FakeDriver(devices=(89, 89))
    loaded = LoadedKernels(driver)
    for device in (0, 1):
        driver.retain_primary_context(device)
        loaded.load(KERNELS)
    driver.use_context(0)
    kept = list(driver.modules)[2:]
    loaded.close()
    assert list(driver.modules) == kept
    driver.use_context(1)
    loaded.close()
    assert driver.modules == {}


def test_closing_without_a_context_is_an_error_unless_nothing_is_loaded() -> None:
    driver = FakeDriver()
    loaded = LoadedKernels(driver)
    loaded.close()
    driver.retain_primary_context(0)
    loaded.load(KERNELS)
    driver.release_primary_context(0)
    with pytest.raises(MythosEdgeError, match="CUDA_ERROR_INVALID_CONTEXT"):
        loaded.close()
    assert len(driver.modules) == 2
