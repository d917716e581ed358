"""BAGEL comes in, computes what its own code computed, and goes back out byte for byte."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.cache_utils import DynamicCache

from conversion.bagel_layout import bagel_map
from conversion.export_bagel import export_bagel
from conversion.export_bagel import main as export_main
from conversion.import_bagel import import_bagel, main
from conversion.key_maps import ConversionError
from modeling_mot import MoTTransfusionModel
from modeling_mot.decoding_lean import DecodingCache
from modeling_mot.decoding_pictures import ImageForward
from modeling_mot.encoder_pictures import Patches
from modeling_mot.latent_vae import decode_latents
from tests.conversion.bagel_sources import (
    CASES,
    CHECKPOINT,
    FIXTURES,
    TOKEN_IDS,
    drawing_arguments,
    features_at,
    joined,
    latents_at,
    numbers,
    training_batch,
    write_checkpoint,
)
from tests.conversion.tokenizer_sources import bytes_backend, plain


WORDS = ["--token-ids", *(f"{name}={token}" for name, token in TOKEN_IDS.items())]
LAST_IDS = {"im_start": 86, "im_end": 87, "vision_start": 88, "vision_end": 89}  # of 90 rows
CLOSE = {"atol": 3e-5, "rtol": 0}  # tells tanh-GELU from the exact one, and a wrong epsilon; rounding is 1e-5


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    out = tmp_path_factory.mktemp("bagel") / "mot"
    assert main([str(CHECKPOINT), str(out), *WORDS]) == 0
    return out


@pytest.fixture(scope="module")
def model(imported):
    return AutoModel.from_pretrained(imported, trust_remote_code=True).eval()


def run(model, ids, **inputs):
    """The outputs of a row, and its hidden states behind the last norm."""
    kept = []
    hook = model.model.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
    try:
        with torch.no_grad():
            output = model(torch.as_tensor([ids]), **inputs)
    finally:
        hook.remove()
    return output, kept[0][0]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, **CLOSE)


# -------------------------------------------------------------------------------------------------------- (a) every key


def test_every_tensor_of_both_files_has_one_place():
    keys = json.loads((FIXTURES / "a_keys.json").read_text())
    plan = import_bagel(str(CHECKPOINT), FIXTURES / "none", token_ids=TOKEN_IDS, dry_run=True)
    assert plan.moves.keys() == keys["ema.safetensors"].keys()
    targets = {entry.name: entry for entry in plan.entries}
    assert len(targets) == sum(map(len, keys.values())) == len(plan.model.state_dict())
    for name, target in plan.moves.items():
        assert list(targets[target].shape) == keys["ema.safetensors"][name]
    assert plan.vae_tensors == len(keys["ae.safetensors"])


def test_the_model_that_generates_comes_from_automodel(model):
    assert type(model).__name__ == "MoTTransfusionModel" and hasattr(model, "generate")
    assert len(model.encoders["vision"].layers) == 2  # vit_config.json says 3
    assert model.config.rms_norm_eps == 1e-6 and model.config.rope_parameters["rope_theta"] == 1e6
    assert not model.config.tie_word_embeddings and model.config.bos_token_id is None
    assert (model.config.eos_token_id, model.generation_config.bos_token_id) == (151, 150)


# --------------------------------------------------------------------------------------------------- (b), (c), (h) text


def test_text_equals_bagel(model):
    want = numbers("b_text_logits")
    output, hidden = run(model, torch.cat([want["token_ids"], want["token_ids_2"]]).tolist())
    close(output.logits[0], torch.cat([want["logits"], want["logits_2"]]))
    close(hidden, torch.cat([want["hidden"], want["hidden_2"]]))


def test_text_behind_cached_text_equals_bagel(model):
    want, cache = numbers("b_text_logits"), DynamicCache(config=model.config)
    run(model, want["token_ids"].tolist(), past_key_values=cache)
    places = want["position_ids_2"][None]
    output, _ = run(model, want["token_ids_2"].tolist(), past_key_values=cache, position_ids=places)
    close(output.logits[0], want["logits_2"])


def test_a_picture_is_encoded_as_bagel_encodes_it(model):
    want, encoder = numbers("c_vit_text_logits"), model.encoders["vision"]
    patches = Patches.of(want["picture"][None], [(42, 70)], 14)
    assert patches.grids == [tuple(want["grid"].tolist())] and torch.equal(patches.values, want["patches"])
    with torch.no_grad():
        close(encoder.encode(patches), want["vit_out"])
        close(encoder(patches), want["connector_out"])
        positions = model.fixed_positions("vision", 3, 5, want["tokens"])
    close(want["connector_out"] + positions, want["tokens"])


def test_text_behind_a_pictures_features_equals_bagel(model):
    want = numbers("c_vit_text_logits")
    span = features_at(model.config, len(want["patches"]))
    ids = span + want["token_ids"].tolist()
    output, hidden = run(model, ids, encoder_pixel_values=want["picture"][None])
    close(output.logits[0, len(span) :], want["logits"])
    close(hidden, torch.cat([want["span_hidden"], want["hidden"]]))
    positions = model.positions_of_prompts(torch.tensor([ids]), None)[0]
    assert torch.equal(positions, torch.cat([want["span_position_ids"], want["position_ids"]]))


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "in a batch"])
def test_greedy_answers_equal_bagel(model, others):
    want = numbers("h_greedy")
    start, *answers = want["fed_ids"].tolist()
    prompt = features_at(model.config, len(want["patches"])) + want["question_ids"].tolist() + [start]
    ids = torch.tensor([prompt] + [[7] * 3 + prompt[:-3]] * others)
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    pictures = joined(want["patches"], want["grid"].tolist(), 14).expand(1 + others, -1, -1, -1)
    output = model.generate(
        ids,
        attention_mask=mask,
        encoder_pixel_values=pictures,
        generation_mode="text",
        max_new_tokens=len(answers),
        do_sample=False,
        output_logits=True,
    )
    assert output.sequences[0, ids.shape[1] :].tolist() == answers == want["answer_ids"].tolist()
    close(torch.stack(output.logits)[:, 0], want["step_logits"][: len(answers)])


# --------------------------------------------------------------------------------------------------------- (d) velocity


def at(noisy, time):
    """Inputs that the forward noises to exactly these latents: (1 - t) x + t x = x."""
    return {"latents": noisy[None], "noise": noisy[None], "timesteps": time.view(1) * 1000}


@pytest.mark.parametrize("name", ["velocity", "velocity_t1", "velocity_no_context"])
def test_the_velocity_behind_text_equals_bagel(model, name):
    want = numbers("d_velocity_text")
    grid, time = want["grid"].tolist(), torch.tensor(1.0) if name == "velocity_t1" else want["t"]
    context = [] if name == "velocity_no_context" else want["text_ids"].tolist()
    noisy = joined(want["x_t"], grid, 2)
    output, _ = run(model, context + latents_at(model.config, len(want["x_t"])), **at(noisy, time))
    close(output.prediction[0], joined(want[name], grid, 2))


def edit_context(model, want):
    """Clean latents, features and an instruction: ids, and inputs of the forward."""
    ids = latents_at(model.config, len(want["vae_patches"])) + features_at(model.config, len(want["vit_patches"]))
    return ids + want["text_ids"].tolist(), {"encoder_pixel_values": want["vit_picture"][None]}


def test_the_velocity_behind_latents_features_and_text_equals_bagel(model):
    want = numbers("d_velocity_edit")
    grid = want["vae_grid"].tolist()
    noisy, clean = joined(want["x_t"], grid, 2), want["vae_latents"]
    ids, pictures = edit_context(model, want)
    output, hidden = run(
        model,
        ids + latents_at(model.config, len(want["x_t"])),
        latents=torch.stack([clean, noisy]),
        noise=torch.stack([torch.ones_like(clean), noisy]),
        timesteps=torch.stack([torch.tensor(300.0), want["t"] * 1000]),
        clean_images=torch.tensor([True, False]),
        **pictures,
    )
    close(output.prediction[1], joined(want["velocity"], grid, 2))
    close(hidden[: len(ids)], torch.cat([want["vae_span_hidden"], want["vit_span_hidden"], want["text_hidden"]]))
    close(output.logits[0, len(ids) - len(want["text_ids"]) : len(ids)], want["text_logits"])


@pytest.mark.parametrize("kind", ["text", "edit"])
def test_the_velocity_behind_a_cached_prefix_equals_bagel(model, kind):
    """As `generate()` draws: the context in the cache, a forward of the image's tokens alone."""
    want, cache = numbers(f"d_velocity_{kind}"), DynamicCache(config=model.config)
    if kind == "text":
        ids, inputs, grid = want["text_ids"].tolist(), {}, want["grid"].tolist()
    else:
        ids, inputs = edit_context(model, want)
        inputs |= {"latents": want["vae_latents"][None], "clean_images": torch.tensor([True])}
        grid = want["vae_grid"].tolist()
    ids = torch.tensor([ids])
    positions = model.positions_of_prompts(ids, None)
    with torch.no_grad():
        model(ids, past_key_values=cache, position_ids=positions, **inputs)
        filled = DecodingCache.of(cache, torch.ones_like(ids), torch.float32)
        prefix = filled.prefix(0, int(positions[0, -1]) + 1, 0)
        assert prefix.position == want["span_position_ids"][0]
        noisy = joined(want["x_t"], grid, 2)
        velocity = ImageForward(model, [prefix], tuple(noisy.shape[1:])).predict(noisy[None], want["t"] * 1000)
    close(velocity[0], joined(want["velocity"], grid, 2))


