"""Flow matching as the families use it: times of training, times of sampling, solvers, direction and prediction."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from modeling_mot.latent_images import NoiseSchedule, build_scheduler, draw_timesteps, noise_shares, set_times
from modeling_mot.modeling_mot_transfusion import TimestepEncoder

from .naive_transfusion import BOI, BOS, EOS, image, tiny_config, tiny_model
from .test_transfusion_diffusion import assert_follows


COUNT = 20000


def draws(sizes=None, **fields):
    """Fractions t of 20,000 images."""
    config = tiny_config(**({"prediction_type": "flow"} | fields))
    generator = torch.Generator().manual_seed(0)
    return draw_timesteps(config, torch.zeros(COUNT, dtype=torch.bool), generator, sizes=sizes) / 1000


# -------------------------------------------------------------------------------------------------- times of training


def test_beta_times_are_pi0s():
    """Beta(1.5, 1), whose quantiles are q^(2/3), spread over [0.001, 1]."""
    values = draws(
        timestep_sampling="beta", timestep_sampling_parameters=[1.5, 1.0], timestep_range=[0.001, 1.0],
    )  # fmt: skip
    assert values.min() >= 0.001 and values.max() <= 1
    assert_follows(values, lambda share: 0.999 * share ** (1 / 1.5) + 0.001)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_beta_times_follow_both_parameters(kind):
    """The distribution function of Beta(2, 3) is 6 t^2 - 8 t^3 + 3 t^4; its values at the draws are uniform."""
    values = draws(prediction_type=kind, timestep_sampling="beta", timestep_sampling_parameters=[2, 3]).double()
    assert_follows(6 * values**2 - 8 * values**3 + 3 * values**4, lambda share: share)


def test_logit_normal_times_have_a_mean_and_a_deviation():
    values = draws(timestep_sampling="logit_normal", timestep_sampling_parameters=[-0.8, 0.5])
    normal = torch.distributions.Normal(-0.8, 0.5)
    assert_follows(values, lambda share: torch.sigmoid(normal.icdf(torch.tensor(share))).item())


def test_images_are_shifted_by_their_sizes():
    """Two pairs are the two ends of FLUX's line, on which diffusers finds the shift of an image."""
    pairs = [[256, math.exp(0.5)], [4096, math.exp(1.15)]]
    config = tiny_config(prediction_type="flow", timestep_shift=pairs)
    for size in ((32, 32), (64, 32), (128, 128), (8, 8), (200, 160)):
        assert config.shift_of(*size) == pytest.approx(math.exp(calculate_shift(config.image_length(*size))))
    sizes = [(8, 8), (128, 128)]
    values = draws(sizes * (COUNT // 2), timestep_shift=pairs)
    for mine, size in zip((values[::2], values[1::2]), sizes):
        shift = config.shift_of(*size)
        assert_follows(mine, lambda share, shift=shift: shift * share / (1 + (shift - 1) * share))


def test_a_shift_by_size_passes_through_all_its_pairs():
    """As Cosmos 3 has it: 3, 5 and 10 for pictures of three sizes."""
    config = tiny_config(prediction_type="flow", timestep_shift=[[400, 5.0], [64, 3], [900, 10.0]])
    assert [config.shift_of(side, side) for side in (16, 40, 60)] == pytest.approx([3, 5, 10])
    assert 3 < config.shift_of(30, 30) < 5 < config.shift_of(50, 50) < 10
    one = tiny_config(prediction_type="flow", timestep_shift=[[64, 3.0]])
    assert one.shift_of(4, 4) == one.shift_of(40, 40) == 3
    assert type(config).from_dict(config.to_dict()).shift_of(40, 40) == pytest.approx(5)


def test_a_forward_draws_by_the_sizes_of_its_images():
    model = tiny_model(prediction_type="flow", timestep_shift=[[1, 1e-4], [4, 1e4]])
    ids = torch.tensor([[BOS, 10, *image(2, 2), 11, *image(4, 4), EOS]])
    seen, embed = {}, model.patchifier.embed
    model.patchifier.embed = lambda x, t: seen.update({x.shape[-1]: t}) or embed(x, t)
    model(ids, latents=torch.randn(2, 2, 4, 4), image_sizes=[(2, 2), (4, 4)])
    assert seen[2] < 10 and seen[4] > 990


# -------------------------------------------------------------------------------------------------- times of sampling


def times_of(spacing, count, name="flow", shift=1.0, **kwargs):
    config = tiny_config(prediction_type="flow")
    scheduler = build_scheduler(config, name, shift, **kwargs)
    set_times(scheduler, spacing, count)
    return scheduler


def test_points_are_bagels_times():
    """Five points are four steps; `times` of the original are [1.0, 0.9, 0.75, 0.5, 0.0] for shift 3."""
    scheduler = times_of("points", 5, shift=3.0)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), rtol=0, atol=1e-7)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000, 900, 750, 500.0]))


