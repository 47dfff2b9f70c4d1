"""`diffmm recipes`."""

import diffmm
from diffmm.cli import recipes
from diffmm.recipes.catalog import description, fields, recipe_names


def test_lists_every_recipe_with_a_line(run):
    result = run("recipes")
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 4 for line in lines)


def test_shows_a_recipe_as_it_is(run):
    text = (recipes.recipe_root() / "image/digits_tiny.yaml").read_text()
    assert run("recipes", "show", "image/digits_tiny").out == text


def test_copies_to_the_current_folder_a_folder_or_a_file(run, tmp_path):
    text = (recipes.recipe_root() / "image/digits_tiny.yaml").read_text()
    (tmp_path / "folder").mkdir()
    for target in ((), (str(tmp_path / "folder"),), (str(tmp_path / "mine.yaml"),)):
        result = run("recipes", "copy", "image/digits_tiny", *target)
        assert result.code == 0
        with open(result.out.strip()) as file:
            assert file.read() == text


def test_never_overwrites(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("precious")
    result = run("recipes", "copy", "image/digits_tiny", tmp_path / "mine.yaml")
    assert result.code == 2
    assert result.mistakes == [f"{tmp_path / 'mine.yaml'} exists already: choose another path"]
    assert (tmp_path / "mine.yaml").read_text() == "precious"


def test_refuses_targets_that_are_no_recipe_or_nowhere(run):
    result = run("recipes", "copy", "image/digits_tiny", "mine.txt")
    assert result.mistakes == ["a recipe's name ends in .yaml, got mine.txt"]
    result = run("recipes", "copy", "image/digits_tiny", "no/such/mine.yaml")
    assert result.mistakes == ["there is no folder no/such to copy image/digits_tiny to"]


def test_unknown_names_are_told_with_the_nearest(run):
    for name, near in (
        ("image/digit_tiny", "image/digits_tiny"),
        ("stdlib_tiny", "text/stdlib_tiny"),
        ("wikitext-103", "text/wikitext103"),
    ):
        result = run("recipes", "show", name)
        assert result.code == 2
        assert result.mistakes == [
            f"there is no recipe {name!r}; did you mean {near!r}? (diffmm recipes lists them)"
        ]


def test_recipes_of_an_installed_package_come_first(tmp_path, monkeypatch):
    package = tmp_path / "site" / "diffmm"
    (package / "_recipes" / "text").mkdir(parents=True)
    (package / "_recipes" / "text" / "mine.yaml").write_text("# Mine.\n")
    monkeypatch.setattr(diffmm, "__file__", str(package / "__init__.py"))
    assert recipe_names() == ["text/mine"]


def test_headers_are_read_field_by_field():
    text = (
        "# What it is.\n#\n# A note.\n#\n# Command: diffmm fit\n# Time: long,\n#   very\n\n"
        "# Metric: of no header\nvars: {}\n"
    )
    assert description(text) == "What it is."
    assert fields(text) == {"Command": "diffmm fit", "Time": "long, very"}
