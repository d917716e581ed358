import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from training.config import (
    ConfigError,
    build,
    describe,
    dump,
    load,
    one_line,
    option,
    override,
    parse_value,
    read_yaml,
    to_tree,
)
from training.train import split_words


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
    share: float | None = option(None, "a share", gt=0, lt=1)
    shares: dict[str, list[float]] = option(factory=dict, doc="shares by name", ge=0, le=1)
    threads: int = option(1, "threads", ge=1, le=1024)


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


@pytest.mark.parametrize(
    ("key", "hint"),
    [("steps", "did you mean section.steps?"), ("sections", "did you mean section?"), ("zzz", "the keys are section")],
)
def test_key_without_its_section_is_refused_with_the_section(key, hint):
    assert hint in refused({key: 5})


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


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("section.lr=.nan", "section.lr=nan must be a finite number"),
        ("section.lr=-.inf", "section.lr=-inf must be a finite number"),
        ("section.lr=1e999", "section.lr=inf must be a finite number"),
        ("section.betas=[0.9, .nan]", "section.betas.1=nan must be a finite number"),
        ("section.weights={text: .inf}", "section.weights.text=inf must be a finite number"),
        ("section.leaves=[{name: a, weight: .nan}]", "section.leaves.0.weight=nan must be a finite number"),
        ("section.share=.nan", "section.share=nan must be a finite number, or null"),
        ("section.share=1", "section.share=1.0 must be above 0 and below 1, or null"),
        ("section.shares={a: [0.5, -0.1]}", "section.shares.a.1=-0.1 must be at least 0 and at most 1"),
        ("section.threads=0", "section.threads=0 must be at least 1 and at most 1,024"),
        ("section.threads=2000", "section.threads=2000 must be"),
        (f"section.limit={10**30}", "section.limit is an integer of 100 bits"),
        (f"section.lr={10**400}", "section.lr is an integer of"),
        (f"section.lr={'9' * 5000}", "section.lr: '999"),
        ("section.leaves=[{name: ''}]", "section.leaves.0.name='' must be a text"),
        ('section.leaves=[{name: "a\\0b"}]', "must be a text"),
        ("section.lr=2020-99-99", "section.lr: '2020-99-99' is not a YAML value"),
    ],
)
def test_numbers_out_of_range_and_empty_texts_are_refused_by_path_and_value(word, named):
    message = refused({}, word)
    assert named in message and len(message) < 500


def test_values_at_the_ends_of_a_range_are_accepted():
    tree = build(Tree, {"section": {"shares": {"a": [0, 1]}, "threads": 1024}})
    assert tree.section.shares == {"a": [0.0, 1.0]} and tree.section.threads == 1024


def test_the_range_of_an_option_is_listed():
    kinds = {key: kind for key, kind, *_ in describe(Tree)}
    assert kinds["section.share"] == "float or null, above 0 and below 1"
    assert kinds["section.threads"] == "int, at least 1 and at most 1,024"


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", str(10**30)])
def test_no_option_of_a_recipe_takes_a_number_that_is_none(value):
    from training.recipe import Recipe

    recipe = read_yaml(ROOT / "training" / "configs" / "transfusion-emoji.yaml")
    keys = [key.replace("[i]", ".0") for key, kind, *_ in describe(Recipe) if "float" in kind or "int" in kind]
    assert len(keys) > 70
    for key in keys:
        with pytest.raises(ConfigError, match=re.escape(key.rpartition(".")[2])):
            build(Recipe, override(recipe, [f"{key}={value}"]))


@pytest.mark.parametrize(
    "text",
    [
        "section: " + "[" * 5000 + "]" * 5000,
        "section: " + "{a: " * 5000 + "1" + "}" * 5000,
        "section: &a\n  leaves: *a\n",
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "\0",
        "? [a]\n: 1\n",
        "x: !!timestamp 3",
        "x: !!int ''",
        "x: !!bool x",
        "x: !!float a",
    ],
    ids=[
        "lists",
        "mappings",
        "recursive",
        "aliases of aliases",
        "null byte",
        "list as key",
        "no time",
        "no number",
        "no truth",
        "no float",
    ],
)
def test_a_file_that_is_no_plain_tree_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(Tree, tmp_path / "recipe.yaml")
    assert "\n" not in one_line(error.value) and len(one_line(error.value)) < 2100


@pytest.mark.parametrize("word", ["a=" + "[" * 5000, "a=&a [*a]", ".".join("a" * 5000) + "=1", "section.leaves.²=1"])
def test_a_word_that_is_no_plain_tree_is_refused(word):
    assert len(refused({"section": {"leaves": [{"name": "a"}]}}, word)) < 500


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
    message = refused({"section": {"leaves": [{"name": "a"}]}}, "section.leaves.3.weight=1")
    assert "section.leaves.3: the list has no entry 3; the last of its entries is 0" in message
    assert "the list is empty" in refused({"section": {"leaves": []}}, "section.leaves.0.weight=1")


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


def test_a_file_that_is_not_near_is_not_offered(tmp_path):
    with pytest.raises(ConfigError, match="nothere.yaml does not exist$"):
        read_yaml(tmp_path / "nothere.yaml")


def test_an_error_says_whether_the_file_or_the_command_line_is_wrong(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("section: {steps: many}")
    with pytest.raises(ConfigError, match=rf"section.steps='many' is a str; it must be an int \(in {path}\)"):
        load(Tree, path, ["section.lr=1"])
    for words in (["section.steps=few"], ["section.steps=1", "section.lrr=1"]):
        with pytest.raises(ConfigError, match=r"section\.\w+.* \(on the command line\)$"):
            load(Tree, path, words)


def test_an_argument_that_is_no_file_and_no_key_says_so():
    with pytest.raises(ConfigError, match="'smoke' is neither a configuration file .* nor key=value"):
        split_words(["smoke"])
    assert split_words(["a.yaml", "b=1", "-h"]) == ("a.yaml", ["b=1"], {"--help"})


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


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optimizer.warmup_steps=11", "train.steps=10"], "optimizer.warmup_steps=11 is more than train.steps=10"),
        (["optimizer.lr=1e-3", "optimizer.min_lr=1e-2"], "min_lr=0.01 must be at most lr=0.001"),
        (["optimizer.lr=10", "optimizer.weight_decay=1"], "more than 1"),
        (["model.modalities=[text]", "model.init_from=x"], "model.modalities"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words, named):
    from training.recipe import Recipe

    with pytest.raises(ConfigError, match=re.escape(named)):
        load(Recipe, ROOT / "training" / "configs" / "emoji.yaml", words)


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 100), (5, 0), (100_000, 4000)])
def test_warm_up_follows_the_length_of_the_run_where_a_recipe_leaves_it_open(steps, warmup):
    from training.recipe import Recipe

    words = ["optimizer.warmup_steps=null", f"train.steps={steps}"]
    recipe = load(Recipe, ROOT / "training" / "configs" / "emoji.yaml", words)
    assert recipe.optimizer.warmup_steps == warmup
