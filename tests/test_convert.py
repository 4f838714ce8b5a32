"""ovtq-convert as a user runs it: what it writes, what it says, and what it leaves behind when something is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import COMMAND, MINI, TINY, fingerprint

from ovtq import __version__
from ovtq.cli.convert import main
from ovtq.codec import AdaptiveUniform
from ovtq.errors import InputError
from ovtq.ir import io
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.states import SCHEMA


def complaint(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on stderr of a run that must fail with exit code 2."""
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("ovtq-convert: ")
    return lines[0]


# ------------------------------------------------------------------------------------------ what it writes


def test_writes_a_whole_folder_and_leaves_the_input_alone(tmp_path: Path) -> None:
    before = fingerprint(MINI)
    assert main([str(MINI), str(tmp_path / "out")]) == 0
    after = fingerprint(tmp_path / "out")
    assert fingerprint(MINI) == before
    assert set(after) == set(before) | {"ovtq.json", "README.md"}
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"openvino_model.xml", "openvino_model.bin"}
    assert os.listdir(tmp_path) == ["out"]


def test_record_and_stamp_say_what_was_done(exact: Path) -> None:
    record = json.loads((exact / "ovtq.json").read_text())
    assert record["ovtq"] == __version__
    assert record["preset"] == "exact"
    assert [step["name"] for step in record["passes"]] == [
        "decouple-length",
        "truncate-window",
        "simplify-mask",
        "rotate-heads",
        "check-call",
    ]
    rotation = {"seed": 0, "tensors": "v", "layers": "full", "basis": "rotation", "calibration": ""}
    assert record["passes"][3]["options"] == rotation
    assert re.fullmatch("[0-9a-f]{16}", record["passes"][3]["facts"]["matrix_sha256"]["64"])
    assert record["versions"]["openvino"] == ov.__version__
    assert record["verified"]["relative"] <= record["verified"]["tolerance"] < 2e-5
    assert record["verified"]["same_top"] == 1
    stamp = io.stamp_of(io.load(exact))
    assert stamp["preset"] == "exact"
    assert stamp["passes"] == record["passes"]
    assert stamp["schema"] == record["schema"] == SCHEMA
    assert stamp["states"] == record["states"]
    assert [state["name"] for state in record["states"]][-2:] == ["ovtq.window", "ovtq.past"]


def test_a_record_of_another_conversion_is_refused(convert: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(convert(TINY["5.5"], "--preset", "k6v4"), tmp_path / "model"))
    Runner(folder / "openvino_model.xml", "CPU")
    record = json.loads((folder / "ovtq.json").read_text())
    step = next(step for step in record["passes"] if step["name"] == "quantize-kv")
    assert step["facts"]["quantizer_sha256"] == {"key": "eeb1307a1a7c739f", "value": AdaptiveUniform(4, 64).digest}
    assert step["facts"]["layers"] == [1, 3]
    assert step["options"]["residual_window"] == 64
    step["options"]["k_bits"] = "8"
    (folder / "ovtq.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="tells of another conversion than"):
        Runner(folder / "openvino_model.xml", "CPU")


def test_verifying_the_first_layers_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(TINY["4.57"]), str(tmp_path / "out"), "--verify-layers", "2"]) == 0
    assert "verified on CPU at f32, the first 2 layers:" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "ovtq.json").read_text())["verified"]["layers"] == 2


