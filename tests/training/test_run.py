"""Whole runs of training/train.py in processes of their own, on the carried data and processor."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

from training.run_files.metrics import read_metrics


ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "training" / "configs" / "smoke.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder outside of the project, with the data's cache in it."""
    return tmp_path_factory.mktemp("runs")


def train(place, *words, config=SMOKE, popen=False):
    script = str(ROOT / "training" / "train.py")
    command = [sys.executable, script, config, "train.cpu=true", "train.cpu_threads=1", *words]
    environment = os.environ | {"MOT_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    if popen:
        return subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=180)


def train_here(place, *words, config=SMOKE) -> int:
    """The same in this process, which saves the imports."""
    from training.train import main

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOT_CACHE", str(place / "cache"))
        patch.chdir(place)
        return main([config, "train.cpu=true", "train.cpu_threads=1", *words])


@pytest.fixture(scope="module")
def finished(place):
    """(folder, what was printed) of a finished run."""
    done = train(place, "train.output_dir=whole")
    assert done.returncode == 0, done.stderr
    return place / "whole", done.stderr


def test_a_run_leaves_the_promised_files(finished):
    folder, _ = finished
    expected = {
        "config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "final", "samples", "samples.html",
        "samples.png", "losses.png", "summary.json",
    }  # fmt: skip
    assert {entry.name for entry in folder.iterdir()} == expected
    kinds = {path.suffix for path in (folder / "samples").iterdir()}
    assert kinds == {".png", ".wav", ".tsv", ".txt"}


