"""Build kernels for a virtual chip, as JSON: run by test_kernels_on_gpu.py.

usage: VIRTUAL_GPU=CHIP tools/gpu/virtual python tests/builds_on_gpu.py KERNEL,{half|float},K,V,HEAD_DIM,GROUP…

Of each kernel, type of its state, bits, and query heads of a KV head, prints whether it multiplies matrices (dpas, XMX)
and how many bytes of registers it spills, as the compiled program says itself: a build's log is silent of spills. Types
and lengths alone are here of what the plugin puts before a kernel.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys

from ovtq.codec.kernel_layout import KernelLayout
from ovtq.codec.window_layout import WindowLayout

GPU, LOG, SIZES, BINARIES = 4, 0x1183, 0x1165, 0x1166  # CL_DEVICE_TYPE_GPU, CL_PROGRAM_BUILD_LOG, CL_PROGRAM_BINARY_…


def sources(kernel: str, kind: str, bits: tuple[int, int], head_dim: int, group: int) -> str:
    sets = KernelLayout(4, group, head_dim, bits, 64, 4096), WindowLayout(4, group, head_dim, 128)
    for some in sets:
        for item in some.bindings:
            if item.sources[-1] == kernel:
                ports = [*(f"INPUT{number}" for number in range(item.inputs)), "OUTPUT0"]
                lines = [f"#define {port}_TYPE {kind}\n#define {port}_DIMS (long[]){{2, 1, 1, 1}}\n" for port in ports]
                return "".join((*lines, *(some.texts[f"{name}.cl"] for name in item.sources)))
    raise ValueError(f"no kernel {kernel}")


class Chip:
    """The only device of the only platform."""

    def __init__(self) -> None:
        self.cl = ctypes.CDLL("libOpenCL.so.1")
        self.cl.clCreateContext.restype = self.cl.clCreateProgramWithSource.restype = ctypes.c_void_p
        platform, self.device = ctypes.c_void_p(), ctypes.c_void_p()
        self.cl.clGetPlatformIDs(1, ctypes.byref(platform), None)
        self.cl.clGetDeviceIDs(platform, ctypes.c_ulong(GPU), 1, ctypes.byref(self.device), None)
        context = self.cl.clCreateContext(None, 1, ctypes.byref(self.device), None, None, None)
        self.context = ctypes.c_void_p(context)

    def build(self, text: str) -> bytes:
        """The program, an ELF whose section .ze_info tells of it in YAML."""
        source = ctypes.c_char_p(text.encode())
        made = self.cl.clCreateProgramWithSource(self.context, 1, ctypes.byref(source), None, None)
        program = ctypes.c_void_p(made)
        if error := self.cl.clBuildProgram(program, 1, ctypes.byref(self.device), None, None, None):
            log = ctypes.create_string_buffer(1 << 16)
            self.cl.clGetProgramBuildInfo(program, self.device, LOG, ctypes.c_size_t(1 << 16), log, None)
            raise RuntimeError(f"clBuildProgram: {error}\n{log.value.decode()}")
        size = ctypes.c_size_t()
        self.cl.clGetProgramInfo(program, SIZES, ctypes.c_size_t(ctypes.sizeof(size)), ctypes.byref(size), None)
        binary = ctypes.create_string_buffer(size.value)
        place = ctypes.c_void_p(ctypes.addressof(binary))
        self.cl.clGetProgramInfo(program, BINARIES, ctypes.c_size_t(ctypes.sizeof(place)), ctypes.byref(place), None)
        return binary.raw


def main(*specs: str) -> None:
    """Print what became of each."""
    chip, found = Chip(), {}
    for spec in specs:
        kernel, kind, *numbers = spec.split(",")
        key, value, head_dim, group = map(int, numbers)
        binary = chip.build(sources(kernel, kind, (key, value), head_dim, group))
        assert f"ovtq_{kernel}".encode() in binary
        matrices, spilled = (re.search(text, binary) for text in (rb"has_dpas: +true", rb"spill_size: +(\d+)"))
        found[spec] = {"dpas": matrices is not None, "spilled": int(spilled[1]) if spilled else 0}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
