"""Both losses of a Transfusion model against loops over rows, images and targets."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .naive_transfusion import (
    BOI,
    BOS,
    EOI,
    EOS,
    PATCH,
    NaiveTransfusion,
    image,
    positions,
    tiny_config,
    tiny_model,
    visible,
)


VARIANTS = ["dense", "moe-4x", "mot", "hybrid", "untied-feed-forward", "untied-feed-forward-qkv"]
# Three rows: two documents and padding; image first; text alone.
ROWS = [
    [BOS, 10, 11, *image(4, 4), 12, EOS, BOS, 13, *image(2, 4), EOS, 0],
    [BOS, *image(4, 2), 14, *image(2, 2), 15, 16, 17, EOS, BOS, 18, 19, EOS, 0],
    [BOS, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, EOS],
]
DOCUMENTS = [[0] * 11 + [1] * 7 + [-1], [0] * 14 + [1] * 4 + [-1], [0] * 18]
SIZES = [(4, 4), (2, 4), (4, 2), (2, 2)]
CLEAN = [False, False, True, False]
NUMBER = [0, 0, 1, 1]  # of the row that has the image


def batch(rows=(0, 1, 2), prediction_type="epsilon"):
    """Rows of one length, and the images in them."""
    generator = torch.Generator().manual_seed(7)
    length = max(map(len, ROWS))
    ids = torch.tensor([ROWS[row] + [0] * (length - len(ROWS[row])) for row in rows])
    documents = torch.tensor([DOCUMENTS[row] + [-1] * (length - len(DOCUMENTS[row])) for row in rows])
    starts = torch.ones_like(documents)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    inputs = {
        "input_ids": ids,
        "document_ids": documents,
        "labels": ids.masked_fill((documents < 0) | (starts == 1), -100),
    }
    own = torch.tensor([number in rows for number in NUMBER])
    images = {
        "latents": torch.randn(4, 2, 4, 4, generator=generator),
        "noise": torch.randn(4, 2, 4, 4, generator=generator),
        "timesteps": torch.tensor([3, 999, 500, 250]),
        "clean_images": torch.tensor(CLEAN),
    }
    if prediction_type.startswith("flow"):
        images["timesteps"] = torch.tensor([3.5, 1000.0, 500.0, 0.25])
    if own.any():
        inputs |= {name: value[own] for name, value in images.items()}
        inputs["image_sizes"] = [size for size, mine in zip(SIZES, own) if mine]
    return inputs


def alpha_bar(timestep, levels=1000):
    """Nichol & Dhariwal's cosine schedule, a product over betas of at most 0.999."""

    def cosine(t):
        return math.cos((t / levels + 0.008) / 1.008 * math.pi / 2) ** 2

    product = 1.0
    for t in range(timestep + 1):
        product *= 1 - min(1 - cosine(t + 1) / cosine(t), 0.999)
    return product


def noised_and_target(latents, noise, timestep, prediction_type):
    """One image -> what the model sees and what it is to say (appendix A.1, arXiv 2202.00512, rectified flow)."""
    if prediction_type.startswith("flow"):
        share = timestep / 1000
        noised = (1 - share) * latents + share * noise
        return noised, latents if prediction_type == "flow_sample" else noise - latents
    alpha = alpha_bar(int(timestep))
    noised = math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise
    if prediction_type == "epsilon":
        return noised, noise
    return noised, math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * latents


def naive_losses(naive, inputs):
    """Sums, counts and the loss, row by row and target by target."""
    config = naive.config
    sums, counts, z_sum = {"text": 0.0, "image_diffusion": 0.0}, {"text": 0, "image_diffusion": 0}, 0.0
    number = 0
    for row, tokens in enumerate(inputs["input_ids"].tolist()):
        images, targets, clean, divisors = [], [], [], []
        while number < len(inputs.get("latents", ())) and len(clean) < tokens.count(BOI):
            height, width = inputs["image_sizes"][number]
            latents, noise = (inputs[name][number, :, :height, :width].double() for name in ("latents", "noise"))
            timestep = inputs["timesteps"][number].item()
            clean.append(bool(inputs["clean_images"][number]))
            noised, target = noised_and_target(latents, noise, timestep, config.prediction_type)
            images.append((latents, 0) if clean[-1] else (noised, timestep))
            targets.append(target)
            # Clean latents count by the velocities that they imply, which divide by the share of noise.
            divisors.append(max(timestep / 1000, 0.05) if config.prediction_type == "flow_sample" else 1)
            number += 1
        documents = inputs["document_ids"][row].tolist()
        seen, places = visible(config, tokens, documents, clean=clean), positions(config, tokens, documents)
        logits, predictions = naive(tokens, images, seen, places)
        for place, target in enumerate(inputs["labels"][row].tolist()[1:]):
            if target not in (-100, PATCH, EOI):
                log_z = logits[place].logsumexp(0)
                sums["text"] = sums["text"] + log_z - logits[place, target]
                z_sum = z_sum + config.z_loss_coefficient * log_z**2
                counts["text"] += 1
        for prediction, target, is_clean, divisor in zip(predictions, targets, clean, divisors):
            if not is_clean:
                error = (prediction - target) / divisor
                sums["image_diffusion"] = sums["image_diffusion"] + (error**2).sum()
                counts["image_diffusion"] += target.numel()
    loss = (sums["text"] + z_sum) / counts["text"]
    return sums, counts, loss + config.diffusion_loss_weight * sums["image_diffusion"] / counts["image_diffusion"]


