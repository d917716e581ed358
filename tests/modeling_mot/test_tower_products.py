"""Products of several towers in one call against a product for each tower, and against the paper's algorithm."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from modeling_mot import MoTForCausalLM
from modeling_mot.tower_routing import ModalityRouting

from .naive import naive_logits, weights_of


PRODUCTS = {"batched_mm": torch.float32, "grouped_mm": torch.bfloat16}  # and what they are compared in
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-3}}
SHARES = {"balanced": [1, 1, 1], "lopsided": [30, 1, 1], "no speech": [1, 1, 0], "text alone": [1, 0, 0]}
# Sizes whose rows are multiples of 16 bytes, as grouped products need.
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def batch_of(shares, rows=2, length=24):
    generator = torch.Generator().manual_seed(5)
    modality_ids = torch.multinomial(torch.tensor(shares, dtype=torch.float), rows * length, True, generator=generator)
    ids = torch.randint(1, 60, (rows, length), generator=generator)
    return {"input_ids": ids, "modality_ids": modality_ids.view(rows, length), "labels": ids}


def losses_and_gradients(model, batch, products):
    model.set_tower_products(products)
    model.zero_grad()
    output = model(**batch, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def separate_calls(monkeypatch):
    """The weights that were multiplied by themselves."""
    seen, linear = [], nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda rows, weight, *bias: (seen.append(weight), linear(rows, weight, *bias))[1]
    )
    return seen


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("shares", SHARES)
def test_joined_products_equal_separate_ones_outputs_and_gradients(tiny_config, separate_calls, products, shares):
    model = MoTForCausalLM(tiny_config(**SIZES)).to(PRODUCTS[products])
    batch = batch_of(SHARES[shares])
    logits, gradients = losses_and_gradients(model, batch, "separate")
    # Queries, keys, values, output, gate, up, down; and the last projection.
    assert len(separate_calls) == 3 * 7 * model.config.num_hidden_layers + 1
    separate_calls.clear()
    joined_logits, joined_gradients = losses_and_gradients(model, batch, products)
    assert separate_calls == [model.lm_head.weight]
    torch.testing.assert_close(joined_logits, logits, **CLOSE[logits.dtype])
    for name, gradient in gradients.items():
        torch.testing.assert_close(joined_gradients[name], gradient, **CLOSE[logits.dtype], msg=name)


def test_batched_products_equal_the_papers_algorithm(tiny_config):
    model = MoTForCausalLM(tiny_config(norm_position="post", **SIZES | {"num_key_value_heads": 4}))
    model.set_tower_products("batched_mm")
    batch, w = batch_of([1, 2, 3]), weights_of(model)
    rows = zip(batch["input_ids"], batch["modality_ids"])
    expected = torch.stack([naive_logits(w, model.config, ids, modality_ids) for ids, modality_ids in rows])
    logits = model(input_ids=batch["input_ids"], modality_ids=batch["modality_ids"]).logits
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_biases_are_added_or_maps_with_them_run_by_themselves(tiny_config, separate_calls):
    model = MoTForCausalLM(tiny_config(**SIZES, attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    logits, gradients = losses_and_gradients(model, batch_of([1, 1, 1]), "separate")
    for products in PRODUCTS:
        separate_calls.clear()
        joined_logits, joined_gradients = losses_and_gradients(model, batch_of([1, 1, 1]), products)
        assert (len(separate_calls) == 1) == (products == "batched_mm")
        torch.testing.assert_close(joined_logits, logits, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(joined_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_mixtures_and_maps_with_hooks_run_by_themselves(tiny_config, separate_calls):
    model = MoTForCausalLM(tiny_config("hybrid", **SIZES))
    model.set_tower_products("batched_mm")
    seen = []
    model.model.layers[0].self_attn.q_proj["image"].register_forward_hook(lambda *_: seen.append(1))
    logits = model(**batch_of([1, 1, 1])).logits
    # Queries of the first layer; the feed-forward of a mixture and its neighbours.
    names = {name for name, parameter in model.named_parameters() if any(parameter is w for w in separate_calls)}
    queries = {name for name in names if "self_attn" in name}
    assert len(seen) == 1 and queries == {
        f"model.layers.0.self_attn.q_proj.{t}.weight" for t in model.config.tower_names
    }
    assert {name.split(".")[3] for name in names - queries - {"lm_head.weight"}} == {"mlp"}
    model.set_tower_products("separate")
    torch.testing.assert_close(logits, model(**batch_of([1, 1, 1])).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("products", PRODUCTS)
def test_autocast_rounds_joined_products_as_it_does_separate_ones(tiny_config, products):
    model, batch = MoTForCausalLM(tiny_config(**SIZES)), batch_of([1, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        separate = model(**batch).logits
        model.set_tower_products(products)
        joined = model(**batch).logits
    assert joined.dtype == separate.dtype == torch.bfloat16
    torch.testing.assert_close(joined, separate, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("products", PRODUCTS)
def test_joined_products_need_no_answer_from_the_device(tiny_config, products):
    batch = batch_of([1, 2, 3])
    config = tiny_config(**SIZES)
    routing = ModalityRouting.from_modality_ids(batch["modality_ids"], config)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = MoTForCausalLM._from_config(config, dtype=PRODUCTS[products])
        model.set_tower_products(products)
        fake = {name: mode.from_tensor(value) for name, value in batch.items()}
        routing = routing._replace(order=mode.from_tensor(routing.order), inverse=mode.from_tensor(routing.inverse))
        output = model(**fake, routing=routing, use_cache=False)
        output.loss.backward()
    assert output.logits.shape == (2, 24, config.vocab_size)


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_compiled_model_with_joined_products_is_one_graph(tiny_config, products):
    batch, config = batch_of([1, 2, 3]), tiny_config(**SIZES)
    model = MoTForCausalLM(config).to(PRODUCTS[products])
    model.set_tower_products(products)
    routing = ModalityRouting.from_modality_ids(batch["modality_ids"], config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, output = (run(**batch, routing=routing, use_cache=False) for run in (model, compiled))
    torch.testing.assert_close(output.logits, expected.logits, **CLOSE[expected.logits.dtype])


def test_an_unknown_word_is_refused(tiny_config):
    with pytest.raises(ValueError, match="'padded' are unknown; there are separate, batched_mm, grouped_mm"):
        MoTForCausalLM(tiny_config()).set_tower_products("padded")
