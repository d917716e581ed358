"""A MoT made of a dense checkpoint has that checkpoint's text, whatever the towers around it are."""

import json
import os
import shlex
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, GenerationConfig

from conversion.checkpoints import CheckpointReader
from conversion.commands import merge_layers
from conversion.initial_values import NEW_ROW_NOISE
from conversion.upcycle import main
from conversion.validation import validate
from modeling_mot import MoTConfig, MoTForCausalLM, MoTTransfusionModel
from training.config import load as load_recipe
from training.recipe import Recipe

from .hub_server import HubServer
from .sources import SOURCES, save_source, spelled_out, words_tokenizer


ASSETS = Path(__file__).resolve().parents[2] / "training" / "assets"
ROOM = [
    "--modalities",
    "text",
    "image",
    "speech",
    "--image-codes",
    "10",
    "--image-grid",
    "2",
    "3",
    "--speech-units",
    "5",
]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
SMALL_UNET = ["--set", "unet_channels=[32,64]", "unet_norm_groups=16", "unet_layers=1", "prediction_type=flow"]
TRANSFUSION = ["--transfusion", "--vae", str(ASSETS / "vae"), "--image-size", "32", "32", *SMALL_UNET]


def converted(folder, *options, source="llama", **fields):
    """(the dense model, OUT) of a conversion that is expected to succeed."""
    dense = save_source(folder / "source", source, **fields)
    assert main([str(folder / "source"), str(folder / "out"), *map(str, options)]) == 0
    return dense, folder / "out"


def refusal(capsys, folder, *options):
    """What a conversion that is refused says; nothing is left of it."""
    assert main([str(folder / "source"), str(folder / "out"), *map(str, options)]) == 2
    assert not (folder / "out").exists() and not list(folder.glob(".out*"))
    return capsys.readouterr().err


def text_ids(shape=(2, 40)):
    return torch.randint(4, 60, shape)


# ------------------------------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_text_has_the_sources_logits_bit_for_bit(tmp_path, source, attention):
    dense, out = converted(tmp_path, *ROOM, source=source)
    dense.set_attn_implementation(attention)
    model = MoTForCausalLM.from_pretrained(out, attn_implementation=attention)
    ids = text_ids()
    logits, expected = model(ids).logits, dense(ids).logits
    assert expected.std() > 0.1 and logits.shape[-1] > 75
    assert torch.equal(logits[..., :60], expected)


@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_text_is_generated_as_the_source_generates_it(tmp_path, source):
    dense, out = converted(tmp_path, *ROOM, source=source)
    model = MoTForCausalLM.from_pretrained(out)
    prompt = text_ids((2, 8))
    new = list(range(60, model.config.vocab_size))
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones(2, 8)}
    expected = dense.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, suppress_tokens=new, **settings), expected)


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "olmo2"])  # its norm rounds in another place
@torch.no_grad()
def test_in_bfloat16_text_is_rounded_where_the_source_rounds(tmp_path, source):
    dense, out = converted(tmp_path, *ROOM, source=source, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    assert model.dtype == torch.bfloat16
    ids = text_ids()
    assert torch.equal(model(ids).logits[..., :60], dense(ids).logits)


@torch.no_grad()
def test_tokens_of_every_modality_see_the_same_layers_in_copied_towers(tmp_path):
    dense, out = converted(tmp_path, *ROOM, source="qwen3")
    model = MoTForCausalLM.from_pretrained(out)
    ids, modality_ids = text_ids(), torch.randint(0, 3, (2, 40))
    logits = model(ids, modality_ids=modality_ids).logits[..., :60]
    torch.testing.assert_close(logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [["attention"], ["norm", "feed_forward"], ["attention", "feed_forward", "norm"]])
@torch.no_grad()
def test_shared_parts_are_the_sources(tmp_path, share):
    dense, out = converted(tmp_path, *ROOM, "--share", *share, source="gemma")
    model = MoTForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    assert set(model.config.untied) == {"attention", "feed_forward", "norm"} - set(share)
    ids = text_ids()
    assert torch.equal(model(ids).logits[..., :60], dense(ids).logits)


# ---------------------------------------------------------------------------------------------------------- the tensors


def test_shards_of_source_and_of_out_change_nothing(tmp_path):
    _, whole = converted(tmp_path / "a", *ROOM, "--init", "image=perturbed:0.1", "speech=fresh")
    torch.manual_seed(0)
    _, sharded = converted(
        tmp_path / "b", *ROOM, "--init", "image=perturbed:0.1", "speech=fresh", "--max-shard-size", "40KB",
        shard_size="30KB",
    )  # fmt: skip
    assert len(list((tmp_path / "b" / "source").glob("*.safetensors"))) > 2
    files = list(sharded.glob("*.safetensors"))
    assert len(files) > 2 and (sharded / "model.safetensors.index.json").is_file()
    expected = load_file(whole / "model.safetensors")
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_is_written_is_what_the_model_itself_saves(tmp_path):
    _, out = converted(tmp_path, *ROOM, "--init", "image=fresh", "--moe-text", 2, source="llama-tied")
    model = MoTForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("config.json", "generation_config.json"):
        left, right = (json.loads((folder / name).read_text()) for folder in (out, tmp_path / "again"))
        assert left == right
    assert {file.name for file in (tmp_path / "again").iterdir()} <= {file.name for file in out.iterdir()}


def test_only_one_tensor_of_the_source_is_in_memory_at_a_time(tmp_path, monkeypatch):
    save_source(tmp_path / "source", "llama")
    alive, read = [], CheckpointReader.read

    def watched(reader, name):
        assert not [one for one in alive if one() is not None], "the tensor before is still there"
        tensor = read(reader, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(CheckpointReader, "read", watched)
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), *ROOM, "--init", "image=perturbed:0.1"]) == 0
    assert len(alive) > 60