@pytest.mark.parametrize(("target", "row"), [("gpu", 80 // 2 + 2 + 2), ("cpu", 64 // 2 + 4 + 4)])
def test_a_cache_of_the_plugin(target: str, row: int, convert: Callable[..., Path]) -> None:
    """What the record says of it: bytes per token, and that the compiled model really keeps it so."""
    record = json.loads(
        (convert(TINY["5.5"], "--preset", "u4", "--target", target, verified=True) / "ovtq.json").read_text()
    )
    assert record["state_bytes"]["after"]["per_token"] == 2 * 2 * 2 * row  # layers, K and V, heads
    assert record["verified"]["cache_precision"] == "u4"
    assert "sink-row" in [step["name"] for step in record["passes"]] or target == "cpu"


def test_filling_states_as_after_so_many_tokens(convert: Callable[..., Path]) -> None:
    """Also behind a sink's row; but not a 4-bit cache, whose state the CPU plugin can't set without harm."""
    folders = [convert(TINY["5.5"], "--preset", preset) for preset in ("u8", "u4")]
    filled, refused = (Runner(folder / "openvino_model.xml", "CPU") for folder in folders)
    filled.fill(50)
    assert np.isfinite(filled.step(np.array([[1]]))).all()
    rows = {state.name: state.state.shape[2] for state in filled.request.query_state()}
    assert rows["ovtq.1.key"] == 1 + 50 + 1
    with pytest.raises(InputError, match="corrupts its memory"):
        refused.fill(50)


def test_a_cache_that_packed_layers_have_not_is_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed layers have no cache that a plugin could keep: the pass is left out, and that is told."""
    passes = "decouple-length,truncate-window,quantize-kv,cache-precision"
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--passes", passes, "--no-verify"]) == 0
    assert "left out: no layer's cache is left to the plugin" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "ovtq.json").read_text())
    assert record["skipped"] == {"cache-precision": "no layer's cache is left to the plugin"}


@pytest.mark.parametrize("preset", ["exact", "k6v4", "u8"])
def test_the_same_conversion_gives_the_same_file(preset: str, convert: Callable[..., Path], tmp_path: Path) -> None:
    first = convert(MINI, "--preset", preset, verified=preset == "exact")
    assert main([str(MINI), str(tmp_path / "again"), "--preset", preset, "--no-verify"]) == 0
    for name in ("openvino_model.xml", "openvino_model.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()


def test_bytes_in_the_record_are_the_bytes_on_the_device(exact: Path) -> None:
    record = json.loads((exact / "ovtq.json").read_text())["state_bytes"]
    assert record["before"]["per_token"] == 6 * 2 * 2 * 64 * 4  # layers, K and V, kv_heads, head_dim, f32
    assert record["after"]["per_token"] == record["before"]["per_token"] // 2
    for folder, side in ((MINI, "before"), (exact, "after")):
        runner = Runner(folder / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
        runner.step(np.ones((1, 300), np.int64))
        runner.step(np.ones((1, 1), np.int64))
        assert runner.state_bytes() == record[side]["flat"] + 301 * record[side]["per_token"]


def test_weights_keep_their_types(exact: Path) -> None:
    def weights(folder: Path) -> list[str]:
        return sorted(
            f"{node.get_element_type().get_type_name()}{node.get_output_shape(0)}"
            for node in io.load(folder).get_ops()
            if node.get_type_name() == "Constant" and np.prod(node.get_output_shape(0)) > 70_000
        )

    assert weights(exact) == weights(MINI)
    assert any(kind.startswith(("u4", "i4")) for kind in weights(exact))


def test_dry_run_writes_nothing_and_says_the_bytes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(MINI), "--preset", "k6v4", "--dry-run", "--json", str(tmp_path / "record.json")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"per token +3,072 +504", out)  # 3 full layers, 2 KV heads, 48 + 32 bytes of codes, 2 scales
    assert "dry run: nothing was written" in out
    assert os.listdir(tmp_path) == ["record.json"]
    assert json.loads((tmp_path / "record.json").read_text())["verified"] is None


def test_pass_list_and_settings(convert: Callable[..., Path]) -> None:
    folder = convert(
        TINY["5.5"],
        "--passes",
        "decouple-length,truncate-window:slack=3",
        "--set",
        "truncate-window.slack=9",
        "--target",
        "cpu",
    )
    record = json.loads((folder / "ovtq.json").read_text())
    assert record["preset"] is None
    assert record["passes"][1]["options"]["slack"] == 9
    assert record["passes"][1]["exact"]
    assert record["passes"][1]["facts"]["rows"] == 24
    assert record["state_bytes"]["before"]["per_token"] == 4 * 2 * 2 * 64 * 4  # f32 on the CPU


def test_dump_after_prints_the_graph_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(TINY["5.5"]), "--preset", "k6v4", "--dry-run", "--dump-after", "truncate-window"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("# after truncate-window\n%0 = Parameter{'name': [")
    assert "state ovtq.window : f32[?,8,15,64]" in captured.out
    assert "dry run" in captured.err


def test_force_replaces_an_earlier_result(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(TINY["5.5"]), str(out), "--preset", "rotate"]) == 0
    capsys.readouterr()
    assert "not empty; --force replaces it" in complaint(capsys, TINY["5.5"], out)
    assert main([str(TINY["5.5"]), str(out), "--force"]) == 0
    assert json.loads((out / "ovtq.json").read_text())["preset"] == "u8"
    assert os.listdir(tmp_path) == ["out"]


def test_force_does_not_replace_a_folder_it_did_not_make(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "not made by ovtq" in complaint(capsys, TINY["5.5"], tmp_path, "--force")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_converted_model_is_not_converted_again(
    capsys: pytest.CaptureFixture[str], exact: Path, tmp_path: Path
) -> None:
    line = complaint(capsys, exact, tmp_path / "twice")
    assert f"already converted (exact, ovtq {__version__}); convert the original model instead" in line
    assert not any(tmp_path.iterdir())


def test_loader_of_another_file_name_in_subfolders_is_kept(tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / "assets").mkdir()
    (tiny_copy / "assets" / "note.txt").write_text("kept")
    assert main([str(tiny_copy), str(tmp_path / "out"), "--no-verify"]) == 0
    assert (tmp_path / "out" / "assets" / "note.txt").read_text() == "kept"
    assert json.loads((tmp_path / "out" / "ovtq.json").read_text())["verified"] is None


def test_what_a_host_compiled_is_not_copied(tiny_copy: Path, tmp_path: Path) -> None:
    """optimum-intel leaves it in the folder of a model that it ran on a GPU: it is of another model than the result."""
    (tiny_copy / "model_cache").mkdir()
    (tiny_copy / "model_cache" / "1.blob").write_text("compiled")
    assert main([str(tiny_copy), str(tmp_path / "out"), "--no-verify"]) == 0
    assert not (tmp_path / "out" / "model_cache").exists()


# ------------------------------------------------------------------------------------------ bad input


def _cut(folder: Path) -> None:
    with (folder / "openvino_model.bin").open("r+b") as file:
        file.truncate(1000)


def _no_states(folder: Path) -> None:
    x = ov.opset15.parameter([-1, -1], np.int64, name="input_ids")
    model = ov.Model([ov.opset15.convert(x, ov.Type.f32)], [x])
    inputs = [ov.opset15.parameter([-1, -1], np.int64) for _ in range(3)]
    for node, name in zip([x, *inputs], ("input_ids", "attention_mask", "beam_idx", "position_ids"), strict=True):
        node.output(0).set_names({name})
    model.add_parameters(inputs)
    ov.save_model(model, folder / "openvino_model.xml")


def _config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, r"model: no such folder"),
        (lambda d: (d / "openvino_model.xml").unlink(), r"model: no openvino_model.xml in it \(found config.json, "),
        (lambda d: (d / "openvino_model.bin").unlink(), r"openvino_model.bin: no such file"),
        (_cut, r"openvino_model.bin: cut off, 1000 bytes of 17\d+"),
        (lambda d: (d / "openvino_model.xml").write_text("<html></html>"), r"not an OpenVINO IR \(its root is <html>"),
        (lambda d: (d / "openvino_model.xml").write_text("once upon a time"), r"not an OpenVINO IR \(syntax error"),
        (lambda d: (d / "openvino_model.xml").write_text("<net></net>"), r"OpenVINO can't read it"),
        (_no_states, r"the model has no states; export it as a stateful model"),
        (lambda d: (d / "config.json").unlink(), r"config.json: no such file"),
        (lambda d: _config(d, "{"), r"config.json: can't be read"),
        (lambda d: _config(d, "[]"), r"config.json: expected a JSON object"),
        (lambda d: _config(d, '{"model_type": "gpt_oss"}'), r"layer_types must be a list of sliding_attention"),
        (lambda d: (d / "openvino_model.xml").write_text('<net><data offset="1"/></net>'), r"not an OpenVINO IR"),
        (lambda d: _config(d, '{"num_hidden_layers": 3}'), r"config.json has 3 layers, the graph has 4"),
    ],
)
def test_bad_models(
    harm: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str], tiny_copy: Path, tmp_path: Path
) -> None:
    harm(tiny_copy)
    left = fingerprint(tiny_copy) if tiny_copy.exists() else {}
    assert re.search(message, complaint(capsys, tiny_copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert (fingerprint(tiny_copy) if tiny_copy.exists() else {}) == left


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{model}"], "OUT_DIR is missing"),
        ([], "the following arguments are required: MODEL_DIR; see ovtq-convert --help"),
        (["{model}", "{model}"], "must not be the model's folder, inside it or around it"),
        (["{model}", "{model}/out"], "must not be the model's folder, inside it or around it"),
        (["{model}", "{model}/.."], "must not be the model's folder, inside it or around it"),
        (["{model}", "{model}/config.json/out"], "must not be the model's folder, inside it or around it"),
        (["{model}", "{tmp}/file"], "file: is a file; choose a folder"),
        (["{model}", "{tmp}/file/out"], "can't be written to"),
        (["{model}", "{tmp}/out", "--preset", "best"], "invalid choice: 'best'"),
        (["{model}", "{tmp}/out", "--passes", "shrink"], "no pass is named 'shrink'; there are decouple-length, "),
        (["{model}", "{tmp}/out", "--passes", ","], "--passes names no pass"),
        (["{model}", "{tmp}/out", "--passes", "rotate-heads:seed"], "expected OPTION=VALUE, got 'seed'"),
        (["{model}", "{tmp}/out", "--passes", "truncate-window"], "truncate-window: lengths in this model come from"),
        (["{model}", "{tmp}/out", "--set", "sink-row.seed=x"], "sink-row: seed needs int, got 'x'"),
        (["{model}", "{tmp}/out", "--set", "seed=1"], "--set seed=1: write PASS.OPTION=VALUE"),
        (
            ["{model}", "{tmp}/out", "--preset", "exact", "--k-bits", "4"],
            "--set quantize-kv.k-bits=4: write PASS.OPTION",
        ),
        (["{model}", "{tmp}/out", "--k-bits", "7"], "quantize-kv: k-bits is one of none, 2, 3, 4, 5, 6, 8, got '7'"),
        (
            ["{model}", "{tmp}/out", "--protect", "middle"],
            "protect: expected first:N, last:N or an index, got 'middle'",
        ),
        (["{model}", "{tmp}/out", "--protect", "0"], "protect: layer 0 is no full layer; those are 1, 3"),
        (["{model}", "{tmp}/out", "--residual-window", "few"], "quantize-kv: residual-window needs int, got 'few'"),
        (["{model}", "{tmp}/out", "--window-bits", "8"], "--window-bits: expected K,V such as 8,4, got '8'"),
        (["{model}", "{tmp}/out", "--window-bits", "8,none"], "k-bits and v-bits go together: give both or neither"),
        (["{model}", "{tmp}/out", "--window-bits", "7,4"], "k-bits is one of none, 2, 3, 4, 5, 6, 8, got '7'"),
        (["{model}", "{tmp}/out", "--verify-device", "NPU"], "device NPU is not there; available: CPU"),
        (["{model}", "{tmp}/out", "--verify-seed", "-1"], "--verify-seed must be from 0 to"),
        (["{model}", "{tmp}/out", "--verify-layers", "0"], "--verify-layers must be at least 1, got 0"),
        (["{model}", "{tmp}/out", "--json", "{tmp}/no/x.json"], "no such folder"),
        (["{model}", "{tmp}/out", "--json", "{tmp}"], "not a file that can be written"),
        (["{model}", "--dry-run", "--json", "{model}/config.json"], "must not be inside"),
        (["{model}", "{tmp}/out", "--json", "{tmp}/out/x.json"], "no such folder"),
        (["{model}", "{tmp}/out", "--passes", ""], "--passes names no pass"),
        (["{model}", "{tmp}/out", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tiny_copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    before = fingerprint(tmp_path)
    line = complaint(capsys, *(arg.format(model=tiny_copy, tmp=tmp_path) for arg in args))
    assert message in line
    assert fingerprint(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_no_space_left(capsys: pytest.CaptureFixture[str], small_disk: Path) -> None:
    line = complaint(capsys, MINI, small_disk / "out")
    assert re.search(r"no space left \(\d MiB free, \d+ MiB needed\)", line)
    assert not any(small_disk.iterdir())


def test_a_write_that_fails_halfway(tmp_path: Path) -> None:
    """The system refuses to let the weights grow past 1 MB, as a quota would; OpenVINO itself does not notice."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        [*COMMAND, MINI, tmp_path / "out"], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "the model could not be written" in done.stderr
    assert not any(tmp_path.iterdir())
