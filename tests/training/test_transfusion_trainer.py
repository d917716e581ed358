"""Both objectives in one step: what is counted, what the loss is, and that a step depends on nothing but its rows."""

import signal

import numpy as np
import pytest
import torch

from training.config import ConfigError
from training.consolidate import read_model
from training.data import collate
from training.optimization import count_targets, objective_names
from training.run_files.metrics import read_metrics
from training.world import Interrupted

from .ranks import assert_same_but_for_rounding, go_on, largest_difference
from .tiny_transfusion import (
    BOI,
    EOI,
    PATCH,
    PictureStream,
    generator_of_row,
    tiny_config,
    tiny_model,
    transfusion_trainer,
)


def batch_of(numbers, config=None, **options):
    stream = PictureStream()
    return collate(
        [stream.row(n) for n in numbers], config or tiny_config(), noise_seed=0, row_numbers=numbers, **options
    )


def parameters_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.raw_model.named_parameters()}


def parameters_after(folder, **options) -> dict[str, torch.Tensor]:
    trainer = transfusion_trainer(folder, **options)
    trainer.fit()
    return parameters_of(trainer)


# ----------------------------------------------------------------------------------------------------- counts and loss


@pytest.mark.parametrize("numbers", [[0, 4], [1], [2], [3, 7], [0, 1, 2, 3]])
def test_counts_from_the_batch_are_those_the_model_finds(numbers):
    batch = batch_of(numbers)
    counts = tiny_model()(**batch).loss_counts
    assert objective_names(tiny_config()) == list(counts) == ["text", "image_diffusion"]
    assert count_targets(batch, tiny_config()).tolist() == [int(count) for count in counts.values()]


def test_counts_are_labels_and_the_elements_of_noised_latents():
    stream = PictureStream()
    for index in range(4):
        row = stream.row(index)
        labels = sum(int(label) != -100 for label in row["labels"][1:])
        elements = sum(image["values"].size for image in row["images"] if not image["clean"])
        assert count_targets(batch_of([index]), tiny_config()).tolist() == [labels, elements]
    # BOI is a target; placeholders and EOI are none.
    row = stream.row(0)
    assert (row["labels"][row["input_ids"] == BOI] == BOI).all()
    assert (row["labels"][np.isin(row["input_ids"], [PATCH, EOI])] == -100).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_of_a_step_is_the_mean_over_text_and_five_times_that_over_noised_elements(tmp_path, prediction_type):
    fields = {"prediction_type": prediction_type}
    trainer = transfusion_trainer(tmp_path, tiny_model(**fields), rows=4, accumulation=2)
    model = tiny_model(**fields).eval()
    batch = batch_of(range(8))
    with torch.no_grad():
        output = model(**batch)
    text, squares = [], []
    for row in range(8):
        for place in range(1, 32):
            if batch["labels"][row, place] != -100:
                log_probabilities = output.logits[row, place - 1].double().log_softmax(-1)
                text.append(-float(log_probabilities[batch["labels"][row, place]]))
    sizes = batch["image_sizes"].tolist()
    for number, (height, width) in enumerate(sizes):
        if batch["clean_images"][number]:
            continue
        share = model.noise_schedule.alphas_cumprod[batch["timesteps"][number]].item()
        for channel in range(2):
            for y in range(height):
                for x in range(width):
                    target = batch["noise"][number, channel, y, x].item()
                    if prediction_type == "v_prediction":
                        clean = batch["latents"][number, channel, y, x].item()
                        target = share**0.5 * target - (1 - share) ** 0.5 * clean
                    squares.append((output.prediction[number, channel, y, x].item() - target) ** 2)
    figures = trainer.train_step(next(trainer.batches.from_step(0, 1)))
    assert figures["targets"] == {"text": len(text), "image_diffusion": len(squares)}
    means = {"text": np.mean(text), "image_diffusion": np.mean(squares)}
    assert figures["means"] == pytest.approx(means, rel=1e-5)
    assert figures["loss"] == pytest.approx(means["text"] + 5 * means["image_diffusion"], rel=1e-5)


def test_the_weight_of_diffusion_is_the_configurations(tmp_path):
    trainer = transfusion_trainer(tmp_path, tiny_model(diffusion_loss_weight=0.5))
    figures = trainer.train_step(next(trainer.batches.from_step(0, 1)))
    means = figures["means"]
    assert figures["loss"] == pytest.approx(means["text"] + 0.5 * means["image_diffusion"], rel=1e-5)