# ---------------------------------------------------------------------------------------- (e) pictures, from noise on


def draws(model, monkeypatch, kind, arguments, count=1):
    """Draw from the recorded noise.  -> latents of each step (5, B, C, h, w), predictions of each step"""
    want = numbers(f"e_sample_{kind}")
    grid = want["grid"].tolist()
    if kind == "text":
        ids, inputs = want["text_ids"].tolist(), {}
    else:
        ids = latents_at(model.config, len(want["initial_noise"])) + features_at(model.config, len(want["vit_patches"]))
        ids += want["text_ids"].tolist()
        seen = joined(want["vit_patches"], want["vit_grid"].tolist(), 14)
        inputs = {"latents": want["vae_latents"].expand(count, -1, -1, -1)}
        inputs["encoder_pixel_values"] = seen.expand(count, -1, -1, -1)
    noise = joined(want["initial_noise"], grid, 2)[None]
    steps, predictions, predict = [noise.expand(count, -1, -1, -1)], [], model.patchifier_latents

    def kept(*args):
        predictions.append(predict(*args))
        return predictions[-1]

    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", lambda *args, **kwargs: noise)
        patched.setattr(model, "patchifier_latents", kept)
        output = model.generate(
            torch.tensor([ids] * count),
            generation_mode="image",
            image_size=[side * 2 * model.config.vae_downsampling for side in grid],
            output_type="latent",
            callback_on_step_end=lambda model, step, timestep, state: steps.append(state["latents"].clone()),
            **inputs,
            **arguments,
        )
    for row in range(count):
        assert torch.equal(output.latents[row][0], steps[-1][row])
    return torch.stack(steps), predictions[-4:]  # behind those of the prompts