OWN_SIZES = {"hidden_size": 24, "intermediate_size": 40, "gated_mlp": False, "hidden_act": "relu2", "qk_norm": "rms"}
SET_OWN = ["--set", f"tower_configs={json.dumps({'image': OWN_SIZES})}"]


@pytest.mark.parametrize("source", ["gemma", "llama-biases"])
@torch.no_grad()
def test_a_tower_of_another_width_is_drawn_and_text_keeps_its_logits(tmp_path, source):
    dense, out = converted(tmp_path, *ROOM, "--init", "image=fresh", *SET_OWN, source=source)
    model = MoTForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    assert model.config.tower_configs == {"image": OWN_SIZES}
    assert model.model.layers[0].mlp["image"].up_proj.weight.shape == (40, 24)
    norm = model.model.norm["image"].weight
    assert norm.shape == (24,) and (norm == (0 if source == "gemma" else 1)).all()
    ids = text_ids()
    assert torch.equal(model(ids).logits[..., :60], dense(ids).logits)
    assert model(ids, modality_ids=torch.randint(0, 3, ids.shape)).logits.isfinite().all()


def test_a_fresh_tower_begins_as_a_new_model_does(tmp_path):
    dense, out = converted(tmp_path, *ROOM, "--init", "image=fresh", source="gemma", hidden_size=64, head_dim=32)
    new = MoTForCausalLM(MoTForCausalLM.from_pretrained(out).config)
    expected = dict(new.named_parameters())
    for name, value in load_file(out / "model.safetensors").items():
        if ".image." in name:
            if value.dim() == 1:
                assert torch.equal(value, expected[name]), name
            else:
                assert value.std().item() == pytest.approx(expected[name].std().item(), rel=0.15), name
                assert abs(value.mean().item()) < 0.003


def test_noise_is_a_share_of_each_tensors_size_and_follows_from_the_seed(tmp_path):
    dense, out = converted(tmp_path, *ROOM, "--init", "image=perturbed:0.1", hidden_size=64)
    tensors = load_file(out / "model.safetensors")
    for name, source in dense.named_parameters():
        if ".mlp." in name:
            noise = tensors[name.replace(".mlp.", ".mlp.image.")] - source
            assert (noise.square().mean() / source.square().mean()).sqrt().item() == pytest.approx(0.1, rel=0.1)
            assert torch.equal(tensors[name.replace(".mlp.", ".mlp.text.")], source)
    options = [*ROOM, "--init", "image=perturbed:0.1", "--seed"]
    for seed, same in ((0, True), (1, False)):
        assert main([str(tmp_path / "source"), str(tmp_path / f"{seed}"), *options, str(seed)]) == 0
        name = "model.layers.0.mlp.image.up_proj.weight"
        assert torch.equal(load_file(tmp_path / f"{seed}" / "model.safetensors")[name], tensors[name]) == same


