"""Compile a stateful language model on a device, run a few steps, report what became of it.

    emulated PYTHON probe.py MODEL_DIR --config INFERENCE_PRECISION_HINT=f16 --out logits.npz
    virtual  PYTHON probe.py MODEL_DIR --compile-only

Prints a JSON report: configuration, seconds, and the runtime graph (nodes by type and by primitive,
the fused `kv_cache` nodes with their dtype, the fused attention, the outputs' precision); with
--launches also the kernels, copies and waits of every step, what was built meanwhile, by the kernel's name, and its
memory: `peak` and `held` are the bytes that the plugin has allocated at most meanwhile and afterwards, weights, states
and all. Exit codes: 2 usage, 3 compile failed, 4 a step failed.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as op
from openvino.op.util import VariableInfo

SEVERAL = "several"  # the input that --branch-by-length adds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with openvino_model.xml")
    parser.add_argument("--device", default="GPU")
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--steps",
        default="40,1,1,7,1",
        help="tokens of each step (%(default)s); =N: go on as after N tokens, zeros if the plugin lets states be set",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random token ids")
    parser.add_argument("--out", type=Path, help=".npz or .json: the report and each step's logits")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--launches", action="store_true", help="count them from FAKE_GPU_RUNLOG")
    parser.add_argument(
        "--branch-by-length",
        action="store_true",
        help="tell every If by an input of its own whether a step has several tokens: a packed model then takes the "
        "branch it should, too, on `virtual`, where the condition that the graph computes is garbage, and one with "
        "kernels of ovtq does not take them for missing",
    )
    parser.add_argument(
        "--last-logits", action="store_true", help="compute those of each step's last token only, as GenAI does"
    )
    args = parser.parse_args()
    if not (args.model / "openvino_model.xml").is_file():
        parser.error(f"{args.model} has no openvino_model.xml")
    if args.out and args.out.suffix not in (".npz", ".json"):
        parser.error(f"--out {args.out}: the name must end in .npz or .json")
    if bad := [item for item in args.config if "=" not in item]:
        parser.error(f"--config {bad[0]}: expected KEY=VALUE")
    if not re.fullmatch(r"=?[1-9]\d*(,=?[1-9]\d*)*", args.steps):
        parser.error(f"--steps {args.steps}: expected numbers like 40,1,1 or 1,=2048,1")
    kernels = args.model / "ovtq_kernels" / "kernels.xml"
    own = {"CONFIG_FILE": str(kernels.resolve())} if kernels.is_file() else {}
    args.config = own | dict(item.split("=", 1) for item in args.config)
    args.steps = args.steps.split(",")
    return args


def stop(code: int, what: str, error: RuntimeError) -> NoReturn:
    """Exit with one line: what OpenVINO's nested message ends in, after the pass that threw it."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("Exception from ")]
    passes = re.findall(r"^\[(\w+)\] (?:START|END): node: ", str(error), re.MULTILINE)
    print(f"{what} failed: {': '.join(passes[:1] + lines[-1:])}", file=sys.stderr)
    sys.exit(code)


def extended(xml: Path) -> ov.Core:
    """A core that reads the model, with operations of ovtq, too, if it has them."""
    if 'type="Ovtq' in xml.read_text(encoding="utf-8"):
        from ovtq.ir.operations import core

        return core()
    return ov.Core()


def branch_by_length(model: ov.Model) -> None:
    """Give the model an input `several`, the condition of every If; what asks for kernels of ovtq is told they run."""
    several = op.parameter([1], ov.Type.boolean, name=SEVERAL)
    several.output(0).set_names({SEVERAL})
    for node in model.get_ops():
        if node.get_type_name() == "If":
            node.input(0).replace_source_output(several.output(0))
        elif node.get_type_name() in ("Inverse", "OvtqGuard"):
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(op.constant(np.ones((1, 1, 1), np.float32)).output(0))
    model.add_parameters([several])
    model.validate_nodes_and_infer_types()


def only_last_logits(model: ov.Model) -> None:
    """Cut the input of the output layer to its last token."""
    product = next(result for result in model.get_results() if "logits" in result.output(0).get_names())
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).get_node()
    last, end, axis = (op.constant([number], np.int64) for number in (-1, np.iinfo(np.int64).max, 1))
    product.input(0).replace_source_output(
        op.slice(product.input_value(0), last, end, op.constant([1], np.int64), axis).output(0)
    )
    model.validate_nodes_and_infer_types()


