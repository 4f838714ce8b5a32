"""What a log of the GPU plugin's launches tells: kernels, their sources, and the bytes that each reads and writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

BYTES = {"char": 1, "uchar": 1, "half": 2, "ushort": 2, "short": 2, "float": 4, "int": 4, "uint": 4, "long": 8}
# kernels that make an output element of one element of each input
ELEMENTWISE = re.compile(
    r"(generic_)?eltwise|activation|select|gather|strided_slice|crop|border|reorder|permute|tile|broadcast|concatenation"
)
AXES = ("BATCH_NUM", "FEATURE_NUM", "SIZE_X", "SIZE_Y", "SIZE_Z", "SIZE_W", "SIZE_U", "SIZE_V")
TENSOR = re.compile(rf"(?:(?:FUSED_OP_\d+_)?INPUT\d+|OUTPUT\d*)_(?:TYPE|{'|'.join(AXES)})")


Tensor = tuple[int, int]  # elements, bytes an element


class LedgerError(Exception):
    """Something is missing or not understood: one line for the user."""


# ------------------------------------------------------------------------------------- the sources of the kernels


@dataclass
class Source:
    """The macros that describe a kernel's tensors, from the text the plugin generated."""

    macros: dict[str, str]

    def tensors(self, kind: str, shapes: list[int], skip: str = "") -> list[Tensor]:
        """The tensors whose names match `kind`, but those of the type `skip`."""
        types = {name[: -len("_TYPE")]: value for name, value in self.macros.items() if name.endswith("_TYPE")}
        names = [name for name, value in types.items() if re.fullmatch(kind, name) and value != skip]
        names.sort(key=lambda name: (len(name), name))
        return [(prod(self.axis(name, axis, shapes) for axis in AXES), self.size(name)) for name in names]

    def size(self, name: str) -> int:
        kind = self.macros[f"{name}_TYPE"]
        if kind not in BYTES:
            raise LedgerError(f"a tensor of the unknown type {kind}")
        return BYTES[kind]

    def axis(self, name: str, axis: str, shapes: list[int]) -> int:
        """The length of an axis: a number, or an item of the launch's `shape_info`."""
        text = self.macros.get(f"{name}_{axis}", "1")
        match = re.fullmatch(r"\(?(?:(\d+)|shape_info\s*\[(\d+)\])\s*\)?", text)
        if not match or (match[2] and int(match[2]) >= len(shapes)):
            raise LedgerError(f"{name}_{axis} of a kernel is not understood: {text}")
        return int(match[1]) if match[1] else shapes[int(match[2])]


