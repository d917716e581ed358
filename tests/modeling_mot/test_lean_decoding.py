"""generate() on plain tensors against the model's own forward."""

from functools import wraps

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from modeling_mot import MoTConfig, decoding_lean
from modeling_mot.decoding_lean import PACK_AFTER, LeanDecoder

from . import naive_generation as naive


PROMPTS = torch.tensor([[0, 0, 1, 9, 12, 7], [0, 1, 9, 3, 31, 40], [1, 8, 9, 9, 9, 5]])
EVERYTHING = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SHAPES = {
    "pre": {},
    "post": {"norm_position": "post"},
    "rms": {"qk_norm": "rms"},
    "layer": {"qk_norm": "layer"},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
}


def ordinary(model, monkeypatch, *args, **kwargs):
    """What transformers' loop and the model's forward make of the same call."""
    with monkeypatch.context() as patch:
        patch.setattr(LeanDecoder, "of", lambda model: None)
        return model.generate(*args, **kwargs)


def forwards(model) -> list:
    """Grows with every forward of the model, without a hook that would be noticed."""
    calls, original = [], type(model).forward

    class Counted(type(model)):
        @wraps(original)
        def forward(self, *args, **kwargs):
            calls.append(1)
            return original(self, *args, **kwargs)

    model.__class__ = Counted
    return calls


