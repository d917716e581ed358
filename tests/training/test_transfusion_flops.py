"""FLOPs and parameters of Transfusion models against torch's counter on forwards that really ran."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel
from modeling_mot.encoder_pictures import Patches, PictureEncoder
from training.data import collate
from training.model.costs import forward_flops, forward_flops_per_token, patchifier_flops, training_flops

from .data.conftest import small_vae
from .tiny_transfusion import ROW_LENGTH, VOCABULARY, PictureStream, picture_tokens, tiny_config


PATCHIFIERS = ["unet", "linear"]


def counted(config, batch: dict, backward: bool = False) -> int:
    """What torch's counter sees of a real model."""
    config._attn_implementation = "sdpa"
    model = MoTTransfusionModel(config)
    # The counter does not know the CPU's fused attention; as matrix products it counts it.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(**batch)
        if backward:
            output.loss.backward()
    return counter.get_total_flops()


def batch_with_pictures(config, numbers=(0, 1, 4, 5, 8)) -> dict:
    """Rows of captions, pictures of 4 x 4 and edits; the model makes the routing, which needs no padding."""
    stream = PictureStream()
    rows = [stream.row(number) for number in numbers]
    batch = collate(rows, config, noise_seed=0, row_numbers=numbers)
    return {name: value for name, value in batch.items() if name != "routing"}


def by_modality(batch: dict) -> dict[str, int]:
    return {name: int((batch["modality_ids"] == index).sum()) for index, name in enumerate(("text", "image"))}


@pytest.mark.parametrize("patchifier", PATCHIFIERS)
@pytest.mark.parametrize("variant", ["dense", "mot", "moe-4x", "hybrid"])
def test_closed_form_is_what_torch_counts(variant, patchifier):
    config = tiny_config(variant, patchifier=patchifier)
    batch = batch_with_pictures(config)
    assert len(batch["latents"]) == 10 and "image_sizes" not in batch
    assert forward_flops(config, by_modality(batch), ROW_LENGTH) == counted(config, batch)


@pytest.mark.parametrize("patchifier", PATCHIFIERS)
def test_closed_form_holds_where_a_pictures_flops_are_no_multiple_of_its_tokens(patchifier):
    # Nine tokens; three of its forwards would lose a few FLOPs to rounding if a token's share were a whole number.
    config = tiny_config("mot", patchifier=patchifier, latent_size=[6, 6], unet_channels=[8, 8])
    assert patchifier_flops(config) % 9
    ids = torch.tensor([[1, *picture_tokens(6, 6), 10, 11, 2, 0, 0]] * 3)
    latents = torch.randn(3, 2, 6, 6)
    batch = {
        "input_ids": ids,
        "modality_ids": torch.from_numpy(VOCABULARY.modality_ids(ids.numpy())),
        "latents": latents,
    }
    assert forward_flops(config, by_modality(batch), ids.shape[1]) == counted(config, batch)


@pytest.mark.parametrize("picture", [True, False], ids=["with a picture", "with an image alone"])
def test_pictures_that_an_encoder_sees_cost_what_torch_counts(picture):
    eye = {
        "type": "siglip_navit", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3,
        "num_attention_heads": 2, "patch_size": 4, "table_size": [2, 3], "drop_last_layers": 1,
    }  # fmt: skip
    vision = {"kind": "features", "encoder": "eye", "placeholder_token_id": 39}
    fields = {
        "modalities": ["text", "image", "vision"],
        "towers": {"text": "text", "image": "image", "vision": "text"},
        "timestep_addition": "token",
        "encoders": {"eye": eye},
        "continuous_modalities": {"vision": vision},
    }
    config = MoTTransfusionConfig.from_dict(tiny_config("mot", patchifier="linear").to_dict() | fields)
    begin, end = config.boi_token_id, config.eoi_token_id
    seen = [begin, *[39] * 6, end] if picture else [9] * 8
    ids = torch.tensor([[1, *picture_tokens(4, 4), *seen, 10]] * 2)
    batch = {"input_ids": ids, "latents": torch.randn(2, 2, 4, 4)}
    if picture:
        batch["encoder_pixel_values"] = torch.randn(2, 3, 8, 12)
    tokens = {"image": int((ids == config.image_token_id).sum()), "vision": 12 if picture else 0}
    tokens["text"] = ids.numel() - sum(tokens.values())
    # Without a picture a blank one of a single patch runs.
    blank = 0 if picture else _one_patch(config)
    assert forward_flops(config, tokens, ids.shape[1]) + blank == counted(config, batch)


def _one_patch(config):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder = PictureEncoder(config, "eye")
        encoder(Patches(torch.zeros(1, 48), [(1, 1)]))
    return counter.get_total_flops()


def test_a_backward_costs_twice_a_forward_but_for_inputs_that_need_no_gradient():
    config = tiny_config("mot")
    batch = batch_with_pictures(config)
    expected = training_flops(config, by_modality(batch), ROW_LENGTH)
    real = counted(config, batch, backward=True)
    # The first convolution and the timestep embedding have no gradient towards what comes in.
    images, tokens = len(batch["latents"]), 4
    saved = images * (2 * 9 * 2 * 8 * 16 + 2 * 8 * 32)
    assert tokens * images == by_modality(batch)["image"] and real == expected - saved


@pytest.mark.parametrize("patchifier", PATCHIFIERS)
def test_variants_differ_by_their_routers_alone(patchifier):
    dense, mot, moe = (
        forward_flops_per_token(tiny_config(variant, patchifier=patchifier), ROW_LENGTH)
        for variant in ("dense", "mot", "moe-4x")
    )
    router = 2 * 2 * 32 * 4  # two layers of a product of 32 by 4
    assert dense == mot and moe == {name: flops + router for name, flops in dense.items()}
    assert dense["image"] > dense["text"]


def test_a_larger_picture_costs_more_and_the_vae_nothing():
    config = tiny_config("mot")
    assert patchifier_flops(config, (8, 8)) > 3 * patchifier_flops(config, (4, 4)) == 3 * patchifier_flops(config)
    with_vae = tiny_config("mot", latent_channels=4)
    with_vae.vae_config = {**small_vae().config, "_class_name": "AutoencoderKL"}
    assert patchifier_flops(with_vae) == patchifier_flops(tiny_config("mot", latent_channels=4))


@pytest.mark.parametrize("patchifier", PATCHIFIERS)
@pytest.mark.parametrize("variant", ["dense", "mot", "moe-4x", "hybrid"])
def test_parameters_are_those_of_the_model_without_its_vae(variant, patchifier):
    config = tiny_config(variant, patchifier=patchifier, latent_channels=4)
    model = MoTTransfusionModel(config, vae=small_vae())
    total = sum(value.numel() for name, value in model.named_parameters() if not name.startswith("vae."))
    assert model.config.num_parameters() == total
    assert sum(value.numel() for value in model.parameters()) > total
    # As many are active as the dense baseline has, and the routers.
    routers = sum(value.numel() for name, value in model.named_parameters() if "router" in name)
    dense = tiny_config("dense", patchifier=patchifier, latent_channels=4).num_parameters()
    assert model.config.num_parameters(active=True) == dense + routers
