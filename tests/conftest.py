"""Tiny models of every variant. Everything runs on the CPU, offline, from fixed seeds."""

import pytest
import torch

from modeling_mot import MoTConfig, MoTForCausalLM


# Tests run side by side, one core each; sums over threads would also differ in their last bits between processes.
torch.set_num_threads(1)

MODALITIES = ["text", "image", "speech"]
TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "modality_token_ranges": {"text": [0, 30], "image": [30, 45], "speech": [45, 60]},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "boi_token_id": 3,
    "eoi_token_id": 4,
    "begin_of_speech_token_id": 5,
    "end_of_speech_token_id": 6,
    "image_grid": [2, 3],
    "max_speech_tokens": 4,
}


def pytest_collection_modifyitems(config, items):
    """Tests that are marked as slow run only when asked for: `pytest -m slow`."""
    if "slow" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes long: pytest -m slow"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture: a command that an earlier test ran in this process may have taken more threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """tiny_config(variant="mot", **fields) -> MoTConfig of text, image and speech."""

    def make(variant="mot", **fields):
        return MoTConfig.from_variant(variant, **({"modalities": MODALITIES} | TINY | fields))

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """tiny_model(variant="mot", **fields) -> MoTForCausalLM in eval mode, its weights large enough to tell apart."""

    def make(variant="mot", **fields):
        return MoTForCausalLM(tiny_config(variant, **({"initializer_range": 0.3} | fields))).eval()

    return make
