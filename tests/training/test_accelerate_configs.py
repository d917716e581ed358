"""The files in training/configs/accelerate, as Accelerate's own launcher reads them."""

from pathlib import Path

import pytest
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from modeling_mot.modeling_mot import MoTDecoderLayer


FOLDER = Path(__file__).resolve().parents[2] / "training" / "configs" / "accelerate"
SINGLE, SHARDED, HYBRID = ("cpu", "gpu"), ("cpu-2-fsdp", "gpu-8"), ("gpu-64", "gpu-256")


def launched(name: str, *options: str):
    """What `accelerate launch` makes of a file: its arguments once they are complete."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), *options, "training/train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def worker_environment(name: str) -> dict[str, str]:
    nodes = ("--machine_rank", "1", "--main_process_ip", "node0", "--main_process_port", "29400")
    with patch_environment(omp_num_threads="1"):
        return prepare_multi_gpu_env(launched(name, *(nodes if name in HYBRID else ())))


def test_every_file_is_tried_here():
    assert {path.stem for path in FOLDER.iterdir()} == {*SINGLE, *SHARDED, *HYBRID}


@pytest.mark.parametrize("name", [*SINGLE, *SHARDED, *HYBRID])
def test_every_key_is_known_to_the_launcher(name):
    # Accelerate itself refuses unknown keys of the first level, and takes any below.
    path = FOLDER / f"{name}.yaml"
    load_config_from_file(str(path))
    sections = [value for value in yaml.safe_load(path.read_text(encoding="utf-8")).values() if isinstance(value, dict)]
    known = vars(launch_command_parser().parse_args(["training/train.py"]))
    assert [key for section in sections for key in section if key not in known] == []


@pytest.mark.parametrize("name", [*SINGLE, *SHARDED, *HYBRID])
def test_no_first_level_key_is_passed_over(name):
    # Accelerate keeps a command-line default over the file's value: `rdzv_backend` is such a key.
    file = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    arguments = vars(launched(name))
    elsewhere = {"compute_environment", "distributed_type"}
    plain = {key: value for key, value in file.items() if not isinstance(value, dict) and key not in elsewhere}
    assert {key: arguments[key] for key in plain} == plain


@pytest.mark.parametrize(("name", "cpu"), [("cpu", "True"), ("gpu", "False")])
def test_one_process_is_launched_plainly(name, cpu):
    arguments = launched(name)
    assert not arguments.use_fsdp and not arguments.multi_gpu and arguments.num_processes == 1
    with patch_environment(omp_num_threads="1"):
        environment = prepare_simple_launcher_cmd_env(arguments)[1]
    assert environment["ACCELERATE_USE_CPU"] == cpu and environment["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize("name", [*SHARDED, *HYBRID])
def test_workers_are_told_of_fsdp2_with_a_unit_per_layer(name):
    environment = worker_environment(name)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no" and environment["ACCELERATE_DYNAMO_BACKEND"] == "NO"
    variables = {key: value for key, value in environment.items() if key.startswith("FSDP_")}
    with patch_environment(**variables):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap == [MoTDecoderLayer.__name__]
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing and plugin.mixed_precision_policy is None


@pytest.mark.parametrize(("name", "nodes"), [("gpu-64", 8), ("gpu-256", 32)])
def test_hybrid_shards_inside_a_node_and_replicates_over_nodes(name, nodes):
    variables = {k: v for k, v in worker_environment(name).items() if k.startswith("PARALLELISM_CONFIG_")}
    with patch_environment(**variables):
        parallelism = ParallelismConfig()
    arguments = launched(name)
    assert (parallelism.dp_replicate_size, parallelism.dp_shard_size) == (nodes, 8)
    assert parallelism.total_size == arguments.num_processes == 8 * arguments.num_machines
    # The last dimension of a mesh holds consecutive ranks, which are those of one node.
    assert parallelism._get_mesh() == (("dp_replicate", "dp_shard"), (nodes, 8))


@pytest.mark.parametrize(("name", "cpu", "processes"), [("cpu-2-fsdp", True, 2), ("gpu-8", False, 8)])
def test_one_node_shards_over_all_its_processes(name, cpu, processes):
    arguments = launched(name)
    assert (arguments.use_cpu, arguments.num_processes, arguments.num_machines) == (cpu, processes, 1)
    assert load_config_from_file(str(FOLDER / f"{name}.yaml")).distributed_type == DistributedType.FSDP
    assert not arguments.use_parallelism_config
    assert launched(name, "--num_processes", "4").num_processes == 4
