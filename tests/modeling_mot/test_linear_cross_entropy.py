"""Losses without logits against torch's cross-entropy of all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_mot.loss_tokens as fused
from modeling_mot import ModalityRouting, MoTForCausalLM, MoTTransfusionModel

from .naive_transfusion import tiny_config as tiny_transfusion_config
from .test_transfusion_tracing import ahead_of


# T tokens, D hidden size, V vocabulary


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK_LOGITS", 5 * 23)
    monkeypatch.setattr(fused, "BLOCK_TOKENS", 2)


def inputs(dtype=torch.float64, tokens=17, share=0.7):
    hidden_states, weight = torch.randn(tokens, 6, dtype=dtype), torch.randn(23, 6, dtype=dtype)
    targets = torch.randint(0, 23, (tokens,)).masked_fill(torch.rand(tokens) > share, -100)
    return hidden_states.requires_grad_(), weight.requires_grad_(), targets


def reference(hidden_states, weight, targets, z):
    logits = hidden_states @ weight.T
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return losses, z * logits.logsumexp(-1).square() * (targets != -100)


def compare(args, weights, z, tolerance=1e-10):
    """Losses, and the gradients of their weighted sum."""
    results = []
    for losses in (fused.linear_cross_entropy, reference):
        parts = losses(*args, z)
        total = sum((weight * part).sum() for weight, part in zip(weights, parts))
        results.append([*parts, *torch.autograd.grad(total, args[:2])])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("z", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_sums_equal_torchs(z, share, tokens):
    compare(inputs(tokens=tokens, share=share), (0.37, 0.37), z)


@pytest.mark.parametrize("z", [0.0, 0.1])
def test_weights_that_differ_by_token_equal_torchs(z):
    compare(inputs(), (torch.rand(17).double(), torch.rand(17).double()), z)
    compare(inputs(), (torch.rand(17).double(), 0.0), z)


def test_bfloat16_is_as_near_to_float32_as_torchs_is():
    hidden_states, weight, targets = inputs(torch.float32, tokens=200)
    exact = torch.autograd.grad(reference(hidden_states, weight, targets, 0.0)[0].sum(), (hidden_states, weight))
    errors = []
    for losses in (fused.linear_cross_entropy, lambda h, w, *args: reference(h, w, *args)):
        low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden_states, weight)]
        grads = torch.autograd.grad(losses(*low, targets, 0.0)[0].float().sum(), low)
        errors.append([(grad.float() - true).norm() / true.norm() for grad, true in zip(grads, exact)])
    assert all(ours < 1.2 * theirs for ours, theirs in zip(*errors))


@pytest.mark.parametrize("z", [0.0, 0.1])
def test_gradients_pass_gradcheck(z):
    hidden_states, weight, targets = inputs(tokens=5)

    def of_each(hidden_states, weight):  # computed again in the backward
        return fused.linear_cross_entropy(hidden_states, weight, targets, z)

    def of_all(hidden_states, weight):  # made in the forward
        return sum(part.sum() for part in of_each(hidden_states, weight))

    for losses in (of_each, of_all):
        assert torch.autograd.gradcheck(losses, (hidden_states, weight))


def test_operators_follow_torchs_rules():
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for now in (False, True):
        torch.library.opcheck(fused._forward, (*inputs(torch.float32), 0.1, now), test_utils=tests)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


# ----------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    "weights", [{"text": 1.0, "image": 1.0, "speech": 1.0}, {"text": 0.5, "image": 2.0, "speech": 1.0}]
)
def test_model_without_logits_has_the_losses_and_gradients_of_one_with(tiny_model, weights):
    model, ids = tiny_model(z_loss_coefficient=0.01).train(), torch.randint(1, 60, (2, 13))
    labels, results = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100), []
    for skip in (False, True):
        model.zero_grad()
        output = model(ids, labels=labels, skip_logits=skip, use_cache=False)
        (sum(weights[name] * value for name, value in output.loss_sums.items()) + output.z_loss_sum).backward()
        assert (output.logits is None) == skip
        results.append((output, [p.grad.clone() for p in model.parameters()]))
    (full, grads), (fused_output, fused_grads) = results
    assert fused_output.loss_counts == full.loss_counts
    torch.testing.assert_close(fused_output.loss_sums, full.loss_sums)
    torch.testing.assert_close(fused_output.z_loss_sum, full.z_loss_sum)
    torch.testing.assert_close(fused_output.loss, full.loss)
    for ours, theirs in zip(fused_grads, grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_transfusion_without_logits_has_the_same_loss_and_gradients():
    config = tiny_transfusion_config("mot")
    model, batch, results = MoTTransfusionModel(config), ahead_of(config, "latents"), []
    for skip in (False, True):
        model.zero_grad()
        output = model(**batch, skip_logits=skip, use_cache=False)
        output.loss.backward()
        results.append([output.loss, output.prediction, *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_logits_of_all_tokens_never_exist(tiny_config):
    model, ids = MoTForCausalLM(tiny_config(vocab_size=5000)), torch.randint(1, 30, (2, 60))
    largest = {}
    for skip in (False, True):
        with torch.no_grad(), _Largest() as seen:
            model(ids, labels=ids, skip_logits=skip, use_cache=False)
        largest[skip] = seen.elements
    assert largest[False] >= 2 * 60 * 5000 and largest[True] < 2 * 60 * 60


@pytest.mark.parametrize("change", ["hook", "adapter"])
def test_a_head_that_is_more_than_its_weight_is_run(tiny_model, change):
    model, ids = tiny_model(), torch.randint(1, 60, (2, 9))
    if change == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    else:
        model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    whole, fused_output = model(ids, labels=ids), model(ids, labels=ids, skip_logits=True)
    assert torch.equal(whole.loss, fused_output.loss)


def test_autocast_without_logits_is_near_to_it_with(tiny_model):
    model, ids = tiny_model().train(), torch.randint(1, 60, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(ids, labels=ids, skip_logits=skip, use_cache=False).loss for skip in (False, True)]
    losses[1].backward()
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_skipped_logits_need_labels(tiny_model):
    ids = torch.randint(1, 60, (1, 4))
    with pytest.raises(ValueError, match="labels are absent"):
        tiny_model()(ids, skip_logits=True)
    with pytest.raises(ValueError, match="logits_to_keep=1"):
        tiny_model()(ids, labels=ids, logits_to_keep=1, skip_logits=True)


def test_forward_without_logits_runs_on_fake_tensors_and_compiles(tiny_model):
    model, ids = tiny_model(num_hidden_layers=1, z_loss_coefficient=0.01), torch.randint(1, 60, (2, 9))
    modality_ids = model.model.modality_ids_of(ids)
    routing = ModalityRouting.from_modality_ids(modality_ids, model.config)
    batch = {"input_ids": ids, "labels": ids, "modality_ids": modality_ids, "use_cache": False, "skip_logits": True}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    loss, expected = compiled(**batch, routing=routing).loss, model(**batch, routing=routing).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    with FakeTensorMode() as mode:
        fake = MoTForCausalLM(model.config)
        batch |= {name: mode.from_tensor(value) for name, value in batch.items() if torch.is_tensor(value)}
        routing = routing._replace(order=mode.from_tensor(routing.order), inverse=mode.from_tensor(routing.inverse))
        fake(**batch, routing=routing).loss.backward()
