"""What the fields of a `MoTConfig` may be."""

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .field_checks_mot import Dtype, Maybe, Number, OneOf, Several, Typed, Whole, check_fields, check_names


SPAN_RULES = {
    "image_grid": Maybe(Several(Whole(1, 2**16), count=2)),  # rows and columns
    "max_speech_tokens": Maybe(Whole()),
}
# The highest sizes are far above those of any model, so that what is refused is a slip, before memory is asked for.
CONFIG_RULES = SPAN_RULES | {
    "vocab_size": Whole(1, 2**26),
    "hidden_size": Whole(1, 2**20),
    "intermediate_size": Whole(1, 2**22),
    "num_hidden_layers": Whole(1, 2**14),
    "num_attention_heads": Whole(1, 2**16),
    "num_key_value_heads": Whole(1, 2**16),
    "head_dim": Whole(1, 2**16),
    "max_position_embeddings": Whole(),
    "num_experts": Whole(1, 2**12),
    "initializer_range": Number(),
    "rms_norm_eps": Number(),
    "embedding_multiplier": Number(open="low"),
    "attention_dropout": Number(0, 1, open="high"),
    "hidden_dropout": Number(0, 1, open="high"),
    "z_loss_coefficient": Number(),
    "norm_position": OneOf(("pre", "post")),
    "qk_norm": OneOf((None, "rms", "rms_all_heads", "layer")),
    "hidden_act": OneOf(tuple(ACT2FN)),
}
ROPE_RULES = {
    "rope_type": OneOf(("default", *ROPE_INIT_FUNCTIONS)),
    "rope_theta": Number(open="low"),
    "factor": Number(1),
    "partial_rotary_factor": Number(1, 1),  # heads are turned as a whole
    "original_max_position_embeddings": Whole(),
    "attention_factor": Maybe(Number(open="low")),
    "beta_fast": Maybe(Number(open="low")),
    "beta_slow": Maybe(Number(open="low")),
    "low_freq_factor": Number(open="low"),
    "high_freq_factor": Number(open="low"),
    "mscale": Maybe(Number()),
    "mscale_all_dim": Maybe(Number()),
    "truncate": Typed(bool),
}
# What transformers' own configuration trips over.
INHERITED_RULES = {"dtype": Maybe(Dtype()), "id2label": Maybe(Typed(dict))}


def check_rope_parameters(parameters: dict, head_dim: int) -> None:
    """Refuse settings of positions that mean nothing; transformers only warns of these.

    Raises:
        ValueError: an unknown key, with the nearest, or a value that cannot be.
    """
    known = set(RopeParameters.__annotations__) - {"mrope_section"} | {"type"}
    check_names(parameters, known, "key of rope_parameters")
    of_frequencies = dict.fromkeys(("short_factor", "long_factor"), Several(Number(open="low"), head_dim // 2))
    check_fields(parameters, ROPE_RULES | of_frequencies, "rope_parameters.")
    if parameters["rope_type"] == "default":
        known = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        check_names(parameters, known, "key of rope_parameters for rope_type='default'")
    low, high = (parameters.get(f"{end}_freq_factor") for end in ("low", "high"))
    if None not in (low, high) and low >= high:
        raise ValueError(f"rope_parameters.low_freq_factor={low} must be less than high_freq_factor={high}")
