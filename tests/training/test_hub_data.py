"""A data set pushed with `push_to_hub` is a source by its name: as it is, streamed, at a revision, and by shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conversion.hub_server import HubServer


ROOT = Path(__file__).parents[2]

PUSH = """
import io, sys
from datasets import Dataset, Image
from PIL import Image as Pillow

def picture(value):
    file = io.BytesIO()
    Pillow.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}

def pets(count):
    columns = {"caption": [f"pet {i}" for i in range(count)], "photo": [picture(i) for i in range(count)]}
    return Dataset.from_dict(columns).cast_column("photo", Image())

pets(4).push_to_hub("ada/pets", num_shards=2)
pets(2).push_to_hub("ada/pets", split="validation")
pets(5).push_to_hub("ada/pets", num_shards=2)
"""

READ = """
import json, sys
from training.data import SourceConfig, TemplateConfig
from training.data.reading.sources import open_source

templates = [TemplateConfig(["text:caption", "image:photo"])]
answer = {}
for name, fields in json.loads(sys.argv[1]).items():
    source = open_source(SourceConfig(name="pets", **({"path": "ada/pets", "templates": templates} | fields)))
    answer[name] = [[record["caption"], len(record["photo"]["bytes"])] for record in source]
print(json.dumps(answer))
"""


def run(code, hub, home, *arguments):
    environment = os.environ | hub.environment(home, "ada")
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


def test_what_was_pushed_is_read_back(hub, tmp_path):
    run(PUSH, hub, tmp_path / "writer")
    repository = hub.repositories["datasets", "ada/pets"]
    before = list(repository.commits)[-2]  # the last but one push
    ways = {
        "whole": {},
        "streamed": {"streaming": True},
        "shards": {"path": "hf://datasets/ada/pets/data/train-*.parquet"},
        "validation": {"split": "validation"},
        "pinned": {"revision": before},
    }
    found = json.loads(run(READ, hub, tmp_path / "reader", json.dumps(ways)).splitlines()[-1])
    assert {name: [caption for caption, _ in records] for name, records in found.items()} == {
        name: [f"pet {number}" for number in range(count)] for name, count in zip(ways, (5, 5, 5, 2, 4))
    }
    assert all(size > 50 for records in found.values() for _, size in records)