@pytest.mark.parametrize(("kind", "name", "case"), CASES, ids=[f"{kind}-{name}" for kind, name, _ in CASES])
def test_pictures_equal_bagel(model, monkeypatch, kind, name, case):
    """The latents after each step, and the velocities behind each context."""
    want = numbers(f"e_sample_{kind}")
    grid = want["grid"].tolist()
    latents, predictions = draws(model, monkeypatch, kind, drawing_arguments(case))
    assert [len(of_step) for of_step in predictions] == case[-1]
    close(latents[:, 0], torch.stack([joined(step, grid, 2) for step in want[f"{name}.latents"]]))
    for step, of_step in enumerate(predictions):
        for context, velocity in zip(("v_full", "v_no_text", "v_no_img"), of_step):
            if f"{name}.{context}" in want:
                close(velocity, joined(want[f"{name}.{context}"][step], grid, 2))


@pytest.mark.parametrize(("kind", "name"), [("text", "s4_global"), ("edit", "s4_i2_global")])
def test_pictures_of_a_batch_equal_bagel(model, monkeypatch, kind, name):
    """Norms are those of each picture, so that every row is the original's for one picture."""
    want = numbers(f"e_sample_{kind}")
    cases = {of_kind: case for one, of_kind, case in CASES if one == kind}
    latents, _ = draws(model, monkeypatch, kind, drawing_arguments(cases[name]), count=2)
    for row in range(2):
        close(latents[-1, row], joined(want[f"{name}.latents"][-1], want["grid"].tolist(), 2))


