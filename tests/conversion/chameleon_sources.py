"""Tiny Chameleon checkpoints as transformers saves them, and the VQGAN's decoder that some have beside them."""

import shutil
import sys

import numpy as np
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

from conversion.import_chameleon import VQ_VAE, main


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


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return message


if __name__ == "__main__":  # a checkpoint to try things on
    save_source(chameleon_model(**LAYOUTS["7b"]), sys.argv[1])
