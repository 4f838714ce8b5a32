"""openvino_genai's LLMPipeline on the bundled model: every way of generating, against the unconverted model."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MINI, ROOT
from scipy.special import log_softmax

import ovtq
from ovtq import demo
from ovtq.forms.cpu.full import FLUSH
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.verification.verify import TOLERANCE

genai = pytest.importorskip("openvino_genai", reason="needs the extra [genai]")

TEXT = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")
STATEFUL = {**EXACT_PROPERTIES, "ATTENTION_BACKEND": "SDPA"}
PAGED = {**EXACT_PROPERTIES, "ATTENTION_BACKEND": "PA"}


def pipeline(model_dir: Path, properties: dict[str, str]) -> Any:
    return genai.LLMPipeline(model_dir, "CPU", **properties)


@functools.lru_cache(maxsize=4)
def _kept(model_dir: Path, properties: frozenset[tuple[str, str]]) -> Any:
    return pipeline(model_dir, dict(properties))


def kept(model_dir: Path, properties: dict[str, str]) -> Any:
    """A pipeline that others use too: for what is no chat, each time starts with empty states."""
    return _kept(model_dir, frozenset(properties.items()))


def generate(model_dir: Path, properties: dict[str, str], prompt: str, **settings: object) -> list[list[int]]:
    """Tokens of each returned sequence."""
    pipe = kept(model_dir, properties)
    config = genai.GenerationConfig(max_new_tokens=48, ignore_eos=True, apply_chat_template=False)
    for name, value in settings.items():
        setattr(config, name, value)
    return [list(tokens) for tokens in pipe.generate(pipe.get_tokenizer().encode(prompt).input_ids, config).tokens]


PROMPTS = {"short": TEXT[:200], "longer than the window": TEXT[:4000]}
ALLOWANCE = 64 << 20  # bytes: scores, unpacked keys and values of the longest history, and malloc's slack
PACKED = ["k6v4 --target gpu", "k6v4 --target cpu"]  # options of ovtq-convert behind --preset
NATIVE = ["u8 --target gpu", "u4 --target cpu"]  # the plugin's own cache
ON_CPU = PACKED[1:]  # the form made for the device of these tests, for what takes long
TRUNCATED = ["exact", *ON_CPU]  # whose states GenAI can't cut


@pytest.fixture
def folder(preset: str, convert: Callable[..., Path]) -> Path:
    """The bundled model, converted with the test's parameter `preset`."""
    return convert(MINI, "--preset", *preset.split())


@pytest.mark.parametrize("preset", ON_CPU)
def test_load_gives_a_pipeline_for_what_a_model_was_made_for(folder: Path) -> None:
    """On a CPU, with properties as given."""
    pipe = ovtq.load(folder, **STATEFUL)
    config = genai.GenerationConfig(max_new_tokens=16, ignore_eos=True, apply_chat_template=False)
    said = pipe.generate(pipe.get_tokenizer().encode(PROMPTS["short"]).input_ids, config).tokens
    assert [list(tokens) for tokens in said] == generate(folder, STATEFUL, PROMPTS["short"], max_new_tokens=16)


def encoded(text: str) -> np.ndarray:
    return np.array(genai.Tokenizer(MINI).encode(text).input_ids.data)


@functools.lru_cache(maxsize=4)
def _runner(model_dir: Path) -> Runner:
    return Runner(model_dir / "openvino_model.xml", "CPU", EXACT_PROPERTIES)


def runner_of(model_dir: Path) -> Runner:
    """Plain OpenVINO, with empty states."""
    runner = _runner(model_dir)
    runner.reset()
    return runner


@functools.cache
def by_runner(model_dir: Path, *texts: str, tokens: int = 48) -> list[int]:
    """Greedy with plain OpenVINO: each text in one call, then token by token."""
    runner = runner_of(model_dir)
    for text in texts:
        logits = runner.step(encoded(text))
    said = [int(logits[0, -1].argmax())]
    while len(said) < tokens:
        said.append(int(runner.step(np.array([said[-1:]]))[0, -1].argmax()))
    return said


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("backend", ["default", "SDPA"])
@pytest.mark.parametrize("preset", ["exact", pytest.param("rotate", marks=pytest.mark.slow)])
def test_greedy(preset: str, backend: str, prompt: str, request: pytest.FixtureRequest) -> None:
    properties = EXACT_PROPERTIES if backend == "default" else STATEFUL
    converted = generate(request.getfixturevalue(preset), properties, PROMPTS[prompt])
    assert converted == generate(MINI, properties, PROMPTS[prompt])
    assert len(set(converted[0])) > 8


