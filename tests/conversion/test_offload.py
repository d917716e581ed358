"""Accelerate's device maps: layers wait on the disk or in the CPU's memory, and the numbers stay the same."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch

from modeling_mot import MoTForCausalLM, MoTTransfusionModel
from modeling_mot.decoding_lean import LeanDecoder
from tests.modeling_mot.naive_transfusion import VAE
from tests.modeling_mot.naive_transfusion import tiny_model as tiny_transfusion


IDS = torch.tensor([[1, 9, 12, 3, 30, 31, 44, 4], [1, 3, 33, 34, 35, 4, 20, 21]])
# Of the two layers the first is kept, the second, the last norm and the output layer come from the disk.
MAP = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
MAP |= {"model.norm": "disk", "lm_head": "disk"}


def on_disk(model):
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@pytest.fixture
def saved(tiny_model, tmp_path):
    """(a model, its folder)"""
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    return model, tmp_path / "saved"


def offloaded(how, saved, tmp_path):
    model, folder = saved
    place = tmp_path / "offload"
    if how == "from_pretrained":
        return MoTForCausalLM.from_pretrained(folder, device_map=MAP, offload_folder=place)
    if how == "max_memory":
        # Less than the model takes, as `device_map="auto"` does where it does not fit.
        return MoTForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=place, offload_buffers=True
        )
    if how == "load_checkpoint_and_dispatch":
        with init_empty_weights(include_buffers=False):
            empty = MoTForCausalLM(model.config)
        return load_checkpoint_and_dispatch(empty.eval(), folder, MAP, offload_folder=place)
    copy = MoTForCausalLM.from_pretrained(folder)
    return cpu_offload(copy, "cpu") if how == "cpu_offload" else disk_offload(copy, place, "cpu")


@pytest.mark.parametrize(
    "how", ["from_pretrained", "max_memory", "load_checkpoint_and_dispatch", "cpu_offload", "disk_offload"]
)
def test_logits_losses_and_generation_are_those_of_the_whole_model(how, saved, tmp_path):
    model, loaded = saved[0], offloaded(how, saved, tmp_path)
    assert on_disk(loaded)
    with torch.no_grad():
        expected, found = (one(IDS, labels=IDS) for one in (model, loaded))
        without = loaded(IDS, labels=IDS, skip_logits=True)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    torch.testing.assert_close(without.loss, expected.loss)
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(IDS[:, :4], **settings), model.generate(IDS[:, :4], **settings))


def test_weights_that_are_elsewhere_are_not_read_ahead(saved, tmp_path):
    model, loaded = saved[0], offloaded("from_pretrained", saved, tmp_path)
    assert LeanDecoder.of(model) is not None and LeanDecoder.of(loaded) is None


def test_served_requests_are_those_of_the_whole_model(saved, tmp_path):
    loaded = offloaded("from_pretrained", saved, tmp_path)
    requests = [{"input_ids": IDS[0, :4], "max_new_tokens": 5}, {"input_ids": IDS[1, :3], "max_new_tokens": 8}]
    expected, found = (one.generate_batch([dict(r) for r in requests], do_sample=False) for one in (saved[0], loaded))
    for name, result in expected.items():
        assert result.error is None and torch.equal(found[name].output, result.output)


def test_a_transfusion_model_draws_the_same_from_the_disk(tmp_path):
    tiny_transfusion(vae_config=VAE, noise_schedule="linear").save_pretrained(tmp_path / "saved")
    whole = MoTTransfusionModel.from_pretrained(tmp_path / "saved")
    places = {name: "cpu" for name, _ in whole.named_children() if name != "model"} | {"lm_head": "disk"}
    places |= {f"model.{name}": "cpu" for name, _ in whole.model.named_children()} | {"model.layers": "disk"}
    loaded = MoTTransfusionModel.from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "off")
    assert on_disk(loaded) and not on_disk(whole)
    prompt = torch.tensor([[whole.config.bos_token_id, 9, whole.config.boi_token_id]])
    expected, found = (
        one.generate(
            prompt,
            num_inference_steps=3,
            max_new_tokens=8,
            do_sample=False,
            generator=[torch.Generator().manual_seed(0)],
        )
        for one in (whole, loaded)
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.latents[0][0], expected.latents[0][0])
