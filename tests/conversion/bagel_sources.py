"""BAGEL's own numbers for a tiny checkpoint, and random checkpoints of other sizes in its layout."""

import json
from math import isqrt
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


FIXTURES = Path(__file__).parent / "fixtures" / "bagel"
CHECKPOINT = FIXTURES / "checkpoint"
TOKEN_IDS = {"im_start": 150, "im_end": 151, "vision_start": 152, "vision_end": 153}


def numbers(name):
    return load_file(FIXTURES / f"{name}.safetensors")


def joined(patches, grid, size):
    """Patches, row by row and channel last, to what they were cut from.  (n, size * size * C) -> (C, H, W)"""
    rows, columns = grid
    return patches.view(rows, columns, size, size, -1).permute(4, 0, 2, 1, 3).reshape(-1, rows * size, columns * size)


def copy_of(picture_tokens, config):
    """A copy of a picture in a row, with its markers."""
    return [config.boi_token_id, *picture_tokens, config.eoi_token_id]


def latents_at(config, count):
    return copy_of([config.image_token_id] * int(count), config)


def features_at(config, count):
    return copy_of([config.placeholder_token_ids["vision"]] * int(count), config)


def training_batch(config, row):
    """A packed row of the original's training, as our forward takes it."""
    ids, kind = row["token_ids"].clone(), row["kind"]
    ids[kind == 1], ids[kind == 2] = config.placeholder_token_ids["vision"], config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[row["ce_indexes"]] = row["ce_labels"]

    # Images of the autoencoder, noised and clean.
    grids = row["latent_grids"].tolist()
    counts = [rows * columns for rows, columns in grids]
    noise = torch.zeros_like(row["latents"])
    for image, patches, grid in zip(noise, row["noise"].split(counts), grids):
        image[:, : 2 * grid[0], : 2 * grid[1]] = joined(patches, grid, 2)
    times = torch.stack([of_image[0] for of_image in row["times"].split(counts)])
    logits = torch.stack([of_image[0] for of_image in row["time_logits"].split(counts)])

    # Pictures of the vision encoder; the ids of its table say their grids.
    side, pictures = isqrt(config.encoders["vision"]["table_size"][0] ** 2), []
    lengths = row["vit_seqlens"].tolist()
    for patches, table_ids in zip(row["vit_patches"].split(lengths), row["vit_table_ids"].split(lengths)):
        last = int(table_ids.max())
        pictures.append(joined(patches, (last // side + 1, last % side + 1), 14))
    sizes = [list(picture.shape[1:]) for picture in pictures]
    pixels = torch.zeros(len(pictures), 3, *(max(size[axis] for size in sizes) for axis in (0, 1)))
    for place, picture in zip(pixels, pictures):
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    samples = row["sample_lens"]
    return {
        "input_ids": ids[None],
        "shift_labels": labels[None],
        "document_ids": torch.repeat_interleave(torch.arange(len(samples)), samples)[None],
        "latents": row["latents"],
        "image_sizes": [[2 * rows, 2 * columns] for rows, columns in grids],
        "timesteps": times * config.num_train_timesteps,
        "noise": noise,
        "clean_images": logits.isinf(),
        "encoder_pixel_values": pixels,
        "encoder_image_sizes": sizes,
    }


# ------------------------------------------------------------------------------------------------------- drawn pictures

GUIDED, HALF = (0.0, 1.0), (0.825, 1.0)
# Name: text scale, image scale, renormalisation, its minimum, interval, forwards of each step.
TEXT_CASES = {
    "plain": (1.0, 1.0, "global", 0.0, GUIDED, [1, 1, 1, 1]),
    "s4_global": (4.0, 1.0, "global", 0.0, GUIDED, [2, 2, 2, 2]),
    "s4_channel": (4.0, 1.0, "channel", 0.0, GUIDED, [2, 2, 2, 2]),
    "s4_text_channel": (4.0, 1.0, "text_channel", 0.0, GUIDED, [2, 2, 2, 2]),
    "s4_global_min08": (4.0, 1.0, "global", 0.8, GUIDED, [2, 2, 2, 2]),
    "s4_channel_min": (4.0, 1.0, "channel", 0.6, GUIDED, [2, 2, 2, 2]),
    "s1p1_channel": (1.1, 1.0, "channel", 0.0, GUIDED, [2, 2, 2, 2]),
    "s4_channel_min1": (4.0, 1.0, "channel", 1.0, GUIDED, [2, 2, 2, 2]),
    "s4_global_late_off": (4.0, 1.0, "global", 0.0, HALF, [2, 2, 1, 1]),
    "s4_global_edges": (4.0, 1.0, "global", 0.0, (0.5, 0.75), [1, 1, 2, 1]),
    "s4_global_early_off": (4.0, 1.0, "global", 0.0, (0.0, 0.95), [1, 2, 2, 2]),
}
EDIT_CASES = {
    "plain": (1.0, 1.0, "global", 0.0, GUIDED, [1, 1, 1, 1]),
    "s4_i2_global": (4.0, 2.0, "global", 0.0, GUIDED, [3, 3, 3, 3]),
    "s4_i2_channel": (4.0, 2.0, "channel", 0.0, GUIDED, [3, 3, 3, 3]),
    "s4_i2_text_channel": (4.0, 2.0, "text_channel", 0.0, GUIDED, [3, 3, 3, 3]),
    "s4_i1_text_channel": (4.0, 1.0, "text_channel", 0.0, GUIDED, [2, 2, 2, 2]),
    "s4_i2_text_channel_late_off": (4.0, 2.0, "text_channel", 0.0, HALF, [3, 3, 1, 1]),
    "s1_i2_global": (1.0, 2.0, "global", 0.0, GUIDED, [1, 1, 1, 1]),  # the original computes a second, and ignores it
}
CASES = [("text", name, case) for name, case in TEXT_CASES.items()]
CASES += [("edit", name, case) for name, case in EDIT_CASES.items()]


def drawing_arguments(case):
    """The arguments of `generate()` of a case."""
    scale, images, renorm, least, interval, _ = case
    return {
        "guidance_scale": scale, "image_guidance_scale": images, "guidance_renorm": renorm,
        "guidance_renorm_min": least, "guidance_interval": interval, "num_inference_steps": 5,
        "time_spacing": "points", "timestep_shift": 3.0,
    }  # fmt: skip


# A checkpoint of other sizes: three key heads, another depth of each part, other patches, sides and autoencoder.
OTHER = {
    "vocab": 90, "width": 48, "ffn": 80, "layers": 3, "heads": 6, "key_heads": 3, "vit_width": 24, "vit_ffn": 40,
    "vit_layers": 1, "vit_heads": 3, "vit_patch": 7, "vit_side": 5, "latent_side": 6, "latent_patch": 1, "z": 8,
    "ae_widths": [32, 32, 64], "ae_blocks": 2,
}  # fmt: skip


def write_checkpoint(folder, dtype=torch.float32, **changes):
    """Write a random checkpoint in BAGEL's layout; `changes` replace entries of `OTHER`."""
    sizes, generator = OTHER | changes, torch.Generator().manual_seed(0)
    folder.mkdir()
    for file, shapes in (("ema", _weights(sizes)), ("ae", _autoencoder(sizes))):
        tensors = {}
        for name, shape in shapes.items():
            # Norms and biases begin anywhere too, so that no tensor can be taken for another.
            scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.2
            tensors[name] = (torch.randn(shape, generator=generator) * scale + ("norm" in name)).to(dtype)
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
    llm = {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["ffn"],
        "max_position_embeddings": 256,
        "model_type": "qwen2",
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "num_key_value_heads": sizes["key_heads"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "tie_word_embeddings": True,  # which the loader overrides
        "vocab_size": sizes["vocab"],
    }
    vit = {
        "hidden_size": sizes["vit_width"],
        "image_size": sizes["vit_side"] * sizes["vit_patch"],
        "intermediate_size": sizes["vit_ffn"],
        "model_type": "siglip_vision_model",
        "num_attention_heads": sizes["vit_heads"],
        "num_hidden_layers": sizes["vit_layers"] + 1,
        "patch_size": sizes["vit_patch"],
    }
    for name, content in (("llm", llm), ("vit", vit)):
        (folder / f"{name}_config.json").write_text(json.dumps(content))
    return folder


def _linear(name, inputs, outputs, bias=True):
    return {f"{name}.weight": [outputs, inputs]} | ({f"{name}.bias": [outputs]} if bias else {})


def _norm(name, width):
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def _weights(sizes):
    width, head = sizes["width"], sizes["width"] // sizes["heads"]
    keys, model = head * sizes["key_heads"], "language_model.model"
    shapes = {f"{model}.embed_tokens.weight": [sizes["vocab"], width]}
    shapes["language_model.lm_head.weight"] = [sizes["vocab"], width]
    for tower in ("", "_moe_gen"):
        shapes[f"{model}.norm{tower}.weight"] = [width]
        for layer in (f"{model}.layers.{index}" for index in range(sizes["layers"])):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{norm}{tower}.weight"] = [width]
            attention = f"{layer}.self_attn"
            shapes |= _linear(f"{attention}.q_proj{tower}", width, width)
            shapes |= _linear(f"{attention}.k_proj{tower}", width, keys)
            shapes |= _linear(f"{attention}.v_proj{tower}", width, keys)
            shapes |= _linear(f"{attention}.o_proj{tower}", width, width, bias=False)
            shapes |= {f"{attention}.{name}_norm{tower}.weight": [head] for name in "qk"}
            shapes |= _linear(f"{layer}.mlp{tower}.gate_proj", width, sizes["ffn"], bias=False)
            shapes |= _linear(f"{layer}.mlp{tower}.up_proj", width, sizes["ffn"], bias=False)
            shapes |= _linear(f"{layer}.mlp{tower}.down_proj", sizes["ffn"], width, bias=False)
    values, vit, inner = sizes["latent_patch"] ** 2 * sizes["z"], "vit_model.vision_model", sizes["vit_width"]
    shapes |= _linear("vae2llm", values, width) | _linear("llm2vae", width, values)
    shapes |= _linear("time_embedder.mlp.0", 256, width) | _linear("time_embedder.mlp.2", width, width)
    shapes |= _linear("connector.fc1", inner, width) | _linear("connector.fc2", width, width)
    shapes["latent_pos_embed.pos_embed"] = [sizes["latent_side"] ** 2, width]
    shapes["vit_pos_embed.pos_embed"] = [sizes["vit_side"] ** 2, width]
    shapes |= _linear(f"{vit}.embeddings.patch_embedding", 3 * sizes["vit_patch"] ** 2, inner)
    shapes[f"{vit}.embeddings.position_embedding.weight"] = [sizes["vit_side"] ** 2, inner]
    for layer in (f"{vit}.encoder.layers.{index}" for index in range(sizes["vit_layers"])):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", inner, inner)
        shapes |= _linear(f"{layer}.mlp.fc1", inner, sizes["vit_ffn"])
        shapes |= _linear(f"{layer}.mlp.fc2", sizes["vit_ffn"], inner)
        shapes |= _norm(f"{layer}.layer_norm1", inner) | _norm(f"{layer}.layer_norm2", inner)
    return shapes | _norm(f"{vit}.post_layernorm", inner)


def _autoencoder(sizes):
    widths, z, blocks = sizes["ae_widths"], sizes["z"], sizes["ae_blocks"]

    def conv(name, inputs, outputs, kernel=3):
        return {f"{name}.weight": [outputs, inputs, kernel, kernel], f"{name}.bias": [outputs]}

    def resnet(name, inputs, outputs):
        made = _norm(f"{name}.norm1", inputs) | conv(f"{name}.conv1", inputs, outputs)
        made |= _norm(f"{name}.norm2", outputs) | conv(f"{name}.conv2", outputs, outputs)
        return made | (conv(f"{name}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {})

    def middle(coder, width):
        made = resnet(f"{coder}.mid.block_1", width, width) | resnet(f"{coder}.mid.block_2", width, width)
        for name in ("q", "k", "v", "proj_out"):
            made |= conv(f"{coder}.mid.attn_1.{name}", width, width, 1)
        return made | _norm(f"{coder}.mid.attn_1.norm", width)

    shapes = conv("encoder.conv_in", 3, widths[0]) | conv("decoder.conv_in", z, widths[-1])
    shapes |= middle("encoder", widths[-1]) | middle("decoder", widths[-1])
    shapes |= _norm("encoder.norm_out", widths[-1]) | conv("encoder.conv_out", widths[-1], 2 * z)
    shapes |= _norm("decoder.norm_out", widths[0]) | conv("decoder.conv_out", widths[0], 3)
    for depth, width in enumerate(widths):
        inputs = widths[max(depth - 1, 0)]
        for block in range(blocks):
            shapes |= resnet(f"encoder.down.{depth}.block.{block}", width if block else inputs, width)
        inputs = widths[min(depth + 1, len(widths) - 1)]
        for block in range(blocks + 1):
            shapes |= resnet(f"decoder.up.{depth}.block.{block}", width if block else inputs, width)
        if depth < len(widths) - 1:
            shapes |= conv(f"encoder.down.{depth}.downsample.conv", width, width)
        if depth:
            shapes |= conv(f"decoder.up.{depth}.upsample.conv", width, width)
    return shapes