def by_optimum(model_dir: Path, prompt: str, **settings: object) -> Any:
    """What OVModelForCausalLM's `generate` returns."""
    return pytest.importorskip("test_optimum").raw(model_dir, [prompt], **settings)


@pytest.mark.parametrize(("backend", "prompt"), [("default", "short"), ("SDPA", "longer than the window")])
@pytest.mark.parametrize("preset", [*ON_CPU, pytest.param(PACKED[0], marks=pytest.mark.slow)])
def test_packed_greedy_in_every_host(folder: Path, backend: str, prompt: str) -> None:
    """What a packed model says may differ from the original, but not from host to host."""
    text, properties = PROMPTS[prompt], EXACT_PROPERTIES if backend == "default" else STATEFUL
    said = by_runner(folder, text)
    assert generate(folder, properties, text) == [said]
    assert by_optimum(folder, text)[:, -48:].tolist() == [said]
    assert len(set(said)) > 8


@pytest.mark.parametrize("preset", [NATIVE[0], pytest.param(NATIVE[1], marks=pytest.mark.slow)])
def test_the_plugins_own_cache_in_every_host(preset: str, folder: Path) -> None:
    """No host sets a property: all follow the mark in the file, and say the same."""
    prompt = PROMPTS["longer than the window"]
    model = pytest.importorskip("optimum.intel").OVModelForCausalLM.from_pretrained(folder, device="CPU")
    inputs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=48, min_new_tokens=48, do_sample=False)[:, -48:].tolist()
    compiled = model.request.get_compiled_model().get_runtime_model()
    kinds = [dict(node.get_rt_info().items()).get("kv_cache_precision") for node in compiled.get_ops()]
    assert {kind.astype(str) for kind in kinds if kind} == {preset.split()[0]}
    assert generate(folder, {"ATTENTION_BACKEND": "SDPA"}, prompt) == said
    assert len(set(said[0])) > 8


@pytest.mark.parametrize("preset", [*ON_CPU, pytest.param(PACKED[0], marks=pytest.mark.slow)])
def test_packed_beam_search(folder: Path) -> None:
    """Both hosts find the same; beams change places, and each ends with the score its tokens have alone, in turn."""
    settings, prompt = {"num_beams": 4, "num_return_sequences": 3}, TEXT[:800]
    found = by_optimum(folder, prompt, return_dict_in_generate=True, output_scores=True, **settings)
    sequences, places = found.sequences[:, -48:].numpy(), found.beam_indices.numpy()
    assert generate(folder, STATEFUL, prompt, **settings) == sequences.tolist()
    assert (places[:, 1:] != places[:, :-1]).sum() > 8
    for sequence, score in list(zip(sequences, found.sequences_scores.tolist(), strict=True))[:2]:
        runner = runner_of(folder)
        calls = [encoded(prompt), *sequence[:-1, None, None]]
        logits = np.array([runner.step(ids)[0, -1] for ids in calls], np.float64)
        chosen = logits[np.arange(48), sequence] - np.log(np.exp(logits).sum(1))
        assert abs(chosen.mean() - score) <= TOLERANCE * np.abs(logits).max()


@pytest.mark.parametrize("preset", ON_CPU)
def test_packed_batch_says_what_each_prompt_says_alone(folder: Path) -> None:
    prompts = [TEXT[:1000], TEXT[4000:4300], TEXT[6000:6040]]
    config = genai.GenerationConfig(max_new_tokens=40, ignore_eos=True, apply_chat_template=False)
    pipe = kept(folder, STATEFUL)
    alone = [pipe.generate([prompt], config).texts[0] for prompt in prompts]
    assert pipe.generate(prompts, config).texts == alone


@pytest.mark.parametrize("preset", ON_CPU)
def test_packed_history_still_tells_a_fact(folder: Path) -> None:
    """As in `tools/demo`, but asked in a call of its own, so that the fact is read from packed tokens alone."""
    story = f"{TEXT[:500]}\n{demo.FACT}\n{TEXT[500:2500]}\n"
    answers = [by_runner(model, story, demo.QUESTION, tokens=6) for model in (folder, MINI)]
    assert answers[0] == answers[1]
    assert genai.Tokenizer(MINI).decode(answers[0]).strip().startswith("40213")


