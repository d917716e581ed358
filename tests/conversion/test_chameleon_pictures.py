"""Pictures of an imported Chameleon: drawn with the decoder of its VQGAN, wherever that comes from."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ChameleonForConditionalGeneration, ChameleonImageProcessorPil

from conversion.chameleon_pictures import vqgan_rules
from conversion.checkpoints import CheckpointReader
from conversion.import_chameleon import VQ_VAE
from conversion.key_maps import KeyMap
from modeling_mot import MoTForCausalLM, MoTProcessor

from .chameleon_sources import (
    LAYOUTS,
    NUM_CODES,
    add_decoder,
    chameleon_model,
    convert,
    expected_picture,
    picture,
    refused,
    save_source,
    vocabulary,
)


@pytest.fixture(scope="module")
def small_source(tmp_path_factory):
    return save_source(chameleon_model(**LAYOUTS["7b"]), tmp_path_factory.mktemp("small"))


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


def test_the_map_of_the_vqgan_reads_in_both_directions(small_source, tmp_path):
    add_decoder(small_source, tmp_path / "with")
    key_map = KeyMap(vqgan_rules(3))
    names = [name.removeprefix(VQ_VAE) for name in CheckpointReader(tmp_path / "with").names if VQ_VAE in name]
    assert [key_map.backward(target).name for name in names for target in key_map.forward(name)] == names


def test_a_tensor_too_many_in_the_vqvae_is_listed(small_source, tmp_path, capsys):
    add_decoder(small_source, tmp_path / "with")
    tensors = load_file(tmp_path / "with" / "model.safetensors")
    tensors[f"{VQ_VAE}decoder.up.0.attn.0.q.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "with" / "model.safetensors")
    assert "only in the source: decoder.up.0.attn.0.q.weight" in refused(capsys, tmp_path / "with", tmp_path / "out")


def test_a_decoder_of_another_codebook_is_refused(small_source, tmp_path, capsys):
    add_decoder(small_source, tmp_path / "with")
    tensors = load_file(tmp_path / "with" / "model.safetensors")
    tensors[f"{VQ_VAE}quantize.embedding.weight"] += 1
    save_file(tensors, tmp_path / "with" / "model.safetensors")
    out = tmp_path / "out"
    assert "codebook" in refused(capsys, small_source, out, "--image-decoder", tmp_path / "with")
    assert "holds no decoder" in refused(capsys, small_source, out, "--image-decoder", small_source)


def test_a_picture_is_generated_and_drawn(small_source, tmp_path):
    add_decoder(small_source, tmp_path / "with")
    out = convert(tmp_path / "with", tmp_path / "out")
    model, processor = MoTForCausalLM.from_pretrained(out), MoTProcessor.from_pretrained(out)
    prompt = processor([{"type": "text", "text": "a"}], continue_with="image", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=17, do_sample=False)
    new = made[0, prompt["input_ids"].shape[1] :]
    assert ((new[:16] >= 4) & (new[:16] < 4 + NUM_CODES)).all() and new[16] == vocabulary()["<eoss>"]
    assert [segment["type"] for segment in processor.decode_document(made)] == ["text", "image"]


def test_a_source_without_its_vqvae_is_refused(small_source, tmp_path, capsys):
    shutil.copytree(small_source, tmp_path / "bare")
    tensors = load_file(tmp_path / "bare" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if VQ_VAE not in name},
        tmp_path / "bare" / "model.safetensors",
    )
    assert "holds no VQ-VAE" in refused(capsys, tmp_path / "bare", tmp_path / "out")
