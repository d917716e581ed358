"""Modalities whose tokens are features of an encoder, and the encoders: their fields, defaults and checks.

`MoTTransfusionConfig` holds both as dictionaries by name, `continuous_modalities` and `encoders`. Beside the image that
is diffused, such a modality is read only: the transformer sees a picture as an encoder sees it (BAGEL's ViT copies).
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from .checks_fields import Maybe, Number, OneOf, Rule, Several, Typed, Whole, check_fields, check_names


POSITION_TABLES = (None, "sincos")
TABLE_SIZE = Several(Whole(1, 2**16), count=2)  # rows and columns of patches

MODALITY_RULES = {
    "kind": OneOf(("features",)),
    "encoder": Typed(str),
    "placeholder_token_id": Whole(0),
    "begin_token_id": Whole(0),
    "end_token_id": Whole(0),
    "position_table": OneOf(POSITION_TABLES),
    "position_table_size": Maybe(TABLE_SIZE),
}
ENCODER_RULES = {
    "type": OneOf(("siglip_navit",)),
    "hidden_size": Whole(1, 2**20),
    "intermediate_size": Whole(1, 2**22),
    "num_hidden_layers": Whole(1, 2**14),
    "num_attention_heads": Whole(1, 2**16),
    "patch_size": Whole(1, 2**10),
    "table_size": TABLE_SIZE,
    "num_channels": Whole(1, 2**10),
    "hidden_act": OneOf(tuple(ACT2FN)),
    "layer_norm_eps": Number(),
    "drop_last_layers": Whole(0, 2**14),
    "frozen": Typed(bool),
    "connector": Typed(dict),
}
CONNECTOR_RULES = {"hidden_act": OneOf(tuple(ACT2FN))}
# Fields that may be left out. Markers that are left out are those of images.
MODALITY_DEFAULTS = {"position_table": None, "position_table_size": None}
ENCODER_DEFAULTS = {
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "drop_last_layers": 0,
    "frozen": False,
}
CONNECTOR_DEFAULTS = {"hidden_act": "gelu_pytorch_tanh"}


def complete_modality(fields: Mapping[str, Any], config) -> dict[str, Any]:
    """Fill in what an entry of `continuous_modalities` leaves out."""
    markers = {"begin_token_id": config.boi_token_id, "end_token_id": config.eoi_token_id}
    return markers | MODALITY_DEFAULTS | dict(fields)


def complete_encoder(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what an entry of `encoders` leaves out."""
    fields = ENCODER_DEFAULTS | {"connector": {}} | dict(fields)
    if isinstance(fields["connector"], Mapping):
        fields["connector"] = CONNECTOR_DEFAULTS | dict(fields["connector"])
    return fields


def check_modalities(config) -> None:
    """Refuse entries of `continuous_modalities` and `encoders` that contradict themselves or each other.

    Raises:
        ValueError: the message names field, value and way out.
    """
    # Each field by its rule.
    modalities, encoders = config.continuous_modalities or {}, config.encoders or {}
    for name in (*modalities, *encoders):
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"continuous_modalities or encoders names {name!r}: it is part of parameter names, so it is not empty, "
                "without a dot, and no word that torch's modules use themselves; name it otherwise"
            )
    for name, fields in modalities.items():
        _check_entry(fields, MODALITY_RULES, f"continuous_modalities[{name!r}]")
    for name, fields in encoders.items():
        where = f"encoders[{name!r}]"
        _check_entry(fields, ENCODER_RULES, where)
        _check_entry(fields["connector"], CONNECTOR_RULES, f"{where}.connector")
        _check_encoder(fields, where)

    # Modalities, encoders and towers know each other.
    for name, fields in modalities.items():
        where = f"continuous_modalities[{name!r}]"
        if name in ("text", "image"):
            raise ValueError(f"{where}: text is tokens, and the fields of the configuration itself describe the image")
        if name not in config.modalities:
            raise ValueError(f"{where} is not one of modalities={config.modalities}; name it there too")
        check_names([fields["encoder"]], encoders, f"encoder of {where}")
        if fields["position_table"] is None and fields["position_table_size"] is not None:
            raise ValueError(
                f"{where}.position_table_size={fields['position_table_size']} without a position_table; set "
                "position_table='sincos', or leave the size out"
            )
    if unread := set(encoders) - {fields["encoder"] for fields in modalities.values()}:
        raise ValueError(f"encoders has {min(unread)!r}, which no entry of continuous_modalities names; leave it out")
    _check_tokens(config, modalities)


def _check_entry(fields: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> None:
    check_names(fields, rules, f"field of {where}")
    if missing := [name for name in rules if name not in fields]:
        raise ValueError(f"{where} lacks {missing[0]}; it has {', '.join(fields)}")
    check_fields(fields, rules, f"{where}.")


def _check_encoder(fields: Mapping[str, Any], where: str) -> None:
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise ValueError(
            f"{where}.hidden_size={fields['hidden_size']} is not a multiple of "
            f"num_attention_heads={fields['num_attention_heads']}"
        )
    if fields["drop_last_layers"] >= fields["num_hidden_layers"]:
        raise ValueError(
            f"{where}.drop_last_layers={fields['drop_last_layers']} leaves none of "
            f"num_hidden_layers={fields['num_hidden_layers']}"
        )


def _check_tokens(config, modalities: Mapping[str, Mapping[str, Any]]) -> None:
    """Placeholders mean one thing each; markers are tokens that a text can hold."""
    special = ("pad_token_id", "bos_token_id", "eos_token_id", "boi_token_id", "eoi_token_id", "image_token_id")
    meanings: dict[int, str] = {}
    for field in special:
        value = getattr(config, field)
        meanings |= {token: field for token in (value if isinstance(value, list) else [value])}
    for name, fields in modalities.items():
        where = f"continuous_modalities[{name!r}]"
        for field in ("begin_token_id", "end_token_id"):
            config.check_token(f"{where}.{field}", fields[field])
        token = fields["placeholder_token_id"]
        config.check_token(f"{where}.placeholder_token_id", token, is_placeholder=True)
        if token in meanings:
            raise ValueError(
                f"{meanings[token]}={token} and {where}.placeholder_token_id={token} must differ: a token has one "
                "meaning"
            )
        meanings[token] = f"{where}.placeholder_token_id"
