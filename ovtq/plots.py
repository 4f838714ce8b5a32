"""The pictures of a report, as SVG that takes its text colour from the page: one picture for light and for dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ovtq.errors import InputError

Rows = Sequence[Mapping[str, Any]]

INK = "#010203"  # stands for the page's text colour until the picture is in the page
PAPER = "#040506"  # likewise, its background
# near Okabe and Ito's, for all kinds of colour vision; each shows on white and on black, and markers differ, too
COLOURS = ("#2a8fd6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7fbf3f", "#9a7bc8", "#999999")
MARKERS = "osD^vPX*"
FONT = "system-ui, sans-serif"


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
            "legend.frameon": False,
            "lines.linewidth": 1.8,
        }
    )
    return plt


def check() -> None:
    """Raise InputError if there is no matplotlib."""
    _pyplot()


def _svg(plt: Any, figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    return text.replace("'DejaVu Sans'", FONT).replace("DejaVu Sans", FONT)


def short(label: str, width: int = 34) -> str:
    """A candidate's name where room is short: the last folder of a path, properties without their common words."""
    kind, colon, rest = label.partition(":")
    folder, _, properties = (rest if colon and kind in ("paged", "host", "stock") else label).partition(",")
    if kind == "stock" and colon:
        folder, properties = "stock", rest
    text = folder.rstrip("/").rsplit("/", 1)[-1]
    text = f"{kind}:{text}" if colon and kind in ("paged", "host") else text
    words = _words(properties)
    text = f"{text} {words}".strip()
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


def _style(index: int) -> dict[str, Any]:
    colour = COLOURS[index % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)], "markersize": 6}


def front(rows: Rows) -> str:
    """Mean KLD over bytes a token, both logarithmic, with the line of those that nothing beats in both."""
    plt = _pyplot()
    some = [row for row in rows if row["role"] == "candidate" and row["bytes_per_token"] and row["verdict"] != "wrong"]
    if not some:
        return ""
    figure, axes = plt.subplots(figsize=(9, 5))
    least = min(row["mean_kld"] for row in some if row["verdict"] != "equal") if _lossy(some) else 1e-6
    floor = least / 10  # lossless ones stand below all others, not ten decades away
    points = [(row["bytes_per_token"], max(row["mean_kld"], floor), short(row["candidate"])) for row in some]
    best, edge = float("inf"), []
    for x, y, _ in sorted(points):
        if y < best:
            best = y
            edge.append((x, y))
    axes.step(*zip(*edge, strict=True), where="post", color=INK, alpha=0.35, linewidth=1.2, zorder=1)
    for index, (x, y, _) in enumerate(points):
        axes.plot([x], [y], linestyle="", zorder=2, **_style(index))
    axes.set(xscale="log", yscale="log", xlabel="bytes a token, all layers", ylabel="mean KLD, nats")
    low, high = min(x for x, _, _ in points), max(x for x, _, _ in points)
    axes.set_xlim(low / 1.3, high * 2.2)
    axes.set_xticks([tick for k in range(5, 18) if low / 1.5 <= (tick := 2**k) <= high * 1.5])
    axes.get_xaxis().set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    axes.grid(True)
    _label(axes, points)
    return _svg(plt, figure)


def _lossy(rows: Rows) -> bool:
    return any(row["verdict"] != "equal" for row in rows)


def _label(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names to the right of their points, moved down where they would meet."""
    taken: list[tuple[float, float, float]] = []
    for index, (x, y, name) in sorted(enumerate(points), key=lambda item: -item[1][1]):
        left, top = axes.transData.transform((x, y))
        width, place = 7.2 * len(name), top
        while any(abs(place - other) < 15 and left < b and a < left + width for a, b, other in taken):
            place -= 4
        taken.append((left, left + width, place))
        colour = _style(index)["color"]
        axes.annotate(name, (x, y), (9, (place - top) * 0.72 - 3), textcoords="offset points", fontsize=9, color=colour)


def by_position(run: Mapping[str, Any]) -> str:
    """Mean KLD of each part of a window."""
    plt = _pyplot()
    some = [row for row in run["rows"] if row["role"] == "candidate" and row["verdict"] != "equal"]
    if not some:
        return ""
    figure, axes = plt.subplots(figsize=(9, 4.2))
    middles = [(first + last) / 2 for first, last in run["positions"]]
    for index, row in enumerate(some):
        axes.plot(middles, row["kld_by_position"], label=short(row["candidate"]), **_style(index))
    axes.set(yscale="log", xlabel="position in the window, tokens", ylabel="mean KLD, nats")
    largest = max(max(row["kld_by_position"]) for row in some)
    axes.set_ylim(bottom=largest * 1e-5)  # where nothing was compressed yet there is only the noise floor
    axes.grid(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return _svg(plt, figure)


def needles(rows: Rows) -> str:
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
        cells = {(c["needles"], c["length"], c["depth"]): (c["right"], c["of"]) for c in some[place]["needles"]}
        shares = [[_share(cells.get((*kind, depth))) for depth in depths] for kind in kinds]
        axes.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for y, kind in enumerate(kinds):
            for x, depth in enumerate(depths):
                if found := cells.get((*kind, depth)):
                    ink = "black" if found[0] / found[1] > 0.5 else "white"
                    axes.text(x, y, f"{found[0]}/{found[1]}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_title(short(some[place]["candidate"], 30), fontsize=9)
        axes.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
        names = [f"{length:,}" + (f" ×{count}" if count > 1 else "") for count, length in kinds]
        axes.set_yticks(range(len(kinds)), names if place % columns == 0 else [], fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return _svg(plt, figure)


def _share(found: tuple[int, int] | None) -> float:
    return found[0] / found[1] if found else float("nan")


def over_context(rows: Rows, what: str) -> str:
    """One line a candidate over the context: `tpot_ratio`, `state_bytes` or `rss_decode`."""
    plt = _pyplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        value = row[what]["median"] if isinstance(row[what], Mapping) else row[what]
        line = lines.setdefault(row["candidate"], [])
        if value is not None:
            line.append((row["context"], value))
    styles = {name: _style(index) for index, name in enumerate(lines)}  # the same in every picture
    lines = {name: line for name, line in lines.items() if line}
    if not lines or max(map(len, lines.values())) < 2:
        return ""
    figure, axes = plt.subplots(figsize=(9, 4.2))
    for name, points in lines.items():
        scale = 1 if what == "tpot_ratio" else 1e-6
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, [y * scale for y in ys], label=short(name), **styles[name])
    titles = {
        "tpot_ratio": "TPOT, of the exported model's",
        "state_bytes": "bytes of all states, MB",
        "rss_decode": "peak memory of the process, MB",
    }
    axes.set(xscale="log", xlabel="tokens", ylabel=titles[what])
    if what == "tpot_ratio":
        axes.axhline(1, color=INK, linewidth=1, alpha=0.5)
        ratios = [y for points in lines.values() for _, y in points]
        if max(ratios) > 4:
            axes.set_yscale("log")
            steps = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)
            shown = [step for step in steps if min(ratios) / 1.5 <= step <= max(ratios) * 1.2]
            axes.set_yticks(shown, [f"{step:g}" for step in shown])
            axes.get_yaxis().set_minor_locator(plt.NullLocator())
    elif what == "state_bytes":
        axes.set_yscale("log", base=2)
        axes.get_yaxis().set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.get_xaxis().set_minor_locator(plt.NullLocator())
    axes.grid(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return _svg(plt, figure)
