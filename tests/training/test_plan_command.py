"""The command `python -m training.plan`, what it refuses, and that its figures fit each other."""

import json
from pathlib import Path

import pytest
import yaml

from training.config import ConfigError
from training.model.building import build_model, find_vae, load_processor, planned_config
from training.plan import __main__ as plan
from training.plan.cluster import Mesh, find_device, mesh_of_accelerate
from training.train import load_recipe


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "training" / "configs"


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("cpu", Mesh()),
        ("cpu-2-fsdp", Mesh(2)),
        ("gpu", Mesh()),
        ("gpu-8", Mesh(8)),
        ("gpu-64", Mesh(64, 8)),
        ("gpu-256", Mesh(256, 32)),
    ],
)
def test_mesh_is_read_from_an_accelerate_configuration(name, mesh):
    assert mesh_of_accelerate(str(CONFIGS / "accelerate" / f"{name}.yaml")) == (mesh, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distributed_type": "MULTI_GPU", "num_processes": 4}, "MULTI_GPU"),
        ({"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {"fsdp_version": 1}}, "fsdp_version=1"),
        ({"distributed_type": "NO", "nonsense": 1}, "nonsense"),
        (
            {
                "distributed_type": "FSDP",
                "num_processes": 8,
                "fsdp_config": {"fsdp_version": 2},
                "parallelism_config": {
                    "parallelism_config_dp_replicate_size": 2,
                    "parallelism_config_dp_shard_size": 2,
                },
            },
            "is not num_processes=8",
        ),
    ],
)
def test_other_accelerate_configurations_are_refused(tmp_path, fields, message):
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        mesh_of_accelerate(str(path))


def test_precision_of_a_device_is_that_of_the_trainer():
    assert find_device("h100", "auto").precision == "bf16" and find_device("H100", "auto").peak == 989e12
    assert find_device("V100", "auto").precision == "float32"
    with pytest.raises(ConfigError, match="no bf16"):
        find_device("V100", "bf16")


def test_processes_on_this_machine_share_it():
    one, two = find_device("cpu", "float32"), find_device("cpu", "float32", processes=2)
    assert one.memory == 2 * two.memory and "measured" in one.source and one.link is None


def test_a_plan_needs_no_data_and_adds_up(tmp_path, capsys):
    words = ["data.sources.0.path=/nowhere", "data.cache_dir=" + str(tmp_path / "cache"), "train.tokens_per_step=null"]
    words.append("train.accumulation=2")
    path = tmp_path / "plan.json"
    assert plan.main([str(CONFIGS / "chameleon-speech-443m.yaml"), "--world", "16", *words, "--json", str(path)]) == 0
    assert not (tmp_path / "cache").exists()
    figures = json.loads(path.read_text(encoding="utf-8"))
    time, flops = figures["time"], figures["flops"]
    assert figures["parameters"]["total"] == figures["comparison"]["mot"]["total"]
    assert figures["traffic"]["total"] == figures["comparison"]["mot"]["received_bytes"]
    assert sum(figures["memory"]["parts"].values()) == figures["memory"]["total"]
    tokens = figures["batch"]["tokens_of_a_step"]
    assert flops["step_of_a_process"] * 16 == tokens * flops["training_per_token"]["text"]
    assert time["compute_seconds"] == pytest.approx((flops["step_of_a_process"] + flops["recomputed"]) / 989e12 / 0.4)
    assert time["step_seconds"] == max(time["compute_seconds"], time["communication_seconds"])
    assert time["tokens_per_second"] * time["step_seconds"] == pytest.approx(tokens)
    screen = capsys.readouterr().out
    assert "moved in a step: dense < mot ~ moe-4x" in screen and f"{figures['parameters']['total']:,}" in screen


def test_shares_of_modalities_decide_what_is_spent(tmp_path):
    def step(shares: str) -> dict:
        path = tmp_path / f"{shares}.json"
        words = [str(CONFIGS / "transfusion-emoji.yaml"), "--shares", shares, "--json", str(path)]
        assert plan.main(words) == 0
        return json.loads(path.read_text(encoding="utf-8"))

    text, image = step("text=1"), step("text=0,image=2")
    assert text["batch"]["tokens_of_a_micro_batch"]["image"] == image["batch"]["tokens_of_a_micro_batch"]["text"] == 0
    assert image["flops"]["step_of_a_process"] > text["flops"]["step_of_a_process"]
    assert text["parameters"]["frozen"] > 0


def test_a_plan_names_the_widths_of_towers_and_compares_towers_of_one_width(capsys):
    words = [str(CONFIGS / "emoji.yaml"), "model.tower_configs={image: {hidden_size: 64, intermediate_size: 128}}"]
    assert plan.main(words) == 0
    printed = capsys.readouterr().out
    assert "6 layers of text 256, image 64, speech 256, towers" in printed
    figures = plan.plan_figures(load_recipe(words), plan.make_parser().parse_args([]))
    alike = plan.plan_figures(load_recipe(words[:1]), plan.make_parser().parse_args([]))
    assert figures["comparison"] == alike["comparison"]
    by_part = figures["parameters"]["by_part"]
    assert by_part["attention"]["image"] * 4 == by_part["attention"]["text"]
    assert figures["flops"]["forward_per_token"]["image"] < figures["flops"]["forward_per_token"]["text"]


def test_a_plan_goes_on_from_a_checkpoint(tmp_path, capsys):
    sizes = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "data.row_length=64"]
    recipe = load_recipe([str(CONFIGS / "transfusion-emoji.yaml"), *sizes])
    vae = find_vae(recipe.model, None)
    processor = load_processor(recipe.model, vae)
    build_model(recipe.model, planned_config(recipe.model, processor, 64, vae), 0, vae).save_pretrained(
        tmp_path / "model"
    )
    processor.save_pretrained(tmp_path / "model")
    figures = []
    for words in (sizes, [f"model.init_from={tmp_path / 'model'}", "data.row_length=64"]):
        path = tmp_path / f"{len(figures)}.json"
        assert plan.main([str(CONFIGS / "transfusion-emoji.yaml"), *words, "--json", str(path)]) == 0
        figures.append(json.loads(path.read_text(encoding="utf-8")))
    assert figures[0] == figures[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_can_be_planned(path):
    if load_recipe([str(path)]).model.init_from is not None:
        pytest.skip("it starts from a checkpoint of another run")
    assert plan.main([str(path), "--accelerate", str(CONFIGS / "accelerate" / "gpu-64.yaml")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "12", "--replicate", "8"], "--world=12 is no multiple of --replicate=8"),
        (["--world", "8", "--replicate", "8"], "groups of one process"),
        (["--world", "0"], "--world=0 must be at least 1"),
        (["--device", "H1000"], "--device='H1000' is unknown; there are cpu, V100"),
        (["--utilisation", "1.5"], "at most 1"),
        (["--network", "0"], "--network=0.0 must be positive"),
        (["--shares", "text=1,taste=1"], "shares of text, image, speech"),
        (["--shares", "text"], "is not modality=share"),
        (["--accelerate", "nowhere.yaml"], "does not exist"),
        (["--accelerate", str(CONFIGS / "accelerate" / "gpu-8.yaml"), "--world", "8"], "leave out --world"),
        (["model.hidden_size=31"], "model: "),
        (["model.init_from=/nowhere"], "could be loaded from '/nowhere'"),
        (["model.init_from=runs/not/there"], "could be loaded from 'runs/not/there': there is no such folder"),
        (["model.hiden_size=32"], "did you mean model.hidden_size"),
        (["--json", str(ROOT / "README.md")], "exists; name a new file"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(words, message, capsys):
    assert plan.main(words) == 2
    assert message in capsys.readouterr().err
