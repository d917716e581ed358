"""A Hub, its client, and two tiny checkpoints to publish."""

import shutil

import pytest
import torch

from modeling_mot import MoTConfig, MoTForCausalLM
from tests.conversion.hub_client import HubClient
from tests.conversion.hub_server import HubServer
from tests.modeling_mot.naive_transfusion import VAE, tiny_model
from tests.modeling_mot.test_continuous_processor import build_continuous
from tests.modeling_mot.test_processor import build_processor


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="session")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    client = HubClient(hub, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture(scope="session")
def saved_tokens(tmp_path_factory):
    """A model of text, image and speech tokens in two shards, with its processor."""
    folder = tmp_path_factory.mktemp("saved") / "tokens"
    torch.manual_seed(0)
    processor = build_processor()
    model = MoTForCausalLM(MoTConfig.from_variant("mot", **SIZES, **processor.config_kwargs()))
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_pictures(tmp_path_factory):
    """A Transfusion model with its VAE and processor."""
    folder = tmp_path_factory.mktemp("saved") / "pictures"
    torch.manual_seed(0)
    processor = build_continuous(image_size=[8, 8], downsampling=4)
    fields = {"vae_config": VAE, "noise_schedule": "linear"} | processor.config_kwargs()
    tiny_model(**fields).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def tokens(saved_tokens, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(saved_tokens, tmp_path / "tokens")
