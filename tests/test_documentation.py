"""Every code block of the pages runs as it stands there, in the order of the pages, in one folder.

A comment of HTML before a block says what the block needs, and readers do not see the comment:

- `<!-- file: NAME -->`: the block is the contents of a file.
- `<!-- shortened: ARGUMENTS -->`: a training run of many minutes gets these arguments too, unless `MOT_WHOLE_RUNS=1`.
- `<!-- needs .[EXTRA] -->`: the block runs where the extra's packages are installed.
- `<!-- pushed: FOLDER -->`: a server in the place of the Hub has the folder under the name and commit that the block
  loads.
- `<!-- train-command -->`, `<!-- test-command -->`: README's two commands. CI calls the second, so it is left out here.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conversion.hub_server import LARGE, Blob, HubServer, Repository


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("training", "modeling_mot", "conversion", "model_cards", "tests")
# A page, and the folder that its blocks run in. The cards stand in the folder of the model that they describe.
PAGES = {
    "README.md": ".",
    "training/README.md": ".",
    "training/evaluation/README.md": ".",
    "conversion/README.md": ".",
    "training/benchmark/README.md": ".",
    "training/data/carried/README.md": ".",
    "model_cards/emoji/README.md": "runs/emoji/final",
    "model_cards/transfusion-emoji/README.md": "runs/transfusion-emoji/final",
}
EXTRAS = {
    ".[evaluation]": ("evaluate", "jiwer", "pycocoevalcap", "torchmetrics"),
    ".[quantization]": ("torchao", "bitsandbytes"),
    ".[tests]": ("peft",),
}
BLOCK = re.compile(r"((?:<!-- [^\n]* -->\n)*)```(\w+)\n(.*?)```", re.DOTALL)


class Block(NamedTuple):
    where: str  # page and line
    language: str
    text: str
    notes: dict[str, str]


def blocks_of(page: str) -> list[Block]:
    text, found = (ROOT / page).read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        notes = dict(re.findall(r"<!-- ([\w-]+):? ?([^\n]*?) ?-->", match[1]))
        where = f"{page}, line {text[: match.start(2)].count(chr(10)) + 1}"
        found.append(Block(where, match[2], match[3], notes))
    return found


def can_run(block: Block) -> bool:
    packages = EXTRAS[block.notes["needs"]] if "needs" in block.notes else ()
    return "test-command" not in block.notes and all(map(importlib.util.find_spec, packages))


def command_of(block: Block) -> list[str]:
    if block.language == "python":
        return [sys.executable, "-c", block.text]
    # The package is installed already, where the tests run.
    lines = block.text.replace("pip install -e . && ", "").rstrip().split("\n")
    if "shortened" in block.notes and not os.environ.get("MOT_WHOLE_RUNS"):
        last = max(number for number, line in enumerate(lines) if "training/train.py" in line)
        while lines[last].endswith("\\"):
            last += 1
        lines[last] += " " + block.notes["shortened"]
    return ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]


def publish(hub: HubServer, folder: Path, text: str) -> None:
    """What `conversion.push` of a folder leaves on the Hub, under the name and commit that a block has."""
    name, commit = re.search(r'"([\w-]+/[\w-]+)", "([0-9a-f]{40})"', text).groups()
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    blobs = {path: Blob(file.read_bytes(), path.endswith(LARGE)) for path, file in files.items()}
    hub.large |= {blob.sha256: blob.content for blob in blobs.values() if blob.is_large}
    hub.repositories["models", name] = Repository(commits={commit: blobs}, branches={"main": commit})


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_runs(page):
    for block in blocks_of(page):
        assert block.language in ("bash", "python") or "file" in block.notes or block.language in ("bibtex", "yaml")
        assert set(block.notes) <= {"file", "pushed", "shortened", "needs", "train-command", "test-command"}, (
            block.where
        )
        if block.language == "python":
            compile(block.text, block.where, "exec")


@pytest.mark.slow
def test_the_pages_blocks_run_as_they_are_written(tmp_path):
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)
    with HubServer() as hub:
        environment = os.environ | hub.environment(tmp_path / "hub", "ada")
        environment |= {"PYTHONPATH": str(tmp_path), "MOT_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        for page, folder in PAGES.items():
            for block in filter(can_run, blocks_of(page)):
                if "pushed" in block.notes:
                    publish(hub, tmp_path / block.notes["pushed"], block.text)
                if "file" in block.notes:
                    (tmp_path / folder / block.notes["file"]).write_text(block.text, encoding="utf-8")
                elif block.language in ("bash", "python"):
                    done = subprocess.run(
                        command_of(block),
                        cwd=tmp_path / folder,
                        env=environment,
                        capture_output=True,
                        text=True,
                        timeout=7200,
                    )
                    assert done.returncode == 0, f"{block.where}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
