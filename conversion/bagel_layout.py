"""BAGEL's own folder and ours: names of tensors, and configurations in both directions.

BAGEL (`ByteDance-Seed/BAGEL-7B-MoT`, and models that were fine-tuned from it) keeps one file of weights, the
autoencoder of FLUX in another, and the configurations of its language model and its vision encoder. Its loader
overrides some of what these say, and infers the rest: so does this file, with sizes from the tensors themselves.
"""

from collections.abc import Collection, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from conversion.architectures import ARCHITECTURES
from conversion.checkpoints import CheckpointReader
from conversion.commands import reading
from conversion.key_maps import ConversionError, KeyMap, Rule
from conversion.sizes import check_sizes
from modeling_mot import MoTTransfusionConfig


WEIGHTS = "ema.safetensors"
LLM_CONFIG, VIT_CONFIG = "llm_config.json", "vit_config.json"
UNDERSTANDING, GENERATION, VISION = "understanding", "generation", "vision"
TOWERS = {UNDERSTANDING: "", GENERATION: "_moe_gen"}  # and what BAGEL appends to the names of its modules
VAE = "vae."  # the prefix of the autoencoder in a model of ours

# Fields of llm_config.json that its loader sets itself, or that no part of BAGEL reads.
_NOT_READ = (
    "qk_norm", "tie_word_embeddings", "layer_module", "freeze_und", "bos_token_id", "eos_token_id", "pad_token_id",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip
# Fields of the two files that a configuration of ours decides, and `export` writes.
_LLM_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout",
)  # fmt: skip
_VIT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels",
    "hidden_act", "layer_norm_eps",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- tensors


