"""The model against the paper's algorithm, against masks written out, and against itself by another way."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import StaticCache
from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_mot import MoTConfig, MoTForCausalLM

from .naive import naive_logits, weights_of


def mixed_ids(rows=2, length=13):
    return torch.randint(1, 60, (rows, length))  # not 0: the row of the padding token has no gradient


def compare_with_naive(config, input_ids, modality_ids, tolerance=1e-10):
    """Outputs and every parameter's gradient, in float64."""
    model = MoTForCausalLM(config).double()
    w = weights_of(model)
    logits = model(input_ids, modality_ids=modality_ids).logits
    expected = torch.stack([naive_logits(w, config, ids, m) for ids, m in zip(input_ids, modality_ids)])
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(logits)
    (logits * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        naive = torch.zeros_like(parameter) if w[name].grad is None else w[name].grad
        # Relative to the largest entry: gradients of one tensor are sums of terms of that size.
        error = (parameter.grad - naive).abs().max()
        assert error <= 10 * tolerance * max(1.0, naive.abs().max()), name


def test_post_norm_equals_algorithm_1_outputs_and_gradients(tiny_config):
    config = tiny_config(norm_position="post", num_key_value_heads=4, initializer_range=0.3)
    compare_with_naive(config, mixed_ids(), torch.randint(0, 3, (2, 13)))


def test_post_norm_equals_algorithm_1_with_the_norms_as_they_are(tiny_config):
    config = tiny_config(norm_position="post", num_key_value_heads=4)
    compare_with_naive(config, mixed_ids(), torch.randint(0, 3, (2, 13)), tolerance=1e-5)


def many_modalities(number, **fields):
    names = ["text", "image", "speech", "video", "depth", "touch", "smell", "taste"][:number]
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return MoTConfig(modalities=names, num_attention_heads=4, num_key_value_heads=2, **sizes, **fields)


@pytest.mark.parametrize("number", range(1, 9))
def test_sorted_equals_masked_outputs_and_gradients(number):
    compare_with_naive(many_modalities(number, initializer_range=0.3), mixed_ids(), torch.randint(0, number, (2, 13)))


@pytest.mark.parametrize("present", [[0], [1], [2], [0, 2], [1, 2]])
def test_sorted_equals_masked_with_absent_modalities(present):
    modality_ids = torch.tensor(present)[torch.randint(0, len(present), (2, 13))]
    compare_with_naive(many_modalities(3, initializer_range=0.3), mixed_ids(), modality_ids)


def test_sorted_equals_masked_at_99_to_1():
    modality_ids = torch.zeros(1, 100, dtype=torch.long)
    modality_ids[0, 57] = 1
    compare_with_naive(many_modalities(2, initializer_range=0.3), mixed_ids(1, 100), modality_ids)


@pytest.mark.parametrize("variant", ["loo-text", "loo-image", "loo-speech"])
def test_grouped_towers_equal_masked(tiny_config, variant):
    compare_with_naive(tiny_config(variant, initializer_range=0.3), mixed_ids(), torch.randint(0, 3, (2, 13)))


def test_absent_modality_gets_zero_gradient(tiny_model):
    model = tiny_model()
    ids = torch.randint(7, 30, (2, 9))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if ".image." in name or ".speech." in name:
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("variant", MoTConfig.variant_names())
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_decode_equals_full_forward(tiny_model, variant, cache):
    model, ids = tiny_model(variant), mixed_ids()
    # Expert choice looks ahead, so that only token choice can agree step by step.
    full = model(ids, token_choice=True).logits
    past = StaticCache(config=model.config, max_cache_len=20) if cache == "static" else None
    steps = []
    with torch.no_grad():
        for start, end in [(0, 5), *((i, i + 1) for i in range(5, 13))]:
            out = model(ids[:, start:end], past_key_values=past, use_cache=True, token_choice=True)
            past = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["dense", "mot", "loo-text", "untied-feed-forward"])
