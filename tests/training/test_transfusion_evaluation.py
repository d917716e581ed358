"""Held-out losses of a Transfusion model, what it draws, reads and edits at the end of a run, and how near that is."""

import hashlib
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from modeling_mot import MoTTransfusionModel
from modeling_mot.image_tokenizer import ImageTokenizerConfig
from training.data import collate
from training.data.documents import IGNORED, build_row, compose
from training.evaluation.edits import Edit
from training.evaluation.end_of_run import describe_measures, make_samples
from training.evaluation.fidelity import mean_psnr, psnr
from training.evaluation.losses import batches_at_levels, evaluate_losses, noise_levels, target_objective
from training.evaluation.sampling import Sampler
from training.evaluation.subjects import NamedPicture, SampleSubjects
from training.recipe import EvaluationConfig, SamplesConfig

from .data.conftest import continuous, small_transfusion, small_vae
from .tiny_transfusion import ROW_LENGTH, VOCABULARY, generator_of_row, picture_tokens, tiny_config, tiny_model


# ------------------------------------------------------------------------------------------------------------- losses


def held_out_row(direction: str, index: int) -> dict:
    """Two documents of a direction, targets on the last segment alone."""
    random, documents = np.random.default_rng([len(direction), index]), []
    for length in random.integers(2, 5, size=2):
        text, image = 10 + random.integers(6, size=length), random.standard_normal((2, 4, 4)).astype(np.float16)
        spans = {"text": [text], "text-to-image": [text, picture_tokens()], "image-to-text": [picture_tokens(), text]}
        images = [] if direction == "text" else [image]
        document = compose(spans[direction], images, VOCABULARY, targets="last")
        if direction == "text-to-image":
            document.labels[VOCABULARY.modality_ids(document.ids) == 0] = IGNORED
        documents.append(document)
    return build_row(documents, ROW_LENGTH, VOCABULARY)


ROWS = {
    name: [held_out_row(name, index) for index in range(count)]
    for name, count in (("image-to-text", 2), ("text-to-image", 5), ("text", 3))
}


def evaluate(model, batch_rows=2, seed="held out", rows=ROWS, levels=0, accelerator=None):
    AcceleratorState._reset_state(reset_partial_state=True)
    together = partial(collate, config=model.config, noise_seed=seed)
    config = EvaluationConfig(batch_rows=batch_rows, noise_levels=levels)
    return evaluate_losses(model.eval(), rows, together, config, accelerator or Accelerator(cpu=True))


def test_each_direction_has_the_loss_of_its_target():
    names = ("text-to-image", "image+text-to-image", "image-to-text", "text")
    objectives = [target_objective(name, tiny_config()) for name in names]
    assert objectives == ["image_diffusion", "image_diffusion", "text", "text"]
    figures = evaluate(tiny_model())
    keys = {"loss_text", "perplexity_text", "loss_image_diffusion"} | {f"{name}/loss" for name in ROWS}
    assert set(figures) == {f"eval/{key}" for key in keys}


