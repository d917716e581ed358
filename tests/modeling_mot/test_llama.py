"""With every tower's weights equal to a Llama's, a MoT is that Llama."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_mot import MoTConfig, MoTForCausalLM


SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}
CASES = {
    "plain": {},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "head-dim": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def copy_llama(llama, model):
    """Every tower gets the Llama's weights: a tower is one module more at the end of the layer's module."""
    source = dict(llama.named_parameters())
    layered = ("q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm", "post_attention_layernorm", "norm")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if len(parts) > 2 and parts[-3] in layered:
                parts.pop(-2)
            elif "mlp" in parts:
                parts.pop(parts.index("mlp") + 1)
            parameter.copy_(source[".".join(parts)])


def randomise(model):
    """Norm weights of one and biases of zero would hide a mistake."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("untied", [["attention", "feed_forward", "norm"], ["feed_forward"]])
def test_identical_towers_equal_llama(case, attention, untied):
    fields = SIZES | CASES[case]
    llama = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation=attention)).eval()
    randomise(llama)
    config = MoTConfig(modalities=["text", "image", "speech"], untied=untied, attn_implementation=attention, **fields)
    model = MoTForCausalLM(config).eval()
    copy_llama(llama, model)
    ids, modality_ids = torch.randint(0, 60, (2, 40)), torch.randint(0, 3, (2, 40))
    with torch.no_grad():
        logits, expected = model(ids, modality_ids=modality_ids).logits, llama(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_towers_sum_to_llamas():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = MoTForCausalLM(MoTConfig(**SIZES))
    copy_llama(llama, model)
    ids, modality_ids = torch.randint(0, 60, (2, 40)), torch.randint(0, 2, (2, 40))
    llama(ids, labels=ids).loss.backward()
    model(ids, modality_ids=modality_ids, labels=ids).loss.backward()
    mot = dict(model.named_parameters())
    for tower_names, name in [
        ("model.layers.1.mlp.{}.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.2.self_attn.q_proj.{}.weight", "model.layers.2.self_attn.q_proj.weight"),
        ("model.norm.{}.weight", "model.norm.weight"),
    ]:
        total = sum(mot[tower_names.format(tower)].grad for tower in ("text", "image"))
        torch.testing.assert_close(total, llama.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_loss_equals_llamas():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = MoTForCausalLM(MoTConfig(**SIZES))
    copy_llama(llama, model)
    ids = torch.randint(0, 60, (2, 40))
    labels = ids.masked_fill(torch.rand(2, 40) < 0.2, -100)
    loss = model(ids, modality_ids=torch.randint(0, 2, (2, 40)), labels=labels).loss
    torch.testing.assert_close(loss, llama(ids, labels=labels).loss, rtol=1e-5, atol=1e-5)
