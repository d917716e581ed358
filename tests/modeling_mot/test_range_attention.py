"""Attention over ranges of keys against torch's under a dense mask, and the plans it runs from."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import modeling_mot.attention_ranges as ranges
from modeling_mot import ModalityRouting, MoTForCausalLM, MoTTransfusionModel
from modeling_mot.attention_masks import AttentionPlan, find_image_blocks, plan_rows

from .naive_transfusion import tiny_config as tiny_transfusion_config
from .test_transfusion_tracing import ahead_of as images_ahead_of


# B batch, L row length, H heads, K heads of keys, h head dimension


def packed(rows, length, longest, with_images=True):
    """Document and block ids of rows of random documents, padding at the end; an image in the middle of each."""
    documents = torch.full((rows, length), -1)
    patch = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        start, number = 0, 0
        while start < length - 5:
            size = int(torch.randint(1, longest + 1, ()))
            documents[row, start : start + size] = number
            patch[row, start + size // 4 : start + 3 * size // 4] = with_images
            start, number = start + size, number + 1
    return documents, find_image_blocks(patch & (documents >= 0), documents, with_markers=False)


def visible(documents, blocks):
    """The rule written out: causal or in the same image, and in the same document.  -> (B, 1, L, L)"""
    length = documents.shape[1]
    causal = torch.ones(length, length).tril().bool()
    same_image = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] >= 0)
    return ((causal | same_image) & (documents[:, :, None] == documents[:, None])).unsqueeze(1)


def heads_of(rows, length, heads, dtype):
    return torch.randn(rows, length, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_()


def compare(plan, mask, rows, length, heads=4, key_heads=2, dtype=torch.float64, tolerance=1e-10):
    """Outputs and gradients."""
    q, k, v = (heads_of(rows, length, number, dtype) for number in (heads, key_heads, key_heads))
    out = ranges.attend_in_ranges(q, k, v, plan, 0.3)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    grad = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, (q, k, v), grad))
    wanted = (expected, *torch.autograd.grad(expected, (q, k, v), grad))
    for ours, theirs in zip(got, wanted):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [1, 63, 64, 150, 300])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
def test_causal_equals_torch(length, heads, key_heads):
    compare(AttentionPlan(), torch.ones(length, length).tril().bool(), 2, length, heads, key_heads)


@pytest.mark.parametrize("longest", [3, 40, 200])
@pytest.mark.parametrize("length", [7, 129, 333])
@pytest.mark.parametrize("with_images", [False, True])
def test_packed_rows_with_images_equal_a_dense_mask(longest, length, with_images):
    documents, blocks = packed(3, length, longest, with_images)
    compare(AttentionPlan.from_ids(documents, blocks), visible(documents, blocks), 3, length)


def test_float32_differs_from_torch_by_its_rounding():
    documents, blocks = packed(2, 200, 60)
    plan = AttentionPlan.from_ids(documents, blocks)
    compare(plan, visible(documents, blocks), 2, 200, dtype=torch.float32, tolerance=1e-5)


def test_probabilities_that_are_computed_again_give_the_same(monkeypatch):
    monkeypatch.setattr(ranges, "KEPT_WIDTH", 0)
    documents, blocks = packed(2, 150, 60)
    compare(AttentionPlan.from_ids(documents, blocks), visible(documents, blocks), 2, 150)
    compare(AttentionPlan(), torch.ones(150, 150).tril().bool(), 2, 150)


def test_kernel_passes_gradcheck():
    documents, blocks = packed(1, 9, 5)
    plan = AttentionPlan.from_ids(documents, blocks)
    heads = [heads_of(1, 9, number, torch.float64) for number in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda *heads: ranges.attend_in_ranges(*heads, plan, 0.5), heads)


def test_operators_follow_torchs_rules():
    plan = AttentionPlan.from_ids(*packed(2, 20, 9))
    heads = [heads_of(2, 20, number, torch.float32) for number in (4, 2, 2)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for arguments in ((None, None, None, 0.3, 0), (plan.first, plan.last, plan.blocks, 0.3, 4 * plan.num_scores)):
        torch.library.opcheck(ranges._attend, (*heads, *arguments), test_utils=tests)


def test_plan_sees_what_the_rule_says():
    documents, blocks = packed(3, 90, 25)
    plan = AttentionPlan.from_ids(documents, blocks)
    assert torch.equal(plan.mask(torch.device("cpu")), visible(documents, blocks))
    batch, _, query, key = torch.meshgrid(*map(torch.arange, (3, 1, 90, 90)), indexing="ij")
    assert torch.equal(plan.sees(batch, 0, query, key), visible(documents, blocks))


def test_blocks_hold_every_query_once_and_every_key_that_it_sees():
    documents, blocks = packed(4, 500, 90)
    plan = AttentionPlan.from_ids(documents, blocks)
    covered = torch.zeros(4, 500, 500, dtype=torch.long)
    for row, row_end, begin, end, low, high, common, common_end in plan.blocks.tolist():
        covered[row:row_end, begin:end, low:high] += 1
        assert visible(documents, blocks)[row:row_end, 0, begin:end, common:common_end].all()
    assert covered.max() == 1 and covered[visible(documents, blocks)[:, 0]].all()
    assert plan.num_scores == covered.sum() < 0.65 * 4 * 500 * 500 / 2  # far less than a causal row


def test_one_document_a_row_is_plainly_causal():
    assert AttentionPlan.from_ids(torch.tensor([[3] * 9, [1] * 9])).is_causal


def test_a_document_in_several_pieces_has_no_plan():
    assert AttentionPlan.from_ids(torch.tensor([[0, 0, 0], [0, 1, 0]])) is None


# ----------------------------------------------------------------------------------------------------------- models


def rows_of(config, rows=2, length=70):
    ids = torch.randint(1, 60, (rows, length))
    documents, _ = packed(rows, length, 30)
    modality_ids = (ids >= 30).long() + (ids >= 45).long()
    batch = {"input_ids": ids, "labels": ids, "modality_ids": modality_ids, "document_ids": documents}
    batch["routing"] = ModalityRouting.from_modality_ids(modality_ids, config)
    return batch | {"attention_plan": plan_rows(config, ids, documents)}


@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_outputs_and_gradients_of_a_model_are_those_of_other_attention(tiny_model, other):
    results = []
    for attention in ("mot_ranges", other):
        torch.manual_seed(0)
        model = tiny_model(attn_implementation=attention).train()
        output = model(**rows_of(model.config), use_cache=False)
        output.loss.backward()
        results.append([output.logits, *(p.grad / p.grad.abs().max().clamp(min=1e-9) for p in model.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_plans_made_ahead_and_inside_give_the_same(tiny_model):
    model = tiny_model()
    batch = rows_of(model.config)
    with torch.no_grad():
        ahead = model(**batch).logits
        inside = model(**{name: value for name, value in batch.items() if name not in ("routing", "attention_plan")})
    assert torch.equal(ahead, inside.logits)


@pytest.mark.parametrize("fields", [{}, {"markers_in_image_block": True, "image_positions": "shared"}])
def test_plans_of_rows_with_images_give_what_their_dense_mask_gives(fields):
    config = tiny_transfusion_config("mot", **fields)
    model, batch = MoTTransfusionModel(config).eval(), images_ahead_of(config, "latents")
    plan = plan_rows(config, batch["input_ids"], batch["document_ids"], batch["clean_images"])
    assert not plan.is_causal and (plan.last > torch.arange(plan.last.shape[1])).any()
    with torch.no_grad():
        planned = model(**batch, attention_plan=plan, use_cache=False)
        masked = model(**batch, use_cache=False)  # routing was made ahead and a plan was not
    for name in ("logits", "prediction", "loss"):
        torch.testing.assert_close(getattr(planned, name), getattr(masked, name), rtol=1e-4, atol=1e-5)


def test_noised_images_that_others_do_not_see_have_no_plan():
    config = tiny_transfusion_config("mot", noised_images_visible=False)
    batch = images_ahead_of(config, "latents")
    ids, documents, clean = batch["input_ids"], batch["document_ids"], batch["clean_images"]
    assert plan_rows(config, ids, documents, clean) is None
    assert plan_rows(config, ids, documents, torch.ones_like(clean)) is not None


def test_default_attention_runs_from_plans_and_dropout_falls_back(tiny_model):
    model = tiny_model(attention_dropout=0.5).train()
    assert model.config._attn_implementation == "mot_ranges"
    batch = rows_of(model.config)
    torch.manual_seed(0)
    dropped = model(**batch).logits
    model.set_attn_implementation("sdpa")
    torch.manual_seed(0)
    assert torch.equal(dropped, model(**batch).logits)


def test_autocast_computes_in_bfloat16(tiny_model):
    model = tiny_model()
    batch = rows_of(model.config)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(**batch).loss
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(ours, model(**batch).loss, rtol=1e-2, atol=0)


def test_a_plan_travels_to_a_device_as_it_is(tiny_config):
    plan = rows_of(tiny_config())["attention_plan"]
    moved = send_to_device({"attention_plan": plan}, "meta")["attention_plan"]
    assert type(moved) is AttentionPlan and moved.first.is_meta and moved.num_scores == plan.num_scores


def test_forward_with_a_plan_runs_on_fake_tensors(tiny_config):
    config = tiny_config()
    batch = rows_of(config)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {}
        for name, value in batch.items():
            if isinstance(value, tuple):
                fake[name] = type(value)(*(mode.from_tensor(x) if torch.is_tensor(x) else x for x in value))
            else:
                fake[name] = mode.from_tensor(value)
        MoTForCausalLM(config)(**fake, use_cache=False).loss.backward()


def test_forward_with_a_plan_compiles_once_for_batches_of_different_plans(tiny_model):
    torch._dynamo.reset()
    model = tiny_model("dense", num_hidden_layers=1).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for turn in range(3):  # the second time, sizes that have changed become symbols
        batch = rows_of(model.config)
        with torch.compiler.set_stance("fail_on_recompile" if turn > 1 else "default"):
            output = compiled(**batch, use_cache=False)
        torch.testing.assert_close(output.logits, model(**batch, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        output.loss.backward()


def test_flops_are_counted_as_those_of_eager_attention(tiny_model):
    totals = []
    for attention in ("mot_ranges", "eager"):
        model = tiny_model(attn_implementation=attention)
        with FlopCounterMode(display=False) as counter:
            model(**rows_of(model.config)).loss.backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0
