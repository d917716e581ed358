"""Noise, timesteps, schedulers and patchifiers against diffusers and closed forms."""

import math

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from modeling_mot.latent_images import NoiseSchedule, build_scheduler, draw_timesteps, position_table
from modeling_mot.modeling_mot_transfusion import (
    LinearPatchifier,
    TimestepEncoder,
    UNetPatchifier,
    cut_into_patches,
    join_patches,
)

from .naive_transfusion import BOS, EOS, image, tiny_config, tiny_model


# ------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_noise_and_targets_are_those_of_diffusers(schedule):
    latents, noise = torch.randn(5, 2, 4, 6), torch.randn(5, 2, 4, 6)
    timesteps = torch.tensor([0, 1, 400, 998, 999])
    theirs = diffusers.DDPMScheduler(1000, beta_schedule=schedule)
    for kind, target in (("epsilon", noise), ("v_prediction", theirs.get_velocity(latents, noise, timesteps))):
        ours = NoiseSchedule(tiny_config(noise_schedule=schedule, prediction_type=kind))
        torch.testing.assert_close(ours.noised(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps))
        torch.testing.assert_close(ours.target(latents, noise, timesteps), target)


def test_flow_is_a_straight_line_from_clean_to_noise():
    ours = NoiseSchedule(tiny_config(prediction_type="flow"))
    latents, noise, timesteps = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4), torch.tensor([0.0, 250, 999.5, 1000])
    for index, t in enumerate(timesteps / 1000):
        expected = (1 - t) * latents[index] + t * noise[index]
        torch.testing.assert_close(ours.noised(latents, noise, timesteps)[index], expected)
    assert torch.equal(ours.target(latents, noise, timesteps), noise - latents)


def test_a_model_in_half_precision_keeps_the_schedule():
    model = tiny_model()
    expected = model.noise_schedule.alphas_cumprod.clone()
    for moved in (model.to(torch.bfloat16), model.half(), model.float()):
        assert torch.equal(moved.noise_schedule.alphas_cumprod, expected)


# -------------------------------------------------------------------------------------------------------- timesteps


def draws(image_first=False, count=20000, **fields):
    generator = torch.Generator().manual_seed(0)
    return draw_timesteps(tiny_config(**fields), torch.full((count,), image_first), generator)


def assert_follows(values, quantile):
    """The sample's quantiles are those of the distribution, to three standard errors and the grain."""
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        below = (values.double() < quantile(share)).double().mean().item()
        assert abs(below - share) < 3 * math.sqrt(share * (1 - share) / len(values)) + 2e-3


def logit_normal(share):
    return torch.sigmoid(torch.special.ndtri(torch.tensor(share, dtype=torch.float64))).item()


def test_uniform_timesteps_are_all_of_them_equally_often():
    values = draws()
    assert values.dtype == torch.long and values.min() == 0 and values.max() == 999
    assert_follows(values, lambda share: 1000 * share)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_logit_normal_timesteps(kind):
    values = draws(prediction_type=kind, timestep_sampling="logit_normal")
    assert values.is_floating_point() == (kind == "flow")
    assert_follows(values, lambda share: 1000 * logit_normal(share))


def test_shift_moves_fractions_towards_noise():
    """BAGEL's s t / (1 + (s - 1) t) of a sigmoid of a normal draw."""
    values = draws(prediction_type="flow", timestep_sampling="logit_normal", timestep_shift=3.0)

    def shifted(share):
        t = logit_normal(share)
        return 1000 * 3 * t / (1 + 2 * t)

    assert_follows(values, shifted)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_images_that_come_first_keep_to_their_limit(kind):
    limited = draws(image_first=True, prediction_type=kind, image_first_max_timestep=500)
    assert limited.max() <= 500 and (kind == "flow" or limited.max() == 500)
    assert_follows(limited, lambda share: 500 * share)
    assert_follows(draws(prediction_type=kind, image_first_max_timestep=500), lambda share: 1000 * share)
    assert_follows(draws(image_first=True, prediction_type=kind), lambda share: 1000 * share)
    assert (draws(image_first=True, prediction_type=kind, image_first_max_timestep=0) == 0).all()


