"""Towers of different width and kind, against the model written out token by token, each in its own width."""

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from modeling_mot import ModalityRouting, MoTConfig, MoTForCausalLM, MoTModel
from modeling_mot.decoding_lean import ForwardDecoder, LeanDecoder, decoder_of

from . import naive_generation
from . import naive_transfusion as transfusion
from .naive import causal_softmax_attention, rms_norm, rotate, weights_of
from .test_lean_decoding import forwards, ordinary


# Every field of a tower, in every direction: narrower and wider than text, with a norm of queries and without.
KINDS = {
    "narrow": {"image": {"hidden_size": 20, "intermediate_size": 24}},
    "wide": {"image": {"hidden_size": 44}, "speech": {"hidden_size": 20}},
    "no gate": {"image": {"gated_mlp": False, "hidden_act": "relu2"}},
    "norms": {"image": {"rms_norm_eps": 0.3, "norm_offset": True}, "speech": {"rms_norm_eps": 0.1}},
    "heads": {"image": {"qk_norm": "rms"}, "speech": {"qk_norm": "layer"}},
    "all heads": {"text": {"qk_norm": "rms_all_heads"}},
    "all": {
        "text": {"intermediate_size": 40, "qk_norm": "rms"},
        "image": {"hidden_size": 20, "gated_mlp": False, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.1},
        "speech": {"hidden_size": 36, "norm_offset": True},
    },
}
IDS = torch.randint(1, 60, (2, 24), generator=torch.Generator().manual_seed(3))
MODALITY_IDS = torch.randint(0, 3, (2, 24), generator=torch.Generator().manual_seed(4))


def different(tiny_model, kind, **fields):
    """A model with every tensor random: norms of ones and biases of zeros would hide a mistake."""
    model = tiny_model(tower_configs=KINDS[kind], attention_bias=True, mlp_bias=True, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def normed(x, w, name, fields):
    return rms_norm(x, w[f"{name}.weight"] + (1.0 if fields["norm_offset"] else 0.0), fields["rms_norm_eps"])


def normed_heads(x, w, name, fields):
    """Queries or keys of one token, (H * d,) -> (H, d)"""
    heads = x.unflatten(-1, (-1, fields["head_dim"]))
    if fields["qk_norm"] == "rms":
        return normed(heads, w, name, fields)
    if fields["qk_norm"] == "rms_all_heads":
        return normed(x, w, name, fields).view_as(heads)
    if fields["qk_norm"] == "layer":
        return F.layer_norm(heads, heads.shape[-1:]) * w[f"{name}.weight"] + w[f"{name}.bias"]
    return heads


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def feed_forward(x, w, name, fields):
    act = ACT2FN[fields["hidden_act"]]
    up = linear(x, w, f"{name}.up_proj")
    return linear(
        act(linear(x, w, f"{name}.gate_proj")) * up if fields["gated_mlp"] else act(up), w, f"{name}.down_proj"
    )


def naive_layer(x, w, name, towers, fields):
    """One layer of one row, in which every token is a vector of its own length.  L times (D,) -> the same"""
    tokens = list(enumerate(towers))

    def in_block(x, norm, block):
        """Each token's block, with its tower's norm before or behind it."""

        def norms(x):
            return [normed(x[i], w, f"{name}.{norm}.{t}", fields[t]) for i, t in tokens]

        return norms(block(x)) if fields["text"]["norm_position"] == "post" else block(norms(x))

    def attention(x):
        def heads(which):
            rows = [linear(x[i], w, f"{name}.self_attn.{which}_proj.{t}") for i, t in tokens]
            if which != "v":
                norms = [f"{name}.self_attn.{which}_norm.{t}" for t in towers]
                rows = [normed_heads(rows[i], w, norms[i], fields[t]) for i, t in tokens]
            return torch.stack(rows).view(len(x), -1, fields["text"]["head_dim"])

        theta, positions = fields["text"]["rope_parameters"]["rope_theta"], torch.arange(len(x))
        query, key = (rotate(heads(which), positions, theta) for which in "qk")
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        joined = causal_softmax_attention(query, key, heads("v"), seen)
        return [linear(joined[i], w, f"{name}.self_attn.o_proj.{t}") for i, t in tokens]

    def feed_forwards(x):
        return [feed_forward(x[i], w, f"{name}.mlp.{t}", fields[t]) for i, t in tokens]

    x = [a + b for a, b in zip(x, in_block(x, "input_layernorm", attention))]
    return [a + b for a, b in zip(x, in_block(x, "post_attention_layernorm", feed_forwards))]


def naive_logits(w, config, ids, modality_ids):
    """Logits of one row.  (L,), (L,) -> (L, V)"""
    towers = [config.towers[config.modalities[index]] for index in modality_ids.tolist()]
    fields = {name: config.to_dict() | (config.tower_configs or {}).get(name, {}) for name in config.tower_names}

    # An embedding is cut, or filled with zeros, to the width of its token's tower; the head reads as much of it.
    table, head = w["model.embed_tokens.weight"], w["lm_head.weight"]
    x = [F.pad(table[i], (0, 99))[: fields[t]["hidden_size"]] for i, t in zip(ids, towers)]
    for layer in range(config.num_hidden_layers):
        x = naive_layer(x, w, f"model.layers.{layer}", towers, fields)
    x = [normed(one, w, f"model.norm.{t}", fields[t]) for one, t in zip(x, towers)]
    return torch.stack([head[:, : len(one)] @ one[: head.shape[1]] for one in x])


def assert_near(own, other, share, name=None):
    """The difference is a small share of the whole; transformers' norms round to float32."""
    assert (own - other).norm() <= share * other.norm(), name


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_the_model_written_out_token_by_token(tiny_model, kind, norm_position):
    model = different(tiny_model, kind, norm_position=norm_position).double()
    w, upstream = weights_of(model), torch.randn(2, 24, 60, dtype=torch.float64)
    logits = model(IDS, modality_ids=MODALITY_IDS).logits
    expected = torch.stack([naive_logits(w, model.config, *row) for row in zip(IDS, MODALITY_IDS)])
    assert_near(logits, expected, 1e-6)
    logits.backward(upstream)
    expected.backward(upstream)
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, w[name].grad, 1e-5, name)


