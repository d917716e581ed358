"""Chameleon checkpoints as transformers saves them, and the MoT that each becomes: logits, ids, refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
)

from conversion.checkpoints import CheckpointReader
from conversion.import_chameleon import CHAMELEON, VQ_VAE, main
from modeling_mot import MoTForCausalLM, MoTProcessor
from modeling_mot.processing_vocabulary import without_codes

from ..modeling_mot.test_remote_code import run_clean
from ..modeling_mot.test_speech_tokenizer import chirp, tokenizer_with_random_units
from .chameleon_sources import (
    LAYOUTS,
    NUM_CODES,
    VQ,
    chameleon_model,
    convert,
    picture,
    refused,
    save_source,
    vocabulary,
    with_picture,
)
from .sources import spelled_out


@pytest.fixture(scope="module", params=LAYOUTS)
def source(request, tmp_path_factory):
    """(model, folder) of each layout."""
    model = chameleon_model(**LAYOUTS[request.param])
    return model, save_source(model, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def small_source(tmp_path_factory):
    return save_source(chameleon_model(**LAYOUTS["7b"]), tmp_path_factory.mktemp("small"))


# ------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("variant", ["mot", "dense", "untied-feed-forward-qkv", "untied-feed-forward-attention"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_equal_transformers_bit_for_bit(source, tmp_path, variant, attention):
    _, folder = source
    out = convert(folder, tmp_path / "out", "--variant", variant)
    theirs = ChameleonForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
    ours = MoTForCausalLM.from_pretrained(out, attn_implementation=attention)
    is_code = torch.zeros(len(vocabulary()), dtype=torch.bool)
    is_code[theirs.model.vocabulary_mapping.image_tokens] = True
    text = {"input_ids": torch.randint(70, len(vocabulary()), (2, 20))}
    for inputs, ids in (with_picture(theirs, folder), (text, text["input_ids"])):
        expected, made = theirs(**inputs).logits, ours(ids).logits
        assert torch.equal(made[..., ~is_code], expected[..., ~is_code])
        # Those of codes, which transformers hides, follow from its hidden states.
        unmasked = theirs.lm_head(theirs.model(**inputs).last_hidden_state)
        assert not torch.equal(expected, unmasked) and torch.equal(made, unmasked)


def test_greedy_generation_equals_transformers(source, tmp_path):
    theirs, folder = source
    ours = MoTForCausalLM.from_pretrained(convert(folder, tmp_path / "out"))
    inputs, ids = with_picture(theirs, folder)
    barred = {"suppress_tokens": [vocabulary()["<racm3:break>"], vocabulary()["<eoss>"]]}  # ours would draw after it
    settings = {"max_new_tokens": 12, "do_sample": False, **barred}
    expected = theirs.generate(**inputs, **settings)[0, ids.shape[1] :]
    assert ours.generate(ids, **settings)[0, ids.shape[1] :].tolist() == expected.tolist()


@torch.no_grad()
def test_tied_and_biased_and_sharded(tmp_path):
    model = chameleon_model(**LAYOUTS["7b"], tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    folder = save_source(model, tmp_path / "source", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    out = convert(folder, tmp_path / "out", "--max-shard-size", "60KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    ids = torch.randint(70, len(vocabulary()), (1, 12))
    made = MoTForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert torch.equal(made.model(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_dtype_is_converted_tensor_by_tensor(small_source, tmp_path):
    out = convert(small_source, tmp_path / "out", "--dtype", "bfloat16")
    source, made = load_file(small_source / "model.safetensors"), load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    for tower in ("text", "image"):
        name = "model.layers.1.mlp.{}up_proj.weight"
        assert torch.equal(made[name.format(f"{tower}.")], source[name.format("")].bfloat16())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


# ------------------------------------------------------------------------------------------------------ ids and codes


@pytest.mark.parametrize("size", [(16, 16), (21, 37), (50, 17), (9, 9)])
def test_ids_of_pictures_equal_transformers(source, tmp_path, size):
    theirs, folder = source
    processor = MoTProcessor.from_pretrained(convert(folder, tmp_path / "out"))
    shown = [picture(*size), picture(*size, seed=1).convert("L"), picture(*size, seed=2).convert("RGBA")]
    shown[2].putalpha(100)
    for image in shown:
        pixels = ChameleonImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
        expected = theirs.model.get_image_tokens(pixels).flatten().tolist()
        ids = vocabulary()
        assert processor.encode_images([image])[0] == [ids["<racm3:break>"], *expected, ids["<eoss>"]]


def test_prompts_equal_transformers_processor(source, tmp_path):
    theirs, folder = source
    processor = MoTProcessor.from_pretrained(convert(folder, tmp_path / "out"))
    _, expected = with_picture(theirs, folder)
    made = processor(text="a<image>b<reserved08706>", images=[picture()], return_tensors="pt")
    assert made["input_ids"].tolist() == expected.tolist()
    inside = (expected >= 4) & (expected < 4 + NUM_CODES)
    assert torch.equal(made["modality_ids"], inside.long()) and inside.sum() == 16


def test_a_chat_ends_every_turn_as_chameleon_does(small_source, tmp_path):
    processor = MoTProcessor.from_pretrained(convert(small_source, tmp_path / "out"))
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": picture()}]}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
    expected = ChameleonProcessor.from_pretrained(small_source)(picture(), "a<image>", return_tensors="pt")["input_ids"]
    assert ids.shape == expected.shape
    codes = expected == vocabulary()["<image>"]
    assert torch.equal(ids[~codes], expected[~codes])


@pytest.mark.parametrize("begins", [True, False])
def test_text_and_a_template_of_the_sources_own_give_its_ids(small_source, tmp_path, begins):
    folder = shutil.copytree(small_source, tmp_path / "source")
    if not begins:
        settings = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(settings | {"post_processor": None}))
    template = "\n {{ bos_token }}{% for m in messages %}{{ m['content'] + '<reserved08706>' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    source = AutoTokenizer.from_pretrained(folder)
    processor = MoTProcessor.from_pretrained(convert(folder, tmp_path / "out"))
    for text in ("a cat", " a  b\n", "", "x</s>y"):
        assert processor(text=text)["input_ids"] == source(text)["input_ids"]
    document = [{"type": "text", "text": "a cat"}]
    assert processor(document, add_eos=False)["input_ids"] == source("a cat")["input_ids"]
    assert (processor.bos_token_id == 0) == begins
    chat = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": " b"}]
    expected = source.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert processor.apply_chat_template(chat, tokenize=True) == expected
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    assert processor.apply_chat_template(parts, tokenize=False) == "\n <s><image>a<reserved08706>"


def test_text_that_spells_a_code_stays_text(small_source, tmp_path):
    processor = MoTProcessor.from_pretrained(convert(small_source, tmp_path / "out"))
    document = [{"type": "text", "text": "<|image_3|> <racm3:break> IMGIMGAZ"}]
    ids = processor(document)["input_ids"]
    assert set(processor.modality_ids_of(ids)) == {0} and vocabulary()["<racm3:break>"] not in ids
    assert processor.decode_document(ids) == document


def test_configuration_names_chameleons_tokens(small_source, tmp_path):
    config = MoTForCausalLM.from_pretrained(convert(small_source, tmp_path / "out")).config
    ids = vocabulary()
    assert config.modality_token_ranges == {"text": [0, len(ids)], "image": [4, 4 + NUM_CODES]}
    named = [getattr(config, f"{name}_token_id") for name in ("bos", "pad", "eos", "eoi", "boi")]
    assert named == [ids[name] for name in ("<s>", "<pad>", "</s>", "<eoss>", "<racm3:break>")]
    assert config.image_grid == [4, 4]


def test_codes_may_be_added_tokens_of_the_source(small_source, tmp_path):
    folder = shutil.copytree(small_source, tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([name for name in vocabulary() if name.startswith("IMGIMG")])
    tokenizer.save_pretrained(folder)
    first, second = (
        MoTProcessor.from_pretrained(convert(source, tmp_path / name))
        for name, source in (("first", small_source), ("second", folder))
    )
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    prompt = {"text": "a<image>b", "images": [picture()]}
    assert first(**prompt)["input_ids"] == second(**prompt)["input_ids"]


@torch.no_grad()
def test_speech_is_added_behind_the_vocabulary(small_source, tmp_path):
    tokenizer_with_random_units(num_units=6).save_pretrained(tmp_path / "speech")
    options = ["--modalities", "text", "image", "speech", "--speech-tokenizer", str(tmp_path / "speech")]
    out = convert(small_source, tmp_path / "out", *options)
    processor, size = MoTProcessor.from_pretrained(out), len(vocabulary())
    ours = MoTForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    assert ours.config.tower_names == ["text", "image", "speech"]
    assert ours.config.modality_token_ranges == {
        "text": [0, size + 6],
        "image": [4, 4 + NUM_CODES],
        "speech": [size, size + 6],
    }
    sound = processor([{"type": "text", "text": "a"}, {"type": "audio", "audio": chirp()}], return_tensors="pt")
    units = sound["input_ids"] >= size
    assert units.sum() > 10 and torch.equal(sound["modality_ids"], 2 * units.long())
    theirs = ChameleonForConditionalGeneration.from_pretrained(small_source, attn_implementation="sdpa")
    inputs, ids = with_picture(theirs, small_source)
    expected = theirs.lm_head(theirs.model(**inputs).last_hidden_state)
    assert torch.equal(ours(ids).logits[..., :size], expected)


def test_room_for_speech_needs_no_tokenizer_of_it(small_source, tmp_path, capsys):
    out, speech = tmp_path / "out", ["--modalities", "text", "image", "speech"]
    convert(small_source, out, *speech)
    assert MoTForCausalLM.from_pretrained(out).config.vocab_size == len(vocabulary()) + 500
    assert MoTProcessor.from_pretrained(out).modalities == ["text", "image", "speech"]
    other = tmp_path / "other"
    assert "--modalities text image speech" in refused(capsys, small_source, other, "--speech-units", "5")
    assert "at least 1" in refused(capsys, small_source, other, *speech, "--speech-units", "0")
    assert "has text and image" in refused(capsys, small_source, other, "--modalities", "text", "speech")
    assert "--speech-tokenizer" in refused(
        capsys, small_source, other, *speech, "--speech-tokenizer", tmp_path / "none"
    )


# ---------------------------------------------------------------------------------------------------- whole, and alone


LOAD = """
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="a<image>b", images=[Image.new("RGB", (20, 30), "red")], return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
assert made.shape[1] == inputs["input_ids"].shape[1] + 3
assert model.config.tower_names == ["text", "image"]
print("generated")
"""


def test_the_folder_loads_and_generates_in_a_clean_process(small_source, tmp_path):
    out = convert(small_source, tmp_path / "out")
    assert "generated" in run_clean(LOAD, out, tmp_path)


def test_the_map_reads_in_both_directions(small_source, tmp_path):
    out = convert(small_source, tmp_path / "out")
    key_map = CHAMELEON.key_map(MoTForCausalLM.from_pretrained(out).config)
    source = [name for name in CheckpointReader(small_source).names if not name.startswith(VQ_VAE)]
    target = CheckpointReader(out).names
    assert sorted(made for name in source for made in key_map.forward(name)) == sorted(target)
    assert {key_map.backward(name).name for name in target} == set(source)


def test_a_dry_run_prints_every_tensor_and_writes_nothing(small_source, tmp_path, capsys):
    assert main([str(small_source), str(tmp_path / "out"), "--dry-run"]) == 0
    printed = spelled_out(capsys.readouterr().out)
    line = "model.norm.weight [32] -> model.norm.text.weight, model.norm.image.weight"
    assert line in printed.splitlines() and "towers text, image;" in printed and "none is drawn" in printed
    assert all(f"{name} [" in printed for name in CheckpointReader(small_source).names)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_told(small_source, tmp_path, capsys):
    out = convert(small_source, tmp_path / "out")
    assert main([str(small_source), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    convert(small_source, out, "--variant", "dense", "--overwrite")
    assert MoTForCausalLM.from_pretrained(out).config.tower_names == ["shared"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------------------ refusals


def changed(folder, out, **fields):
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | fields))
    return out


def test_refusals_name_the_field_and_leave_nothing(small_source, tmp_path, capsys):
    ids, out = vocabulary(), tmp_path / "out"
    holes = {name: index + (index == 5) * 500 for name, index in ids.items()}
    cases = {
        "type": ({"model_type": "llama"}, "model_type='llama'"),
        "map": ({"vocabulary_map": None}, "vocabulary_map in the source's config.json lacks <pad>"),
        "holes": ({"vocabulary_map": holes}, "not one range"),
        "codes": ({"vq_config": VQ | {"num_embeddings": 63}}, "the VQ-VAE has 63"),
        "unknown": ({"logit_scale": 2.0}, "logit_scale=2.0"),
        "shape": ({"intermediate_size": 64}, "mlp.gate_proj.weight has shape (48, 32)"),
        "layers": ({"num_hidden_layers": 1}, "only in the source: model.layers.1.mlp.down_proj.weight"),
        "heads": ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of"),
        "vq": ({"vq_config": VQ | {"base_channels": 64}}, "not what its vq_config says"),
    }
    for name, (fields, message) in cases.items():
        folder = changed(small_source, tmp_path / name, **fields)
        assert message in refused(capsys, folder, out)
        assert not out.exists()


def test_pickled_weights_are_refused(small_source, tmp_path, capsys):
    shutil.copytree(small_source, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert "unpickled" in refused(capsys, tmp_path / "pickled", tmp_path / "out")


def test_a_source_without_a_tokenizer_still_gets_its_image_tokenizer(small_source, tmp_path):
    shutil.copytree(small_source, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "processor*"))
    out = convert(tmp_path / "bare", tmp_path / "out")
    assert (out / "image_tokenizer" / "image_tokenizer_config.json").is_file()
    assert not (out / "tokenizer.json").exists()


def test_codes_in_the_midst_of_text_are_not_taken_out(small_source, tmp_path):
    processor = MoTProcessor.from_pretrained(convert(small_source, tmp_path / "out"))
    with pytest.raises(ValueError, match="in the midst of text"):
        without_codes(processor.tokenizer)
