"""Adapters beside frozen weights: what PEFT computes with them, what 8 bits change, and what a run trains."""

import copy
import signal

import pytest
import torch
from peft import PeftModel
from torch import nn

from training.config import ConfigError
from training.model.adapters import (
    FrozenLinear,
    LoraConfig,
    LoraLinear,
    adapters_of,
    merge_adapters,
    save_adapters,
)
from training.optimization import set_trained
from training.world import Interrupted

from .ranks import go_on
from .tiny import tiny_model, tiny_trainer


IDS = torch.randint(7, 40, (2, 12), generator=torch.Generator().manual_seed(0))
MIXED = torch.tensor([[1, 9, 12, 3, 41, 44, 51, 47, 4, 20]])
LORA = {"rank": 4, "alpha": 8.0}


def trained_names(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def stirred(model):
    """Give the adapters values, as training would."""
    generator = torch.Generator().manual_seed(1)
    for layer in adapters_of(model).values():
        layer.lora_B.weight.data.normal_(std=0.3, generator=generator)
    return model


def test_a_model_with_new_adapters_computes_what_it_did():
    model = tiny_model().eval()
    before = model(MIXED).logits
    set_trained(model, lora=LoraConfig(**LORA))
    assert torch.equal(model(MIXED).logits, before) and len(adapters_of(model)) == 2 * 7 * 3


def test_adapters_of_one_tower_are_all_that_is_trained_of_it():
    model = tiny_model()
    set_trained(model, ["text", "speech"], ["embeddings", "output_layer"], lora=LoraConfig(["image"], **LORA))
    parts = ("lora_A", "lora_B")
    assert set(trained_names(model)) == {f"{name}.{part}.weight" for name in adapters_of(model) for part in parts}
    assert all("image" in name.split(".") for name in adapters_of(model))


def test_what_is_not_named_trains_on():
    model = tiny_model()
    set_trained(model, lora=LoraConfig(["image"], modules=["q_proj"], **LORA))
    names = trained_names(model)
    assert "model.layers.0.self_attn.q_proj.text.weight" in names and "lm_head.weight" in names
    assert len(adapters_of(model)) == 2 and not any(name.endswith("image.weight") for name in names)


def test_saved_adapters_are_pefts(tmp_path):
    model = tiny_model().eval()
    base, config = copy.deepcopy(model), LoraConfig(["image", "text"], **LORA)
    set_trained(model, lora=config)
    stirred(model)
    save_adapters(adapters_of(model), config, None, tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(MIXED).logits, model(MIXED).logits, atol=1e-5, rtol=1e-5)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(MIXED).logits, model(MIXED).logits, atol=1e-2)