def test_new_rows_are_near_the_mean_of_the_old_ones(tmp_path):
    dense, out = converted(tmp_path, "--image-codes", 2000, hidden_size=64)
    tensors = load_file(out / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = dense.get_parameter(name), tensors[name][60:]
        assert torch.equal(tensors[name][:60], old)
        spread = old.std(dim=0, unbiased=False)
        torch.testing.assert_close(new.mean(dim=0), old.mean(dim=0), rtol=0, atol=0.02)
        torch.testing.assert_close(new.std(dim=0) / spread, torch.full((64,), NEW_ROW_NOISE), rtol=0.1, atol=0)
        assert len(new.unique(dim=0)) == len(new)


def test_dtype_is_the_sources_or_the_one_asked_for(tmp_path):
    dense, out = converted(tmp_path, *ROOM, "--dtype", "bfloat16", "--init", "image=fresh")
    tensors = load_file(out / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    name = "model.layers.1.self_attn.q_proj.{}weight"
    assert torch.equal(tensors[name.format("text.")], dense.get_parameter(name.format("")).bfloat16())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


# -------------------------------------------------------------------------------------------------- mixtures of experts


@torch.no_grad()
def test_a_token_gets_the_sources_feed_forward_times_its_weights(tmp_path):
    """Of N copied experts, each scaled by N, a token gets N x (the sum of its affinities to those that chose it)."""
    dense, out = converted(tmp_path, *ROOM, "--moe-text", 4)
    model = MoTForCausalLM.from_pretrained(out)
    experts = model.model.layers[1].mlp["text"]
    rows = torch.randn(30, 32)
    expected = dense.model.layers[1].mlp(rows)
    affinity = experts.router(rows).softmax(dim=-1)
    best = affinity.max(dim=-1, keepdim=True).values
    torch.testing.assert_close(experts(rows, token_choice=True), 4 * best * expected, rtol=1e-5, atol=1e-5)
    assert (4 * best - 1).abs().max() < 0.1  # so that what is generated is near to what the source generates
    # Expert choice, written out: each takes the rows that like it most, some rows are taken by none.
    weight = torch.zeros(30, 1)
    for expert, capacity in enumerate((8, 8, 7, 7)):
        taken = affinity[:, expert].argsort(descending=True)[:capacity]
        weight[taken] += 4 * affinity[taken, expert, None]
    torch.testing.assert_close(experts(rows), weight * expected, rtol=1e-5, atol=1e-5)
    assert (weight == 0).any() and (weight > 1.5).any() and weight.mean().item() == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_generation_with_copied_experts_is_near_the_source(tmp_path):
    dense, out = converted(tmp_path, *ROOM, "--moe-text", 4)
    model = MoTForCausalLM.from_pretrained(out)
    ids = text_ids()
    expected = dense(ids).logits
    chosen, taken = (model(ids, token_choice=choice).logits[..., :60] for choice in (True, False))
    near, far = ((logits - expected).std() / expected.std() for logits in (chosen, taken))
    assert near < 0.05
    assert far > 0.3  # the routing of training is another function at first


# ---------------------------------------------------------------------------------------------------------- Transfusion


@torch.no_grad()
def test_a_transfusion_model_keeps_the_text_and_copies_it_for_images(tmp_path):
    dense, out = converted(tmp_path, *TRANSFUSION, source="qwen3", tokenizer=True)
    model = MoTTransfusionModel.from_pretrained(out, attn_implementation="sdpa")
    ids = text_ids()
    assert torch.equal(model(ids).logits[..., :60], dense(ids).logits)
    text, image = (
        {name.replace(f".{tower}.", "."): v for name, v in model.named_parameters() if f".{tower}." in name}
        for tower in ("text", "image")
    )
    assert text.keys() == image.keys() and all(torch.equal(text[name], image[name]) for name in text)
    stored = load_file(ASSETS / "vae" / "diffusion_pytorch_model.safetensors")
    vae = {name.removeprefix("vae."): v for name, v in model.named_parameters() if name.startswith("vae.")}
    assert vae.keys() == stored.keys() and all(torch.equal(vae[name], stored[name].float()) for name in vae)
    assert all(value.std() > 0 for name, value in model.patchifier.named_parameters() if value.dim() > 1)
    processor = AutoProcessor.from_pretrained(out)
    batch = processor(
        text="w5 <|image|> w7", images=[torch.zeros(3, 32, 32).numpy().transpose(1, 2, 0)], return_tensors="pt"
    )
    output = model(**batch, labels=batch["input_ids"], generator=torch.Generator().manual_seed(0))
    assert output.loss.isfinite() and output.prediction.std() > 0


def test_a_half_precision_transfusion_model_keeps_its_vae_in_float32(tmp_path):
    _, out = converted(tmp_path, *TRANSFUSION, "--dtype", "bfloat16")
    tensors = load_file(out / "model.safetensors")
    assert {value.dtype for name, value in tensors.items() if name.startswith("vae.")} == {torch.float32}
    assert {value.dtype for name, value in tensors.items() if not name.startswith("vae.")} == {torch.bfloat16}


# --------------------------------------------------------------------------------------------- vocabulary and processor


def test_the_tokenizer_goes_along_and_its_ids_stay(tmp_path):
    _, out = converted(tmp_path, *ROOM, tokenizer=True)
    source, tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source"), AutoTokenizer.from_pretrained(out)
    processor = AutoProcessor.from_pretrained(out)
    assert tokenizer("w5 w59")["input_ids"] == source("w5 w59")["input_ids"] == [1, 5, 59]
    assert processor(text="w5<|boi|>")["input_ids"] == [1, 5, processor.tokenizer.boi_token_id]
    config = MoTForCausalLM.from_pretrained(out).config
    assert processor.config_kwargs() | {"image_grid": [2, 3]} == {
        name: getattr(config, name) for name in [*processor.config_kwargs(), "image_grid"]
    }
    assert config.modality_token_ranges == {"text": [0, 68], "image": [68, 78], "speech": [78, 83]}


def test_without_a_tokenizer_the_vocabulary_is_laid_out_alike(tmp_path):
    _, with_one = converted(tmp_path / "a", *ROOM, tokenizer=True)
    _, without = converted(tmp_path / "b", *ROOM)
    assert main([str(tmp_path / "a" / "source"), str(tmp_path / "c"), *ROOM, "--no-tokenizer"]) == 0
    configs = [json.loads((folder / "config.json").read_text()) for folder in (with_one, without, tmp_path / "c")]
    assert configs[0] == configs[1] == configs[2]
    assert (with_one / "tokenizer.json").is_file() and not (tmp_path / "c" / "tokenizer.json").is_file()


def test_without_a_begin_token_the_vocabulary_is_laid_out_alike(tmp_path):
    for name in ("a", "b"):
        save_source(tmp_path / name, "qwen2", bos_token_id=None)
    words_tokenizer(60, bos=False).save_pretrained(tmp_path / "a")
    for name in ("a", "b"):
        assert main([str(tmp_path / name), str(tmp_path / f"{name}-out"), *ROOM]) == 0
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("a-out", "b-out")]
    assert configs[0] == configs[1] and configs[0]["bos_token_id"] is None
    assert configs[0]["modality_token_ranges"]["text"] == [0, 68]


def test_rows_without_a_token_keep_their_place(tmp_path):
    dense = save_source(tmp_path / "source", "qwen2", vocab_size=64, bos_token_id=2)
    words_tokenizer(57, bos=False, additional_special_tokens=["</s>"]).save_pretrained(tmp_path / "source")
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), *ROOM]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens([56, 57, 63]) == ["w56", "<|unused_0|>", "<|unused_6|>"]
    assert min(tokenizer.boi_token_id, tokenizer.eoi_token_id) >= 64
    assert tokenizer.bos_token_id is None  # as of the source, whose configuration alone names one
    embeddings = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embeddings[:64], dense.model.embed_tokens.weight)


