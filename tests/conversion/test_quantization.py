"""Weights in 8 bits by torchao and bitsandbytes, on a CPU; skipped without `pip install -e ".[quantization]"`."""

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_mot import MoTConfig, MoTForCausalLM, MoTTransfusionModel
from tests.modeling_mot.naive_transfusion import VAE
from tests.modeling_mot.naive_transfusion import tiny_model as tiny_transfusion


IDS = torch.randint(7, 512, (2, 16), generator=torch.Generator().manual_seed(0))


def torchao(**fields):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), **fields)


def torchao_dynamic(**fields):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig(), **fields)


def bitsandbytes(modules_to_not_convert=None):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=modules_to_not_convert)


EVERY = pytest.mark.parametrize("quantized", [torchao, torchao_dynamic, bitsandbytes], ids=lambda how: how.__name__)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a model whose layers are most of it, its folder)"""
    torch.manual_seed(0)
    config = MoTConfig.from_variant(
        "mot", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        modality_token_ranges={"text": [0, 256], "image": [256, 512]}, bos_token_id=1, pad_token_id=0, boi_token_id=3,
        eoi_token_id=4, image_grid=[2, 2], initializer_range=0.1,
    )  # fmt: skip
    model = MoTForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


def rounded_to_8_bits(model):
    """What 8 bits and a scale of each row leave of every projection of the layers, written out."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                scale = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_((weight / scale).round() * scale)
    return model


@EVERY
def test_logits_are_near_and_the_layers_a_quarter(quantized, saved):
    model, folder = saved
    loaded = MoTForCausalLM.from_pretrained(folder, quantization_config=quantized())
    naive = rounded_to_8_bits(MoTForCausalLM.from_pretrained(folder))
    with torch.no_grad():
        expected, found, bound = (one(IDS).logits for one in (model, loaded, naive))
    error, least = ((logits - expected).norm() / expected.norm() for logits in (found, bound))
    # bitsandbytes and the dynamic kind round activations, too.
    assert error < 0.05 and error >= 0.8 * least
    if quantized is torchao:
        assert error == pytest.approx(float(least), rel=0.15)
    assert eight_bits(loaded) == {name for name, _ in model.named_modules() if is_projection(name)}


@EVERY
def test_generation_is_that_of_its_own_full_forwards(quantized, saved):
    model = MoTForCausalLM.from_pretrained(saved[1], quantization_config=quantized())
    generated = model.generate(IDS[:1, :4], max_new_tokens=6, do_sample=False, image_grid=None)
    ids = IDS[:1, :4]
    with torch.no_grad():
        while ids.shape[1] < generated.shape[1]:
            ids = torch.cat([ids, model(ids).logits[:, -1:, :256].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


@EVERY
def test_it_is_saved_in_8_bits_and_loads_again(quantized, saved, tmp_path):
    model = MoTForCausalLM.from_pretrained(saved[1], quantization_config=quantized())
    model.save_pretrained(tmp_path)
    again = MoTForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (saved[1], tmp_path)]
    floats = sum(p.numel() for name, p in saved[0].named_parameters() if "_proj" not in name)
    rest = sum(p.numel() for name, p in saved[0].named_parameters() if "_proj" in name)
    assert sizes[0] >= 4 * (floats + rest) and sizes[1] < 4 * floats + 1.1 * rest


@EVERY
def test_losses_without_logits_are_those_of_the_logits(quantized, saved):
    # The output layer in 8 bits as well.
    model = MoTForCausalLM.from_pretrained(saved[1], quantization_config=quantized(modules_to_not_convert=["none"]))
    assert "lm_head" in eight_bits(model)
    with torch.no_grad():
        expected, found = model(IDS, labels=IDS).loss, model(IDS, labels=IDS, skip_logits=True).loss
    torch.testing.assert_close(found, expected)


@EVERY
def test_a_transfusion_model_keeps_its_vae_and_draws(quantized, tmp_path):
    model = tiny_transfusion(vae_config=VAE, noise_schedule="linear")
    model.save_pretrained(tmp_path)
    loaded = MoTTransfusionModel.from_pretrained(tmp_path, quantization_config=quantized())
    assert not any(name.startswith("vae.") for name in eight_bits(loaded))
    assert any(name.startswith("model.layers.") for name in eight_bits(loaded))
    prompt = torch.tensor([[model.config.bos_token_id, 9, model.config.boi_token_id]])
    made = [
        one.generate(prompt, num_inference_steps=3, max_new_tokens=5, generator=[torch.Generator().manual_seed(0)])
        for one in (model, loaded)
    ]
    expected, found = (one.latents[0][0] for one in made)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1


def is_projection(name):
    """q_proj, ... of a tower's attention, up_proj, ... of its feed-forward."""
    return name.split(".")[-1].endswith("_proj") and ".mlp." in name or "_proj." in name


def eight_bits(model):
    """The modules whose weights are in 8 bits."""
    kinds = ("Int8Tensor", "Int8Params")
    return {name for name, module in model.named_modules() if type(getattr(module, "weight", None)).__name__ in kinds}
