import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from training.config import ConfigError, build, describe, dump, load, option, override, parse_value, read_yaml, to_tree


ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Leaf:
    name: str = option(doc="its name")
    weight: float = option(1.0, "its weight")


@dataclass
class Section:
    lr: float = option(3e-4, "learning rate")
    steps: int = option(10, "updates")
    kind: Literal["dense", "mot"] = option("mot", "which")
    limit: int | None = option(None, "how many")
    betas: tuple[float, float] = option((0.9, 0.95), "decays")
    leaves: list[Leaf] = field(default_factory=list, metadata={"doc": "the leaves"})
    weights: dict[str, float] | None = option(None, "by name")
    extra: Leaf | None = option(None, "one more")


@dataclass
class Tree:
    section: Section = field(default_factory=Section)


def refused(tree: dict, *words: str) -> str:
    with pytest.raises(ConfigError) as error:
        build(Tree, override(tree, words))
    return str(error.value)


def test_unknown_key_is_refused_with_its_path_and_the_nearest_name():
    message = refused({"section": {"step": 5}})
    assert "section.step" in message and "did you mean section.steps" in message


def test_unknown_section_is_refused_with_the_nearest_name():
    assert "did you mean section" in refused({"sectoin": {}})


def test_unknown_key_inside_a_list_names_the_entry():
    assert "section.leaves.1.wieght" in refused({"section": {"leaves": [{"name": "a"}, {"name": "b", "wieght": 1}]}})


def test_missing_required_key_is_named():
    assert "section.leaves.0.name is required" in refused({"section": {"leaves": [{}]}})


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("section.steps=ten", "section.steps='ten'"),
        ("section.steps=1.5", "section.steps=1.5"),
        ("section.steps=true", "section.steps=True"),
        ("section.lr=fast", "section.lr='fast'"),
        ("section.kind=moe", "section.kind='moe'"),
        ("section.betas=[0.9]", "section.betas must hold 2"),
        ("section.leaves={}", "section.leaves must be a list"),
        ("section.weights={text: a}", "section.weights.text='a'"),
        ("section=3", "section must be a mapping"),
    ],
)
def test_wrong_type_is_refused_by_path_and_value(word, named):
    assert named in refused({}, word)


def test_an_integer_is_accepted_for_a_float():
    value = build(Tree, {"section": {"lr": 1}}).section.lr
    assert value == 1.0 and isinstance(value, float)


def test_numbers_with_an_exponent_but_no_point_are_numbers():
    assert parse_value("3e-4") == 3e-4 and parse_value("1E5") == 1e5 and parse_value("-2e3") == -2e3


def test_words_of_the_command_line_win_over_the_file_in_order(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("section: {lr: 1e-3, leaves: [{name: a}, {name: b}]}")
    tree = load(Tree, path, ["section.lr=2e-3", "section.lr=3e-3", "section.leaves.1.weight=4"])
    assert tree.section.lr == 3e-3
    assert [leaf.weight for leaf in tree.section.leaves] == [1.0, 4.0]


def test_a_word_can_fill_a_section_that_is_null():
    assert build(Tree, override({"section": {"extra": None}}, ["section.extra.name=x"])).section.extra.name == "x"


def test_a_list_index_outside_the_list_is_refused():
    assert "holds 1 entries" in refused({"section": {"leaves": [{"name": "a"}]}}, "section.leaves.3.weight=1")


def test_a_word_without_an_equals_sign_is_refused():
    assert "not key=value" in refused({}, "section.lr")


def test_python_tags_are_not_constructed(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("section: !!python/object/apply:os.system ['touch " + str(tmp_path / "pwned") + "']")
    with pytest.raises(ConfigError):
        read_yaml(path)
    assert not (tmp_path / "pwned").exists()


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("section:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ConfigError, match="'lr' is given twice"):
        read_yaml(path)


def test_a_missing_file_is_refused_with_a_near_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="did you mean .*recipe.yaml"):
        read_yaml(tmp_path / "recipie.yaml")


def test_a_written_configuration_reads_back_equal(tmp_path):
    tree = build(Tree, {"section": {"leaves": [{"name": "a"}], "weights": {"text": 2}, "limit": 3, "kind": "dense"}})
    (tmp_path / "out.yaml").write_text(dump(tree))
    assert load(Tree, tmp_path / "out.yaml") == tree


def test_describe_lists_every_field():
    keys = {key for key, *_ in describe(Tree)}
    fields = {f"section.{name}" for name in to_tree(Section())}
    nested = {f"section.{key}.{name}" for key in ("leaves[i]", "extra") for name in ("name", "weight")}
    assert fields | nested == keys


def run_train(*words):
    command = [sys.executable, str(ROOT / "training" / "train.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")


def test_help_lists_every_key_of_the_recipe_with_documentation():
    from training.recipe import Recipe

    done = run_train("--help")
    assert done.returncode == 0, done.stderr
    for key, _, _, doc in describe(Recipe):
        assert f"  {key} (" in done.stdout
        assert doc, f"{key} has no documentation"


def test_a_mistyped_key_ends_the_command_with_code_2_and_one_line():
    done = run_train("optimizer.lrr=1")
    assert done.returncode == 2
    assert "did you mean optimizer.lr" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid(path):
    from training.recipe import Recipe

    recipe = load(Recipe, path)
    assert yaml.safe_load(dump(recipe))["train"]["output_dir"] == f"runs/{path.stem}"
