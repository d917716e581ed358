"""The norms of all towers in one go, against PyTorch's own norm and transformers' module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_mot import ModalityRouting
from modeling_mot.tower_routing import TowerNorms


COUNTS, SIZE, EPSILON = (5, 0, 3), 16, 1e-5
ROUTING = ModalityRouting(("text", "image", "speech"), COUNTS)


def tower_norms(names=ROUTING.towers, dtype=torch.float64) -> TowerNorms:
    norms = TowerNorms({name: LlamaRMSNorm(SIZE, EPSILON) for name in names}).to(dtype)
    for parameter in norms.parameters():
        nn.init.normal_(parameter, 1.0)
    return norms


def weight_of_rows(norms) -> torch.Tensor:
    """(T, D), the weight that each row is multiplied by."""
    names = ["shared"] * len(COUNTS) if "shared" in norms else ROUTING.towers
    return torch.cat([norms[name].weight.expand(count, -1) for name, count in zip(names, COUNTS)])


@pytest.mark.parametrize("shape", [(8, SIZE), (8, 3, SIZE)])
@pytest.mark.parametrize("names", [ROUTING.towers, ("shared",)])
def test_outputs_and_gradients_are_those_of_pytorchs_norm(names, shape):
    norms = tower_norms(names)
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = weight_of_rows(norms).view(8, *[1] * (len(shape) - 2), SIZE)
    expected = F.rms_norm(rows, (SIZE,), eps=EPSILON) * weights
    out, upstream = norms(rows, ROUTING), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    inputs = [rows, *norms.parameters()]
    for own, other in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_gradients_pass_gradcheck():
    rows, norms = torch.randn(8, SIZE, dtype=torch.float64, requires_grad=True), tower_norms()
    assert torch.autograd.gradcheck(lambda rows: norms(rows, ROUTING), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_outputs_equal_transformers_norm_bit_for_bit(dtype, grad):
    norms, rows = tower_norms(dtype=dtype), (3 * torch.randn(8, SIZE)).to(dtype)
    expected = torch.cat([norms[name](part) for name, part in zip(ROUTING.towers, rows.split(COUNTS))])
    with torch.set_grad_enabled(grad):
        assert torch.equal(norms(rows, ROUTING), expected)


def test_rounded_gradients_are_no_worse_than_autograds():
    norms = tower_norms(dtype=torch.bfloat16)
    rows, upstream = torch.randn(8, SIZE).bfloat16().requires_grad_(), torch.randn(8, SIZE).bfloat16()
    parts = torch.cat([norms[name](part) for name, part in zip(ROUTING.towers, rows.split(COUNTS))])
    inputs = [rows, *norms.parameters()]
    own = torch.autograd.grad(norms(rows, ROUTING), inputs, upstream)
    theirs = torch.autograd.grad(parts, inputs, upstream)
    exact_norms = tower_norms()
    exact_norms.load_state_dict(norms.state_dict())
    exact_rows = rows.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        exact_norms(exact_rows, ROUTING), [exact_rows, *exact_norms.parameters()], upstream.double()
    )
    for ours, autograds, reference in zip(own, theirs, exact):
        assert (ours - reference).norm() <= 1.01 * (autograds - reference).norm()


def test_rows_of_another_precision_than_the_weights():
    norms, rows = tower_norms(dtype=torch.float32), torch.randn(8, SIZE).bfloat16().requires_grad_()
    expected = torch.cat([norms[name](part) for name, part in zip(ROUTING.towers, rows.split(COUNTS))])
    out = norms(rows, ROUTING)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    out.sum().backward()
    assert rows.grad.dtype == torch.bfloat16 and norms["text"].weight.grad.dtype == torch.float32


def test_a_module_that_does_more_is_called():
    norms, rows, seen = tower_norms(dtype=torch.float32), torch.randn(8, SIZE), []
    plain = norms(rows, ROUTING)
    norms["speech"].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    torch.testing.assert_close(norms(rows, ROUTING), plain)
    norms["text"].forward = lambda rows: rows * 2
    assert seen == [3] and torch.equal(norms(rows, ROUTING)[:5], rows[:5] * 2)


def test_less_is_kept_for_the_backward_than_by_transformers_norm():
    rows = torch.randn(8, SIZE, dtype=torch.bfloat16, requires_grad=True)

    def kept(call) -> int:
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: storages.setdefault(x.untyped_storage()._cdata, x), lambda x: x
        ):
            out = call()
        del out
        own = {parameter.untyped_storage()._cdata for parameter in (rows, *norms.parameters())}
        return sum(x.untyped_storage().nbytes() for key, x in storages.items() if key not in own)

    norms = tower_norms(("shared",), torch.bfloat16)
    assert kept(lambda: norms(rows, ROUTING)) == 8 * 4  # one number a row, in float32
    assert kept(lambda: norms["shared"](rows)) > 8 * SIZE * 4
