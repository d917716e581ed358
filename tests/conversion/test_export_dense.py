"""A MoT's towers as dense checkpoints, which transformers loads by itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.export_dense import export_dense, main
from conversion.key_maps import ConversionError
from conversion.towers import Wishes
from conversion.upcycle import upcycle
from conversion.vocabulary import Media
from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel
from tests.modeling_mot.test_dense_architectures import ARCHITECTURES, RANGES, TOWERS, dense_and_mot

from .sources import SOURCES, save_source, spelled_out, words_tokenizer


LAST = "model.layers.2.mlp.image.down_proj.weight"


def saved(folder, name="llama-biases", **fields):
    dense, model = dense_and_mot(name, **fields)
    model.save_pretrained(folder)
    return dense, model


def change(model, name, by=0.25):
    with torch.no_grad():
        model.get_parameter(name)[0] += by


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


@torch.no_grad()
def logits_of_tower(model, modality, ids):
    return model(ids, modality_ids=torch.full_like(ids, modality)).logits


# ---------------------------------------------------------------------------------------------------- what comes of it


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_equal_towers_become_the_model_that_they_are_copies_of(name, tmp_path):
    dense, _ = saved(tmp_path / "mot", name)
    export_dense(str(tmp_path / "mot"), tmp_path / "dense", architecture=SOURCES[name][0])
    made = load(tmp_path / "dense")
    assert type(made) is type(dense)
    expected = dense.state_dict()
    assert made.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())
    ids = torch.randint(2, 60, (2, 30))
    assert torch.equal(made(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fields_are_those_of_the_models_own_configuration(name, tmp_path):
    dense, _ = saved(tmp_path / "mot", name)
    export_dense(str(tmp_path / "mot"), tmp_path / "dense", architecture=SOURCES[name][0])
    dense.save_pretrained(tmp_path / "own")
    made, own = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("dense", "own"))
    assert made == own
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == [
        "config.json", "conversion.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


def test_without_a_name_the_first_architecture_that_fits_is_taken(tmp_path):
    for architecture, expected in (("mistral", "llama"), ("qwen2", "qwen2"), ("gemma", "gemma"), ("olmo2", "olmo2")):
        saved(tmp_path / architecture, architecture)
        plan = export_dense(str(tmp_path / architecture), tmp_path / "dense", dry_run=True)
        assert plan.config.model_type == expected


def test_the_architecture_it_was_made_of_is_preferred_where_it_fits(tmp_path):
    saved(tmp_path / "mot", "mistral")
    for recorded, expected in (("mistral", "mistral"), ("gemma", "llama")):
        (tmp_path / "mot" / "conversion.json").write_text(json.dumps({"architecture": recorded}))
        assert export_dense(str(tmp_path / "mot"), tmp_path / "dense", dry_run=True).config.model_type == expected


@pytest.mark.parametrize(("tower", "modality"), [("text", 0), ("image", 1), ("speech", 2)])
@pytest.mark.parametrize(
    "untied", [["attention", "feed_forward", "norm"], ["feed_forward"], ["feed_forward", "query_key_value"]]
)
@torch.no_grad()
def test_one_tower_has_the_logits_of_its_tokens(untied, tower, modality, tmp_path):
    _, model = dense_and_mot("qwen3", untied=untied)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "mot")
    export_dense(str(tmp_path / "mot"), tmp_path / "dense", tower=tower)
    ids = torch.randint(2, 60, (2, 30))
    expected = logits_of_tower(model, modality, ids)
    assert torch.equal(load(tmp_path / "dense")(ids).logits, expected)
    assert not torch.allclose(logits_of_tower(model, (modality + 1) % 3, ids), expected, atol=0.1)


@torch.no_grad()
def test_the_dense_tower_of_a_hybrid_is_exported_beside_its_experts(tiny_model, tmp_path):
    model = tiny_model("hybrid")
    model.save_pretrained(tmp_path / "mot")
    export_dense(str(tmp_path / "mot"), tmp_path / "dense", tower="image")
    ids = torch.randint(7, 60, (2, 9))
    model.set_attn_implementation("sdpa")
    assert torch.equal(load(tmp_path / "dense")(ids).logits, logits_of_tower(model, 1, ids))


@torch.no_grad()
def test_the_text_tower_of_a_transfusion_model_is_its_language_model(tmp_path):
    config = MoTTransfusionConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, boi_token_id=3,
        eoi_token_id=4, image_token_id=5, latent_channels=4, latent_size=[4, 4], unet_channels=[32, 32],
        unet_layers=1, unet_norm_groups=8,
        initializer_range=0.3, attn_implementation="sdpa",
        vae_config={"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [32]},
    )  # fmt: skip
    model = MoTTransfusionModel(config).eval()
    model.save_pretrained(tmp_path / "mot")
    plan = export_dense(str(tmp_path / "mot"), tmp_path / "dense", tower="text")
    assert {name.split(".")[0] for name in plan.left_behind} == {"model", "patchifier", "vae"}
    ids = torch.randint(6, 60, (2, 9))
    assert torch.equal(load(tmp_path / "dense")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["llama-biases", "gemma"])
@torch.no_grad()
def test_a_smaller_vocabulary_has_the_first_rows(name, tmp_path):
    dense, _ = saved(tmp_path / "mot", name)
    export_dense(str(tmp_path / "mot"), tmp_path / "dense", vocab_size=40)
    made, ids = load(tmp_path / "dense"), torch.randint(2, 40, (2, 30))
    assert made.config.vocab_size == 40
    torch.testing.assert_close(made(ids).logits, dense(ids).logits[..., :40], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_in_another_dtype_it_is_the_rounded_model_in_shards(tmp_path):
    dense, _ = saved(tmp_path / "mot")
    export_dense(str(tmp_path / "mot"), tmp_path / "dense", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("model-*-of-*.safetensors"))) > 2
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert made.dtype == torch.bfloat16
    for name, value in dense.state_dict().items():
        assert torch.equal(made.state_dict()[name], value.bfloat16())


def test_tokenizer_and_settings_of_generation_go_along(tmp_path):
    _, model = dense_and_mot("llama-biases", modality_token_ranges=RANGES)
    model.generation_config.update(temperature=0.7, do_sample=True, eos_token_id=[2, 7], image_grid=[2, 3])
    model.save_pretrained(tmp_path / "mot")
    words_tokenizer(60).save_pretrained(tmp_path / "mot")
    settings = tmp_path / "mot" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"processor_class": "MoTProcessor"}))
    export_dense(str(tmp_path / "mot"), tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer("w9 w12").input_ids == [1, 9, 12]
    assert "MoTProcessor" not in (tmp_path / "dense" / "tokenizer_config.json").read_text()
    generation = load(tmp_path / "dense").generation_config
    assert (generation.temperature, generation.eos_token_id) == (0.7, [2, 7])
    assert not hasattr(generation, "image_grid")


# ------------------------------------------------------------------------------------------------- there and back again


@pytest.mark.parametrize("name", SOURCES)
def test_from_dense_to_mot_and_back_is_the_identity(name, tmp_path):
    source = save_source(tmp_path / "source", name, tokenizer=True)
    media = Media(image_codes=9, image_grid=[3, 3])
    upcycle(str(tmp_path / "source"), tmp_path / "mot", Wishes(media), max_shard_size="50KB")
    export_dense(str(tmp_path / "mot"), tmp_path / "dense", vocab_size=60)
    original, back = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "dense"))
    assert original.keys() == back.keys()
    assert all(original[key].dtype == back[key].dtype and torch.equal(original[key], back[key]) for key in original)
    fields = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("source", "dense")]
    # A window that is as long as the positions comes back as full attention.
    windows = {"layer_types"} if name == "ministral" else set()
    assert {field for field in fields[0] | fields[1] if fields[0].get(field) != fields[1].get(field)} == windows
    made, ids = load(tmp_path / "dense"), torch.randint(4, 60, (2, 30))
    source.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert type(made) is type(source) and torch.equal(made(ids).logits, source(ids).logits)


def test_a_cut_vocabulary_takes_its_tokens_out_of_the_tokenizer(tmp_path):
    save_source(tmp_path / "source", "llama", bos_token_id=None, pad_token_id=None)
    tokenizer = words_tokenizer(60, bos=False)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "source")
    upcycle(str(tmp_path / "source"), tmp_path / "mot", Wishes(Media(image_codes=9, image_grid=[3, 3])))
    plan = export_dense(str(tmp_path / "mot"), tmp_path / "dense", vocab_size=60)
    assert any(token.startswith("pad_token_id=6") for token in plan.cut_off)
    source, made = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("source", "dense"))
    assert made.get_vocab() == source.get_vocab() and len(AutoTokenizer.from_pretrained(tmp_path / "mot")) > 69
    assert made("w9 w12").input_ids == source("w9 w12").input_ids == [9, 12]
    assert (
        made.bos_token is None and made.pad_token is None and not (tmp_path / "dense" / "chat_template.jinja").exists()
    )
    config = load(tmp_path / "dense").config
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (None, 2, 60)


def test_without_a_cut_the_rows_of_images_stay(tmp_path):
    save_source(tmp_path / "source", "gemma", tokenizer=True)
    upcycle(str(tmp_path / "source"), tmp_path / "mot", Wishes(Media(image_codes=9, image_grid=[3, 3])))
    export_dense(str(tmp_path / "mot"), tmp_path / "dense")
    made, tokenizer = load(tmp_path / "dense"), AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert made.config.vocab_size == len(tokenizer) > 69
    rows = load_file(tmp_path / "mot" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(made.model.embed_tokens.weight, rows)


# ------------------------------------------------------------------------------------------------------- what cannot be


def test_towers_that_differ_are_refused_with_the_first_that_does(tmp_path):
    _, model = dense_and_mot("llama-biases")
    change(model, LAST)
    change(model, "model.norm.speech.weight")
    model.save_pretrained(tmp_path / "mot")
    with pytest.raises(ConversionError) as refused:
        export_dense(str(tmp_path / "mot"), tmp_path / "dense")
    assert "2 tensors" in str(refused.value) and "by up to 0.25" in str(refused.value)
    assert f"{LAST.replace('image', 'text')} and {LAST}" in str(refused.value)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_norm": "layer"}, "llama cannot express qk_norm='layer'"),
        ({"norm_offset": True}, "qwen2 cannot express .*norm_offset=True"),
        ({"layers_without_rope": [0], "norm_position": "post"}, "smollm3 cannot express norm_position='post'"),
    ],
)
def test_layers_of_no_dense_architecture_are_refused_by_field(tiny_model, fields, message, tmp_path):
    tiny_model(**fields).save_pretrained(tmp_path / "mot")
    with pytest.raises(ConversionError, match=message):
        export_dense(str(tmp_path / "mot"), tmp_path / "dense", tower="text")


OWN_SIZES = {"image": {"hidden_size": 20}, "speech": {"intermediate_size": 20, "rms_norm_eps": 0.1}}


@torch.no_grad()
def test_a_tower_with_sizes_of_its_own_becomes_a_dense_model_of_these_sizes(tiny_model, tmp_path):
    model = tiny_model(tower_configs=OWN_SIZES)
    model.save_pretrained(tmp_path / "mot")
    export_dense(str(tmp_path / "mot"), tmp_path / "dense", tower="speech")
    dense = load(tmp_path / "dense")
    assert (dense.config.intermediate_size, dense.config.rms_norm_eps) == (20, 0.1)
    ids = torch.randint(45, 60, (1, 9))
    torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (None, "the towers differ by tower_configs=.*--tower \\(text, image, speech\\)"),
        ("image", "hidden_size=20 wide, and the embeddings are 32: .* tower of text is 'text'"),
    ],
)
def test_towers_that_are_no_language_model_are_refused(tiny_model, tower, message, tmp_path):
    tiny_model(tower_configs=OWN_SIZES).save_pretrained(tmp_path / "mot")
    with pytest.raises(ConversionError, match=message):
        export_dense(str(tmp_path / "mot"), tmp_path / "dense", tower=tower)


def test_an_architecture_that_lacks_a_part_is_refused_by_field(tmp_path):
    saved(tmp_path / "mot", "qwen2")
    with pytest.raises(ConversionError, match="qwen3 cannot express .*qk_norm=None"):
        export_dense(str(tmp_path / "mot"), tmp_path / "dense", architecture="qwen3")


def test_dropout_of_training_is_no_obstacle(tiny_model, tmp_path):
    tiny_model("dense", hidden_dropout=0.1).save_pretrained(tmp_path / "mot")
    export_dense(str(tmp_path / "mot"), tmp_path / "dense")
    assert load(tmp_path / "dense").config.model_type == "llama"


@pytest.mark.parametrize(
    ("variant", "tower", "message"),
    [
        ("hybrid", "text", "tower 'text' is a mixture of 4 experts.*--tower \\(image, speech\\)"),
        ("hybrid", None, "tower 'text' is a mixture of 4 experts"),
        ("moe-4x", None, "tower 'shared' is a mixture of 4 experts, which no dense architecture has$"),
        ("mot", "video", "--tower video is none of the checkpoint's towers, text, image, speech"),
    ],
)
def test_towers_that_are_not_there_or_not_dense_are_refused(tiny_model, variant, tower, message, tmp_path):
    tiny_model(variant).save_pretrained(tmp_path / "mot")
    with pytest.raises(ConversionError, match=message):
        export_dense(str(tmp_path / "mot"), tmp_path / "dense", tower=tower)


def test_every_tensor_too_many_or_too_few_is_listed(tmp_path):
    saved(tmp_path / "mot")
    file = tmp_path / "mot" / "model.safetensors"
    tensors = load_file(file)
    lost = ["model.norm.image.weight", *(f"model.layers.1.self_attn.q_proj.{tower}.weight" for tower in TOWERS)]
    for name in lost:
        del tensors[name]
    save_file(tensors | {"model.extra": torch.ones(2), "more": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ConversionError) as refused:
        export_dense(str(tmp_path / "mot"), tmp_path / "dense")
    named = [line.split(": ") for line in str(refused.value).splitlines()[1:]]
    assert [name for kind, name in named if kind == "  missing"] == lost[1:] + lost[:1]
    assert [name for kind, name in named if kind == "  not known"] == ["model.extra", "more"]


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(61, "from 1 to the checkpoint's 60"), (0, "from 1"), (40, "cuts into the 60 tokens")]
)
def test_vocabularies_that_cannot_be_are_refused(vocab_size, message, tmp_path):
    saved(tmp_path / "mot")
    words_tokenizer(60).save_pretrained(tmp_path / "mot")
    with pytest.raises(ConversionError, match=message):
        export_dense(str(tmp_path / "mot"), tmp_path / "dense", vocab_size=vocab_size)


# -------------------------------------------------------------------------------------------------------- the command


def test_command_prints_the_plan_and_writes_only_without_dry_run(tmp_path, capsys):
    saved(tmp_path / "mot")
    arguments = [str(tmp_path / "mot"), str(tmp_path / "dense")]
    assert main([*arguments, "--dry-run"]) == 0 and not (tmp_path / "dense").exists()
    printed = spelled_out(capsys.readouterr().out)
    towers = [f"model.layers.1.mlp.{tower}.up_proj.weight" for tower in TOWERS]
    assert f"{' = '.join(towers)} -> model.layers.1.mlp.up_proj.weight [48, 32]" in printed
    assert "LlamaForCausalLM: " in printed
    assert main(arguments) == 0 and capsys.readouterr().out.strip() == arguments[1]
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--tower", "image", "--dtype", "bfloat16"]) == 0
    assert load(tmp_path / "dense").dtype == torch.bfloat16


def test_command_refuses_what_is_no_mot(tmp_path, capsys):
    dense, _ = dense_and_mot("llama-biases")
    dense.save_pretrained(tmp_path / "llama")
    assert main([str(tmp_path / "llama"), str(tmp_path / "dense")]) == 2
    assert "model_type='llama' and is no MoT" in capsys.readouterr().err
