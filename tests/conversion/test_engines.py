"""What engines that run transformers' models ask of one, tried without them: attention of their own over rows that hold
several sequences one after another, as vLLM's backend for transformers calls it; and weights read by their headers."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AttentionInterface

from modeling_mot import MoTModel


SEQUENCES = [torch.tensor(ids) for ids in ([1, 9, 3, 30, 31, 44, 4, 12], [1, 20, 21], [1, 3, 33, 34, 35])]


class PagedAttention:
    """Attention of an engine in one layer: flat queries, keys and values of all sequences, which it tells apart."""

    def __init__(self, config, lengths):
        self.config, self.lengths = config, lengths

    def forward(self, query, key, value):
        """(tokens, heads * d) each -> (tokens, heads * d)"""
        parts = []
        for one in zip(*(rows.split(self.lengths) for rows in (query, key, value)), strict=True):
            heads = (rows.unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1) for rows in one)
            parts.append(F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True))
        return torch.cat([heads.transpose(0, 1).flatten(1) for heads in parts])


def attend(module, query, key, value, attention_mask, attention_instances, scaling, **kwargs):
    assert attention_mask is None and scaling == module.head_dim**-0.5
    rows = (states.transpose(1, 2).flatten(2)[0] for states in (query, key, value))
    return attention_instances[module.layer_idx].forward(*rows), None


@pytest.mark.parametrize("variant", ["mot", "dense", "untied-feed-forward"])
def test_an_engine_with_attention_of_its_own_gets_the_models_hidden_states(tiny_model, tmp_path, variant):
    AttentionInterface.register("an_engine", attend)
    model = tiny_model(variant, num_key_value_heads=2).model
    with torch.no_grad():
        expected = torch.cat([model(ids[None]).last_hidden_state[0] for ids in SEQUENCES])
    # As such an engine makes it: of the bare transformer's class, which auto_map names.
    assert model.config.auto_map["AutoModel"] == "modeling_mot.MoTModel" and MoTModel._supports_attention_backend
    model.save_pretrained(tmp_path)
    served = MoTModel.from_pretrained(tmp_path, attn_implementation="an_engine")
    lengths = [len(ids) for ids in SEQUENCES]
    with torch.no_grad():
        found = served(
            input_ids=torch.cat(SEQUENCES)[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            use_cache=False,
            attention_instances=[PagedAttention(model.config, lengths) for _ in model.layers],
            return_dict=False,
        )[0][0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_plan_of_tensor_parallelism_names_every_projection_of_the_layers(tiny_model):
    model = tiny_model().model
    named = {pattern.replace("*", str(layer)) for pattern in model.config.base_model_tp_plan for layer in range(2)}
    projections = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert projections and projections <= named


def test_headers_tell_the_format_and_the_parameters_of_each_tower(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    counts = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            assert weights.metadata() == {"format": "pt"}
            for name in weights.keys():  # noqa: SIM118
                tower = next((part for part in name.split(".") if part in model.config.tower_names), "shared")
                counts[tower] = counts.get(tower, 0) + math.prod(weights.get_slice(name).get_shape())
    assert counts["text"] == counts["image"] == counts["speech"]
    assert sum(counts.values()) == model.num_parameters()
    assert counts["shared"] + counts["text"] == model.config.num_parameters(active=True)
