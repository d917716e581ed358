"""Cosmos 3 in both of its layouts against diffusers' transformer and transformers' reasoner, and back again."""

import json
import shutil

import pytest
import torch
from diffusers import Cosmos3OmniTransformer
from transformers import AutoModel

from conversion import export_cosmos3
from conversion.import_cosmos3 import NOT_RUN, main
from modeling_mot import MoTTransfusionModel

from .cosmos3_sources import (
    BOI,
    EDGE,
    EOI,
    EOS,
    FAMILY,
    NANO,
    PATCH,
    TINY,
    TOKEN_IDS,
    convert,
    cosmos3_model,
    pipeline_of,
    reasoner_logits,
    save_pipeline,
    save_training,
    tensors_of,
    their_velocity,
)


TEXT = [7, 8, 9, 20, 31, EOS, BOI]


@pytest.fixture(scope="module", params=FAMILY)
def family(request, tmp_path_factory):
    """(diffusers' model, its folder, ours) of Nano and of Edge."""
    model = cosmos3_model(**FAMILY[request.param])
    folder = save_pipeline(model, tmp_path_factory.mktemp(request.param) / "source")
    made = convert(folder, folder.parent / "made")
    return model, folder, MoTTransfusionModel.from_pretrained(made).eval()


def our_velocity(model, text, latents, time, clean=(), rate=None):
    """The same forward as `their_velocity`: (C, f, h, w) -> (C, f, h, w)"""
    frames = latents.transpose(0, 1)
    count = len(frames) * model.config.image_length(*frames.shape[2:])
    is_clean = torch.tensor([frame in clean for frame in range(len(frames))])
    with torch.no_grad():
        output = model(
            torch.tensor([[*text, *[model.config.image_token_id] * count]]),
            latents=frames,
            noise=frames,  # so that the noised latents are these
            timesteps=torch.full((len(frames),), time),
            clean_images=is_clean,
            frames_per_second=rate,
        )
    return output.prediction.transpose(0, 1)


def assert_close(made, expected):
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------- forwards


@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 6), (1, 5, 3), (3, 4, 4)])
def test_velocity_equals_diffusers(family, attention, frames, height, width):
    theirs, _, ours = family
    ours.set_attn_implementation(attention)
    latents = torch.randn(3, frames, height, width)
    expected = their_velocity(theirs, TEXT, latents, 700.0)
    assert expected.std() > 0.1
    assert_close(our_velocity(ours, TEXT, latents, 700.0), expected)


@pytest.mark.parametrize("clean", [(0,), (0, 1), (2,)])
@pytest.mark.parametrize("rate", [24.0, 16.0, 30.0])
def test_frames_without_noise_are_not_told_the_time(family, clean, rate):
    theirs, _, ours = family
    latents = torch.randn(3, 3, 4, 4)
    expected = their_velocity(theirs, TEXT, latents, 300.0, clean, rate)
    made = our_velocity(ours, TEXT, latents, 300.0, clean, rate)
    noisy = [frame for frame in range(3) if frame not in clean]
    assert_close(made[:, noisy], expected[:, noisy])


def test_text_logits_equal_transformers_reasoner(family):
    theirs, _, ours = family
    ids = torch.tensor([TEXT, [11, *TEXT[:-1]]])
    with torch.no_grad():
        assert_close(ours(ids).logits, reasoner_logits(theirs, ids))