# --------------------------------------------------------------------------------------------------------- (f) training


@pytest.mark.parametrize("row", [1, 2])
def test_positions_and_visibility_of_a_packed_row_equal_bagel(model, row):
    want = numbers(f"f_train_row{row}")
    batch = training_batch(model.config, want)
    kept = {}

    def keep(module, args, inputs):
        kept.update(inputs)

    hook = model.model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        hook.remove()
    assert torch.equal(kept["position_ids"][0], want["position_ids"])
    blocks, documents = kept["image_blocks"], batch["document_ids"]
    places = torch.arange(documents.shape[1])
    query, key = places[:, None], places[None]
    seen = (key <= query) | blocks.same(0, None, query, key)
    seen = seen & blocks.visible(0, None, query, key) & (documents[0, query] == documents[0, key])
    assert torch.equal(seen, want["mask"].bool())


@pytest.mark.parametrize("row", [1, 2])
def test_losses_of_a_packed_row_equal_bagel(model, row):
    want = numbers(f"f_train_row{row}")
    batch = training_batch(model.config, want)
    output, hidden = run(model, batch.pop("input_ids")[0].tolist(), **batch)
    close(hidden, want["hidden"])
    means = {name: output.loss_sums[name] / output.loss_counts[name] for name in output.loss_sums}
    close(means["text"], want["ce_mean"])
    close(means["image_diffusion"], want["mse_mean"])
    close(output.loss, want["ce_mean"] + want["mse_mean"])
    assert output.loss_counts["text"] == len(want["ce_labels"])
    assert output.loss_counts["image_diffusion"] == want["mse"].numel()


@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize("part", ["total", "ce_only", "mse_only"])
def test_gradients_of_a_packed_row_equal_bagel(model, row, part):
    want = numbers(f"f_train_row{row}")
    norms = json.loads((FIXTURES / f"f_grad_norms_row{row}.json").read_text())
    parameters = {name: model.get_parameter(bagel_map().forward(name)[0]) for name in norms}
    assert len(norms) == 109 and sum(p.requires_grad for p in model.parameters()) == len(norms)
    model.zero_grad()
    output = model(**training_batch(model.config, want))
    sums, counts = output.loss_sums, output.loss_counts
    losses = {
        "total": output.loss,
        "ce_only": sums["text"] / counts["text"],
        "mse_only": sums["image_diffusion"] / counts["image_diffusion"],
    }
    losses[part].backward()
    for name, parameter in parameters.items():
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert norm == pytest.approx(norms[name][part] or 0.0, rel=1e-4, abs=1e-6), name
    for name, gradient in want.items() if part == "total" else ():
        if name.startswith("grad."):
            torch.testing.assert_close(parameters[name.removeprefix("grad.")].grad, gradient, atol=3e-6, rtol=1e-4)
    model.zero_grad()


# -------------------------------------------------------------------------------------------------- (g) the autoencoder


