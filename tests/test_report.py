"""The report: one page that needs nothing else, with every figure in it, whatever the names are."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import figures
import pytest
from figures import ODD

from ovtq.cli import report
from ovtq.errors import InputError

pytest.importorskip("matplotlib", reason="needs the extra [eval]")


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    return figures.runs()


def test_every_figure_is_there(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    report.write(tmp_path / "r.html", runs)
    page = (tmp_path / "r.html").read_text()
    for text in (
        "1,728",
        "1.4e-04",
        "99.51%",
        "1.1212",
        "6 of 8",
        "41.5 of 64 tokens, 3 of 8 texts",
        "12.34",
        "0.73",
        "81.2",
        "2,500",
    ):
        assert text in page, text
    for text in (
        "2,500",
        "8,192",
        "8,192,000",
        "the noise floor",
        "WRONG: its results differ by &lt;3&gt;",
        "A CPU, 2 cores, 8 GiB",
        "python 3.11",
        '<span class="wrong">wrong</span>',
        ">equal<",
        "–",
    ):
        assert text in page, text
    assert page.count("<figure>") == 6  # front, positions, needles; TPOT, states, memory
    assert "Who &lt;are&gt; you?" in page


def test_it_needs_nothing_else(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    report.write(tmp_path / "r.html", runs)
    page = (tmp_path / "r.html").read_text()
    named = set(re.findall(r"https?://[^\"'<> ]+", page))
    assert named <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<b>" not in page
    assert "<script" not in page
    assert "#010203" not in page
    ids = re.findall(r' id="([^"]+)"', page)
    used = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert len(set(ids)) == len(ids)
    assert used
    assert set(used) == set(ids)
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not list(ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}style"))
    assert "currentColor" in page


def _everywhere(value: Any, text: str) -> Iterator[tuple[str, Any]]:
    """For each leaf of a JSON value: where it is, and a copy in which `text` stands there."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        inner = list(_everywhere(value[key], text)) if isinstance(value[key], dict | list) else [("", text)]
        for where, changed in inner:
            yield (
                f"/{key}{where}",
                {**value, key: changed}
                if isinstance(value, dict)
                else [changed if index == key else item for index, item in enumerate(value)],
            )


def test_no_field_gets_into_the_page_as_markup(
    runs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A script in any field of either file: escaped, or the file is refused."""
    attack = """"></td></style><script>alert(1)</script><img src=x onerror='alert(2)'>"""
    named = [runs[0] | {"rows": [*runs[0]["rows"][:2], runs[0]["rows"][2] | {"candidate": attack}]}, runs[1]]
    report.write(tmp_path / "r.html", named)
    assert not re.search("<script|<img", (tmp_path / "r.html").read_text(encoding="utf-8"))
    for picture in ("front", "by_position", "needles", "over_context"):  # these take nothing else from a file as text
        monkeypatch.setattr(report.plots, picture, lambda *_: "")
    written = set()
    for number, run in enumerate(runs):
        for where, changed in _everywhere(run, attack):
            try:
                report.write(tmp_path / "r.html", [changed])
            except InputError:
                continue
            page = (tmp_path / "r.html").read_text(encoding="utf-8")
            assert "<script" not in page, where
            assert "<img" not in page, where
            written.add((number, where.rpartition("/")[2]))
    fields = {(0, name) for name in ("chunk", "identical", "tokens", "model", "role", "verdict", "cache", "candidate")}
    fields |= {(1, name) for name in ("cores", "prompt_tokens", "new_tokens", "runs", "cpu", "prompt", "through")}
    assert fields <= written


def test_a_browser_may_load_and_run_nothing(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    """The page's policy lets in one style sheet, by its hash; the pictures have none, not even as attributes."""
    report.write(tmp_path / "r.html", runs)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy).split(";"))
    (sheet,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'", "style-src": f"'sha256-{digest}'", "base-uri": "'none'", "form-action": "'none'"
    }  # fmt: skip
    assert page.index("Content-Security-Policy") < page.index("<style>")
    assert " style=" not in page
    drawn = {key for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) for key in re.findall(r" ([\w-]+)=", svg)}
    assert {"fill", "stroke", "stroke-width", "stroke-linecap", "font-size", "font-family"} <= drawn
    assert "font" not in drawn  # a shorthand, which is no attribute


