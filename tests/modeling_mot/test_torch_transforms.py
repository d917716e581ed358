"""What torch's tools do to a model: `torch.func`, export with gradients, the meta device, casts."""

import pytest
import torch

from modeling_mot import ModalityRouting, MoTConfig, MoTForCausalLM

from .naive_transfusion import tiny_model as tiny_transfusion


IDS = torch.tensor([[1, 9, 12, 3, 30, 31, 44, 4], [1, 3, 33, 34, 50, 4, 20, 21]])


@pytest.mark.parametrize("variant", ["dense", "mot", "hybrid"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_functional_gradients_equal_those_of_backward(tiny_model, variant, skip_logits):
    model, kwargs = tiny_model(variant), {"input_ids": IDS, "labels": IDS, "skip_logits": skip_logits}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (), kwargs).loss

    grads = torch.func.grad(loss)(dict(model.named_parameters()))
    model(**kwargs).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["dense", "mot"])
def test_exported_graph_of_a_model_with_gradients_gives_its_logits_and_gradients(tiny_model, variant):
    model = tiny_model(variant)
    routing = ModalityRouting.from_modality_ids(model.model.modality_ids_of(IDS), model.config)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, routing=routing, use_cache=False).logits

    exported = torch.export.export(Logits(), (IDS,), strict=False).module()
    logits = exported(IDS)
    torch.testing.assert_close(logits, model(IDS).logits)
    logits.sum().backward()
    model.zero_grad()
    model(IDS).logits.sum().backward()
    for name, parameter in exported.named_parameters():
        expected = model.get_parameter(name.removeprefix("model."))
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_default_attention_runs_on_the_meta_device(tiny_config, documents, skip_logits):
    with torch.device("meta"):
        model = MoTForCausalLM(tiny_config("dense"))
    ids = IDS.to("meta")
    out = model(ids, labels=ids, document_ids=ids if documents else None, skip_logits=skip_logits)
    assert skip_logits or out.logits.shape == (2, 8, 60)
    out.loss.backward()
    assert model.lm_head.weight.grad.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["to", "method", "half_and_back"])
def test_a_cast_rounds_no_rotary_frequencies(tiny_model, dtype, way):
    model = tiny_model("dense", max_position_embeddings=8192)
    expected = model.model.rotary_emb.inv_freq.clone()
    model = (
        model.to(dtype) if way == "to" else getattr(model, {torch.bfloat16: "bfloat16", torch.float16: "half"}[dtype])()
    )
    if way == "half_and_back":
        model = model.float()
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, expected)
    # RoPE in float64: far positions turn by what the rounded frequencies would miss by whole radians.
    steps, exact = torch.arange(8000, 8008), 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    cosines, _ = rotary(torch.zeros(1, dtype=torch.float32), position_ids=steps[None])
    torch.testing.assert_close(cosines[0, :, :4].double(), (steps[:, None] * exact).cos(), rtol=0, atol=2e-3)


def test_a_cast_model_equals_one_that_is_loaded_in_that_precision(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = MoTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(model.to(torch.bfloat16)(IDS).logits, loaded(IDS).logits)


def test_a_vae_keeps_its_precision_and_stands_in_one_list_of_those_that_do(tmp_path):
    vae = {"_class_name": "AutoencoderKL", "latent_channels": 2, "block_out_channels": [8], "norm_num_groups": 4}
    model = tiny_transfusion(vae_config=vae)
    lists = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    assert "vae" in set.union(*map(set, lists)) and not set.intersection(*map(set, lists))
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert loaded.lm_head.weight.dtype == dtype
        for name, tensor in model.vae.state_dict().items():
            assert torch.equal(loaded.vae.state_dict()[name], tensor), name


# ------------------------------------------------------------------------------- transformers' common suites, in short


@pytest.mark.parametrize("variant", MoTConfig.variant_names())
@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
def test_padding_on_the_left_changes_no_logits(tiny_model, variant, attention):
    model = tiny_model(variant, attn_implementation=attention)
    padding = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(IDS)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(torch.cat([padding, IDS], dim=1), mask, positions).logits[:, 5:]
    torch.testing.assert_close(padded, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", MoTConfig.variant_names())
@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
def test_rows_with_padding_equal_the_same_tokens_in_one_row(tiny_model, variant, attention):
    model = tiny_model(variant, attn_implementation=attention)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(IDS, mask, positions, use_cache=False).logits[mask.bool()]
    flat = model(IDS[mask.bool()][None], position_ids=positions[mask.bool()][None], use_cache=False).logits[0]
    torch.testing.assert_close(flat, padded, rtol=1e-4, atol=1e-4)