def test_the_diffusion_loss_is_the_mean_over_elements_at_fixed_noise_levels_and_noise():
    model = tiny_model(prediction_type="v_prediction").eval()
    errors = []
    for place, row in enumerate(ROWS["text-to-image"]):
        generator = generator_of_row("held out", len(ROWS["image-to-text"]) + place)
        levels = (torch.rand(2, generator=generator) * 1000).long()
        noise = torch.stack([torch.randn(2, 4, 4, generator=generator) for _ in range(2)])
        latents = torch.stack([torch.from_numpy(image["values"]).float() for image in row["images"]])
        inputs = {name: torch.from_numpy(row[name])[None] for name in ("input_ids", "position_ids", "document_ids")}
        with torch.no_grad():
            prediction = model(**inputs, latents=latents, timesteps=levels, noise=noise).prediction
        share = model.noise_schedule.alphas_cumprod[levels].view(-1, 1, 1, 1)
        velocity = share.sqrt() * noise - (1 - share).sqrt() * latents
        errors.extend((prediction - velocity).square().flatten().tolist())
    figures = evaluate(model)
    assert figures["eval/loss_image_diffusion"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert figures["eval/text-to-image/loss"] == figures["eval/loss_image_diffusion"]


def test_two_evaluations_are_of_the_same_noisy_images_whatever_was_drawn_between():
    model = tiny_model()
    once = evaluate(model)
    torch.rand(7)
    assert evaluate(model) == once


@pytest.mark.parametrize("variant", ["mot", "dense"])
def test_held_out_losses_do_not_depend_on_the_batch(variant):
    model = tiny_model(variant)
    figures = [evaluate(model, batch_rows=size) for size in (1, 3, 8)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) and figures[0] == pytest.approx(figures[2], rel=1e-5)


def test_reading_sees_clean_images_and_drawing_noisy_ones():
    model = tiny_model()
    one, other = evaluate(model, seed="held out"), evaluate(model, seed="another")
    assert one["eval/loss_image_diffusion"] != pytest.approx(other["eval/loss_image_diffusion"], rel=1e-3)
    for key in ("eval/image-to-text/loss", "eval/text/loss", "eval/loss_text", "eval/perplexity_text"):
        assert one[key] == other[key]
    # That of reading depends on the picture, though.
    blank = [
        {**row, "images": [{**i, "values": 0 * i["values"]} for i in row["images"]]} for row in ROWS["image-to-text"]
    ]
    assert (
        evaluate(model, rows=ROWS | {"image-to-text": blank})["eval/image-to-text/loss"]
        != one["eval/image-to-text/loss"]
    )


def test_perplexity_is_the_exponential_of_the_loss_of_text():
    figures = evaluate(tiny_model())
    assert figures["eval/perplexity_text"] == pytest.approx(math.exp(figures["eval/loss_text"]), rel=1e-9)
    model, counts = tiny_model().eval(), []
    with torch.no_grad():
        for row in (*ROWS["image-to-text"], *ROWS["text"]):
            batch = collate([row], model.config, noise_seed=0, row_numbers=[0])
            log_probabilities = model(**batch).logits[0].log_softmax(-1)
            for place in range(1, ROW_LENGTH):
                if row["labels"][place] != -100:
                    counts.append(-log_probabilities[place - 1, row["labels"][place]].item())
    assert figures["eval/loss_text"] == pytest.approx(np.mean(counts), rel=1e-5)


# ------------------------------------------------------------------------------------ diffusion at fixed noise levels

VALIDATION = "eval/text-to-image/diffusion_validation_loss"


def naive_losses_at_levels(model, levels, rows) -> list[float]:
    """Row by row and level by level, each image with the noise of its own digest."""
    losses = []
    for level in levels:
        errors = []
        for row in rows:
            latents = torch.stack([torch.from_numpy(image["values"]).float() for image in row["images"]])
            noise = []
            for image in row["images"]:
                values = image["values"]
                digest = hashlib.sha256(f"{values.shape} {values.dtype} ".encode() + values.tobytes()).hexdigest()
                words = f"diffusion validation/{digest}"
                seed = int(hashlib.sha256(words.encode()).hexdigest()[:14], 16)
                noise.append(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed)))
            noise, timesteps = torch.stack(noise), torch.full((len(latents),), level)
            inputs = {name: torch.from_numpy(row[name])[None] for name in ("input_ids", "position_ids", "document_ids")}
            with torch.no_grad():
                prediction = model(**inputs, latents=latents, timesteps=timesteps, noise=noise).prediction
            kind = model.config.prediction_type
            target = {"flow": noise - latents, "flow_sample": latents}.get(kind, noise)
            divisor = level / 1000 if kind == "flow_sample" else 1
            errors.extend(((prediction - target) / divisor).square().flatten().tolist())
        losses.append(np.mean(errors))
    return losses


@pytest.mark.parametrize(
    ("fields", "levels"),
    [
        ({}, [125, 375, 625, 875]),
        ({"prediction_type": "flow"}, [125.0, 375.0, 625.0, 875.0]),
        ({"prediction_type": "flow_sample"}, [125.0, 375.0, 625.0, 875.0]),
    ],
)
def test_the_diffusion_validation_loss_is_the_mean_over_fixed_evenly_spaced_levels(fields, levels):
    model = tiny_model(**fields).eval()
    assert noise_levels(model.config, 4) == levels
    expected = naive_losses_at_levels(model, levels, ROWS["text-to-image"])
    figures = evaluate(model, levels=4)
    assert figures[VALIDATION] == pytest.approx(np.mean(expected), rel=1e-5)
    at_levels = [figures[f"{VALIDATION}@{int(level)}"] for level in levels]
    assert at_levels == pytest.approx(expected, rel=1e-5)
    assert len(set(np.round(at_levels, 4))) == 4
    # It stands beside the other figures and changes none of them.
    assert {key: value for key, value in figures.items() if VALIDATION not in key} == evaluate(model)


class OneOfTwo:
    """A rank of two that adds nothing of the other."""

    device, num_processes, autocast = torch.device("cpu"), 2, nullcontext

    def __init__(self, rank, others=0):
        self.process_index, self.others = rank, others

    def reduce(self, sums):
        self.sums = sums
        return sums + self.others


