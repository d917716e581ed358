"""Vision encoders, pictures that stand in a row several times, and placeholders without a row in the vocabulary."""

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel
from modeling_mot.attention_masks import find_image_blocks, find_placeholders, image_positions, plan_rows
from modeling_mot.encoder_pictures import Patches, PictureEncoder

from .naive import weights_of
from .naive_transfusion import BOI, EOI, PATCH, TINY, sincos_of, time_embedding


EYE = {
    "type": "siglip_navit",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "table_size": [5, 5],
}
LOOK, PEER = 8, 9  # placeholders of two modalities
VISION = {"kind": "features", "encoder": "eye", "placeholder_token_id": LOOK}
TEXT = 10


def config_of(**fields):
    """Text and vision on one tower, images that are diffused on another, as BAGEL has them."""
    given = TINY | {
        "modalities": ["text", "vision", "image"],
        "towers": {"text": "und", "vision": "und", "image": "gen"},
        "continuous_modalities": {"vision": VISION},
        "encoders": {"eye": EYE},
        "image_positions": "shared",
        "markers_in_image_block": True,
        "noised_images_visible": False,
        "noised_images_advance": False,
        "prediction_type": "flow",
    }
    return MoTTransfusionConfig(**(given | fields))


def model_of(**fields):
    torch.manual_seed(0)
    return MoTTransfusionModel(config_of(**fields)).eval()


def look(rows, columns, token=LOOK):
    return [BOI, *[token] * (rows * columns), EOI]


def noisy(count=4):
    return [BOI, *[PATCH] * count, EOI]


# ---------------------------------------------------------------------------------------------------------- the encoder


