"""Every command of the page about checkpoints, as it stands there, one after another in one folder."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
# What stands before a block that needs more than an installation.
HUB, QUANTIZATION = "<!-- needs the Hub -->", "<!-- needs .[quantization] -->"
# The two recipes' folders, which the page takes as given, after a few steps.
RECIPES = (
    "accelerate launch --cpu training/train.py train.steps=2 optimizer.warmup_steps=1 samples.enabled=false "
    "evaluation.every=0 train.output_dir=runs/emoji",
    "accelerate launch --cpu training/train.py training/configs/transfusion-emoji.yaml train.steps=2 "
    "optimizer.warmup_steps=1 samples.enabled=false evaluation.every=0 data.sources.0.limit=32 "
    "data.validation_sources.0.limit=8 train.output_dir=runs/transfusion-emoji",
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the page's blocks that can be run here."""
    found = re.findall(
        r"(<!-- needs [^\n]* -->\n)?```(bash|python)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    )
    lacking = {HUB}
    if importlib.util.find_spec("torchao") is None or importlib.util.find_spec("bitsandbytes") is None:
        lacking.add(QUANTIZATION)
    return [(language, text) for needs, language, text in found if needs.strip() not in lacking]


@pytest.mark.slow
def test_the_pages_commands_run_as_they_are_written(tmp_path):
    for name in ("training", "modeling_mot", "conversion", "model_cards", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "MOT_CACHE": str(tmp_path / "cache"),
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    page = blocks(ROOT / "conversion" / "README.md")
    assert len(page) > 12
    for language, text in [*(("bash", command) for command in RECIPES), *page]:
        words = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{text}\n{done.stderr[-3000:]}"
