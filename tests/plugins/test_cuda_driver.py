"""The CUDA driver: against a libcuda of our own, compiled with cuda.h, and the fake that other tests run on."""

import ctypes
import inspect
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from fakes.driver import GARBAGE, FakeDriver, LaunchRecord

from mythos_edge.model.errors import BackendUnavailable, MythosEdgeError
from mythos_edge.plugins import cuda_driver
from mythos_edge.plugins.cuda_driver import SYMBOLS, Driver

# The header's own declarations check these definitions; device memory is host memory, work is done at once.
LIBRARY = r"""
#include <cuda.h>
#include <stdlib.h>
#include <string.h>
static char said[256];
static void *captured;
const char *last_words(void) { return said; }
CUresult cuInit(unsigned f) { const char *e = getenv("STUB_INIT"); return e ? atoi(e) : f ? 1 : 0; }
CUresult cuGetErrorName(CUresult e, const char **s) {
  if (e == CUDA_ERROR_OUT_OF_MEMORY) { *s = "CUDA_ERROR_OUT_OF_MEMORY"; return 0; }
  if (e == CUDA_ERROR_INVALID_CONTEXT) { *s = "CUDA_ERROR_INVALID_CONTEXT"; return 0; }
  if (e == CUDA_ERROR_NOT_FOUND) { *s = "CUDA_ERROR_NOT_FOUND"; return 0; }
  if (e == CUDA_ERROR_LAUNCH_FAILED) { *s = "CUDA_ERROR_LAUNCH_FAILED"; return 0; }
  *s = 0; return CUDA_ERROR_INVALID_VALUE; }
CUresult cuGetErrorString(CUresult e, const char **s) {
  if (e == CUDA_ERROR_OUT_OF_MEMORY) { *s = "out of memory"; return 0; } *s = 0; return CUDA_ERROR_INVALID_VALUE; }
CUresult cuDeviceGetCount(int *n) { *n = 2; return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i + 40; return i < 2 ? 0 : CUDA_ERROR_INVALID_DEVICE; }
CUresult cuDeviceGetName(char *s, int n, CUdevice d) { strncpy(s, d == 41 ? "second" : "first", n); return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  *v = a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? (d == 41 ? 12 : 8)
     : a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? (d == 41 ? 1 : 9) : -1; return 0; }
static __thread CUcontext current;
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)(0x1234567800000000ull + d); return 0; }
CUresult cuDevicePrimaryCtxRelease(CUdevice d) { return d == 40 || d == 41 ? 0 : 1; }
CUresult cuCtxSetCurrent(CUcontext c) { current = c; return 0; }
CUresult cuCtxGetDevice(CUdevice *d) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *d = (int)((unsigned long long)current - 0x1234567800000000ull) - 40; return 0; }
CUresult cuMemGetInfo(size_t *f, size_t *t) { *f = 5000000000ull; *t = 8000000000ull; return 0; }
CUresult cuMemAlloc(CUdeviceptr *p, size_t n) {
  if (n > 6000000000ull) return CUDA_ERROR_OUT_OF_MEMORY; *p = (CUdeviceptr)malloc(n); return 0; }
CUresult cuMemFree(CUdeviceptr p) { free((void *)p); return 0; }
CUresult cuMemHostAlloc(void **p, size_t n, unsigned f) {
  *p = malloc(n); return f == CU_MEMHOSTALLOC_PORTABLE ? 0 : 1; }
CUresult cuMemFreeHost(void *p) { free(p); return 0; }
CUresult cuMemcpyHtoDAsync(CUdeviceptr d, const void *s, size_t n, CUstream t) {
  memcpy((void *)d, s, n); return t == (CUstream)0x77 ? 0 : 1; }
CUresult cuMemcpyDtoHAsync(void *d, CUdeviceptr s, size_t n, CUstream t) {
  memcpy(d, (void *)s, n); return t == (CUstream)0x77 ? 0 : 1; }
CUresult cuMemcpyDtoDAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream t) {
  memcpy((void *)d, (void *)s, n); return t == (CUstream)0x77 ? 0 : 1; }
CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char b, size_t n, CUstream t) {
  memset((void *)p, b, n); return t == (CUstream)0x77 ? 0 : 1; }
CUresult cuModuleLoadData(CUmodule *m, const void *i) {
  *m = (CUmodule)0x99; return memcmp(i, "\x7f" "ELF\0cubin", 10) ? CUDA_ERROR_INVALID_IMAGE : 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) {
  *f = (CUfunction)0x55; return m == (CUmodule)0x99 && !strcmp(n, "add") ? 0 : CUDA_ERROR_NOT_FOUND; }
CUresult cuModuleUnload(CUmodule m) { return m == (CUmodule)0x99 ? 0 : 1; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  return f == (CUfunction)0x55 && a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && v == 65536 ? 0 : 1; }
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream t, void **a, void **extra) {
  /* add(float *out, long long offset, int count, float value, null): what the launch asked for ends in memory. */
  float *out = *(float **)a[0] + *(long long *)a[1];
  for (int i = 0; i < *(int *)a[2]; i++) out[i] += *(float *)a[3];
  unsigned *seen = *(unsigned **)a[0];
  seen[0] = gx; seen[1] = gy; seen[2] = gz; seen[3] = bx; seen[4] = by; seen[5] = bz; seen[6] = shared;
  return f == (CUfunction)0x55 && t == (CUstream)0x77 && !extra && !*(void **)a[4] ? 0 : 1; }
CUresult cuStreamCreate(CUstream *s, unsigned f) { *s = (CUstream)0x77; return f == CU_STREAM_NON_BLOCKING ? 0 : 1; }
CUresult cuStreamDestroy(CUstream s) { return s == (CUstream)0x77 ? 0 : 1; }
CUresult cuStreamSynchronize(CUstream s) { return s == (CUstream)0x77 ? 0 : CUDA_ERROR_LAUNCH_FAILED; }
CUresult cuEventCreate(CUevent *e, unsigned f) { *e = (CUevent)0x33; return f == CU_EVENT_DISABLE_TIMING ? 0 : 1; }
CUresult cuEventRecord(CUevent e, CUstream s) { return e == (CUevent)0x33 && s == (CUstream)0x77 ? 0 : 1; }
CUresult cuEventSynchronize(CUevent e) { return e == (CUevent)0x33 ? 0 : 1; }
CUresult cuEventDestroy(CUevent e) { return e == (CUevent)0x33 ? 0 : 1; }
CUresult cuStreamBeginCapture(CUstream s, CUstreamCaptureMode m) {
  captured = s; return m == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL ? 0 : 1; }
CUresult cuStreamEndCapture(CUstream s, CUgraph *g) { *g = (CUgraph)0x11; return s == captured ? 0 : 1; }
CUresult cuGraphInstantiate(CUgraphExec *x, CUgraph g, unsigned long long f) {
  strcpy(said, "instantiated"); *x = (CUgraphExec)0x22; return g == (CUgraph)0x11 && !f ? 0 : 1; }
CUresult cuGraphDestroy(CUgraph g) { strcat(said, " destroyed"); return g == (CUgraph)0x11 ? 0 : 1; }
CUresult cuGraphLaunch(CUgraphExec x, CUstream s) { return x == (CUgraphExec)0x22 && s == (CUstream)0x77 ? 0 : 1; }
CUresult cuGraphExecDestroy(CUgraphExec x) { return x == (CUgraphExec)0x22 ? 0 : 1; }
"""


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, triton = shutil.which("gcc"), util.find_spec("triton")
    if compiler is None or triton is None or triton.origin is None:
        pytest.skip("needs gcc, and triton for its cuda.h")
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "stub.c").write_text(LIBRARY)
    command = [compiler, "-shared", "-fPIC", f"-I{include}", "-o", str(folder / "libcuda.so.1"), str(folder / "stub.c")]
    subprocess.run(command, check=True)
    return folder / "libcuda.so.1"


