"""Chameleon checkpoints as transformers saves them, and the MoT that each becomes: logits, ids, pictures, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from conversion.chameleon_pictures import vqgan_rules
from conversion.checkpoints import CheckpointReader
from conversion.import_chameleon import CHAMELEON, VQ_VAE, main
from conversion.key_maps import KeyMap
from modeling_mot import MoTForCausalLM, MoTProcessor

from ..modeling_mot.test_remote_code import run_clean
from ..modeling_mot.test_speech_tokenizer import chirp, tokenizer_with_random_units


NUM_CODES = 64
VQ = {
    "embed_dim": 8,
    "num_embeddings": NUM_CODES,
    "latent_channels": 8,
    "resolution": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
# What tells the two released sizes apart beside their dimensions.
LAYOUTS = {
    "7b": {"num_key_value_heads": 4, "swin_norm": False},
    "34b": {"num_key_value_heads": 2, "swin_norm": True, "model_parallel_size": 4},
}


def vocabulary():
    """The order of Chameleon's: specials, codes (here not in the order of their numbers), markers, reserved, text."""
    digits = "".maketrans("0123456789", "ABCDEFGHIJ")
    codes = np.random.default_rng(0).permutation(NUM_CODES)
    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"IMGIMG{str(code).translate(digits)}Z" for code in codes)]
    names += ["<eoss>", "<racm3:break>", *(f"<reserved{number:05}>" for number in range(8698, 8707)), "<image>"]
    return {name: index for index, name in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def chameleon_tokenizer():
    backend = Tokenizer(models.BPE(vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="<reserved08706>", **named)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<racm3:break>", "<eoss>"]})
    return tokenizer


def chameleon_model(**fields):
    torch.manual_seed(0)
    ids = vocabulary()
    config = ChameleonConfig(
        **SIZES | fields, vocab_size=len(ids), vocabulary_map=ids, vq_config=VQ, bos_token_id=1, pad_token_id=1
    )
    model = ChameleonForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
        elif "vqmodel" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_source(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    pictures = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    ChameleonProcessor(pictures, chameleon_tokenizer(), image_seq_length=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=LAYOUTS)
def source(request, tmp_path_factory):
    """(model, folder) of each layout."""
    model = chameleon_model(**LAYOUTS[request.param])
    return model, save_source(model, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def small_source(tmp_path_factory):
    return save_source(chameleon_model(**LAYOUTS["7b"]), tmp_path_factory.mktemp("small"))


def picture(height=21, width=37, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def convert(folder, out, *options):
    assert main([str(folder), str(out), *options]) == 0
    return out


def with_picture(model, folder):
    """Ids of a prompt with a picture: what transformers' processor gives, its placeholders replaced by the codes."""
    inputs = ChameleonProcessor.from_pretrained(folder)(picture(), "a<image>b", return_tensors="pt")
    codes = model.model.get_image_tokens(inputs["pixel_values"]).flatten()
    return inputs, inputs["input_ids"].masked_scatter(inputs["input_ids"] == vocabulary()["<image>"], codes.long())


# ------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("variant", ["mot", "dense", "untied-feed-forward-attention"])
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


# ------------------------------------------------------------------------------------------------------------ drawing


def add_decoder(folder, out):
    """A checkpoint with the VQGAN's decoder, as those that draw have it; and the decoder, by Janus's code."""
    shutil.copytree(folder, out)
    config = JanusVQVAEConfig(out_channels=3, **{name: VQ[name] for name in VQ if name != "resolution"})
    torch.manual_seed(1)
    decoder = JanusVQVAEDecoder(config).eval()
    for level in decoder.up:
        level.attn = torch.nn.ModuleList()  # Chameleon's has attention in the middle only
    tensors = load_file(out / "model.safetensors")
    last = len(VQ["channel_multiplier"]) - 1
    for name, tensor in decoder.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up":  # Janus numbers from the coarsest scale
            parts[1] = str(last - int(parts[1]))
        tensors[f"{VQ_VAE}decoder.{'.'.join(parts)}"] = tensor.clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return decoder


@torch.no_grad()
def expected_picture(model, decoder, image_ids):
    codes = torch.tensor([model.model.vocabulary_mapping.bpe2img[token] for token in image_ids])
    latents = model.model.vqmodel.quantize.embedding(codes).view(1, 4, 4, -1).permute(0, 3, 1, 2)
    pixels = decoder(model.model.vqmodel.post_quant_conv(latents))[0].clamp(-1, 1)
    return ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("given", ["own", "folder", "file", "diffusers"])
def test_pictures_are_drawn_with_a_decoder(small_source, tmp_path, given):
    decoder = add_decoder(small_source, tmp_path / "with")
    if given == "own":
        out = convert(tmp_path / "with", tmp_path / "out")
    else:
        path = {"folder": tmp_path / "with", "file": tmp_path / "with" / "model.safetensors"}.get(given)
        if given == "diffusers":
            path = convert(tmp_path / "with", tmp_path / "before") / "image_tokenizer"
            shuffled = load_file(path / "diffusion_pytorch_model.safetensors")  # back to the source's order of codes
            ids = sorted(codes_of_ids().items())
            original = torch.empty_like(shuffled["quantize.embedding.weight"])
            original[[code for _, code in ids]] = shuffled["quantize.embedding.weight"]
            save_file(shuffled | {"quantize.embedding.weight": original}, path / "diffusion_pytorch_model.safetensors")
        out = convert(small_source, tmp_path / "out", "--image-decoder", str(path))
    processor = MoTProcessor.from_pretrained(out)
    model = ChameleonForConditionalGeneration.from_pretrained(small_source)
    ids = processor.encode_images([picture()])[0]
    pixels = ChameleonImageProcessorPil.from_pretrained(small_source)(picture(), return_tensors="pt")["pixel_values"]
    assert ids[1:-1] == model.model.get_image_tokens(pixels).flatten().tolist()
    drawn = np.asarray(processor.decode_document(ids)[0]["image"], dtype=np.float32)
    assert np.abs(drawn - expected_picture(model, decoder, ids[1:-1])).max() <= 0.51


def codes_of_ids():
    return chameleon_model(**LAYOUTS["7b"]).model.vocabulary_mapping.bpe2img


def test_without_a_decoder_the_error_says_what_to_do(small_source, tmp_path):
    processor = MoTProcessor.from_pretrained(convert(small_source, tmp_path / "out"))
    with pytest.raises(NotImplementedError, match="no decoder.*--image-decoder"):
        processor.decode_document(processor.encode_images([picture()])[0])


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


def test_the_map_of_the_vqgan_reads_in_both_directions(small_source, tmp_path):
    add_decoder(small_source, tmp_path / "with")
    key_map = KeyMap(vqgan_rules(3))
    names = [name.removeprefix(VQ_VAE) for name in CheckpointReader(tmp_path / "with").names if VQ_VAE in name]
    assert [key_map.backward(target).name for name in names for target in key_map.forward(name)] == names


def test_a_dry_run_prints_every_tensor_and_writes_nothing(small_source, tmp_path, capsys):
    assert main([str(small_source), str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
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


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return message


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
        "vq": ({"vq_config": VQ | {"base_channels": 64}}, "not what its vq_config says"),
    }
    for name, (fields, message) in cases.items():
        folder = changed(small_source, tmp_path / name, **fields)
        assert message in refused(capsys, folder, out)
        assert not out.exists()


def test_a_tensor_too_many_in_the_vqvae_is_listed(small_source, tmp_path, capsys):
    decoder = add_decoder(small_source, tmp_path / "with")
    tensors = load_file(tmp_path / "with" / "model.safetensors")
    tensors[f"{VQ_VAE}decoder.up.0.attn.0.q.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "with" / "model.safetensors")
    assert decoder is not None
    assert "only in the source: decoder.up.0.attn.0.q.weight" in refused(capsys, tmp_path / "with", tmp_path / "out")


def test_a_decoder_of_another_codebook_is_refused(small_source, tmp_path, capsys):
    add_decoder(small_source, tmp_path / "with")
    tensors = load_file(tmp_path / "with" / "model.safetensors")
    tensors[f"{VQ_VAE}quantize.embedding.weight"] += 1
    save_file(tensors, tmp_path / "with" / "model.safetensors")
    out = tmp_path / "out"
    assert "codebook" in refused(capsys, small_source, out, "--image-decoder", tmp_path / "with")
    assert "holds no decoder" in refused(capsys, small_source, out, "--image-decoder", small_source)


def test_pickled_weights_are_refused(small_source, tmp_path, capsys):
    shutil.copytree(small_source, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert "unpickled" in refused(capsys, tmp_path / "pickled", tmp_path / "out")


def test_a_source_without_a_tokenizer_still_gets_its_image_tokenizer(small_source, tmp_path):
    shutil.copytree(small_source, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "processor*"))
    out = convert(tmp_path / "bare", tmp_path / "out")
    assert (out / "image_tokenizer" / "image_tokenizer_config.json").is_file()
    assert not (out / "tokenizer.json").exists()