def siglip_with(encoder):
    """Transformers' SigLIP with the same weights; its patches are a convolution, (out, channel, row, column)."""
    fields = {name: EYE[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")}
    model = SiglipVisionModel(SiglipVisionConfig(**fields, num_hidden_layers=3, image_size=20, vision_use_head=False))
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    patches = weights.pop("encoder.patch_embedding.weight").unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2)
    weights = {name: value for name, value in weights.items() if "connector" not in name}
    weights |= {
        "embeddings.patch_embedding.weight": patches,
        "embeddings.patch_embedding.bias": weights.pop("encoder.patch_embedding.bias"),
        "embeddings.position_embedding.weight": weights.pop("encoder.position_embedding.weight"),
        "post_layernorm.weight": weights.pop("encoder.post_layernorm.weight"),
        "post_layernorm.bias": weights.pop("encoder.post_layernorm.bias"),
    }
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    model.load_state_dict({f"{prefix}{name}": value for name, value in weights.items()}, strict=True)
    return model.eval()


def test_an_encoder_equals_transformers_siglip():
    torch.manual_seed(0)
    encoder = PictureEncoder(config_of(), "eye").eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        ours = encoder.encode(Patches.of(pixels, [(20, 20)] * 2, 4))
        theirs = siglip_with(encoder)(pixels).last_hidden_state
    torch.testing.assert_close(ours, theirs.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_the_last_layers_are_dropped():
    config = config_of(encoders={"eye": EYE | {"drop_last_layers": 2}})
    assert len(PictureEncoder(config, "eye").layers) == 1


@pytest.mark.parametrize("sizes", [[(8, 12), (20, 4), (8, 12)], [(4, 16), (8, 8)]], ids=["sizes", "one length"])
def test_packed_pictures_are_encoded_each_by_itself(sizes):
    torch.manual_seed(0)
    encoder, pixels = PictureEncoder(config_of(), "eye"), torch.randn(len(sizes), 3, 20, 20)
    together = encoder(Patches.of(pixels, sizes, 4))
    alone = [
        encoder(Patches.of(picture[None, :, :height, :width], [(height, width)], 4))
        for picture, (height, width) in zip(pixels, sizes)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [None, [6, 5]], ids=["computed", "stored"])
def test_features_stand_in_the_row_with_their_positions(size):
    table = {"position_table": "sincos", "position_table_size": size}
    model = model_of(continuous_modalities={"vision": VISION | table})
    pixels, kept = torch.randn(1, 3, 8, 12), []
    model.model.register_forward_pre_hook(lambda m, a, inputs: kept.append(inputs["inputs_embeds"]), with_kwargs=True)
    ids = torch.tensor([[TEXT, *look(2, 3), TEXT]])
    with torch.no_grad():
        model(ids, encoder_pixel_values=pixels)
        features = model.encoders["eye"](Patches.of(pixels, [(8, 12)], 4))
    positions = torch.stack([sincos_of(row, column, 32) for row in range(2) for column in range(3)])
    torch.testing.assert_close(kept[0][0, 2:8], features + positions, atol=1e-5, rtol=1e-5)
    assert torch.equal(kept[0][0, 0], model.model.embed_tokens.weight[TEXT])


def test_two_modalities_share_an_encoder_and_a_row():
    """Each picture goes to the placeholders that stand for it, in order of appearance."""
    second = VISION | {"placeholder_token_id": PEER, "position_table": "sincos"}
    model = model_of(
        modalities=["text", "vision", "glance", "image"],
        towers={"text": "und", "vision": "und", "glance": "gen", "image": "gen"},
        continuous_modalities={"vision": VISION, "glance": second},
    )
    pixels = torch.randn(3, 3, 8, 8)
    sizes, kept = [[8, 4], [4, 8], [8, 8]], []
    model.model.register_forward_pre_hook(lambda m, a, inputs: kept.append(inputs["inputs_embeds"]), with_kwargs=True)
    ids = torch.tensor([[*look(2, 1, PEER), *look(1, 2), TEXT, *look(2, 2, PEER)]])
    with torch.no_grad():
        model(ids, encoder_pixel_values=pixels, encoder_image_sizes=sizes)
        first, middle, last = (
            model.encoders["eye"](Patches.of(pixels[i : i + 1, :, :h, :w], [(h, w)], 4))
            for i, (h, w) in enumerate(sizes)
        )
    assert not torch.allclose(kept[0][0, 1:3], first)  # these have positions
    torch.testing.assert_close(kept[0][0, 5:7], middle)
    positions = torch.stack([sincos_of(row, column, 32) for row in range(2) for column in range(2)])
    torch.testing.assert_close(kept[0][0, 10:14], last + positions, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------- positions and visibility


def test_a_picture_stands_in_a_row_three_times():
    """Noisy, clean, features: the first takes no position, and is seen by itself alone."""
    model, kept = model_of(), {}
    model.model.register_forward_pre_hook(lambda m, a, inputs: kept.update(inputs), with_kwargs=True)
    ids = torch.tensor([[TEXT, TEXT, *noisy(), *noisy(), *look(1, 2), TEXT, TEXT]])
    model(
        ids,
        latents=torch.randn(2, 2, 4, 4),
        clean_images=torch.tensor([False, True]),
        encoder_pixel_values=torch.randn(1, 3, 4, 8),
    )
    positions = [0, 1] + [2] * 6 + [2] * 6 + [3] * 4 + [4, 5]
    assert kept["position_ids"][0].tolist() == positions
    assert kept["image_blocks"].hidden[0].tolist() == [False] * 2 + [True] * 6 + [False] * 12
    # With positions that advance, each copy has its own.
    blocks = find_image_blocks(find_placeholders(model.config, ids), None, with_markers=True)
    counted = [0, 1] + [2] * 6 + [3] * 6 + [4] * 4 + [5, 6]
    assert image_positions(blocks, None, None)[0].tolist() == counted


def test_what_is_noised_moves_nothing_but_itself():
    model = model_of()
    ids = torch.tensor([[TEXT, *noisy(), *look(1, 2), TEXT]])
    latents, pixels = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 8)
    arguments = {"timesteps": torch.tensor([500.0]), "noise": torch.zeros(1, 2, 4, 4)}
    with torch.no_grad():
        one = model(ids, latents=latents, encoder_pixel_values=pixels, **arguments)
        other = model(ids, latents=latents + 1, encoder_pixel_values=pixels, **arguments)
        third = model(ids, latents=latents, encoder_pixel_values=pixels + 1, **arguments)
    assert torch.equal(one.logits[:, 7:], other.logits[:, 7:]) and not torch.equal(one.prediction, other.prediction)
    assert torch.equal(one.prediction, third.prediction) and not torch.equal(one.logits[:, -1], third.logits[:, -1])


def test_pictures_of_a_document_see_no_other_document():
    config = config_of(noised_images_visible=True, noised_images_advance=True)
    ids = torch.tensor([[*look(1, 2), TEXT, *look(1, 2), TEXT]])
    plan = plan_rows(config, ids, torch.tensor([[0] * 5 + [1] * 5]))
    assert plan.first[0].tolist() == [0] * 5 + [5] * 5
    assert plan.last[0].tolist() == [3, 3, 3, 3, 4, 8, 8, 8, 8, 9]


# ------------------------------------------------------------------------------------------------------------- the time


@pytest.mark.parametrize("addition", ["token", "noised_token", None])
def test_the_time_is_added_where_the_configuration_says(addition):
    model = model_of(timestep_addition=addition, timestep_format="fraction")
    latents, timesteps = torch.randn(2, 2, 4, 4), torch.tensor([700.0, 0.0])
    clean = torch.tensor([False, True])
    with torch.no_grad():
        tokens, _ = model.patchifier_tokens(latents, timesteps, clean)
    weights = weights_of(model, torch.float32)
    for image, time, is_clean, token in zip(latents, (0.7, 0.0), clean, tokens):
        patch = image[:, :2, :2].permute(1, 2, 0).flatten()
        want = weights["patchifier.proj_in.weight"] @ patch + weights["patchifier.proj_in.bias"]
        if addition == "token" or addition == "noised_token" and not is_clean:
            want = want + time_embedding(weights, "patchifier.time_encoder", time, 256)
        torch.testing.assert_close(token[0], want, atol=1e-5, rtol=1e-5)
    assert ("patchifier.time_encoder.mlp.linear_1.weight" in weights) == (addition is not None)


# ------------------------------------------------------------------------------------------------------------- training


def step(model, with_picture=True):
    ids = torch.tensor([[TEXT, *noisy(), *(look(1, 2) if with_picture else []), TEXT, TEXT + 1]])
    pictures = {"encoder_pixel_values": torch.randn(1, 3, 4, 8)} if with_picture else {}
    model.train()
    model(ids, labels=ids, latents=torch.randn(1, 2, 4, 4), **pictures).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_row_without_pictures_gives_encoders_gradients_of_zero():
    gradients = step(model_of(), with_picture=False)
    assert all(gradient is not None for gradient in gradients.values())
    assert all(not gradient.any() for name, gradient in gradients.items() if name.startswith("encoders."))
    trained = step(model_of())
    assert all(gradient.any() for name, gradient in trained.items() if "k_proj.bias" not in name and "encoders" in name)


def test_a_frozen_encoder_trains_its_connector_alone():
    gradients = step(model_of(encoders={"eye": EYE | {"frozen": True}}))
    of_encoder = {name: gradient for name, gradient in gradients.items() if name.startswith("encoders.")}
    assert {name for name, gradient in of_encoder.items() if gradient is not None} == {
        f"encoders.eye.connector.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    }


def test_a_frozen_encoder_is_frozen_when_it_is_loaded(tmp_path):
    model_of(encoders={"eye": EYE | {"frozen": True}}).save_pretrained(tmp_path)
    loaded = MoTTransfusionModel.from_pretrained(tmp_path)
    assert not loaded.encoders["eye"].patch_embedding.weight.requires_grad
    assert loaded.encoders["eye"].connector.fc1.weight.requires_grad


def test_checkpointed_layers_give_the_same_gradients():
    plain, model = model_of(), model_of()
    model.gradient_checkpointing_enable()
    torch.manual_seed(1)
    want = step(plain)
    torch.manual_seed(1)
    for name, gradient in step(model).items():
        torch.testing.assert_close(gradient, want[name])


# ----------------------------------------------------------------------------------------------------- saving and sizes


def test_a_saved_model_has_its_tables_and_a_configuration_its_defaults(tmp_path):
    table = {"position_table": "sincos", "position_table_size": [5, 6]}
    model = model_of(
        continuous_modalities={"vision": VISION | table},
        latent_position_table="sincos",
        latent_position_table_size=[3, 4],
    )
    model.position_tables["image"].weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = MoTTransfusionModel.from_pretrained(tmp_path)
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.encoders["eye"]["layer_norm_eps"] == 1e-6
    assert loaded.config.continuous_modalities["vision"]["begin_token_id"] == BOI


def test_parameters_are_counted_with_encoders():
    model = model_of()
    assert model.config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------- generate()


def test_each_prompt_of_a_batch_has_its_own_pictures():
    model = model_of()
    prompts = [[TEXT, *look(2, 1), TEXT], [*look(1, 2), *look(1, 1)]]
    pixels = torch.randn(3, 3, 8, 8)
    sizes = [[8, 4], [4, 8], [4, 4]]
    arguments = {"generation_mode": "text", "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = [
        model.generate(
            torch.tensor([prompt]), encoder_pixel_values=pixels[part], encoder_image_sizes=sizes[part], **arguments
        ).sequences[0, len(prompt) :]
        for prompt, part in zip(prompts, (slice(0, 1), slice(1, 3)))
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    together = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        encoder_pixel_values=pixels,
        encoder_image_sizes=sizes,
        **arguments,
    ).sequences[:, ids.shape[1] :]
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]


def test_returned_sequences_share_their_prompts_pictures():
    model, ids = model_of(), torch.tensor([[*look(2, 1), TEXT], [*look(1, 2), TEXT]])
    pixels, sizes = torch.randn(2, 3, 8, 8), [[8, 4], [4, 8]]
    pictures = {"encoder_pixel_values": pixels, "encoder_image_sizes": sizes}
    arguments = {"generation_mode": "text", "max_new_tokens": 3, "pad_token_id": 0, "output_logits": True}
    one = model.generate(ids, do_sample=False, **pictures, **arguments)
    two = model.generate(ids, do_sample=True, num_return_sequences=2, **pictures, **arguments)
    torch.testing.assert_close(two.logits[0], one.logits[0].repeat_interleave(2, dim=0))


@pytest.mark.parametrize("behind", [False, True], ids=["placeholders in the vocabulary", "behind it"])
def test_requests_with_pictures_are_served_as_alone(behind):
    token = 60 if behind else LOOK
    model = model_of(
        continuous_modalities={"vision": VISION | {"placeholder_token_id": token}}, num_placeholder_tokens=int(behind)
    )
    arguments = {"generation_mode": "text", "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    requests = [
        {"input_ids": [*look(2, 1, token), TEXT], "encoder_pixel_values": torch.randn(1, 3, 8, 4)},
        {"input_ids": [TEXT, TEXT + 1]},
        {"input_ids": [TEXT, *look(1, 3, token), TEXT], "encoder_pixel_values": torch.randn(1, 3, 4, 12)},
    ]
    results = model.generate_batch(requests, **arguments)
    for request, result in zip(requests, results.values(), strict=True):
        ids = torch.tensor([request.pop("input_ids")])
        assert result.error is None
        assert torch.equal(result.output.sequences, model.generate(ids, **request, **arguments).sequences)


# ------------------------------------------------------------------------------------------- placeholders without a row


def test_placeholders_may_lie_behind_the_vocabulary():
    inside = model_of()
    behind = model_of(
        image_token_id=60,
        continuous_modalities={"vision": VISION | {"placeholder_token_id": 61}},
        num_placeholder_tokens=2,
    )
    behind.load_state_dict(inside.state_dict())
    ids = torch.tensor([[TEXT, *noisy(), *look(1, 2), TEXT, TEXT + 1]])
    moved = ids.masked_fill(ids == PATCH, 60).masked_fill(ids == LOOK, 61)
    inputs = {
        "latents": torch.randn(1, 2, 4, 4),
        "noise": torch.randn(1, 2, 4, 4),
        "timesteps": torch.tensor([300.0]),
        "encoder_pixel_values": torch.randn(1, 3, 4, 8),
    }
    want, got = inside(ids, labels=ids, **inputs), behind(moved, labels=moved, **inputs)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)

    # Logits processors look up the scores of all ids of a prompt.
    arguments = {"generation_mode": "text", "max_new_tokens": 3, "pad_token_id": 0, "repetition_penalty": 1.5}
    prompt = torch.tensor([[TEXT, BOI, 61, 61, EOI, TEXT]])
    pixels = inputs["encoder_pixel_values"]
    assert behind.generate(prompt, encoder_pixel_values=pixels, do_sample=False, **arguments).sequences.shape == (1, 9)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoders": {"eye": EYE | {"patchsize": 4}}}, "unknown field of encoders['eye'] patchsize; did you mean"),
        (
            {"encoders": {"eye": {n: v for n, v in EYE.items() if n != "table_size"}}},
            "encoders['eye'] lacks table_size",
        ),
        ({"encoders": {"eye": EYE | {"type": "clip"}}}, "encoders['eye'].type='clip' is not one of siglip_navit"),
        ({"encoders": {"eye": EYE | {"num_attention_heads": 3}}}, "is not a multiple of num_attention_heads=3"),
        ({"encoders": {"eye": EYE | {"drop_last_layers": 3}}}, "drop_last_layers=3 leaves none of num_hidden_layers=3"),
        ({"encoders": {"eye": EYE | {"connector": {"act": "relu"}}}}, "field of encoders['eye'].connector act"),
        ({"encoders": {"eye": EYE, "ear": EYE}}, "encoders has 'ear', which no entry of continuous_modalities names"),
        ({"encoders": {"a.b": EYE}}, "names 'a.b': it is part of parameter names"),
        ({"encoders": None}, "unknown encoder of continuous_modalities['vision'] eye"),
        ({"continuous_modalities": None}, "encoders has 'eye'"),
        (
            {"continuous_modalities": {"vision": VISION | {"kind": "diffused"}}},
            "kind='diffused' is not one of features",
        ),
        ({"continuous_modalities": {"image": VISION}}, "the fields of the configuration itself describe the image"),
        ({"continuous_modalities": {"touch": VISION}}, "is not one of modalities="),
        (
            {"continuous_modalities": {"vision": VISION | {"placeholder_token_id": PATCH}}},
            "image_token_id=5 and continuous_modalities['vision'].placeholder_token_id=5 must differ",
        ),
        (
            {"continuous_modalities": {"vision": VISION | {"placeholder_token_id": 60}}},
            "placeholder_token_id=60 must be a token of the vocabulary",
        ),
        (
            {"continuous_modalities": {"vision": VISION | {"position_table_size": [4, 4]}}},
            "position_table_size=[4, 4] without a position_table",
        ),
        ({"latent_position_table_size": [4, 4]}, "without a latent_position_table"),
        ({"image_positions": "consecutive"}, "noised_images_advance=False"),
        ({"timestep_addition": "everywhere"}, "timestep_addition='everywhere' is not one of"),
        ({"timestep_addition": "token", "patchifier": "unet"}, "timestep_addition='token' is of patchifier='linear'"),
        ({"num_placeholder_tokens": -1}, "num_placeholder_tokens=-1"),
        (
            {"latent_position_table": "sincos", "latent_position_table_size": [1, 2]},
            "latent_position_table_size=[1, 2]",
        ),
    ],
)
def test_a_contradiction_is_refused_by_name(fields, message):
    with pytest.raises(ValueError) as error:
        config_of(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("ids", "inputs", "message"),
    [
        (look(1, 2), {}, "0 pictures came in encoder_pixel_values"),
        ([TEXT], {"encoder_pixel_values": torch.zeros(1, 3, 4, 8)}, "stand in 0 places"),
        (look(1, 2), {"encoder_pixel_values": torch.zeros(1, 3, 8, 8)}, "makes 4 patches, but input_ids holds 2"),
        (look(1, 2), {"encoder_pixel_values": torch.zeros(1, 3, 4, 6)}, "its sides must be multiples of 4"),
        (look(1, 6), {"encoder_pixel_values": torch.zeros(1, 3, 4, 24)}, "are a table of 5 x 5"),
        (look(1, 2), {"encoder_pixel_values": torch.zeros(1, 3, 4)}, "it must be floats in [-1, 1]"),
        (
            look(1, 2),
            {"encoder_pixel_values": torch.zeros(1, 3, 4, 8), "encoder_image_sizes": [[9, 9]]},
            "encoder_image_sizes=[(9, 9)] must give",
        ),
    ],
)
def test_pictures_that_do_not_fit_are_refused(ids, inputs, message):
    with pytest.raises(ValueError) as error:
        model_of()(torch.tensor([ids]), **inputs)
    assert message in str(error.value)


def test_a_model_without_encoders_takes_no_pictures_for_them():
    model = MoTTransfusionModel(MoTTransfusionConfig(**TINY))
    with pytest.raises(ValueError, match="this model has no encoder"):
        model(torch.tensor([[TEXT]]), encoder_pixel_values=torch.zeros(1, 3, 4, 8))