def test_steps_are_pi0s_times():
    """Ten evaluations at 1, 0.9, ..., 0.1, and steps of 0.1."""
    scheduler = times_of("steps", 10)
    expected = torch.tensor([1 - step / 10 for step in range(11)])
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=0, atol=1e-7)
    assert len(scheduler.timesteps) == 10


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_levels_are_those_of_cosmos_3(shift):
    """Its pipeline hands these times to UniPC."""
    theirs = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    theirs.set_timesteps(35, sigmas=np.linspace(1 - 1 / 1000, 0.0, 36)[:-1])
    ours = times_of("levels", 35, "unipc", shift)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)


def test_without_a_spacing_schedulers_keep_their_times():
    for name, theirs in {
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "unipc": diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, use_karras_sigmas=True
        ),
    }.items():
        theirs.set_timesteps(7)
        ours = times_of("scheduler", 7, name, 3.0, **({"use_karras_sigmas": True} if name == "unipc" else {}))
        assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("spacing", ["scheduler", "steps", "points", "levels"])
@pytest.mark.parametrize("kind", ["flow", "flow_sample"])
def test_the_true_answer_recovers_the_latents_with_every_solver(kind, spacing):
    """Fed with the direction, or the clean latents, that really are in what it has."""
    config = tiny_config(prediction_type=kind, timestep_shift=3.0)
    schedule, latents = NoiseSchedule(config), torch.randn(2, 2, 4, 4)
    solvers = (
        ["flow", "unipc"] if spacing != "scheduler" else ["flow", "unipc", "dpm", "FlowMatchHeunDiscreteScheduler"]
    )
    for name in solvers:
        scheduler = build_scheduler(config, name)
        set_times(scheduler, spacing, 20)
        x = torch.randn_like(latents)
        for share, t in zip(noise_shares(scheduler, config), scheduler.timesteps, strict=True):
            answer = latents if kind == "flow_sample" else (x - latents) / share
            x = scheduler.step(schedule.velocity(answer, x, share), t, x).prev_sample
        torch.testing.assert_close(x, latents, rtol=0, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("name", "kind", "spacing", "count", "message"),
    [
        ("dpm", "flow", "steps", 4, "time_spacing='steps' needs .* not DPMSolverMultistepScheduler"),
        ("unipc", "epsilon", "steps", 4, "needs a scheduler of flow matching .* not UniPCMultistepScheduler"),
        ("euler", "epsilon", "points", 4, "not EulerDiscreteScheduler"),
        ("flow", "flow", "points", 1, "time_spacing='points' with num_inference_steps=1: .* at least 2"),
    ],
)
def test_spacings_that_cannot_be_are_refused(name, kind, spacing, count, message):
    with pytest.raises(ValueError, match=message):
        set_times(build_scheduler(tiny_config(prediction_type=kind), name), spacing, count)


def test_generate_takes_spacing_and_shift():
    """The shift of the call, or else that of the picture's size."""
    model = tiny_model(prediction_type="flow", timestep_shift=[[4, 3.0], [8, 5.0]], caption_dropout=0.1)

    def times(**kwargs):
        seen = []
        model.generate(
            torch.tensor([[BOS, 10, BOI]]), generation_mode="image", num_inference_steps=5, time_spacing="points",
            callback_on_step_end=lambda model, step, t, state: seen.append(t.item()), **kwargs,
        )  # fmt: skip
        return seen

    linear = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    for kwargs, shift in (({}, 3), ({"image_size": [8, 4]}, 5), ({"timestep_shift": 2.0}, 2)):
        expected = 1000 * shift * linear / (1 + (shift - 1) * linear)
        assert times(**kwargs) == pytest.approx(expected.tolist(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("format", ["index", "fraction"])
def test_time_may_count_towards_clean_latents(format):
    fields = {"prediction_type": "flow", "timestep_format": format}
    towards_noise, towards_clean = (
        TimestepEncoder(tiny_config(**fields, timestep_direction=direction), width=12)
        for direction in ("noise", "clean")
    )
    towards_clean.load_state_dict(towards_noise.state_dict())
    levels = torch.tensor([0.0, 1.0, 250.0, 999.5, 1000.0])
    torch.testing.assert_close(towards_clean(levels), towards_noise(1000 - levels))
