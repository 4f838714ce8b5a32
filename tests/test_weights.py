"""The weights file of a result: the original's bytes, then what is new; and the original never touched."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, TINY, load

import ovtq.verification.extent
from ovtq import conversion, disk, pipeline
from ovtq.cli.convert import main
from ovtq.ir import copying, io, weights
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner


def _constants(model: ov.Model) -> dict[str, tuple[str, tuple[int, ...], str]]:
    return {
        node.get_friendly_name(): (
            node.get_element_type().get_type_name(),
            tuple(node.get_output_shape(0)),
            hashlib.sha256(node.data.tobytes()).hexdigest(),
        )
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    }


@pytest.mark.parametrize("preset", ["exact", "k6v4", "u8"])
def test_the_file_is_what_openvino_would_write(preset: str, tmp_path: Path) -> None:
    """Every constant has the bytes, type and shape that `ov.save_model` gives it; results are equal to the bit."""
    results = []
    for way in ("ours", "theirs"):
        model, description = load(TINY["5.5"])
        model, *_ = pipeline.run(model, description, pipeline.PRESETS[preset].on("cpu"))
        (tmp_path / way).mkdir()
        xml = tmp_path / way / "openvino_model.xml"
        if way == "ours":
            with weights.writing(model, xml, TINY["5.5"] / "openvino_model.bin") as written:
                assert written.how in ("copy", "reflink")
                written.wait()
        else:
            ov.save_model(model, xml, compress_to_fp16=False)
        read = ov.Core().read_model(xml)
        runner = Runner(xml, "CPU", EXACT_PROPERTIES)
        ids = np.random.RandomState(0).randint(0, runner.vocabulary, (1, 70)).astype(np.int64)
        logits = [runner.step(ids), runner.step(ids[:, :1])]
        results.append((_constants(read), [port.get_any_name() for port in read.inputs], len(read.get_ops()), logits))
    ours, theirs = results
    assert ours[:3] == theirs[:3]
    for one, two in zip(ours[3], theirs[3], strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_original_comes_first_and_is_not_touched(convert: Callable[..., Path]) -> None:
    before = (MINI / "openvino_model.bin").read_bytes()
    out = convert(MINI, "--preset", "exact")
    after = (out / "openvino_model.bin").read_bytes()
    assert after[: len(before)] == before
    assert len(after) < len(before) + 500_000
    assert (MINI / "openvino_model.bin").read_bytes() == before
    assert (out / "openvino_model.bin").stat().st_ino != (MINI / "openvino_model.bin").stat().st_ino
    tree = ElementTree.parse(out / "openvino_model.xml")
    kept = [data for data in tree.iter("data") if int(data.get("offset", len(before))) < len(before)]
    assert sum(int(data.get("size")) for data in kept) > 0.98 * len(before)


def _copied(source: Path, target: Path) -> str:
    copy = copying.Copy(source, target)
    copy.start()
    copy.wait()
    copy.stop()
    return copy.how


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, copying.BLOCK, 9 * copying.BLOCK + 4097])
def test_a_clone_is_equal(size: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(np.random.RandomState(size % 97).bytes(size))
    assert _copied(tmp_path / "a", tmp_path / "b") in ("copy", "reflink")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with (tmp_path / "b").open("r+b") as file:
        file.write(b"x")
    assert (tmp_path / "a").read_bytes()[:1] == np.random.RandomState(size % 97).bytes(size)[:1]


@pytest.mark.parametrize("how", ["cached", "evicted", "half evicted", "refused", "unknown"])
def test_blocks_come_from_the_page_cache_or_the_disk(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _no_reflink(monkeypatch)
    monkeypatch.setattr(copying, "BLOCK", 1 << 16)
    source, data = tmp_path / "a", np.random.RandomState(5).bytes(9 << 16)
    source.write_bytes(data)
    if "evicted" in how:
        with source.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0 if how == "evicted" else 5 << 15, os.POSIX_FADV_DONTNEED)
    real, cached = os.preadv, []

    def reads(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags and how == "refused":
            raise OSError(errno.EOPNOTSUPP, "not on this file system")
        found = real(file, buffers, offset, flags)
        cached.append(bool(flags) and found == len(buffers[0]))
        return found

    monkeypatch.setattr(os, "preadv", reads)
    if how == "unknown":
        monkeypatch.setattr(disk, "CACHED", None)
    assert _copied(source, tmp_path / "b") == "copy"
    assert (tmp_path / "b").read_bytes() == data
    if how in ("refused", "unknown"):
        assert cached == [False] * 9
    elif how == "cached" and disk.CACHED is not None:
        assert sum(cached) == 9


def test_direct_writes_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 100)
    real = os.open

    def refuses(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct access")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)
    assert _copied(tmp_path / "a", tmp_path / "b") == "copy"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def _no_reflink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "clone", lambda read, made: False)


def test_what_is_waited_for_comes_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two places in two blocks of twenty; the others are still to come when these are there."""
    _no_reflink(monkeypatch)
    monkeypatch.setattr(copying, "BLOCK", 4096)
    monkeypatch.setattr(copying, "WORKERS", 1)
    data = bytes(range(1, 256)) * 330
    (tmp_path / "a").write_bytes(data[: 20 * 4096])
    copied, real = [], copying.Copy._copy

    def one(self: copying.Copy, buffer: object, start: int) -> None:
        assert go.wait(10)
        real(self, buffer, start)
        copied.append(start // 4096)
        if copied[-1] == 12:
            go.clear()

    monkeypatch.setattr(copying.Copy, "_copy", one)
    go = threading.Event()
    copy = copying.Copy(tmp_path / "a", tmp_path / "b")
    copy.start()
    threading.Timer(0.2, go.set).start()
    copy.wait([(7 * 4096 + 5, 10), (12 * 4096, 4096)])
    assert copied in ([0, 7, 12], [7, 12])  # the first may have been begun
    assert (tmp_path / "b").read_bytes()[12 * 4096 : 13 * 4096] == data[12 * 4096 : 13 * 4096]
    assert not any((tmp_path / "b").read_bytes()[13 * 4096 :])
    go.set()
    copy.wait()
    assert (tmp_path / "b").read_bytes() == data[: 20 * 4096]


def test_a_copy_that_fails_is_told_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The last block, which no layer that is verified needs."""
    _no_reflink(monkeypatch)
    real = copying.Copy._copy

    def fails(self: copying.Copy, buffer: object, start: int) -> None:
        if start + copying.BLOCK >= self.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, buffer, start)

    monkeypatch.setattr(copying.Copy, "_copy", fails)
    for options in ([], ["--no-verify"]):
        assert main([str(MINI), str(tmp_path / "out"), "--preset", "exact", *options]) == 2
        assert "o space left" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("harm", [False, True])
def test_verification_reads_the_copy_and_waits_for_it(
    harm: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Copied slowly from its end a model is verified all the same; with one wrong bit in a projection it is refused."""
    _no_reflink(monkeypatch)
    monkeypatch.setattr(ovtq.verification.extent, "BIG", 1000)
    monkeypatch.setattr(copying, "BLOCK", 1 << 16)
    monkeypatch.setattr(copying, "WORKERS", 2)
    monkeypatch.setattr(ovtq.verification.extent, "ROWS", 100)
    tree = ElementTree.parse(MINI / "openvino_model.xml")
    name = "self.model.layers.3.self_attn.o_proj._openvino_orig_weight"
    weight = next(layer.find("data") for layer in tree.iter("layer") if layer.get("name") == name)
    byte = int(weight.get("offset")) + 1000
    real, precision, copies, left = copying.Copy._copy, conversion.kept_precision, [], []

    def slowly(self: copying.Copy, buffer: object, start: int) -> None:
        time.sleep(0.15)
        real(self, buffer, start)
        copies.append(self)
        if harm and start <= byte < start + copying.BLOCK:
            with self.target.open("r+b") as file:
                file.seek(byte)
                old = file.read(1)[0]
                file.seek(byte)
                file.write(bytes([old ^ 0x80]))

    def last(*args: object) -> str | None:
        left.append(len(copies[-1]._left))
        return precision(*args)

    monkeypatch.setattr(copying.Copy, "_copy", slowly)
    monkeypatch.setattr(conversion, "kept_precision", last)
    assert main([str(MINI), str(tmp_path / "out"), "--preset", "exact"]) == (2 if harm else 0)
    if harm:
        assert "the converted model is wrong on CPU" in capsys.readouterr().err
        assert not any(tmp_path.iterdir())
        return
    assert left[0] > 0  # all but the experts was there before all was
    size = (MINI / "openvino_model.bin").stat().st_size
    with (tmp_path / "out" / "openvino_model.bin").open("rb") as file:
        assert file.read(size) == (MINI / "openvino_model.bin").read_bytes()


def test_shared_blocks_need_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The call that shares blocks is stood in for by one that copies: file systems that have it are not everywhere."""

    def shares(made: int, request: int, read: int) -> None:
        assert request == disk.FICLONE
        os.lseek(read, 0, os.SEEK_SET)
        while block := os.read(read, 1 << 20):
            os.write(made, block)

    assert disk.can_clone(MINI / "openvino_model.bin", tmp_path) in (True, False)
    real = fcntl.ioctl
    monkeypatch.setattr(fcntl, "ioctl", lambda *a: shares(*a) if a[1] == disk.FICLONE else real(*a))
    assert disk.can_clone(MINI / "openvino_model.bin", tmp_path)
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--preset", "exact"]) == 0
    assert '"weights": "reflink"' in (tmp_path / "out" / io.RECORD).read_text()


def test_only_the_places_of_constants_change_in_the_xml() -> None:
    """Whatever the quotes, and what stands in them; a branch's constant may have the name of a weight."""
    text = """<?xml version='1.0'?>
<net name="a &gt; b" version="11"><layers>
  <layer id='0' name='w &quot;>&amp;é' type="Parameter"><data element_type="f32" shape="?"/><output/></layer>
  <layer id="1" name="x" type="Parameter"><data element_type="f32" shape="?" /></layer>
  <layer id="2" name="c" type="Const"><data element_type="i64" offset="0" shape="2" size="16"></data></layer>
  <layer id="3" name="if" type="If"><then_body><layers>
    <layer id="0" name='w &quot;>&amp;é' type="Const"><data offset="16" size="8" element_type="i64" shape=""/></layer>
    <layer id="1" name='w &quot;>&amp;é' type="Parameter"><data element_type="f32" shape="?"/></layer>
  </layers></then_body></layer>
</layers></net>""".encode()
    kept = {'w ">&é': weights.Kept(64, 400, "f32", "10, 10"), "c": weights.Kept(0, 16, "i64", "2")}
    root, old = (ElementTree.fromstring(x) for x in (weights._point_at(text, kept, 4096), text))
    found, before = (list(tree.iter("layer")) for tree in (root, old))
    assert [layer.get("type") for layer in found] == ["Const", "Parameter", "Const", "If", "Const", "Parameter"]
    assert [layer.get("name") for layer in found] == [layer.get("name") for layer in before]
    data = [layer.find("data") for layer in found]
    assert data[0].attrib == {"element_type": "f32", "shape": "10, 10", "offset": "64", "size": "400"}
    assert [data[k].get("offset") for k in (1, 2, 4, 5)] == [None, "4096", "4112", None]
    assert root.get("name") == "a > b"


@pytest.mark.parametrize("harm", ["moved", "changed"])
def test_a_wrong_place_is_noticed(
    harm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without verification, too: it would run four layers of a big model, and this is said of all."""
    real = weights._point_at

    def wrong(xml: bytes, kept: dict[str, weights.Kept], start: int) -> bytes:
        tree = ElementTree.fromstring(real(xml, kept, start))
        consts = [layer.find("data") for layer in tree.iter("layer") if layer.get("type") == "Const"]
        some = [data for data in consts if (int(data.get("offset")) < start) == (harm == "moved")]
        last = max(some, key=lambda data: int(data.get("size")))
        last.set("offset", str(int(last.get("offset")) - 8))
        return ElementTree.tostring(tree)

    monkeypatch.setattr(weights, "_point_at", wrong)
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--preset", "exact", "--no-verify"]) == 2
    assert "is not that of the one in memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_without_experts_every_attention_is_run(target: str, convert: Callable[..., Path], tmp_path: Path) -> None:
    """As a model over 2 GiB is verified: no router, no expert, a state per layer; and a wrong layer is noticed."""
    from ovtq.verification.extent import cut, scope
    from ovtq.verification.verify import TOLERANCE, verify

    model, description = load(TINY["5.5"])  # the nodes behind the last layer live as long as their model does
    assert model.get_variables()
    extent = scope(description, None, experts=False)
    assert (extent.layers, len(extent.joins)) == (4, 3)
    out = convert(TINY["5.5"], "--preset", "exact", "--target", target)
    for folder in (TINY["5.5"], out):
        kinds = [node.get_type_name() for node in cut(io.load(folder), extent).get_ops()]
        assert (kinds.count("TopK"), kinds.count("ScaledDotProductAttention")) == (0, 4 if folder != out else 2)
    xml = "openvino_model.xml"
    found = verify(TINY["5.5"] / xml, out / xml, description.layers, "CPU", 0, extent)
    assert found.relative <= TOLERANCE
    assert found.skipped == 0


@pytest.mark.slow
def test_a_long_embedding_is_shortened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ovtq.verification.extent, "BIG", 1000)
    monkeypatch.setattr(ovtq.verification.extent, "ROWS", 100)
    model = io.load(MINI)
    assert ovtq.verification.extent.shortened(model, 8192) == 100
    tables = [tuple(n.get_output_shape(0)) for n in model.get_ops() if n.get_type_name() == "Constant"]
    assert (100, 384) in tables
    assert main([str(MINI), str(tmp_path / "out"), "--preset", "k6v4", "--target", "cpu"]) == 0
    record = (tmp_path / "out" / io.RECORD).read_text()
    assert '"experts": false' in record