def bagel_map() -> KeyMap:
    """Pair BAGEL's names with ours, the autoencoder excepted; see `flux_vae_map`."""
    there, here = "language_model.model.layers.{layer}", "model.layers.{layer}"
    vit = "vit_model.vision_model"
    rules = [
        Rule("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        Rule("language_model.lm_head.weight", "lm_head.weight"),
        # Latents, and the time.
        Rule("vae2llm.{kind}", "patchifier.proj_in.{kind}"),
        Rule("llm2vae.{kind}", "patchifier.proj_out.{kind}"),
        Rule("time_embedder.mlp.0.{kind}", "patchifier.time_encoder.mlp.linear_1.{kind}"),
        Rule("time_embedder.mlp.2.{kind}", "patchifier.time_encoder.mlp.linear_2.{kind}"),
        Rule("latent_pos_embed.pos_embed", "position_tables.image.weight"),
        # The vision encoder.
        Rule("vit_pos_embed.pos_embed", f"position_tables.{VISION}.weight"),
        Rule(f"{vit}.embeddings.patch_embedding.{{kind}}", f"encoders.{VISION}.patch_embedding.{{kind}}"),
        Rule(f"{vit}.embeddings.position_embedding.weight", f"encoders.{VISION}.position_embedding.weight"),
        Rule(f"{vit}.encoder.layers.{{layer}}.{{rest*}}", f"encoders.{VISION}.layers.{{layer}}.{{rest*}}"),
        Rule(f"{vit}.post_layernorm.{{kind}}", f"encoders.{VISION}.post_layernorm.{{kind}}"),
        Rule("connector.{module}.{kind}", f"encoders.{VISION}.connector.{{module}}.{{kind}}"),
    ]
    for tower, suffix in TOWERS.items():
        rules.append(Rule(f"language_model.model.norm{suffix}.weight", f"model.norm.{tower}.weight"))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            rules.append(Rule(f"{there}.{norm}{suffix}.weight", f"{here}.{norm}.{tower}.weight"))
        for module in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            names = f".self_attn.{module}{suffix}.{{kind}}", f".self_attn.{module}.{tower}.{{kind}}"
            rules.append(Rule(f"{there}{names[0]}", f"{here}{names[1]}"))
        rules.append(Rule(f"{there}.mlp{suffix}.{{module}}.{{kind}}", f"{here}.mlp.{tower}.{{module}}.{{kind}}"))
    return KeyMap(rules)


# ----------------------------------------------------------------------------------------------- configurations: import


def mot_config(
    reader: CheckpointReader,
    llm: Mapping[str, Any],
    vit: Mapping[str, Any],
    vae_config: dict[str, Any] | None,
    token_ids: Mapping[str, int],
    ignored: Collection[str] = (),
) -> MoTTransfusionConfig:
    """Make the configuration of a BAGEL checkpoint.

    Args:
        reader: of its weights.
        llm, vit: the content of `llm_config.json` and `vit_config.json`.
        vae_config: of the autoencoder; None for a model without one.
        token_ids: ids of the text's end `im_end`, of the markers `vision_start` and `vision_end`, and of the
            placeholders `image` and `vision`, which may lie behind the vocabulary.
        ignored: fields of `llm_config.json` that the user vouches for.

    Raises:
        ConversionError: tensors and files contradict each other, or something that no model of ours computes.
    """
    fields = _language_model(reader, llm, ignored)
    side, channels, patch_size = _latents(reader, vae_config)
    encoder = _encoder(reader, vit)
    vision = {
        "kind": "features",
        "encoder": VISION,
        "placeholder_token_id": token_ids["vision"],
        "position_table": "sincos",
        "position_table_size": [_side(reader, "vit_pos_embed.pos_embed")] * 2,
    }
    placeholders = (token_ids["image"], token_ids["vision"])
    with reading("no model of ours is what the files say"):
        return MoTTransfusionConfig(
            **fields | {"eos_token_id": token_ids["im_end"]},
            modalities=["text", VISION, "image"],
            towers={"text": UNDERSTANDING, VISION: UNDERSTANDING, "image": GENERATION},
            boi_token_id=token_ids["vision_start"],
            eoi_token_id=token_ids["vision_end"],
            image_token_id=token_ids["image"],
            num_placeholder_tokens=max(max(placeholders) + 1 - fields["vocab_size"], 0),
            latent_channels=channels,
            latent_size=[side * patch_size] * 2,
            patch_size=patch_size,
            patchifier="linear",
            prediction_type="flow",
            timestep_sampling="logit_normal",
            timestep_format="fraction",
            timestep_addition="token",
            diffusion_loss_weight=1.0,
            caption_dropout=0.1,
            image_positions="shared",
            markers_in_image_block=True,
            noised_images_visible=False,
            noised_images_advance=False,
            latent_position_table="sincos",
            latent_position_table_size=[side, side],
            continuous_modalities={VISION: vision},
            encoders={VISION: encoder},
            vae_config=vae_config,
        )


def _language_model(reader: CheckpointReader, stored: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """Return the fields of the two towers. The tensors say the sizes, the file the rest."""
    check_sizes(dict(stored), reader, reader.folder / LLM_CONFIG)
    qwen2 = ARCHITECTURES["qwen2"]
    config = _read(Qwen2Config, stored, LLM_CONFIG)
    qwen2.check(
        config, {name: value for name, value in stored.items() if name not in _NOT_READ}, (*_NOT_READ, *ignored)
    )

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        return _shape(reader, f"language_model.model.{name}.weight", dimensions)

    (head_dim,) = shape("layers.0.self_attn.q_norm", dimensions=1)
    vocab_size, hidden_size = shape("embed_tokens")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shape("layers.0.mlp.gate_proj")[0],
        "num_hidden_layers": _count(reader, "language_model.model.layers."),
        "num_attention_heads": shape("layers.0.self_attn.q_proj")[0] // head_dim,
        "num_key_value_heads": shape("layers.0.self_attn.k_proj")[0] // head_dim,
    }
    # A vocabulary may have grown by tokens that were added.
    _check_stored({name: size for name, size in sizes.items() if name != "vocab_size"}, stored, LLM_CONFIG)
    fields = qwen2.mot_fields(config) | sizes | {"head_dim": head_dim}
    # BAGEL's loader: a norm on queries and keys, an output layer of its own. A text begins with no token by itself.
    return fields | {"qk_norm": "rms", "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None}


def _latents(reader: CheckpointReader, vae_config: dict[str, Any] | None) -> tuple[int, int, int]:
    """Return the side of the table of positions, the channels of a latent, and the side of a patch."""
    values = _shape(reader, "vae2llm.weight")[1]
    channels = 16 if vae_config is None else vae_config["latent_channels"]  # FLUX's own number
    patch_size = isqrt(values // channels)
    if patch_size**2 * channels != values:
        raise ConversionError(
            f"vae2llm.weight takes {values} numbers, which are no square of latents with {channels} channels; is the "
            "autoencoder this model's own?"
        )
    return _side(reader, "latent_pos_embed.pos_embed"), channels, patch_size


def _encoder(reader: CheckpointReader, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the vision encoder. BAGEL's loader builds one layer less than the file says."""
    check_sizes(dict(stored), reader, reader.folder / VIT_CONFIG)
    config = _read(SiglipVisionConfig, stored, VIT_CONFIG)
    there = "vit_model.vision_model"
    width, values = _shape(reader, f"{there}.embeddings.patch_embedding.weight")
    if values != config.patch_size**2 * config.num_channels:
        raise ConversionError(
            f"{VIT_CONFIG} has patch_size={config.patch_size} and num_channels={config.num_channels}, but a patch of "
            f"{there}.embeddings.patch_embedding.weight has {values} numbers"
        )
    depth = _count(reader, f"{there}.encoder.layers.")
    sizes = {
        "hidden_size": width,
        "intermediate_size": _shape(reader, f"{there}.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": depth + 1,
    }
    _check_stored(sizes, stored, VIT_CONFIG)
    return {
        "type": "siglip_navit",
        **sizes,
        "drop_last_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "table_size": [_side(reader, f"{there}.embeddings.position_embedding.weight")] * 2,
    }


def _read(config_class: type, stored: Mapping[str, Any], file: str) -> PreTrainedConfig:
    with reading(f"{file} cannot be read by transformers"):
        return config_class.from_dict(dict(stored))


def _shape(reader: CheckpointReader, name: str, dimensions: int = 2) -> tuple[int, ...]:
    if name not in reader:
        raise ConversionError(f"{reader.folder} holds no {name}, so it is no checkpoint of BAGEL")
    shape = reader.shape(name)
    if len(shape) != dimensions or not reader.has_values(name):
        raise ConversionError(f"{name} has shape {shape}, so {reader.folder} is no checkpoint of BAGEL")
    return shape


def _count(reader: CheckpointReader, prefix: str) -> int:
    """Count the layers whose tensors begin with `prefix` and a number."""
    return len({name.removeprefix(prefix).split(".")[0] for name in reader.names if name.startswith(prefix)})


def _side(reader: CheckpointReader, name: str) -> int:
    """Return the side of a square table of positions from its rows."""
    rows = _shape(reader, name)[0]
    if isqrt(rows) ** 2 != rows:
        raise ConversionError(f"{name} has {rows} rows, which are the patches of no square")
    return isqrt(rows)


def _check_stored(sizes: Mapping[str, int], stored: Mapping[str, Any], file: str) -> None:
    """Refuse a file that is of another checkpoint."""
    for name, size in sizes.items():
        if stored.get(name, size) != size:
            why = " (one more than there are)" if file == VIT_CONFIG and name == "num_hidden_layers" else ""
            raise ConversionError(
                f"{file} has {name}={stored[name]!r}, but the tensors say {size}{why}; are both of one checkpoint?"
            )


# ----------------------------------------------------------------------------------------------- configurations: export


def check_expressible(config: MoTTransfusionConfig) -> None:
    """Refuse a configuration that BAGEL's loader would build otherwise.

    Raises:
        ConversionError: names the field, its value and what BAGEL has.
    """
    encoder = (config.encoders or {}).get(VISION, {})
    fixed = {
        "towers": (config.towers, {"text": UNDERSTANDING, VISION: UNDERSTANDING, "image": GENERATION}),
        "untied": (sorted(config.untied), ["attention", "feed_forward", "norm"]),
        "moe_towers": (config.moe_towers, []),
        "qk_norm": (config.qk_norm, "rms"),
        "norm_position": (config.norm_position, "pre"),
        "norm_offset": (config.norm_offset, False),
        "layers_without_rope": (config.layers_without_rope, []),
        "embedding_multiplier": (config.embedding_multiplier, 1),
        "attention_bias": (config.attention_bias, True),
        "attention_output_bias": (config.attention_output_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "tie_word_embeddings": (config.tie_word_embeddings, False),
        "patchifier": (config.patchifier, "linear"),
        "prediction_type": (config.prediction_type, "flow"),
        "timestep_addition": (config.timestep_addition, "token"),
        "timestep_format": (config.timestep_format, "fraction"),
        "image_positions": (config.image_positions, "shared"),
        "markers_in_image_block": (config.markers_in_image_block, True),
        "encoders": (sorted(config.encoders or {}), [VISION]),
        f"encoders[{VISION!r}].drop_last_layers": (encoder.get("drop_last_layers"), 1),
    }
    for name, (value, expected) in fixed.items():
        if value != expected:
            raise ConversionError(f"{name}={value!r}, where BAGEL has {expected!r}: its loader cannot build this model")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ConversionError(
            f"head_dim={config.head_dim} is not hidden_size / num_attention_heads, which is what BAGEL's loader builds"
        )


def bagel_configs(
    config: MoTTransfusionConfig, llm: Mapping[str, Any], vit: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the content of `llm_config.json` and `vit_config.json`.

    Args:
        llm, vit: what an import has read, whose fields stay unless the model has other values; empty without one.
    """
    # Values that a reader would find anyway are not written.
    llm = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False} | dict(llm)
    known, rope = _read(Qwen2Config, llm, LLM_CONFIG), dict(config.rope_parameters)
    llm |= {name: getattr(config, name) for name in _LLM_FIELDS if getattr(known, name) != getattr(config, name)}
    if dict(known.rope_parameters) != rope:
        llm["rope_theta"] = rope.pop("rope_theta")
        llm["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    encoder = config.encoders[VISION]
    vit = {"model_type": "siglip_vision_model"} | dict(vit)
    known = _read(SiglipVisionConfig, vit, VIT_CONFIG)
    vit |= {name: encoder[name] for name in _VIT_FIELDS if getattr(known, name) != encoder[name]}
    if isqrt(encoder["table_size"][0] * encoder["table_size"][1]) * encoder["patch_size"] != known.image_size:
        vit["image_size"] = encoder["table_size"][0] * encoder["patch_size"]
    return llm, vit


def checkpoint_reader(folder: Path) -> CheckpointReader:
    """Open the weights of a BAGEL folder: `ema.safetensors`, or `model.safetensors` as some fine-tunes name it."""
    names = (WEIGHTS, f"{WEIGHTS}.index.json")
    is_named = any((folder / name).is_file() for name in names)
    return CheckpointReader(folder, WEIGHTS) if is_named else CheckpointReader(folder)