def test_weights_of_modalities_do_not_name_what_is_diffused(tmp_path):
    with pytest.raises(ConfigError, match=r"modality_weights.*'image'.*\['text'\].*diffusion_loss_weight"):
        transfusion_trainer(tmp_path, modality_weights={"image": 2.0})
    transfusion_trainer(tmp_path, modality_weights={"text": 2.0})


def test_metrics_have_both_objectives_apart_with_their_counts(tmp_path):
    trainer = transfusion_trainer(tmp_path, rows=1, steps=4)
    trainer.fit()
    rows, _ = read_metrics(trainer.run.metrics)
    for row, index in zip(rows, range(4), strict=True):
        expected = count_targets(batch_of([index]), tiny_config()).tolist()
        assert [row["tokens_text"], row["elements_image_diffusion"]] == expected
        # A step of text alone has no diffusion, and its loss is that of text.
        assert (row["loss_image_diffusion"] is None) == (index == 2)
        diffusion = 0.0 if index == 2 else 5 * row["loss_image_diffusion"]
        assert row["loss"] == pytest.approx(row["loss_text"] + diffusion, rel=1e-5)
        assert "loss_image" not in row and "tokens_image" not in row


# ------------------------------------------------------------------------------------------------ how rows are split


def test_any_split_into_micro_batches_takes_the_same_trajectory(tmp_path):
    whole = parameters_after(tmp_path / "1", rows=4, accumulation=1)
    assert largest_difference(whole, parameters_of(transfusion_trainer(tmp_path / "0"))) > 1e-2
    for accumulation in (2, 4):
        folder = tmp_path / str(accumulation)
        split = parameters_after(folder, rows=4 // accumulation, accumulation=accumulation)
        assert_same_but_for_rounding(whole, split)


# --------------------------------------------------------------------------------------------------- noise and resume


def test_the_noise_of_a_step_follows_from_the_seed_and_the_numbers_of_its_rows(tmp_path):
    trainer = transfusion_trainer(tmp_path, rows=2, accumulation=2, seed=7)
    # Step 3 has rows 12 to 15 of the stream, in two micro-batches.
    (batches,) = trainer.batches.from_step(3, 4)
    for batch, numbers in zip(batches, ([12, 13], [14, 15]), strict=True):
        place = 0
        for number in numbers:
            generator, images = generator_of_row(7, number), PictureStream().row(number)["images"]
            levels = (torch.rand(len(images), generator=generator) * 1000).long()
            for image, level in zip(images, levels.tolist(), strict=True):
                height, width = image["values"].shape[1:]
                if image["clean"]:
                    assert batch["timesteps"][place] == 0
                else:
                    noise = torch.randn(2, height, width, generator=generator)
                    assert batch["timesteps"][place] == level
                    assert torch.equal(batch["noise"][place, :, :height, :width], noise)
                place += 1
        assert place == len(batch["timesteps"])


def interrupted_after(folder, step: int, **options):
    trainer = transfusion_trainer(folder, **options)
    train_step = trainer.train_step

    def step_and_signal(batches):
        figures = train_step(batches)
        if trainer.step == step:
            trainer.stop_signal.number = signal.SIGINT
        return figures

    trainer.train_step = step_and_signal
    with pytest.raises(Interrupted):
        trainer.fit()
    return trainer


def test_a_resumed_run_goes_on_bit_for_bit_its_average_included(tmp_path):
    options = {"steps": 6, "ema_decay": 0.9}
    dropout = {"hidden_dropout": 0.1}
    undisturbed = transfusion_trainer(tmp_path / "a", tiny_model(**dropout), **options)
    undisturbed.fit()
    interrupted_after(tmp_path / "b", 3, model=tiny_model(**dropout), **options)
    torch.rand(5)  # what is drawn elsewhere has no part in it
    resumed = transfusion_trainer(tmp_path / "b", tiny_model(seed=1, **dropout), resume=True, **options)
    go_on(resumed)
    assert resumed.step == 3
    resumed.fit()
    for name, value in parameters_of(undisturbed).items():
        assert torch.equal(value, parameters_of(resumed)[name]), name
    for one, other in zip(undisturbed.ema.shadow_params, resumed.ema.shadow_params, strict=True):
        assert torch.equal(one, other)
    logs = [read_metrics(trainer.run.metrics)[0] for trainer in (undisturbed, resumed)]
    for one, other in zip(*logs, strict=True):
        for key in ("step", "loss", "loss_text", "loss_image_diffusion", "grad_norm", "lr"):
            assert one[key] == other[key]


# -------------------------------------------------------------------------------------------------- moving average


def test_the_average_is_the_plain_recurrence_of_its_definition(tmp_path):
    trainer = transfusion_trainer(tmp_path, steps=5, ema_decay=0.2)
    averages = None
    for number, batches in enumerate(trainer.batches.from_step(0, 5)):
        trainer.train_step(batches)
        weights = {name: value.double() for name, value in parameters_of(trainer).items()}
        if averages is None:
            averages = weights  # what is before the first update has no weight
            continue
        decay = min(0.2, (1 + number) / (10 + number))
        assert (decay < 0.2) == (number < 2)
        averages = {name: decay * averages[name] + (1 - decay) * value for name, value in weights.items()}
    for (name, expected), found in zip(averages.items(), trainer.ema.shadow_params, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    assert largest_difference(averages, weights) > 1e-3


def test_a_checkpoint_gives_folders_of_the_weights_and_of_their_average(tmp_path):
    trainer = transfusion_trainer(tmp_path / "run", steps=3, ema_decay=0.9)
    trainer.fit()
    checkpoint = trainer.run.checkpoint(3)
    weights, averages = (dict(read_model(checkpoint, average).named_parameters()) for average in (False, True))
    assert set(averages) == set(parameters_of(trainer))
    for (name, value), average in zip(parameters_of(trainer).items(), trainer.ema.shadow_params, strict=True):
        assert torch.equal(weights[name], value) and torch.equal(averages[name], average)
        assert not torch.equal(value, average)


def test_evaluation_sees_the_average_and_training_goes_on_from_the_weights(tmp_path):
    trainer, seen = transfusion_trainer(tmp_path, steps=4, ema_decay=0.9), []

    def evaluate(model, stops):
        seen.append({name: value.detach().clone() for name, value in model.named_parameters()})
        averages = dict(zip(seen[-1], trainer.ema.shadow_params, strict=True))
        assert all(torch.equal(value, averages[name]) for name, value in seen[-1].items())
        assert not model.training
        return {"eval/loss_text": 1.0}

    trainer.evaluate, trainer.evaluate_every = evaluate, 2
    trainer.fit()
    assert len(seen) == 2 and trainer.raw_model.training
    without = parameters_after(tmp_path / "b", steps=4)
    assert all(torch.equal(value, without[name]) for name, value in parameters_of(trainer).items())


def test_an_average_that_a_checkpoint_does_not_hold_begins_with_the_next_update(tmp_path):
    transfusion_trainer(tmp_path, steps=2).fit()
    resumed = transfusion_trainer(tmp_path, tiny_model(seed=1), steps=3, ema_decay=0.9, resume=True)
    go_on(resumed)
    resumed.fit()
    for value, average in zip(parameters_of(resumed).values(), resumed.ema.shadow_params, strict=True):
        torch.testing.assert_close(value, average, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("variant", ["dense", "moe-4x", "mot", "hybrid"])
def test_every_variant_learns_both_objectives(tmp_path, variant):
    trainer = transfusion_trainer(tmp_path, tiny_model(variant), steps=25, rows=4)
    trainer.fit()
    rows, _ = read_metrics(trainer.run.metrics)
    for key in ("loss_text", "loss_image_diffusion"):
        before, after = (np.mean([row[key] for row in part]) for part in (rows[:5], rows[-5:]))
        assert after < 0.9 * before, key


def test_losses_in_bf16_are_float32_sums(tmp_path):
    trainer = transfusion_trainer(tmp_path, precision="bf16")
    output = trainer.model(**next(trainer.batches.from_step(0, 1))[0])
    assert all(value.dtype == torch.float32 for value in output.loss_sums.values())
    trainer.fit()


def test_a_step_without_an_image_gives_patchifier_and_image_tower_zero_gradients_and_decay(tmp_path):
    class Text(PictureStream):
        def row(self, index):
            return super().row(4 * index + 2)

    trainer = transfusion_trainer(tmp_path, stream=Text())
    before = parameters_of(trainer)
    figures = trainer.train_step(next(trainer.batches.from_step(0, 1)))
    for name in ("patchifier.conv_in.weight", "patchifier.proj_out.weight", "model.layers.0.mlp.image.up_proj.weight"):
        torch.testing.assert_close(parameters_of(trainer)[name], before[name] * (1 - figures["lr"] * 0.1))


def test_a_model_that_does_not_see_noised_images_trains_on_clean_copies(tmp_path):
    model = tiny_model(noised_images_visible=False, image_positions="shared")
    trainer = transfusion_trainer(tmp_path, model, PictureStream(clean_copies=True), steps=25, rows=4)
    trainer.fit()
    rows, _ = read_metrics(trainer.run.metrics)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
