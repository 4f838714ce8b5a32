"""What OpenCL says of the GPUs: their drivers' versions, which OpenVINO does not tell."""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import NamedTuple

GPU, NAME, DRIVER, VENDOR = 1 << 2, 0x102B, 0x102D, 0x102C  # CL/cl.h


class Driver(NamedTuple):
    """A GPU as its OpenCL driver presents it."""

    name: str
    vendor: str
    version: str


def drivers() -> list[Driver]:
    """All GPUs with an OpenCL driver; none where there is no OpenCL loader."""
    for name in filter(None, (ctypes.util.find_library("OpenCL"), "libOpenCL.so.1", "OpenCL.dll")):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return [_told(library, device) for platform in _platforms(library) for device in _devices(library, platform)]
    return []


def _platforms(library: ctypes.CDLL) -> list[int]:
    count = ctypes.c_uint(0)
    if library.clGetPlatformIDs(0, None, ctypes.byref(count)) or not count.value:
        return []
    found = (ctypes.c_void_p * count.value)()
    library.clGetPlatformIDs(count.value, found, None)
    return [value for value in found if value]


def _devices(library: ctypes.CDLL, platform: int) -> list[int]:
    count, kind = ctypes.c_uint(0), ctypes.c_ulonglong(GPU)
    where = ctypes.c_void_p(platform)
    if library.clGetDeviceIDs(where, kind, 0, None, ctypes.byref(count)) or not count.value:
        return []
    found = (ctypes.c_void_p * count.value)()
    library.clGetDeviceIDs(where, kind, count.value, found, None)
    return [value for value in found if value]


def _told(library: ctypes.CDLL, device: int) -> Driver:
    def text(what: int) -> str:
        room = ctypes.create_string_buffer(256)
        failed = library.clGetDeviceInfo(ctypes.c_void_p(device), what, ctypes.c_size_t(len(room)), room, None)
        return "" if failed else room.value.decode("utf-8", "replace").strip()

    return Driver(text(NAME), text(VENDOR), text(DRIVER))