def test_a_merged_model_is_an_ordinary_one_that_computes_the_same():
    model = tiny_model().eval()
    names = set(model.state_dict())
    set_trained(model, lora=LoraConfig(**LORA))
    with torch.no_grad():
        expected = stirred(model)(MIXED).logits
        merge_adapters(model)
        assert set(model.state_dict()) == names
        torch.testing.assert_close(model(MIXED).logits, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- frozen weights, smaller


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_held_layer_computes_with_what_it_holds(dtype):
    torch.manual_seed(0)
    linear, rows = nn.Linear(48, 32), torch.randn(5, 48, requires_grad=True)
    held, other = FrozenLinear(linear, dtype), rows.detach().clone().requires_grad_()
    assert held.weight.dtype == dtype and not held.weight.requires_grad
    plain = nn.functional.linear(other, held.whole_weight(), linear.bias)
    out = held(rows)
    torch.testing.assert_close(out, plain)
    out.square().sum().backward()
    plain.square().sum().backward()
    torch.testing.assert_close(rows.grad, other.grad)


def test_8_bits_are_half_a_step_from_the_weight_at_most():
    linear = nn.Linear(64, 16)
    linear.weight.data[3] *= 100  # a large output does not coarsen the others
    held = FrozenLinear(linear, torch.int8)
    error = (held.whole_weight() - linear.weight).abs()
    assert (error <= linear.weight.abs().amax(dim=1, keepdim=True) / 127 * 0.5001).all()


def test_a_held_weight_keeps_nothing_for_the_backward_but_itself():
    held, kept = FrozenLinear(nn.Linear(64, 64), torch.int8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        held(torch.randn(3, 64, requires_grad=True))
    assert [tuple(tensor.shape) for tensor in kept if tensor.dtype == torch.int8] == [(64, 64)]
    assert sum(tensor.numel() for tensor in kept if tensor.dtype != torch.int8) == 64  # the scales


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_frozen_towers_are_held_in_less_and_trained_ones_are_not(dtype):
    model = tiny_model().eval()
    with torch.no_grad():
        before = model(MIXED).logits
        set_trained(model, ["text"], lora=LoraConfig(["image"], **LORA), frozen_dtype=dtype)
        after = model(MIXED).logits
    kinds = {name: module for name, module in model.named_modules() if isinstance(module, (FrozenLinear, LoraLinear))}
    assert isinstance(kinds["model.layers.0.mlp.text.up_proj"], FrozenLinear)
    assert isinstance(kinds["model.layers.0.mlp.image.up_proj"].base_layer, FrozenLinear)
    assert not any("speech" in name for name in kinds)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, atol=0.05 * before.std().item(), rtol=0)


def test_merging_takes_the_weights_that_were_before():
    model = tiny_model()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    set_trained(model, lora=LoraConfig(["image"], **LORA), frozen_dtype="int8")
    layers = adapters_of(stirred(model))
    deltas = {name: 2.0 * layer.lora_B.weight @ layer.lora_A.weight for name, layer in layers.items()}
    merge_adapters(model, original.__getitem__)
    for name, value in model.state_dict().items():
        delta = deltas.get(name.removesuffix(".weight"), 0.0)
        torch.testing.assert_close(value, original[name] + delta, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- a run


def test_a_run_moves_the_adapters_alone_and_goes_on_from_its_checkpoint(tmp_path):
    tuned = {"frozen_towers": ["speech"], "frozen_parts": ["embeddings", "output_layer"], "frozen_dtype": "int8"}
    tuned["lora"] = LoraConfig(["text", "image"], **LORA)

    def made():
        model = tiny_model()
        set_trained(model, **tuned)
        return model

    model = made()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = tiny_trainer(tmp_path / "whole", model, steps=4, ema_decay=0.9)
    trainer.fit()
    moved = {name for name, value in trainer.raw_model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(trained_names(model)) and all("lora_" in name for name in moved)

    # A run that stops half way and goes on in a new model ends where the whole run did.
    cut = tiny_trainer(tmp_path / "cut", made(), steps=4, save_every=2, ema_decay=0.9)
    step = cut.train_step

    def step_and_signal(batches):
        figures = step(batches)
        cut.stop_signal.number = signal.SIGINT if cut.step == 2 else 0
        return figures

    cut.train_step = step_and_signal
    with pytest.raises(Interrupted):
        cut.fit()
    other = tiny_model(seed=3)
    set_trained(other, **tuned, seed=5)
    resumed = tiny_trainer(tmp_path / "cut", other, steps=4, save_every=2, ema_decay=0.9, resume=True)
    go_on(resumed)
    assert resumed.step == 2
    resumed.fit()
    for name, value in resumed.raw_model.named_parameters():
        assert torch.equal(value, trainer.raw_model.get_parameter(name)), name


WRONG = {
    "tower": (dict(lora=LoraConfig(["vision"])), "train.lora.towers names 'vision'; the model has image, speech, text"),
    "part": (
        dict(frozen_parts=["encoders"]),
        "train.frozen_parts names 'encoders'; beside its towers the model has emb",
    ),
    "stop": (dict(gradient_stops=["text"]), "train.gradient_stops names 'text', which could not learn; name it in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names_are_refused(name):
    fields, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        set_trained(tiny_model(), **fields)


def test_unknown_modules_are_refused():
    with pytest.raises(ConfigError, match="train.lora.modules has 'query'; there are q_proj, k_proj"):
        LoraConfig(modules=["query"])