def test_a_chat_template_and_settings_of_generation_go_along(tmp_path):
    save_source(tmp_path / "source", "llama")
    tokenizer = words_tokenizer(60)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w9 {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "source")
    GenerationConfig(eos_token_id=[2, 9], temperature=0.6, do_sample=True).save_pretrained(tmp_path / "source")
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), *ROOM]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "w5"}]
    assert processor.apply_chat_template(chat, tokenize=False) == "w5 w9 "
    model = MoTForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [2, 9] and model.generation_config.temperature == 0.6
    assert model.generation_config.pad_token_id == 0 and model.config.eos_token_id == 2


def test_out_loads_and_generates_in_a_process_that_does_not_know_this_package(tmp_path):
    _, out = converted(tmp_path, *ROOM, tokenizer=True, max_position_embeddings=256)
    assert validate(out)["model"] == "MoTForCausalLM"


UPLOAD_AND_CONVERT = """
import sys
from huggingface_hub import HfApi
from conversion.upcycle import main
folder, out = sys.argv[1:]
HfApi().create_repo("ada/dense")
first = HfApi().upload_folder(repo_id="ada/dense", folder_path=folder).oid
HfApi().delete_file("model.safetensors", "ada/dense")
assert main(["ada/dense", out, "--image-codes", "4"]) == 2
assert main(["ada/nothing", out, "--image-codes", "4"]) == 2
assert main(["ada/dense", out, "--image-codes", "4", "--revision", first]) == 0
print(first)
"""


