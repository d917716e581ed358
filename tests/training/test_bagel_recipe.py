"""The recipe that fine-tunes BAGEL, run on a tiny one from its conversion to its final folder."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file

from conversion.export_bagel import export_bagel
from conversion.import_bagel import import_bagel
from modeling_mot import MoTProcessor, MoTTransfusionModel
from tests.conversion.bagel_sources import CHECKPOINT, FIXTURES
from training.data.adapters import emoji_edits
from training.data.collate import collate
from training.data.documents import build_row
from training.data.preparing.batch_tokenizer import Preparing
from training.data.preparing.preparation import TokenizedSource
from training.data.reading.records import decode_picture, text_of
from training.data.reading.sources import open_source
from training.data.roles import compose_parts, parts_of
from training.plan import __main__ as plan
from training.run_files.metrics import read_metrics
from training.train import load_recipe, main


RECIPE = Path(__file__).resolve().parents[2] / "training" / "configs" / "bagel-finetune.yaml"
SHRUNK = [
    "data.row_length=224",
    *(f"data.{kind}.{place}.limit=4" for kind in ("sources", "validation_sources") for place in range(3)),
    "optimizer.warmup_steps=1",
    "optimizer.lr=1e-2",
    "optimizer.min_lr=1e-2",
    "train.steps=3",
    "train.lora.rank=4",
    "train.cpu=true",
    "train.cpu_threads=1",
    "train.progress_bar=false",
    "evaluation.rows=2",
    "evaluation.noise_levels=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the recipe's commands have been run: conversion, data, training."""
    place = tmp_path_factory.mktemp("bagel")
    source = shutil.copytree(CHECKPOINT, place / "source")
    shutil.copytree(FIXTURES / "tokenizer", source, dirs_exist_ok=True)
    import_bagel(str(source), place / "runs" / "bagel", dtype=torch.bfloat16)
    emoji_edits.main(["--out", str(place / "runs" / "emoji-edits"), "--limit", "3", "--edits", "mirror", "grey"])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOT_CACHE", str(place / "cache"))
        patch.chdir(place)
        assert main([str(RECIPE), *SHRUNK]) == 0
    return place


@pytest.fixture(scope="module")
def final(place):
    return place / "runs" / "bagel-finetune" / "final"


