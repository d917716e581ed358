"""Cosmos 3's checkpoints and ours: names of tensors in both of its layouts, and configurations in both directions.

Cosmos 3 has two towers, a *reasoner* of text and a *generator* of latents. Its weights stand in diffusers' layout
(`Cosmos3OmniTransformer`, the folder `transformer/` of a pipeline) or in that of its training, whose names of modules
are BAGEL's. Both describe the model by the fields of diffusers' configuration.
"""

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import Cosmos3OmniTransformer

from conversion.checkpoints import WEIGHTS, CheckpointReader
from conversion.commands import reading
from conversion.key_maps import ConversionError, KeyMap, Rule
from conversion.sizes import DIFFUSERS_WEIGHTS
from modeling_mot import MoTTransfusionConfig


CLASS_NAME = Cosmos3OmniTransformer.__name__
REASONER, GENERATOR = "reasoner", "generator"
TRANSFORMER, SCHEDULER, TOKENIZER = "transformer", "scheduler", "text_tokenizer"  # the folders of a pipeline
PIPELINE = "model_index.json"
NUM_TRAIN_TIMESTEPS = 1000
# Of the models that they began from, Qwen3-VL and Nemotron; diffusers' configuration has no such field.
MAX_POSITIONS = {"silu": 262144, "relu2": 131072}
_QWEN3_VL_SECTION = [24, 20, 20]


# -------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Layout:
    """One of the two layouts of Cosmos 3's weights.

    Attributes:
        weights: the name of the one file, or of its shards' index.
        rules: names of tensors, and ours.
        not_run: names of tensors that no module of ours has, sound and action; those of both layouts in one order.
    """

    name: str
    weights: str
    rules: tuple[Rule, ...]
    not_run: tuple[str, ...]

    @property
    def key_map(self) -> KeyMap:
        return KeyMap(self.rules, ignored=self.not_run)


def _rules(begin: str, head: str, attention: Mapping[str, Mapping[str, str]], beside: Mapping[str, str]) -> tuple:
    """Pair names with ours.

    Args:
        begin: what stands before the names of the transformer.
        head: the name of the output layer.
        attention: tower -> our module -> its name.
        beside: its modules beside the transformer -> ours.
    """
    layer, here = f"{begin}layers.{{layer}}", "model.layers.{layer}"
    rules = [Rule(f"{begin}embed_tokens.weight", "model.embed_tokens.weight"), Rule(head, "lm_head.weight")]
    rules += [Rule(f"{there}.{{kind}}", f"{ours}.{{kind}}") for there, ours in beside.items()]
    for tower, suffix in ((REASONER, ""), (GENERATOR, "_moe_gen")):
        rules += [
            Rule(f"{begin}norm{suffix}.weight", f"model.norm.{tower}.weight"),
            Rule(f"{layer}.input_layernorm{suffix}.weight", f"{here}.input_layernorm.{tower}.weight"),
            Rule(f"{layer}.post_attention_layernorm{suffix}.weight", f"{here}.post_attention_layernorm.{tower}.weight"),
            Rule(f"{layer}.mlp{suffix}.{{module}}.{{kind}}", f"{here}.mlp.{tower}.{{module}}.{{kind}}"),
        ]
        for ours, there in attention[tower].items():
            rules.append(Rule(f"{layer}.self_attn.{there}.{{kind}}", f"{here}.self_attn.{ours}.{tower}.{{kind}}"))
    crossing = f"{here}.self_attn.k_norm_cross.{REASONER}.weight"
    return (*rules, Rule(f"{layer}.self_attn.k_norm_und_for_gen.weight", crossing))


