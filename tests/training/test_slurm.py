"""training/configs/slurm/train.sbatch, run with executables that stand for SLURM's and Accelerate's."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training" / "configs" / "slurm" / "train.sbatch"

FAKES = {
    # Runs its command once per node, and ends when all have ended, with the code of one that failed.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
        code=0
        for task in "${tasks[@]}"; do wait "$task" || code=$?; done
        exit $code
    """,
    "scontrol": """
        echo "scontrol $*" >> "$CALLS"
        [[ $1 == show ]] && printf '%s\\n' node7 node8
        exit 0
    """,
    # A launcher that behaves as $BEHAVIOUR says; one that is told to end waits for its checkpoint and exits with 1.
    "accelerate": """
        echo "$*" > "$CALLS.accelerate.$SLURM_NODEID"
        echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$CALLS.timeout"
        case $BEHAVIOUR in
            done) touch "$OUTPUT/summary.json"; exit 0 ;;
            fails) exit 4 ;;
        esac
        save() {
            sleep 0.2
            [[ $BEHAVIOUR == saves ]] && mkdir -p "$OUTPUT/checkpoints/step-00000020"
            [[ $BEHAVIOUR == finishes ]] && touch "$OUTPUT/summary.json"
            exit 1
        }
        trap save TERM
        touch "$CALLS.running.$SLURM_NODEID"
        echo $$ > "$CALLS.pid.$SLURM_NODEID"
        for ((tick = 0; tick < 400; tick++)); do sleep 0.05; done
    """,
    "scancel": """
        echo "scancel $*" >> "$CALLS"
        kill -TERM $(cat "$CALLS".pid.*)
    """,
}


class Job:
    """One run of the script; `calls` are those of scontrol and scancel."""

    def __init__(self, folder: Path, behaviour: str, nodes: int = 2, words: tuple[str, ...] | None = None):
        self.calls_file, self.output = folder / "calls", folder / "run"
        (self.output / "checkpoints" / "step-00000010").mkdir(parents=True)
        executables = folder / "bin"
        executables.mkdir()
        for name, text in FAKES.items():
            (executables / name).write_text("#!/bin/bash\n" + text, encoding="utf-8")
            (executables / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{executables}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "OUTPUT": str(self.output),
            "BEHAVIOUR": behaviour,
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "node[7-8]",
        }
        self.nodes = nodes
        words = words or ("training/configs/chameleon-7b.yaml", f"train.output_dir={self.output}")
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def reach_time_limit(self) -> None:
        deadline = time.monotonic() + 20
        while not all(Path(f"{self.calls_file}.pid.{node}").exists() for node in range(self.nodes)):
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, str]:
        output, errors = self.process.communicate(timeout=20)
        return self.process.returncode, output + errors

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text(encoding="utf-8").splitlines() if self.calls_file.exists() else []

    def launched(self, node: int) -> list[str]:
        return Path(f"{self.calls_file}.accelerate.{node}").read_text(encoding="utf-8").split()


def test_syntax():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("node", [0, 1])
def test_one_launcher_per_node_with_its_rank_and_the_first_nodes_address(tmp_path, node):
    job = Job(tmp_path, "done")
    assert job.end()[0] == 0
    command, *words = job.launched(node)
    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    assert command == "launch" and arguments.training_script == "training/train.py"
    assert arguments.training_script_args == [
        "training/configs/chameleon-7b.yaml",
        f"train.output_dir={job.output}",
        "train.resume=auto",
        "train.processes=16",
    ]
    assert arguments.machine_rank == node
    with patch_environment(omp_num_threads="1"):
        environment = prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.rdzv_backend) == ("2", "8", "c10d")
    assert arguments.rdzv_endpoint == f"node7:{20000 + 1234567 % 20000}"
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2"
    assert environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"
    assert Path(f"{job.calls_file}.timeout").read_text(encoding="utf-8") == "100\n"


def test_one_node_needs_no_rendezvous(tmp_path):
    job = Job(tmp_path, "done", nodes=1)
    assert job.end()[0] == 0
    arguments = _validate_launch_command(launch_command_parser().parse_args(job.launched(0)[1:]))[0]
    assert (arguments.num_machines, arguments.num_processes, arguments.main_process_ip) == (1, 8, None)
    assert arguments.use_fsdp and not arguments.use_parallelism_config


def test_the_time_limit_ends_every_launcher_and_queues_the_job_again(tmp_path):
    job = Job(tmp_path, "saves")
    job.reach_time_limit()
    code, output = job.end()
    assert code == 0 and "queueing again" in output
    assert job.calls == [
        "scontrol show hostnames node[7-8]",
        "scancel --signal=TERM 1234567",
        "scontrol requeue 1234567",
    ]
    # Only once the checkpoint was there.
    assert (job.output / "checkpoints" / "step-00000020").exists()


def test_a_run_that_finished_at_the_time_limit_is_not_queued_again(tmp_path):
    job = Job(tmp_path, "finishes")
    job.reach_time_limit()
    code, _ = job.end()
    assert code != 0 and "scontrol requeue 1234567" not in job.calls


def test_a_run_without_progress_is_not_queued_again(tmp_path):
    job = Job(tmp_path, "hangs")
    job.reach_time_limit()
    code, output = job.end()
    assert code == 1 and "no checkpoint was written" in output and "scontrol requeue 1234567" not in job.calls


def test_a_run_that_failed_keeps_its_exit_code_and_is_not_queued_again(tmp_path):
    job = Job(tmp_path, "fails")
    code, _ = job.end()
    assert code == 4 and job.calls == ["scontrol show hostnames node[7-8]"]


def test_a_run_needs_a_folder_to_be_found_again(tmp_path):
    code, output = Job(tmp_path, "done", words=("training/configs/chameleon-7b.yaml",)).end()
    assert code == 2 and "train.output_dir" in output
