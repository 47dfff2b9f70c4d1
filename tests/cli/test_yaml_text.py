"""Invalid content of recipe files is refused in one line and in bounded time."""

import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmm.recipes.errors import InputError
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import load_file, parse_overrides
from diffmm.recipes.yaml_text import MAX_BYTES, MAX_DEPTH, parse

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
REFUSED = {
    "aliases of aliases": (LAUGHS, "aliases stand for more than 100,000 values"),
    "an alias of itself": ("a: &a [1, *a]", "a.1 is an alias of its own parent"),
    "deep lists": ("a: " + "[" * 20_000, f"nested more than {MAX_DEPTH} levels deep"),
    "rather deep lists": ("a: " + "[" * 150 + "]" * 150, f"more than {MAX_DEPTH} levels deep"),
    "a huge integer": ("a: " + "9" * 5000, "a value that cannot be read"),
    "an integer of nothing": ("a: !!int", "a value that cannot be read"),
    "much text": ("a: " + "x" * MAX_BYTES, "has more than 1,048,576 characters"),
    "a set": ("a: !!set {b, c}", "a is of YAML's type set: put it in quotes"),
    "bytes": ("a: {b: !!binary aGVsbG8=}", "a.b is of YAML's type bytes"),
    "a date by its tag": ("a: [!!timestamp 2026-01-01]", "a.0 is of YAML's type date"),
    "pairs": ("a: !!pairs [b: 1]", "a.0 is of YAML's type tuple"),
    "a number as key": ("a: {1: b}", "the key a.1 is not a string: put it in quotes"),
    "null as key": ("~: b", "the key None is not a string"),
    "a list as key": ("? [a, b]\n: c", "a key must be text, not a list or a mapping"),
    "a key twice": ("a: 1\na: 2", "the key 'a' appears twice"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "no YAML": ("a: [", "expected the node content"),
    "control characters": ("a: \x01", "special characters are not allowed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_are_no_recipe_are_refused_in_one_line(what, tmp_path):
    text, message = REFUSED[what]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(InputError) as refusal:
        load_file(path)
    assert time.monotonic() - start < 10
    (line,) = refusal.value.lines
    assert line.startswith(f"{path} cannot be read: ")
    assert message in line
    assert len(line) < 600


def test_merges_of_merges_take_no_time():
    """PyYAML drops repeated keys, or (older versions) passes them on, in which case they are
    counted."""
    start = time.monotonic()
    with suppress(ValueError):
        assert parse(MERGES)["a11"] == {"x": 1, "y": 2}
    assert time.monotonic() - start < 10


def test_plain_values_are_what_they_look_like():
    text = "{a: 1e-3, b: 2026-01-01, c: ~, d: [x, 0.5, true], e: &e {f: 1}, g: *e, h: {<<: *e}}"
    assert parse(text) == {
        "a": 0.001,
        "b": "2026-01-01",
        "c": None,
        "d": ["x", 0.5, True],
        "e": {"f": 1},
        "g": {"f": 1},
        "h": {"f": 1},
    }
    assert parse_overrides(["--a", "9" * 5000, "--b=[", "--c", "!!set {a}"]) == [
        ("a", "9" * 5000),
        ("b", "["),
        ("c", "!!set {a}"),
    ]


def test_references_that_multiply_are_refused():
    variables = {"a0": "ha" * 50}
    variables |= {f"a{n}": f"${{vars.a{n - 1}}}" * 9 for n in range(1, 12)}
    values = {"vars": variables, "run_dir": "runs", "model": ["${vars.a11}"]}
    start = time.monotonic()
    _, (mistake,) = resolve(values)
    assert time.monotonic() - start < 5
    assert mistake == "the references between settings stand for more than 1,048,576 characters"
    lists = {"a0": [1] * 50} | {f"a{n}": [f"${{vars.a{n - 1}}}"] * 9 for n in range(1, 12)}
    assert resolve({"vars": lists})[1] == [mistake]
    assert resolve({"vars": {"a": "${vars.b}", "b": "${vars.a}"}})[1] != []


PIECES = (
    *("a", "b: ", "- ", "[", "]", "{", "}", ": ", ", ", "&x ", "*x", "<<: ", "!!set ", "!!int "),
    *("\n", "  ", "'", '"', "|", ">", "? ", "1e9", "0x1f", "1:30", ".nan", "~", "#", "%", "\t"),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=40))
def test_any_text_is_plain_values_or_is_refused(text):
    try:
        waiting = [parse(text)]
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
        while waiting:
            value = waiting.pop()
            assert type(value) in (dict, list, str, bool, int, float, type(None))
            if isinstance(value, dict):
                assert all(isinstance(key, str) for key in value)
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
    assert "\n" not in refusal