_OURS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
DIFFUSERS = Layout(
    "diffusers",
    DIFFUSERS_WEIGHTS,
    _rules(
        "",
        "lm_head.weight",
        {
            REASONER: dict(zip(_OURS, ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k"))),
            GENERATOR: dict(
                zip(_OURS, ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"))
            ),
        },
        {
            "proj_in": "patchifier.proj_in",
            "proj_out": "patchifier.proj_out",
            "time_embedder.linear_1": "patchifier.time_encoder.mlp.linear_1",
            "time_embedder.linear_2": "patchifier.time_encoder.mlp.linear_2",
        },
    ),
    ("action_proj_in.{rest*}", "action_proj_out.{rest*}", "audio_proj_in.{rest*}", "audio_proj_out.{rest*}",
     "action_modality_embed", "audio_modality_embed"),
)  # fmt: skip
TRAINING = Layout(
    "training",
    WEIGHTS,
    _rules(
        "language_model.model.",
        "language_model.lm_head.weight",
        {REASONER: {name: name for name in _OURS}, GENERATOR: {name: f"{name}_moe_gen" for name in _OURS}},
        {
            "vae2llm": "patchifier.proj_in",
            "llm2vae": "patchifier.proj_out",
            "time_embedder.mlp.0": "patchifier.time_encoder.mlp.linear_1",
            "time_embedder.mlp.2": "patchifier.time_encoder.mlp.linear_2",
        },
    ),
    ("action2llm.{rest*}", "llm2action.{rest*}", "sound2llm.{rest*}", "llm2sound.{rest*}",
     "action_modality_embed", "audio_modality_embed", "visual.{rest*}"),
)  # fmt: skip
LAYOUTS = {layout.name: layout for layout in (DIFFUSERS, TRAINING)}


def find_layout(folder: Path) -> tuple[Layout, CheckpointReader]:
    """Find the layout of a folder's weights, by their names, and open them.

    Raises:
        ConversionError: there are no weights, or they are not Cosmos 3's.
    """
    has_diffusers = any((folder / f"{DIFFUSERS_WEIGHTS}{end}").is_file() for end in ("", ".index.json"))
    reader = CheckpointReader(folder, DIFFUSERS_WEIGHTS if has_diffusers else WEIGHTS)
    for layout in LAYOUTS.values():
        first = layout.rules[0].source
        if first in reader and any("add_q_proj" in name or "q_proj_moe_gen" in name for name in reader.names):
            return layout, reader
    raise ConversionError(
        f"{folder} holds no {DIFFUSERS.rules[0].source} or {TRAINING.rules[0].source} with a second tower beside it: "
        "neither layout of Cosmos 3; give the folder of a pipeline, its transformer/, or a checkpoint of the training"
    )


def renamed(name: str, source: Layout, target: Layout) -> str | None:
    """Rename a tensor that is not run from one layout to the other; None where the other has no such tensor."""
    if source is target:
        return name
    for theirs, ours in zip(source.not_run, target.not_run):
        begin = theirs.removesuffix("{rest*}")
        if name == theirs or (begin != theirs and name.startswith(begin)):
            return ours.removesuffix("{rest*}") + name.removeprefix(begin) if begin != theirs else ours
    return None


# ------------------------------------------------------------------------------------------------------- configurations

# Fields of one name and meaning on both sides.
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "attention_bias", "attention_dropout",
)  # fmt: skip
# Fields of parts that are kept and not run, or that other fields decide.
_NOT_READ = (
    "action_dim", "action_gen", "num_embodiment_domains", "sound_dim", "sound_gen", "sound_latent_fps", "dtype",
    "rope_scaling", "patch_latent_dim",
)  # fmt: skip
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Cosmos3OmniTransformer.__init__).parameters.items()
    if name != "self"
}


def read_fields(stored: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return all fields of diffusers' configuration, with its defaults where a config.json leaves them open.

    Args:
        stored: the content of a config.json.
        ignored: fields that change nothing, on the user's word.

    Raises:
        ConversionError: a field that nobody here knows, or a value that no model of ours expresses.
    """
    unknown = {
        name: value
        for name, value in stored.items()
        if name not in DEFAULTS and not name.startswith("_") and name not in ignored and value not in (None, False)
    }
    if unknown:
        listed = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise ConversionError(
            f"config.json has {listed}, of which this conversion knows nothing; if they do not change what the model "
            f"computes, say so with --ignore-fields {' '.join(unknown)}"
        )
    fields = DEFAULTS | {name: value for name, value in stored.items() if name in DEFAULTS}
    expected = {
        "hidden_act": ("silu", "relu2"),
        "unified_3d_mrope_reset_spatial_ids": (True,),
        "timestep_scale": (1 / NUM_TRAIN_TIMESTEPS,),
        "patch_latent_dim": (fields["latent_patch_size"] ** 2 * fields["latent_channel"],),
    }
    for name, values in expected.items():
        if fields[name] not in values:
            raise ConversionError(f"{name}={fields[name]!r} is not one of {values}, which a model of ours computes")
    return fields


def mot_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a MoTTransfusionConfig that compute what diffusers' configuration says."""
    section = fields["rope_axes_dim"] or (fields["rope_scaling"] or {}).get("mrope_section", _QWEN3_VL_SECTION)
    has_text_norm = fields["qk_norm_for_text"]
    own = {name: fields[name] for name in _SAME}
    return own | {
        "hidden_act": fields["hidden_act"],
        "gated_mlp": fields["hidden_act"] == "silu",
        "attention_output_bias": fields["attention_bias"],
        "max_position_embeddings": MAX_POSITIONS[fields["hidden_act"]],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": fields["rope_theta"],
            "mrope_section": list(section),
            "mrope_interleaved": True,
        },
        "modalities": ["text", "image"],
        "towers": {"text": REASONER, "image": GENERATOR},
        "tower_configs": None if has_text_norm else {REASONER: {"qk_norm": None}},
        "qk_norm": "rms",
        "unseen_towers": {REASONER: [GENERATOR]},
        "cross_key_norm": [REASONER] if fields["use_und_k_norm_for_gen"] and not has_text_norm else [],
        "latent_channels": fields["latent_channel"],
        "patch_size": fields["latent_patch_size"],
        "partial_patches": True,
        "latent_size": [45, 80],  # of 720 x 1280 pixels, what the pipeline draws by default
        "patchifier": "linear",
        "prediction_type": "flow",
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "timestep_format": "fraction",
        "timestep_addition": "noised_token",
        "timestep_sampling": "logit_normal",
        "diffusion_loss_weight": 1.0,
        "caption_dropout": 0.1,
        "image_positions": "grid",
        "modality_margin": fields["unified_3d_mrope_temporal_modality_margin"],
        "base_frames_per_second": fields["base_fps"] if fields["enable_fps_modulation"] else None,
    }


