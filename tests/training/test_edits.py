import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from training import train
from training.data.adapters import emoji_edits
from training.data.config import SourceConfig, TemplateConfig
from training.evaluation.edits import Edit, edit_figures, find_edits


TEMPLATE = ["image:source", "text:instruction", "image:target"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("edits") / "edits"
    emoji_edits.main(["--out", str(path), "--limit", "3", "--edits", "mirror", "upside-down", "grey"])
    return path


def source(folder, template=TEMPLATE, **fields):
    templates = [TemplateConfig(template, caption_first=None, targets="last")]
    return SourceConfig(name="edits", path=str(folder), templates=templates, **fields)


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_figures_tell_a_returned_source_from_an_answer():
    edits = [Edit(picture(seed), "change", picture(100 + seed)) for seed in range(4)]
    returned = edit_figures(edits, [edit.source for edit in edits])
    assert returned["nearer_to_target"] == 0 and returned["distance_ratio"] > 1e6
    answered = edit_figures(edits, [edit.target for edit in edits])
    assert answered == {"edited": 4, "nearer_to_target": 1.0, "distance_ratio": 0.0}
    half = edit_figures(edits, [edits[0].target, edits[1].target, edits[2].source, edits[3].source])
    assert half["nearer_to_target"] == 0.5


def test_edits_are_spread_over_the_records_of_a_source(folder):
    every = find_edits([source(folder)], 1000)
    some = find_edits([source(folder)], 3)
    assert len(every) >= 6 and len(some) == 3
    step = len(every) // 3
    for edit, expected in zip(some, every[::step], strict=False):
        assert edit.instruction == expected.instruction
        assert np.array_equal(np.asarray(edit.target), np.asarray(expected.target))
    assert find_edits([source(folder, ["text:name", "image:source"])], 3) == []


def test_an_editing_recipe_trains_and_shows_what_it_draws(folder, tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = AutoencoderKL(**blocks, block_out_channels=[8, 8, 8], norm_num_groups=4, mid_block_add_attention=False)
    vae.save_pretrained(tmp_path / "vae")
    data = {
        "name": "edits",
        "path": str(folder),
        "templates": [{"segments": TEMPLATE, "caption_first": None, "targets": "last", "caption_dropout": 0.5}],
    }
    model = {"vae": str(tmp_path / "vae"), "image_size": [32, 32], "unet_channels": [8, 8], "unet_norm_groups": 4}
    words = [
        f"model.transfusion={json.dumps(model)}",
        f"data.sources={json.dumps([data])}",
        f"data.validation_sources={json.dumps([data | {'split': 'validation'}])}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"train.output_dir={tmp_path / 'run'}",
        "data.row_length=192",
        "train.steps=2",
        "train.rows=1",
        "train.accumulation=1",
        "train.save_every=0",
        "train.progress_bar=false",
        "train.precision=float32",
        "train.cpu=true",
        "samples.edits=2",
        "samples.num_inference_steps=2",
        "evaluation.every=0",
    ]
    assert train.main([str(train.DEFAULT_CONFIG.with_name("smoke.yaml")), *words]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples"]["edited"] == summary["samples"]["held_out_edited"] == 2
    assert 0 <= summary["samples"]["nearer_to_target"] <= 1
    assert summary["held_out"]["eval/image+text-to-image/loss"] > 0
    page = (tmp_path / "run" / "samples.html").read_text()
    assert page.count("<figure>") == 4 and "Edits of others" in page
