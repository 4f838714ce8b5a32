"""lm-evaluation-harness as a user runs it: its OpenVINO backend on the exported and on converted models, offline.

The harness scores a document in one call from an empty cache. There attention reads the call's own tokens as they are,
so a packed model must say what the exported one says: what its codes lose is not seen in such a task.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI, ROOT

from ovtq.ir.io import model_xml
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

pytestmark = pytest.mark.slow


def evaluate(model_dir: Path, out: Path, home: Path, batch: int = 1) -> tuple[float, list[float], int]:
    """Bits a byte of ovtq_heldout, the log-likelihood of each of its documents, and how many there are."""
    pytest.importorskip("lm_eval", reason="needs the extra [harness]")
    command = (
        f"lm_eval --model openvino --model_args pretrained={model_dir},ov_config=tools/lm_eval/f32.json --device cpu "
        f"--batch_size {batch} --tasks ovtq_heldout --include_path tools/lm_eval --output_path {out} --log_samples"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home)}
    program, *arguments = command.split()
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        cwd=ROOT,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(out.rglob("results_*.json")).read_text(encoding="utf-8"))
    lines = next(out.rglob("samples_ovtq_heldout_*.jsonl")).read_text(encoding="utf-8").splitlines()
    samples = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    likelihoods = [float(sample["filtered_resps"][0]) for sample in samples]
    return results["results"]["ovtq_heldout"]["bits_per_byte,none"], likelihoods, len(samples)


def reference(text: str) -> float:
    """Log-likelihood of a document behind the first token, from the exported model's logits."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [harness]")
    ids = np.array([[0, *tokenizers.Tokenizer.from_file(str(MINI / "tokenizer.json")).encode(text).ids]])
    logits = Runner(model_xml(MINI), "CPU", EXACT_PROPERTIES).step(ids)[0, :-1].astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    total = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
    return float((logits[np.arange(len(logits)), ids[0, 1:]] - total).sum())


def test_converted_models_in_the_harness(exact: Path, convert: Callable[..., Path], tmp_path: Path) -> None:
    packed = convert(MINI, "--preset", "k6v4", "--target", "cpu")
    stock, of_stock, documents = evaluate(MINI, tmp_path / "stock", tmp_path / "home")
    lines = (ROOT / "tools" / "lm_eval" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert documents == len(lines) == 24
    for index in (0, 23):
        assert of_stock[index] == pytest.approx(reference(json.loads(lines[index])["text"]), rel=1e-5)
    assert len(set(of_stock)) == documents
    for folder, batch in ((exact, 4), (packed, 1)):
        bits, likelihoods, _ = evaluate(folder, tmp_path / f"{batch}", tmp_path / "home", batch)
        assert bits == pytest.approx(stock, rel=1e-6)
        assert likelihoods == pytest.approx(of_stock, rel=1e-5)
        assert likelihoods != of_stock  # to the last bit: another graph ran
