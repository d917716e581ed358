"""What a MoTConfig accepts, refuses, and keeps when it is written and read."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from modeling_mot import MoTConfig, MoTForCausalLM


CONTRADICTIONS = {
    "vocab_size": ({"vocab_size": 0}, "vocab_size=0"),
    "tokenizer_vocab_size": ({"tokenizer_vocab_size": 0}, "tokenizer_vocab_size=0"),
    "more_tokens_than_rows": ({"tokenizer_vocab_size": 61}, "tokenizer_vocab_size=61 is more than vocab_size=60"),
    "code_of_no_token": (
        {"tokenizer_vocab_size": 59},
        "modality_token_ranges\\['speech'\\]=\\[45, 60\\] .* end <= tokenizer_vocab_size=59",
    ),
    "marker_of_no_token": (
        {"tokenizer_vocab_size": 4, "modality_token_ranges": None},
        "eoi_token_id=4 must be a text token, in \\[0, 4\\)",
    ),
    "hidden_size": ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
    "key_value_heads": ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
    "odd_head_dim": ({"head_dim": 7}, "head_dim=7 must be even"),
    "norm_position": ({"norm_position": "sandwich"}, "norm_position='sandwich'"),
    "qk_norm": ({"qk_norm": "batch"}, "qk_norm='batch'"),
    "layers_without_rope": ({"layers_without_rope": [1, 2]}, "layers_without_rope=\\[1, 2\\] has 2"),
    "embedding_multiplier": ({"embedding_multiplier": 0}, "embedding_multiplier=0"),
    "hidden_dropout": ({"hidden_dropout": 1.0}, "hidden_dropout=1.0"),
    "attention_dropout": ({"attention_dropout": -0.1}, "attention_dropout=-0.1"),
    "z_loss": ({"z_loss_coefficient": -1.0}, "z_loss_coefficient=-1.0"),
    "image_grid": ({"image_grid": [4]}, "image_grid=\\[4\\]"),
    "max_speech_tokens": ({"max_speech_tokens": 0}, "max_speech_tokens=0"),
    "text_first": ({"modalities": ["image", "text", "speech"]}, "must name 'text' first"),
    "modality_twice": ({"modalities": ["text", "image", "image"]}, "names one twice"),
    "tower_missing": ({"towers": {"text": "a", "image": "b"}}, "must give a tower to each"),
    "tower_of_nothing": (
        {"towers": {"text": "a", "image": "b", "speech": "c", "video": "d"}},
        "must give a tower to each",
    ),
    "dotted_tower": ({"towers": {"text": "a.b", "image": "c", "speech": "d"}}, "'a.b'"),
    "shared_and_own": ({"towers": {"text": "shared", "image": "a", "speech": "a"}}, "'shared' is the name"),
    "untied": ({"untied": ["attention", "embeddings"]}, "'embeddings'"),
    "moe_tower": ({"moe_towers": ["video"]}, "names 'video', an unknown tower"),
    "one_expert": ({"moe_towers": ["text"], "num_experts": 1}, "num_experts=1"),
    "range_missing": ({"modality_token_ranges": {"text": [0, 30]}}, "must give a range to each"),
    "range_outside": (
        {"modality_token_ranges": {"text": [0, 30], "image": [30, 45], "speech": [45, 61]}},
        "modality_token_ranges\\['speech'\\]=\\[45, 61\\]",
    ),
    "ranges_overlap": (
        {"modality_token_ranges": {"text": [0, 31], "image": [30, 45], "speech": [45, 60]}},
        "'text' ends at 31, 'image' begins at 30",
    ),
    "special_is_an_image_code": ({"boi_token_id": 31}, "boi_token_id=31 must be a text token"),
    "boi_without_eoi": ({"eoi_token_id": None}, "boi_token_id=3 and eoi_token_id=None go together"),
    "begin_without_end": ({"end_of_speech_token_id": None}, "go together"),
    "same_marker_twice": ({"eoi_token_id": 3}, "boi_token_id=3 and eoi_token_id=3 must differ"),
    "marker_of_image_and_speech": ({"end_of_speech_token_id": 4}, "end_of_speech_token_id=4 must differ"),
    "marker_is_the_end_of_text": ({"eos_token_id": [2, 3]}, "eos_token_id=3 and boi_token_id=3 must differ"),
    "no_head_dim": ({"head_dim": 0}, "head_dim=0"),
    "negative_eps": ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05"),
    "activation": ({"hidden_act": "sillu"}, "hidden_act='sillu' is not one of .* did you mean 'silu'"),
    "no_positions": ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    "grid_of_nothing": ({"image_grid": [0, 3]}, "image_grid=\\[0, 3\\]"),
    "range_of_three": (
        {"modality_token_ranges": {"text": [0, 10, 30], "image": [30, 45], "speech": [45, 60]}},
        "modality_token_ranges\\['text'\\]=\\[0, 10, 30\\]",
    ),
    "tower_of_torchs_name": ({"towers": {"text": "keys", "image": "a", "speech": "b"}}, "towers names 'keys'"),
    "tower_of_our_name": ({"towers": {"text": "a", "image": "reads", "speech": "b"}}, "towers names 'reads'"),
    "dtype": ({"dtype": "float31"}, "dtype='float31'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradiction_is_refused_by_name(tiny_config, case):
    fields, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "32"),
        ("num_hidden_layers", 2.5),
        ("modalities", "text"),
        ("towers", ["text"]),
        ("tie_word_embeddings", "yes"),
        ("image_grid", 4),
        ("z_loss_coefficient", "1e-5"),
        ("layers_without_rope", "1"),
        ("norm_offset", 1.0),
        ("gated_mlp", 0),
        ("tower_configs", {"image": 20}),
    ],
)
def test_mistyped_value_is_refused(field, value):
    with pytest.raises(TypeError, match=field):
        MoTConfig(**{field: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize(
    "field",
    [
        "rms_norm_eps",
        "initializer_range",
        "embedding_multiplier",
        "attention_dropout",
        "hidden_dropout",
        "z_loss_coefficient",
    ],
)
def test_numbers_that_are_not_finite_or_negative_are_refused(tiny_config, field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        tiny_config(**{field: value})


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30])
@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_experts",
    ],
)
def test_sizes_of_no_model_are_refused_before_memory_is_asked_for(tiny_config, field, value):
    with pytest.raises(ValueError, match=f"{field}={value} "):
        tiny_config(**{field: value})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"a": 1}, "unknown key of rope_parameters a; known are"),
        ({"rope_tetha": 1e4}, "did you mean 'rope_theta'"),
        ({"rope_theta": math.nan}, "rope_parameters.rope_theta=nan"),
        ({"rope_theta": 0}, "rope_parameters.rope_theta=0"),
        ({"rope_type": "liner", "factor": 2.0}, "rope_type='liner' .* did you mean 'linear'"),
        ({"rope_type": "linear"}, "'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "rope_parameters.factor=0.5"),
        ({"rope_theta": 1e4, "factor": 2.0}, "unknown key of rope_parameters for rope_type='default' factor"),
        ({"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0] * 4}, "short_factor"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "low_freq_factor=4.0 must be less",
        ),
    ],
)
def test_rope_parameters_that_mean_nothing_are_refused(tiny_config, rope, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(rope_parameters=rope)


@pytest.mark.parametrize("content", [[], None, 3, "text", {"hidden_size": 0}, {"hidden_act": "nope"}, {"id2label": 3}])
def test_junk_in_a_configuration_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(content | {"model_type": MoTConfig.model_type} if isinstance(content, dict) else content)
    )
    name = next(iter(content)) if isinstance(content, dict) and content else "config.json"
    with pytest.raises(ValueError, match=name):
        MoTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("misspelt", "right"),
    [("modalites", "modalities"), ("hidden_sise", "hidden_size"), ("norm_positon", "norm_position")],
)
def test_misspelt_field_is_refused_with_the_nearest_name(misspelt, right):
    with pytest.raises(ValueError, match=f"did you mean '{right}'"):
        MoTConfig(**{misspelt: None})


def test_fields_of_transformers_and_quantizers_pass():
    assert MoTConfig(quantization_config={"bits": 4}).quantization_config == {"bits": 4}


@pytest.mark.parametrize("variant", MoTConfig.variant_names())
def test_written_and_read_it_is_the_same(tiny_config, variant, tmp_path):
    config = tiny_config(variant, qk_norm="rms")
    config.save_pretrained(tmp_path)
    assert MoTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert AutoConfig.from_pretrained(tmp_path).tower_names == config.tower_names


def test_contradiction_made_later_is_not_saved(tiny_config, tmp_path):
    config = tiny_config()
    config.norm_position = "middle"
    with pytest.raises(Exception, match="norm_position"):
        config.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("loader", [MoTConfig, MoTForCausalLM])
def test_config_of_another_model_type_is_refused(loader, tmp_path):
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='llama'"):
        loader.from_pretrained(tmp_path)


def test_every_modality_has_a_tower_by_default(tiny_config):
    assert tiny_config().tower_names == ["text", "image", "speech"]


@pytest.mark.parametrize("alone", ["text", "image", "speech"])
def test_leave_one_out_joins_the_other_two(tiny_config, alone):
    towers = tiny_config(f"loo-{alone}").towers
    others = {tower for name, tower in towers.items() if name != alone}
    assert len(others) == 1 and towers[alone] not in others


def test_unknown_variant_and_preset_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="variant='mott'"):
        MoTConfig.from_variant("mott")
    with pytest.raises(ValueError, match="did you mean 'chameleon-443m'"):
        MoTConfig.from_preset("chameleon-443")


def test_leave_one_out_of_an_absent_modality_is_refused():
    with pytest.raises(ValueError, match="loo-speech"):
        MoTConfig.from_variant("loo-speech", modalities=["text", "image"])


INSIDE = {"text": [0, 60], "image": [8, 30], "speech": [40, 60]}


@pytest.mark.parametrize("name", ["image", "speech"])
def test_text_may_enclose_other_ranges(tiny_config, name):
    config = tiny_config(modality_token_ranges=INSIDE)
    first, end = INSIDE[name]
    ids = torch.tensor([[first - 1, first, end - 1, end % 60]])
    index = config.modalities.index(name)
    with torch.device("meta"):
        model = MoTForCausalLM(config)
    assert model.model.modality_ids_of(ids).tolist() == [[0, index, index, 0]]


@pytest.mark.parametrize(
    ("ranges", "fields", "message"),
    [
        ({"text": [0, 20], "image": [8, 30], "speech": [40, 60]}, {}, "'text' ends at 20, 'image' begins at 8"),
        ({"text": [0, 60], "image": [8, 41], "speech": [40, 60]}, {}, "'image' ends at 41, 'speech' begins at 40"),
        ({"text": [10, 60], "image": [8, 30], "speech": [40, 60]}, {}, "overlap"),
        (INSIDE, {"boi_token_id": 9}, "boi_token_id=9 must be a text token"),
    ],
)
def test_ranges_that_overlap_otherwise_are_refused(tiny_config, ranges, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(modality_token_ranges=ranges, **fields)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000, '{"vocab_size": ' + "1" * 5000 + "}"])
def test_a_file_that_no_reader_takes_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match="config.json"):
        MoTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("modalities", [None, "text", 3, [], [None]], ids=repr)
def test_modalities_of_a_variant_are_a_list_of_names(modalities):
    with pytest.raises(ValueError, match="modalities="):
        MoTConfig.from_variant("mot", modalities=modalities)
