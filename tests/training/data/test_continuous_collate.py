"""Batches with continuous images: values, sizes, noise that follows from the row alone, positions."""

import hashlib
from itertools import islice

import numpy as np
import pytest
import torch

from training.data import DataConfig, Preparing, RowStream, TokenizedSource, collate
from training.data.collate import count_noised
from training.data.documents import Vocabulary, build_row, compose

from .conftest import continuous, small_transfusion, small_vae


KEYS = {"input_ids", "modality_ids", "position_ids", "document_ids", "labels"}
PAIR = ("text:name", "image:picture")


@pytest.fixture(scope="module")
def processor():
    return continuous()


@pytest.fixture(scope="module")
def vae():
    return small_vae()


@pytest.fixture
def rows_of(pair_source, tmp_path, processor):
    """rows_of(vae=None, rows=6, **template fields) -> rows of the stream"""

    def make(vae=None, rows=6, clean_copies=False, **template):
        source = TokenizedSource.prepare(
            pair_source(PAIR, **template), Preparing(processor, tmp_path / "cache", vae=vae)
        )
        config = DataConfig(row_length=64, block_documents=40, clean_copies=clean_copies)
        return list(islice(RowStream(config, [source]).rows(), rows))

    return make


def images_of(rows):
    return [image for row in rows for image in row["images"]]


# -- values -----------------------------------------------------------------------------------------------------------


def test_pixels_are_scaled_and_latents_are_taken(rows_of, processor, vae):
    for chosen, name in ((None, "pixel_values"), (vae, "latents")):
        rows = rows_of(chosen, caption_first=0.5)
        batch = collate(rows, small_transfusion(processor))
        assert set(batch) == KEYS | {name, "clean_images", "image_first", "routing", "attention_plan"}
        assert batch[name].dtype == torch.float32
        for value, image in zip(batch[name], images_of(rows), strict=True):
            expected = image["values"].astype(np.float32)
            assert np.allclose(value, expected / 127.5 - 1 if chosen is None else expected)
        assert batch["clean_images"].tolist() == [image["clean"] for image in images_of(rows)]
        assert batch["image_first"].tolist() == [image["first"] for image in images_of(rows)]
        assert batch["image_first"].any() and not batch["image_first"].all()


