"""Configuration of Mixture-of-Transformers models (arXiv 2411.04996).

One class describes all models of the paper: the dense baseline, MoE-4x, MoT with any number of modalities, the hybrid
of the two, the leave-one-out variants and the untying ablation. They differ in three fields: `towers` (which modalities
share a tower), `untied` (which parts of a layer each tower has for itself) and `moe_towers` (which towers have
experts).
"""

import copy
import json
from itertools import combinations

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .checks_fields import (
    CONFIG_RULES,
    INHERITED_RULES,
    SPAN_RULES,
    TOWER_RULES,
    Several,
    Typed,
    check_fields,
    check_names,
    check_rope_parameters,
    did_you_mean,
    strict_configuration,
)
from .configuration_presets import PRESETS, STYLES, VARIANTS
from .hub_trust import without_code


SHARED = "shared"
UNTIED_PARTS = ("attention", "feed_forward", "norm")
QUERY_KEY_VALUE = "query_key_value"  # the projections of "attention" without O and QK-norms
# The fields that a tower may have for itself (`tower_configs`), and the parts of a layer that must then be untied.
TOWER_FIELDS = {
    "hidden_size": UNTIED_PARTS,
    "intermediate_size": ("feed_forward",),
    "hidden_act": ("feed_forward",),
    "gated_mlp": ("feed_forward",),
    "rms_norm_eps": ("norm",),
    "norm_offset": ("norm",),
    "qk_norm": ("attention",),
}
TEXT_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
MARKERS = ("boi_token_id", "eoi_token_id", "begin_of_speech_token_id", "end_of_speech_token_id")
SPECIAL_TOKENS = TEXT_TOKENS + MARKERS


def check_spans(image_grid, max_speech_tokens):
    """Refuse a grid that is not two positive whole numbers, and a span of speech without room; None is no bound."""
    check_fields({"image_grid": image_grid, "max_speech_tokens": max_speech_tokens}, SPAN_RULES)