def test_equal_figures_make_equal_pages(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        report.write(tmp_path / name, runs)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_command(runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "eval.json", tmp_path / "bench.json"]
    for path, run in zip(files, runs, strict=True):
        path.write_text(json.dumps(run))
    assert report.main([*map(str, files), "--output", str(tmp_path / "out.html")]) == 0
    assert (tmp_path / "out.html").is_file()
    del runs[0]["rows"][0]["cache"]
    files[0].write_text(json.dumps(runs[0]))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")
    for options, message in (
        ([tmp_path / "bad.json"], "can't be read"),
        ([tmp_path / "list.json"], "not written by ovtq-eval or ovtq-bench"),
        ([tmp_path / "none.json"], "no such file"),
        ([files[0], "--output", tmp_path / "x.html"], "not of this version's form"),
        ([files[1], "--output", tmp_path / "nowhere" / "x.html"], "--output " + str(tmp_path / "nowhere")),
    ):
        assert report.main([str(option) for option in options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if "x.html" in path.name]


def test_short_names() -> None:
    assert report.plots.short("stock:KV_CACHE_PRECISION=u8") == "stock u8"
    assert report.plots.short("stock:VALUE_CACHE_PRECISION=u4") == "stock V u4"
    turbo = "KEY_CACHE_QUANT_ALG=TURBO,VALUE_CACHE_QUANT_ALG=TURBO,KEY_CACHE_PRECISION=u4,VALUE_CACHE_PRECISION=u4"
    assert report.plots.short(f"stock:{turbo}") == "stock TURBO u4"
    assert report.plots.short("some/where/k6v4/") == "k6v4"
    assert report.plots.short("host:prune128") == "host:prune128"
    assert report.plots.short("paged:a/rotate,KV_CACHE_PRECISION=u4") == "paged:rotate u4"


def test_any_name_is_written_as_it_is(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    names = ["out/a$b_c$d", r"out/$\frac$", "out/_hidden", "모델/결과", "out/#010203", "out/a--b"]
    known, like = runs[0]["rows"], runs[0]["rows"][2]
    known += [like | {"candidate": name, "bytes_per_token": 100 * n} for n, name in enumerate(names, 1)]
    report.write(tmp_path / "r.html", runs[:1])
    pictures = re.findall(r"<svg.*?</svg>", (tmp_path / "r.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:  # front, positions, needles
        texts = [text.strip() for text in ElementTree.fromstring(picture).itertext()]
        assert {name.rpartition("/")[2] for name in names} <= set(texts)


def test_what_no_page_can_hold_is_made_visible(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    runs[0]["rows"][2]["candidate"] = "out/\x01\ud800"
    report.write(tmp_path / "r.html", runs[:1])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "\ufffd\ufffd" in page
    assert "\x01" not in page


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((0, "rows", 2, "mean_kld"), "x"),
        ((0, "rows", 2, "mean_kld"), None),
        ((0, "rows", 2, "kld_by_position"), [1e-3]),
        ((0, "rows", 2), "a"),
        ((0, "versions"), {"openvino": 1, "python": "3"}),
        ((1, "contexts", 1, "tpot_ratio", "median"), "x"),
        ((1, "machine"), None),
    ],
)
def test_another_form_is_one_line(runs: list[dict[str, Any]], tmp_path: Path, where: Any, value: Any) -> None:
    (tmp_path / "r.html").write_text("an older page")
    place: Any = runs
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    sources = [tmp_path / "first.json", tmp_path / "second.json"]
    with pytest.raises(InputError, match=f"{sources[where[0]].name}: the figures are not of this version's form"):
        report.write(tmp_path / "r.html", runs, sources)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older page"]


def test_figures_without_a_logarithm(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    like = runs[0]["rows"][2]
    for value in (float("nan"), float("inf"), 0.0, -1e-9):
        odd = {"candidate": f"out/{value}", "mean_kld": value, "kld_by_position": [value, 1e-3]}
        runs[0]["rows"].append(like | odd | {"bytes_per_token": 500 + len(runs[0]["rows"])})
    report.write(tmp_path / "r.html", runs[:1])
    page = (tmp_path / "r.html").read_text()
    assert all(f'<td class="">{text}</td>' in page for text in ("nan", "inf", "0", "-1.0e-09"))
    front = page[page.index("<svg") : page.index("</svg>")]
    assert [name in front for name in (">nan<", ">inf<", ">0.0<", ">-1e-09<")] == [False, False, True, True]


def test_no_two_candidates_look_alike() -> None:
    turbo = (
        "stock:KEY_CACHE_QUANT_ALG=TURBO,VALUE_CACHE_QUANT_ALG=TURBO,KEY_CACHE_PRECISION={0},VALUE_CACHE_PRECISION={0}"
    )
    long = "x" * 40
    labels = ["a/k6v4", "b/k6v4", turbo.format("u4"), turbo.format("u3"), f"{long}1", f"{long}2"]
    labels += [f"out/{number}" for number in range(30)]
    looks = report.plots.looks(labels)
    assert [looks[label].name for label in labels[:4]] == ["a/k6v4", "b/k6v4", "stock TURBO u4", "stock TURBO u3"]
    assert len({look.name for look in looks.values()}) == len(labels)
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(labels)


def test_a_candidate_has_one_colour_in_every_picture(runs: list[dict[str, Any]]) -> None:
    looks = report.plots.looks([row["candidate"] for row in runs[0]["rows"]])
    colour = looks[ODD].colour
    others = {look.colour for look in looks.values()} - {colour}
    runs[0]["rows"] = runs[0]["rows"][:3]
    pictures = [report.plots.front(runs[0]["rows"], looks), report.plots.by_position(runs[0], looks)]
    for picture in [*pictures, report.plots.over_context(runs[1]["contexts"], "tpot_ratio", looks)]:
        assert colour in picture
        assert not [other for other in others if other in picture]


@pytest.mark.parametrize("what", ["tpot_ratio", "state_bytes", "rss_decode"])
def test_a_name_stands_where_its_line_ends(runs: list[dict[str, Any]], what: str) -> None:
    unit = 0.1 if what == "tpot_ratio" else 1e6
    rows = [
        row | {"candidate": name, what: unit * factor * (10 + number)}
        for number, row in enumerate(runs[1]["contexts"])
        for name, factor in (("low", 1), ("high", 2))  # far enough apart for both names
    ]
    root = ElementTree.fromstring(report.plots.over_context(rows, what, report.plots.looks(["low", "high"])))
    name = next(item for item in root.iter() if item.get("id", "").startswith("axes"))
    for look in report.plots.looks(["low", "high"]).values():
        # markers in the order they are drawn: those of the line, then the one beside the name
        fill = f"fill: {look.colour}"
        marks = [float(item.get("y")) for item in name.iter() if "use" in item.tag and fill in item.get("style", "")]
        assert len(marks) == 3
        assert marks[-1] == pytest.approx(marks[-2], abs=0.01)


def test_names_are_pulled_apart() -> None:
    draw = random.Random(0)
    for count in (1, 2, 7, 15):
        wanted = [draw.uniform(0, 300) if count < 15 else draw.uniform(90, 110) for _ in range(count)]
        found = report.plots._spread(wanted, 13, 300)
        order = sorted(range(count), key=lambda index: wanted[index])
        assert all(found[b] - found[a] >= 13 - 1e-9 for a, b in itertools.pairwise(order))
        assert min(found) >= -1e-9
        assert max(found) <= 300 + 1e-9
    assert report.plots._spread([10, 100, 200], 13, 300) == pytest.approx([10, 100, 200])  # nobody moves in vain
    assert report.plots._spread([100, 100], 13, 300) == pytest.approx([93.5, 106.5])
    assert report.plots._spread([5, 5, 5], 13, 20) == pytest.approx([0, 10, 20])  # no room: evenly


def test_names_beside_points_do_not_meet() -> None:
    Box, draw = report.plots.Box, random.Random(1)
    points = [(draw.uniform(100, 400), draw.uniform(100, 300)) for _ in range(15)]
    taken = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for point in points:
        taken.append(report.plots._free_place(point, 60, 11, taken, Box(0, 0, 500, 400)))
    names = taken[len(points) :]
    assert not [1 for i, name in enumerate(names) for other in taken[: len(points) + i] if name.meets(other)]
    assert Box(0, 0, 2, 2).meets(Box(1, 1, 3, 3))
    assert not Box(0, 0, 2, 2).meets(Box(2, 0, 3, 2))


def test_matplotlib_waits_until_it_is_needed() -> None:
    code = "import ovtq.cli.report, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_matplotlib_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="needs matplotlib"):
        report.check()