@pytest.fixture
def driver(library_file: Path) -> Driver:
    return Driver(ctypes.CDLL(str(library_file)))


def test_devices_and_contexts(driver: Driver) -> None:
    assert driver.device_count() == 2
    assert [driver.compute_capability(device) for device in (0, 1)] == [89, 121]
    assert driver.device_name(1) == "second"
    driver.retain_primary_context(1)
    assert driver.current_device() == 1
    driver.release_primary_context(1)
    assert driver.memory_info() == (5_000_000_000, 8_000_000_000)


def _elsewhere(work: Callable[[], object]) -> object:
    """What ``work`` returns or raises in a thread that never had a context."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _used(driver: Driver | FakeDriver, device: int) -> int:
    driver.use_context(device)
    return driver.current_device()


@pytest.mark.parametrize("fake", [False, True])
def test_every_thread_has_its_own_context(fake: bool, request: pytest.FixtureRequest) -> None:
    driver = FakeDriver(devices=(89, 121)) if fake else request.getfixturevalue("driver")
    with pytest.raises(MythosEdgeError, match="context of device 0 is not retained: call retain_primary_context first"):
        driver.use_context(0)
    driver.retain_primary_context(0)
    driver.retain_primary_context(1)
    assert driver.current_device() == 1
    with pytest.raises(MythosEdgeError, match="cuCtxGetDevice failed: CUDA_ERROR_INVALID_CONTEXT"):
        _elsewhere(driver.current_device)
    assert _elsewhere(lambda: _used(driver, 0)) == 0
    assert driver.current_device() == 1
    assert _used(driver, 0) == 0
    driver.retain_primary_context(0)
    driver.release_primary_context(0)
    assert _used(driver, 0) == 0
    driver.release_primary_context(0)
    with pytest.raises(MythosEdgeError, match="context of device 0 is not retained"):
        driver.use_context(0)


def test_memory_moves_in_every_direction(driver: Driver) -> None:
    stream, size = driver.stream(), 64
    device, other, pinned = driver.allocate(size), driver.allocate(size), driver.allocate_pinned(size)
    source, back = np.arange(16, dtype=np.float32), np.zeros(16, np.float32)
    driver.fill(device, 0xAB, size, stream)
    driver.copy_to_device(device, source.ctypes.data, size, stream)
    driver.copy_on_device(other, device, size, stream)
    driver.copy_to_host(pinned, other, size, stream)
    driver.copy_to_host(back.ctypes.data, other, size, stream)
    assert np.array_equal(back, source)
    driver.fill(device, 0xFE, size, stream)
    driver.fill(device + 4, 7, 4, stream)
    driver.copy_to_host(back.ctypes.data, device, size, stream)
    assert back.view(np.uint32)[:3].tolist() == [0xFEFEFEFE, 0x07070707, 0xFEFEFEFE]
    for pointer in (device, other):
        driver.free(pointer)
    driver.free_pinned(pinned)
    driver.destroy_stream(stream)


def test_launch_passes_grid_threads_and_arguments(driver: Driver) -> None:
    stream = driver.stream()
    module = driver.load_module(b"\x7fELF\0cubin")
    function = driver.function(module, "add")
    driver.set_shared_bytes(function, 65536)
    memory = np.zeros(64, np.float32)
    arguments = (
        ctypes.c_void_p(memory.ctypes.data),
        ctypes.c_int64(32),
        ctypes.c_int32(3),
        ctypes.c_float(1.5),
        ctypes.c_void_p(None),
    )
    driver.launch(function, (70000, 2, 3), 128, 65536, stream, arguments)
    assert memory.view(np.uint32)[:7].tolist() == [70000, 2, 3, 128, 1, 1, 65536]
    assert memory[32:36].tolist() == [1.5, 1.5, 1.5, 0]
    driver.unload_module(module)


def test_events_and_graphs(driver: Driver, library_file: Path) -> None:
    stub = ctypes.CDLL(str(library_file))
    stub.last_words.restype = ctypes.c_char_p
    stream, event = driver.stream(), driver.event()
    driver.record(event, stream)
    driver.wait(event)
    with pytest.raises(MythosEdgeError, match="cuStreamSynchronize failed: CUDA_ERROR_LAUNCH_FAILED"):
        driver.synchronize(0)
    driver.destroy_event(event)
    driver.begin_capture(stream)
    graph = driver.end_capture(stream)
    assert stub.last_words() == b"instantiated destroyed"
    driver.launch_graph(graph, stream)
    driver.destroy_graph(graph)
    driver.synchronize(stream)


def test_errors_are_one_line_with_cudas_name(driver: Driver) -> None:
    with pytest.raises(MythosEdgeError) as failure:
        driver.allocate(7_000_000_000)
    wanted = "cuMemAlloc_v2 failed for 7000000000 bytes of device memory: CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
    assert str(failure.value) == wanted
    module = driver.load_module(b"\x7fELF\0cubin")
    with pytest.raises(MythosEdgeError, match="for kernel gone: CUDA_ERROR_NOT_FOUND"):
        driver.function(module, "gone")
    with pytest.raises(MythosEdgeError, match="device 5: CUDA error 101"):
        driver.device_name(5)


@pytest.mark.parametrize(("code", "message"), [(100, "no NVIDIA GPU is visible"), (999, "does not start")])
def test_no_device_says_how_to_mend(
    library_file: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    monkeypatch.setenv("STUB_INIT", str(code))
    with pytest.raises(BackendUnavailable, match=rf"{message}.*run `nvidia-smi`"):
        Driver(ctypes.CDLL(str(library_file)))


def test_no_driver_says_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", missing)
    with pytest.raises(BackendUnavailable, match=r"no NVIDIA driver: .*run `nvidia-smi`"):
        Driver.load()


def test_an_old_driver_says_what_it_lacks() -> None:
    with pytest.raises(BackendUnavailable, match=f"has no {next(iter(SYMBOLS))}"):
        Driver(ctypes.CDLL(None))


def test_the_fake_has_the_methods_of_the_driver() -> None:
    """Same names, parameters and results, so that what runs on the fake calls the driver rightly."""
    for name, method in inspect.getmembers(Driver, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(FakeDriver, name)) == inspect.signature(method), name


def test_fake_memory_is_checked() -> None:
    driver = FakeDriver(total_bytes=100)
    driver.retain_primary_context(0)
    stream, pointer = driver.stream(), driver.allocate(64)
    assert np.isnan(driver.array(pointer, np.float32, (16,))).all()
    source = np.zeros(65, np.uint8)
    driver.copy_to_device(pointer + 60, source.ctypes.data, 4, stream)
    with pytest.raises(AssertionError, match="not in live device memory"):
        driver.copy_to_device(pointer + 60, source.ctypes.data, 5, stream)
    with pytest.raises(AssertionError, match="overlap"):
        driver.copy_on_device(pointer, pointer + 4, 8, stream)
    with pytest.raises(MythosEdgeError, match="OUT_OF_MEMORY"):
        driver.allocate(37)
    driver.free(pointer)
    with pytest.raises(AssertionError, match="not in live device memory"):
        driver.fill(pointer, 0, 1, stream)
    with pytest.raises(AssertionError, match="no live device allocation"):
        driver.free(pointer)
    assert driver.live_bytes == 0


def _fake_with_kernel(*, delayed: bool = False) -> tuple[FakeDriver, int, int, int]:
    driver = FakeDriver(delayed=delayed)
    driver.retain_primary_context(0)
    driver.kernels["double"] = lambda driver, grid, pointer, count: np.multiply(
        driver.array(pointer, np.float32, (count,)), 2, out=driver.array(pointer, np.float32, (count,))
    )
    function = driver.function(driver.load_module(b"cubin of double"), "double")
    return driver, driver.stream(), function, driver.put(np.arange(4, dtype=np.float32))


def test_fake_launches_are_recorded_and_run() -> None:
    driver, stream, function, pointer = _fake_with_kernel()
    arguments = (ctypes.c_void_p(pointer), ctypes.c_int32(4))
    driver.launch(function, (2, 1, 1), 64, 128, stream, arguments)
    assert driver.launches == [LaunchRecord("double", (2, 1, 1), 64, 128, stream, (pointer, 4))]
    assert driver.array(pointer, np.float32, (4,)).tolist() == [0, 2, 4, 6]
    with pytest.raises(MythosEdgeError, match="INVALID_VALUE"):
        driver.launch(function, (2, 70000, 1), 64, 0, stream, arguments)
    with pytest.raises(MythosEdgeError, match="INVALID_VALUE"):
        driver.launch(function, (1, 1, 1), 64, 49153, stream, arguments)
    driver.set_shared_bytes(function, 49153)
    driver.launch(function, (1, 1, 1), 64, 49153, stream, arguments)
    driver.free(pointer)
    with pytest.raises(AssertionError, match="launch of double"):
        driver.launch(function, (1, 1, 1), 64, 0, stream, arguments)


def test_the_fake_does_nothing_without_a_context() -> None:
    driver, stream, function, pointer = _fake_with_kernel()
    host = np.zeros(4, np.float32)
    calls: list[Callable[[], object]] = [
        lambda: driver.allocate(4),
        lambda: driver.allocate_pinned(4),
        lambda: driver.copy_to_device(pointer, host.ctypes.data, 16, stream),
        lambda: driver.copy_to_host(host.ctypes.data, pointer, 16, stream),
        lambda: driver.copy_on_device(pointer, pointer + 8, 8, stream),
        lambda: driver.fill(pointer, 0, 16, stream),
        lambda: driver.load_module(b"cubin of double"),
        lambda: driver.unload_module(min(driver.modules)),
        lambda: driver.launch(function, (1, 1, 1), 64, 0, stream, (ctypes.c_void_p(pointer), ctypes.c_int32(4))),
    ]
    for call in calls:
        with pytest.raises(MythosEdgeError, match="CUDA_ERROR_INVALID_CONTEXT"):
            _elsewhere(call)
    assert driver.array(pointer, np.float32, (4,)).tolist() == [0, 1, 2, 3]
    assert _elsewhere(lambda: (driver.use_context(0), driver.allocate(4))[1]) in range(1, 2**63)
    driver.release_primary_context(0)
    with pytest.raises(MythosEdgeError, match="CUDA_ERROR_INVALID_CONTEXT"):
        driver.allocate(4)


def test_fake_delay_shows_what_was_read_too_early() -> None:
    driver, stream, function, pointer = _fake_with_kernel(delayed=True)
    flag, event = driver.allocate_pinned(16), driver.event()
    host = driver.array(flag, np.float32, (4,))
    host[...] = 5
    driver.wait(event)
    driver.launch(function, (1, 1, 1), 64, 0, stream, (ctypes.c_void_p(pointer), ctypes.c_int32(4)))
    driver.copy_to_host(flag, pointer, 16, stream)
    driver.record(event, stream)
    driver.fill(pointer, 0, 16, stream)
    assert (host.view(np.uint8) == GARBAGE).all()
    driver.advance()
    assert (host.view(np.uint8) == GARBAGE).all()
    driver.wait(event)
    assert host.tolist() == [0, 2, 4, 6]
    assert driver.array(pointer, np.float32, (4,)).any()
    driver.synchronize(stream)
    assert not driver.array(pointer, np.float32, (4,)).any()


def test_fake_graph_replays_what_it_captured() -> None:
    driver, stream, function, pointer = _fake_with_kernel()
    driver.begin_capture(stream)
    driver.launch(function, (1, 1, 1), 64, 0, stream, (ctypes.c_void_p(pointer), ctypes.c_int32(4)))
    assert driver.launches == []
    for forbidden in (lambda: driver.allocate(4), lambda: driver.synchronize(stream), lambda: driver.free(pointer)):
        with pytest.raises(MythosEdgeError, match="CAPTURE_UNSUPPORTED"):
            forbidden()
    graph = driver.end_capture(stream)
    driver.launch_graph(graph, stream)
    driver.launch_graph(graph, stream)
    assert driver.array(pointer, np.float32, (4,)).tolist() == [0, 4, 8, 12]
    assert len(driver.launches) == 2