def test_a_source_is_taken_from_the_hub_at_a_revision(tmp_path):
    dense = save_source(tmp_path / "source", "llama", tokenizer=True, max_position_embeddings=256)
    with HubServer() as hub:
        result = subprocess.run(
            [sys.executable, "-c", UPLOAD_AND_CONVERT, str(tmp_path / "source"), str(tmp_path / "out")],
            env=os.environ | hub.environment(tmp_path / "home", "ada"),
            cwd=ASSETS.parents[1],
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "holds neither model.safetensors nor" in result.stderr and "'ada/nothing' is no folder" in result.stderr
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"] == "ada/dense" and record["revision"] == result.stdout.split()[-1]
    embeddings = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embeddings[:60], dense.model.embed_tokens.weight)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_transfusion_model_draws_in_a_process_that_does_not_know_this_package(tmp_path):
    _, out = converted(tmp_path, *TRANSFUSION, tokenizer=True, max_position_embeddings=256)
    assert validate(out)["picture"]


def test_frozen_text_comes_with_a_recipe_that_the_trainer_reads(tmp_path):
    tokenizers = ["--image-tokenizer", ASSETS / "processor" / "image_tokenizer"]
    _, out = converted(
        tmp_path, *tokenizers, "--freeze-text", "--share", "norm", tokenizer=True, max_position_embeddings=512
    )
    recipe = load_recipe(Recipe, out / "train.yaml")
    assert recipe.model.init_from == str(out)
    # The command in its comment writes beside OUT, where OUT is in runs/ as the page has it.
    assert recipe.train.output_dir == "runs/out-trained"
    assert shlex.split((out / "train.yaml").read_text().splitlines()[3])[1:] == [
        "python",
        "training/train.py",
        str(out / "train.yaml"),
    ]
    assert recipe.train.frozen_towers == ["text", "shared"] and recipe.train.frozen_vocabulary == 60
    processor = AutoProcessor.from_pretrained(out)
    assert recipe.data.row_length >= len(processor.encode_images([torch.zeros(64, 64, 3).byte().numpy()])[0])


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_dry_run_says_what_becomes_of_every_tensor_and_writes_nothing(tmp_path, capsys):
    dense = save_source(tmp_path / "source", "llama")
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), *ROOM, "--moe-text", "2", "--dry-run"]) == 0
    assert os.listdir(tmp_path) == ["source"]
    printed = capsys.readouterr().out
    assert sum("up_proj" in line for line in printed.splitlines()) == 1  # all layers are one line
    lines = spelled_out(printed).splitlines()
    for name in dense.state_dict():
        assert sum(line.startswith(f"{name} [") for line in lines) == 1, name
    where = "model.layers.0.mlp.{}.up_proj.weight".format
    assert (
        f"model.layers.0.mlp.up_proj.weight [48, 32] float32 -> {where('text.experts.0')}, {where('text.experts.1')}, "
        f"{where('image')}, {where('speech')}"
    ) in lines
    assert "new: model.layers.2.mlp.text.router.weight [2, 32] float32" in lines
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), *ROOM, "--moe-text", "2"]) == 0
    model = MoTForCausalLM.from_pretrained(tmp_path / "out")
    assert lines[-1].startswith(f"{sum(p.numel() for p in model.parameters()):,} parameters, ")
    size = sum(p.numel() * 4 for p in model.parameters())
    assert lines[-2] == f"{sum(p.numel() * 4 for p in dense.parameters()):,} bytes become {size:,}"