@pytest.mark.parametrize("preset", ["exact", pytest.param("rotate", marks=pytest.mark.slow)])
def test_beam_search(preset: str, request: pytest.FixtureRequest) -> None:
    settings = {"num_beams": 4, "num_return_sequences": 3}
    prompt = PROMPTS["longer than the window"]
    assert generate(request.getfixturevalue(preset), STATEFUL, prompt, **settings) == generate(
        MINI, STATEFUL, prompt, **settings
    )


@pytest.mark.parametrize(
    ("preset", "properties"),
    [("exact", STATEFUL), *(pytest.param("rotate", how, marks=pytest.mark.slow) for how in (STATEFUL, PAGED))],
)
def test_a_batch_of_prompts(preset: str, properties: dict[str, str], request: pytest.FixtureRequest) -> None:
    prompts = [TEXT[:1500], TEXT[4000:4300], TEXT[6000:6040]]
    config = genai.GenerationConfig(max_new_tokens=40, ignore_eos=True, apply_chat_template=False)
    folders = (MINI, request.getfixturevalue(preset))
    original, converted = (kept(folder, properties).generate(prompts, config).texts for folder in folders)
    assert converted == original


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("cache", ["f32", "f16"])
def test_paged_attention_takes_the_rotation(rotate: Path, cache: str, prompt: str) -> None:
    properties = {**PAGED, "KV_CACHE_PRECISION": cache}
    assert generate(rotate, properties, PROMPTS[prompt]) == generate(MINI, properties, PROMPTS[prompt])


@pytest.mark.parametrize("preset", TRUNCATED)
def test_paged_attention_refuses_truncated_windows(preset: str, folder: Path) -> None:
    """What the record and the README say: an explicit demand for paged attention throws, nothing falls back."""
    complaint = "No ScaledDotProductAttention operation observed" if preset in PACKED else "pass_ATTENTION_BACKEND=SDPA"
    with pytest.raises(RuntimeError, match=complaint):
        pipeline(folder, PAGED)
    scheduler = genai.SchedulerConfig()
    with pytest.raises(RuntimeError, match=complaint):
        genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **EXACT_PROPERTIES)


@pytest.mark.parametrize("preset", TRUNCATED)
def test_defaults_without_any_property(folder: Path) -> None:
    pipe = genai.LLMPipeline(folder, "CPU")
    text = pipe.generate("The President said", max_new_tokens=20, apply_chat_template=False)
    again = genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="SDPA").generate(
        "The President said", max_new_tokens=20, apply_chat_template=False
    )
    assert text == again  # it fell back to this


# A template like GPT-OSS's: what an assistant thought (here: all it said but the end) leaves the history.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "Answer: {{ m['content'][-60:] }}\n"
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
)


def chat(model_dir: Path, turns: list[str]) -> tuple[list[str], list[str]]:
    """Answers in one chat, and to each of its histories from scratch."""
    pipe = pipeline(model_dir, STATEFUL)
    tokenizer = pipe.get_tokenizer()
    tokenizer.set_chat_template(TEMPLATE)
    config = genai.GenerationConfig(max_new_tokens=40, ignore_eos=True)
    history, going, scratch = genai.ChatHistory(), [], []
    for turn in turns:
        history.append({"role": "user", "content": turn})
        going.append(pipe.generate(history, config).texts[0])
        prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True)
        plain = genai.GenerationConfig(max_new_tokens=40, ignore_eos=True, apply_chat_template=False)
        scratch.append(kept(model_dir, STATEFUL).generate([prompt], plain).texts[0])
        history.append({"role": "assistant", "content": going[-1]})
    return going, scratch


@pytest.mark.parametrize("preset", [*TRUNCATED, pytest.param(NATIVE[0], marks=pytest.mark.slow)])
def test_chat_whose_history_diverges(preset: str, folder: Path) -> None:
    turns = [TEXT[:800], TEXT[3000:3300], "Question: what did Congress say?"]
    going, scratch = chat(folder, turns)
    assert going == scratch
    if preset == "exact":
        assert chat(MINI, turns)[1] == scratch


