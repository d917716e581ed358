"""LoRA adapters of PEFT on chosen towers: trained, merged, saved, and loaded without PEFT and this package."""

import copy

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.integrations.peft import MIN_PEFT_VERSION

from modeling_mot import MoTTransfusionModel
from tests.modeling_mot.test_remote_code import run_clean
from tests.training.tiny_transfusion import PictureStream
from tests.training.tiny_transfusion import tiny_model as transfusion_model
from training.data import collate


IMAGE_TOWER = r".*\.(self_attn\.[qv]_proj\.image|mlp\.image\.up_proj)"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": IMAGE_TOWER}
IDS = torch.tensor([[1, 9, 12, 3, 30, 31, 44, 4], [1, 3, 33, 34, 35, 4, 20, 21]])


def train(model, batch, steps=3):
    """A few updates of whatever requires gradients; the losses before each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def adapted(tiny_model):
    """(weights before, a model whose image tower has trained adapters, its losses)"""
    model = tiny_model()
    before = weights(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    losses = train(adapted, {"input_ids": IDS, "labels": IDS})
    return before, adapted, losses


def test_only_the_chosen_tower_has_adapters_and_learns(adapted):
    _, model, losses = adapted
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 3 and all(".image." in name and ".lora_" in name for name in trained)
    assert losses[-1] < losses[0]


def test_merged_adapters_give_the_adapters_logits_and_leave_other_towers_bit_for_bit(adapted):
    before, model, _ = adapted
    with torch.no_grad():
        expected = model(IDS).logits
        text = IDS[:, :1].repeat(1, 5)
        text_before = model(text).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        # No token of a picture, no adapter.
        assert torch.equal(merged(text).logits, text_before)
    after = merged.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    names = ("self_attn.q_proj.image", "self_attn.v_proj.image", "mlp.image.up_proj")
    assert changed == {f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in names}


def test_generation_with_adapters_is_that_of_the_merged_model(adapted):
    _, model, _ = adapted
    settings = {"max_new_tokens": 12, "do_sample": False}
    generated = model.generate(input_ids=IDS[:, :4], **settings)
    assert torch.equal(generated, model.merge_and_unload().generate(IDS[:, :4], **settings))


def test_an_adapter_is_saved_alone_and_put_on_again(adapted, tiny_model, tmp_path):
    before, model, _ = adapted
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    base = tiny_model()
    base.load_state_dict(before)
    with torch.no_grad():
        plain, loaded = base(IDS).logits, PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        with loaded.disable_adapter():
            assert torch.equal(loaded(IDS).logits, plain)


LOAD = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file(sys.argv[1] + "/expected.safetensors")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
print("loaded")
"""


def test_a_merged_model_loads_in_a_clean_process(adapted, tmp_path):
    merged = adapted[1].merge_and_unload()
    folder = tmp_path / "merged"
    merged.save_pretrained(folder)
    with torch.no_grad():
        save_file({"ids": IDS, "logits": merged(IDS).logits}, folder / "expected.safetensors")
    assert "loaded" in run_clean(LOAD, folder, tmp_path)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason="the installed transformers refuses adapters of this PEFT",
)
def test_transformers_own_adapters_work_as_well(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        plain = model(IDS).logits
        model.add_adapter(LoraConfig(init_lora_weights=False, **LORA), adapter_name="pictures")
        adapted = model(IDS).logits
        model.disable_adapters()
        assert torch.equal(model(IDS).logits, plain) and not torch.equal(adapted, plain)


def test_the_image_tower_of_a_transfusion_model_learns_alone():
    model = transfusion_model()
    stream = PictureStream().rows()
    batch = collate([next(stream) for _ in range(4)], config=model.config, noise_seed=0, row_numbers=range(4))
    before = weights(model)
    adapted = get_peft_model(model, LoraConfig(**LORA))
    losses = train(adapted, batch)
    assert losses[-1] < losses[0]
    merged = adapted.merge_and_unload()
    assert isinstance(merged, MoTTransfusionModel)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(before[name], value)}
    assert len(changed) == 6 and all(".image." in name for name in changed)


# --------------------------------------------------------------------------- what users of other models try first


def towers_of(model, part="layers.0."):
    names = [name for name, _ in model.named_modules() if name.endswith("lora_A.default") and part in name]
    return sorted(name.split(part)[1].removesuffix(".lora_A.default") for name in names)


