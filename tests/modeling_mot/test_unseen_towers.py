"""Towers that never see another (`unseen_towers`), and keys that other towers read through a norm of their own."""

import math

import pytest
import torch
from transformers.cache_utils import DynamicCache

from modeling_mot import ModalityRouting, MoTConfig
from modeling_mot.attention_masks import plan_rows

from .naive import by_modality, rms_norm, rotate, swiglu, weights_of
from .naive_transfusion import BOI, BOS, EOI, PATCH, tiny_config, uncompiled_flex
from .naive_transfusion import tiny_model as transfusion_model
from .test_serving import alone, drawings, painting_model, together


BLIND = {"unseen_towers": {"text": ["image"]}}
CROSS = {"cross_key_norm": ["text", "speech"]}
IDS = torch.tensor([[9, 31, 12, 33, 50, 14, 40, 21]])  # text, image, text, image, speech, text, image, text
KINDS = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 0]])


def moved(model, ids, **kwargs):
    """(L, L) booleans: does the last hidden state at a query move with the embedding at a key?"""
    length = ids.shape[1]
    rows = ids.expand(length + 1, -1)
    embeds = model.model.embed(rows).detach()
    for place in range(length):
        embeds[place + 1, place] += torch.randn(embeds.shape[-1])
    kwargs = {name: value.expand(length + 1, -1) for name, value in kwargs.items()}
    with torch.no_grad():
        out = model.model(inputs_embeds=embeds, modality_ids=model.model.modality_ids_of(rows), **kwargs)[0]
    return ((out[1:] - out[:1]).abs().amax(-1) > 1e-6).T


def expected(documents=None):
    """Who sees whom among `IDS`."""
    documents = documents or [0] * 8
    blind = [[KINDS[0, q] == 0 and KINDS[0, k] > 0 for k in range(8)] for q in range(8)]
    rows = [[k <= q and documents[k] == documents[q] and not blind[q][k] for k in range(8)] for q in range(8)]
    return torch.tensor(rows)


@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("documents", [None, [0, 0, 0, 1, 1, 1, 1, 1]])
def test_text_never_sees_the_others(tiny_model, monkeypatch, attention, documents):
    uncompiled_flex(monkeypatch)
    model = tiny_model(attn_implementation=attention, unseen_towers={"text": ["image", "speech"]})
    kwargs = {} if documents is None else {"document_ids": torch.tensor([documents])}
    assert torch.equal(moved(model, IDS, **kwargs), expected(documents))


def test_ranges_are_planned_where_they_are_ranges(tiny_model):
    config = tiny_model(**BLIND).config
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    ends_with_images = torch.tensor([[0, 1, 1, 0, 0, 1]])
    ids = ends_with_images * 30 + 9
    assert plan_rows(config, ids, documents, modality_ids=ends_with_images) is not None
    assert plan_rows(config, ids, documents, modality_ids=torch.tensor([[0, 1, 0, 0, 0, 1]])) is None
    assert plan_rows(config, ids, documents) is None
    model = tiny_model(**BLIND)
    by_range = model(ids, document_ids=documents).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(by_range, model(ids, document_ids=documents).logits)


@pytest.mark.parametrize("fields", [BLIND, CROSS, BLIND | CROSS, BLIND | CROSS | {"qk_norm": "rms"}])
@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(tiny_model, fields, attention):
    model = tiny_model(attn_implementation=attention, **fields)
    whole = model(IDS).logits
    cache, logits = DynamicCache(config=model.config), []
    for start, stop in ((0, 3), (3, 4), (4, 7), (7, 8)):
        logits.append(
            model(
                IDS[:, start:stop],
                past_key_values=cache,
                modality_ids=KINDS[:, 0 if "unseen_towers" in fields else start : stop],
            ).logits
        )
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_keys_of_unknown_towers_are_refused(tiny_model):
    model = tiny_model(**BLIND)
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"pass modality_ids of all keys, \(1, 6\)"):
        model(IDS[:, 4:6], past_key_values=cache)


