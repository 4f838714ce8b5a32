"""Options have one source: the fields of `ovtq.options`, or, of options of a pass, those of the pass."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields

import pytest
from conftest import TINY

import ovtq
from ovtq.cli.convert import parser
from ovtq.options import BASIS, Checks, Options, among, grouped, meaning
from ovtq.passes import PASSES, PruneKv, QuantizeKv
from ovtq.passes.base import BasisPass

FIELDS = {item.name: (kind, item) for kind in (Options, Checks) for item in fields(kind)}
FLAGS = {name: "--set" if name == "settings" else f"--{name.replace('_', '-')}" for name in FIELDS}


def action(name: str) -> argparse.Action:
    """What the command line makes of an option."""
    return parser()._option_string_actions[FLAGS[name]]


@pytest.mark.parametrize(
    ("function", "kinds", "more"),
    [(ovtq.compress, (Options,), set()), (ovtq.convert, (Options, Checks), {"force", "card", "on_progress"})],
)
def test_keywords_are_the_fields(function: Callable[..., object], kinds: tuple[type, ...], more: set[str]) -> None:
    """All keyword-only, in their order, with their types and defaults."""
    given = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    expected = [(item.name, item.type, item.default) for kind in kinds for item in fields(kind)]
    assert [(p.name, p.annotation, p.default) for p in given if p.name not in more] == expected
    assert {p.name for p in given} == {name for name, *_ in expected} | more


def test_keywords_reach_the_field_of_their_name() -> None:
    """Whatever their order; and what is no option stays out."""
    values = {name: object() for name in reversed(FIELDS)}
    for kind in (Options, Checks):
        made = among(kind, values | {"model_dir": 1})
        assert {item.name: getattr(made, item.name) for item in fields(kind)} == {
            name: value for name, value in values.items() if FIELDS[name][0] is kind
        }


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_is_made_of_its_field(name: str) -> None:
    kind, item = FIELDS[name]
    flag = action(name)
    assert (flag.dest, flag.default) == (name, item.default)
    assert flag.help == meaning(kind, name) != ""
    assert tuple(flag.choices or ()) == tuple(item.metadata.get("choices", ()))


def test_nothing_given_is_the_defaults() -> None:
    given = vars(parser().parse_args([str(TINY["5.5"])]))
    assert among(Options, given) == Options()
    assert among(Checks, given) == Checks()


@pytest.mark.parametrize(
    ("group", "kinds"), [(QuantizeKv.name, [QuantizeKv]), (PruneKv.name, [PruneKv]), (BASIS, None)]
)
def test_an_option_of_a_pass_is_one_of_its_fields(group: str, kinds: list[type] | None) -> None:
    """Of the basis: of all that have one. The flag says what the pass says, but where its default is another."""
    names = grouped(group)
    assert names
    for kind in kinds or [kind for kind in PASSES.values() if issubclass(kind, BasisPass)]:
        own = {item.name: item for item in fields(kind)}
        assert {*names} <= own.keys()
        for name in names:
            assert own[name].default is not MISSING
            if kinds and name not in ("budget", "residual_window"):
                assert action(name).help == kind.option_help()[name]
