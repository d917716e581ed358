"""ModalityRouting and PerTower, and a forward that needs nothing from the data."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from modeling_mot import ModalityRouting, MoTForCausalLM
from modeling_mot.tower_routing import PerTower


def routing_of(modality_ids, config):
    return ModalityRouting.from_modality_ids(torch.tensor(modality_ids), config)


def test_order_is_stable_by_tower(tiny_config):
    routing = routing_of([[1, 0, 2, 0], [0, 2, 1, 1]], tiny_config())
    assert routing.counts == (3, 3, 2)
    assert routing.order.tolist() == [1, 3, 4, 0, 6, 7, 2, 5]


def test_grouped_modalities_share_a_slice(tiny_config):
    routing = routing_of([[1, 0, 2, 0]], tiny_config("loo-image"))
    assert dict(zip(routing.towers, routing.counts)) == {"text_speech": 3, "image": 1}
    assert routing.order.tolist() == [1, 2, 3, 0]


def test_restore_undoes_sort(tiny_config):
    modality_ids = torch.randint(0, 3, (3, 11))
    routing = ModalityRouting.from_modality_ids(modality_ids, tiny_config())
    rows = torch.randn(3, 11, 4)
    assert torch.equal(routing.restore(routing.sort(rows), 3), rows)


def test_sorted_slices_are_boolean_selections(tiny_config):
    modality_ids, rows = torch.randint(0, 3, (3, 11)), torch.randn(3, 11, 4)
    routing = ModalityRouting.from_modality_ids(modality_ids, tiny_config())
    for index, part in enumerate(routing.split(routing.sort(rows)).values()):
        assert torch.equal(part, rows[modality_ids == index])


def test_gradient_of_sorting_passes_gradcheck(tiny_config):
    routing = ModalityRouting.from_modality_ids(torch.randint(0, 3, (2, 5)), tiny_config())
    rows = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(routing.sort, rows) and torch.autograd.gradgradcheck(routing.sort, rows)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_one_tower_skips_the_permutation(tiny_config, only):
    routing = routing_of([[only] * 4], tiny_config())
    assert routing.order is None and routing.counts[only] == 4 and routing.num_tokens == 4


def test_absent_towers_run_on_zero_rows_only_while_gradients_are_on(tiny_config):
    routing, rows = routing_of([[0, 0]], tiny_config()), torch.randn(2, 4)
    assert {name: len(part) for name, part in routing.split(rows).items()} == {"text": 2, "image": 0, "speech": 0}
    with torch.no_grad():
        assert list(routing.split(rows)) == ["text"]


def test_shared_module_runs_once_on_all_rows():
    class Count(nn.Module):
        calls = 0

        def forward(self, rows):
            self.calls += 1
            return 2 * rows

    module, routing = Count(), ModalityRouting(("text", "image"), (2, 1))
    outputs = PerTower({"shared": module})(torch.ones(3, 3), routing)
    assert module.calls == 1 and torch.equal(outputs, torch.full((3, 3), 2.0))


@pytest.mark.parametrize("bad", [-1, 3])
def test_id_of_no_modality_is_refused(tiny_config, bad):
    with pytest.raises(ValueError, match="1 ids outside 0..2"):
        routing_of([[0, bad, 1]], tiny_config())


@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize("variant", ["dense", "mot"])
def test_forward_refuses_an_id_of_no_modality(tiny_model, variant, bad):
    with pytest.raises(ValueError, match="outside 0..2"):
        tiny_model(variant)(torch.tensor([[8, 9, 10]]), modality_ids=torch.tensor([[0, bad, 1]]))


def test_routing_for_other_rows_is_refused(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="routing was made for 3 tokens, the rows hold 4"):
        model(torch.tensor([[8, 9, 10, 11]]), routing=routing_of([[0, 1, 0]], model.config))


@pytest.mark.parametrize("variant", ["dense", "mot", "loo-text", "hybrid"])
def test_routing_made_ahead_equals_routing_made_inside(tiny_model, variant):
    model, ids = tiny_model(variant), torch.randint(0, 60, (2, 9))
    routing = ModalityRouting.from_modality_ids(model.model.modality_ids_of(ids), model.config)
    ahead, inside = model(ids, labels=ids, routing=routing), model(ids, labels=ids)
    assert torch.equal(ahead.logits, inside.logits) and torch.equal(ahead.loss, inside.loss)


# ---------------------------------------------------------------------- nothing depends on the data

VARIANTS = ["dense", "moe-4x", "mot", "hybrid", "loo-text", "untied-feed-forward", "untied-feed-forward-qkv"]


def ahead_of(config, text_only, packed):
    """What a collator makes: ids, routing and, for packed rows, documents."""
    ids = torch.randint(1, 30 if text_only else 60, (2, 10))
    modality_ids = (ids >= 30).long() + (ids >= 45).long()
    batch = {"input_ids": ids, "labels": ids, "modality_ids": modality_ids}
    batch["routing"] = ModalityRouting.from_modality_ids(modality_ids, config)
    if packed:
        batch["document_ids"] = torch.tensor([[0] * 4 + [1] * 5 + [-1]] * 2)
    return batch


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_with_routing_made_ahead_runs_on_fake_tensors(tiny_config, variant, text_only, packed):
    config = tiny_config(variant, z_loss_coefficient=0.01)
    batch = ahead_of(config, text_only, packed)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = MoTForCausalLM(config)
        fake = {name: mode.from_tensor(t) for name, t in batch.items() if name != "routing"}
        routing = batch["routing"]
        if routing.order is not None:
            routing = routing._replace(order=mode.from_tensor(routing.order), inverse=mode.from_tensor(routing.inverse))
        out = model(**fake, routing=routing, use_cache=False)
        out.loss.backward()  # a value read back would raise DataDependentOutputException
    assert out.logits.shape == (2, 10, 60)


@pytest.mark.parametrize(
    ("variant", "text_only", "packed"),
    [
        ("dense", False, False),
        ("dense", False, True),
        ("mot", False, False),
        ("mot", True, False),
        ("mot", False, True),
        ("loo-text", False, True),
        ("hybrid", False, True),
    ],
)
def test_forward_with_routing_made_ahead_compiles_without_a_graph_break(tiny_config, variant, text_only, packed):
    torch._dynamo.reset()
    model = MoTForCausalLM(tiny_config(variant, initializer_range=0.3, num_hidden_layers=1))
    batch = ahead_of(model.config, text_only, packed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if variant == "mot" else "eager")
    out, expected = compiled(**batch, use_cache=False), model(**batch, use_cache=False)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", ["mot", "hybrid", "loo-image", "untied-feed-forward"])
def test_padded_slices_change_neither_outputs_nor_gradients(tiny_model, variant):
    model = tiny_model(variant).train()
    modality_ids = torch.tensor([[0, 1, 1, 2, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1]])
    input_ids = torch.randint(7, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    results = []
    for multiple_of in (1, 4):
        routing = ModalityRouting.from_modality_ids(modality_ids, model.config, multiple_of)
        assert routing.num_tokens == 14
        padded = [t for t, tower in enumerate(routing.towers) if tower not in model.config.moe_towers]
        assert all(routing.counts[t] % multiple_of == 0 for t in padded)
        model.zero_grad()
        output = model(input_ids, modality_ids, labels=input_ids, routing=routing, use_cache=False)
        output.loss.backward()
        results.append([output.logits, *(parameter.grad.clone() for parameter in model.parameters())])
    for plain, padded in zip(*results, strict=True):
        # Products of other sizes round differently in float32.
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)