COMBINATIONS = [(variant, "pre") for variant in MoTConfig.variant_names()] + [
    (v, shape) for v in ("mot", "dense") for shape in SHAPES
]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("variant", "shape"), dict.fromkeys(COMBINATIONS))
def test_tokens_logits_and_cache_equal_those_of_the_forward(tiny_model, monkeypatch, variant, shape, padded):
    model = tiny_model(variant, **SHAPES[shape])
    ids = PROMPTS if padded else PROMPTS[2:]
    kwargs = EVERYTHING | {"attention_mask": (ids > 0).long(), "max_new_tokens": 12}
    wanted = ordinary(model, monkeypatch, ids, **kwargs)
    calls = forwards(model)
    output = model.generate(ids, **kwargs)
    assert len(calls) == 1  # the prompt's
    assert torch.equal(output.sequences, wanted.sequences)
    for name in ("logits", "scores"):
        torch.testing.assert_close(getattr(output, name), getattr(wanted, name), atol=5e-5, rtol=1e-5)
    for layer, other in zip(output.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(layer.values, other.values, atol=5e-5, rtol=1e-5)


def test_the_cache_grows_as_far_as_it_is_needed(tiny_model, monkeypatch):
    monkeypatch.setattr(decoding_lean, "COLUMNS", 2)
    model = tiny_model()
    out = model.generate(torch.tensor([[1, 9, 3]]), max_new_tokens=30, do_sample=False)
    assert out[0].tolist() == naive.greedy(model, [1, 9, 3], 30)


def test_a_conversation_goes_on_from_the_cache_it_left(tiny_model):
    model, cache = tiny_model(), DynamicCache(config=tiny_model().config)
    first = model.generate(torch.tensor([[1, 9, 12]]), max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 7
    prompt = torch.cat([first, torch.tensor([[10, 3]])], dim=1)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    out = model.generate(prompt, past_key_values=cache, **kwargs)
    assert out[0].tolist() == naive.greedy(model, prompt[0].tolist(), 8)


def test_in_bfloat16_tokens_are_the_likeliest_to_its_rounding(tiny_model):
    model = tiny_model().bfloat16()
    tokens = model.generate(PROMPTS[2:], max_new_tokens=40, do_sample=False, constrain_spans=False)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[0, 5:].float()
    chosen = logits.gather(1, tokens[0, 6:, None]).squeeze(1)
    assert (logits.amax(dim=1) - chosen).max() < 0.2 and logits.std() > 1


# ------------------------------------------------------------------------------- models that are more than weights


TILT = torch.linspace(-1, 2, 32)


class Adapted(nn.Linear):
    def forward(self, rows):
        return super().forward(rows) - 1


def hooked_projection(model):
    model.model.layers[1].self_attn.o_proj["text"].register_forward_hook(lambda module, inputs, output: output * TILT)


def adapted_projection(model):
    model.model.layers[1].mlp["text"].up_proj.__class__ = Adapted


def replaced_norm(model):
    norm = model.model.norm["image"]
    norm.forward = lambda rows: rows * TILT


def hooked_layer(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * TILT)


def replaced_layer(model):
    layer = model.model.layers[0]
    layer.forward = lambda *args, original=layer.forward, **kwargs: original(*args, **kwargs) * TILT


def eager(model):
    model.set_attn_implementation("eager")


LEAVES, WHOLES = (hooked_projection, adapted_projection, replaced_norm), (hooked_layer, replaced_layer, eager)


@pytest.mark.parametrize("change", LEAVES + WHOLES)
def test_what_modules_are_beside_their_weights_takes_effect(tiny_model, change):
    model, prompt = tiny_model(), [1, 9, 3]
    plain = naive.greedy(model, prompt, 12)
    change(model)
    assert (LeanDecoder.of(model) is None) == (change in WHOLES)
    changed = naive.greedy(model, prompt, 12)
    assert model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist() == changed
    assert (changed == plain) == (change is eager)


def test_training_and_autocast_are_the_forwards_affair(tiny_model):
    assert LeanDecoder.of(tiny_model().train()) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LeanDecoder.of(tiny_model()) is None


def test_a_hook_acts_on_every_token(tiny_model):
    model, calls = tiny_model(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    out = model.generate(torch.tensor([[1, 9, 3]]), max_new_tokens=6, do_sample=False)
    assert len(calls) == 6 and out[0].tolist() == naive.greedy(model, [1, 9, 3], 6)


# --------------------------------------------------------------------------------------------------- packed weights


def products_of_packed_weights(monkeypatch) -> list:
    """Grows with every product of a packed weight."""
    calls, original = [], torch.ops.mkldnn._linear_pointwise

    def counted(rows, weight, *args):
        if weight.layout == torch._mkldnn:
            calls.append(1)
        return original(rows, weight, *args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


def test_weights_are_packed_once_they_have_been_used_for_a_while(tiny_model, monkeypatch):
    model, calls = tiny_model("dense"), products_of_packed_weights(monkeypatch)
    model.generate(torch.tensor([[1, 9, 3]]), max_new_tokens=PACK_AFTER + 1, do_sample=False)
    assert not calls
    out = model.generate(torch.tensor([[1, 9, 3]]), max_new_tokens=PACK_AFTER + 3, do_sample=False)
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert len(calls) == 2 * linears and out[0].tolist() == naive.greedy(model, [1, 9, 3], PACK_AFTER + 3)


def test_there_is_a_bound_on_what_is_packed(tiny_model, monkeypatch):
    model, calls = tiny_model("dense"), products_of_packed_weights(monkeypatch)
    monkeypatch.setattr(decoding_lean, "PACKED_BYTES", 32 * 32 * 4)  # the first projection
    out = model.generate(torch.tensor([[1, 9, 3]]), max_new_tokens=PACK_AFTER + 3, do_sample=False)
    assert len(calls) == 2 and out[0].tolist() == naive.greedy(model, [1, 9, 3], PACK_AFTER + 3)


def test_a_server_sees_weights_that_change_in_place(tiny_model):
    model, prompt, count = tiny_model(), [1, 9, 3], PACK_AFTER + 4
    server = model.init_continuous_batching(max_new_tokens=count, do_sample=False)
    first = server.serve([prompt])["req_0"].generated_tokens
    assert first == naive.greedy(model, prompt, count)[len(prompt) :]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.linspace(0.5, 2.0, parameter.shape[-1]))
    changed = naive.greedy(model, prompt, count)[len(prompt) :]
    (second,) = (output.generated_tokens for output in server.serve([prompt]).values())
    assert second == changed != first


# -------------------------------------------------------------------------------------------------------- generators


@pytest.mark.parametrize("variant", ["mot", "hybrid"])
def test_each_sequence_draws_from_its_own_generator(tiny_model, variant):
    model = tiny_model(variant)
    kwargs = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "top_k": 0}

    def draw(ids, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.generate(ids, attention_mask=torch.ones_like(ids), generator=generators, **kwargs)

    ids = torch.tensor([[1, 9, 3], [1, 9, 12], [1, 8, 5]])
    together = draw(ids, [3, 4, 5])
    for row, seed in enumerate([3, 4, 5]):
        assert torch.equal(together[row], draw(ids[row : row + 1], [seed])[0])
        torch.manual_seed(seed)
        assert together[row].tolist() == naive.sample(model, [ids[row].tolist()], 12, temperature=2.0)[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"generator": [torch.Generator()] * 2}, "2 entries for 1"),
        ({"generator": torch.Generator(), "num_beams": 2}, "num_beams=2"),
        ({"generator": torch.Generator(), "prompt_lookup_num_tokens": 2}, "assisted"),
        ({"generator": torch.Generator(), "output_attentions": True, "return_dict_in_generate": True}, "output_att"),
    ],
)
def test_generators_that_would_not_be_drawn_from_are_refused(tiny_model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(torch.tensor([[1, 9]]), max_new_tokens=2, do_sample=True, **kwargs)