def test_the_diffusion_validation_loss_depends_on_no_batch_order_seed_or_number_of_processes():
    model, names = tiny_model(), [VALIDATION, *(f"{VALIDATION}@{level}" for level in (166, 500, 833))]
    once = [evaluate(model, levels=3)[name] for name in names]
    backwards = {name: rows[::-1] for name, rows in reversed(ROWS.items())}
    for options in ({"batch_rows": 1}, {"batch_rows": 8}, {"seed": 5}, {"rows": backwards}):
        assert [evaluate(model, levels=3, **options)[name] for name in names] == pytest.approx(once, rel=1e-5)
    first = OneOfTwo(0)
    evaluate(model, levels=3, accelerator=first)
    both = evaluate(model, levels=3, accelerator=OneOfTwo(1, first.sums))
    assert [both[name] for name in names] == pytest.approx(once, rel=1e-5)


def test_all_models_are_measured_on_the_same_noisy_images():
    rows, seen = ROWS["text-to-image"], []
    for fields in ({"variant": "mot"}, {"variant": "dense"}, {"prediction_type": "v_prediction"}):
        model = tiny_model(**fields)
        batch = collate(rows, model.config, noise_seed="any", row_numbers=range(len(rows)))
        seen.append(list(batches_at_levels(rows, batch, model.config, noise_levels(model.config, 8))))
    for batches in seen[1:]:
        for batch, other in zip(seen[0], batches, strict=True):
            assert torch.equal(batch["noise"], other["noise"])
            assert torch.equal(batch["timesteps"], other["timesteps"])
    noises = seen[0][0]["noise"].flatten(1)
    assert len(noises.unique(dim=0)) == len(noises)


def test_a_picture_that_is_given_stays_clean_at_every_level():
    model, rows = tiny_model(), ROWS["image-to-text"]
    batch = collate(rows, model.config, noise_seed=0, row_numbers=range(len(rows)))
    for noised in batches_at_levels(rows, batch, model.config, [500]):
        assert not noised["timesteps"].any() and not noised["noise"].any()
    assert not any("image-to-text/diffusion" in key for key in evaluate(model, levels=2))


# ---------------------------------------------------------------------------------------------------------- fidelity


def test_psnr_is_plain_arithmetic():
    random = np.random.default_rng(0)
    one, other = (random.integers(0, 256, (5, 7, 3)).astype(np.uint8) for _ in range(2))
    total = 0
    for y in range(5):
        for x in range(7):
            for channel in range(3):
                total += (int(one[y, x, channel]) - int(other[y, x, channel])) ** 2
    expected = 10 * math.log10(255**2 / (total / 105))
    found = psnr(Image.fromarray(one), Image.fromarray(other), ImageTokenizerConfig())
    assert found == pytest.approx(expected, rel=1e-12)


def test_psnr_of_identical_pictures_is_capped_below_any_difference():
    picture = Image.new("RGB", (4, 4), (10, 20, 30))
    off = picture.copy()
    off.putpixel((0, 0), (11, 20, 30))
    same, differs = (psnr(other, picture, ImageTokenizerConfig()) for other in (picture, off))
    assert math.isfinite(same) and same == pytest.approx(differs) == pytest.approx(10 * math.log10(255**2 * 48))


def test_originals_are_fitted_to_the_drawn_picture_as_the_processor_does():
    original = Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    cut = original.crop((16, 0, 80, 64))
    small = cut.resize((16, 16), Image.Resampling.BICUBIC)
    assert psnr(cut, original, ImageTokenizerConfig()) > 80
    # Scaling, then cutting, differs at the edges of the cut alone.
    assert psnr(small, original, ImageTokenizerConfig()) > 35 > psnr(small, original.rotate(90), ImageTokenizerConfig())


def test_the_mean_is_over_the_pictures_own_ratios():
    blacks, greys = [Image.new("RGB", (4, 4), "black")] * 2, [Image.new("RGB", (4, 4), (v, v, v)) for v in (5, 50)]
    expected = np.mean([20 * math.log10(255 / value) for value in (5, 50)])
    assert mean_psnr(blacks, greys, ImageTokenizerConfig()) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ samples


@pytest.fixture(scope="module")
def painter():
    """(model, processor) that draw pictures of 8 x 8 pixels."""
    processor, vae = continuous(), small_vae()
    torch.manual_seed(0)
    config = small_transfusion(processor, initializer_range=0.3, caption_dropout=0.1)
    return MoTTransfusionModel(config, vae=vae).eval(), processor