def test_an_image_is_first_where_text_follows_and_none_precedes():
    """As the data pipeline has it: an image whose caption was dropped is to be drawn from nothing, at all levels."""
    model = tiny_model(image_first_max_timestep=5)
    first = [BOS, *image(2, 2), *image(2, 2), 10, EOS]  # both of them
    after = [BOS, 10, *image(2, 2), 11, EOS]
    alone = [BOS, *image(2, 2), EOS]
    tokens = first + after + alone
    documents = torch.tensor([[0] * len(first) + [1] * len(after) + [2] * len(alone)])
    seen, embed = [], model.patchifier.embed
    model.patchifier.embed = lambda latents, timesteps: seen.append(timesteps) or embed(latents, timesteps)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        model(
            torch.tensor([tokens] * 8),
            document_ids=documents.expand(8, -1),
            latents=torch.randn(32, 2, 2, 2),
            generator=generator,
        )
    highest = torch.stack(seen).view(-1, 4).amax(0)
    assert (highest[:2] <= 5).all() and (highest[2:] > 500).all()
    padded = torch.tensor([[10, 11, *first]])  # what stands in the padding is no text
    mask = torch.tensor([[0, 0] + [1] * len(first)])
    seen.clear()
    model(padded, attention_mask=mask, latents=torch.randn(2, 2, 2, 2))
    assert seen[0].max() <= 5


def test_what_is_drawn_follows_from_the_generator():
    model, ids = tiny_model(), torch.tensor([[BOS, 10, *image(), EOS]])
    latents = torch.randn(1, 2, 4, 4)

    def prediction(seed):
        return model(ids, latents=latents, generator=torch.Generator().manual_seed(seed)).prediction

    assert torch.equal(prediction(0), prediction(0)) and not torch.equal(prediction(0), prediction(1))


# ------------------------------------------------------------------------------------------------------- schedulers


BY_NOISE = ["ddpm", "ddim", "dpm", "unipc", "euler", "heun"]
OF_FLOW = ["ddpm", "flow", "FlowMatchHeunDiscreteScheduler"]


