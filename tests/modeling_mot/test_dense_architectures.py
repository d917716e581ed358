"""With every tower's weights equal to those of a dense model of transformers, a MoT is that model."""

import pytest
import torch

from modeling_mot import MoTConfig, MoTForCausalLM
from modeling_mot.decoding_lean import LeanDecoder
from tests.conversion.sources import LLAMA3, SIZES, dense_model

from .test_lean_decoding import forwards, ordinary


# Name of a tiny dense model -> what a MoTConfig says of its layers.
ARCHITECTURES = {
    "llama-biases": {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "arcee": {"head_dim": 16, "mlp_bias": True, "gated_mlp": False, "hidden_act": "relu2"},
    "mistral": {"head_dim": 12},
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"head_dim": 16, "qk_norm": "rms"},
    "seed_oss": {"head_dim": 16, "attention_bias": True, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "smollm3": {"layers_without_rope": [1], "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 2e6}},
    "olmo2": {"qk_norm": "rms_all_heads", "norm_position": "post"},
    "gemma": {
        "head_dim": 24,
        "norm_offset": True,
        "embedding_multiplier": 32**0.5,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
OLMO2_NORMS = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "post_feedforward_layernorm"}
TOWERS = ("text", "image", "speech")
RANGES = {"text": [0, 40], "image": [40, 50], "speech": [50, 60]}


def source_name(architecture, name):
    """The dense model's name of a MoT's parameter: without the tower."""
    parts = [part for part in name.split(".") if part not in (*TOWERS, "shared")]
    return ".".join(OLMO2_NORMS.get(part, part) if architecture == "olmo2" else part for part in parts)


def dense_and_mot(architecture, attention="sdpa", dtype=torch.float32, **fields):
    """A dense model, every tensor of it random, and a MoT of three towers with its weights."""
    dense = dense_model(architecture, dtype, eos_token_id=None)
    dense.set_attn_implementation(attention)
    fields = SIZES | {"eos_token_id": None} | ARCHITECTURES[architecture] | fields
    config = MoTConfig(modalities=TOWERS, attn_implementation=attention, **fields)
    model = MoTForCausalLM._from_config(config, dtype=dtype).eval()
    source = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source[source_name(architecture, name)])
    assert {source_name(architecture, name) for name, _ in model.named_parameters()} == set(source)
    return dense, model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_text_has_the_dense_models_logits_bit_for_bit(architecture, attention):
    dense, model = dense_and_mot(architecture, attention)
    ids = torch.randint(2, 60, (2, 40))
    expected = dense(ids).logits
    assert expected.std() > 0.1
    assert torch.equal(model(ids, modality_ids=torch.zeros_like(ids)).logits, expected)


@pytest.mark.parametrize("untied", [["attention", "feed_forward", "norm"], ["feed_forward"]])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_modality_has_the_dense_models_logits(architecture, untied):
    dense, model = dense_and_mot(architecture, untied=untied)
    ids, modality_ids = torch.randint(2, 60, (2, 40)), torch.randint(0, 3, (2, 40))
    torch.testing.assert_close(model(ids, modality_ids=modality_ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "olmo2"])
@torch.no_grad()
def test_in_bfloat16_text_is_rounded_where_the_dense_model_rounds(architecture):
    dense, model = dense_and_mot(architecture, dtype=torch.bfloat16)
    ids = torch.randint(2, 60, (2, 40))
    assert torch.equal(model(ids, modality_ids=torch.zeros_like(ids)).logits, dense(ids).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_the_towers_sum_to_the_dense_models(architecture):
    dense, model = dense_and_mot(architecture)
    ids, modality_ids = torch.randint(2, 60, (2, 40)), torch.randint(0, 3, (2, 40))
    dense(ids, labels=ids).loss.backward()
    model(ids, modality_ids=modality_ids, labels=ids).loss.backward()
    sums = {}
    for name, parameter in model.named_parameters():
        name = source_name(architecture, name)
        sums[name] = sums.get(name, 0) + parameter.grad
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(sums[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_generation_equals_the_dense_models(architecture, monkeypatch):
    dense, model = dense_and_mot(architecture, modality_token_ranges=RANGES)
    ids = torch.randint(2, 60, (2, 7))
    kwargs = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    kwargs["attention_mask"] = torch.ones_like(ids)
    expected = dense.generate(ids, **kwargs)
    by_forward = ordinary(model, monkeypatch, ids, **kwargs)
    assert LeanDecoder.of(model) is not None
    calls = forwards(model)
    lean = model.generate(ids, **kwargs)
    assert len(calls) == 1  # the prompt's
    for output in (by_forward, lean):
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("architecture", ["gemma", "olmo2"])
def test_lean_step_in_bfloat16_is_the_forwards_to_its_rounding(architecture):
    _, model = dense_and_mot(architecture, dtype=torch.bfloat16, modality_token_ranges=RANGES)
    ids = torch.randint(2, 60, (2, 7))
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[:, 6:].float()
    chosen = logits.gather(2, tokens[:, 7:, None]).squeeze(2)
    assert (logits.amax(dim=2) - chosen).max() < 0.05 * logits.std()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counted_parameters_are_those_of_the_dense_model(architecture):
    dense, model = dense_and_mot(architecture)
    assert model.config.num_parameters(active=True) == sum(p.numel() for p in dense.parameters())
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_offset_norms_start_at_one_and_come_back_with_the_embeddings_factor(tmp_path):
    model = MoTForCausalLM(MoTConfig(**SIZES | ARCHITECTURES["gemma"])).eval()
    assert not model.model.norm["image"].weight.any()
    model.save_pretrained(tmp_path)
    ids = torch.randint(2, 60, (1, 9))
    loaded = MoTForCausalLM.from_pretrained(tmp_path).eval()
    modality_ids = torch.zeros_like(ids)
    assert torch.equal(loaded(ids, modality_ids=modality_ids).logits, model(ids, modality_ids=modality_ids).logits)