def test_text_does_not_see_pictures(family):
    _, _, ours = family
    ids = torch.tensor([[*TEXT, *[PATCH] * 4, EOI, 9, 10]])
    with torch.no_grad():
        one, other = (ours(ids, latents=torch.randn(1, 3, 4, 4)).logits for _ in range(2))
        alone = ours(ids[:, : len(TEXT)]).logits
    is_text = ids[0] != PATCH
    assert torch.equal(one[:, is_text], other[:, is_text])
    assert_close(one[:, : len(TEXT)], alone)


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize(
    ("native", "settings"), [(False, {"flow_shift": 5.0}), (True, {"flow_shift": 3.0, "solver_order": 3})]
)
@pytest.mark.parametrize("guidance_scale", [6.0, 1.0])
def test_pictures_equal_the_pipeline_of_diffusers(tmp_path, kind, native, settings, guidance_scale):
    theirs = cosmos3_model(**FAMILY[kind])
    pipeline = pipeline_of(theirs, tmp_path / "source", native, **settings)
    ours = MoTTransfusionModel.from_pretrained(convert(tmp_path / "source", tmp_path / "made"))
    height, width = 5, 6  # latents of 8 pixels; patches are 2 x 2
    noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(5))
    prompts = {"prompt": "a red ball", "negative_prompt": "blurred"}
    sizes = {"num_frames": 1, "height": 8 * height, "width": 8 * width}
    drawing = {"num_inference_steps": 6, "guidance_scale": guidance_scale}
    expected = pipeline(**prompts, **sizes, **drawing, latents=noise[:, :, None], output_type="latent").video
    ids, negative = pipeline.tokenize_prompt(**prompts, **sizes)
    output = ours.generate(
        torch.tensor([ids]), negative_prompt_ids=torch.tensor([negative]), image_size=[height, width],
        generation_mode="image", generator=[torch.Generator().manual_seed(5)], **drawing,
    )  # fmt: skip
    assert expected.std() > 0.5
    assert_close(output.latents[0][0], expected[0, :, 0])


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("given", [0, 1])
def test_videos_equal_the_pipeline_of_diffusers(tmp_path, kind, given):
    theirs = cosmos3_model(**FAMILY[kind])
    pipeline = pipeline_of(theirs, tmp_path / "source", flow_shift=5.0)
    ours = MoTTransfusionModel.from_pretrained(convert(tmp_path / "source", tmp_path / "made"))
    frames, height, width = 3, 5, 6
    latents = torch.randn(1, 3, frames, height, width, generator=torch.Generator().manual_seed(5))
    first = torch.randn(1, 3, given, height, width)
    latents[:, :, :given] = first
    prompts = {"prompt": "a red ball", "negative_prompt": "blurred"}
    sizes = {"num_frames": 4 * (frames - 1) + 1, "height": 8 * height, "width": 8 * width, "fps": 16.0}
    drawing = {"num_inference_steps": 5, "guidance_scale": 6.0}
    picture = torch.zeros(3, 8 * height, 8 * width) if given else None  # it marks the first frame as given
    expected = pipeline(
        **prompts, **sizes, **drawing, image=picture, latents=latents.clone(), output_type="latent"
    ).video[0]  # fmt: skip
    ids, negative = pipeline.tokenize_prompt(**prompts, **sizes)
    output = ours.generate(
        torch.tensor([ids]), negative_prompt_ids=torch.tensor([negative]), image_size=[height, width],
        num_frames=frames, frames_per_second=16.0, first_frames=first if given else None,
        generation_mode="image", generator=[torch.Generator().manual_seed(5)], **drawing,
    )  # fmt: skip
    assert output.sequences[0].tolist().count(PATCH) == frames * 9
    assert_close(output.latents[0][0], expected)
    assert given == 0 or torch.allclose(output.latents[0][0][:, 0], first[0, :, 0], atol=1e-5)


