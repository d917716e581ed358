"""The command that trains a VAE: what it learns, what it writes, what it refuses."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from modeling_mot.latent_vae import build_vae, decode_latents, downsampling, encode_pixels
from training.tokenizers import vae as command
from training.tokenizers.pictures import compare_pictures, save_sheet
from training.tokenizers.vae_training import (
    MuonAdamW,
    VAETrainingConfig,
    normal_divergence,
    scale_latents,
    train_vae,
)


SMALL = ["--image-size", "16", "--channels", "8", "16", "--latent-channels", "4", "--batch-size", "4"]


def boxes(count=12):
    generator = np.random.default_rng(0)
    for _ in range(count):
        picture = np.full((16, 16, 3), 255, np.uint8)
        top, left = generator.integers(0, 8, 2)
        picture[top : top + 8, left : left + 8] = generator.integers(0, 200, 3)
        yield picture


@pytest.fixture
def picture_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index, picture in enumerate(boxes()):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{index}.png")
    return tmp_path / "pictures"


def small_vae():
    arguments = command.build_parser().parse_args(["--output", "x", *SMALL])
    return build_vae(command.vae_config(arguments))


def test_divergence_equals_that_of_torch():
    mean, logvar = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(normal_divergence(mean, logvar), expected)


def test_kernels_take_orthogonal_steps_and_the_rest_those_of_adamw():
    model = torch.nn.Sequential(torch.nn.Conv2d(12, 16, 3), torch.nn.GroupNorm(4, 16), torch.nn.Conv2d(16, 3, 1))
    model.to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reference = {name: torch.nn.Parameter(p.clone()) for name, p in before.items() if name != "0.weight"}
    adamw = torch.optim.AdamW(reference.values(), lr=0.5 * 1e-2, betas=(0.9, 0.98), weight_decay=1e-4)
    optimizer = MuonAdamW(model, lr=1e-2, matrix_lr=0.2)
    for name, parameter in model.named_parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)  # small: clipping changes nothing
        if name in reference:
            reference[name].grad = parameter.grad.clone()
    gradient = model[0].weight.grad.flatten(1)
    optimizer.step(0.5)
    adamw.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        if name in reference:
            torch.testing.assert_close(parameter, reference[name])
    # Muon's step is U V^T of the gradient's singular vectors, roughly: its values lie around 1.
    step = (before["0.weight"] - model[0].weight.detach()).flatten(1) / (0.5 * 0.2)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    values = (left.T @ step @ right.T).diagonal()
    assert values.min() > 0.5 and values.max() < 1.4
    torch.testing.assert_close(left * values @ right, step, atol=0.1, rtol=0)


def test_a_model_in_another_memory_format_is_refused():
    with pytest.raises(ValueError, match="channels_last"):
        MuonAdamW(torch.nn.Conv2d(16, 16, 3), lr=1e-2, matrix_lr=1e-2)


def test_training_lowers_the_error_and_freezes():
    vae, pictures = small_vae(), [torch.from_numpy(p).permute(2, 0, 1) for p in boxes()]
    pixels = torch.stack(pictures).float() / 127.5 - 1

    def error():
        return (decode_latents(vae, encode_pixels(vae, pixels)) - pixels).abs().mean().item()

    before = error()
    figures = train_vae(vae, pictures, VAETrainingConfig(steps=120, batch_size=8, bf16=False), log=lambda line: None)
    assert error() < 0.4 * before and figures["steps"] == 120
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())


def test_a_strong_pull_brings_the_posterior_to_a_standard_normal():
    vae, pictures = small_vae(), [torch.from_numpy(p).permute(2, 0, 1) for p in boxes()]
    train_vae(vae, pictures, VAETrainingConfig(steps=60, batch_size=8, bf16=False, kl=1e3), log=lambda line: None)
    with torch.no_grad():
        posterior = vae.encode(torch.stack(pictures).float() / 127.5 - 1).latent_dist
    assert posterior.mean.abs().mean() < 0.1 and (posterior.var - 1).abs().mean() < 0.1


def test_training_is_the_same_twice():
    pictures = [torch.from_numpy(p).permute(2, 0, 1) for p in boxes()]
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        vae = small_vae()
        train_vae(vae, pictures, VAETrainingConfig(steps=3, batch_size=4), log=lambda line: None)
        weights.append(torch.cat([p.flatten() for p in vae.parameters()]))
    assert torch.equal(*weights)


def test_latents_are_scaled_to_mean_0_and_deviation_1():
    vae, pictures = small_vae(), [torch.from_numpy(p).permute(2, 0, 1) for p in boxes()]
    vae.register_to_config(shift_factor=3.0, scaling_factor=0.01)  # of an earlier scaling: without effect
    figures = scale_latents(vae, pictures)
    latents = encode_pixels(vae, torch.stack(pictures).float() / 127.5 - 1)
    assert latents.mean().abs() < 1e-5 and latents.std() == pytest.approx(1, abs=1e-5)
    assert figures["channel_deviations"] == pytest.approx(latents.std((0, 2, 3)).tolist(), abs=1e-3)


def test_psnr_and_nearest_are_their_definitions():
    originals = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    rebuilt = (originals.int() + torch.randint(-20, 20, originals.shape)).clamp(0, 255).to(torch.uint8)
    rebuilt[4] = originals[3]
    errors = ((rebuilt.double() - originals.double()) ** 2).mean((1, 2, 3))
    figures = compare_pictures(rebuilt, originals)
    assert figures["psnr"] == pytest.approx((10 * torch.log10(255**2 / errors)).mean().item(), abs=0.01)
    assert figures["nearest_is_original"] == 0.8
    assert np.isfinite(compare_pictures(originals, originals)["psnr"])


def test_sheet_shows_every_picture_above_its_reconstruction(tmp_path):
    originals = [np.full((2, 2, 3), value, np.uint8) for value in range(20)]
    save_sheet(originals, [picture + 100 for picture in originals], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (8, 32, 3)
    assert sheet[0, ::2, 0].tolist() == list(range(16)) and sheet[2, ::2, 0].tolist() == list(range(100, 116))
    assert sheet[6, ::2, 0].tolist() == [116, 117, 118, 119] + [255] * 12


def test_command_trains_and_its_folder_loads(picture_folder, tmp_path):
    arguments = ["--source", str(picture_folder), "--held-out", str(picture_folder), "--output", str(tmp_path / "out")]
    figures = command.main([*arguments, *SMALL, "--steps", "4", "--sheet", str(tmp_path / "sheet.png")])
    assert {path.name for path in tmp_path.iterdir()} == {"out", "pictures", "sheet.png"}
    assert figures["train"] == figures["held_out"] and figures["train"]["pictures"] == 12 and figures["steps"] == 4

    vae = AutoencoderKL.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert downsampling(AutoencoderKL.load_config(tmp_path / "out")) == 2
    pixels = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in boxes()]).float() / 127.5 - 1
    latents = encode_pixels(vae, pixels)
    # Statistics and figures are those of the weights as they were stored.
    assert latents.shape == (12, 4, 8, 8) and latents.mean().abs() < 1e-4 and abs(latents.std() - 1) < 1e-4
    rebuilt = ((decode_latents(vae, latents) + 1) * 127.5).round()
    assert compare_pictures(rebuilt, (pixels + 1) * 127.5) == figures["train"]


def test_trained_vae_takes_other_sizes(picture_folder, tmp_path):
    command.main(["--source", str(picture_folder), "--output", str(tmp_path / "out"), *SMALL, "--steps", "1"])
    vae = AutoencoderKL.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert decode_latents(vae, encode_pixels(vae, torch.zeros(1, 3, 48, 20))).shape == (1, 3, 48, 20)


def test_existing_output_is_not_overwritten_unless_asked(picture_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    arguments = ["--source", str(picture_folder), "--output", str(tmp_path / "out"), *SMALL, "--steps", "1"]
    with pytest.raises(SystemExit, match="--overwrite"):
        command.main(arguments)
    assert (tmp_path / "out" / "precious").read_text() == "x"
    command.main([*arguments, "--overwrite"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--image-size", "17"], "17 x 17 pixels.*multiples of 2"),
        (["--channels", "8", "12"], "--channels 12 is no multiple of 8"),
        (["--held-out", "nowhere/at/all"], "nowhere"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(picture_folder, tmp_path, extra, message):
    with pytest.raises(SystemExit, match=message):
        command.main(["--source", str(picture_folder), "--output", str(tmp_path / "out"), *SMALL, *extra])
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_is_named(picture_folder, tmp_path):
    (picture_folder / "0.png").write_bytes(b"x")
    with pytest.raises(SystemExit, match="does not decode: .*0.png"):
        command.main(["--source", str(picture_folder), "--output", str(tmp_path / "out"), *SMALL])
    assert not (tmp_path / "out").exists()


def test_every_option_is_explained():
    assert all(action.help for action in command.build_parser()._actions)
