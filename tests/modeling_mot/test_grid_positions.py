"""RoPE of three axes (time, row, column), as Qwen3-VL and Cosmos 3 have it."""

import pytest
import torch
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3VLTextRotaryEmbedding
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_text_tokens, get_3d_mrope_ids_vae_tokens
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from modeling_mot import ModalityRouting, MoTConfig
from modeling_mot.latent_grid import Grid, grid_positions
from modeling_mot.latent_images import ImagePlaces
from modeling_mot.modeling_mot import MoTRotaryEmbedding

from .naive_transfusion import BOI, BOS, EOI, PATCH, tiny_config
from .naive_transfusion import tiny_model as transfusion_model


SECTION = {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 5e6}
GRID = {"rope_parameters": SECTION, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("section", [[24, 20, 20], [22, 21, 21], [64, 0, 0]])
def test_angles_equal_qwen3_vl_and_cosmos3(section):
    rope = {"mrope_section": section, "mrope_interleaved": True, "rope_theta": 5e6, "rope_type": "default"}
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128}
    rotary = MoTRotaryEmbedding(MoTConfig(rope_parameters=dict(rope), **sizes))
    qwen = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(rope_parameters=dict(rope), **sizes))
    cosmos = Cosmos3VLTextRotaryEmbedding(128, 5e6, section)
    positions = torch.randint(0, 17000, (3, 2, 9)).float() + torch.tensor([0.25, 0, 0])[:, None, None]
    made = rotary(torch.zeros(1), positions)
    for mine, theirs in zip(made, qwen(torch.zeros(1), positions)):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(made, cosmos(positions, "cpu", torch.float32)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
@torch.no_grad()
def test_equal_axes_are_plain_positions(tiny_model, attention):
    model, ids = tiny_model(attn_implementation=attention, **GRID), torch.randint(7, 29, (2, 6))
    plain, mask = torch.arange(6).expand(2, -1), torch.ones_like(ids)
    expected = model(ids, attention_mask=mask, position_ids=plain).logits
    torch.testing.assert_close(model(ids, position_ids=plain.expand(3, -1, -1)).logits, expected)
    # No axis begins a document, and each axis counts.
    for axis in range(3):
        moved = plain.repeat(3, 1, 1)
        moved[axis, :, 3:] += 40
        other = model(ids, position_ids=moved).logits
        torch.testing.assert_close(other, model(ids, attention_mask=mask, position_ids=moved).logits)
        torch.testing.assert_close(other[:, :3], expected[:, :3])
        assert not torch.allclose(other[:, 3:], expected[:, 3:], atol=1e-4)


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"mrope_section": [4, 2, 2]}, "go together"),
        ({"mrope_interleaved": True}, "go together"),
        ({"mrope_section": [2, 3, 3], "mrope_interleaved": True}, "at most 3 of rows and 2 of columns"),
        ({"mrope_section": [4, 2, 1], "mrope_interleaved": True}, "must sum to half of head_dim=16"),
        ({"mrope_section": [8], "mrope_interleaved": True}, "must be a list of 3 values"),
        ({"mrope_section": [4, 2, 2], "mrope_interleaved": False}, "is not one of True"),
        ({"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_type": "linear", "factor": 2.0}, "rope_type"),
    ],
)
def test_sections_that_do_not_fit_are_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        MoTConfig(**(GRID | {"rope_parameters": rope}))


def test_positions_of_three_axes_need_a_rope_of_three(tiny_model):
    ids, positions = torch.randint(7, 29, (1, 5)), torch.zeros(3, 1, 5)
    with pytest.raises(ValueError, match=r"position_ids has shape \(3, 1, 5\)"):
        tiny_model()(ids, position_ids=positions)
    with pytest.raises(ValueError, match=r"position_ids has shape \(3, 1, 4\)"):
        tiny_model(**GRID)(ids, position_ids=positions[..., :4])
    with pytest.raises(ValueError, match=r"must be \(batch, length\)"):
        tiny_model(**GRID).generate(ids, position_ids=positions.long())