QUERIES_AND_VALUES = sorted(f"self_attn.{name}_proj.{tower}" for name in "qv" for tower in ("text", "image", "speech"))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_adapters_go_to_queries_and_values_of_every_tower_by_default(tiny_model, task_type):
    assert towers_of(get_peft_model(tiny_model(), LoraConfig(task_type=task_type))) == QUERIES_AND_VALUES


def test_default_targets_are_loaded_with_the_adapter(tiny_model, tmp_path):
    base = tiny_model()
    model = get_peft_model(base, LoraConfig(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    expected = model(IDS).logits
    torch.testing.assert_close(PeftModel.from_pretrained(model.unload(), tmp_path)(IDS).logits, expected)


def test_targets_of_a_llama_are_refused_with_the_names_that_do(tiny_model):
    with pytest.raises(ValueError, match=r"target_modules=\['<name>.text'.*target_modules=r'(.*)'") as refused:
        get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    pattern = str(refused.value).split("target_modules=r'")[1].split("'")[0]
    for targets in (pattern, [f"{name}_proj.{tower}" for name in "qv" for tower in ("text", "image", "speech")]):
        assert towers_of(get_peft_model(tiny_model(), LoraConfig(target_modules=targets))) == QUERIES_AND_VALUES


def test_generation_sees_an_adapter_of_the_embedding(tiny_model):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)).eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [3, 5]}
    generated = model.generate(input_ids=IDS[:, :3], **settings)
    served = model.base_model.model.generate_batch(IDS[:, :3].tolist(), **settings)
    merged = model.merge_and_unload().generate(IDS[:, :3], **settings)
    assert torch.equal(generated, merged)
    assert [output.generated_tokens for output in served.values()] == merged[:, 3:].tolist()


def test_pictures_see_an_adapter_of_the_embedding():
    adapted = get_peft_model(
        transfusion_model(), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    ).eval()
    prompt = torch.tensor([[1, 9, 12]])
    settings = {"max_new_tokens": 6, "do_sample": False, "generation_mode": "text"}
    generated = adapted.base_model.model.generate(prompt, **settings).sequences
    assert torch.equal(generated, adapted.merge_and_unload().generate(prompt, **settings).sequences)


def test_a_transfusion_model_takes_adapters_of_a_causal_model():
    stream = PictureStream().rows()
    model = transfusion_model()
    batch = collate([next(stream) for _ in range(2)], config=model.config, noise_seed=0, row_numbers=range(2))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    losses = train(adapted, batch)
    assert losses[-1] < losses[0]


TEXT_IDS = torch.tensor([[1, 9, 12, 7, 20], [1, 8, 25, 11, 13]])


@pytest.mark.parametrize("variant", ["dense", "mot", "hybrid"])
@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt", "p-tuning", "prefix"],
)
def test_virtual_tokens_are_trained_and_generated_behind(tiny_model, variant, config):
    base = tiny_model(variant)
    model = get_peft_model(base, copy.deepcopy(config)).eval()
    ids = {"modality_ids": torch.zeros_like(TEXT_IDS)}
    model(input_ids=TEXT_IDS, labels=TEXT_IDS, **ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    hidden = [3, 5, *range(30, 60)]
    expected = TEXT_IDS
    for _ in range(4):  # whole forwards, without a cache of what was generated
        given = {"modality_ids": torch.zeros_like(expected), "token_choice": True}
        with torch.no_grad():
            logits = model(input_ids=expected, attention_mask=torch.ones_like(expected), **given).logits[:, -1]
        logits[:, [4, 6, *hidden]] = -float("inf")
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": hidden}
    generated = model.generate(input_ids=TEXT_IDS, attention_mask=torch.ones_like(TEXT_IDS), **settings)
    assert torch.equal(generated, expected)


def test_virtual_tokens_before_embeddings_of_unknown_towers_are_refused(tiny_model):
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="pass modality_ids"):
        model(input_ids=TEXT_IDS)
    with pytest.raises(ValueError, match="input_ids is needed"):
        get_peft_model(transfusion_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))(TEXT_IDS)


def test_hooks_on_the_embedding_see_rows(tiny_model):
    """As NEFTune's do, whose noise depends on the length of the rows."""
    model, seen = tiny_model(), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append((args[0], out.shape)))
    model(IDS)
    assert torch.equal(seen[0][0], IDS) and seen[0][1] == (2, 8, 32)
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)
