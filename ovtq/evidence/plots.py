"""The pictures of a report, as SVG that takes its text colour from the page: one picture for light and for dark."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ovtq.errors import InputError

Rows = Sequence[Mapping[str, Any]]

INK = "#010203"  # stands for the page's text colour until the picture is in the page
# near Okabe and Ito's, for all kinds of colour vision; each shows on white and on black, and markers differ, too
COLOURS = ("#2a8fd6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7fbf3f", "#9a7bc8", "#999999")
MARKERS = "osD^vPX*"
LINE = 13  # points from one name to the next
SUPER = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Look:
    """What tells a candidate from others in every picture of a page: a short name, a colour and a marker."""

    name: str
    colour: str
    marker: str


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise InputError("a report needs matplotlib: pip install 'ovtq[eval]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcdefaults()
    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "ovtq",
            "text.parse_math": False,  # a folder's name may hold a dollar
            "font.family": ["DejaVu Sans"],
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": INK,
            "grid.alpha": 0.15,
            "lines.linewidth": 1.8,
        }
    )
    return plt


def check() -> None:
    """Raise InputError if there is no matplotlib."""
    _pyplot()


def short(label: str, width: int = 34) -> str:
    """A candidate's name where room is short: the last folder of a path, properties without their common words."""
    kind, colon, rest = label.partition(":")
    folder, _, properties = (rest if colon and kind in ("paged", "host") else label).partition(",")
    if kind == "stock" and colon:
        folder, properties = "stock", rest
    text = folder.rstrip("/").rsplit("/", 1)[-1]
    text = f"{kind}:{text}" if colon and kind in ("paged", "host") else text
    text = f"{text} {_words(properties)}".strip()
    return text if len(text) <= width else text[: width - 1] + "…"


def _words(properties: str) -> str:
    """What a plugin's properties say of the cache: `TURBO u4` where keys and values are alike, else `V u4`."""
    given = [setting.partition("=") for setting in properties.split(",") if setting]
    keys, values = ([value for key, _, value in given if key.startswith(f"{kind}_CACHE_")] for kind in ("KEY", "VALUE"))
    rest = [
        value if key == "KV_CACHE_PRECISION" else f"{key}={value}"
        for key, _, value in given
        if not key.startswith(("KEY_CACHE_", "VALUE_CACHE_"))
    ]
    if keys == values:
        return " ".join([*keys, *rest])
    return " ".join([*(f"K {word}" for word in keys), *(f"V {word}" for word in values), *rest])


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """A look for each candidate, no two alike; short names that would be alike give way to whole ones."""
    some = list(dict.fromkeys(labels))
    names = {label: short(label) for label in some}
    for longer in (lambda label: short(label, len(label) + 1), lambda label: label):
        count = Counter(names.values())
        names |= {label: longer(label) for label in some if count[names[label]] > 1}
    found = {}
    for index, label in enumerate(some):
        marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        found[label] = Look(names[label], COLOURS[index % len(COLOURS)], marker)
    return found


def front(rows: Rows, looks: Mapping[str, Look]) -> str:
    """Mean KLD over bytes per token, both logarithmic, with the line of those that nothing beats in both."""
    plt = _pyplot()
    some = [row for row in rows if row["role"] == "candidate" and row["bytes_per_token"] and row["verdict"] != "wrong"]
    some = [row for row in some if math.isfinite(row["mean_kld"])]
    if not some:
        return ""
    figure, axes = plt.subplots(figsize=(9.5, 5.5))
    lossy = [row["mean_kld"] for row in some if row["verdict"] != "equal" and row["mean_kld"] > 0]
    floor = min(lossy, default=1e-5) / 10  # lossless ones stand below all others, not ten decades away
    points = [(row["bytes_per_token"], max(row["mean_kld"], floor)) for row in some]
    best, edge = float("inf"), []
    for x, y in sorted(points):
        if y < best:
            best = y
            edge.append((x, y))
    low, high = min(points)[0], max(points)[0]
    axes.set(xscale="log", yscale="log", xlabel="bytes per token, all layers", ylabel="mean KLD, nats")
    axes.set(xlim=(low / 1.5, high * 2.2), ylim=(floor / 2, max(y for _, y in points) * 3))
    axes.set_xticks([tick for k in range(5, 30) if low / 1.5 <= (tick := 2**k) <= high * 2])
    axes.get_xaxis().set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    axes.grid(True)
    axes.get_yaxis().set_major_formatter(_power)
    stairs = [edge[0]]
    for x, y in edge[1:]:
        stairs += [(x, stairs[-1][1]), (x, y)]
    axes.plot(*zip(*stairs, strict=True), color=INK, alpha=0.35, linewidth=1.2, zorder=1)
    for row, (x, y) in zip(some, points, strict=True):
        look = looks[row["candidate"]]
        hollow = {"markerfacecolor": "none"} if row["verdict"] == "equal" else {}
        axes.plot([x], [y], linestyle="", color=look.colour, marker=look.marker, markersize=6, zorder=2, **hollow)
    _name_points(axes, points, [looks[row["candidate"]].name for row in some], stairs)
    return _svg(plt, figure)


