"""transformers' pi0 is a MoT of two towers: PaliGemma's language model and a narrower expert of the actions.

Both run with the same random weights. The pictures' encoder and the maps into and out of the expert are pi0's own.
"""

import pytest
import torch
from transformers import DynamicCache, PI0Config, PI0ForConditionalGeneration

from modeling_mot import ModalityRouting, MoTConfig, MoTModel


WIDE, NARROW, CHUNK, IMAGE = 64, 32, 5, 59
LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24, "vocab_size": 60}
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "patch_size": 4, "image_size": 8, "vision_use_head": False,
}  # fmt: skip
# Two pictures of four patches, a prompt of words, and in the second row padding.
IDS = torch.tensor([[IMAGE] * 8 + [2, 17, 40, 9, 33, 8], [IMAGE] * 8 + [2, 21, 7, 0, 0, 0]])
IS_TOKEN = (IDS != 0).long()
PREFIX, SUFFIX = IDS.shape[1], 1 + CHUNK


@pytest.fixture(scope="module")
def pi0():
    """A pi0 with every tensor random: norms of ones and biases of zeros would hide a mistake."""
    torch.manual_seed(0)
    text = {"model_type": "gemma", "hidden_size": WIDE, "intermediate_size": 96, **LAYERS}
    vlm = {"model_type": "paligemma", "text_config": text, "vision_config": VISION, "projection_dim": WIDE}
    expert = {"model_type": "gemma", "hidden_size": NARROW, "intermediate_size": 40, **LAYERS}
    config = PI0Config(
        vlm_config=vlm | {"image_token_id": IMAGE}, dit_config=expert, chunk_size=CHUNK, max_state_dim=3,
        max_action_dim=4,
    )  # fmt: skip
    model = PI0ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def mot(pi0):
    config = MoTConfig(
        modalities=["text", "action"], hidden_size=WIDE, intermediate_size=96, hidden_act="gelu_pytorch_tanh",
        rms_norm_eps=1e-6, norm_offset=True, embedding_multiplier=WIDE**0.5, max_position_embeddings=64,
        tower_configs={"action": {"hidden_size": NARROW, "intermediate_size": 40}}, **LAYERS,
    )  # fmt: skip
    model = MoTModel(config).eval()
    sources = {"text": pi0.model.vlm.language_model.state_dict(), "action": pi0.model.dit.state_dict()}
    weights = {}
    for name in model.state_dict():
        tower = next((part for part in name.split(".") if part in sources), "text")
        weights[name] = sources[tower][name.replace(f".{tower}.", ".")]
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "state": draw(2, 3),
        "noise": draw(2, CHUNK, 4),
        "timestep": torch.tensor([0.3, 0.9]),
        "pixel_values": draw(2, 2, 3, 8, 8),
        "pixel_attention_mask": torch.ones(2, 2, dtype=torch.bool),
    }


def embeddings(pi0, mot, inputs):
    """Pictures and words, then state and actions, in one row of the widest tower's width.  -> (2, L, WIDE)"""
    prefix = pi0.model.embed_prefix(IDS, inputs["pixel_values"], inputs["pixel_attention_mask"])
    suffix = pi0.embed_action_time(inputs["state"], inputs["noise"], inputs["timestep"])
    return torch.cat([prefix, mot.widen(suffix)], dim=1)


def seen_by_blocks():
    """Pictures and words are one block, the state one, the actions one; each sees itself and the blocks before it."""
    blocks = torch.tensor([0] * PREFIX + [1] + [2] * CHUNK)
    is_token = torch.cat([IS_TOKEN, torch.ones(2, SUFFIX, dtype=torch.long)], dim=1).bool()
    return ((blocks[:, None] >= blocks) & is_token[:, None, :])[:, None]  # (2, 1, L, L)


MODALITY_IDS = torch.tensor([[0] * PREFIX + [1] * SUFFIX] * 2)
POSITIONS = torch.cat([IS_TOKEN, torch.ones(2, SUFFIX, dtype=torch.long)], dim=1).cumsum(1) - 1


