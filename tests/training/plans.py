"""Models small enough to be built, whose plans are compared with what they really have, do, keep and send."""

import torch

from modeling_mot import MoTConfig, MoTForCausalLM, MoTPreTrainedModel, MoTTransfusionModel
from modeling_mot.configuration_presets import VARIANTS
from training.plan.activations import made_up_batch

from .tiny import tiny_config
from .tiny_transfusion import tiny_config as tiny_transfusion_config


MODELS = (
    *VARIANTS, "tied", "towers", "transfusion-dense", "transfusion-mot", "transfusion-hybrid", "transfusion-towers"
)  # fmt: skip
# Of another width and kind than text.
IMAGE_TOWER = {"hidden_size": 24, "intermediate_size": 40, "gated_mlp": False, "hidden_act": "relu2", "qk_norm": "rms"}
ROWS, LENGTH = 2, 24
TOKENS = {"text": 20, "image": 28}
# Model, groups of a hybrid shard, bf16, whether layers are gathered twice, micro-batches.
FSDP_CASES = [
    ("dense", 1, False, True, 1),
    ("moe-4x", 1, True, True, 1),
    ("mot", 2, True, True, 2),
    ("tied", 4, False, True, 1),
    ("transfusion-mot", 2, True, True, 1),
    ("mot", 1, True, False, 1),
    ("towers", 2, True, True, 1),
]


def config_of(name: str, **fields) -> MoTConfig:
    if name.endswith("towers"):
        name = name.replace("towers", "mot")
        fields["tower_configs"] = {"image": IMAGE_TOWER}
    if name == "tied":
        return tiny_config("mot", tie_word_embeddings=True, qk_norm="layer", **fields)
    if name.startswith("transfusion-"):
        return tiny_transfusion_config(name.removeprefix("transfusion-"), **fields)
    return tiny_config(name, **fields)


def model_of(name: str, **fields) -> MoTPreTrainedModel:
    torch.manual_seed(0)
    model_class = MoTTransfusionModel if name.startswith("transfusion-") else MoTForCausalLM
    return model_class._from_config(config_of(name, **fields), attn_implementation="sdpa")


def batch_of(config: MoTConfig) -> dict:
    return made_up_batch(config, TOKENS, ROWS)