@pytest.mark.parametrize("fields", [BLIND, CROSS | BLIND])
@torch.no_grad()
def test_generated_tokens_equal_full_forwards(tiny_model, fields):
    model = tiny_model(**fields)
    made = model.generate(IDS, max_new_tokens=6, do_sample=False, constrain_spans=False, eos_token_id=None)
    ids = IDS
    for token in made[0, IDS.shape[1] :]:
        logits = model(ids).logits[0, -1]
        assert logits[token] >= logits.max() - 1e-4
        ids = torch.cat([ids, token.view(1, 1)], dim=1)


def cross_attention(query, keys, crossing, value, towers):
    """Softmax attention of each query, token by token: its own tower's keys as they are, the others normed again."""
    group, outputs = query.shape[1] // value.shape[1], []
    for q in range(len(query)):
        read = torch.stack([keys[k] if towers[k] == towers[q] else crossing[k] for k in range(q + 1)])
        for head in range(query.shape[1]):
            scores = query[q, head] @ read[:, head // group].T / math.sqrt(query.shape[-1])
            outputs.append(scores.softmax(-1) @ value[: q + 1, head // group])
    return torch.stack(outputs).unflatten(0, (len(query), -1)).flatten(1)


@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
def test_keys_of_other_towers_pass_the_norm(tiny_model, attention):
    model = tiny_model(attn_implementation=attention, num_hidden_layers=1, **CROSS)
    config, ids, kinds = model.config, IDS[0], KINDS[0]
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    w = weights_of(model)
    towers = [config.towers[name] for name in config.modalities]
    attn, eps, theta = "model.layers.0.self_attn", config.rms_norm_eps, config.rope_parameters["rope_theta"]

    def normed(x, which):
        return by_modality(x, kinds, towers, lambda x, tower: rms_norm(x, w[f"{which}.{tower}.weight"], eps))

    def linear(x, which):
        return by_modality(x, kinds, towers, lambda x, tower: x @ w[f"{attn}.{which}.{tower}.weight"].T)

    def crossing(x, tower):
        name = f"{attn}.k_norm_cross.{tower}.weight"
        return rms_norm(x, w[name], eps) if name in w else x

    x, places = w["model.embed_tokens.weight"][ids], torch.arange(len(ids))
    rows = normed(x, "model.layers.0.input_layernorm")
    query, key, value = (linear(rows, f"{c}_proj").unflatten(-1, (-1, config.head_dim)) for c in "qkv")
    cross = torch.stack([crossing(key[k], config.modalities[kinds[k]]) for k in range(len(ids))])
    query, key, cross = (rotate(heads, places, theta) for heads in (query, key, cross))
    x = x + linear(cross_attention(query, key, cross, value, kinds.tolist()), "o_proj")
    rows = normed(x, "model.layers.0.post_attention_layernorm")
    x = x + by_modality(rows, kinds, towers, lambda x, tower: swiglu(x, w, f"model.layers.0.mlp.{tower}"))
    naive = normed(x, "model.norm") @ w["lm_head.weight"].T
    made = model(IDS).logits[0]
    torch.testing.assert_close(made, naive.float(), rtol=1e-4, atol=1e-5)

    # Their gradients too, and zeros where no other tower reads the keys.
    upstream = torch.randn_like(made)
    (made * upstream).sum().backward()
    (naive * upstream.double()).sum().backward()
    name = f"{attn}.k_norm_cross.text.weight"
    grad = dict(model.named_parameters())[name].grad
    torch.testing.assert_close(grad, w[name].grad.float(), rtol=1e-4, atol=1e-4)
    model.zero_grad()
    model(IDS[:, :1]).logits.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for n, p in model.named_parameters() if "k_norm_cross" in n)


def test_parameters_and_their_names(tiny_model):
    model = tiny_model(**CROSS, **BLIND)
    names = [name for name, _ in model.named_parameters() if "k_norm_cross" in name]
    assert names == [
        f"model.layers.{layer}.self_attn.k_norm_cross.{tower}.weight"
        for layer in (0, 1)
        for tower in ("text", "speech")
    ]
    assert model.config.num_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"unseen_towers": {"text": ["nose"]}}, "names 'nose', which is not one of the towers"),
        ({"unseen_towers": {"text": ["text"]}}, "must see each other"),
        ({"cross_key_norm": ["nose"]}, "names 'nose'"),
        ({"cross_key_norm": ["text"], "untied": ["norm"]}, "lacks 'attention'"),
    ],
)
def test_towers_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoTConfig(hidden_size=32, num_attention_heads=4, **fields)