@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
def test_packed_row_equals_separate_documents(tiny_model, variant, attention):
    model = tiny_model(variant, attn_implementation=attention)
    documents = [torch.randint(0, 60, (n,)) for n in (4, 1, 7)]
    document_ids = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)] + [torch.full((2,), -1)])
    row = torch.cat([*documents, torch.zeros(2, dtype=torch.long)])
    packed = model(row[None], document_ids=document_ids[None]).logits[0, :12]
    alone = torch.cat([model(d[None]).logits[0] for d in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["dense", "mot", "loo-image"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny_model, variant, side):
    model, ids = tiny_model(variant), mixed_ids(1, 8)
    pad, keep = torch.zeros(1, 3, dtype=torch.long), slice(3, None) if side == "left" else slice(None, 8)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = torch.zeros_like(padded)
    mask[:, keep] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, keep]
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", MoTConfig.variant_names())
def test_gradient_checkpointing_changes_no_gradient(tiny_model, variant):
    model, ids = tiny_model(variant).train(), mixed_ids()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_layer_qk_norm_equals_chameleons(tiny_config):
    attention = MoTForCausalLM(tiny_config(qk_norm="layer")).model.layers[0].self_attn
    ours = attention.q_norm["image"]
    theirs = ChameleonLayerNorm((4, 8))
    for parameter in ours.parameters():
        parameter.data.normal_()
    theirs.load_state_dict(ours.state_dict())
    heads = torch.randn(5, 4, 8)
    torch.testing.assert_close(ours(heads), theirs(heads))


def test_rms_qk_norm_is_over_the_head_dimension(tiny_config):
    norm = MoTForCausalLM(tiny_config(qk_norm="rms")).model.layers[0].self_attn.k_norm["text"]
    assert isinstance(norm, LlamaRMSNorm) and norm.weight.shape == (8,)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_qk_norm_acts_on_each_towers_own_tokens(tiny_model, kind):
    model = tiny_model(qk_norm=kind)
    ids = torch.cat([torch.randint(0, 30, (1, 6)), torch.randint(30, 45, (1, 3))], dim=1)
    before = model(ids).logits
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm["image"].weight.mul_(3.0)
    after = model(ids).logits
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert not torch.allclose(after[:, 6:], before[:, 6:])


# ---------------------------------------------------------------------- losses


def naive_losses(logits, labels, modality_ids, names):
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for row in range(labels.shape[0]):
        for place in range(1, labels.shape[1]):
            target = int(labels[row, place])
            if target != -100:
                name = names[int(modality_ids[row, place])]
                sums[name] += -float(logits[row, place - 1].detach().double().log_softmax(-1)[target])
                counts[name] += 1
    return sums, counts


def test_losses_equal_a_naive_cross_entropy_by_modality(tiny_model):
    model, ids = tiny_model(), mixed_ids()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    out = model(ids, labels=labels)
    sums, counts = naive_losses(out.logits, labels, model.model.modality_ids_of(ids), model.config.modalities)
    assert {name: int(c) for name, c in out.loss_counts.items()} == counts
    assert {name: float(s.detach()) for name, s in out.loss_sums.items()} == pytest.approx(sums, rel=1e-5)
    assert float(out.loss.detach()) == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-5)


def test_loss_modality_is_that_of_the_target(tiny_model):
    ids = torch.tensor([[10, 11, 31, 32]])  # text text image image: targets are one text, two image
    counts = tiny_model()(ids, labels=ids).loss_counts
    assert {name: int(count) for name, count in counts.items()} == {"text": 1, "image": 2, "speech": 0}


def test_loss_without_targets_is_zero_and_has_gradients(tiny_model):
    model, ids = tiny_model(), mixed_ids()
    out = model(ids, labels=torch.full_like(ids, -100))
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0 and all(p.grad is not None for p in model.parameters())


def test_z_loss_is_the_closed_form(tiny_model):
    model, ids = tiny_model(z_loss_coefficient=0.01), mixed_ids()
    out = model(ids, labels=ids)
    log_z = out.logits[:, :-1].double().exp().sum(-1).log()
    assert float(out.z_loss_sum.detach()) == pytest.approx(0.01 * float(log_z.pow(2).sum().detach()), rel=1e-5)
    total = sum(float(s.detach()) for s in out.loss_sums.values()) + float(out.z_loss_sum.detach())
    assert float(out.loss.detach()) == pytest.approx(total / 24, rel=1e-5)


def test_num_items_in_batch_replaces_the_count(tiny_model):
    model, ids = tiny_model(), mixed_ids()
    mean = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=48).loss, mean / 2)


def test_shift_labels_are_the_targets_as_they_stand(tiny_model):
    model, ids = tiny_model(), mixed_ids()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    whole, aligned = model(ids, labels=ids), model(ids, shift_labels=shifted)
    torch.testing.assert_close(aligned.loss, whole.loss)
    assert aligned.loss_counts == whole.loss_counts


def test_tensor_parallel_plan_names_every_projection_of_every_tower(tiny_model):
    for variant in MoTConfig.variant_names():
        model = tiny_model(variant)
        names = {re.sub(r"\.\d+\.", ".*.", name) for name, module in model.named_modules() if type(module) is nn.Linear}
        planned = {name for name in model.tp_plan if name != "model.embed_tokens"}
        assert planned == {name for name in names if "router" not in name}


# ---------------------------------------------------------------------- bad input


def test_token_outside_the_vocabulary_is_refused(tiny_model):
    with pytest.raises(ValueError, match="vocab_size=60"):
        tiny_model()(torch.tensor([[1, 60]]))


def test_modality_ids_of_another_shape_are_refused(tiny_model):
    with pytest.raises(ValueError, match="modality_ids has shape"):
        tiny_model()(mixed_ids(), modality_ids=torch.zeros(2, 12, dtype=torch.long))


def test_forward_without_ranges_and_ids_says_what_to_pass():
    with pytest.raises(ValueError, match="modality_token_ranges is None"):
        MoTForCausalLM(many_modalities(2))(mixed_ids())


def test_resized_vocabulary_counts_new_tokens_as_text(tiny_model):
    model = tiny_model()
    model.resize_token_embeddings(64)
    assert model.model.modality_ids_of(torch.tensor([[29, 30, 45, 60, 63]])).tolist() == [[0, 1, 2, 0, 0]]
    ids = torch.tensor([[29, 60, 63]])
    assert int(model(ids, labels=ids).loss_counts["text"]) == 2
