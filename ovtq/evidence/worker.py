"""One candidate, as a rule in a process of its own: its memory is its own, and it waits while others take their turn.

Three runtimes: `openvino`, the compiled model fed call by call; `genai`, LLMPipeline on its stateful path; `optimum`,
OVModelForCausalLM. Times are taken inside the process, around the work alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from ovtq.errors import InputError, OvtqError
from ovtq.evidence.candidates import Candidate, inspect_cache, open_candidate
from ovtq.forms.pruning import counted
from ovtq.ir.io import last_line
from ovtq.runtime.loading import load
from ovtq.runtime.runner import Runner
from ovtq.system import peak, reset_peak

THROUGH = ("openvino", "genai", "optimum")
FAILURES = (OvtqError, RuntimeError, OSError, ImportError, ValueError)  # of a candidate: said in one line


class Worker:
    """The other end of such a process. Every call raises InputError with what went wrong there."""

    def __init__(self, candidate: Candidate, through: str, device: str, properties: Mapping[str, str]) -> None:
        self.candidate, self.through = candidate, through
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = other, candidate, through, device, dict(properties)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        other.close()
        self.facts: dict[str, Any] = self._answer()

    def __call__(self, name: str, *arguments: Any) -> Any:
        """The result of that method of the runtime."""
        self.pipe.send((name, arguments))
        return self._answer()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        self.process.kill()

    def _answer(self) -> Any:
        try:
            ok, result = self.pipe.recv()
        except EOFError:
            self.process.join(10)
            raise InputError(
                f"{self.candidate.label}: its process died (exit code {self.process.exitcode}); out of memory?"
            ) from None
        if not ok:
            raise InputError(f"{self.candidate.label} through {self.through}: {result}")
        return result


def _serve(pipe: Connection, candidate: Candidate, through: str, device: str, properties: dict[str, str]) -> None:
    """The process: make the runtime, say what it is, then do what is asked until there is nothing more."""
    try:
        runtime = RUNTIMES[through](candidate, device, properties)
        pipe.send((True, runtime.facts))
        while request := pipe.recv():
            name, arguments = request
            pipe.send((True, getattr(runtime, name)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        return
    except FAILURES as error:
        with contextlib.suppress(OSError):
            pipe.send((False, _reason(error)))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, OvtqError) else last_line(error)


class InProcess:
    """The same in this process: what it costs to load several at once is then shared, and so is the peak of memory."""

    def __init__(self, candidate: Candidate, through: str, device: str, properties: Mapping[str, str]) -> None:
        self.candidate, self.through = candidate, through
        self.runtime = self._told(RUNTIMES[through], candidate, device, dict(properties))
        self.facts: dict[str, Any] = self.runtime.facts

    def __call__(self, name: str, *arguments: Any) -> Any:
        """The result of that method of the runtime."""
        return self._told(getattr(self.runtime, name), *arguments)

    def _told(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except FAILURES as error:
            raise InputError(f"{self.candidate.label} through {self.through}: {_reason(error)}") from None

    def close(self) -> None:
        """Forget the model."""
        del self.runtime


class Runtime(Protocol):
    """What runs a candidate; what each can do besides, its own class says."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the model's cache really is, and what the device computes in."""

    def generate(self, ids: np.ndarray, tokens: int) -> dict[str, Any]:
        """Answer a prompt of `ids` (tokens,) greedily with `tokens` tokens."""


