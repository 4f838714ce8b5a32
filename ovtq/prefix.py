"""A prompt's beginning that is read once: the states of a running model to a file, and back.

A long system prompt or document costs its whole prefill at every start. What it leaves behind is the states alone;
they are written as they are, with the model's fingerprint and the token ids that they stand for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import openvino as ov

from ovtq import __version__, archives, files
from ovtq.errors import InputError, telling
from ovtq.ir import io
from ovtq.states import IN_PLACE

SCHEMA = 1
HEADER, TOKENS, STATE = "header", "tokens", "state/"  # entries of the file, the last with a state's name behind it
SAMPLES, SAMPLE = 64, 1 << 16  # blocks of the weights that the fingerprint reads, and their bytes
KNOWN = {"f32", "f16", "i8", "u8", "i32", "i64"}  # types of states that numpy holds as they are

Running: TypeAlias = Any  # an ov.InferRequest, or an OVModelForCausalLM of optimum-intel


class Past(tuple[Any, ...]):
    """What a model has read, in the form that `generate(…, past_key_values=past)` of optimum-intel takes.

    `tokens` are the ids, (batch, tokens).
    """

    is_compileable = False
    tokens: np.ndarray

    def __new__(cls, tokens: np.ndarray) -> Past:
        """One empty cache, as optimum-intel itself passes on for a stateful model."""
        made = super().__new__(cls, ((),))
        made.tokens = tokens
        return made

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens read; the name is that of transformers' caches."""
        return int(self.tokens.shape[1])


@telling
def read_prompt(host: Running, ids: Any, chunk: int = 1024) -> Past:
    """Let an OVModelForCausalLM read `ids` (batch, tokens), without padding, in calls of `chunk` tokens.

    A long prompt in one call takes memory that grows with its length. The last token is left for `generate`, which
    takes all ids again: `host.generate(ids, past_key_values=ovtq.read_prompt(host, ids))`. Raises InputError.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk must be a whole number from 1, got {chunk!r}")
    whole = _tokens(ids)
    if whole.shape[1] < 2:
        raise InputError("nothing to read: the last token of a prompt is left for generate")
    import torch

    read, past = torch.from_numpy(whole[:, :-1].copy()), None
    for start in range(0, read.shape[1], chunk):
        part = read[:, start : start + chunk]
        shown = torch.ones((len(part), start + part.shape[1]), dtype=torch.int64)
        past = host(part, attention_mask=shown, past_key_values=past).past_key_values
    return Past(read.numpy())


@telling
def save_state(running: Running, path: str | Path, ids: Any, model_dir: str | Path | None = None) -> None:
    """Write the states of a model that has read `ids` (batch, tokens), without padding, to a file.

    `model_dir` is the folder that was loaded; an OVModelForCausalLM knows its own. The file is a NumPy archive without
    pickles. Raises InputError if a state can't be written, or the file can't.
    """
    request, folder, tokens = _request(running), _folder(running, model_dir), _tokens(ids)
    read = getattr(running, "_past_length", tokens.shape[1])
    if read != tokens.shape[1]:
        raise InputError(f"the model has read {read} tokens, {tokens.shape[1]} ids were given")
    if any(state.name.endswith(IN_PLACE) for state in request.query_state()):
        raise InputError("states of kernels can't be written: bytes lie in them as floats, which a plugin converts")
    states = {f"{STATE}{state.name}": np.array(_data(state)) for state in request.query_state()}
    if not states:
        raise InputError("the model has no states")
    header = {"schema": SCHEMA, "ovtq": __version__, "openvino": ov.__version__, **_identity(folder)}
    whole = {HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8), TOKENS: tokens, **states}
    archives.write(Path(path), whole)


@telling
def load_state(running: Running, path: str | Path, ids: Any = None, model_dir: str | Path | None = None) -> Past:
    """Give a model the states of a file; it has then read `.tokens` of what is returned.

    `ids` is the prompt that will follow, whole: it must begin with what was read, and go on. An OVModelForCausalLM
    goes on by `generate(ids, past_key_values=past)`; a request by a call whose attention_mask counts past and new
    tokens. Raises InputError for a file of another model, conversion or prompt; the model's states are then as they
    were.
    """
    request, folder, path = _request(running), _folder(running, model_dir), Path(path)
    header, tokens, states = _read(path)
    _refuse_other(path, header, _identity(folder))
    if ids is not None:
        _refuse_prompt(path, tokens, _tokens(ids))
    held = {state.name: state for state in request.query_state()}
    if held.keys() != states.keys():
        raise InputError(f"{path}: has other states than this model; save it anew")
    for name, state in held.items():
        if state.state.element_type.to_dtype() != states[name].dtype:
            raise InputError(f"{path}: state {name} is {states[name].dtype} there; it was saved on another device")
    for name, state in held.items():
        state.state = ov.Tensor(np.ascontiguousarray(states[name]))
    if request is not running:
        running._past_length, running.next_beam_idx = tokens.shape[1], np.arange(len(tokens), dtype=int)
    return Past(tokens)


def _request(running: Running) -> ov.InferRequest:
    if hasattr(running, "compile") and hasattr(running, "request"):  # optimum-intel compiles when it is first used
        running.compile()
    request = getattr(running, "request", running)
    if not hasattr(request, "query_state"):
        raise InputError(f"expected an infer request or an OVModelForCausalLM, got {type(running).__name__}")
    return request


def _folder(running: Running, model_dir: str | Path | None) -> Path:
    found = model_dir or getattr(running, "model_save_dir", None)
    if found is None:
        raise InputError("model_dir is missing: the folder that was loaded, by which the file is known again")
    folder = Path(found)
    loaded = getattr(running, "model", None)
    if isinstance(loaded, ov.Model) and io.stamp_of(loaded) != io.stamp_of(io.load(folder)):
        raise InputError(f"{folder}: the model in memory is not the one there; save it, and load it again")
    return folder


def _tokens(ids: Any) -> np.ndarray:
    found = np.array(ids.numpy() if hasattr(ids, "numpy") else ids)
    if found.ndim == 1:
        found = found[None]
    if found.ndim != 2 or not found.size or not np.issubdtype(found.dtype, np.integer):
        raise InputError(f"ids: expected whole numbers (batch, tokens), got {found.dtype}{list(found.shape)}")
    return np.ascontiguousarray(found, np.int64)


def _data(state: Any) -> np.ndarray:
    kind = state.state.element_type.get_type_name()
    if kind not in KNOWN:
        raise InputError(f"state {state.name} is {kind} on this device, which can't be written")
    return state.state.data


def _identity(folder: Path) -> dict[str, Any]:
    """What a file is known by: the graph's text and blocks of the weights; and the preset, for the message."""
    xml = io.model_xml(folder)
    weights = xml.with_suffix(".bin")
    size, digest = weights.stat().st_size, hashlib.sha256()
    with files.opened(weights) as file:
        for block in _blocks(size):
            file.seek(block)
            digest.update(file.read(SAMPLE))
    stamp = io.stamp_of(io.load(folder))
    preset = (stamp.get("preset") or "a pass list") if stamp else "not converted"
    return {"graph": io.text_sha256(xml), "weights": [size, digest.hexdigest()], "preset": preset}


