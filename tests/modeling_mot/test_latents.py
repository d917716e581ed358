"""Pixels to latents and back: the same numbers as diffusers called directly, and what the carried VAE is good for."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from modeling_mot import latent_vae
from modeling_mot.latent_vae import build_vae, decode_latents, downsampling, encode_pixels, vae_fingerprint


CARRIED = Path(__file__).parents[2] / "training" / "assets" / "vae"
KL = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "scaling_factor": 0.7,
    "shift_factor": 0.2,
}
TINY = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8],
    "num_encoder_blocks": [1, 1, 1],
    "num_decoder_blocks": [1, 1, 1],
    "scaling_factor": 1.5,
    "shift_factor": -0.1,
}


@pytest.fixture(params=[KL, TINY], ids=["kl", "tiny"])
def vae(request):
    return build_vae(request.param)


@pytest.fixture
def pixels():
    return torch.rand(5, 3, 16, 24) * 2 - 1


def test_latents_equal_diffusers_own(pixels):
    kl, tiny = build_vae(KL), build_vae(TINY)
    with torch.no_grad():
        expected_kl = (kl.encode(pixels).latent_dist.mean - 0.2) * 0.7
        expected_tiny = (tiny.encode(pixels).latents + 0.1) * 1.5
    torch.testing.assert_close(encode_pixels(kl, pixels), expected_kl, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encode_pixels(tiny, pixels), expected_tiny, atol=1e-5, rtol=1e-5)


def test_pixels_equal_diffusers_own():
    for config, undo in ((KL, lambda z: z / 0.7 + 0.2), (TINY, lambda z: z / 1.5 - 0.1)):
        vae = build_vae(config)
        latents = 5 * torch.randn(2, vae.config.latent_channels, 3, 4)
        with torch.no_grad():
            expected = vae.decode(undo(latents)).sample.clamp(-1, 1)
        torch.testing.assert_close(decode_latents(vae, latents), expected, atol=1e-5, rtol=1e-5)


def test_statistics_per_channel_stand_in_for_the_shift(pixels):
    mean, std = [0.1, -0.2, 0.3], [0.5, 1.0, 2.0]
    vae = build_vae({**KL, "latents_mean": mean, "latents_std": std})
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mean
    columns = [(raw[:, c] - mean[c]) / std[c] * 0.7 for c in range(3)]
    latents = encode_pixels(vae, pixels)
    torch.testing.assert_close(latents, torch.stack(columns, 1), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        expected = vae.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(vae, latents), expected, atol=1e-5, rtol=1e-5)


def test_no_shift_and_no_scale_mean_none(pixels):
    vae = build_vae({**KL, "scaling_factor": None, "shift_factor": None})
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(encode_pixels(vae, pixels), expected, atol=1e-5, rtol=1e-5)


def test_parts_equal_the_whole(vae, pixels, monkeypatch):
    whole = encode_pixels(vae, pixels)
    decoded = decode_latents(vae, whole)
    monkeypatch.setattr(latent_vae, "PIXELS_AT_ONCE", 2 * 16 * 24)
    sizes = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(encode_pixels(vae, pixels), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_latents(vae, whole), decoded, atol=1e-5, rtol=1e-5)
    assert sizes == [2, 2, 1]


def test_autocast_and_gradients_stay_out(vae, pixels):
    vae.requires_grad_(True)
    expected = encode_pixels(vae, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        latents = encode_pixels(vae, pixels.requires_grad_())
        decoded = decode_latents(vae, latents)
    assert torch.equal(latents, expected) and latents.dtype == decoded.dtype == torch.float32
    assert torch.equal(decoded, decode_latents(vae, expected))
    assert not latents.requires_grad and not decoded.requires_grad


def test_half_precision_pixels_give_float32_latents(vae, pixels):
    latents = encode_pixels(vae, pixels.bfloat16())
    assert latents.dtype == torch.float32
    assert torch.equal(latents, encode_pixels(vae, pixels.bfloat16().float()))


def test_no_pictures_make_no_latents(vae):
    latents = encode_pixels(vae, torch.zeros(0, 3, 16, 8))
    assert latents.shape == (0, vae.config.latent_channels, 4, 2)
    assert decode_latents(vae, latents).shape == (0, 3, 16, 8)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_downsampling_is_what_the_encoder_does(blocks):
    kl = KL | {name: KL[name][:1] * blocks for name in ("block_out_channels", "down_block_types", "up_block_types")}
    tiny = TINY | {name: value[:1] * blocks for name, value in TINY.items() if isinstance(value, list)}
    for config in (kl, tiny):
        vae = build_vae(config)
        assert encode_pixels(vae, torch.zeros(1, 3, 16, 32)).shape[2:] == (
            16 // 2 ** (blocks - 1),
            32 // 2 ** (blocks - 1),
        )
        assert downsampling(config) == 2 ** (blocks - 1)


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_downsampling_without_blocks_is_that_of_diffusers_defaults(name):
    config = {"_class_name": name}
    vae = build_vae(config)
    assert encode_pixels(vae, torch.zeros(1, 3, 16, 16)).shape[-1] == 16 // downsampling(config)


def test_built_vae_is_frozen_and_of_the_named_class():
    for config, kind in ((KL, AutoencoderKL), (TINY, AutoencoderTiny)):
        vae = build_vae(config)
        assert type(vae) is kind and not vae.training and not any(p.requires_grad for p in vae.parameters())


@pytest.mark.parametrize("config", [{}, {"_class_name": "AutoencoderDC"}])
def test_other_autoencoders_are_refused(config):
    for function in (build_vae, downsampling):
        with pytest.raises(
            ValueError, match=f"_class_name={config.get('_class_name')!r}.*AutoencoderKL, AutoencoderTiny"
        ):
            function(config)


@pytest.mark.parametrize(("height", "width"), [(18, 24), (16, 23), (0, 16)])
def test_sides_that_do_not_divide_are_refused(vae, height, width):
    with pytest.raises(ValueError, match=f"{height} x {width} pixels.*multiples of 4"):
        encode_pixels(vae, torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 16, 16), torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)]
)
def test_what_is_no_batch_of_pixels_is_refused(vae, bad):
    with pytest.raises(ValueError, match=r"\[-1, 1\] of shape \(N, 3, H, W\)"):
        encode_pixels(vae, bad)


def test_latents_of_another_width_are_refused(vae):
    with pytest.raises(ValueError, match=rf"\(N, {vae.config.latent_channels}, h, w\)"):
        decode_latents(vae, torch.zeros(1, 7, 4, 4))


def test_fingerprint_follows_weights_and_configuration_and_nothing_else(vae, tmp_path):
    original = vae_fingerprint(vae)
    vae.save_pretrained(tmp_path / "vae")
    loaded = type(vae).from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    assert len(original) == 64 and vae_fingerprint(loaded) == original
    assert vae_fingerprint(loaded.to(memory_format=torch.channels_last)) == original
    loaded.register_to_config(scaling_factor=0.123)
    assert vae_fingerprint(loaded) != original
    next(vae.parameters()).data.view(-1)[0] += 1e-3
    assert vae_fingerprint(vae) != original


def test_fingerprint_does_not_depend_on_the_stored_dtype(vae, tmp_path):
    vae.half().save_pretrained(tmp_path / "half")
    vae.float().save_pretrained(tmp_path / "full")
    load = lambda name: type(vae).from_pretrained(tmp_path / name, torch_dtype=torch.float32)  # noqa: E731
    assert vae_fingerprint(load("half")) == vae_fingerprint(load("full"))


# -- the carried VAE --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def carried():
    return AutoencoderKL.from_pretrained(CARRIED, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def emoji():
    """emoji(split, step): every step-th picture of a split, in [-1, 1]."""
    from modeling_mot.image_tokenizer import ImageTokenizerConfig
    from training.tokenizers.pictures import Pictures
    from training.tokenizers.sources import carried_source, read_column_values

    def read(split, step):
        sources = list(read_column_values([carried_source("emoji", split)], ["image"], None, ()))[::step]
        pictures = list(Pictures(sources, ImageTokenizerConfig(image_size=[64, 64])))
        return torch.stack(pictures).float() / 127.5 - 1

    return read


def test_carried_vae_is_small_and_downsamples_8_times(carried):
    assert sum(path.stat().st_size for path in CARRIED.iterdir()) <= 5_500_000
    config = AutoencoderKL.load_config(CARRIED)
    assert downsampling(config) == 8 and config["latent_channels"] == 8
    assert "_name_or_path" not in config
    rebuilt = build_vae(config)
    rebuilt.load_state_dict(carried.state_dict())
    assert vae_fingerprint(rebuilt) == vae_fingerprint(carried)


def test_carried_latents_have_mean_0_and_deviation_1(carried, emoji):
    latents = encode_pixels(carried, emoji("train", 8))
    assert latents.mean().abs() < 0.05 and abs(latents.std() - 1) < 0.05
    deviations = latents.std((0, 2, 3))
    assert deviations.min() > 0.5 and deviations.max() < 2


def test_carried_vae_rebuilds_held_out_pictures(carried, emoji):
    pixels = emoji("validation", 3)
    latents = encode_pixels(carried, pixels)

    def psnr(latents):
        error = (decode_latents(carried, latents) - pixels).square().mean((1, 2, 3))
        return (10 * torch.log10(4 / error)).mean().item()

    # The best that averages of 8 x 8 pixels could do, for scale: it has no shapes left.
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(pixels, 8), scale_factor=8)
    blurred_psnr = (10 * torch.log10(4 / (blurred - pixels).square().mean((1, 2, 3)))).mean().item()
    assert psnr(latents) > blurred_psnr + 8 and psnr(latents) > 25.5
    # A diffusion model's latents are a little off: pictures must not fall apart at that.
    assert psnr(latents + 0.1 * torch.randn_like(latents)) > psnr(latents) - 1.5


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 72), (256, 256)])
def test_carried_vae_takes_other_sizes(carried, emoji, height, width):
    pixels = torch.nn.functional.interpolate(emoji("validation", 64), (height, width), mode="bilinear")
    latents = encode_pixels(carried, pixels)
    assert latents.shape == (len(pixels), 8, height // 8, width // 8)
    decoded = decode_latents(carried, latents)
    assert decoded.shape == pixels.shape and math.isfinite(decoded.sum())
    assert (decoded - pixels).abs().mean() < 0.15