def test_the_autoencoder_equals_bagel(model):
    want = numbers("g_vae")
    with torch.no_grad():
        moments = model.vae.encode(want["picture"]).latent_dist
        close(moments.mean, want["mean"])
        close(moments.logvar, want["logvar"])
        close(model.encode_images(want["picture"])[0], want["latents_mean"])
        sampled = (moments.mean + (moments.logvar / 2).exp() * want["noise"] - 0.1159) * 0.3611
        close(sampled, want["latents_sample"])
        close(decode_latents(model.vae, want["decode_latents"]), want["decoded"].clamp(-1, 1))
        close(decode_latents(model.vae, want["latents_mean"]), want["reconstruction"].clamp(-1, 1))
        close(model.vae.decode(want["decode_latents"] / 0.3611 + 0.1159).sample, want["decoded"])


def test_latents_of_a_smaller_picture_in_a_batch_are_its_own(model):
    want = numbers("d_velocity_edit")
    pixels = torch.zeros(2, 3, 64, 64)
    pixels[0, :, :48, :64] = want["vae_picture"]
    latents, sizes = model.encode_images(pixels, [[48, 64], [64, 64]])
    assert sizes[0] == (6, 8)
    close(latents[0, :, :6, :8], want["vae_latents"])


# ----------------------------------------------------------------------------------------------------------- (g) export


def same_tensors(one, other):
    for file in ("ema.safetensors", "ae.safetensors"):
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(
                ours[name].view(torch.uint8), tensor.view(torch.uint8)
            ), name
    for file in ("llm_config.json", "vit_config.json"):
        assert json.loads((one / file).read_text()) == json.loads((other / file).read_text())


def test_what_came_in_goes_out_byte_for_byte(imported, tmp_path):
    assert export_main([str(imported), str(tmp_path / "out")]) == 0
    same_tensors(tmp_path / "out", CHECKPOINT)


def test_a_trained_model_goes_out_without_the_record(imported, model, tmp_path):
    """Saved by transformers, with one tensor changed: all others are the original's."""
    saved = tmp_path / "saved"
    changed = MoTTransfusionModel.from_pretrained(imported)
    with torch.no_grad():
        changed.lm_head.weight += 1
    changed.save_pretrained(saved)
    export_bagel(str(saved), tmp_path / "out")
    ours, theirs = (load_file(folder / "ema.safetensors") for folder in (tmp_path / "out", CHECKPOINT))
    assert {name for name in theirs if not torch.equal(ours[name], theirs[name])} == {"language_model.lm_head.weight"}
    llm, vit = (json.loads((tmp_path / "out" / f"{name}_config.json").read_text()) for name in ("llm", "vit"))
    assert (llm["num_key_value_heads"], llm["rope_theta"], llm["vocab_size"]) == (2, 1e6, 160)
    assert (vit["num_hidden_layers"], vit["image_size"], vit["num_attention_heads"]) == (3, 112, 2)
    again = import_bagel(str(tmp_path / "out"), tmp_path / "again", token_ids=TOKEN_IDS, dry_run=True).model.config
    assert (
        again.to_diff_dict()
        == import_bagel(
            str(CHECKPOINT), tmp_path / "again", token_ids=TOKEN_IDS, dry_run=True
        ).model.config.to_diff_dict()
    )


# ------------------------------------------------------------------------------------------- checkpoints of other sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_of_other_sizes_goes_in_and_out(tmp_path, dtype):
    source = write_checkpoint(tmp_path / "source", dtype)
    config = import_bagel(str(source), tmp_path / "mot", token_ids=LAST_IDS).model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 8)
    assert (config.num_hidden_layers, config.patch_size, config.latent_channels) == (3, 1, 8)
    assert (config.latent_position_table_size, config.latent_size, config.vae_downsampling) == ([6, 6], [6, 6], 4)
    assert config.encoders["vision"]["table_size"] == [5, 5] and config.vae_config["layers_per_block"] == 2
    assert (config.boi_token_id, config.eoi_token_id, config.eos_token_id) == (88, 89, 87)
    assert not config.tie_word_embeddings and config.rms_norm_eps == 1e-5

    # It runs, whatever the placeholders' ids, which lie behind the vocabulary.
    model = AutoModel.from_pretrained(tmp_path / "mot", trust_remote_code=True, dtype=torch.float32).eval()
    ids = torch.tensor([[86, 3, 4, 87, *latents_at(config, 6), *features_at(config, 4)]])
    output = model(
        ids,
        labels=ids,
        latents=torch.randn(1, 8, 2, 3),
        encoder_pixel_values=torch.rand(1, 3, 14, 14),
    )
    assert output.loss.isfinite() and output.logits.shape == (1, ids.shape[1], 90)
    export_bagel(str(tmp_path / "mot"), tmp_path / "out")
    same_tensors(tmp_path / "out", source)