def _name_points(
    axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str], stairs: Sequence[tuple[float, float]]
) -> None:
    """Names beside their points, where they meet no other name, point or line; those further off with a thin line."""
    axes.figure.canvas.draw()
    to_points = 72 / axes.figure.dpi
    places = [tuple(axes.transData.transform(point) * to_points) for point in points]
    bends = [tuple(axes.transData.transform(point) * to_points) for point in stairs]
    taken = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    taken += [
        Box(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in itertools.pairwise(bends)
    ]
    frame = axes.get_window_extent()
    room = Box(*(value * to_points for value in (frame.x0, frame.y0, frame.x1 + 60, frame.y1)))
    for point, place, name in sorted(zip(points, places, names, strict=True)):
        box = _free_place(place, 5.6 * len(name), LINE - 2, taken, room)
        taken.append(box)
        dx, dy = box.left - place[0], (box.low + box.high) / 2 - place[1]
        far = not (-4 < dy < 4)
        axes.annotate(
            name,
            point,
            (dx, dy),
            textcoords="offset points",
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.4, "lw": 0.7, "shrinkB": 4} if far else None,
        )


def by_position(run: Mapping[str, Any], looks: Mapping[str, Look]) -> str:
    """Mean KLD of each part of a window; wrong candidates dashed."""
    plt = _pyplot()
    middles = [(first + last) / 2 for first, last in run["positions"]]
    some = [row for row in run["rows"] if row["role"] == "candidate" and row["verdict"] != "equal"]
    lines = []
    for row in some:
        # a logarithm has no place for 0, nor for what is not finite
        ys = [y if math.isfinite(y) and y > 0 else math.nan for y in row["kld_by_position"]]
        if any(y > 0 for y in ys):
            lines.append((row["candidate"], list(zip(middles, ys, strict=True)), row["verdict"] == "wrong"))
    if not lines:
        return ""
    figure, axes = plt.subplots(figsize=(9.5, 4.6))
    largest = max(y for _, points, _ in lines for _, y in points if y > 0)
    axes.set(yscale="log", xlabel="position in the window, tokens", ylabel="mean KLD, nats")
    axes.set_ylim(largest * 1e-5, largest * 2)  # where nothing was compressed yet there is only the noise floor
    axes.get_yaxis().set_major_formatter(_power)
    axes.get_xaxis().set_major_formatter(lambda value, _: f"{value:,.0f}")
    _lines(axes, lines, looks)
    return _svg(plt, figure)