@dataclass
class Own:
    """The constants of one of ovtq's own kernels."""

    kernel: str
    constants: dict[str, int]

    def moved(self, past: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """What a decode step after `past` tokens reads and writes, where floating-point numbers have `size` bytes."""
        if self.kernel == "ovtq_window":
            return self.in_window(past, size)
        heads, queries, width, codes, parts, record, window = (
            self.constants[name]
            for name in ("KV_HEADS", "QUERY_HEADS", "HEAD_DIM", "CODES_ROW", "PARTS", "RECORD", "WINDOW")
        )
        records, context = (queries * parts * record, 4), (queries * width, size)
        if self.kernel == "ovtq_join":
            return [records], [context]
        if self.kernel != "ovtq_attend":
            raise LedgerError(f"kernel {self.kernel}: it should not be launched in a decode step")
        row, entry = codes + 3, 4 * width  # scales of 24 bits; in two floats each what is recent
        constants = heads * (3 * width**2 + width) + 2 * queries  # rotations, centres, sinks
        step = (queries + 2 * heads) * width
        shown = past // 8 + 3  # 8 tokens in a number, and two
        reads = [(max(past - window, 0) * heads * row, 2), (min(past, window) * heads * entry, size), (shown, size)]
        return [*reads, (constants + step, size)], [records, (heads * row, 2), (heads * entry, size)]

    def in_window(self, past: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """The same of a sliding layer: what is in the window, and a token."""
        heads, queries, width, window = (
            self.constants[name] for name in ("KV_HEADS", "QUERY_HEADS", "HEAD_DIM", "WINDOW")
        )
        token = 2 * heads * width
        reads = [(min(past, window - 1) * token, size), (queries * width + token + 2 * queries + 2, size)]
        return [*reads, (window + 2, 4)], [(queries * width, size), (token, size)]


def read_sources(folder: Path) -> dict[str, Source | Own]:
    """The kernels of all programs that were built, by name."""
    found: dict[str, Source | Own] = {}
    for path in folder.glob("ok_*.cl"):
        macros: dict[str, str] = {}
        text = path.read_text(errors="replace")
        if own := re.search(r"__kernel void (ovtq_\w+)", text):
            numbers = re.findall(r"^#define ([A-Z_]+) (\d+)$", text, re.MULTILINE)
            found[own[1]] = Own(own[1], {name: int(number) for name, number in numbers})
            continue
        for line in text.splitlines():
            if line.startswith("// Kernel template"):
                macros = {}
            elif line.startswith("#define "):
                _, name, *value = line.split(maxsplit=2)
                if TENSOR.fullmatch(name):
                    macros[name] = "".join(value).strip()
                elif name == "KERNEL_ID":
                    found[value[0].strip()] = Source(macros)
    return found


# ------------------------------------------------------------------------------------- the log of the launches


@dataclass
class Buffer:
    """Where an argument points to: an allocation, an offset in it, and the bytes from there to its end."""

    base: str
    offset: int
    room: int


@dataclass
class Launch:
    """One kernel, with what it was given."""

    kernel: str
    groups: int  # in the third dimension, where oneDNN's products put the batch
    args: list[Buffer | int | None] = field(default_factory=list)
    shapes: list[int] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)
    writes: list[Tensor] = field(default_factory=list)

    @cached_property
    def family(self) -> str:
        """The kernel's name without hashes: gather_ref."""
        return re.sub(r"_+\d{9,}[\d_]*(sa)?$", "", self.kernel)


def read_launches(text: str) -> Iterator[Launch]:
    """The launches of a part of the log: K, then A (arguments), then I (integers of `shape_info`, if there are any)."""
    launch = None
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "K":
            if launch:
                yield launch
            name, sizes = rest.split()[:2]
            total, local = ([int(size) for size in part.split(",")] for part in sizes.split("/"))
            launch = Launch(name, total[2] // max(local[2], 1))
        elif kind == "A" and launch:
            launch.args = [read_argument(item) for item in rest.split()]
        elif kind == "I" and launch:
            launch.shapes = [int(item) for item in rest.split(",")]
    if launch:
        yield launch


def read_argument(item: str) -> Buffer | int | None:
    if match := re.fullmatch(r"p(\w+)\+(\d+)/(\d+)", item):
        return Buffer(match[1], int(match[2]), int(match[3]) - int(match[2]))
    return int(item[1:]) if item.startswith("s") else None


# ------------------------------------------------------------------------------------- bytes


class Accountant:
    """Fills in what launches read and write, in their order, and remembers what lies in which buffer."""

    def __init__(self, sources: dict[str, Source | Own], float_bytes: int) -> None:
        self.sources, self.float_bytes = sources, float_bytes
        self.held: dict[str, Tensor] = {}  # by allocation: what was last written there
        self.products: dict[str, Launch] = {}  # by allocation: the product whose result lies there

    def account(self, launch: Launch, past: int) -> None:
        source = self.sources.get(launch.kernel)
        if isinstance(source, Own):
            launch.reads, launch.writes = source.moved(past, self.float_bytes)
            output = [arg for arg in launch.args if isinstance(arg, Buffer)][-1]
            self.products.pop(output.base, None)
            self.held[output.base] = launch.writes[0]
        elif source:
            self.account_source(launch, source)
        elif launch.kernel == "gemm_kernel":
            self.account_product(launch)
        elif launch.kernel != "grouped_micro_gemm":
            raise LedgerError(f"kernel {launch.kernel}: its source was not seen")

    def account_source(self, launch: Launch, source: Source) -> None:
        first = 1 if launch.kernel.endswith("__sa") else 0  # after `shape_info`
        given = [arg for arg in launch.args[first:] if isinstance(arg, Buffer)]
        attention = launch.family.startswith("sdpa")  # its arguments are in an order of their own
        inputs = source.tensors(r"INPUT\d+", launch.shapes)
        fused = source.tensors(r"FUSED_OP_\d+_INPUT\d+", launch.shapes)
        outputs = source.tensors(r"OUTPUT\d*", launch.shapes)
        if attention and len(given) < len(inputs) + len(outputs):  # described, but not given: the table of beams
            inputs = source.tensors(r"INPUT\d+", launch.shapes, skip="int")
        most = outputs[0][0] if outputs and ELEMENTWISE.match(launch.family) else None
        launch.reads = [(count if most is None else min(count, most), size) for count, size in inputs + fused]
        launch.writes = list(outputs)
        if "__finalization" in launch.kernel:  # joins parts of an attention: given all of it, it reads scratch alone
            launch.reads = []
        if launch.family.startswith("concatenation"):
            launch.writes = [(inputs[0][0], outputs[0][1])]
        elif launch.family == "dynamic_quantize_gpu_kv_cache":  # outputs are the cache: data, scales, zero points
            new, kept = (source.axis(name, "SIZE_Y", launch.shapes) for name in ("INPUT0", "OUTPUT"))
            launch.writes = [(count * new // kept, size) for count, size in outputs]
        for place, buffer in enumerate(given):
            if place < len(inputs) and not attention:
                product = self.products.get(buffer.base)
                if product and product.writes[0][0] == inputs[place][0]:  # the type of its result is only known here
                    self.held[buffer.base] = product.writes[0] = inputs[place]
            else:
                self.products.pop(buffer.base, None)
                output = place - len(inputs)
                known = not attention and output < len(outputs)
                unknown = (buffer.room // self.float_bytes, self.float_bytes)
                self.held[buffer.base] = outputs[output] if known else unknown

    def account_product(self, launch: Launch) -> None:
        """C = A·B; arguments are A, B, C, their offsets and leading dimensions, m, n, k (oneDNN's gemm for Xe)."""
        a, b, c = launch.args[:3]
        m, n, k = launch.args[9:12]
        if not all(isinstance(item, Buffer) for item in (a, b, c)) or not all(isinstance(x, int) for x in (m, n, k)):
            raise LedgerError("the arguments of a gemm_kernel are not understood")
        for buffer, elements in ((a, m * k), (b, k * n)):
            if buffer.base not in self.held:  # nobody wrote it: a weight
                continue
            count, size = self.held[buffer.base]
            launch.reads.append((min(elements * launch.groups, count), size))
        launch.writes = [(m * n * launch.groups, self.float_bytes)]
        self.held[c.base] = launch.writes[0]
        self.products[c.base] = launch