def sampler(painter, **options) -> Sampler:
    return Sampler(*painter, SamplesConfig(**({"num_inference_steps": 3, "batch": 2, "max_text_tokens": 5} | options)))


def noisy_pictures(number, size=(8, 8)):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3)).astype(np.uint8)) for _ in range(number)]


def values(pictures):
    return np.stack([np.asarray(picture, dtype=int) for picture in pictures])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_drawing_depends_on_its_name_and_place_and_not_on_its_batch(painter, guidance_scale):
    names = ["thing a", "thing cc", "it is", "thing a"]
    drawn = {size: sampler(painter, batch=size, guidance_scale=guidance_scale).draw(names) for size in (1, 2, 8)}
    assert [picture.size for picture in drawn[1]] == [(8, 8)] * 4
    for size in (2, 8):
        assert np.abs(values(drawn[1]) - values(drawn[size])).max() <= 1  # rounding
    # The same name in another place has other noise.
    assert np.abs(values(drawn[1])[0] - values(drawn[1])[3]).max() > 5
    # And the same seed gives the same again.
    assert np.array_equal(
        values(sampler(painter, batch=1, guidance_scale=guidance_scale).draw(names)), values(drawn[1])
    )


def test_seed_and_guidance_change_what_is_drawn(painter):
    drawn = [values(sampler(painter, **o).draw(["thing a"])) for o in ({}, {"seed": 9}, {"guidance_scale": 4.0})]
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_a_reconstruction_goes_through_the_vae_and_back(painter):
    model, processor = painter
    originals = noisy_pictures(3)
    pixels = torch.stack([torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) / 127.5 - 1 for p in originals])
    with torch.no_grad():
        moments = model.vae.encode(pixels.float()).latent_dist.mean
        decoded = model.vae.decode(moments).sample.clamp(-1, 1)
    expected = ((decoded + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(values(sampler(painter).reconstruct(originals)) - expected).max() <= 1


def test_reading_writes_text_for_every_picture_and_does_not_depend_on_the_batch(painter):
    originals = noisy_pictures(3)
    together = sampler(painter, batch=8).read(originals)
    assert len(together) == 3 and all(isinstance(text, str) for text in together)
    assert together == [sampler(painter).read([original])[0] for original in originals]


def test_an_edit_depends_on_source_and_instruction(painter):
    one, other = noisy_pictures(2)
    drawn = [
        values(sampler(painter).edit([pair])) for pair in ((one, "flip it"), (other, "flip it"), (one, "so it is"))
    ]
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_text_is_continued_without_pictures(painter):
    assert all(isinstance(text, str) for text in sampler(painter).continue_text(["thing", "so it"]))


def test_a_run_ends_with_measures_of_names_and_of_edits(painter, tmp_path):
    model, processor = painter
    named = [
        NamedPicture(f"thing {letter}", picture) for letter, picture in zip("abcd", noisy_pictures(4), strict=True)
    ]
    edits = [Edit(named[0].image, "flip it", named[1].image)]
    subjects = SampleSubjects(held_in=named[:3], held_out=named[3:], texts=["thing"], edits=edits, held_out_edits=edits)
    config = SamplesConfig(num_inference_steps=2, max_text_tokens=3)
    sheet, measures = make_samples(model, processor, subjects, config, tmp_path / "samples", "title")
    for prefix in ("", "held_out_"):
        assert 0 <= measures[prefix + "drawn_right"] <= 1 and 0 <= measures[prefix + "nearer_to_target"] <= 1
        assert 0 < measures[prefix + "drawn_psnr"] < 30 and 0 < measures[prefix + "reconstructed_psnr"] < 30
    rebuilt = sampler(painter).reconstruct([p.image for p in named[:3]])
    expected = mean_psnr(rebuilt, [p.image for p in named[:3]], processor.image_processor)
    assert measures["reconstructed_psnr"] == pytest.approx(expected)
    assert len(sheet.pictures) == 3 and len(sheet.edits) == 1
    assert any(f"{measures['drawn_psnr']:.1f} dB" in value for _, value in describe_measures(measures, config))
    sheet.write_png(tmp_path / "sheet.png")
    sheet.write_html(tmp_path / "sheet.html")


def test_a_model_of_tokens_is_not_asked_for_edits(tmp_path):
    from .test_evaluation import SpellingProcessor
    from .tiny import tiny_model as tiny_model_of_tokens

    edits = [Edit(*noisy_pictures(1), "flip it", *noisy_pictures(1))]
    model = tiny_model_of_tokens()
    _, measures = make_samples(
        model, SpellingProcessor(), SampleSubjects(edits=edits), SamplesConfig(), tmp_path / "samples", "title"
    )
    assert measures == {}