def test_placeholders_of_a_batch_are_as_many_as_its_patches(rows_of, processor, vae):
    batch = collate(rows_of(vae))
    patches = len(batch["latents"]) * (4 // 2) ** 2
    assert (batch["input_ids"] == processor.image_token_id).sum() == patches


def test_a_batch_without_images_has_no_keys_for_them(text_source, tmp_path, processor):
    source = TokenizedSource.prepare(text_source(), Preparing(processor, tmp_path / "cache"))
    rows = list(islice(RowStream(DataConfig(row_length=64, block_documents=8), [source]).rows(), 2))
    batch = collate(rows, small_transfusion(processor), noise_seed=0, row_numbers=[0, 1])
    assert set(batch) == KEYS | {"routing", "attention_plan"} and count_noised(batch, small_transfusion(processor)) == 0


def made_up_row(processor, sizes, clean=(), dtype=np.uint8, channels=3, token=4):
    """A row of one document with an image of each size, in cells of `token` to a side."""
    vocabulary = Vocabulary.of(processor)
    random = np.random.default_rng(len(sizes))
    images = [(random.integers(1, 256, (channels, *size))).astype(dtype) for size in sizes]
    marks = [[processor.token_id("boi"), *[processor.image_token_id] * (h * w // token**2), processor.token_id("eoi")]
             for h, w in sizes]  # fmt: skip
    row = build_row([compose([np.array(span) for span in marks], images, vocabulary)], 64, vocabulary)
    for image, is_clean in zip(row["images"], clean, strict=False):
        image["clean"] = is_clean
    return row


def test_images_of_different_sizes_are_padded_with_zeros_and_measured(processor):
    sizes = [(8, 16), (16, 8), (8, 8)]
    rows = [made_up_row(processor, sizes[:2]), made_up_row(processor, sizes[2:])]
    for dtype, channels, name in ((np.uint8, 3, "pixel_values"), (np.float16, 4, "latents")):
        rows = [made_up_row(processor, part, dtype=dtype, channels=channels) for part in (sizes[:2], sizes[2:])]
        batch = collate(rows)
        assert batch["image_sizes"].tolist() == [list(size) for size in sizes]
        assert batch[name].shape == (3, channels, 16, 16)
        for value, image in zip(batch[name], images_of(rows), strict=True):
            height, width = image["values"].shape[1:]
            inside = image["values"].astype(np.float32)
            assert np.allclose(value[:, :height, :width], inside / 127.5 - 1 if dtype is np.uint8 else inside)
            assert not value[:, height:].any() and not value[:, :, width:].any()


def test_pixels_are_the_latents_of_a_model_without_a_vae(rows_of, processor):
    config = small_transfusion(processor, vae_config=None, latent_channels=3, latent_size=[8, 8], patch_size=4)
    batch = collate(rows_of(), config, noise_seed=0, row_numbers=range(6))
    assert "pixel_values" not in batch and batch["latents"].shape == batch["noise"].shape


# -- noise ------------------------------------------------------------------------------------------------------------


def noised(rows, config, numbers, seed=5, **options):
    return collate(rows, config, noise_seed=seed, row_numbers=numbers, **options)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_noise_does_not_depend_on_how_rows_are_split(rows_of, processor, vae, cached, prediction_type):
    config = small_transfusion(processor, prediction_type=prediction_type)
    rows = rows_of(vae if cached else None)
    whole = noised(rows, config, range(10, 16))
    assert whole["noise"].shape == (len(whole["timesteps"]), 4, 4, 4)
    for split in ([1, 5], [2, 2, 2], [3, 1, 2]):
        bounds = np.cumsum([0, *split])
        parts = [
            noised(rows[start:stop], config, range(10 + start, 10 + stop))
            for start, stop in zip(bounds, bounds[1:], strict=False)
        ]
        for name in ("noise", "timesteps"):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_noise_of_a_row_is_drawn_from_its_own_generator(rows_of, processor, vae):
    from modeling_mot.latent_images import draw_timesteps

    config, rows = small_transfusion(processor, image_first_max_timestep=100), rows_of(vae, caption_first=0.5)
    batch, start = noised(rows, config, [7, 8, 9, 0, 1, 2], seed=3), 0
    for row, number in zip(rows, [7, 8, 9, 0, 1, 2], strict=True):
        seed = int.from_bytes(hashlib.sha256(f"3/{number}".encode()).digest()[:7], "big")
        generator, count = torch.Generator().manual_seed(seed), len(row["images"])
        first = torch.tensor([image["first"] for image in row["images"]])
        assert torch.equal(batch["timesteps"][start : start + count], draw_timesteps(config, first, generator))
        for place in range(start, start + count):
            assert torch.equal(batch["noise"][place], torch.randn(4, 4, 4, generator=generator))
        start += count
    assert batch["timesteps"][batch["image_first"]].max() <= 100 < batch["timesteps"].max()


def test_times_are_shifted_by_the_size_of_each_image(rows_of, processor, vae):
    """Images of 4 x 4 latents are four tokens; those of `latent_size` would be one."""
    config = small_transfusion(processor, prediction_type="flow", timestep_shift=[[1, 1e-5], [4, 1e5]])
    config.latent_size = [2, 2]
    batch = noised(rows_of(vae), config, range(6))
    assert batch["timesteps"].min() > 900


def test_noise_follows_from_seed_and_row_number(rows_of, processor, vae):
    config, rows = small_transfusion(processor), rows_of(vae)[:2]
    once = noised(rows, config, [4, 5])
    assert torch.equal(once["noise"], noised(rows, config, [4, 5])["noise"])
    for other in (noised(rows, config, [5, 4]), noised(rows, config, [4, 5], seed=6)):
        assert not torch.equal(once["noise"], other["noise"])
        assert not torch.equal(once["timesteps"], other["timesteps"])
    both = once["noise"].flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_noise_is_the_same_for_cached_latents_and_pixels(rows_of, processor, vae):
    config = small_transfusion(processor)
    cached, on_the_fly = (noised(rows_of(chosen), config, range(6)) for chosen in (vae, None))
    assert torch.equal(cached["noise"], on_the_fly["noise"])
    assert torch.equal(cached["timesteps"], on_the_fly["timesteps"])


def test_noise_of_an_image_does_not_depend_on_the_sizes_beside_it(processor):
    config = small_transfusion(processor)
    small, large = made_up_row(processor, [(8, 8)]), made_up_row(processor, [(16, 16)])
    alone, padded = noised([small], config, [1]), noised([small, large], config, [1, 2])
    assert padded["noise"].shape == (2, 4, 8, 8)
    assert torch.equal(padded["noise"][0, :, :4, :4], alone["noise"][0])
    assert not padded["noise"][0, :, 4:].any() and not padded["noise"][0, :, :, 4:].any()


def test_clean_images_have_neither_noise_nor_timestep(processor):
    row = made_up_row(processor, [(8, 8), (8, 8)], clean=[True, False])
    for prediction_type in ("epsilon", "flow"):
        batch = noised([row], small_transfusion(processor, prediction_type=prediction_type), [3])
        assert batch["clean_images"].tolist() == [True, False]
        assert not batch["noise"][0].any() and batch["noise"][1].all()
        assert batch["timesteps"][0] == 0 and batch["timesteps"][1] > 0


def test_there_is_no_noise_without_a_seed_or_for_another_model(rows_of, tiny_config):
    rows = rows_of()
    for options in ({}, {"noise_seed": 1, "row_numbers": range(6)}):
        batch = collate(rows, tiny_config(modalities=["text", "image"], modality_token_ranges=None), **options)
        assert "noise" not in batch and "timesteps" not in batch


def test_a_seed_needs_the_numbers_of_the_rows(rows_of, processor):
    for numbers in (None, [1]):
        with pytest.raises(ValueError, match="row_numbers=.*of 6 rows.*noise_seed=5"):
            noised(rows_of(), small_transfusion(processor), numbers)


def test_pixels_that_the_vae_does_not_divide_are_refused(processor):
    vae_config = {"_class_name": "AutoencoderKL", "block_out_channels": [8] * 5, "latent_channels": 4}
    config = small_transfusion(processor, vae_config=vae_config)
    with pytest.raises(ValueError, match="8 x 8 pixels is not divisible by the VAE's down-sampling, 16"):
        noised([made_up_row(processor, [(8, 8)])], config, [0])


# -- counts, the model ------------------------------------------------------------------------------------------------


def test_counts_and_losses_are_those_of_the_model(rows_of, processor, vae):
    from modeling_mot.modeling_mot_transfusion import MoTTransfusionModel

    config = small_transfusion(processor)
    torch.manual_seed(0)
    model = MoTTransfusionModel(config, vae=vae).eval()
    sums = []
    for chosen in (vae, None):
        rows = rows_of(chosen, caption_first=0.5, targets="last")
        batch = noised(rows, model.config, range(6))
        assert batch["clean_images"].any()
        with torch.no_grad():
            output = model(**batch)
        assert output.loss_counts["image_diffusion"] == count_noised(batch, model.config)
        assert count_noised(batch, model.config) == 64 * (~batch["clean_images"]).sum()
        sums.append(output.loss_sums)
    for name in ("text", "image_diffusion"):
        assert torch.allclose(sums[0][name], sums[1][name], rtol=1e-3)


def test_counts_of_different_sizes(processor):
    row = made_up_row(processor, [(8, 16), (16, 8), (8, 8)], clean=[False, True, False])
    config = small_transfusion(processor)
    assert count_noised(collate([row], config), config) == 4 * (4 * 8 + 4 * 4)


# -- positions --------------------------------------------------------------------------------------------------------


def test_shared_positions_are_left_to_the_model(rows_of, processor):
    batch = collate(rows_of(), small_transfusion(processor, image_positions="shared"))
    assert "position_ids" not in batch


@pytest.mark.parametrize("markers", [False, True])
def test_clean_copies_share_the_position_of_what_they_repeat(rows_of, processor, markers):
    config = small_transfusion(
        processor, image_positions="shared", markers_in_image_block=markers, noised_images_visible=False
    )
    rows = rows_of(caption_first=0.3, clean_copies=True)
    positions = collate(rows, config)["position_ids"]
    boi, eoi = processor.token_id("boi"), processor.token_id("eoi")
    copies = 0
    for row, found in zip(rows, positions.tolist(), strict=True):
        inside = row["document_ids"]
        place = 0
        while place < 64 and inside[place] >= 0:
            if place == 0 or inside[place] != inside[place - 1]:
                position, of_image = -1, {}
            token = row["input_ids"][place]
            consecutive = row["position_ids"][place]
            if consecutive in of_image:  # stood here before: a copy
                expected, copies = of_image[consecutive], copies + 1
            else:
                within = token == processor.image_token_id and row["input_ids"][place - 1] != boi
                if markers:
                    within = token == eoi or token == processor.image_token_id
                position += not within
                expected = of_image[consecutive] = position
            assert found[place] == expected
            place += 1
    assert copies