def compile_model(core: ov.Core, model: ov.Model, args: argparse.Namespace) -> ov.CompiledModel:
    if "CACHE_DIR" not in args.config:
        return core.compile_model(model, args.device, args.config)
    # The kernels kept there are wanted, the compiled models (*.blob) are not: the GPU's are served
    # again when another KV_CACHE_PRECISION is asked for. A model with a mark of its own meets none.
    model.set_rt_info(str(uuid.uuid4()), ["ovtq", "probe"])
    cache = Path(args.config["CACHE_DIR"])
    before = set(cache.glob("*.blob"))
    compiled = core.compile_model(model, args.device, args.config)
    for blob in set(cache.glob("*.blob")) - before:
        blob.unlink(missing_ok=True)
    return compiled


def broadcast(attention: ov.Node) -> bool:
    """Whether K or V is copied to all query heads between its cache and a fused attention of the GPU."""
    for port in (1, 2):
        node = attention.input_value(port).get_node()
        while (kind := node.get_rt_info()["layerType"].astype(str)) in ("Reshape", "Permute", "Reorder"):
            node = node.input_value(0).get_node()
        if kind == "broadcast":
            return True
    return False


def describe_graph(compiled: ov.CompiledModel) -> dict[str, Any]:
    """What the device runs. The GPU chooses some primitives only when the first step runs."""
    nodes = [
        {key: value.astype(str) for key, value in node.get_rt_info().items()}
        | {"name": node.get_friendly_name(), "op": node.get_type_name(), "node": node}
        for node in compiled.get_runtime_model().get_ordered_ops()
    ]
    return {
        "nodes": len(nodes),
        "layer_types": dict(Counter(node["layerType"] for node in nodes).most_common()),
        "primitives": dict(Counter(node["primitiveType"] for node in nodes).most_common()),
        "kv_cache": [  # a node of its own on the GPU, part of the fused attention on the CPU
            {"name": node["name"], "dtype": node.get("kv_cache_precision", node["outputPrecisions"])}
            for node in nodes
            if node["layerType"] == "kv_cache" or "kv_cache_precision" in node
        ],
        "attention": [  # one primitive each; what an If contains is not shown
            {"name": node["name"], "broadcast": broadcast(node["node"])}
            for node in nodes
            if node["layerType"] == "scaled_dot_product_attention"
        ],
        "outputs": [node["outputPrecisions"] for node in nodes if node["op"] == "Result"],
    }


