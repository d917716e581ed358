"""The presets against the paper's tables, counted by formula and on models built without memory."""

import re

import pytest
import torch

from modeling_mot import MoTConfig, MoTForCausalLM


# Millions of active parameters, embeddings and head included.
ACTIVE = {
    "chameleon-37m": 37.0,
    "chameleon-94m": 94.4,
    "chameleon-443m": 442.5,
    "chameleon-1.5b": 1501.7,
    "chameleon-7b": 7013,
    "chameleon-speech-443m": 442.5,
    "chameleon-speech-880m": 880.9,
    "chameleon-speech-1.5b": 1501.7,
    "chameleon-speech-7b": 7013,
    "transfusion-163m": 162,
    "transfusion-760m": 778,
    "transfusion-1.4b": 1364,
    "transfusion-7b": 6738,
    "ablation-880m": 880.9,
}
TOTAL = {"chameleon-7b": 13.5, "chameleon-speech-7b": 20.0, "chameleon-speech-443m": 1.06}
# name: hidden size, layers, heads, as the tables print them
TABLES = {
    "37m": (256, 4, 8),
    "94m": (512, 8, 8),
    "443m": (1024, 24, 16),
    "880m": (1536, 24, 24),
    "1.5b": (2048, 24, 16),
    "7b": (4096, 32, 32),
    "163m": (768, 16, 12),
    "760m": (1536, 24, 24),
    "1.4b": (2048, 24, 16),
}


def on_meta(config):
    with torch.device("meta"):
        return MoTForCausalLM(config)


def test_there_is_a_preset_for_every_row():
    assert set(MoTConfig.preset_names()) == set(ACTIVE)


@pytest.mark.parametrize("name", ACTIVE)
def test_sizes_are_the_tables(name):
    config = MoTConfig.from_preset(name)
    row = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert row == TABLES[name.rsplit("-", 1)[1]]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_match_the_papers_tables(name):
    expected = ACTIVE[name]
    half_of_the_last_digit = 0.05 if isinstance(expected, float) else 0.5
    for variant in ("dense", "mot"):
        active = MoTConfig.from_preset(name, variant).num_parameters(active=True) / 1e6
        assert active == pytest.approx(expected, abs=half_of_the_last_digit)


@pytest.mark.parametrize("name", ACTIVE)
def test_dense_model_holds_the_active_parameters(name):
    config = MoTConfig.from_preset(name, "dense")
    assert sum(p.numel() for p in on_meta(config).parameters()) == config.num_parameters(active=True)


@pytest.mark.parametrize("name", TOTAL)
def test_total_parameters_of_mot(name):
    model = on_meta(MoTConfig.from_preset(name, "mot"))
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e9 == pytest.approx(TOTAL[name], abs=0.05 if TOTAL[name] > 2 else 0.005)