def test_the_card_of_the_final_folder_has_the_runs_figures_pictures_and_licence(finished):
    folder, _ = finished
    text = (folder / "final" / "README.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert f"| text | {summary['training']['loss_text']:.4g} | {summary['held_out']['eval/loss_text']:.4g} |" in text
    for picture in ("samples.png", "losses.png"):
        assert f"({picture})" in text and (folder / "final" / picture).read_bytes() == (folder / picture).read_bytes()
    assert "license_name: by-part" in text and "WordNet 3.1, Copyright 2011" in text


def test_metrics_rows_have_the_promised_keys(finished):
    training, evaluation = read_metrics(finished[0] / "metrics.jsonl")
    names = ("text", "image", "speech")
    promised = {"step", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "step_seconds", "data_seconds"}
    promised |= {f"loss_{name}" for name in names} | {f"tokens_{name}" for name in names}
    assert [row["step"] for row in training] == [1, 2, 3, 4] and promised <= set(training[0])
    assert [row["step"] for row in evaluation] == [2, 4]
    directions = {"text-to-image", "image-to-text", "text-to-speech", "speech-to-text", "text"}
    assert {f"eval/{name}/loss" for name in directions} | {f"eval/loss_{name}" for name in names} <= set(evaluation[0])


def test_the_resolved_configuration_repeats_the_run(finished, place):
    folder, _ = finished
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["optimizer"]["betas"] == [0.9, 0.95] and resolved["train"]["output_dir"] == "whole"
    assert train_here(place, "train.output_dir=again", "samples.enabled=false", config=str(folder / "config.yaml")) == 0
    losses = [[row["loss"] for row in read_metrics(place / name / "metrics.jsonl")[0]] for name in ("whole", "again")]
    assert losses[0] == losses[1]


def test_the_environment_is_written_without_environment_variables(finished):
    facts = json.loads((finished[0] / "manifest.json").read_text())
    assert facts["versions"]["torch"] and facts["peak_flops"] > 0 and len(facts["data_fingerprint"]) == 64
    assert "MOT_CACHE" not in json.dumps(facts)


def test_the_measures_are_printed(finished):
    folder, printed = finished
    assert "nearest of 64 pictures is the named one" in printed and "letter by letter" in printed
    assert "expert choice" not in printed
    evaluation = read_metrics(folder / "metrics.jsonl")[1]
    assert f"step 2: held out text {evaluation[0]['eval/loss_text']:#.3g} image" in printed
    samples = json.loads((folder / "summary.json").read_text())["samples"]
    assert samples["drawn"] == 6 and 0 <= samples["drawn_right"] <= samples["reconstructed_right"] <= 1


def test_the_final_folder_loads_and_generates_in_a_process_that_does_not_know_us(finished, place):
    program = """
import sys
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(documents=[[{"type": "text", "text": "rocket"}]], continue_with="image", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=65, do_sample=False)
print([segment["type"] for segment in processor.decode_document(ids[0])])
assert "training" not in sys.modules and "/modeling_mot/" not in sys.modules[type(model).__module__].__file__
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", program, str(finished[0] / "final")]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['text', 'image']"


def test_a_second_run_into_the_same_folder_is_refused_and_changes_nothing(finished, place, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train_here(place, "train.output_dir=whole") == 2
    assert "train.resume=auto" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_resuming_a_finished_run_repeats_its_end(finished, place, capsys):
    folder, _ = finished
    assert train_here(place, "train.output_dir=whole", "train.resume=true", "samples.enabled=false") == 0
    assert "going on from step 4" in capsys.readouterr().err
    assert len(read_metrics(folder / "metrics.jsonl")[0]) == 4


def test_a_signal_ends_the_run_with_a_usable_checkpoint(place, capsys):
    number, folder = signal.SIGTERM, place / "signal"
    endless = ("train.steps=100000", "train.save_every=0", "evaluation.every=0")
    process = train(place, f"train.output_dir={folder.name}", *endless, popen=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    last = read_metrics(folder / "metrics.jsonl")[0][-1]["step"]
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["latest", f"step-{last:08d}"]
    longer = ("train.resume=auto", f"train.steps={last + 2}", "samples.enabled=false")
    assert train_here(place, f"train.output_dir={folder.name}", *longer) == 2
    assert f"train.steps was 100000, is {last + 2}" in capsys.readouterr().err
    more = (*longer, "train.resume_despite=[train.steps]")
    assert train_here(place, f"train.output_dir={folder.name}", *more) == 0
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")[0]] == list(range(1, last + 3))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.variant=mop"], "did you mean mot"),
        (["model.preset=chameleon-38m"], "model.preset='chameleon-38m'"),
        (["model.processor=/nowhere"], "model.processor"),
        (["model.num_attention_heads=5"], "num_attention_heads"),
        (["model.max_position_embeddings=64"], "data.row_length=256"),
        (["data.row_length=32"], "row_length=32"),
        (["data.sources.0.path=/nowhere"], "/nowhere"),
        (["data.sources.0.config=emojis"], "emoji"),
        (["train.modality_weights={video: 1}"], "video"),
        (["train.output_dir=/proc/nowhere"], "train.output_dir"),
        (["train.steps=0"], "steps=0"),
        (["model.init_from=/nowhere"], "/nowhere"),
        (["model.init_from=/etc"], "/etc"),
        (["model.init_from=/dev/null"], "/dev/null"),
        (["model.processor=/etc"], "model.processor"),
        (["data.cache_dir=/dev/null"], "data.cache_dir=/dev/null"),
        (["train.seed=-1"], "train.seed=-1"),
        (["train.timeout_seconds=.inf"], "train.timeout_seconds=inf"),
        ([f"train.cpu_threads={10**30}"], "train.cpu_threads"),
        (["train.tracker=nosuch"], "train.tracker='nosuch'"),
        (["train.tracker=tensorbord"], "did you mean tensorboard"),
        (["train.modality_weights={text: .nan}"], "train.modality_weights.text=nan"),
        (["train.modality_weights={text: 0, image: 0, speech: 0}"], "nothing to learn"),
        (["model.hidden_size=65536", "model.num_hidden_layers=1000"], "GB of a process that has"),
        (["train.rows=1000000000"], "train.rows"),
        (["model.attn_implementation=nosuch"], "model.attn_implementation"),
        (["model.modalities=[image]"], "model.modalities"),
        (["model.modalities=[text, video]"], "model.modalities"),
    ],
)
def test_what_cannot_be_is_refused_at_once_and_by_name(place, words, named, capsys):
    folder = place / "refused"
    assert train_here(place, f"train.output_dir={folder}", *words) == 2
    printed = capsys.readouterr().err
    assert named in printed and "Traceback" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("error: ")]) == 1
    assert not folder.exists()


def test_a_run_takes_the_settings_of_the_machine_that_its_recipe_names(place, monkeypatch):
    set_to, kept = [], []
    monkeypatch.setattr("torch.set_float32_matmul_precision", set_to.append)
    monkeypatch.setattr("training.run.keep_freed_memory", lambda: kept.append(True))
    products = []
    monkeypatch.setattr("modeling_mot.MoTForCausalLM.set_tower_products", lambda self, word: products.append(word))
    words = ["train.steps=1", "optimizer.warmup_steps=1", "samples.enabled=false", "evaluation.every=0"]
    assert train_here(place, *words, "train.output_dir=plain") == 0
    assert (set_to, kept, set(products)) == (["highest"], [True], {"separate"})
    words += ["train.float32_matmul_precision=medium", "train.keep_freed_memory=false"]
    assert train_here(place, *words, "model.tower_products=batched_mm", "train.output_dir=set") == 0
    assert (set_to[1:], kept, products[-1]) == (["medium"], [True], "batched_mm")