def count_launches(log: Path, start: int) -> dict[str, Any]:
    """Counts over the launch log from byte `start` on (K is a kernel, C a copy, S a wait), and its range of bytes."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read()
    lines = [line.split(maxsplit=3) for line in text.splitlines()]
    kinds = Counter(line[0] for line in lines)
    copied = sum(int(line[2]) for line in lines if line[0] == b"C")
    counts = {"kernels": kinds[b"K"], "copies": kinds[b"C"], "bytes": copied, "waits": kinds[b"S"]}
    built = Counter(line[1].decode() for line in lines if line[0] == b"B")
    return counts | {"built": dict(built), "log": [start, start + len(text)]}


class Memory:
    """What the plugin has allocated, by the launch log: M kind address bytes, F address."""

    def __init__(self, log: Path) -> None:
        self.log, self.read, self.held = log, 0, {}

    def follow(self) -> dict[str, int]:
        """Read on to the end of the log: the most bytes held since the last call, and those held now."""
        with self.log.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        self.read += len(text)
        peak = now = sum(self.held.values())
        for line in text.splitlines():
            kind, *rest = line.split()
            if kind == b"M":
                self.held[rest[1]] = int(rest[2])
                now += self.held[rest[1]]
                peak = max(peak, now)
            elif kind == b"F":
                now -= self.held.pop(rest[0], 0)
        return {"peak": peak, "held": now}


def fill_states(request: ov.InferRequest, infos: dict[str, VariableInfo], tokens: int) -> bool:
    """Set every state that grows, (batch, heads, tokens, d), to `tokens` zeros; those of fixed length stay as they are.

    False, and nothing set, if the plugin does not take states: it does not take those that it compresses itself.
    """
    shapes = {state.name: infos[state.name].data_shape for state in request.query_state()}
    lengths = {name: shape[2] for name, shape in shapes.items() if len(shape) == 4}
    growing = [state for state in request.query_state() if state.name in lengths and lengths[state.name].is_dynamic]
    for count, state in enumerate(growing):
        heads, width = (shapes[state.name][axis].get_length() for axis in (1, 3))
        try:
            state.state = ov.Tensor(np.zeros((1, heads, tokens, width), infos[state.name].data_type.to_dtype()))
        except RuntimeError:
            if count:
                raise
            return False
    return True


def run_steps(
    compiled: ov.CompiledModel, infos: dict[str, VariableInfo], args: argparse.Namespace, log: Path | None
) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
    """Logits of each step's last token, shape (steps, vocabulary), and a report of each step."""
    vocabulary = compiled.output("logits").partial_shape[-1].get_length()
    names = [port.any_name for port in compiled.inputs]
    rng = np.random.default_rng(args.seed)
    request = compiled.create_infer_request()
    logits, reports, past = [], [], 0
    memory = Memory(log) if log else None
    for item in args.steps:
        tokens = int(item.strip("="))
        if item.startswith("="):
            if tokens <= past:
                raise RuntimeError(f"--steps: {item} after {past} tokens")
            if fill_states(request, infos, tokens):
                past = tokens
                continue
            tokens -= past
        total = past + tokens
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": rng.integers(0, vocabulary, (1, tokens)),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        if unknown := set(names) - {*inputs, SEVERAL}:
            raise RuntimeError(f"the model has inputs that probe.py cannot fill: {sorted(unknown)}")
        if memory:
            memory.follow()  # what the step before, or setting states, has left
        mark, start = log.stat().st_size if log else 0, time.perf_counter()
        if SEVERAL in names:  # written in place: what is copied to a virtual device does not arrive
            request.get_tensor(SEVERAL).data[:] = tokens > 1
        request.infer({name: inputs[name] for name in names if name in inputs})
        logits.append(request.get_tensor("logits").data[0, -1].astype(np.float32))
        step = {"tokens": tokens, "past": past, "seconds": round(time.perf_counter() - start, 3)}
        reports.append(step | (count_launches(log, mark) | memory.follow() if log else {}))
        past = total
    return np.stack(logits), reports


def probe(args: argparse.Namespace, log: Path | None) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """The report, and the logits (empty if nothing ran)."""
    start = time.perf_counter()
    try:
        xml = args.model / "openvino_model.xml"
        core = extended(xml)
        model = core.read_model(xml)
        infos = {variable.info.variable_id: variable.info for variable in model.get_variables()}
        if args.branch_by_length and any(node.get_type_name() == "If" for node in model.get_ops()):
            branch_by_length(model)
        if args.last_logits:
            only_last_logits(model)
        compiled = compile_model(core, model, args)
    except RuntimeError as error:
        stop(3, "compile", error)
    report = {
        "openvino": ov.__version__,
        "config": args.config,
        "compile_seconds": round(time.perf_counter() - start, 3),
    }
    if log and not log.exists():
        print("no launch log: run under `emulated`, or `FAKE_GPU_RUNLOG=FILE virtual`", file=sys.stderr)
        sys.exit(2)
    if log:
        report["held"] = Memory(log).follow()["held"]
    logits = np.empty((0, 0), np.float32)
    if not args.compile_only:
        try:
            logits, report["steps"] = run_steps(compiled, infos, args, log)
        except RuntimeError as error:
            stop(4, "run", error)
    return report | {"graph": describe_graph(compiled)}, logits


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        log = None
        if args.launches:  # the layer reads the variable when the GPU plugin first asks for devices
            log = Path(os.environ.setdefault("FAKE_GPU_RUNLOG", f"{scratch}/launches.log"))
        report, logits = probe(args, log)
    text = json.dumps(report, indent=1)
    print(text)
    if args.out and args.out.suffix == ".npz":
        np.savez(args.out, logits=logits, report=np.array(text))
    elif args.out:
        args.out.write_text(json.dumps(report | {"logits": logits.tolist()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