def _blocks(size: int) -> Iterator[int]:
    last = max(size - SAMPLE, 0)
    yield from sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)})


def _read(path: Path) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    def made(whole: archives.Arrays) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
        header = {**dict.fromkeys(("schema", "preset", "graph", "weights")), **json.loads(whole[HEADER].tobytes())}
        states = {name.removeprefix(STATE): some for name, some in whole.items() if name.startswith(STATE)}
        return header, _tokens(whole[TOKENS]), states

    header, tokens, states = archives.read(path, "states written by ovtq", "", made)
    if header["schema"] != SCHEMA:
        raise InputError(f"{path}: written by another version of ovtq ({header.get('ovtq')}); save it anew")
    return header, tokens, states


def _refuse_other(path: Path, header: dict[str, Any], here: dict[str, Any]) -> None:
    if header["preset"] != here["preset"]:
        raise InputError(f"{path}: of a model with the preset {header['preset']}, this one is {here['preset']}")
    for part in ("graph", "weights"):
        if header[part] != here[part]:
            raise InputError(f"{path}: of another model (its {part} differ); save it anew with this one")


def _refuse_prompt(path: Path, read: np.ndarray, prompt: np.ndarray) -> None:
    count = read.shape[1]
    if len(prompt) != len(read):
        raise InputError(f"{path}: {len(read)} sequences, the prompt has {len(prompt)}")
    if prompt.shape[1] <= count:
        raise InputError(
            f"{path}: {count} tokens were read, the prompt has {prompt.shape[1]}; it must go on behind them"
        )
    if (other := np.flatnonzero((prompt[:, :count] != read).any(0))).size:
        raise InputError(f"{path}: the prompt differs from what was read at token {other[0]}; read it anew")