@pytest.mark.parametrize("kind", KINDS)
def test_counted_parameters_are_those_of_the_model(tiny_model, kind):
    model = different(tiny_model, kind, moe_towers=["speech"])
    config = model.config
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    own = {
        tower: sum(p.numel() for name, p in model.named_parameters() if tower in name.split("."))
        for tower in config.tower_names
    }
    others = [p for name, p in model.named_parameters() if ".experts." in name and ".experts.0." not in name]
    own["speech"] -= sum(p.numel() for p in others)  # a token passes through one expert
    assert config.num_parameters(active=True) == max(own.values()) + 2 * 60 * 32


def test_a_narrow_tower_ends_in_zeros_and_reads_nothing_behind_its_width(tiny_config):
    config = tiny_config(tower_configs=KINDS["narrow"])
    model, embeds = MoTModel(config), torch.randn(1, 6, 32)
    modality_ids = torch.tensor([[0, 1, 1, 0, 1, 2]])
    hidden_states = model(inputs_embeds=embeds, modality_ids=modality_ids).last_hidden_state
    assert not hidden_states[modality_ids == 1][:, 20:].any() and hidden_states[modality_ids == 1][:, :20].all()
    embeds[modality_ids == 1, 20:] = 1e6
    assert torch.equal(model(inputs_embeds=embeds, modality_ids=modality_ids).last_hidden_state, hidden_states)


def test_embeddings_are_as_wide_as_the_widest_tower(tiny_config):
    model = MoTModel(tiny_config(tower_configs=KINDS["wide"]))
    message = "hidden_size=44 of the widest of tower_widths={'text': 32, 'image': 44, 'speech': 20}"
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=torch.randn(1, 3, 32), modality_ids=torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_full_forwards(tiny_model, kind):
    model = different(tiny_model, kind)
    prompt = [1, 9, 12, 3, 31]
    out = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert out[0].tolist() == naive_generation.greedy(model, prompt, 16)


