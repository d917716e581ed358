"""MoTTransfusionConfig: the rows of Table 4, what follows from the fields, and contradictions."""

import json
import math

import pytest
import torch

from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel

from .naive_transfusion import tiny_config, tiny_model


# Table 4: hidden size, layers, heads; millions of active parameters of the transformer by the counting of Table 1.
TABLE_4 = {
    "transfusion-163m": (768, 16, 12, 162),
    "transfusion-760m": (1536, 24, 24, 778),
    "transfusion-1.4b": (2048, 24, 16, 1364),
    "transfusion-7b": (4096, 32, 32, 6738),
}
VARIANTS = [name for name in MoTTransfusionConfig.variant_names() if not name.startswith("loo-")]


def on_meta(config):
    with torch.device("meta"):
        return MoTTransfusionModel(config)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_there_is_a_preset_for_every_row_of_table_4():
    assert set(MoTTransfusionConfig.preset_names()) == set(TABLE_4)


@pytest.mark.parametrize("name", TABLE_4)
def test_presets_are_the_rows_of_table_4(name):
    hidden_size, layers, heads, millions = TABLE_4[name]
    config = MoTTransfusionConfig.from_preset(name, "dense")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (hidden_size, layers, heads)
    unet = config.patchifier_parameters()
    assert 0.265e9 <= unet <= 0.275e9  # appendix A.2: 0.27 B
    assert (config.num_parameters(active=True) - unet) / 1e6 == pytest.approx(millions, rel=5e-3)
    # Appendix A: 256 pixels are 32 x 32 x 8 latents, 2 x 2 of them a token; cosine schedule, lambda of 5.
    assert config.image_length(*config.latent_size) == 256 and config.latent_channels == 8
    assert (config.noise_schedule, config.prediction_type, config.num_train_timesteps) == (
        "squaredcos_cap_v2",
        "epsilon",
        1000,
    )
    assert (config.diffusion_loss_weight, config.patchifier) == (5.0, "unet")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["transfusion-163m", "transfusion-7b"])
def test_counts_from_the_configuration_are_those_of_a_model(name, variant):
    config = MoTTransfusionConfig.from_preset(name, variant)
    model = on_meta(config)
    assert count(model) == config.num_parameters()
    assert count(model.patchifier) == config.patchifier_parameters()


@pytest.mark.parametrize("variant", ["dense", "mot", "hybrid"])
@pytest.mark.parametrize("patchifier", ["linear", "unet"])
def test_counts_of_other_sizes_are_those_of_a_model(variant, patchifier):
    model = tiny_model(variant, patchifier=patchifier, tie_word_embeddings=True, qk_norm="rms", attention_bias=True)
    assert count(model) == model.config.num_parameters()


def test_configuration_without_arguments_is_the_papers_images_beside_our_tokens(tmp_path):
    config = MoTTransfusionConfig()
    assert config.image_length(*config.latent_size) == 256
    assert (config.boi_token_id, config.eoi_token_id, config.image_token_id) == (32000, 32001, 32002)
    config.save_pretrained(tmp_path)
    assert MoTTransfusionConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_configuration_goes_through_json_and_back(tmp_path):
    config = tiny_config(
        "hybrid", modalities=("text", "image", "speech"), image_first_max_timestep=500, caption_dropout=0.1
    )
    config.save_pretrained(tmp_path)
    loaded = MoTTransfusionConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "mixture_of_transformers_transfusion"
    assert written["auto_map"]["AutoModel"] == "modeling_mot_transfusion.MoTTransfusionModel"