def needles(rows: Rows, looks: Mapping[str, Look]) -> str:
    """A map for each candidate: how many facts were found, by length and depth."""
    plt = _pyplot()
    some = [row for row in rows if row.get("needles")]
    if not some:
        return ""
    columns = min(4, len(some))
    lines = -(-len(some) // columns)
    kinds = sorted({(cell["needles"], cell["length"]) for row in some for cell in row["needles"]})
    depths = sorted({cell["depth"] for row in some for cell in row["needles"]})
    size = (2.6 * columns, lines * (0.9 + 0.34 * len(kinds)))
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for place, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if place >= len(some):
            continue
        axes.set_axis_on()
        cells = {
            (c["needles"], c["length"], c["depth"]): (c["right"], c["of"]) for c in some[place]["needles"] if c["of"]
        }
        shares = [[_share(cells.get((*kind, depth))) for depth in depths] for kind in kinds]
        axes.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for y, kind in enumerate(kinds):
            for x, depth in enumerate(depths):
                if found := cells.get((*kind, depth)):
                    ink = "black" if found[0] / found[1] > 0.5 else "white"
                    axes.text(x, y, f"{found[0]}/{found[1]}", ha="center", va="center", fontsize=8, color=ink)
        name = looks[some[place]["candidate"]].name
        axes.set_title(name, fontsize=9 if len(name) <= 30 else max(4.5, 270 / len(name)))
        axes.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
        names = [f"{length:,}" + (f" ×{count}" if count > 1 else "") for count, length in kinds]
        axes.set_yticks(range(len(kinds)), names if place % columns == 0 else [], fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return _svg(plt, figure)


def _share(found: tuple[int, int] | None) -> float:
    return found[0] / found[1] if found else float("nan")


def over_context(rows: Rows, what: str, looks: Mapping[str, Look]) -> str:
    """One line per candidate over the context: `tpot_ratio`, `state_bytes` or `rss_decode`."""
    plt = _pyplot()
    scale = 1 if what == "tpot_ratio" else 1e-6
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = row[what]["median"] if isinstance(row[what], Mapping) else row[what]
        if value is not None and math.isfinite(value):
            found.setdefault(row["candidate"], []).append((row["context"], value * scale))
    if not found or max(map(len, found.values())) < 2:
        return ""
    figure, axes = plt.subplots(figsize=(9.5, 4.6))
    titles = {
        "tpot_ratio": "TPOT, of the exported model's",
        "state_bytes": "bytes of all states, MB",
        "rss_decode": "peak memory of the process, MB",
    }
    axes.set(xscale="log", xlabel="tokens", ylabel=titles[what])
    values = [y for points in found.values() for _, y in points]
    if what == "tpot_ratio":
        axes.axhline(1, color=INK, linewidth=1, alpha=0.5)
        if max(values) > 4:
            steps = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)
            axes.set(yscale="log", yticks=[y for y in steps if min(values) / 1.5 <= y <= max(values) * 1.2])
    elif what == "state_bytes" and min(values) > 0:
        axes.set_yscale("log", base=2)
    axes.get_yaxis().set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.get_yaxis().set_minor_locator(plt.NullLocator())
    ticks = sorted({x for points in found.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.get_xaxis().set_minor_locator(plt.NullLocator())
    _lines(axes, [(label, sorted(points), False) for label, points in found.items()], looks, what == "rss_decode")
    return _svg(plt, figure)


def _lines(
    axes: Any,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]], bool]],
    looks: Mapping[str, Look],
    from_zero: bool = False,
) -> None:
    """Lines (label, points, dashed) with their names at their right ends, pulled apart where they would meet."""
    for label, points, dashed in lines:
        look = looks[label]
        axes.plot(
            *zip(*points, strict=True),
            color=look.colour,
            marker=look.marker,
            markersize=5,
            linestyle="--" if dashed else "-",
        )
    axes.grid(True)
    axes.autoscale_view()
    if from_zero:
        axes.set_ylim(bottom=0)  # before the names are placed by it
    axes.figure.canvas.draw()
    height = axes.get_window_extent().height * 72 / axes.figure.dpi  # in points, as LINE
    right = axes.transAxes.inverted()
    ends = []
    for label, points, _ in lines:
        end = [point for point in points if not math.isnan(point[1])][-1]
        ends.append((label, *right.transform(axes.transData.transform(end))))
    ups = _spread([min(max(y, 0), 1) * height for _, _, y in ends], LINE, height)
    for (label, x, y), up in zip(ends, ups, strict=True):
        look, at = looks[label], up / height
        style = {"color": look.colour, "transform": axes.transAxes, "clip_on": False}
        axes.plot([x, 1.01, 1.035], [min(max(y, 0), 1), at, at], linewidth=0.7, alpha=0.7, **style)
        axes.plot([1.035], [at], marker=look.marker, markersize=5, **style)
        axes.text(1.05, at, look.name, transform=axes.transAxes, va="center", fontsize=9)


def _power(value: float, _: int) -> str:
    exponent = math.log10(value) if value > 0 else 0.5
    return f"10{str(round(exponent)).translate(SUPER)}" if abs(exponent - round(exponent)) < 1e-6 else ""


def _svg(plt: Any, figure: Any) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts draw the text, not this machine's
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None}
        )
    plt.close(figure)
    return buffer.getvalue()


class Box(NamedTuple):
    """A rectangle; up is positive, the unit whatever the caller draws in."""

    left: float
    low: float
    right: float
    high: float

    def meets(self, other: Box) -> bool:
        """Whether both cover some place."""
        return self.left < other.right and other.left < self.right and self.low < other.high and other.low < self.high


def _spread(wanted: Sequence[float], gap: float, length: float) -> list[float]:
    """Places from 0 to `length`, in the order of `wanted`, `gap` or more apart, with the least squared moves.

    Where there is no room for all, they stand closer: evenly. Neighbours that are too close make a block around the
    mean of what they want (the pool-adjacent-violators algorithm).
    """
    if not wanted:
        return []
    gap = min(gap, length / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[tuple[float, int]] = []  # mean of (wanted − place in the order · gap), how many
    for place, index in enumerate(order):
        mean, count = wanted[index] - place * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, many = blocks.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    highest = length - (len(wanted) - 1) * gap
    free = [min(max(mean, 0.0), highest) for mean, count in blocks for _ in range(count)]
    found = [0.0] * len(wanted)
    for place, index in enumerate(order):
        found[index] = free[place] + place * gap
    return found


def _free_place(
    point: tuple[float, float], width: float, height: float, taken: Sequence[Box], room: Box, reach: int = 12
) -> Box:
    """The nearest box beside a point, right of it or left, that meets nothing taken and stays in the room.

    Tries `reach` half-heights up and down. If nothing is free, the one that meets the fewest boxes.
    """
    x, y = point
    choices: list[tuple[int, float, int, Box]] = []
    for step in range(reach + 1):
        for sign in (1, -1) if step else (1,):
            middle = y + sign * step * height / 2
            away = 8 if step < 2 else 14
            for side, left in enumerate((x + away, x - away - width)):
                box = Box(left, middle - height / 2, left + width, middle + height / 2)
                outside = box.left < room.left or box.right > room.right or box.low < room.low or box.high > room.high
                meets = sum(map(box.meets, taken)) + 3 * outside
                choices.append((meets, step + 0.5 * side, len(choices), box))
    return min(choices)[-1]