def velocity(pi0, mot, inputs):
    """The actions' velocity by one forward of both towers over the whole row."""
    hidden_states = mot(
        inputs_embeds=embeddings(pi0, mot, inputs),
        modality_ids=MODALITY_IDS,
        attention_mask=seen_by_blocks(),
        position_ids=POSITIONS,
    ).last_hidden_state
    return pi0.action_out_proj(hidden_states[:, -CHUNK:, :NARROW])


def test_one_forward_of_both_towers_gives_pi0s_velocity(pi0, mot, inputs):
    expected = pi0(input_ids=IDS, attention_mask=IS_TOKEN, **inputs).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(velocity(pi0, mot, inputs), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_pi0s_in_both_towers(pi0, mot, inputs):
    models, gradients = (pi0, mot), []
    for forward in (lambda: pi0(input_ids=IDS, attention_mask=IS_TOKEN, **inputs).logits, None):
        for model in models:
            model.zero_grad()
        (velocity(pi0, mot, inputs) if forward is None else forward()).square().sum().backward()
        gradients.append({name: p.grad for model in models for name, p in model.named_parameters()})
    theirs, ours = gradients
    compared = 0
    for name, gradient in ours.items():
        if (tower := next((part for part in name.split(".") if part in ("text", "action")), None)) is None:
            continue
        prefix = "model.vlm.language_model" if tower == "text" else "model.dit"
        expected = theirs[f"{prefix}.{name.replace(f'.{tower}.', '.')}"]
        if expected is None:  # what the prefix computes behind its last keys and values reaches no action
            assert not gradient.any()
            continue
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name
        compared += 1
    assert compared > 40


@torch.no_grad()
def test_actions_behind_a_cached_prefix_have_pi0s_velocity(pi0, mot, inputs):
    rows, seen, cache = embeddings(pi0, mot, inputs), seen_by_blocks(), DynamicCache()
    parts = (slice(PREFIX), slice(PREFIX, None))
    for part in parts:  # the whole prefix, then the expert alone on its keys and values
        hidden_states = mot(
            inputs_embeds=rows[:, part],
            modality_ids=MODALITY_IDS[:, part],
            attention_mask=seen[:, :, part, : part.stop],
            position_ids=POSITIONS[:, part],
            past_key_values=cache,
        ).last_hidden_state
    expected = pi0(input_ids=IDS, attention_mask=IS_TOKEN, **inputs).logits
    velocity = pi0.action_out_proj(hidden_states[:, -CHUNK:, :NARROW])
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sampled_actions_are_pi0s(pi0, mot, inputs):
    given = {name: value for name, value in inputs.items() if name != "timestep"}
    expected = pi0.sample_actions(input_ids=IDS, attention_mask=IS_TOKEN, num_steps=4, **given)
    actions = inputs["noise"]
    for step in range(4):  # Euler's steps from noise, t = 1, to actions, t = 0
        timestep = torch.full((2,), 1 - step / 4)
        actions = actions - velocity(pi0, mot, inputs | {"noise": actions, "timestep": timestep}) / 4
    torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_words_are_embedded_as_paligemma_embeds_them(pi0, mot, inputs):
    expected = embeddings(pi0, mot, inputs)[:, 8:PREFIX]
    assert torch.equal(mot.embed(IDS[:, 8:]), expected)


@pytest.mark.parametrize("tower", ["text", "action"])
def test_a_layer_of_one_tower_is_gemmas_layer(pi0, mot, tower):
    """On rows of one tower alone, in the widest tower's width."""
    gemma = pi0.model.vlm.language_model if tower == "text" else pi0.model.dit
    rows = torch.randn(2, 7, gemma.config.hidden_size)
    modality_ids = torch.full((2, 7), ["text", "action"].index(tower))
    angles = mot.rotary_emb(rows, position_ids=torch.arange(7)[None].expand(2, -1))
    routing = ModalityRouting.from_modality_ids(modality_ids, mot.config)
    seen = torch.rand(2, 1, 7, 7) < 0.5
    seen[..., 0] = True
    own = mot.layers[1](mot.widen(rows), routing, angles, attention_mask=seen)
    assert own.shape == (2, 7, WIDE) and not own[..., rows.shape[-1] :].any()
    expected = gemma.layers[1](rows, position_embeddings=angles, attention_mask=seen)
    torch.testing.assert_close(own[..., : rows.shape[-1]], expected, rtol=1e-5, atol=1e-5)