def assert_equals_naive(model, inputs):
    output, naive = model(**inputs, token_choice=True), NaiveTransfusion(model)
    sums, counts, loss = naive_losses(naive, inputs)
    assert {name: count.item() for name, count in output.loss_counts.items()} == counts
    for name, expected in sums.items():
        torch.testing.assert_close(output.loss_sums[name], expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, loss.float(), rtol=1e-4, atol=1e-4)
    output.loss.backward(), loss.backward()
    for name, parameter in model.named_parameters():
        # An expert that no token chose has no gradient in the loop.
        expected = torch.zeros_like(naive.w[name]) if naive.w[name].grad is None else naive.w[name].grad
        torch.testing.assert_close(
            parameter.grad, expected.float(), rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_sums_counts_and_gradients_equal_loops(variant):
    assert_equals_naive(tiny_model(variant, initializer_range=0.1, z_loss_coefficient=0.01), batch())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow", "flow_sample"])
@pytest.mark.parametrize("is_bagel", [False, True])
def test_relatives_by_configuration_equal_loops(prediction_type, is_bagel):
    fields = {"prediction_type": prediction_type, "diffusion_loss_weight": 3.0, "initializer_range": 0.1}
    if is_bagel:
        fields |= {
            "image_positions": "shared",
            "markers_in_image_block": True,
            "noised_images_visible": False,
            "latent_position_table": "sincos",
            "timestep_format": "fraction",
        }
    if prediction_type == "flow_sample":
        fields["timestep_direction"] = "clean"  # as SenseNova-U1
    assert_equals_naive(tiny_model(**fields), batch(prediction_type=prediction_type))


def test_dense_transfusion_equals_transformers_llama_with_a_mask():
    model, inputs = tiny_model("dense"), batch(rows=(0, 1))
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(config, name) for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters",
            )},
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    own = {name.replace(".shared", ""): value for name, value in model.state_dict().items()}
    llama.load_state_dict({name: own[name] for name in llama.state_dict()})
    naive, number = NaiveTransfusion(model, torch.float32), 0
    output = model(**inputs)
    for row, tokens in enumerate(inputs["input_ids"].tolist()):
        embeds, predictions = [], []
        for token in tokens:
            if token != PATCH:
                embeds.append(model.model.embed_tokens.weight[token])
            elif not predictions or not predictions[-1][1]:
                height, width = SIZES[number]
                latents, noise = (inputs[name][number, :, :height, :width] for name in ("latents", "noise"))
                timestep = inputs["timesteps"][number].item()
                noised, _ = noised_and_target(latents, noise, timestep, "epsilon")
                patches, _ = naive.embed(*((latents, 0) if CLEAN[number] else (noised, timestep)))
                embeds.append(patches[0])
                predictions.append((number, patches[1:]))
                number += 1
            else:
                embeds.append(predictions[-1][1].pop(0))
        documents = inputs["document_ids"][row].tolist()
        seen = visible(config, tokens, documents, clean=CLEAN)
        with torch.no_grad():
            hidden = llama.model(
                inputs_embeds=torch.stack(embeds)[None],
                attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None],
                position_ids=positions(config, tokens, documents)[None],
                use_cache=False,
            ).last_hidden_state[0]
        torch.testing.assert_close(output.logits[row], llama.lm_head(hidden), rtol=1e-4, atol=1e-4)
        patches = hidden[torch.tensor(tokens) == PATCH]
        for index, _ in predictions:
            height, width = SIZES[index]
            own, patches = patches.split([height * width // 4, len(patches) - height * width // 4])
            expected = naive.predict(own, None, height, width)
            torch.testing.assert_close(output.prediction[index, :, :height, :width], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow", "flow_sample"])
def test_the_target_is_the_noise_that_was_added(monkeypatch, prediction_type):
    """A patchifier that reads the noise off what it is given has no loss; it would, were the target fresh noise."""
    model, latents = tiny_model(prediction_type=prediction_type), torch.randn(2, 2, 4, 4)
    seen, embed = [], model.patchifier.embed
    monkeypatch.setattr(model.patchifier, "embed", lambda x, t: seen.append((x, t)) or embed(x, t))

    def oracle(hidden_states, features, height, width):
        answers = []
        for clean, noisy, timestep in zip(latents, *seen[-1]):
            of_clean, of_noise = (
                noised_and_target(a, b, timestep.item(), prediction_type)[0] for a, b in ((1, 0), (0, 1))
            )
            noise = (noisy - of_clean * clean) / of_noise
            answers.append(noised_and_target(clean, noise, timestep.item(), prediction_type)[1])
        return torch.stack(answers)

    monkeypatch.setattr(model.patchifier, "predict", oracle)
    ids = torch.tensor([[BOS, 10, *image(), EOS]] * 2)
    for _ in range(3):
        output = model(ids, latents=latents, labels=ids)  # noise and timesteps drawn inside
        assert output.loss_sums["image_diffusion"] / output.loss_counts["image_diffusion"] < 1e-6


@pytest.mark.parametrize("variant", ["dense", "mot", "loo-text"])
def test_sums_and_counts_do_not_depend_on_the_split_into_micro_batches(variant):
    modalities = ("text", "image", "speech") if variant == "loo-text" else ("text", "image")
    model = tiny_model(variant, modalities=modalities)
    whole, parts = model(**batch()), [model(**batch(rows=(row,))) for row in (0, 1, 2)]
    for name in whole.loss_sums:
        summed = sum(part.loss_sums[name] for part in parts)
        torch.testing.assert_close(whole.loss_sums[name], summed, rtol=1e-4, atol=1e-4)
        assert whole.loss_counts[name] == sum(part.loss_counts[name] for part in parts)
    assert parts[2].loss_counts["image_diffusion"] == 0 and parts[2].prediction.shape[0] == 0


def test_boi_is_a_target_and_placeholders_and_eoi_never_are():
    model = tiny_model()
    ids = torch.tensor([[BOS, 10, *image(), 11, *image(2, 2), EOS]])
    output = model(ids, latents=torch.randn(2, 2, 4, 4), image_sizes=[(4, 4), (2, 2)], labels=ids)
    output.logits.retain_grad()
    output.loss.backward()
    learns = output.logits.grad[0].abs().amax(-1) > 0
    expected = [target not in (PATCH, EOI) for target in ids[0, 1:].tolist()] + [False]
    assert learns.tolist() == expected
    assert learns[1] and not learns[2] and learns[7]  # to BOI; from BOI; from EOI to text
    assert output.loss_counts["text"] == sum(expected)


def test_clean_images_have_neither_noise_nor_loss(monkeypatch):
    model, ids = tiny_model(), torch.tensor([[BOS, *image(), 11, *image(), EOS]])
    latents, seen, embed = torch.randn(2, 2, 4, 4), [], model.patchifier.embed
    monkeypatch.setattr(model.patchifier, "embed", lambda x, t: seen.append((x, t)) or embed(x, t))
    output = model(
        ids, latents=latents, timesteps=torch.tensor([700, 700]), clean_images=torch.tensor([True, False]), labels=ids
    )
    assert torch.equal(seen[0][0][0], latents[0]) and not torch.equal(seen[0][0][1], latents[1])
    assert seen[0][1].tolist() == [0, 700]
    output.prediction.retain_grad()
    output.loss.backward()
    assert output.prediction.grad[0].abs().max() == 0 and output.prediction.grad[1].abs().max() > 0
    assert output.loss_counts["image_diffusion"] == latents[1].numel()


def test_images_of_several_sizes_equal_each_alone():
    for patchifier in ("linear", "unet"):
        model, inputs = tiny_model(patchifier=patchifier), batch(rows=(0, 1))
        ids = [[BOS, 10, *image(*size), 11] for size in SIZES]
        length = max(map(len, ids))
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        images = {name: inputs[name] for name in ("latents", "noise", "timesteps", "clean_images", "image_sizes")}
        together = model(padded, labels=padded, **images)
        for index, (row, (height, width)) in enumerate(zip(ids, SIZES)):
            alone = model(
                torch.tensor([row]),
                latents=inputs["latents"][index : index + 1, :, :height, :width],
                noise=inputs["noise"][index : index + 1, :, :height, :width],
                timesteps=inputs["timesteps"][index : index + 1],
                clean_images=inputs["clean_images"][index : index + 1],
            )
            own = together.prediction[index : index + 1, :, :height, :width]
            torch.testing.assert_close(own, alone.prediction, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(together.logits[index, : len(row)], alone.logits[0], rtol=1e-4, atol=1e-4)
            outside = together.prediction[index].clone()
            outside[:, :height, :width] = 0
            assert outside.abs().max() == 0


def test_one_size_smaller_than_the_tensor_that_holds_it():
    model, ids = tiny_model(), torch.tensor([[BOS, *image(2, 2), EOS]])
    latents = torch.randn(1, 2, 4, 6)
    output = model(ids, latents=latents, image_sizes=torch.tensor([[2, 2]]), labels=ids)
    assert output.prediction.shape == latents.shape and output.loss_counts["image_diffusion"] == 8
    assert output.prediction[:, :, 2:].abs().max() == output.prediction[:, :, :, 2:].abs().max() == 0
    output.loss.backward()


# ------------------------------------------------------------------------------------------- every part, every variant


def gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("patchifier", ["linear", "unet"])
@pytest.mark.parametrize("variant", ["dense", "mot", "hybrid", "loo-image"])
def test_what_a_batch_lacks_gets_zero_and_not_missing_gradients(variant, patchifier):
    modalities = ("text", "image", "speech") if variant == "loo-image" else ("text", "image")
    model = tiny_model(variant, modalities=modalities, patchifier=patchifier).train()
    without_images = gradients(model, batch(rows=(2,)))
    assert all(gradient is not None for gradient in without_images.values())
    only_of_images = [name for name in without_images if name.startswith("patchifier.") or ".image." in name]
    assert len(only_of_images) > 3 and not any(without_images[name].abs().max() for name in only_of_images)

    ids = torch.full((1, 4), PATCH)
    images = {"latents": torch.randn(1, 2, 4, 4), "labels": torch.full_like(ids, -100)}
    without_text = gradients(model, {"input_ids": ids, **images})
    assert all(gradient is not None for gradient in without_text.values())
    only_of_text = ["lm_head.weight", "model.embed_tokens.weight"] + [name for name in without_text if ".text." in name]
    assert not any(without_text[name].abs().max() for name in only_of_text)
    assert without_text["patchifier.proj_in.weight"].abs().max() > 0


@pytest.mark.parametrize("patchifier", ["linear", "unet"])
@pytest.mark.parametrize("variant", [*VARIANTS, "loo-text", "loo-image", "loo-speech"])
def test_every_variant_learns_a_batch_by_heart(variant, patchifier):
    modalities = ("text", "image", "speech") if variant.startswith("loo") else ("text", "image")
    model = tiny_model(variant, modalities=modalities, patchifier=patchifier, initializer_range=0.05).train()
    inputs, losses = batch(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(8):
        output = model(**inputs)
        losses.append({name: value.item() for name, value in output.loss_sums.items()})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert losses[-1]["text"] < 0.8 * losses[0]["text"]
    assert losses[-1]["image_diffusion"] < losses[0]["image_diffusion"]


def test_speech_has_a_loss_of_its_own():
    model = tiny_model(modalities=("text", "image", "speech"))
    ids = torch.tensor([[BOS, 10, 6, 41, 42, 7, *image(), EOS]])
    output = model(ids, latents=torch.randn(1, 2, 4, 4), labels=ids)
    assert {name: count.item() for name, count in output.loss_counts.items()} == {
        "text": 5,
        "speech": 2,
        "image_diffusion": 32,
    }


def test_hidden_states_and_attentions_are_those_of_the_sequence():
    model, inputs = tiny_model(attn_implementation="eager"), batch(rows=(0, 1))
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (2, 19, 32)
    assert torch.equal(output.hidden_states[0][0, 0], model.model.embed_tokens.weight[BOS])
    for row, documents in enumerate(inputs["document_ids"].tolist()):
        seen = visible(model.config, inputs["input_ids"][row].tolist(), documents, clean=CLEAN)
        assert torch.equal(output.attentions[0][row].amax(0) > 0, seen)
    torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast_and_checkpointing_change_little():
    inputs, outputs = batch(), []
    for kind in ("plain", "checkpointing", "bfloat16"):
        torch.manual_seed(0)
        model = tiny_model(patchifier="unet", initializer_range=0.05).train()
        if kind == "checkpointing":
            model.activation_checkpointing_enable()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "bfloat16"):
            output = model(**inputs)
        output.loss.backward()
        outputs.append((output.loss, model.patchifier.proj_in.weight.grad.clone()))
    (loss, gradient), (same_loss, same_gradient), (near_loss, near_gradient) = outputs
    assert torch.equal(loss, same_loss) and torch.allclose(gradient, same_gradient, atol=1e-6)
    torch.testing.assert_close(near_loss, loss, rtol=0.02, atol=0)
    assert torch.nn.functional.cosine_similarity(near_gradient.flatten(), gradient.flatten(), dim=0) > 0.98
    assert tiny_config().diffusion_loss_weight == 5.0