def test_weights_in_another_precision(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    plan = import_bagel(str(source), tmp_path / "mot", token_ids=LAST_IDS, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "mot" / "model.safetensors")
    assert plan.model.config.dtype == torch.bfloat16
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.startswith("vae.") else torch.bfloat16), name


@pytest.mark.parametrize("knows", [True, False], ids=["its tokens", "none of them"])
def test_a_tokenizer_says_the_ids(tmp_path, knows):
    source = write_checkpoint(tmp_path / "source", vocab=400)
    names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>")
    tokenizer = plain(bytes_backend(specials=["<|endoftext|>", *(names if knows else ())]))
    size = len(tokenizer)
    tokenizer.save_pretrained(source)
    assert main([str(source), str(tmp_path / "mot")]) == 0
    config = json.loads((tmp_path / "mot" / "config.json").read_text())
    ids = tokenizer.convert_tokens_to_ids
    if knows:
        assert (config["boi_token_id"], config["eos_token_id"]) == (ids("<|vision_start|>"), ids("<|im_end|>"))
        assert config["image_token_id"] == ids("<|image_pad|>") and config["num_placeholder_tokens"] == 0
        assert config["continuous_modalities"]["vision"]["placeholder_token_id"] == ids("<|vision_pad|>")
        assert config["tokenizer_vocab_size"] == size
    else:
        # BAGEL appends them, in its order.
        assert (config["eos_token_id"], config["boi_token_id"], config["eoi_token_id"]) == (
            size + 1,
            size + 2,
            size + 3,
        )
        assert (config["image_token_id"], config["num_placeholder_tokens"]) == (size + 4, 0)
        assert config["tokenizer_vocab_size"] == size + 6
    export_bagel(str(tmp_path / "mot"), tmp_path / "out")
    same_tensors(tmp_path / "out", source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((source / file).read_text())
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_an_autoencoder_of_diffusers_takes_the_place(tmp_path, imported, model):
    source = tmp_path / "source"
    shutil.copytree(CHECKPOINT, source)
    (source / "ae.safetensors").unlink()
    MoTTransfusionModel.from_pretrained(imported).vae.save_pretrained(tmp_path / "vae")
    import_bagel(str(source), tmp_path / "mot", vae=str(tmp_path / "vae"), token_ids=TOKEN_IDS)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "mot", imported))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_an_autoencoder_latents_are_drawn(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(CHECKPOINT, source)
    (source / "ae.safetensors").unlink()
    plan = import_bagel(str(source), tmp_path / "mot", token_ids=TOKEN_IDS)
    assert plan.model.config.vae_config is None and "latents alone" in plan.describe()
    export_bagel(str(tmp_path / "mot"), tmp_path / "out")
    assert not (tmp_path / "out" / "ae.safetensors").exists()


# ------------------------------------------------------------------------------------------------------ what is refused


def changed_json(file, **fields):
    def change(folder):
        stored = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(stored | fields))

    return change


def changed_tensors(file, change):
    def write(folder):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return write


