"""Tables of names read in both directions and leave nothing out without saying so."""

import pytest
import torch

from conversion.architectures import NEUTRAL, architecture_of
from conversion.key_maps import ConversionError, KeyMap, Rule
from modeling_mot import MoTConfig, MoTForCausalLM

from .sources import SOURCES, dense_model


RULES = [
    Rule("embed.weight", "embed.weight"),
    Rule("layers.{layer}.mlp.{part}_proj.{kind}", "layers.{layer}.mlp.{tower}.{part}_proj.{kind}"),
    Rule("layers.{layer}.mlp.{part}_proj.{kind}", "layers.{layer}.mlp.{mixture}.experts.{expert}.{part}_proj.{kind}"),
    Rule("vision.{rest*}", "image_tokenizer.{rest*}"),
]
VALUES = {"tower": ["image", "speech"], "mixture": ["text"], "expert": ["0", "1"]}


def test_one_tensor_becomes_one_for_each_tower_and_expert():
    assert KeyMap(RULES, VALUES).forward("layers.11.mlp.up_proj.weight") == [
        "layers.11.mlp.image.up_proj.weight",
        "layers.11.mlp.speech.up_proj.weight",
        "layers.11.mlp.text.experts.0.up_proj.weight",
        "layers.11.mlp.text.experts.1.up_proj.weight",
    ]


def test_the_way_back_names_the_source_and_the_tower():
    origin = KeyMap(RULES, VALUES).backward("layers.3.mlp.text.experts.1.down_proj.bias")
    assert origin.name == "layers.3.mlp.down_proj.bias"
    assert origin.fan_out == {"mixture": "text", "expert": "1"}


@pytest.mark.parametrize(
    "name", ["embed.weight", "layers.0.mlp.gate_proj.weight", "vision.encoder.conv.0.bias", "vision.x"]
)
def test_forward_and_back_is_the_identity(name):
    key_map = KeyMap(RULES, VALUES)
    assert {key_map.backward(target).name for target in key_map.forward(name)} == {name}


def test_a_field_without_dots_and_one_with():
    key_map = KeyMap([Rule("a.{x}.c", "b.{x}.d"), Rule("e.{y*}", "f.{y*}")])
    assert key_map.forward("a.1.2.c") == []
    assert key_map.forward("e.1.2") == ["f.1.2"]


def test_dots_in_patterns_are_dots():
    assert KeyMap([Rule("a.b", "c.d")]).forward("a_b") == []


def test_every_name_left_over_on_either_side_is_listed():
    source = ["embed.weight", "layers.0.mlp.up_proj.weight", "extra.one", "extra.two"]
    target = ["embed.weight", "layers.0.mlp.image.up_proj.weight", "layers.1.mlp.image.up_proj.weight", "head.weight"]
    with pytest.raises(ConversionError) as error:
        KeyMap(RULES, VALUES).origins(source, target)
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "  only in the source: extra.one",
        "  only in the source: extra.two",
        "  only in the target: layers.1.mlp.image.up_proj.weight (from layers.1.mlp.up_proj.weight)",
        "  only in the target: head.weight",
    ]
    assert "2 tensors of the source have no place, and 2 of the target have no source" in lines[0]


def test_ignored_names_may_be_left_over():
    key_map = KeyMap(RULES, VALUES, ignored=["layers.{layer}.rotary.inv_freq"])
    assert list(key_map.origins(["embed.weight", "layers.0.rotary.inv_freq"], ["embed.weight"])) == ["embed.weight"]


def test_a_field_that_the_way_back_would_miss_is_refused():
    with pytest.raises(ValueError, match="lacks .'layer'. of the source"):
        Rule("layers.{layer}.weight", "weight")


def test_two_sources_of_one_target_are_refused():
    with pytest.raises(ValueError, match="has 2 sources"):
        KeyMap([Rule("a", "c"), Rule("b", "c")]).backward("c")


def test_values_must_be_given():
    with pytest.raises(ValueError, match="no values are given for .'tower'."):
        KeyMap([Rule("a", "b.{tower}")])


def test_a_field_without_values_makes_nothing():
    key_map = KeyMap([Rule("a", "b.{tower}")], {"tower": []})
    assert key_map.forward("a") == [] and key_map.backward("b.text") is None


@pytest.mark.parametrize(
    "untied", [[], ["feed_forward"], ["feed_forward", "query_key_value"], ["attention", "feed_forward", "norm"]]
)
@pytest.mark.parametrize("name", SOURCES)
def test_forward_and_back_is_the_identity_for_every_architecture(name, untied):
    dense = dense_model(name)
    architecture = architecture_of(dense.config.model_type)
    experts = ["text"] if "feed_forward" in untied else []
    config = MoTConfig(**architecture.mot_fields(dense.config), untied=untied, moe_towers=experts)
    with torch.device("meta"):
        stored = set(MoTForCausalLM(config).state_dict())
    stored -= {"lm_head.weight"} if config.tie_word_embeddings else set()
    source = {name for name, _ in dense.named_parameters()}  # tied ones once
    key_map = architecture.key_map(config)
    there = {name: key_map.forward(name) for name in source}
    assert all(key_map.backward(target).name == name for name, targets in there.items() for target in targets)
    reached = {target for targets in there.values() for target in targets}
    assert stored - reached == {f"model.layers.{i}.mlp.text.router.weight" for i in range(3) if experts}
    assert reached <= stored


@pytest.mark.parametrize("name", SOURCES)
def test_fields_there_and_back_are_the_same_configuration(name):
    config = dense_model(name).config
    architecture = architecture_of(config.model_type)
    architecture.check(config, config.to_dict())
    back = architecture.source_config(MoTConfig(**architecture.mot_fields(config)))
    left, right = ({k: v for k, v in c.to_dict().items() if k not in NEUTRAL} for c in (config, back))
    assert left == right
    assert "sliding_attention" not in (getattr(back, "layer_types", None) or [])


def test_what_an_architecture_cannot_express_is_named():
    with pytest.raises(ConversionError, match="llama cannot express qk_norm='rms'"):
        architecture_of("llama").source_config(MoTConfig(qk_norm="rms"))