class PlainOpenVINO:
    """The compiled model, fed call by call."""

    def __init__(self, candidate: Candidate, device: str, properties: dict[str, str]) -> None:
        self.subject = open_candidate(candidate, device, properties, capacity=1 << 16)
        cache = inspect_cache(candidate, self.subject, device)
        self.facts = {"vocabulary": self.subject.vocabulary, "cache": cache.text, "wrong": cache.wrong}
        self.facts |= {"computes": cache.computes}
        self.facts |= {"bytes_per_token": cache.per_token, "flat_bytes": cache.flat}

    def read(self, ids: np.ndarray, chunk: int, depth: int = 0) -> dict[str, Any]:
        """Prefill `ids` (tokens,) in calls of `chunk`, behind `depth` tokens of noise: seconds, and peak memory."""
        if depth:
            self.fill(depth)
        else:
            self.subject.reset()
        reset_peak()
        started = time.perf_counter()
        for start in range(0, len(ids), chunk):
            logits = self.subject.step(ids[None, start : start + chunk])
        seconds = time.perf_counter() - started
        self.next = logits[0, -1:].argmax(-1)
        return {"seconds": seconds, "rss": peak()}

    def fill(self, tokens: int) -> None:
        """Set the states to noise, as after `tokens` tokens."""
        if not isinstance(self.subject, Runner):
            raise InputError("--fill, --depth: a paged cache can't be filled; leave them out")
        self.subject.fill(tokens)
        self.next = np.zeros(1, np.int64)

    def step(self) -> float:
        """Seconds of one decode step, which reads what the last one said."""
        started = time.perf_counter()
        logits = self.subject.step(self.next[None].astype(np.int64))
        seconds = time.perf_counter() - started
        self.next = logits[0, -1:].argmax(-1)
        return seconds

    def generate(self, ids: np.ndarray, tokens: int) -> dict[str, Any]:
        """Answer a prompt of `ids` (tokens,) greedily with `tokens` tokens."""
        first = self.read(ids, len(ids))
        reset_peak()
        steps = [self.step() for _ in range(tokens - 1)]
        rss = {"rss_prefill": first["rss"], "rss_decode": peak()}
        states = {"state_bytes": self.state_bytes(), "pruned": self.counted()}
        return {"ttft": first["seconds"], "steps": steps, **states, **rss}

    def state_bytes(self) -> int | None:
        """Bytes of all states as the device gives them out; None if it does not."""
        try:
            return self.subject.state_bytes() if isinstance(self.subject, Runner) else None
        except RuntimeError:  # the CPU plugin's TURBO cache, the GPU plugin's i8 states
            return None

    def counted(self) -> dict[str, list[int]] | None:
        """[pruned, kept] by layer, of a model that prunes."""
        return counted(self.subject.request) if isinstance(self.subject, Runner) else None

    def start_peak(self) -> None:
        """Begin to measure the peak of memory."""
        reset_peak()

    def peak(self) -> int | None:
        """That peak, in bytes."""
        return peak()


class GenAI:
    """openvino_genai.LLMPipeline, on its stateful path."""

    def __init__(self, candidate: Candidate, device: str, properties: dict[str, str]) -> None:
        _plain(candidate, "genai")
        import openvino_genai

        self.genai = openvino_genai
        backend = "PA" if candidate.paged else "SDPA"
        given = {**properties, **candidate.properties, "ATTENTION_BACKEND": backend}
        self.pipe = load(candidate.folder, "genai", device, **given)
        self.facts = {"cache": "", "computes": "", "wrong": "", "bytes_per_token": None, "flat_bytes": None}

    def generate(self, ids: np.ndarray, tokens: int) -> dict[str, Any]:
        """Answer a prompt of `ids` (tokens,) greedily with `tokens` tokens."""
        import openvino as ov

        reset_peak()
        config = self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, apply_chat_template=False)
        inputs = self.genai.TokenizedInputs(ov.Tensor(ids[None]), ov.Tensor(np.ones((1, len(ids)), np.int64)))
        metrics = self.pipe.generate(inputs, config).perf_metrics
        steps = [seconds / 1e6 for seconds in metrics.raw_metrics.token_infer_durations[1:]]
        steps = steps or [metrics.get_tpot().mean / 1e3] * (tokens - 1)
        rss = {"rss_prefill": None, "rss_decode": peak()}
        return {"ttft": metrics.get_ttft().mean / 1e3, "steps": steps, "state_bytes": None, "pruned": None, **rss}


class Optimum:
    """optimum-intel's OVModelForCausalLM."""

    def __init__(self, candidate: Candidate, device: str, properties: dict[str, str]) -> None:
        _plain(candidate, "optimum")
        given = {**properties, **candidate.properties}
        self.model = load(candidate.folder, "optimum", device, ov_config=given)
        self.facts = {"cache": "", "computes": "", "wrong": "", "bytes_per_token": None, "flat_bytes": None}

    def generate(self, ids: np.ndarray, tokens: int) -> dict[str, Any]:
        """Answer a prompt of `ids` (tokens,) greedily with `tokens` tokens."""
        import torch

        reset_peak()
        clock = _Clock()
        inputs = torch.from_numpy(ids[None])
        started = time.perf_counter()
        self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
        )
        times = np.array(clock.times) - started
        states = sum(state.state.byte_size for state in self.model.request.query_state())
        pruned = {"pruned": counted(self.model.request)}
        rss = {"rss_prefill": None, "rss_decode": peak()}
        return {"ttft": float(times[0]), "steps": np.diff(times).tolist(), "state_bytes": states, **pruned, **rss}


class _Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: Any) -> None:
        if self.prompt:  # the first call brings the prompt
            self.prompt = False
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _plain(candidate: Candidate, through: str) -> None:
    if candidate.change or candidate.gpu_cache:
        raise InputError(f"only `--through openvino` can change a cache as {candidate.label} does, not {through}")


RUNTIMES: dict[str, Callable[[Candidate, str, dict[str, str]], Runtime]] = {
    "openvino": PlainOpenVINO,
    "genai": GenAI,
    "optimum": Optimum,
}