@strict_configuration
class MoTConfig(PreTrainedConfig):
    r"""Configuration of `MoTModel` and `MoTForCausalLM`.

    Every size of a `LlamaConfig` has its name here. Added:

    Args:
        attention_output_bias (`bool`, *optional*):
            True if the output projection of attention has a bias. Default: as `attention_bias`, which is for queries,
            keys and values (Qwen2 has a bias for those three alone).
        gated_mlp (`bool`, defaults to `True`):
            The feed-forward is down(act(gate(x)) * up(x)), as Llama's; without a gate it is down(act(up(x))).
        norm_offset (`bool`, defaults to `False`): RMSNorms multiply by 1 + weight, and start at 0, as Gemma's do.
        embedding_multiplier (`float`, defaults to 1.0):
            Factor of the embeddings of tokens, rounded to their dtype (Gemma: the square root of `hidden_size`).
        rope_parameters (`dict`, *optional*):
            As in transformers; with `mrope_section` of three numbers and `mrope_interleaved=True` (Qwen3-VL) RoPE has
            three axes, and `position_ids` may be (3, B, L): time, row and column of each token.
        layers_without_rope (`list[int]`, defaults to none):
            Indices of layers whose attention has no RoPE (SmolLM3: each fourth).
        modalities (`list[str]`, defaults to `["text", "image"]`):
            Ordered names, text first. `modality_ids` are indices into this list.
        towers (`dict[str, str]`, *optional*):
            Modality -> tower; a tower is one set of weights. Default: each modality has a tower of its own (MoT).
            With one tower for all the model is dense.
        tower_configs (`dict[str, dict]`, *optional*):
            Tower -> the fields in which it differs from the model: `hidden_size`, `intermediate_size`, `hidden_act`,
            `gated_mlp`, `rms_norm_eps`, `norm_offset`, `qk_norm`. Layers, heads and their size are the same for all
            towers, because they share one attention. The parts that a field is of must be untied. The tower of text is
            as wide as the embeddings, so its `hidden_size` is the model's. Hidden states are as wide as the widest
            tower; of a narrower tower nothing is read behind its width, and its last hidden states are zero there.
        untied (`list[str]`, defaults to all of `"attention"`, `"feed_forward"`, `"norm"`):
            The parts of a layer that each tower has for itself; each other part is one module named `shared` (the rows
            of the paper's ablation, section 3.5). `"attention"` is Q, K, V, O and the QK-norms; `"query_key_value"` is
            Q, K and V alone, the ablation's third row. The final norm belongs to `"norm"`.
        unseen_towers (`dict[str, list[str]]`, defaults to none):
            Tower -> towers whose tokens its own tokens never see, wherever they stand. With {"text": ["image"]} the
            text before, between and behind images is computed as if they were not there (Cosmos 3), and so its keys and
            values are the same at every step of a diffusion.
        cross_key_norm (`list[str]`, defaults to none):
            Towers whose keys pass another RMSNorm, `k_norm_cross`, where tokens of other towers read them (Cosmos 3
            Edge).
        moe_towers (`list[str]`, defaults to none):
            Towers whose feed-forward is an expert-choice mixture of `num_experts` (section 3.2.1); `"shared"` if the
            feed-forward is shared.
        num_experts (`int`, defaults to 4): Experts of each tower in `moe_towers`.
        norm_position (`"pre"` or `"post"`, defaults to `"pre"`):
            `"pre"` normalises the input of attention and feed-forward, as Llama does; `"post"` their output, as
            Algorithm 1 does.
        qk_norm (`None`, `"rms"`, `"rms_all_heads"` or `"layer"`):
            Normalisation of queries and keys before RoPE: RMSNorm over the head dimension (Qwen3), RMSNorm over all
            heads together (OLMo 2), or Chameleon's LayerNorm of each head, with weights of that head.
        modality_token_ranges (`dict[str, list[int]]`, *optional*):
            Modality -> [first, last + 1] of the vocabulary, from which modality ids are derived if they are not passed.
            The range of text may enclose others (Chameleon's codes lie in the midst of its vocabulary): text is all
            that no other range holds. Special tokens are text.
        tokenizer_vocab_size (`int`, *optional*):
            The number of tokens, image codes and speech units included, if the vocabulary has more rows: a row of the
            paper's tables with a small tokenizer. `generate()` never samples the ids behind them. If tokens are added,
            `resize_token_embeddings` sets this field; set it by hand if the rows suffice. Default: `vocab_size`.
        boi_token_id, eoi_token_id, begin_of_speech_token_id, end_of_speech_token_id (`int`, *optional*):
            Markers around an image and around speech.
        image_grid (`list[int]`, *optional*):
            Rows and columns of codes in a generated image.
        max_speech_tokens (`int`, *optional*): The longest span of speech that `generate()` makes.
        z_loss_coefficient (`float`, defaults to 0.0): Weight of log(Z)^2.
        hidden_dropout (`float`, defaults to 0.0):
            Dropout on the outputs of attention and feed-forward. Chameleon's values of this field, of
            `z_loss_coefficient`, `qk_norm` and `norm_position` come as one set, the `style` of `from_variant`.

    Raises:
        ValueError: a contradiction between fields; the message names field, value and way out.

    Examples:

        >>> from modeling_mot import MoTConfig
        >>> config = MoTConfig(modalities=["text", "image", "speech"])  # a tower for each modality
        >>> config.tower_names
        ['text', 'image', 'speech']
        >>> config.num_parameters() > config.num_parameters(active=True)  # a token passes through one tower
        True

        Image and speech in one tower, with norms that both towers share:

        >>> config = MoTConfig.from_variant("loo-text", config.modalities, untied=["attention", "feed_forward"])
        >>> config.towers
        {'text': 'text', 'image': 'image_speech', 'speech': 'image_speech'}
        >>> MoTConfig.from_preset("chameleon-443m", "dense").tower_names  # a row of the paper's Table 1
        ['shared']

        A narrow tower beside the tower of text:

        >>> narrow = {"hidden_size": 512, "intermediate_size": 1024}
        >>> config = MoTConfig(modalities=["text", "action"], tower_configs={"action": narrow})
        >>> config.tower_config("action").hidden_size, config.tower_config("text").hidden_size
        (512, 1024)
    """

    field_rules = CONFIG_RULES
    model_type = "mixture_of_transformers"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "loss_sums", "loss_counts", "z_loss_sum"]
    default_theta = 10000.0
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved"}  # which `check_rope_parameters` checks
    auto_classes = {
        "AutoConfig": "configuration_mot.MoTConfig",
        "AutoModel": "modeling_mot.MoTModel",
        "AutoModelForCausalLM": "modeling_mot.MoTForCausalLM",
        "AutoModelForMultimodalLM": "modeling_mot.MoTForCausalLM",
        "AutoProcessor": "processing_mot.MoTProcessor",
    }
    # The code that a loaded file's auto_map named, if it is other code. It serves to find that code, and is never
    # saved.
    _loaded_auto_map = {}

    vocab_size: int = 65536
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    gated_mlp: bool = True
    norm_offset: bool = False
    embedding_multiplier: float | int = 1.0
    layers_without_rope: list[int] | tuple[int, ...] = ()
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0

    modalities: list[str] | tuple[str, ...] = ("text", "image")
    towers: dict[str, str] | None = None
    tower_configs: dict[str, dict] | None = None
    untied: list[str] | tuple[str, ...] = UNTIED_PARTS
    unseen_towers: dict[str, list[str] | tuple[str, ...]] | None = None
    cross_key_norm: list[str] | tuple[str, ...] = ()
    moe_towers: list[str] | tuple[str, ...] = ()
    num_experts: int = 4
    norm_position: str = "pre"
    qk_norm: str | None = None
    modality_token_ranges: dict[str, list[int] | tuple[int, ...]] | None = None
    tokenizer_vocab_size: int | None = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    begin_of_speech_token_id: int | None = None
    end_of_speech_token_id: int | None = None
    image_grid: list[int] | tuple[int, ...] | None = None
    max_speech_tokens: int | None = None
    z_loss_coefficient: float | int = 0.0

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        check_fields(self, INHERITED_RULES)

        # Sizes that follow from others.
        if self.intermediate_size is None:
            # The rule that reproduces the active parameters of the paper's tables.
            self.intermediate_size = -(-8 * self.hidden_size // 3 // 256) * 256
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias

        # Lists, so that a configuration read from JSON equals the one that was written.
        self.modalities = list(self.modalities)
        self.untied = list(self.untied)
        self.moe_towers = list(self.moe_towers)
        self.cross_key_norm = list(self.cross_key_norm)
        self.unseen_towers = {name: list(unseen) for name, unseen in (self.unseen_towers or {}).items() if unseen}
        self.layers_without_rope = sorted(set(self.layers_without_rope))
        if self.image_grid is not None:
            self.image_grid = list(self.image_grid)
        if self.modality_token_ranges is not None:
            self.modality_token_ranges = {name: list(span) for name, span in self.modality_token_ranges.items()}
        if self.towers is None:
            self.towers = {modality: modality for modality in self.modalities}

        # The classes of this package, and beside them the ones that a loaded file named.
        loaded = kwargs.get("auto_map") or {}
        if not isinstance(loaded, dict):
            raise ValueError(f"auto_map={loaded!r} must name a class for each auto class; leave it out")
        kwargs["auto_map"] = self.auto_classes | loaded
        super().__post_init__(**kwargs)
        if other := {name: value for name, value in loaded.items() if self.auto_classes.get(name) != value}:
            self._loaded_auto_map = other
        self.validate_architecture()

    @classmethod
    def _refuse_misspelt(cls, kwargs):
        # Other unknown keys pass, as everywhere in transformers: quantizers and hubs add their own.
        names = list(cls.__dataclass_fields__)
        for key in kwargs:
            if key in names or hasattr(cls, key):
                continue
            if near := did_you_mean(key, names, cutoff=0.85):
                raise ValueError(f"{cls.__name__} has no field {key!r}{near}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # transformers only warns, and goes on with the defaults of all fields that the other model lacks.
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"model_type={config_dict['model_type']!r} is the configuration of another model; {cls.__name__} reads "
                f"{cls.model_type!r}. Load it with AutoConfig, or convert the checkpoint"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self):
        """As in transformers, but naming only our code and code that this process registered, none of a loaded file."""
        own = {name: value for name, value in self.auto_map.items() if self._loaded_auto_map.get(name) != value}
        output = without_code(super().to_dict())
        output.pop("_loaded_auto_map", None)
        return output | {"auto_map": self.auto_classes | own, "_name_or_path": self._name_or_path}

    def forget_loaded_code(self):
        """Name our own code instead of a loaded file's; all that is added to `auto_map` from here on is saved."""
        self.auto_map = dict(self.auto_classes)
        self._loaded_auto_map = {}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "model_type" not in found:  # the defaults alone would make a large model
            raise ValueError(
                f"config.json of {pretrained_model_name_or_path} has no model_type, so no MoT was saved with it; "
                f"{cls.__name__} writes model_type={cls.model_type!r}"
            )
        return found, kwargs

    @classmethod
    def _dict_from_json_file(cls, json_file):
        try:
            found = super()._dict_from_json_file(json_file)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise  # transformers adds the file's name
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{json_file} cannot be read as the fields of a {cls.__name__}: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(
                f"{json_file} holds a {type(found).__name__}, and must hold the fields of a {cls.__name__}"
            )
        return found

    # ------------------------------------------------------------------ what follows from the fields

    @property
    def tower_names(self) -> list[str]:
        """The towers, in the order of the modalities that use them."""
        return list(dict.fromkeys(self.towers[modality] for modality in self.modalities))

    @property
    def placeholder_token_ids(self) -> dict[str, int]:
        """Modality -> the token that stands for each of its patches, for modalities that are no tokens themselves."""
        return {}

    @property
    def token_modalities(self) -> list[str]:
        """The modalities whose tokens are entries of the vocabulary."""
        return self.modalities

    @property
    def has_grid_positions(self) -> bool:
        """True if RoPE has three axes: time, row and column of a token."""
        return "mrope_section" in self.rope_parameters

    @property
    def hides_tokens(self) -> bool:
        """True if `unseen_towers` hides some tokens of the vocabulary from others, or differs among them."""
        towers = {self.towers[modality] for modality in self.token_modalities}
        unseen = {frozenset(self.unseen_towers.get(tower, ())) for tower in towers}
        return len(unseen) > 1 or not towers.isdisjoint(*unseen)

    @property
    def tower_of_modality(self) -> list[int]:
        """The index of each modality's tower in `tower_names`."""
        names = self.tower_names
        return [names.index(self.towers[modality]) for modality in self.modalities]

    def part_names(self, part: str) -> list[str]:
        """Return the names of a part's modules: one for each tower if the part is untied, else `shared` alone.

        Args:
            part: `"attention"` (O and the QK-norms), `"query_key_value"`, `"feed_forward"` or `"norm"`.
        """
        is_untied = part in self.untied or (part == QUERY_KEY_VALUE and "attention" in self.untied)
        return self.tower_names if is_untied else [SHARED]

    def tower_config(self, name: str) -> "MoTConfig":
        """Return the configuration that a tower's modules are built from: this one with the tower's own fields.

        Args:
            name: one of `part_names`; parts that towers share are built from this configuration.
        """
        own = (self.tower_configs or {}).get(name)
        if not own:
            return self
        config = copy.copy(self)
        config.tower_configs = None
        for field, value in own.items():
            setattr(config, field, value)
        return config

    @property
    def tower_widths(self) -> dict[str, int]:
        """Tower -> its hidden size; empty if all towers are of one width."""
        if not self.tower_configs:
            return {}
        widths = {name: self.tower_config(name).hidden_size for name in self.tower_names}
        return widths if len(set(widths.values())) > 1 else {}

    @property
    def widest_hidden_size(self) -> int:
        """The width of hidden states: that of the widest tower."""
        return max([self.hidden_size, *self.tower_widths.values()])

    @property
    def qk_norm_kinds(self) -> set[str]:
        """The kinds of `qk_norm` that the towers have."""
        return {self.tower_config(name).qk_norm for name in self.part_names("attention")} - {None}

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism shards each module; `*` stands for numbers only, so towers are named."""
        plan = {}
        # Chameleon's QK-norm has weights for each head, and OLMo 2's runs over all heads: every rank must see all
        # heads.
        inward, outward = "colwise", "rowwise"
        if self.qk_norm_kinds & {"rms_all_heads", "layer"}:
            inward, outward = "colwise_gather_output", "rowwise_split_input"
        for tower in self.part_names(QUERY_KEY_VALUE):
            for projection in "qkv":
                plan[f"layers.*.self_attn.{projection}_proj.{tower}"] = inward
        for tower in self.part_names("attention"):
            plan[f"layers.*.self_attn.o_proj.{tower}"] = outward
            if self.tower_config(tower).qk_norm == "rms":
                for projection in "qk":
                    plan[f"layers.*.self_attn.{projection}_norm.{tower}"] = "replicated_with_grad_allreduce"
        for tower in self.cross_key_norm:
            plan[f"layers.*.self_attn.k_norm_cross.{tower}"] = "replicated_with_grad_allreduce"
        for tower in self.part_names("feed_forward"):
            mlp = f"layers.*.mlp.{tower}" + (".experts.*" if tower in self.moe_towers else "")
            inputs = ("gate_proj", "up_proj") if self.tower_config(tower).gated_mlp else ("up_proj",)
            plan |= {f"{mlp}.{projection}": "colwise" for projection in inputs} | {f"{mlp}.down_proj": "rowwise"}
        return plan

    def num_parameters(self, active: bool = False) -> int:
        """Count the parameters of the causal language model, embeddings and head included.

        Args:
            active: count only the parameters that one token passes through: its tower, one expert. Where that depends
                on the modality, because a tower has experts or sizes of its own, the largest number is returned.
        """
        parts = {part: self.part_names(part) for part in (QUERY_KEY_VALUE, "attention", "feed_forward", "norm")}
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim

        def of_part(part, name):
            """Count one part of one tower's layer."""
            tower = self.tower_config(name)
            d, inner = tower.hidden_size, tower.intermediate_size
            if part == QUERY_KEY_VALUE:
                return (d + self.attention_bias) * (queries + 2 * keys)
            if part == "attention":  # O and the QK-norms
                both = queries + keys
                norms = {None: 0, "rms": 2 * self.head_dim, "rms_all_heads": both, "layer": 2 * both}[tower.qk_norm]
                norms += self.head_dim * (name in self.cross_key_norm)
                return queries * d + self.attention_output_bias * d + norms
            if part == "norm":
                return 2 * d
            inputs = 2 if tower.gated_mlp else 1
            expert = (inputs + 1) * d * inner + self.mlp_bias * (inputs * inner + d)
            if name not in self.moe_towers:
                return expert
            return (1 if active else self.num_experts) * expert + d * self.num_experts

        def of_towers(towers):
            """Count the modules of these towers, and the shared ones."""
            names = {part: [name for name in of if name in (*towers, SHARED)] for part, of in parts.items()}
            layer = sum(of_part(part, name) for part, of in names.items() for name in of)
            return self.num_hidden_layers * layer + sum(self.tower_config(name).hidden_size for name in names["norm"])

        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        sets = [[name] for name in self.tower_names] if active else [self.tower_names]
        return embeddings + max(map(of_towers, sets))

    # ------------------------------------------------------------------ presets

    @classmethod
    def from_variant(
        cls, variant: str = "mot", modalities=("text", "image"), style: str | None = None, **kwargs
    ) -> "MoTConfig":
        """Make a configuration of any size as one of the paper's variants.

        Args:
            variant: `dense`, `moe-4x`, `mot`, `hybrid` (MoT whose text tower is MoE-4x),
                `loo-text`, `loo-image`, `loo-speech` (that modality alone, the others together),
                `untied-feed-forward`, `untied-feed-forward-qkv` (Figure 14), and beside the paper's
                `untied-feed-forward-attention`, which also unties O and the QK-norms.
            modalities: ordered names, text first.
            style: `chameleon-7b` or `chameleon-34b` sets QK-norm, norm position, dropout and z-loss as that model has
                them (arXiv 2405.09818, section 2.3); None sets none of them.
            kwargs: any field.

        Raises:
            ValueError: an unknown variant or style, a variant that these modalities do not have, or a field that
                contradicts the style.
        """
        check_fields({"modalities": modalities}, {"modalities": Several(Typed(str))})
        fields = {"modalities": list(modalities)} | variant_fields(variant, modalities)
        return cls(**(fields | style_fields(style, kwargs) | kwargs))

    @classmethod
    def from_preset(cls, name: str, variant: str = "mot", **kwargs) -> "MoTConfig":
        """Make the configuration of a row of the paper's Tables 1, 3, 4 or 5, for instance `chameleon-443m`.

        Args:
            name: one of `MoTConfig.preset_names()`.
            variant: as in `from_variant`.
            kwargs: fields that differ from the row, or a `style` as in `from_variant`.
        """
        check_names([name], cls.preset_names(), "preset")
        return cls.from_variant(variant, **(cls.preset_fields(name) | kwargs))

    @staticmethod
    def preset_fields(name: str) -> dict:
        """Return the fields that a row of the paper's tables sets."""
        return PRESETS[name]

    @staticmethod
    def preset_names() -> list[str]:
        """List the rows of the paper's tables."""
        return list(PRESETS)

    @staticmethod
    def variant_names() -> list[str]:
        """List the paper's variants."""
        return list(VARIANTS)

    # ------------------------------------------------------------------ contradictions

    def validate_architecture(self):
        """Refuse contradictions by name; `save_pretrained` runs this too."""
        check_fields(self, self.field_rules)
        self._validate_sizes()
        self._validate_positions()
        self._validate_towers()
        self._validate_tokens()

    def _validate_sizes(self):
        if self.hidden_size % self.num_attention_heads and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    def _validate_positions(self):
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs of dimensions")
        for index in self.layers_without_rope:
            if not 0 <= index < self.num_hidden_layers:
                raise ValueError(
                    f"layers_without_rope={self.layers_without_rope} has {index}, which is not the index of a layer: "
                    f"num_hidden_layers={self.num_hidden_layers}"
                )
        check_rope_parameters(self.rope_parameters, self.head_dim)
        self.validate_rope()

    def validate_rope(self):
        """Check RoPE as transformers does, with a ValueError for a missing key."""
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_parameters={self.rope_parameters}: {error.args[0]}") from error

    def _validate_towers(self):
        if not self.modalities or self.modalities[0] != "text":
            raise ValueError(f"modalities={self.modalities} must name 'text' first")
        if len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities={self.modalities} names one twice")
        if set(self.towers) != set(self.modalities):
            raise ValueError(
                f"towers={self.towers} must give a tower to each of modalities={self.modalities} and to nothing else"
            )
        for tower in self.tower_names:
            if not tower or "." in tower:
                raise ValueError(f"towers names {tower!r}: a tower is part of parameter names, so no dot and not empty")
            if hasattr(nn.ModuleDict(), tower) or tower in ("products", "mixtures", "reads", "writes"):  # of `PerTower`
                raise ValueError(
                    f"towers names {tower!r}, which torch's modules use themselves; name the tower otherwise"
                )
        if SHARED in self.tower_names and len(self.tower_names) > 1:
            raise ValueError(
                f"towers={self.towers}: {SHARED!r} is the name of what all towers share; name the tower otherwise"
            )
        parts = (*UNTIED_PARTS, QUERY_KEY_VALUE)
        if unknown := [part for part in self.untied if part not in parts]:
            raise ValueError(f"untied={self.untied} has {unknown[0]!r}, which is not one of {parts}")
        if unknown := [name for name in self.moe_towers if name not in self.part_names("feed_forward")]:
            raise ValueError(
                f"moe_towers={self.moe_towers} names {unknown[0]!r}, an unknown tower; the feed-forwards are "
                f"{self.part_names('feed_forward')}"
            )
        self._validate_visibility()
        if self.moe_towers and self.num_experts < 2:
            raise ValueError(f"num_experts={self.num_experts} must be at least 2 where moe_towers={self.moe_towers}")
        self._validate_tower_configs()

    def _validate_tower_configs(self):
        """The fields of a tower are of parts that it has for itself, and fit the embeddings and the other towers."""
        for name, own in (self.tower_configs or {}).items():
            check_names([name], self.tower_names, "tower of tower_configs")
            check_names(own, TOWER_FIELDS, f"field of tower_configs[{name!r}]")
            check_fields(own, TOWER_RULES, f"tower_configs[{name!r}].")
            for field, value in own.items():
                if tied := [part for part in TOWER_FIELDS[field] if part not in self.untied]:
                    raise ValueError(
                        f"tower_configs[{name!r}].{field}={value!r} is of a part that all towers share: add {tied} to "
                        f"untied={self.untied}, or set {field} for the whole model"
                    )
        text = self.towers["text"]
        if (width := self.tower_config(text).hidden_size) != self.hidden_size:
            raise ValueError(
                f"tower_configs[{text!r}].hidden_size={width}: the tower of text is as wide as the embeddings, "
                f"hidden_size={self.hidden_size}; set hidden_size={width}, and the widths of the other towers here"
            )
        kinds = self.qk_norm_kinds
        if "rms_all_heads" in kinds and len(kinds) > 1:
            raise ValueError(
                f"tower_configs gives the towers qk_norm={sorted(kinds)}: 'rms_all_heads' runs over all heads "
                "together, the others over each, so beside it a tower may only have none"
            )

    def _validate_visibility(self):
        named = [*self.unseen_towers, *(name for unseen in self.unseen_towers.values() for name in unseen)]
        for field, names in (("unseen_towers", named), ("cross_key_norm", self.cross_key_norm)):
            if unknown := [name for name in names if name not in self.tower_names]:
                raise ValueError(
                    f"{field}={getattr(self, field)} names {unknown[0]!r}, which is not one of the towers "
                    f"{self.tower_names}"
                )
        if blind := [name for name, unseen in self.unseen_towers.items() if name in unseen]:
            raise ValueError(f"unseen_towers={self.unseen_towers}: tokens of tower {blind[0]!r} must see each other")
        if self.cross_key_norm and "attention" not in self.untied:
            raise ValueError(
                f"cross_key_norm={self.cross_key_norm} is of towers with keys of their own; untied={self.untied} lacks "
                "'attention'"
            )

    def _validate_tokens(self):
        if self.tokenizer_vocab_size is not None and self.tokenizer_vocab_size > self.vocab_size:
            raise ValueError(
                f"tokenizer_vocab_size={self.tokenizer_vocab_size} is more than vocab_size={self.vocab_size}: each "
                "token needs a row of the vocabulary; make vocab_size larger"
            )
        self._validate_ranges()
        self._validate_special_tokens()
        self._validate_markers(MARKERS)

    def _end_of_tokens(self) -> tuple[str, int]:
        """Return the name and the value of the field that ends the ids of tokens."""
        name = "vocab_size" if self.tokenizer_vocab_size is None else "tokenizer_vocab_size"
        return name, getattr(self, name)

    def _validate_ranges(self):
        """Ranges lie in the vocabulary and apart from each other; that of text may enclose others."""
        ranges = self.modality_token_ranges
        if ranges is None:
            return
        # A pair of numbers for each modality.
        if set(ranges) != set(self.token_modalities):
            raise ValueError(
                f"modality_token_ranges={ranges} must give a range to each of {self.token_modalities} and nothing else"
            )
        if wrong := [name for name, span in ranges.items() if len(span) != 2]:
            raise ValueError(
                f"modality_token_ranges[{wrong[0]!r}]={ranges[wrong[0]]} must be [first, last + 1] of its tokens"
            )
        # Each pair lies in the vocabulary, and no two overlap.
        spans = sorted((first, end, name) for name, (first, end) in ranges.items())
        field, size = self._end_of_tokens()
        for first, end, name in spans:
            if not 0 <= first < end <= size:
                raise ValueError(
                    f"modality_token_ranges[{name!r}]=[{first}, {end}] must lie within the vocabulary: "
                    f"0 <= first < end <= {field}={size}"
                )
        for (first, end, name), (other_first, other_end, other) in combinations(spans, 2):
            inside_text = (name == "text" and other_end <= end) or (other == "text" and first == other_first)
            if other_first < end and not inside_text:
                raise ValueError(
                    f"modality_token_ranges: {name!r} ends at {end}, {other!r} begins at {other_first}: overlap"
                )

    def _validate_special_tokens(self):
        """Special tokens are text; markers come in pairs."""
        ranges = self.modality_token_ranges
        text = ranges["text"] if ranges is not None else [0, self._end_of_tokens()[1]]
        codes = [span for name, span in (ranges or {}).items() if name != "text"]
        for field in SPECIAL_TOKENS:
            value = getattr(self, field)
            for token in value if isinstance(value, (list, tuple)) else [value]:
                if token is not None and (
                    not text[0] <= token < text[1] or any(first <= token < end for first, end in codes)
                ):
                    outside = f" outside {codes}" if codes else ""
                    raise ValueError(f"{field}={token} must be a text token, in [{text[0]}, {text[1]}){outside}")
        for begin, end in (("boi_token_id", "eoi_token_id"), ("begin_of_speech_token_id", "end_of_speech_token_id")):
            if (getattr(self, begin) is None) != (getattr(self, end) is None):
                raise ValueError(f"{begin}={getattr(self, begin)} and {end}={getattr(self, end)} go together: set both")

    def _validate_markers(self, markers):
        """Markers are tokens that mean nothing else."""
        meanings = {}
        for field in (*TEXT_TOKENS, *markers):
            value = getattr(self, field)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and token in meanings and field in markers:
                    raise ValueError(
                        f"{meanings[token]}={token} and {field}={token} must differ: a token of the vocabulary has one "
                        "meaning"
                    )
                meanings.setdefault(token, field)


MoTConfig.register_for_auto_class()

__all__ = ["MoTConfig"]


def style_fields(style, chosen):
    """Return the fields of a style: all of the set, or none if `style` is None.

    Args:
        style (str or None): a name of `STYLES`.
        chosen (dict): the fields that were set beside the style.

    Raises:
        ValueError: an unknown style, or a chosen field that has another value in the style.
    """
    if style is None:
        return {}
    check_names([style], STYLES, "style")
    for name, value in STYLES[style].items():
        if chosen.get(name, value) != value:
            raise ValueError(
                f"style={style!r} has {name}={value!r}, but {name}={chosen[name]!r} was set: a style is taken whole; "
                f"leave out {name}, or leave out the style and set its fields one by one"
            )
    return STYLES[style]


def variant_fields(variant, modalities):
    """Return the fields of `MoTConfig` that make it one of the paper's variants.

    Args:
        variant (str): one of `VARIANTS`.
        modalities (sequence of str): ordered names, text first.

    Raises:
        ValueError: an unknown variant, or leaving out a modality that is not there.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
    # Leave one out: one modality has a tower of its own, the others share one.
    if variant.startswith("loo-"):
        alone = variant.removeprefix("loo-")
        together = [modality for modality in modalities if modality != alone]
        if alone not in modalities or len(together) < 2:
            raise ValueError(
                f"variant={variant!r} leaves {alone!r} alone and joins the others: it needs three modalities, "
                f"{alone!r} among them, but modalities={list(modalities)}"
            )
        return {"towers": {modality: alone if modality == alone else "_".join(together) for modality in modalities}}
    # One tower for all modalities.
    if variant in ("dense", "moe-4x"):
        moe = {"moe_towers": ["shared"], "num_experts": 4} if variant == "moe-4x" else {}
        return {"towers": dict.fromkeys(modalities, "shared")} | moe
    # A tower for each modality.
    return {
        "mot": {},
        "hybrid": {"moe_towers": ["text"], "num_experts": 4},
        "untied-feed-forward": {"untied": ["feed_forward"]},
        "untied-feed-forward-qkv": {"untied": ["feed_forward", QUERY_KEY_VALUE]},
        "untied-feed-forward-attention": {"untied": ["feed_forward", "attention"]},
    }[variant]