def test_lines_of_layers_are_merged_only_where_they_are_the_same():
    lines = [f"layers.{layer}.a -> layers.{layer}.b" for layer in (0, 10, 1)]
    assert merge_layers(["embeddings", *lines[:1], "head"]) == ["embeddings", lines[0], "head"]
    assert merge_layers([*lines, "layers.0.c -> layers.1.c"]) == [
        "layers.{0,1,10}.a -> layers.{0,1,10}.b",
        "layers.0.c -> layers.1.c",
    ]
    whole = [f"layers.{layer}.a" for layer in range(12)]
    assert merge_layers(sorted(whole)) == ["layers.{0..11}.a"]
    assert sorted(spelled_out("layers.{0..11}.a").splitlines()) == sorted(whole)


def test_the_recipe_and_the_command_that_starts_it_are_told(tmp_path, capsys):
    save_source(tmp_path / "source", "llama", tokenizer=True, max_position_embeddings=256)
    out = tmp_path / "a folder"
    words = ["--image-tokenizer", str(ASSETS / "processor" / "image_tokenizer"), "--freeze-text"]
    assert main([str(tmp_path / "source"), str(out), *words]) == 0
    first, told = capsys.readouterr().out.splitlines()
    assert first == str(out) and shlex.split(told)[-3:] == ["python", "training/train.py", str(out / "train.yaml")]
    assert told.endswith((out / "train.yaml").read_text().splitlines()[3].removeprefix("#   "))


def test_nothing_is_overwritten_without_being_told(tmp_path, capsys):
    _, out = converted(tmp_path, *ROOM)
    before = (out / "config.json").read_bytes()
    assert main([str(tmp_path / "source"), str(out), "--image-codes", "4"]) == 2
    assert "exists; name another folder, or replace it with --overwrite" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before
    assert main([str(tmp_path / "source"), str(out), "--image-codes", "4", "--overwrite"]) == 0
    assert json.loads((out / "config.json").read_text())["modalities"] == ["text", "image"]


@pytest.mark.parametrize("modalities", [["text", "image"], ["text", "image", "speech"]])
def test_without_tokenizers_there_is_room_for_the_usual_ones(tmp_path, capsys, modalities):
    source, out = tmp_path / "source", tmp_path / "out"
    dense = save_source(source, "llama")
    assert main([str(source), str(out), "--modalities", *modalities]) == 0
    config, said = MoTConfig.from_pretrained(out), capsys.readouterr().err
    sizes = {name: end - first for name, (first, end) in config.modality_token_ranges.items()}
    assert config.modalities == modalities and config.image_grid == [32, 32]
    assert sizes["image"] == 8192 and sizes.get("speech") == (500 if "speech" in modalities else None)
    assert "room for 8,192 image codes, 32 x 32 a picture" in said and ("500 speech units" in said) == (
        "speech" in modalities
    )
    ids = torch.randint(3, 60, (1, 9))
    mot = MoTForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    assert torch.equal(mot(ids).logits[..., :60], dense(ids).logits)


