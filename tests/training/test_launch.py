"""A run is what its launcher was asked for, or none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from training.config import ConfigError
from training.world import Asked, build_accelerator


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, "packed documents would see each other"),
        ({"PARALLELISM_CONFIG_SP_SIZE": "2"}, "replace the attention mask"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "train.precision=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision='fp8'"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "model.compile=true"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "train.accumulation"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        # One process has nothing to shard over, and Accelerate would train it without a word.
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP was asked for, but Accelerate set up NO"),
    ],
)
def test_settings_that_would_not_be_followed_are_refused(monkeypatch, environment, named):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        build_accelerator("float32", cpu=True)


def test_another_number_of_processes_than_the_recipe_wants_is_refused():
    with pytest.raises(ConfigError, match="train.processes is 8, but this run has 1"):
        build_accelerator("float32", cpu=True, processes=8)


@pytest.mark.parametrize(("asked", "mixed", "expected"), [("auto", "bf16", "bf16"), ("float32", "bf16", "no")])
def test_a_precision_of_accelerate_decides_where_the_recipe_leaves_it_open(monkeypatch, asked, mixed, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)
    assert build_accelerator(asked, cpu=True).mixed_precision == expected


@pytest.mark.parametrize("words", [["--cpu", "--num_processes", "2"], ["--config_file", "two.yaml"]])
def test_a_launcher_that_starts_one_process_where_two_were_asked_for_is_noticed(tmp_path, words):
    (tmp_path / "two.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 2\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, str(ROOT / "training" / "train.py")]
    done = subprocess.run(
        [*command, str(ROOT / "training" / "configs" / "smoke.yaml"), "train.output_dir=run"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "the launcher's num_processes is 2, but this run has 1" in done.stderr
    assert not (tmp_path / "run").exists()


def test_nothing_is_asked_where_no_launcher_is_above(monkeypatch):
    from training.world import asked_of_launcher

    monkeypatch.setattr("training.world.psutil.Process.cmdline", lambda process: ["bash"])
    assert asked_of_launcher() == Asked()