def test_pixels_of_a_latent_follow_from_the_vae():
    kl = {"_class_name": "AutoencoderKL", "latent_channels": 2, "block_out_channels": [8, 8, 16, 16]}
    tiny = {"_class_name": "AutoencoderTiny", "latent_channels": 2, "encoder_block_out_channels": [8, 8, 8]}
    assert [tiny_config(vae_config=vae).vae_downsampling for vae in (kl, tiny, None)] == [8, 4, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modalities": ["text", "speech"]}, "has no 'image'"),
        ({"image_token_id": None}, "image_token_id=None must be a token"),
        ({"image_token_id": 60}, "image_token_id=60 must be a token of the vocabulary"),
        ({"boi_token_id": None, "eoi_token_id": None}, "boi_token_id=None must be a token"),
        ({"image_token_id": 3}, "image_token_id=3 must differ"),
        ({"image_grid": [2, 2]}, "set latent_size instead"),
        ({"latent_size": [4]}, "latent_size=\\[4\\] must be"),
        ({"latent_size": [4, 5]}, "4 x 5 latents cannot be cut into patches of patch_size=2"),
        ({"latent_size": [0, 4]}, "0 x 4 latents cannot be cut"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"latent_channels": 0}, "latent_channels=0"),
        ({"vae_config": {"_class_name": "AutoencoderKL", "latent_channels": 4}}, "latent_channels=2 but the VAE has 4"),
        ({"vae_config": {"_class_name": "VQModel", "latent_channels": 2}}, "_class_name='VQModel'"),
        ({"patchifier": "conv"}, "patchifier='conv' is not one of"),
        ({"prediction_type": "sample"}, "prediction_type='sample' is not one of"),
        ({"noise_schedule": "cosine"}, "noise_schedule='cosine' is not one of"),
        ({"timestep_sampling": "normal"}, "timestep_sampling='normal' is not one of"),
        ({"timestep_format": "float"}, "timestep_format='float' is not one of"),
        ({"image_positions": "2d"}, "image_positions='2d' is not one of"),
        ({"latent_position_table": "learnt"}, "latent_position_table='learnt' is not one of"),
        ({"patchifier": "unet", "unet_channels": [8, 8, 8]}, "patch_size=2 with unet_channels"),
        ({"patchifier": "unet", "unet_channels": [8, 10]}, "10 is not a multiple of unet_norm_groups=4"),
        ({"patchifier": "unet", "unet_layers": 0}, "unet_layers=0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"image_first_max_timestep": 1000}, "image_first_max_timestep=1000 must lie in"),
        ({"caption_dropout": 1.5}, "caption_dropout=1.5 is a probability"),
        ({"diffusion_loss_weight": -1}, "diffusion_loss_weight=-1"),
        ({"prediction_type": "flow", "timestep_shift": 0}, "timestep_shift=0"),
        ({"timestep_shift": 3.0}, "timestep_shift=3.0 shifts the fractions of flow"),
        (
            {"latent_position_table": "sincos", "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3},
            "a multiple of 4",
        ),
        ({"patchifer": "linear"}, "did you mean 'patchifier'"),
        ({"patchifier": "unet", "unet_norm_groups": 0}, "unet_norm_groups=0"),
        ({"unet_channels": []}, "unet_channels=\\[\\]"),
        ({"latent_size": [4, -4]}, "latent_size=\\[4, -4\\]"),
        ({"diffusion_loss_weight": math.nan}, "diffusion_loss_weight=nan"),
        ({"diffusion_loss_weight": math.inf}, "diffusion_loss_weight=inf"),
        ({"caption_dropout": math.nan}, "caption_dropout=nan"),
        ({"prediction_type": "flow", "timestep_shift": math.nan}, "timestep_shift=nan"),
        ({"prediction_type": "flow", "timestep_shift": []}, "timestep_shift=\\[\\] must be a list of one or more"),
        ({"prediction_type": "flow", "timestep_shift": [[4, 1, 2]]}, "timestep_shift=.*must be a list of 2"),
        ({"prediction_type": "flow", "timestep_shift": [[4, 0.0]]}, "timestep_shift=.*must not have 0.0"),
        ({"prediction_type": "flow", "timestep_shift": [[4, 1], [4.0, 3]]}, "must name each number of tokens once"),
        ({"timestep_shift": [[4, 3.0]]}, "shifts the fractions of flow"),
        ({"timestep_sampling": "beta"}, "timestep_sampling='beta' needs \\[alpha, beta\\]"),
        ({"timestep_sampling_parameters": [0, 1]}, "timestep_sampling='uniform' takes none"),
        (
            {"timestep_sampling": "beta", "timestep_sampling_parameters": [1.5, 0.0]},
            "timestep_sampling_parameters=\\[1.5, 0.0\\] of timestep_sampling='beta' must be positive",
        ),
        (
            {"timestep_sampling": "logit_normal", "timestep_sampling_parameters": [-1, -1]},
            "\\[mean, deviation\\] with a positive deviation",
        ),
        ({"timestep_sampling": "logit_normal", "timestep_sampling_parameters": [1]}, "must be a list of 2"),
        ({"timestep_range": [0.5, 0.5]}, "timestep_range=\\[0.5, 0.5\\] must be \\[low, high\\]"),
        ({"timestep_range": [0, 1.5]}, "timestep_range=\\[0, 1.5\\] must not have 1.5"),
        ({"prediction_type": "flow_sample", "smallest_divisor": 0}, "smallest_divisor=0 must be in"),
        ({"timestep_direction": "clean"}, "timestep_direction='clean' turns the fractions of flow"),
        ({"timestep_direction": "up"}, "timestep_direction='up' is not one of"),
        ({"patchifier": "linera"}, "did you mean 'linear'"),
        ({"bos_token_id": 5, "image_token_id": 5}, "bos_token_id=5 and image_token_id=5 must differ"),
        (
            {"vae_config": {"_class_name": "AutoencoderKL", "latent_channels": 2, "block_out_channels": 8}},
            "vae_config.block_out_channels=8",
        ),
    ],
)
def test_contradictions_are_refused_by_name(fields, message):
    modalities = fields.pop("modalities", ("text", "image"))
    with pytest.raises(ValueError, match=message):
        tiny_config(modalities=modalities, **fields)