def test_flash_attention_is_refused(tiny_model):
    model = tiny_model(**BLIND)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention cannot hide"):
        model(IDS)


# ------------------------------------------------------------------------------------------------------- Transfusion


PROMPT = [BOS, 9, 10, BOI, *[PATCH] * 4, EOI, 11, 12]


@pytest.mark.parametrize(
    "fields",
    [
        BLIND,
        BLIND | {"markers_in_image_block": True},
        {"cross_key_norm": ["text"]},
        BLIND | {"cross_key_norm": ["text"]},
    ],
)
@torch.no_grad()
def test_pictures_and_text_equal_full_forwards(fields):
    model = transfusion_model(**fields)
    prompt, clean = torch.tensor([PROMPT, PROMPT[:-2] + [20, 21]]), torch.randn(2, 2, 4, 4)
    seen = []

    def keep(model, step, timestep, state):
        seen.append(state["latents"].clone())

    settings = {"num_inference_steps": 2, "scheduler": "ddim", "latent_bound": math.inf, "callback_on_step_end": keep}
    made = model.generate(
        torch.cat([prompt, torch.full((2, 1), BOI)], dim=1),
        latents=clean,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        **settings,
    )
    drawn = torch.stack([latents[-1] for latents in made.latents])
    ids = made.sequences[:, : prompt.shape[1] + 12 + 1]
    latents = torch.stack([clean[0], drawn[0], clean[1], drawn[1]])
    output = model(ids, latents=latents, clean_images=torch.ones(4, dtype=torch.bool))
    # Each token of text is the likeliest of the full forward.
    behind = prompt.shape[1] + 1 + 4 + 1
    logits = output.logits[:, behind - 1 : -1]
    assert ids.shape[1] > behind + 2
    chosen = logits.gather(2, ids[:, behind:, None])
    allowed = logits.clone()
    allowed[..., [BOI, EOI, PATCH]] = -math.inf
    assert (chosen[..., 0] >= allowed.amax(-1) - 1e-4).all()

    # What text does not see does not move it; what it sees does.
    other = model(ids, latents=latents + 1, clean_images=torch.ones(4, dtype=torch.bool)).logits
    is_text = (ids != PATCH)[..., None]
    same = torch.allclose(output.logits * is_text, other * is_text, atol=1e-6)
    assert same == ("unseen_towers" in fields)


@pytest.mark.parametrize("fields", [BLIND, BLIND | {"cross_key_norm": ["text"], "markers_in_image_block": True}])
def test_requests_that_are_served_equal_generate(fields):
    model, requests = painting_model(**fields), drawings(**fields)
    results = together(model, requests, {"max_requests_per_batch": 3})
    for request, result in zip(requests, results.values(), strict=True):
        wanted = alone(model, request)
        assert result.error is None
        assert torch.equal(result.output.sequences, wanted.sequences)
        for latents, theirs in zip(result.output.latents[0], wanted.latents[0], strict=True):
            torch.testing.assert_close(latents, theirs, rtol=0, atol=1e-4 * max(1, theirs.abs().max().item()))


def test_images_must_see_text():
    with pytest.raises(ValueError, match="the tower of images, which are drawn"):
        tiny_config(unseen_towers={"image": ["text"]})


def test_towers_of_a_routing(tiny_config):
    config = tiny_config()
    routing = ModalityRouting.from_modality_ids(KINDS, config, multiple_of=4)
    assert torch.equal(routing.tower_ids(1, torch.device("cpu")), KINDS)