def test_lean_steps_serve_towers_that_share_their_width_and_epsilon(tiny_model, monkeypatch):
    lean = {kind: LeanDecoder.of(different(tiny_model, kind)) is not None for kind in KINDS}
    assert lean == dict.fromkeys(KINDS, False) | dict.fromkeys(["no gate", "heads", "all heads"], True)
    model = different(tiny_model, "no gate", qk_norm="rms")
    kwargs = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids = torch.tensor([[1, 9, 12, 3, 31]])
    wanted, calls = ordinary(model, monkeypatch, ids, **kwargs), forwards(model)
    output = model.generate(ids, **kwargs)
    assert len(calls) == 1  # the prompt's
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(wanted.logits), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["wide", "all"])
def test_served_steps_of_towers_of_different_width_equal_the_forward(tiny_model, kind):
    model = different(tiny_model, kind)
    assert isinstance(decoder_of(model), ForwardDecoder)
    prompts = [[1, 9, 12, 3, 31], [1, 8]]
    served = model.generate_batch(prompts, max_new_tokens=8, do_sample=False)
    assert [list(output.generated_tokens) for output in served.values()] == [
        naive_generation.greedy(model, prompt, 8)[len(prompt) :] for prompt in prompts
    ]


@pytest.mark.parametrize("products", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_products_give_the_same(tiny_model, kind, products):
    dtype = torch.bfloat16 if products == "grouped_mm" else torch.float32
    model = different(tiny_model, kind).to(dtype)
    expected = model(IDS, modality_ids=MODALITY_IDS).logits
    model.set_tower_products(products)
    tolerance = {"rtol": 2e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(model(IDS, modality_ids=MODALITY_IDS).logits, expected, **tolerance)


def test_feed_forwards_without_a_gate_are_joined(tiny_model, monkeypatch):
    model = tiny_model(gated_mlp=False, hidden_act="relu2")
    model.set_tower_products("batched_mm")
    called, forward = [], type(model.model.layers[0].mlp["text"]).forward
    monkeypatch.setattr(
        type(model.model.layers[0].mlp["text"]), "forward", lambda *a: (called.append(1), forward(*a))[1]
    )
    logits = model(IDS, modality_ids=MODALITY_IDS).logits
    assert not called
    model.set_tower_products("separate")
    torch.testing.assert_close(logits, model(IDS, modality_ids=MODALITY_IDS).logits, rtol=1e-5, atol=1e-5)
    assert len(called) == 6


@pytest.mark.parametrize("kind", ["all", "heads"])
@torch.no_grad()
def test_a_saved_model_is_the_same_when_it_is_loaded(tiny_model, tmp_path, kind):
    model = different(tiny_model, kind)
    model.save_pretrained(tmp_path)
    loaded, info = MoTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.tower_configs == KINDS[kind]
    logits = loaded.eval()(IDS, modality_ids=MODALITY_IDS).logits
    assert torch.equal(logits, model(IDS, modality_ids=MODALITY_IDS).logits)


def test_adapters_fit_every_tower(tiny_model):
    peft = pytest.importorskip("peft")
    model = different(tiny_model, "wide")
    expected = model(IDS, modality_ids=MODALITY_IDS).logits
    targets = r".*\.(q_proj|o_proj)\.[^.]+|.*\.mlp\.[^.]+\.(up_proj|down_proj)"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    logits = adapted(input_ids=IDS, modality_ids=MODALITY_IDS).logits
    assert not torch.allclose(logits, expected, atol=1e-2)
    logits.sum().backward()
    assert all(p.grad.any() for name, p in adapted.named_parameters() if "lora" in name)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS, modality_ids=MODALITY_IDS).logits, logits, rtol=1e-4, atol=1e-3)


def test_recomputed_layers_give_the_same_gradients(tiny_model):
    model, gradients = different(tiny_model, "all").train(), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, modality_ids=MODALITY_IDS, labels=IDS).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# ------------------------------------------------------------------------------------------- images that are diffused


