"""Tokens of a step are stated by a recipe, and held on any number of processes."""

import json
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from training.config import ConfigError, build, load
from training.model.costs import Budget
from training.plan import __main__ as plan
from training.recipe import Recipe
from training.run_files.metrics import read_metrics
from training.train import main


CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
SOURCES = [{"name": "a", "path": "carried", "config": "emoji", "templates": [{"segments": ["text:name"]}]}]
# The paper's Tables 1, 3, 4 and 5: batch size of a GPU, GPUs, millions of tokens in a batch, thousands of steps.
TABLES = {
    "chameleon-37m": (12, 32, 1.57, 160),
    "chameleon-94m": (8, 32, 1.05, 160),
    "chameleon-443m": (6, 64, 1.57, 160),
    "chameleon-1.5b": (4, 128, 2.10, 120),
    "chameleon-7b": (2, 384, 3.15, 120),
    "chameleon-speech-443m": (6, 64, 1.57, 160),
    "chameleon-speech-880m": (4, 128, 2.10, 120),
    "chameleon-speech-1.5b": (4, 128, 2.10, 120),
    "chameleon-speech-7b": (2, 384, 3.15, 120),
    "transfusion-163m": (4, 128, 2.10, 250),
    "transfusion-760m": (4, 128, 2.10, 250),
    "transfusion-1.4b": (2, 256, 2.10, 250),
    "transfusion-7b": (2, 256, 2.10, 250),
    "ablation-880m": (4, 128, 2.10, 120),
}


def recipe_of(**train) -> Recipe:
    return build(Recipe, {"data": {"row_length": 128, "sources": SOURCES}, "train": train})


def test_every_recipe_of_a_preset_is_a_row_of_the_tables():
    named = {path.stem for path in CONFIGS.glob("*.yaml") if load(Recipe, path).model.preset is not None}
    assert named == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_recipes_of_the_paper_hold_its_tokens_of_a_step(name):
    rows, gpus, millions, thousands = TABLES[name]
    recipe = load(Recipe, CONFIGS / f"{name}.yaml")
    assert round(recipe.train.tokens_per_step / 1e6, 2) == pytest.approx(millions)
    assert (recipe.train.rows, recipe.data.row_length, recipe.train.steps) == (rows, 4096, 1000 * thousands)
    # One micro-batch on the paper's cluster; more of them on a smaller one.
    assert recipe.micro_batches(gpus) == 1
    assert recipe.micro_batches(1) == gpus and recipe.micro_batches(gpus // 4) == 4


def test_the_plan_holds_the_tokens_on_every_cluster(tmp_path, capsys):
    for world, micro_batches in ((32, 12), (384, 1)):
        path = tmp_path / f"{world}.json"
        assert plan.main([str(CONFIGS / "chameleon-7b.yaml"), "--world", str(world), "--json", str(path)]) == 0
        batch = json.loads(path.read_text(encoding="utf-8"))["batch"]
        assert (batch["accumulation"], batch["tokens_of_a_step"]) == (micro_batches, 3_145_728)
        assert (
            f"x {micro_batches} micro-batches x {world} processes = 3,145,728 tokens a step" in capsys.readouterr().out
        )


def test_accumulation_follows_from_the_processes():
    recipe = recipe_of(rows=2, tokens_per_step=2048)
    assert [recipe.micro_batches(processes) for processes in (1, 2, 4, 8)] == [8, 4, 2, 1]
    for processes in (1, 2, 4, 8):
        budget = Budget.of(recipe, None, 1.0, processes, 1)
        assert budget.tokens_of_step * processes == 2048 and budget.tokens_of_run == 2048 * recipe.train.steps


def test_without_stated_tokens_all_is_as_before():
    assert recipe_of().train.accumulation == 1 and recipe_of().micro_batches(3) == 1
    assert recipe_of(accumulation=5).micro_batches(3) == 5


@pytest.mark.parametrize(
    ("train", "processes", "named"),
    [
        (
            {"rows": 3, "tokens_per_step": 2048},
            1,
            "train.tokens_per_step=2,048 is no multiple of train.rows=3 x data.row_length=128 x 1 process = 384 tokens"
            "; train.rows=1 or 2 or 4, or train.tokens_per_step=1920 or 2304 would fit",
        ),
        (
            {"rows": 2, "tokens_per_step": 2048},
            3,
            "train.rows=2 x data.row_length=128 x 3 processes = 768 tokens; 1 or 2 or 4 processes, or "
            "train.tokens_per_step=1536 or 2304 would fit",
        ),
        ({"rows": 2, "tokens_per_step": 100}, 1, "train.tokens_per_step=256 would fit"),
        (
            {"rows": 2, "accumulation": 3, "tokens_per_step": 2048},
            2,
            "train.accumulation=3 makes 1,536 tokens a step of 2 processes, but train.tokens_per_step=2,048; leave "
            "train.accumulation out, or set it to 4",
        ),
    ],
)
def test_what_does_not_divide_or_contradicts_is_refused_by_name(train, processes, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        recipe_of(**train).micro_batches(processes)


def test_values_that_are_said_to_fit_do_fit():
    recipe = recipe_of(rows=3, tokens_per_step=2048)
    for train in ({"rows": 1}, {"rows": 2}, {"rows": 4}, {"tokens_per_step": 1920}, {"tokens_per_step": 2304}):
        assert recipe_of(**({"rows": 3, "tokens_per_step": recipe.train.tokens_per_step} | train)).micro_batches(1)


def test_the_plan_refuses_a_world_that_does_not_divide(capsys):
    assert plan.main([str(CONFIGS / "chameleon-7b.yaml"), "--world", "36"]) == 2
    assert "train.tokens_per_step=3,145,728 is no multiple of train.rows=2" in capsys.readouterr().err


def test_a_run_that_states_its_tokens_takes_the_same_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("MOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["train.cpu=true", "train.cpu_threads=1", "train.steps=2", "samples.enabled=false", "evaluation.rows=0"]
    losses = {}
    # The smoke recipe has 2 rows of 256 tokens in each of 2 micro-batches.
    for name, stated in (
        ("stated", ["train.accumulation=null", "train.tokens_per_step=1024"]),
        ("counted", []),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main([str(CONFIGS / "smoke.yaml"), *words, *stated, f"train.output_dir={name}"]) == 0
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")[0]]
    assert losses["stated"] == losses["counted"] and len(losses["stated"]) == 2
    # Another number of tokens is another run, whatever key it comes from.
    AcceleratorState._reset_state(reset_partial_state=True)
    changed = ["train.accumulation=null", "train.tokens_per_step=2048", "train.resume=true", "train.output_dir=stated"]
    assert main([str(CONFIGS / "smoke.yaml"), *words, *changed]) == 2
    # The same tokens in other micro-batches are the same run.
    AcceleratorState._reset_state(reset_partial_state=True)
    split = ["train.rows=1", "train.accumulation=4", "train.resume=true", "train.output_dir=stated"]
    assert main([str(CONFIGS / "smoke.yaml"), *words, *split]) == 0
