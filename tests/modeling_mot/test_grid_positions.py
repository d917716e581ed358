"""RoPE of three axes (time, row, column), as Qwen3-VL and Cosmos 3 have it."""

import pytest
import torch
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3VLTextRotaryEmbedding
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from modeling_mot import MoTConfig
from modeling_mot.modeling_mot import MoTRotaryEmbedding


SECTION = {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 5e6}
GRID = {"rope_parameters": SECTION, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("section", [[24, 20, 20], [22, 21, 21], [64, 0, 0]])
def test_angles_equal_qwen3_vl_and_cosmos3(section):
    rope = {"mrope_section": section, "mrope_interleaved": True, "rope_theta": 5e6, "rope_type": "default"}
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128}
    rotary = MoTRotaryEmbedding(MoTConfig(rope_parameters=dict(rope), **sizes))
    qwen = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(rope_parameters=dict(rope), **sizes))
    cosmos = Cosmos3VLTextRotaryEmbedding(128, 5e6, section)
    positions = torch.randint(0, 17000, (3, 2, 9)).float() + torch.tensor([0.25, 0, 0])[:, None, None]
    made = rotary(torch.zeros(1), positions)
    for mine, theirs in zip(made, qwen(torch.zeros(1), positions)):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(made, cosmos(positions, "cpu", torch.float32)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
@torch.no_grad()
def test_equal_axes_are_plain_positions(tiny_model, attention):
    model, ids = tiny_model(attn_implementation=attention, **GRID), torch.randint(7, 29, (2, 6))
    plain, mask = torch.arange(6).expand(2, -1), torch.ones_like(ids)
    expected = model(ids, attention_mask=mask, position_ids=plain).logits
    torch.testing.assert_close(model(ids, position_ids=plain.expand(3, -1, -1)).logits, expected)
    # No axis begins a document, and each axis counts.
    for axis in range(3):
        moved = plain.repeat(3, 1, 1)
        moved[axis, :, 3:] += 40
        other = model(ids, position_ids=moved).logits
        torch.testing.assert_close(other, model(ids, attention_mask=mask, position_ids=moved).logits)
        torch.testing.assert_close(other[:, :3], expected[:, :3])
        assert not torch.allclose(other[:, 3:], expected[:, 3:], atol=1e-4)


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"mrope_section": [4, 2, 2]}, "go together"),
        ({"mrope_interleaved": True}, "go together"),
        ({"mrope_section": [2, 3, 3], "mrope_interleaved": True}, "at most 3 of rows and 2 of columns"),
        ({"mrope_section": [4, 2, 1], "mrope_interleaved": True}, "must sum to half of head_dim=16"),
        ({"mrope_section": [8], "mrope_interleaved": True}, "must be a list of 3 values"),
        ({"mrope_section": [4, 2, 2], "mrope_interleaved": False}, "is not one of True"),
        ({"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_type": "linear", "factor": 2.0}, "rope_type"),
    ],
)
def test_sections_that_do_not_fit_are_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        MoTConfig(**(GRID | {"rope_parameters": rope}))


def test_positions_of_three_axes_need_a_rope_of_three(tiny_model):
    ids, positions = torch.randint(7, 29, (1, 5)), torch.zeros(3, 1, 5)
    with pytest.raises(ValueError, match=r"position_ids has shape \(3, 1, 5\)"):
        tiny_model()(ids, position_ids=positions)
    with pytest.raises(ValueError, match=r"position_ids has shape \(3, 1, 4\)"):
        tiny_model(**GRID)(ids, position_ids=positions[..., :4])
    with pytest.raises(ValueError, match=r"must be \(batch, length\)"):
        tiny_model(**GRID).generate(ids, position_ids=positions.long())


def test_sections_survive_saving(tmp_path):
    MoTConfig(**GRID).save_pretrained(tmp_path)
    assert MoTConfig.from_pretrained(tmp_path).rope_parameters == SECTION | {"rope_type": "default"}
