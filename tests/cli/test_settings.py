"""Recipes, overrides and references as plain values."""

import pytest

from diffmm.recipes.errors import InputError
from diffmm.recipes.references import UNKNOWN, resolve, unused_variables
from diffmm.recipes.settings import load, load_file, merge, override, parse_overrides


def test_overrides_are_yaml_with_and_without_an_equals_sign():
    given = ["--a.b", "1e-3", "--c=[1, 2]", "--d", "null", "--e=x=y", "--f", "-1", "--g", "a: b: c"]
    assert parse_overrides(given) == [
        ("a.b", 0.001),
        ("c", [1, 2]),
        ("d", None),
        ("e", "x=y"),
        ("f", -1),
        ("g", "a: b: c"),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--a"], "--a needs a value"),
        (["--a", "--b", "1"], "--a needs a value"),
        (["a", "1"], "expected --key value, got 'a'"),
    ],
)
def test_an_override_needs_a_key_and_a_value(given, message):
    with pytest.raises(InputError) as caught:
        parse_overrides(given)
    assert caught.value.lines == [message]


def node(path="x.Y", **init_args):
    return {"class_path": path, "init_args": init_args}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.init_args.width", 3, {"model": node(width=3)}),
        ("model.width", 3, {"model": node(width=3)}),
        ("model.class_path", "x.Z", {"model": node("x.Z", width=1)}),
        ("model", "x.Z", {"model": node("x.Z", width=1)}),
        ("model.inner.depth", 2, {"model": node(width=1, inner={"depth": 2})}),
        ("new.key", 1, {"model": node(width=1), "new": {"key": 1}}),
    ],
)
def test_an_override_finds_its_place(key, value, expected):
    values = {"model": node(width=1)}
    override(values, key, value)
    assert values == expected


def test_an_override_reaches_into_lists_and_adds_to_them():
    values = {"callbacks": [node("a.A"), node("b.B")]}
    override(values, "callbacks.0.rate", 1)
    override(values, "callbacks+", "c.C")
    override(values, "callbacks.every", 2)
    assert values["callbacks"] == [
        node("a.A", rate=1),
        node("b.B"),
        {"class_path": "c.C", "init_args": {"every": 2}},
    ]
    with pytest.raises(InputError, match="the list has 3 items, there is no item 3"):
        override(values, "callbacks.3.rate", 1)


def test_another_class_brings_its_own_arguments():
    assert merge({"a": node(width=1), "b": 1}, {"a": node("x.Z")}) == {"a": node("x.Z"), "b": 1}
    assert merge({"a": node(width=1)}, {"a": node(depth=2)}) == {"a": node(width=1, depth=2)}


def test_later_recipes_win_and_overrides_over_them(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("vars: {x: 1, y: 2}\ntrainer: {max_steps: 1}\n")
    second.write_text("vars: {x: 3}\n")
    assert load([first, second], ["--vars.y", "4"]) == {
        "vars": {"x": 3, "y": 4},
        "trainer": {"max_steps": 1},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "cannot be read"),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' appears twice"),
        ("- 1\n", "is not a recipe: it holds no keys"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_file(path)
    assert len(caught.value.lines) == 1
    assert str(path) in caught.value.lines[0]


def test_references_are_resolved_after_overrides_and_told_when_broken(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    values = {
        "vars": {"rate": 0.1, "list": [1, 2]},
        "a": {"x": "${vars.rate}", "y": "run ${vars.rate}", "z": "${vars.list}"},
        "b": ["${vars.rat}", "${oc.env:NOT_SET}"],
    }
    resolved, mistakes = resolve(values)
    assert resolved["a"] == {"x": 0.1, "y": "run 0.1", "z": [1, 2]}
    assert resolved["b"] == [UNKNOWN, UNKNOWN]
    assert mistakes[0] == (
        "b.0 refers to vars.rat, which does not exist; did you mean 'vars.rate'?"
    )
    assert mistakes[1].startswith("b.1: ${oc.env:NOT_SET} cannot be resolved")


def test_a_variable_that_nothing_refers_to_is_told():
    values = {"vars": {"rate": 1, "rates": 2}, "a": "${vars.rate}"}
    assert unused_variables(values) == [
        "vars.rates has no effect: nothing refers to it; did you mean 'rate'?"
    ]