def test_sections_survive_saving(tmp_path):
    MoTConfig(**GRID).save_pretrained(tmp_path)
    assert MoTConfig.from_pretrained(tmp_path).rope_parameters == SECTION | {"rope_type": "default"}


# ------------------------------------------------------------------------------------------------- images and videos


IMAGE_GRID = {
    "rope_parameters": {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    "image_positions": "grid",
    "modality_margin": 15000,
    "base_frames_per_second": 24,
}


def run_of(frames, height, width):
    return [BOI, *[PATCH] * (frames * height * width // 4), EOI]


@pytest.mark.parametrize("rate", [None, 24.0, 16.0, 30.0])
def test_positions_equal_the_pipeline_of_cosmos3(rate):
    config = tiny_config(**IMAGE_GRID)
    text, frames, height, width = [BOS, 9, 10, 11, BOI], 5, 4, 6
    ids = torch.tensor([text + [PATCH] * (frames * 6)])
    places = ImagePlaces.find(config, ids, None, None)
    positions = grid_positions(config, places, [(height, width)] * frames, [frames], rate)
    of_text, offset = get_3d_mrope_ids_text_tokens(len(text), 0, use_float_positions=True)
    of_video, behind = get_3d_mrope_ids_vae_tokens(frames, 2, 3, offset + 15000, fps=rate, base_fps=24.0)
    assert torch.equal(positions[:, 0].float(), torch.cat([of_text, of_video.float()], dim=1))
    # Text goes on behind the last time.
    assert Grid.of(config, (height, width), frames, rate).advance == behind - offset


def test_positions_of_padded_and_packed_rows_equal_those_of_each_alone():
    config = tiny_config(**IMAGE_GRID)
    first, second = [BOS, 9, *run_of(3, 4, 4), 10], [BOS, *run_of(1, 4, 6), 11, 12, *run_of(1, 2, 2)]
    sizes = ([(4, 4)] * 3, [(4, 6), (2, 2)])

    def alone(tokens, sizes, frames):
        places = ImagePlaces.find(config, torch.tensor([tokens]), None, None)
        return grid_positions(config, places, sizes, frames)[:, 0]

    one, two = alone(first, sizes[0], [3]), alone(second, sizes[1], None)
    packed = torch.tensor([first + second])
    documents = torch.tensor([[0] * len(first) + [1] * len(second)])
    places = ImagePlaces.find(config, packed, documents, None)
    together = grid_positions(config, places, sizes[0] + sizes[1], [3, 1, 1])
    assert torch.equal(together[:, 0], torch.cat([one, two], dim=1))
    room = len(first) - len(second)
    padded = torch.tensor([first, [0] * room + second] if room > 0 else [[0] * -room + first, second])
    mask = (padded != 0).long()
    places = ImagePlaces.find(config, padded, None, mask)
    together = grid_positions(config, places, sizes[0] + sizes[1], [3, 1, 1])
    for row, expected in enumerate((one, two)):
        assert torch.equal(together[:, row, mask[row].bool()], expected)


def test_frames_of_a_video_see_each_other_and_rates_move_time():
    model = transfusion_model(**IMAGE_GRID, prediction_type="flow")
    ids = torch.tensor([[BOS, 9, *run_of(3, 4, 4)]])
    inputs = {
        "latents": torch.randn(3, 2, 4, 4),
        "noise": torch.randn(3, 2, 4, 4),
        "timesteps": torch.full((3,), 300.0),
    }
    expected = model(ids, **inputs).prediction
    later = inputs | {"latents": inputs["latents"] + torch.tensor([0.0, 0, 1]).view(3, 1, 1, 1)}
    assert not torch.allclose(model(ids, **later).prediction[0], expected[0], atol=1e-4)
    torch.testing.assert_close(model(ids, **inputs, frames_per_second=24).prediction, expected)
    assert not torch.allclose(model(ids, **inputs, frames_per_second=[12.0]).prediction, expected, atol=1e-4)
    with pytest.raises(ValueError, match="has 2 rates for 1 images and videos"):
        model(ids, **inputs, frames_per_second=[12.0, 24.0])
    with pytest.raises(ValueError, match="has 0; a rate is a positive number"):
        model(ids, **inputs, frames_per_second=0)
    with pytest.raises(ValueError, match="which whole images do not fill"):
        model(ids[:, :-2], **inputs)
    with pytest.raises(ValueError, match="1 of 4 images came without placeholders"):
        model(ids, latents=torch.randn(4, 2, 4, 4))


def test_a_batch_that_was_planned_ahead_equals_one_that_was_not():
    model = transfusion_model(**IMAGE_GRID, unseen_towers={"text": ["image"]}, prediction_type="flow").train()
    rows = [[BOS, 9, *run_of(1, 4, 4), 10, 11], [BOS, *run_of(1, 4, 6), 12]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    documents = torch.where(ids != 0, 0, -1)
    latents = torch.randn(2, 2, 4, 6)
    inputs = {"document_ids": documents, "labels": ids.masked_fill(ids == 0, -100), "latents": latents}
    inputs |= {"noise": torch.randn_like(latents), "timesteps": torch.tensor([300.0, 700.0])}
    inputs |= {"image_sizes": [[4, 4], [4, 6]]}
    modalities = model.model.modality_ids_of(ids)
    routing = ModalityRouting.from_modality_ids(modalities, model.config, multiple_of=16)
    one, other = model(ids, **inputs), model(ids, **inputs, modality_ids=modalities, routing=routing)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.prediction, other.prediction)


@pytest.mark.parametrize("blind", [{}, {"unseen_towers": {"text": ["image"]}}])
@torch.no_grad()
def test_a_picture_is_drawn_at_the_positions_of_a_forward(blind):
    model = transfusion_model(**IMAGE_GRID, **blind, prediction_type="flow")
    prompt = torch.tensor([[BOS, 9, *run_of(1, 4, 4), 10, 11, BOI], [0, 0, BOS, *run_of(1, 4, 4), 12, BOI]])
    clean, made = torch.randn(2, 2, 4, 4), []

    def keep(model, step, timestep, state):
        made.append(state["latents"].clone())

    output = model.generate(
        prompt, attention_mask=(prompt != 0).long(), latents=clean, max_new_tokens=9, num_inference_steps=1,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)], callback_on_step_end=keep,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    start = torch.cat([torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    drawn = torch.stack([of_row[0] for of_row in output.latents])
    for row, skip in ((0, 0), (1, 2)):
        ids = output.sequences[row : row + 1, skip:]
        # The velocity at t = 1 takes the noise to the picture in one step.
        pair = torch.stack([clean[row], start[row]])
        whole = model(
            ids[:, : prompt.shape[1] - skip + 4], latents=pair, noise=pair, timesteps=torch.tensor([0.0, 1000.0]),
            clean_images=torch.tensor([True, False]),
        )  # fmt: skip
        torch.testing.assert_close(drawn[row], start[row] - whole.prediction[1], rtol=1e-3, atol=1e-4)
        # The text behind it.
        pair = torch.stack([clean[row], drawn[row]])
        logits = model(ids, latents=pair, clean_images=torch.tensor([True, True])).logits[0, -2]
        logits[[BOI, EOI, PATCH]] = -torch.inf
        assert logits[ids[0, -1]] >= logits.max() - 1e-4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_positions": "grid"}, "needs rope_parameters with mrope_section"),
        (IMAGE_GRID | {"markers_in_image_block": True}, "markers_in_image_block=False"),
        (IMAGE_GRID | {"image_positions": "shared"}, "modality_margin=15000 and base_frames_per_second=24 are of"),
    ],
)
def test_grids_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
