"""openvino_genai's LLMPipeline on the bundled model: every way of generating, against the unconverted model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MINI, ROOT

from ovtq.runner import EXACT_PROPERTIES, Runner
from ovtq.verify import TOLERANCE

genai = pytest.importorskip("openvino_genai", reason="needs the extra [genai]")

TEXT = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")
STATEFUL = {**EXACT_PROPERTIES, "ATTENTION_BACKEND": "SDPA"}
PAGED = {**EXACT_PROPERTIES, "ATTENTION_BACKEND": "PA"}


def pipeline(model_dir: Path, properties: dict[str, str]) -> Any:
    return genai.LLMPipeline(model_dir, "CPU", **properties)


def generate(model_dir: Path, properties: dict[str, str], prompt: str, **settings: object) -> list[list[int]]:
    """Tokens of each returned sequence."""
    pipe = pipeline(model_dir, properties)
    config = genai.GenerationConfig(max_new_tokens=48, ignore_eos=True, apply_chat_template=False)
    for name, value in settings.items():
        setattr(config, name, value)
    return [list(tokens) for tokens in pipe.generate(pipe.get_tokenizer().encode(prompt).input_ids, config).tokens]


PROMPTS = {"short": TEXT[:200], "longer than the window": TEXT[:4000]}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("backend", ["default", "SDPA"])
@pytest.mark.parametrize("preset", ["exact", "rotate"])
def test_greedy(preset: str, backend: str, prompt: str, request: pytest.FixtureRequest) -> None:
    properties = EXACT_PROPERTIES if backend == "default" else STATEFUL
    converted = generate(request.getfixturevalue(preset), properties, PROMPTS[prompt])
    assert converted == generate(MINI, properties, PROMPTS[prompt])
    assert len(set(converted[0])) > 8


@pytest.mark.parametrize("preset", ["exact", "rotate"])
def test_beam_search(preset: str, request: pytest.FixtureRequest) -> None:
    settings = {"num_beams": 4, "num_return_sequences": 3}
    prompt = PROMPTS["longer than the window"]
    assert generate(request.getfixturevalue(preset), STATEFUL, prompt, **settings) == generate(
        MINI, STATEFUL, prompt, **settings
    )


@pytest.mark.parametrize(("preset", "properties"), [("exact", STATEFUL), ("rotate", STATEFUL), ("rotate", PAGED)])
def test_a_batch_of_prompts(preset: str, properties: dict[str, str], request: pytest.FixtureRequest) -> None:
    prompts = [TEXT[:1500], TEXT[4000:4300], TEXT[6000:6040]]
    config = genai.GenerationConfig(max_new_tokens=40, ignore_eos=True, apply_chat_template=False)
    folders = (MINI, request.getfixturevalue(preset))
    original, converted = (pipeline(folder, properties).generate(prompts, config).texts for folder in folders)
    assert converted == original


def test_paged_attention_takes_the_rotation(rotate: Path) -> None:
    prompt = PROMPTS["longer than the window"]
    assert generate(rotate, PAGED, prompt) == generate(MINI, PAGED, prompt)


def test_paged_attention_refuses_truncated_windows(exact: Path) -> None:
    """What the record and the README say: an explicit demand for paged attention throws, nothing falls back."""
    with pytest.raises(RuntimeError, match="beam_idx"):
        pipeline(exact, PAGED)
    scheduler = genai.SchedulerConfig()
    with pytest.raises(RuntimeError, match="beam_idx"):
        genai.LLMPipeline(exact, "CPU", scheduler_config=scheduler, **EXACT_PROPERTIES)


def test_defaults_without_any_property(exact: Path) -> None:
    pipe = genai.LLMPipeline(exact, "CPU")
    text = pipe.generate("The President said", max_new_tokens=20, apply_chat_template=False)
    again = genai.LLMPipeline(exact, "CPU", ATTENTION_BACKEND="SDPA").generate(
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
    fresh = pipeline(model_dir, STATEFUL)
    for item in (pipe, fresh):
        item.get_tokenizer().set_chat_template(TEMPLATE)
    config = genai.GenerationConfig(max_new_tokens=40, ignore_eos=True)
    history, going, scratch = genai.ChatHistory(), [], []
    for turn in turns:
        history.append({"role": "user", "content": turn})
        going.append(pipe.generate(history, config).texts[0])
        prompt = fresh.get_tokenizer().apply_chat_template(history, add_generation_prompt=True)
        plain = genai.GenerationConfig(max_new_tokens=40, ignore_eos=True, apply_chat_template=False)
        scratch.append(fresh.generate([prompt], plain).texts[0])
        history.append({"role": "assistant", "content": going[-1]})
    return going, scratch


def test_chat_whose_history_diverges(exact: Path) -> None:
    turns = [TEXT[:1500], TEXT[3000:3400], "Question: what did Congress say?", TEXT[5000:5800]]
    going, scratch = chat(exact, turns)
    assert going == scratch
    assert chat(MINI, turns)[1] == scratch


def test_chat_that_goes_back_and_changes_its_past(exact: Path) -> None:
    """The second history shares only its first words with the first: the states can't be cut back, so GenAI resets."""
    pipe = pipeline(exact, STATEFUL)
    config = genai.GenerationConfig(max_new_tokens=24, ignore_eos=True)
    pipe.get_tokenizer().set_chat_template(TEMPLATE)

    def ask(text: str) -> str:
        history = genai.ChatHistory()
        history.append({"role": "user", "content": text})
        return str(pipe.generate(history, config).texts[0])

    first, second = TEXT[:2500], TEXT[:1200] + TEXT[8000:9000]
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