NORM = "language_model.model.norm_moe_gen.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_tensors("ema.safetensors", lambda t: t.pop(NORM)), "only in the target: model.norm.generation.weight"),
        (changed_tensors("ema.safetensors", lambda t: t.update(new=t[NORM].clone())), "only in the source: new"),
        (changed_tensors("ae.safetensors", lambda t: t.pop("decoder.conv_out.bias")), "vae.decoder.conv_out.bias"),
        (
            changed_tensors("ae.safetensors", lambda t: t.pop("encoder.conv_in.weight")),
            "it is not the autoencoder of FLUX",
        ),
        (changed_tensors("ema.safetensors", lambda t: t.update({NORM: t[NORM][:-1].clone()})), "has shape"),
        (
            changed_tensors("ema.safetensors", lambda t: t.pop("language_model.lm_head.weight")),
            "lm_head.weight (from language_model.lm_head.weight)",
        ),
        (
            changed_tensors(
                "ema.safetensors",
                lambda t: t.update({"language_model.model.layers.0.self_attn.q_norm.weight": torch.ones(4, 4)}),
            ),
            "has shape (4, 4), so",
        ),
        (
            changed_tensors("ae.safetensors", lambda t: t.update({"decoder.conv_in.weight": torch.ones(3)})),
            "no convolution decoder.conv_in.weight",
        ),
        (changed_json("vit_config.json", hidden_size=-1), "hidden_size=-1"),
        (changed_json("llm_config.json", rope_theta="x"), "rope_theta='x' must be in (0, inf)"),
        (changed_json("llm_config.json", num_hidden_layers=3), "num_hidden_layers=3, but the tensors say 2"),
        (changed_json("llm_config.json", num_key_value_heads=4), "num_key_value_heads=4, but the tensors say 2"),
        (changed_json("llm_config.json", strange=1), "--ignore-fields strange"),
        (changed_json("vit_config.json", num_hidden_layers=2), "the tensors say 3 (one more than there are)"),
        (changed_json("vit_config.json", patch_size=16), "patch_size=16"),
        (lambda folder: (folder / "llm_config.json").unlink(), "llm_config.json"),
        (lambda folder: (folder / "ema.safetensors").unlink(), "model.safetensors"),
    ],
)
def test_a_source_that_is_not_whole_is_refused(tmp_path, change, message):
    source = tmp_path / "source"
    shutil.copytree(CHECKPOINT, source)
    change(source)
    with pytest.raises(ConversionError) as error:
        import_bagel(str(source), tmp_path / "mot", token_ids=TOKEN_IDS)
    assert message in str(error.value)
    assert not (tmp_path / "mot").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "has no tokenizer"),
        (["--token-ids", "im_start=1"], "im_end=ID vision_start=ID vision_end=ID"),
        (["--token-ids", "start=1"], "is not NAME=ID"),
        (["--token-ids", "im_start=1", "im_start=2"], "twice"),
        ([*WORDS, "vision=3", "image=3"], "must differ"),
        ([*WORDS, "image=150"], "im_start=150 and image=150 must differ"),
        (["--token-ids", "im_start=160", *WORDS[2:]], "im_start=160 must be a text token, in [0, 160)"),
        ([*WORDS[:-1], "vision_end=500"], "eoi_token_id=500 must be a text token"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tmp_path, capsys, words, message):
    assert main([str(CHECKPOINT), str(tmp_path / "mot"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_placeholder_that_is_given_leaves_another_id_to_the_other():
    config = import_bagel(
        str(CHECKPOINT), FIXTURES / "none", token_ids=TOKEN_IDS | {"image": 160}, dry_run=True
    ).model.config
    assert config.placeholder_token_ids == {"image": 160, "vision": 161}


def test_a_dry_run_writes_nothing(tmp_path, imported, capsys):
    assert main([str(CHECKPOINT), str(tmp_path / "mot"), *WORDS, "--dry-run"]) == 0
    assert "layers.{0..1}.mlp_moe_gen.up_proj.weight" in capsys.readouterr().out
    assert export_main([str(imported), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "ae.safetensors: 180 tensors" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_only_a_folder_of_bagel_is_replaced(tmp_path, imported):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("")
    with pytest.raises(ConversionError, match=r"holds no llm_config\.json"):
        export_bagel(str(imported), tmp_path / "out", overwrite=True)


def test_a_model_that_bagel_cannot_build_stays(tmp_path, imported):
    shutil.copytree(imported, tmp_path / "mot")
    changed_json("config.json", timestep_addition="patch")(tmp_path / "mot")
    with pytest.raises(ConversionError, match="timestep_addition='patch', where BAGEL has 'token'"):
        export_bagel(str(tmp_path / "mot"), tmp_path / "out")
