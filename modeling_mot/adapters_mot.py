"""Where PEFT's adapters go when nobody says: to the projections of every tower that they go to in a Llama."""

import sys
from importlib import import_module


ATTENTION = frozenset(("q_proj", "k_proj", "v_proj", "o_proj"))


def offer_adapter_targets(model_type: str) -> None:
    """Give PEFT, where it is loaded, its default `target_modules` for this type of model.

    A Llama's names end in "q_proj", which here is the container of the towers' own: a pattern names these.
    """
    if "peft" not in sys.modules:
        return
    for defaults in vars(import_module("peft.utils.constants")).values():
        if isinstance(defaults, dict) and ATTENTION.issuperset(names := defaults.get("llama", ("",))):
            defaults.setdefault(model_type, rf".*\.self_attn\.({'|'.join(names)})\.[^.]+")