def test_served_videos_and_the_text_behind_them(family):
    _, _, ours = family
    requests = [
        {"input_ids": TEXT, "num_frames": 3, "frames_per_second": 16.0, "image_size": [4, 4]},
        {"input_ids": TEXT[2:], "num_frames": 3, "frames_per_second": 16.0, "image_size": [4, 4]},
        {"input_ids": TEXT[1:], "num_frames": 3, "frames_per_second": 30.0, "image_size": [4, 4]},
        {"input_ids": TEXT, "image_size": [4, 4]},
    ]
    settings = {
        "num_inference_steps": 3,
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": [],
        "pad_token_id": 0,
    }
    made = ours.generate_batch(
        [request | settings | {"generator": torch.Generator().manual_seed(7)} for request in requests]
    )
    for request, result in zip(requests, made.values(), strict=True):
        ids, request = torch.tensor([request["input_ids"]]), request | settings
        del request["input_ids"]
        alone = ours.generate(ids, generator=torch.Generator().manual_seed(7), **request)
        assert result.error is None and torch.equal(result.output.sequences, alone.sequences)
        assert_close(result.output.latents[0][0], alone.latents[0][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames_per_second": 24.0}, "are of videos: give num_frames too"),
        ({"num_frames": 2, "guidance_renorm": "global"}, "with guidance_renorm='none'"),
        ({"num_frames": 2, "first_frames": torch.zeros(1, 3, 2, 4, 4)}, "with fewer frames than num_frames=2"),
        ({"num_frames": 3, "first_frames": torch.zeros(2, 3, 2, 4, 4)}, "first_frames has 2 rows for 1 sequences"),
        ({"num_frames": 0}, "num_frames=0"),
    ],
)
def test_videos_that_cannot_be_drawn_are_refused(family, arguments, message):
    _, _, ours = family
    with pytest.raises(ValueError, match=message):
        ours.generate(torch.tensor([TEXT]), image_size=[4, 4], generation_mode="image", **arguments)


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("save", [save_pipeline, save_training])
@pytest.mark.parametrize("fields", [NANO, EDGE, TINY], ids=["nano", "edge", "without sound"])
def test_export_gives_the_same_tensors_back(tmp_path, save, fields):
    model = cosmos3_model(**fields)
    source = save(model, tmp_path / "source")
    made = convert(source, tmp_path / "made", "--max-shard-size", "60KB")
    assert (made / NOT_RUN).is_file() == ("sound_dim" in fields)
    out = tmp_path / "out"
    assert export_cosmos3.main([str(made), str(out)]) == 0
    weights = source / "transformer" if save is save_pipeline else source
    before, after = tensors_of(weights), tensors_of(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    stored = json.loads((out / "config.json").read_text())
    assert {name: stored[name] for name in fields} == fields

    # Diffusers loads it, whatever layout it came from.
    assert export_cosmos3.main([str(made), str(tmp_path / "diffusers"), "--layout", "diffusers"]) == 0
    loaded = Cosmos3OmniTransformer.from_pretrained(tmp_path / "diffusers").eval()
    latents = torch.randn(3, 1, 4, 4)
    assert torch.equal(their_velocity(loaded, TEXT, latents, 500.0), their_velocity(model, TEXT, latents, 500.0))


def test_auto_model_draws(family, tmp_path):
    _, folder, _ = family
    made = convert(folder, tmp_path / "made", "--dtype", "bfloat16")
    model = AutoModel.from_pretrained(made, dtype="float32")
    assert type(model).__name__ == "MoTTransfusionModel" and model.config.num_parameters() == model.num_parameters()
    output = model.generate(
        torch.tensor([TEXT]), image_size=[4, 6], num_inference_steps=2, max_new_tokens=9, guidance_scale=6.0,
        negative_prompt_ids=torch.tensor([[7, EOS]]),
    )  # fmt: skip
    assert output.latents[0][0].shape == (3, 4, 6)


def test_dry_run_writes_nothing(family, tmp_path, capsys):
    _, folder, _ = family
    assert main([str(folder), str(tmp_path / "made"), *TOKEN_IDS, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "layers.{0..1}.self_attn.add_q_proj.weight [64, 48]" in told and "diffusers layout" in told
    assert not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(source, out, capsys, *options):
    assert main([str(source), str(out), *options]) == 2
    return capsys.readouterr().err


def test_other_models_are_refused(tmp_path, capsys):
    source = save_pipeline(cosmos3_model(**TINY), tmp_path / "source")
    assert "--token-ids eos=ID vision_start=ID" in refused(source, tmp_path / "out", capsys)
    path = source / "transformer" / "config.json"
    stored = json.loads(path.read_text())
    for changed, message in (
        ({"strange": 3}, "--ignore-fields strange"),
        ({"timestep_scale": 1.0}, "timestep_scale=1.0"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"patch_latent_dim": 48}, "patch_latent_dim=48"),
        ({"hidden_size": 64}, "where config.json says"),
        ({"num_hidden_layers": 3}, "only in the target: model.layers.2"),
    ):
        path.write_text(json.dumps(stored | changed))
        assert message in refused(source, tmp_path / "out", capsys, *TOKEN_IDS)
    assert "is not NAME=ID" in refused(source, tmp_path / "out", capsys, "--token-ids", "eos")


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path, capsys):
    source = save_pipeline(cosmos3_model(**TINY), tmp_path / "source")
    (source / "text_tokenizer").mkdir()
    (source / "text_tokenizer" / "tokenizer.json").write_text("{")
    message = refused(source, tmp_path / "out", capsys, *TOKEN_IDS)
    assert message.startswith(f"error: the tokenizer in {source / 'text_tokenizer'} cannot be loaded")


def test_what_is_not_run_goes_along_with_a_model_that_is_saved_anew(tmp_path):
    """As the documentation says: with the two files that hold it."""
    source = save_pipeline(cosmos3_model(**NANO), tmp_path / "source")
    made, anew = convert(source, tmp_path / "made"), tmp_path / "anew"
    MoTTransfusionModel.from_pretrained(made).save_pretrained(anew)
    for name in ("not_run.safetensors", "conversion.json"):
        shutil.copy(made / name, anew)
    assert export_cosmos3.main([str(anew), str(tmp_path / "out")]) == 0
    want, found = tensors_of(source / "transformer"), tensors_of(tmp_path / "out")
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)


def test_models_that_cosmos3_does_not_have_are_refused(family, tmp_path, capsys):
    _, _, ours = family
    changed = MoTTransfusionModel(type(ours.config).from_dict(ours.config.to_dict() | {"unseen_towers": None}))
    changed.save_pretrained(tmp_path / "made")
    assert export_cosmos3.main([str(tmp_path / "made"), str(tmp_path / "out")]) == 2
    assert "cannot express unseen_towers={}" in capsys.readouterr().err