@pytest.mark.parametrize("preset", [*TRUNCATED, pytest.param(NATIVE[0], marks=pytest.mark.slow)])
def test_chat_that_goes_back_and_changes_its_past(folder: Path) -> None:
    """The second history shares only its first words with the first: the states can't be cut back, so GenAI resets."""
    pipe = pipeline(folder, STATEFUL)
    config = genai.GenerationConfig(max_new_tokens=24, ignore_eos=True)
    pipe.get_tokenizer().set_chat_template(TEMPLATE)

    def ask(text: str) -> str:
        history = genai.ChatHistory()
        history.append({"role": "user", "content": text})
        return str(pipe.generate(history, config).texts[0])

    first, second = TEXT[:1000], TEXT[:500] + TEXT[8000:8400]
    answers = [ask(first), ask(second), ask(first), ask(second)]
    assert answers[0] == answers[2] != answers[1] == answers[3]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["exact", "rotate"])
def test_two_thousand_tokens(preset: str, request: pytest.FixtureRequest) -> None:
    """Greedy, each model on its own; then over varied text that the original sampled, token by token.

    Sampling itself is not compared: two candidates a rounding apart may change places in the sampler's list.
    """
    folder, prompt = request.getfixturevalue(preset), PROMPTS["short"]
    assert generate(folder, STATEFUL, prompt, max_new_tokens=2000) == generate(
        MINI, STATEFUL, prompt, max_new_tokens=2000
    )
    text = generate(MINI, STATEFUL, prompt, max_new_tokens=2000, do_sample=True, top_k=40, rng_seed=3)[0]
    assert len(set(text)) > 400
    runners = [Runner(path / "openvino_model.xml", "CPU", EXACT_PROPERTIES) for path in (MINI, folder)]
    for token in text:
        expected, got = (runner.step(np.array([[token]]))[0, -1] for runner in runners)
        assert got.argmax() == expected.argmax()
        assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def ten_thousand(model_dir: Path) -> None:
    """Sampled from plain OpenVINO, in a process of its own; prints tokens, RSS and bytes of the states as it goes."""
    runner = Runner(model_dir / "openvino_model.xml", "CPU", {**EXACT_PROPERTIES, "CPU_RUNTIME_CACHE_CAPACITY": "0"})
    ids, random = encoded(PROMPTS["short"]), np.random.RandomState(0)
    written: set[int] = set()
    for past in range(ids.shape[1], 10_001):
        logits = runner.step(ids)[0, -1]
        if past % 2000 == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            print(past, resident, runner.state_bytes(), len(written), flush=True)
        top = np.argpartition(logits, -40)[-40:]
        weights = np.exp(logits[top] - logits.max())
        ids = np.array([[random.choice(top, p=weights / weights.sum())]])
        written.add(ids.item())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_nothing_grows_but_the_states_in_ten_thousand_tokens(convert: Callable[..., Path]) -> None:
    """Without the caches of compiled shapes, the CPU plugin's and oneDNN's, which keep some 40 KB a token."""
    folder = convert(MINI, "--preset", *PACKED[1].split())
    code = f"import pathlib, test_genai; test_genai.ten_thousand(pathlib.Path({str(folder)!r}))"
    environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    print(done.stdout)
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [past for past, *_ in rows] == [2000, 4000, 6000, 8000, 10_000]
    assert rows[-1][3] > 500  # it went on to write
    layers, kv_heads, flat = 3, 2, 4 * 64 * 2 * 2 * 3 * (127 + 1 + 64 + FLUSH - 1)
    for past, resident, states, _ in rows:
        packed = max(past - 64, 0) // FLUSH * FLUSH
        assert states == flat + packed * layers * kv_heads * (48 + 32 + 2 * 4)
        assert resident - rows[0][1] <= states - rows[0][2] + ALLOWANCE


@pytest.mark.slow
def test_several_sampled_sequences_are_wrong_in_the_exported_model_too() -> None:
    """See docs/genai-sampling.md: each reads the first one's history. If this fails, openvino_genai has been mended."""

    def scores(properties: dict[str, str], count: int) -> list[float]:
        said = generate(MINI, properties, TEXT[:1200], do_sample=True, num_return_sequences=count)
        prompt = encoded(TEXT[:1200])
        found = []
        for answer in said:
            runner_of(MINI).reset()
            whole = np.concatenate([prompt, np.array([answer], np.int64)], 1)
            logs = log_softmax(runner_of(MINI).step(whole)[0].astype(np.float64), -1)[prompt.shape[1] - 1 : -1]
            found.append(float(logs[np.arange(len(answer)), answer].mean()))
        return found

    assert min(scores(PAGED, 4)) > -4
    assert min(scores(STATEFUL, 1)) > -4
    assert min(scores(STATEFUL, 4)) < -4.5