def test_what_was_made_of_what_is_recorded(tmp_path):
    _, out = converted(tmp_path, *ROOM, "--init", "image=fresh", "--seed", 3)
    record = json.loads((out / "conversion.json").read_text())
    assert record["command"] == "upcycle" and record["source"] == "source" and record["architecture"] == "llama"
    assert record["starts"] == {"text": "copy", "image": "fresh", "speech": "copy"} and record["seed"] == 3
    assert record["sha256"].keys() == {"model.safetensors"} and str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modalities", "text"], None),
        (["--image-codes", "4", "--modalities", "text"], "make text image"),
        (["--image-codes", "0"], "--image-codes 0 must be at least 1"),
        (["--image-codes", "4", "--init", "image"], "is not TOWER=START"),
        (["--image-codes", "4", *SET_OWN], "is no copy of the source; --init image=fresh draws it"),
        (["--image-codes", "4", "--set", 'tower_configs={"video": {}}'], "unknown tower of tower_configs video"),
        (["--image-codes", "4", "--init", "image=new"], "is none of copy, fresh and perturbed:STD"),
        (["--image-codes", "4", "--init", "speech=fresh"], "--init names 'speech'; the towers are text, image"),
        (["--image-codes", "4", "--share", "feed_forward", "--moe-text", "2"], "leaves none"),
        (
            ["--image-codes", "4", "--share", "attention", "feed_forward", "norm", "--init", "image=fresh"],
            "--share leaves nothing",
        ),
        (["--image-codes", "4", "--moe-text", "1"], "--moe-text 1 must be at least 2"),
        (["--image-codes", "4", "--set", "vocab_size=3"], "is not FIELD=VALUE of one of attention_dropout"),
        (["--image-codes", "4", "--set", "hidden_dropout=2"], "hidden_dropout=2 must be in"),
        (["--image-codes", "4", "--max-length", "65"], "longer than the source's max_position_embeddings=64"),
        (["--image-codes", "4", "--vae", "x"], "add --transfusion"),
        (["--image-codes", "4", "--freeze-text"], "needs a tokenizer beside SOURCE"),
        (["--image-codes", "4", "--max-shard-size", "big"], "max_shard_size='big'"),
        (["--modalities", "text", "speech", "--image-grid", "2", "2"], "--image-grid is of --image-codes"),
        (["--image-tokenizer", "nowhere"], "pictures or sound: "),
        (["--image-tokenizer", "nowhere", "--image-codes", "4"], "--image-codes follows from --image-tokenizer"),
        (["--transfusion"], "--transfusion needs --vae"),
        (["--transfusion", "--vae", "nowhere"], "no VAE could be read from nowhere"),
        ([*TRANSFUSION, "--image-codes", "4"], "leave --image-tokenizer and --image-codes out"),
        ([*TRANSFUSION, "--image-size", "33", "33"], "pictures or sound: "),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, message):
    save_source(tmp_path / "source", "llama")
    if message is None:
        assert main([str(tmp_path / "source"), str(tmp_path / "out"), *options]) == 0
    else:
        assert message in refusal(capsys, tmp_path, *options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma2"}, "caps logits"),
        ({"model_type": "phi3"}, "its projections are fused"),
        ({"model_type": "mixtral"}, "mixtures of experts with token choice"),
        ({"model_type": "nonesuch"}, "is not known. Those that can are llama, arcee, mistral"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized"),
        ({"rope_parameters": LONGROPE}, "rope_type='longrope' is not one of"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"logit_scale": 2.0}, "logit_scale=2.0, of which this conversion knows nothing"),
        ({"num_hidden_layers": 2}, "only in the source: model.layers.2.self_attn.v_proj.weight"),
        ({"num_hidden_layers": 4}, "only in the target: model.layers.3.mlp.image.up_proj.weight (from model.layers.3"),
        ({"intermediate_size": 64}, "has shape (48, 32), where config.json says (64, 32)"),
        ({"mlp_bias": True}, "only in the target: model.layers.0.mlp.text.up_proj.bias"),
        ({"tie_word_embeddings": True}, "lm_head.weight is stored and is not model.embed_tokens.weight"),
    ],
)
def test_sources_that_are_not_expressed(tmp_path, capsys, fields, message):
    save_source(tmp_path / "source", "llama")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    assert message in refusal(capsys, tmp_path, "--image-codes", "4")


def test_a_field_that_the_user_vouches_for_is_passed_over(tmp_path):
    save_source(tmp_path / "source", "llama")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"house_style": "blue"}))
    arguments = [str(tmp_path / "source"), str(tmp_path / "out"), "--image-codes", "4"]
    assert main(arguments) == 2
    assert main([*arguments, "--ignore-fields", "house_style"]) == 0


@torch.no_grad()
def test_a_window_is_refused_unless_sequences_stay_within_it(tmp_path, capsys):
    dense = save_source(tmp_path / "source", "mistral", sliding_window=24)
    message = refusal(capsys, tmp_path, "--image-codes", "4")
    assert "sliding_window=24" in message and "--max-length 24" in message
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--image-codes", "4", "--max-length", "24"]) == 0
    model = MoTForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    assert model.config.max_position_embeddings == 24
    ids = text_ids((2, 25))
    expected = dense(ids).logits
    logits = model(ids).logits[..., :60]
    torch.testing.assert_close(logits[:, :24], expected[:, :24], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits[:, 24], expected[:, 24], atol=1e-3)  # one token further it matters


def test_pickled_weights_are_not_read(tmp_path, capsys):
    save_source(tmp_path / "source", "llama")
    weights = tmp_path / "source" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "source" / "pytorch_model.bin")
    weights.unlink()
    assert "would be unpickled" in refusal(capsys, tmp_path, "--image-codes", "4")


def test_a_tied_output_layer_that_is_stored_all_the_same_is_passed_over(tmp_path):
    dense = save_source(tmp_path / "source", "llama-tied")
    weights = tmp_path / "source" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights, {"format": "pt"})
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--image-codes", "4"]) == 0
    model = MoTForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight[:60], dense.lm_head.weight)