def widened(model, width, widths):
    """The same Transfusion model with all towers of one width: weights are filled with zeros.

    The RMS of n values with zeros behind them, over D values, is sqrt(n / D) of what it was: the norm's weight takes
    that back, and the epsilon is as much smaller.
    """
    config = model.config.to_dict() | {"hidden_size": width}
    config["tower_configs"] = {
        tower: {"rms_norm_eps": model.config.rms_norm_eps * own / width} for tower, own in widths.items()
    }
    wide = type(model)(type(model.config).from_dict(config)).eval()
    source = model.state_dict()
    with torch.no_grad():
        for name, target in wide.state_dict(keep_vars=True).items():
            value = source[name]
            tower = next((part for part in name.split(".") if part in widths), None)
            target.zero_()[tuple(slice(size) for size in value.shape)] = value
            if tower is not None and "norm" in name:
                target.mul_((widths[tower] / width) ** 0.5)
    return wide


@pytest.mark.parametrize("patchifier", ["linear", "unet"])
@pytest.mark.parametrize("image", [24, 40])
@torch.no_grad()
def test_images_of_a_tower_of_another_width_are_those_of_a_wide_model(patchifier, image):
    towers = {"image": {"hidden_size": image}}
    model = transfusion.tiny_model(tower_configs=towers, patchifier=patchifier, latent_position_table=None)
    wide = widened(model, 40, {"text": 32, "image": image})
    row = [1, 9, *transfusion.image(), 8, *transfusion.image(4, 6), 7]
    ids, latents = torch.tensor([row]), torch.randn(2, 2, 4, 6)
    given = {"latents": latents, "image_sizes": [[4, 4], [4, 6]], "noise": torch.randn(2, 2, 4, 6), "labels": ids}
    given["timesteps"] = torch.tensor([300, 700])
    outputs = [one(ids, **given) for one in (model, wide)]
    torch.testing.assert_close(outputs[0].prediction, outputs[1].prediction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)

    # The same when they are drawn behind a prompt, and text goes on behind them.
    prompt = torch.tensor([[1, 9, 8, 3]])
    drawn = [
        one.generate(
            prompt, max_new_tokens=12, num_inference_steps=3, guidance_scale=2.0, do_sample=False,
            generator=torch.Generator().manual_seed(1), return_dict_in_generate=True,
        )
        for one in (model, wide)
    ]  # fmt: skip
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    for own, other in zip(drawn[0].latents, drawn[1].latents, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------- configurations


REFUSED = {
    "unknown tower": ({"video": {}}, {}, "unknown tower of tower_configs video"),
    "unknown field": ({"image": {"hiden_size": 8}}, {}, "hiden_size; did you mean 'hidden_size'"),
    "heads": ({"image": {"num_attention_heads": 2}}, {}, "unknown field of tower_configs\\['image'\\]"),
    "size": ({"image": {"hidden_size": 0}}, {}, "tower_configs\\['image'\\].hidden_size=0 must be at least 1"),
    "gate": ({"image": {"gated_mlp": 1}}, {}, "gated_mlp=1 must be a bool"),
    "text": ({"text": {"hidden_size": 40}}, {}, "tower of text is as wide as the embeddings, hidden_size=32"),
    "shared part": (
        {"image": {"hidden_size": 20}},
        {"untied": ["attention", "feed_forward"]},
        "hidden_size=20 is of a part that all towers share: add \\['norm'\\]",
    ),
    "norms": (
        {"image": {"qk_norm": "rms"}, "text": {"qk_norm": "rms_all_heads"}},
        {},
        "'rms_all_heads' runs over all heads",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_a_tower_cannot_have_are_refused_by_name(tiny_config, case):
    towers, fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        tiny_config(tower_configs=towers, **fields)


def test_a_tower_has_the_models_fields_but_its_own(tiny_config):
    config = tiny_config(tower_configs=KINDS["all"])
    image = config.tower_config("image")
    assert (image.hidden_size, image.intermediate_size, image.gated_mlp) == (20, 48, False)
    assert config.tower_config("text").intermediate_size == 40 and config.intermediate_size == 48
    assert config.tower_widths == {"text": 32, "image": 20, "speech": 36} and config.widest_hidden_size == 36
    assert tiny_config(tower_configs={"image": {"hidden_act": "gelu"}}).tower_widths == {}
    assert MoTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_routing_knows_nothing_of_widths(tiny_config):
    routing = ModalityRouting.from_modality_ids(MODALITY_IDS, tiny_config())
    assert (
        routing.towers
        == ModalityRouting.from_modality_ids(MODALITY_IDS, tiny_config(tower_configs=KINDS["all"])).towers
    )