@pytest.mark.parametrize(
    ("kind", "fields", "names"),
    [
        ("epsilon", {}, [*BY_NOISE, "EulerAncestralDiscreteScheduler", "DPMSolverSinglestepScheduler"]),
        ("epsilon", {"noise_schedule": "linear"}, BY_NOISE),
        ("epsilon", {"noise_schedule": "scaled_linear"}, BY_NOISE),
        ("v_prediction", {}, BY_NOISE),
        ("flow", {}, OF_FLOW),
        ("flow", {"timestep_shift": 3.0}, OF_FLOW),
    ],
)
def test_the_true_answer_recovers_the_latents_with_every_scheduler(kind, fields, names):
    """Fed with the noise (velocity, direction) that really is in what it has, a scheduler ends at the clean latents."""
    config = tiny_config(prediction_type=kind, **fields)
    latents = torch.randn(2, 2, 4, 4)
    for name in names:
        torch.manual_seed(0)
        scheduler = build_scheduler(config, name)
        scheduler.set_timesteps(20)
        if kind != "flow":
            torch.testing.assert_close(scheduler.alphas_cumprod, NoiseSchedule(config).alphas_cumprod)
        assert scheduler.timesteps[0] >= 999
        x = torch.randn_like(latents) * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            if kind == "flow":
                answer = (seen - latents) / (t / 1000)
            else:
                alpha = NoiseSchedule(config).alphas_cumprod[t.long()].double()
                noise = (seen - alpha.sqrt() * latents) / (1 - alpha).sqrt()
                answer = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
            x = scheduler.step(answer.float(), t, x).prev_sample
        # The last step of some ends at the first noise level.
        torch.testing.assert_close(x, latents, rtol=0, atol=0.05, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm", "euler"])
@pytest.mark.parametrize("steps", [25, 100])
def test_samplers_recover_from_errors_in_predicted_noise(name, steps):
    """Of normal latents the best answer is known; a model that is 5 % off it must still give about normal latents."""
    config, schedule = tiny_config(), NoiseSchedule(tiny_config())
    deviations = {}
    for bound in (6.0, math.inf):
        torch.manual_seed(0)
        scheduler = build_scheduler(config, name)
        scheduler.set_timesteps(steps)
        x = torch.randn(16, 2, 8, 8) * scheduler.init_noise_sigma
        error = 0.05 * torch.randn_like(x)
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(x, t)
            answer = (1 - schedule.alphas_cumprod[t.long()]).sqrt() * noisy + error
            x = scheduler.step(schedule.bounded(answer, noisy, t, bound), t, x).prev_sample
        deviations[bound] = x.std().item()
    assert 0.9 < deviations[6.0] < 1.15
    assert name == "ddpm" or deviations[math.inf] > 10  # what would become of it otherwise


def test_plausible_noise_is_left_as_it_is():
    latents, noise, t = torch.randn(1, 2, 4, 4).clamp(-3, 3), torch.randn(1, 2, 4, 4), torch.tensor(700)
    schedule = NoiseSchedule(tiny_config())
    noisy = schedule.noised(latents, noise, t.view(1))
    assert torch.equal(schedule.bounded(noise, noisy, t, 6.0), noise)
    velocity = NoiseSchedule(tiny_config(prediction_type="v_prediction"))
    assert torch.equal(velocity.bounded(100 * noise, noisy, t, 6.0), 100 * noise)


def test_sampling_begins_in_pure_noise_and_keeps_the_range():
    scheduler = build_scheduler(tiny_config(noise_schedule="linear", num_train_timesteps=500))
    assert scheduler.config.num_train_timesteps == 500 and scheduler.config.beta_schedule == "linear"
    assert scheduler.config.clip_sample is False
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 499
    assert type(build_scheduler(tiny_config(prediction_type="flow"))) is diffusers.FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize(
    ("fields", "name", "kwargs", "message"),
    [
        ({}, "dpmm", {}, "scheduler='dpmm' is unknown"),
        ({}, "DiffusionPipeline", {}, "scheduler='DiffusionPipeline' is unknown"),
        ({}, "flow", {}, "cannot sample a model of prediction_type='epsilon'"),
        ({"prediction_type": "flow"}, "ddim", {}, "cannot sample a model of prediction_type='flow'; take 'flow'"),
        ({}, "ddpm", {"clip_sampel": True}, "did you mean 'clip_sample'"),
    ],
)
def test_schedulers_that_cannot_be_are_refused(fields, name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_scheduler(tiny_config(**fields), name, **kwargs)


# ------------------------------------------------------------------------------------------------------ patchifiers


@pytest.mark.parametrize(("kind", "scale"), [("index", 1.0), ("fraction", 1 / 1000)])
def test_timestep_embedding_is_bagels(kind, scale):
    """Cosines first, period up to 10,000, of indices or of fractions; then two layers with SiLU."""
    encoder = TimestepEncoder(tiny_config(timestep_format=kind), width=12)
    first, second = encoder.mlp.linear_1, encoder.mlp.linear_2
    for t in (0.0, 1.0, 37.5, 999.0):
        angles = [t * scale * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        sinusoids = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        expected = second(torch.nn.functional.silu(first(sinusoids)))
        torch.testing.assert_close(encoder(torch.tensor([t]))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 5)])
def test_position_table_is_that_of_diffusers(height, width):
    if height == width:
        expected = get_2d_sincos_pos_embed(16, height, base_size=height, output_type="pt")
    else:  # theirs is for squares: rows and columns of a larger one
        square = get_2d_sincos_pos_embed(16, 5, base_size=5, output_type="pt").view(5, 5, 16)
        expected = square[:height, :width].flatten(0, 1)
    torch.testing.assert_close(position_table(height, width, 16), expected.float(), rtol=1e-5, atol=1e-6)


def test_patches_are_rows_columns_channels_and_join_again():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = cut_into_patches(latents, 2)
    for n in range(2):
        for row in range(2):
            for column in range(3):
                block = latents[n, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                assert torch.equal(patches[n, 3 * row + column], block.permute(1, 2, 0).flatten())
    assert torch.equal(join_patches(patches, 2, 4, 6), latents)


def test_linear_patchifier_with_inverse_layers_gives_the_latents_back():
    """The identity path: without noise and time, what goes in comes out."""
    patchifier = LinearPatchifier(tiny_config(hidden_size=8, num_attention_heads=1, num_key_value_heads=1)).double()
    patchifier.time_encoder.mlp.linear_2.weight.data.zero_(), patchifier.time_encoder.mlp.linear_2.bias.data.zero_()
    patchifier.proj_out.weight.data = torch.linalg.inv(patchifier.proj_in.weight.data)
    patchifier.proj_out.bias.data = -patchifier.proj_out.weight.data @ patchifier.proj_in.bias.data
    latents = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    tokens, features = patchifier.embed(latents, torch.zeros(3))
    torch.testing.assert_close(patchifier.predict(tokens, features, 4, 6), latents)


@pytest.mark.parametrize(("channels", "patch_size", "layers"), [([8, 16], 2, 1), ([8, 12, 16], 4, 2), ([8], 1, 2)])
def test_unet_patchifier_is_diffusers_unet_with_the_transformer_in_its_middle(channels, patch_size, layers):
    """With a middle that changes nothing it is a UNet2DModel without a middle block and without attention."""
    config = tiny_config(
        patchifier="unet", hidden_size=16, num_attention_heads=2, num_key_value_heads=2, unet_channels=channels,
        patch_size=patch_size, unet_layers=layers, latent_size=[8, 8],
    )  # fmt: skip
    ours = UNetPatchifier(config)
    theirs = diffusers.UNet2DModel(
        in_channels=2, out_channels=2, block_out_channels=channels, layers_per_block=layers, mid_block_type=None,
        down_block_types=["DownBlock2D"] * len(channels), up_block_types=["UpBlock2D"] * len(channels),
        norm_num_groups=4, norm_eps=1e-6, flip_sin_to_cos=True, freq_shift=0,
    )  # fmt: skip
    names = {"time_embedding": "time_encoder.mlp", "conv_norm_out": "norm_out"}
    own = ours.state_dict()
    theirs.load_state_dict(
        {
            name: own[next((name.replace(a, b) for a, b in names.items() if a in name), name)]
            for name in theirs.state_dict()
        }
    )
    middle = torch.randn(channels[-1], 16)  # hidden states from which proj_out makes the features again
    ours.proj_out.weight.data, ours.proj_out.bias.data = middle, torch.zeros(channels[-1])
    for height, width in ((8, 8), (4, 8)):
        latents, timesteps = torch.randn(3, 2, height, width), torch.tensor([0, 17, 999])
        tokens, kept = ours.embed(latents, timesteps)
        features = kept[0][-1]
        hidden_states = features.flatten(2).transpose(1, 2) @ torch.linalg.pinv(middle).T
        expected = theirs(latents, timesteps).sample
        torch.testing.assert_close(ours.predict(hidden_states, kept, height, width), expected, rtol=1e-4, atol=1e-4)
        normed = torch.nn.functional.silu(
            torch.nn.functional.group_norm(features, 4, ours.norm_in.weight, ours.norm_in.bias)
        )
        assert tokens.shape == (3, height * width // patch_size**2, 16)
        for place, token in enumerate(tokens[1]):
            row, column = divmod(place, width // patch_size)
            torch.testing.assert_close(token, ours.proj_in(normed[1, :, row, column]), rtol=1e-4, atol=1e-5)


def test_patchifiers_keep_the_initialization_of_diffusers():
    """The transformer's, for layers with a residual stream around them, would leave next to nothing of an image."""
    for patchifier in ("linear", "unet"):
        config = tiny_config(patchifier=patchifier, initializer_range=1e-4)
        model = tiny_model(patchifier=patchifier, initializer_range=1e-4)
        alone = {"linear": LinearPatchifier, "unet": UNetPatchifier}[patchifier](config)
        assert model.lm_head.weight.std() < 2e-4
        for (name, ours), theirs in zip(model.patchifier.named_parameters(), alone.parameters()):
            if ours.dim() > 1:
                ratio = (ours.std() / theirs.std()).item()
                assert 0.6 < ratio < 1.6, name