@pytest.mark.parametrize("qk_norm", [None, "rms", "rms_all_heads", "layer"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", MoTConfig.variant_names())
def test_counted_parameters_equal_the_formula(tiny_config, variant, qk_norm, bias):
    config = tiny_config(variant, qk_norm=qk_norm, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=bias)
    assert sum(p.numel() for p in on_meta(config).parameters()) == config.num_parameters()


def test_active_parameters_are_what_one_token_touches(tiny_model):
    model = tiny_model("hybrid")
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data.zero_()  # a tie, which the first expert wins for every token
    model(torch.randint(7, 30, (1, 6)), token_choice=True).logits.sum().backward()  # one tower, one expert
    touched = 0
    for name, parameter in model.named_parameters():
        whole = name in ("model.embed_tokens.weight", "lm_head.weight") or "router" in name
        touched += parameter.numel() if whole or parameter.grad.any() else 0
    assert touched == model.config.num_parameters(active=True)


@pytest.mark.parametrize("variant", ["dense", "moe-4x", "mot", "hybrid"])
def test_active_parameters_of_the_compared_models_differ_by_the_router_only(variant):
    config = MoTConfig.from_preset("chameleon-443m", variant)
    router = config.num_hidden_layers * config.hidden_size * config.num_experts if config.moe_towers else 0
    dense = MoTConfig.from_preset("chameleon-443m", "dense").num_parameters(active=True)
    assert config.num_parameters(active=True) == dense + router


# ------------------------------------------------------------------------------------------- Chameleon's own options

STYLED = ("qk_norm", "norm_position", "hidden_dropout", "z_loss_coefficient")


def styled(config):
    return tuple(getattr(config, field) for field in STYLED)


@pytest.mark.parametrize("name", ACTIVE)
def test_presets_have_none_of_chameleons_options(name):
    assert styled(MoTConfig.from_preset(name)) == styled(MoTConfig()) == (None, "pre", 0.0, 0.0)


@pytest.mark.parametrize(
    ("style", "expected"),
    [("chameleon-7b", ("layer", "pre", 0.1, 1e-5)), ("chameleon-34b", ("layer", "post", 0.0, 1e-5))],
)
def test_a_style_sets_all_of_chameleons_options(style, expected):
    assert styled(MoTConfig.from_preset("chameleon-7b", "dense", style=style)) == expected
    assert styled(MoTConfig.from_variant("hybrid", style=style, hidden_size=32, num_attention_heads=4)) == expected


def test_a_style_is_taken_whole():
    assert MoTConfig.from_variant(style="chameleon-7b", hidden_dropout=0.1).hidden_dropout == 0.1
    with pytest.raises(ValueError, match="style='chameleon-7b' has hidden_dropout=0.1, but hidden_dropout=0 was set"):
        MoTConfig.from_variant(style="chameleon-7b", hidden_dropout=0)
    with pytest.raises(ValueError, match="unknown style chameleon-8b.*chameleon-7b"):
        MoTConfig.from_preset("chameleon-7b", style="chameleon-8b")


# ---------------------------------------------------------------------------------------------------- names of tensors


def documented_names(qkv, attention, feed_forward, norm, moe, qk_norm):
    """The contract: Llama's names with the tower as the last module."""
    names = {"model.embed_tokens.weight", "lm_head.weight"} | {f"model.norm.{t}.weight" for t in norm}
    for i in range(2):
        layer = f"model.layers.{i}"
        names |= {f"{layer}.self_attn.{p}_proj.{t}.weight" for p in "qkv" for t in qkv}
        names |= {f"{layer}.self_attn.o_proj.{t}.weight" for t in attention}
        if qk_norm:
            names |= {f"{layer}.self_attn.{p}_norm.{t}.weight" for p in "qk" for t in attention}
        norms = ("input_layernorm", "post_attention_layernorm")
        names |= {f"{layer}.{which}.{t}.weight" for which in norms for t in norm}
        for tower in feed_forward:
            mlp = f"{layer}.mlp.{tower}"
            homes = [f"{mlp}.experts.{e}" for e in range(4)] if tower in moe else [mlp]
            names |= {f"{home}.{p}_proj.weight" for home in homes for p in ("gate", "up", "down")}
            names |= {f"{mlp}.router.weight"} if tower in moe else set()
    return names


ALL, SHARED = ["text", "image", "speech"], ["shared"]
LAYOUTS = {
    "dense": (SHARED, SHARED, SHARED, SHARED, []),
    "moe-4x": (SHARED, SHARED, SHARED, SHARED, SHARED),
    "mot": (ALL, ALL, ALL, ALL, []),
    "hybrid": (ALL, ALL, ALL, ALL, ["text"]),
    "untied-feed-forward": (SHARED, SHARED, ALL, SHARED, []),
    "untied-feed-forward-qkv": (ALL, SHARED, ALL, SHARED, []),
    "untied-feed-forward-attention": (ALL, ALL, ALL, SHARED, []),
}


@pytest.mark.parametrize("qk_norm", [None, "layer"])
def test_rows_of_the_ablation_untie_what_section_3_5_names(qk_norm):
    d, layers, ffn = 1536, 24, 4096  # Table 5
    norms = layers * 2 * d + d
    of_heads = 0 if qk_norm is None else layers * 4 * d
    rows = {"dense": 0, "untied-feed-forward": layers * 3 * d * ffn}
    rows["untied-feed-forward-qkv"] = rows["untied-feed-forward"] + layers * 3 * d * d
    rows["mot"] = rows["untied-feed-forward-qkv"] + layers * d * d + norms + of_heads
    counts = {row: MoTConfig.from_preset("ablation-880m", row, qk_norm=qk_norm).num_parameters() for row in rows}
    assert {row: count - counts["dense"] for row, count in counts.items()} == rows
    for row in rows:
        config = MoTConfig.from_preset("ablation-880m", row, qk_norm=qk_norm)
        assert sum(p.numel() for p in on_meta(config).parameters()) == counts[row]


def test_the_ablation_saves_and_loads_what_is_untied(tiny_model, tmp_path):
    model, ids = tiny_model("untied-feed-forward-qkv", qk_norm="layer"), torch.randint(7, 60, (1, 9))
    model.save_pretrained(tmp_path)
    loaded = MoTForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.untied == ["feed_forward", "query_key_value"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("qk_norm", [None, "rms"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("variant", LAYOUTS)
def test_parameter_names_are_the_contract(tiny_config, variant, norm_position, qk_norm):
    model = on_meta(tiny_config(variant, norm_position=norm_position, qk_norm=qk_norm))
    assert {name for name, _ in model.named_parameters()} == documented_names(*LAYOUTS[variant], qk_norm)


def test_every_projection_is_a_plain_linear(tiny_config):
    modules = dict(on_meta(tiny_config("hybrid")).named_modules())
    projections = [m for name, m in modules.items() if re.search(r"_proj\.(\w+)$|_proj$|router$", name)]
    leaves = [m for m in projections if not list(m.children())]
    assert leaves and all(type(m) is torch.nn.Linear for m in leaves)