# Our fields that follow from theirs: what an export must find as it is.
_DECIDED = (
    "hidden_act", "gated_mlp", "attention_output_bias", "rope_parameters", "modalities", "towers", "tower_configs",
    "qk_norm", "unseen_towers", "cross_key_norm", "partial_patches", "patchifier", "prediction_type",
    "num_train_timesteps", "timestep_format", "timestep_addition", "image_positions", "modality_margin",
    "base_frames_per_second",
)  # fmt: skip
# And those that Cosmos 3 has no words for.
_PLAIN = {
    "untied": ["attention", "feed_forward", "norm"],
    "moe_towers": [],
    "norm_position": "pre",
    "norm_offset": False,
    "mlp_bias": False,
    "layers_without_rope": [],
    "embedding_multiplier": 1,
    "tie_word_embeddings": False,
    "markers_in_image_block": False,
    "noised_images_visible": True,
    "latent_position_table": None,
}


def cosmos3_fields(config: MoTTransfusionConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Make the content of diffusers' config.json.

    Args:
        stored: what an import has read, whose fields of sound and action stay; empty without one.

    Raises:
        ConversionError: Cosmos 3 has no such model; the message names the fields, their values and what it has.
    """
    has_text_norm = config.tower_config(REASONER).qk_norm is not None if REASONER in config.tower_names else True
    made = {name: getattr(config, name) for name in _SAME} | {
        "hidden_act": config.hidden_act,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_axes_dim": list(config.rope_parameters.get("mrope_section", _QWEN3_VL_SECTION)),
        "qk_norm_for_text": has_text_norm,
        "use_und_k_norm_for_gen": bool(config.cross_key_norm),
        "latent_channel": config.latent_channels,
        "latent_patch_size": config.patch_size,
        "patch_latent_dim": config.patch_size**2 * config.latent_channels,
        "unified_3d_mrope_temporal_modality_margin": config.modality_margin,
        "enable_fps_modulation": config.base_frames_per_second is not None,
        "base_fps": config.base_frames_per_second or DEFAULTS["base_fps"],
    }
    kept = {name: value for name, value in stored.items() if name in DEFAULTS}
    fields = {name: value for name, value in (DEFAULTS | kept | made).items() if name != "dtype"}

    # The way back must give the same model.
    back = mot_fields(fields)
    with reading("Cosmos 3 has no such model"):
        wanted = MoTTransfusionConfig(
            **back, **{name: getattr(config, name) for name in ("boi_token_id", "eoi_token_id", "image_token_id")},
            num_placeholder_tokens=config.num_placeholder_tokens,
        )  # fmt: skip
    expected = {name: getattr(wanted, name) for name in _DECIDED} | _PLAIN
    differing = [
        f"{name}={getattr(config, name)!r} (there {value!r})"
        for name, value in expected.items()
        if getattr(config, name) != value
    ]
    if differing:
        raise ConversionError(f"Cosmos 3 cannot express {', '.join(differing)}")
    return {"_class_name": CLASS_NAME} | fields


# Settings of a scheduler that the model's configuration decides, or that diffusers adds.
_OF_THE_MODEL = ("num_train_timesteps", "prediction_type", "use_flow_sigmas", "flow_shift", "shift")


def sampling_settings(scheduler: Mapping[str, Any], pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of drawing that a pipeline has, under the names of `generate()`.

    Args:
        scheduler, pipeline: the content of scheduler_config.json and model_index.json; empty without one.

    Raises:
        ConversionError: a scheduler that is none of diffusers'.
    """
    name = scheduler.get("_class_name", "UniPCMultistepScheduler")
    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler_class is None:
        raise ConversionError(f"scheduler_config.json has _class_name={name!r}, which is no scheduler of diffusers")
    known = inspect.signature(scheduler_class.__init__).parameters
    own = {
        option: value
        for option, value in scheduler.items()
        if option in known and option not in _OF_THE_MODEL and value != known[option].default
    }
    return {
        "scheduler": name,
        "scheduler_kwargs": own,
        "time_spacing": "levels" if pipeline.get("use_native_flow_schedule") else "scheduler",
        "num_inference_steps": 35,
        "guidance_scale": 6.0,
    }


def not_run_of(layout: Layout, names: Iterable[str]) -> list[str]:
    """List the tensors that are kept and not run."""
    key_map = layout.key_map
    return [name for name in names if key_map.ignores(name)]