def test_it_learns_texts_and_pictures_and_measures_each_direction(place):
    steps, evaluations = read_metrics(place / "runs" / "bagel-finetune" / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(math.isfinite(step["loss"]) and step["loss_text"] and step["loss_image_diffusion"] for step in steps)
    figures = {name for name in evaluations[-1] if name.count("/") == 3 and name.endswith("/loss")}
    directions = ("draw/text-to-image", "edit/image+text-to-image", "describe/image+text-to-text")
    assert figures == {f"eval/{name}/loss" for name in directions}


def test_rows_are_what_the_processor_makes_of_documents(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MOT_CACHE", str(place / "cache"))
    recipe, processor = load_recipe([str(RECIPE), *SHRUNK]), MoTProcessor.from_pretrained("runs/bagel")
    for config in recipe.data.sources:
        (template,) = config.templates
        source = TokenizedSource.prepare(config, Preparing(processor, recipe.data.cache_path))
        for number, record in enumerate(open_source(config).each(lambda record: record)):
            if number == len(source):
                break
            document = [
                {"type": "text", "text": text_of(segment, record)}
                if segment.type == "text"
                else {"type": "image", "image": decode_picture(record[segment.column], recipe.data.limits)}
                for segment in template.parsed
            ]
            expected = processor(document, return_tensors="np")
            made = compose_parts(source, parts_of(template), number, 0)
            assert made.ids.tolist() == expected["input_ids"][0].tolist()
            assert source.vocabulary.modality_ids(made.ids).tolist() == expected["modality_ids"][0].tolist()
            assert [image["clean"] for image in made.images] == expected.get("clean_images", np.array([])).tolist()
            batch = collate([build_row([made], len(made), source.vocabulary)])
            for name in ("pixel_values", "encoder_pixel_values"):
                assert (name in batch) == (name in expected)
                assert name not in batch or np.array_equal(batch[name], expected[name])


def test_only_linear_layers_of_towers_and_the_patchifier_have_changed(place, final):
    before = {name: value.float() for name, value in load_file(place / "runs" / "bagel" / "model.safetensors").items()}
    after = {name: value.float() for name, value in load_file(final / "model.safetensors").items()}
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    adapted = {name for name in before if re.fullmatch(r"model\.layers\.\d+\..*_proj(\.\w+)?\.weight", name)}
    patchifier = {name for name in before if name.startswith("patchifier.")}
    assert changed <= adapted | patchifier and changed & patchifier
    towers = {word for name in changed & adapted for word in name.split(".")} & {"understanding", "generation"}
    assert len(towers) == 2


def test_the_adapters_alone_make_the_same_model_with_peft(place, final):
    base = MoTTransfusionModel.from_pretrained(place / "runs" / "bagel", dtype=torch.float32).eval()
    tuned = MoTTransfusionModel.from_pretrained(final, dtype=torch.float32).eval()
    base.patchifier.load_state_dict(tuned.patchifier.state_dict())  # which is trained without adapters
    processor = MoTProcessor.from_pretrained(final)
    batch = processor([{"type": "text", "text": "red heart"}], return_tensors="pt")
    ids = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        expected, untrained = tuned(**ids).logits, base(**ids).logits
        adapted = PeftModel.from_pretrained(base, final / "adapter")(**ids).logits
    assert not torch.allclose(untrained, expected, atol=0.05)
    # The final folder is in bfloat16, as the checkpoint that it began from.
    torch.testing.assert_close(adapted, expected, atol=0.05, rtol=0.02)


def test_what_was_trained_goes_back_into_the_originals_layout(place, final):
    export_bagel(str(final), place / "exported")
    before, after = (load_file(folder / "ema.safetensors") for folder in (place / "source", place / "exported"))
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}
    name = "language_model.model.embed_tokens.weight"
    assert torch.equal(after[name], before[name].bfloat16())


def test_the_plan_knows_what_is_frozen(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert plan.main([str(RECIPE), *SHRUNK[:-5], "--device", "H100", "--json", "plan.json"]) == 0
    figures = json.loads((place / "plan.json").read_text())
    assert figures["parameters"]["trained"] < 0.5 * figures["parameters"]["total"]
    assert "frozen weights" in figures["memory"]["parts"] and "frozen" in capsys.readouterr().out


# The sizes of the published BAGEL, whose autoencoder is left as small as the tiny one's.
PUBLISHED = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 32768,
    "latent_size": [128, 128], "latent_position_table_size": [64, 64],
}  # fmt: skip
ENCODER = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "table_size": [70, 70],
}  # fmt: skip


@pytest.mark.slow
def test_the_published_model_is_tuned_on_one_gpu_of_80_gb(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    shutil.copytree("runs/bagel", "runs/published")
    path = place / "runs" / "published" / "config.json"
    stored = json.loads(path.read_text())
    stored["encoders"]["vision"] |= ENCODER
    stored["continuous_modalities"]["vision"]["position_table_size"] = [70, 70]
    path.write_text(json.dumps(stored | PUBLISHED))
    words = ["model.init_from=runs/published", "train.precision=bf16", "--device", "H100", "--json", "published.json"]
    assert plan.main([str(RECIPE), *words]) == 0
    figures = json.loads((place / "published.json").read_text())
    adapters = figures["parameters"]["by_part"]["adapters"]
    inputs_and_outputs = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert adapters == dict.fromkeys(("understanding", "generation"), 32 * inputs_and_outputs * 28)
    assert figures["parameters"]["total"] - sum(adapters.values()) == pytest.approx(14.58e9, rel=1e-3)
    assert figures["memory"]["total"] < 80e9 and "fits" in capsys.readouterr().out
