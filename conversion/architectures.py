"""Translate the dense language models of transformers: their configuration and the names of their tensors.

    architecture = architecture_of(source_config)
    fields = architecture.mot_fields(source_config)        # and back: architecture.source_config(mot_config)
    key_map = architecture.key_map(mot_config)

An architecture is in the table if a MoTConfig can express its layer. A field that changes the model's output and that
a MoTConfig cannot express is refused, and so is a field that nobody here knows.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from conversion.commands import reading
from conversion.key_maps import ConversionError, KeyMap, Rule
from modeling_mot import MoTConfig


# Fields of the same name and meaning on both sides.
COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
)  # fmt: skip
# Fields of a layer that COMMON leaves open.
LAYER = (
    "attention_bias", "attention_output_bias", "mlp_bias", "gated_mlp", "qk_norm", "norm_position", "norm_offset",
    "embedding_multiplier", "layers_without_rope", "hidden_dropout",
)  # fmt: skip
# Fields that change nothing in the forward of a causal language model, or that COMMON expresses in another way.
NEUTRAL = {
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version",
    "use_cache", "pretraining_tp", "rope_theta", "rope_scaling", "no_rope_layer_interval", "max_window_layers",
    "use_sliding_window", "sliding_window", "layer_types", "is_llama_config", "transformers.js_config",
    "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset", "attn_implementation", "tokenizer_class",
}  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
# Kinds of RoPE whose factors depend on max_position_embeddings.
_ROPE_OF_LENGTH = ("dynamic", "yarn")

# Part of `MoTConfig.part_names` -> its modules.
_ATTENTION = {"query_key_value": ("q_proj", "k_proj", "v_proj"), "attention": ("o_proj", "q_norm", "k_norm")}

_IGNORED = ("model.rotary_emb.inv_freq", "model.layers.{layer}.self_attn.rotary_emb.inv_freq")


def rules(attention_norm: str = "input_layernorm", feed_forward_norm: str = "post_attention_layernorm") -> list[Rule]:
    """Pair Llama's names with ours. The arguments are the source's names of the norms of attention and feed-forward."""
    layer = "model.layers.{layer}"
    return [
        Rule("model.embed_tokens.weight", "model.embed_tokens.weight"),
        Rule("lm_head.weight", "lm_head.weight"),
        Rule("model.norm.weight", "model.norm.{norm}.weight"),
        Rule(f"{layer}.{attention_norm}.weight", f"{layer}.input_layernorm.{{norm}}.weight"),
        Rule(f"{layer}.{feed_forward_norm}.weight", f"{layer}.post_attention_layernorm.{{norm}}.weight"),
        *(
            Rule(f"{layer}.self_attn.{module}.{{kind}}", f"{layer}.self_attn.{module}.{{{part}}}.{{kind}}")
            for part, modules in _ATTENTION.items()
            for module in modules
        ),
        Rule(f"{layer}.mlp.{{module}}.{{kind}}", f"{layer}.mlp.{{feed_forward}}.{{module}}.{{kind}}"),
        Rule(f"{layer}.mlp.{{module}}.{{kind}}", f"{layer}.mlp.{{mixture}}.experts.{{expert}}.{{module}}.{{kind}}"),
    ]


@dataclass(frozen=True)
class Architecture:
    """Describe a model type of transformers: how its configuration and its names of tensors become ours.

    Attributes:
        same: fields of LAYER that it has under their own names.
        renamed: its field -> ours.
        fixed: our field -> the value that all its models have.
        computed: our field -> the value that follows from its configuration.
        inverse: its field -> the value that follows from ours, where neither table above gives it.
        expected: its field -> (values that are expressed, what another one would do).
        rules: its names of tensors and ours.
    """

    model_type: str
    same: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    computed: Mapping[str, Callable[[PreTrainedConfig], Any]] = field(default_factory=dict)
    inverse: Mapping[str, Callable[[MoTConfig], Any]] = field(default_factory=dict)
    expected: Mapping[str, tuple[tuple, str]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = tuple(rules())

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return CONFIG_MAPPING[self.model_type]

    # ------------------------------------------------------------------------------------------------ configurations

    def mot_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the fields of a MoTConfig that compute what `config` computes; all of COMMON and LAYER."""
        # Fields of one name on both sides, with transformers' defaults where a configuration leaves them open.
        values = {name: getattr(config, name, None) for name in COMMON}
        values["head_dim"] = values["head_dim"] or config.hidden_size // config.num_attention_heads
        values["attention_dropout"] = values["attention_dropout"] or 0.0
        values["rope_parameters"] = dict(config.rope_parameters)
        # The layer: our defaults, then the fields of this architecture over them.
        values |= {name: _default(MoTConfig, name) for name in LAYER}
        values |= {name: getattr(config, name) for name in self.same}
        values |= {ours: getattr(config, theirs) for theirs, ours in self.renamed.items()}
        values |= self.fixed
        values |= {name: value(config) for name, value in self.computed.items()}
        if values["attention_output_bias"] is None:
            values["attention_output_bias"] = values["attention_bias"]
        values["layers_without_rope"] = list(values["layers_without_rope"])
        return values

    def source_config(self, config: MoTConfig) -> PreTrainedConfig:
        """Return the configuration of this architecture that computes what a tower of `config` computes.

        Raises:
            ConversionError: there is none; the fields that differ are named.
        """
        values = {name: getattr(config, name) for name in (*COMMON, *self.same)}
        has_head_dim = any(known.name == "head_dim" for known in fields(self.config_class))
        if not has_head_dim and config.head_dim == config.hidden_size // config.num_attention_heads:
            del values["head_dim"]  # the class has no such field; its models read another value all the same
        values |= {theirs: getattr(config, ours) for theirs, ours in self.renamed.items()}
        values |= {name: value(config) for name, value in self.inverse.items()}
        with reading(f"{self.model_type} cannot express it"):
            made = self.config_class(**values)
        # The way back must give the same MoT; a field that does not come back cannot be expressed.
        differing = [
            f"{name}={getattr(config, name)!r} (there {value!r})"
            for name, value in self.mot_fields(made).items()
            if getattr(config, name) != value
        ]
        if differing:
            raise ConversionError(f"{self.model_type} cannot express {', '.join(differing)}")
        return made

    def check(self, config: PreTrainedConfig, stored: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        """Refuse a configuration that a MoTConfig does not express.

        Args:
            config: the configuration as transformers reads it.
            stored: the content of its config.json.
            ignored: fields that the user vouches for.

        Raises:
            ConversionError: naming the fields, their values and the way out.
        """
        if config.to_dict().get("quantization_config") is not None or stored.get("quantization_config") is not None:
            raise ConversionError("quantization_config: the weights are quantized; take the checkpoint before that")
        for name, (values, reason) in self.expected.items():
            if getattr(config, name, None) not in values:
                raise ConversionError(f"{name}={getattr(config, name)!r}: {reason}")
        self._check_rope(config)
        unknown = {name: value for name, value in self._unknown(config, stored).items() if name not in ignored}
        if unknown:
            listed = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
            raise ConversionError(
                f"the configuration has {listed}, of which this conversion knows nothing; if they do not change what "
                f"{self.model_type} computes, say so with --ignore-fields {' '.join(unknown)}"
            )

    def _check_rope(self, config: PreTrainedConfig) -> None:
        kind = config.rope_parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ConversionError(f"rope_parameters: rope_type={kind!r} is not one of {', '.join(ROPE_TYPES)}")
        share = config.rope_parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
        if share not in (None, 1, 1.0):
            raise ConversionError(f"partial_rotary_factor={share}: RoPE turns whole heads in a MoT, not a part of them")

    def _unknown(self, config: PreTrainedConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that no table here names and that differ from their default, or have no default."""
        handled = {*COMMON, *self.same, *self.renamed, *self.inverse, *self.expected, *NEUTRAL}
        handled |= {known.name for known in fields(PreTrainedConfig)}
        own = {known.name: known for known in fields(self.config_class)}
        values = {name: getattr(config, name) for name in own if name not in handled}
        values = {name: value for name, value in values.items() if value != _default(self.config_class, name)}
        strange = {name: value for name, value in stored.items() if name not in handled and name not in own}
        # transformers gives some fields to every configuration that it reads, such as settings of generation.
        plain = PreTrainedConfig().to_dict()
        return values | {
            n: v for n, v in strange.items() if not (n in plain and plain[n] == v) and v not in (None, False)
        }

    # ------------------------------------------------------------------------------------------------------- tensors

    def key_map(self, config: MoTConfig) -> KeyMap:
        """Pair the names of its tensors with the names in a model of `config`."""
        tied = config.tie_word_embeddings
        values = {part: config.part_names(part) for part in (*_ATTENTION, "norm")}
        feed_forwards = config.part_names("feed_forward")
        values["feed_forward"] = [name for name in feed_forwards if name not in config.moe_towers]
        values["mixture"] = [name for name in feed_forwards if name in config.moe_towers]
        values["expert"] = [str(expert) for expert in range(config.num_experts)]
        kept = [rule for rule in self.rules if not (tied and rule.source == "lm_head.weight")]
        return KeyMap(kept, values, ignored=(*_IGNORED, *(["lm_head.weight"] if tied else [])))


def _default(config_class: type, name: str) -> Any:
    return next(known.default for known in fields(config_class) if known.name == name)


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", same=("attention_bias", "mlp_bias")),
        Architecture("arcee", same=("attention_bias", "mlp_bias"), fixed={"gated_mlp": False}),
        Architecture("mistral", inverse={"sliding_window": lambda config: None}),
        Architecture(
            "ministral",
            inverse={
                "layer_types": lambda config: ["full_attention"] * config.num_hidden_layers,
                "sliding_window": lambda config: config.max_position_embeddings,  # of no layer, but its models read it
            },
        ),
        Architecture("qwen2", fixed={"attention_bias": True, "attention_output_bias": False}),
        Architecture("qwen3", same=("attention_bias",), fixed={"qk_norm": "rms"}),
        Architecture(
            "seed_oss",
            same=("attention_bias", "mlp_bias"),
            renamed={"attention_out_bias": "attention_output_bias", "residual_dropout": "hidden_dropout"},
        ),
        Architecture(
            "smollm3",
            same=("attention_bias", "mlp_bias"),
            computed={
                "layers_without_rope": lambda config: [
                    index for index, turns in enumerate(config.no_rope_layers[: config.num_hidden_layers]) if not turns
                ]
            },
            inverse={
                "no_rope_layers": lambda config: [
                    int(index not in config.layers_without_rope) for index in range(config.num_hidden_layers)
                ]
            },
        ),
        Architecture(
            "olmo2",
            same=("attention_bias",),
            fixed={"qk_norm": "rms_all_heads", "norm_position": "post"},
            rules=tuple(rules("post_attention_layernorm", "post_feedforward_layernorm")),
        ),
        Architecture(
            "gemma",
            same=("attention_bias",),
            fixed={"norm_offset": True},
            computed={"embedding_multiplier": lambda config: config.hidden_size**0.5},
            expected={
                "use_bidirectional_attention": ((None, False), "text would see what follows it"),
                # The first releases named it beside hidden_act="gelu", which means the same to transformers.
                "hidden_activation": ((None, "gelu", "gelu_pytorch_tanh"), "Gemma's activation is gelu_pytorch_tanh"),
            },
        ),
    )
}

_MIXTURE = "its feed-forwards are mixtures of experts with token choice, ours of expert choice"
REFUSED = {
    "gemma2": "it normalises before and after each block, caps logits and alternates windows of attention",
    "gemma3_text": "it normalises before and after each block, and alternates windows and bases of RoPE",
    "gemma3": "it normalises before and after each block, and holds a vision tower",
    "phi": "its layers are parallel, with LayerNorm and RoPE on a part of each head",
    "phi3": "its projections are fused (qkv_proj, gate_up_proj) and RoPE may turn a part of each head",
    "granite": "it multiplies residuals, attention and logits by factors",
    "olmo": "its LayerNorms have no weights",
    "olmo3": "it alternates windows of attention, with a RoPE of their own",
    "cohere": "its layers are parallel, with LayerNorm, and its logits are scaled",
    "glm": "RoPE turns a part of each head, in interleaved pairs",
    "stablelm": "its norms are LayerNorms and RoPE turns a part of each head",
    "starcoder2": "its norms are LayerNorms and its feed-forward has no gate",
    "gpt_neox": "its norms are LayerNorms and its feed-forward has no gate",
    "gpt2": "its positions are learned and its norms are LayerNorms",
    "arcee": "its feed-forward has no gate",
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "olmoe": _MIXTURE,
    "chameleon": "python -m conversion.import_chameleon converts it, with its images",
    "mixture_of_transformers": "it is a MoT already",
    "mixture_of_transformers_transfusion": "it is a MoT already",
}


def architecture_of(model_type: str) -> Architecture:
    """Find the architecture of a model type.

    Raises:
        ConversionError: there is none. The message gives the reason, if it is known, and the list of architectures.
    """
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    reason = REFUSED.get(str(model_type), "whether a MoTConfig expresses its layer is not known")
    raise ConversionError(
        f"model_type={model_type!r} cannot be converted: {reason}. Those that can are {', '.join(ARCHITECTURES)}"
    )


def fit_length(config: PreTrainedConfig, max_length: int | None) -> int:
    """Choose the length of sequences up to which a MoT with full attention computes what `config` computes.

    Args:
        max_length: the length that the user asks for; None: `max_position_embeddings`.

    Raises:
        ConversionError: the length exceeds the source's positions or its window of attention, or RoPE depends on it.
    """
    longest = config.max_position_embeddings
    length = longest if max_length is None else max_length
    if length < 1:
        raise ConversionError(f"--max-length {length} must be at least 1")
    if length > longest:
        raise ConversionError(f"--max-length {length} is longer than the source's max_position_embeddings={longest}")

    # Within the window of attention both sides are the same.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ConversionError(f"layer_types has {', '.join(sorted(unknown))}; a MoT has full attention")
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    if window is not None and not isinstance(window, int):
        raise ConversionError(f"sliding_window={window!r:.80} must be a whole number, or null")
    if window is not None and length > window:
        raise ConversionError(
            f"sliding_window={window} is shorter than max_position_embeddings={length}, and a MoT has full attention; "
            f"within the window they are the same: --max-length {window}"
        )

    # Some kinds of RoPE turn with other speeds when the longest sequence changes.
    kind = config.rope_parameters.get("rope_type")
    if (
        length != longest
        and kind in _ROPE_OF_LENGTH
        and "original_max_position_embeddings" not in config.rope_parameters
    ):
        raise ConversionError(
            f"rope_type={kind!r} depends on max_position_embeddings={longest}; leave out --max-length"
        )
    return length
