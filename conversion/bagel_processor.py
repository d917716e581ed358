"""BAGEL's tokenizer and preparation of pictures as a processor of ours, and its settings of generation.

No file of a BAGEL folder says how its code prepares pictures and draws. What stands here is what that code does when it
answers, draws and edits.
"""

from collections.abc import Mapping
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from conversion.commands import reading
from conversion.key_maps import ConversionError
from conversion.vocabulary import has_tokenizer
from modeling_mot import MoTProcessor, MoTTransfusionConfig
from modeling_mot.hub_trust import load_tokenizer
from modeling_mot.image_processing import MoTImageProcessor
from modeling_mot.processing_vocabulary import set_special_attributes, special


# The tokens that BAGEL adds to a tokenizer that lacks them, in its order.
TOKENS = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
# Qwen's tokens for patches, which BAGEL has no use for.
PLACEHOLDERS = {"image": "<|image_pad|>", "vision": "<|vision_pad|>"}
# Files of a tokenizer that name settings. A processor of ours writes its own.
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

# The largest pictures of the autoencoder (1024) and of the encoder (980) are what their tables of positions hold.
SHORTEST_LATENTS, SHORTEST_FEATURES = 512, 224
MOST_PIXELS = 14 * 14 * 9 * 1024
FLUX_DOWNSAMPLING = 8
# The texts that ask for a thought, in words of ours. `--thinking-prompts` gives those that a checkpoint has learnt.
THINKING_PROMPTS = {
    "text": "Reason before you answer. Write the reasoning between <think> and </think>, and the answer behind it.",
    "image": "Plan before you draw. Write the plan between <think> and </think>, and draw the image behind it.",
}


def bagel_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase | None, int]:
    """Load the tokenizer of a folder, with the tokens that it lacks behind it.

    Returns:
        the tokenizer, None if there is none; and how many tokens it had before.

    Raises:
        ConversionError: it cannot be loaded.
    """
    if not has_tokenizer(folder):
        return None, 0
    with reading(f"the tokenizer in {folder} cannot be loaded"):
        tokenizer = load_tokenizer(folder)
    size, known = len(tokenizer), tokenizer.get_vocab()
    missing = [token for token in (*TOKENS.values(), *PLACEHOLDERS.values()) if token not in known]
    tokenizer.add_tokens(list(map(special, missing)), special_tokens=True)
    return tokenizer, size


def bagel_processor(
    tokenizer: PreTrainedTokenizerBase, config: MoTTransfusionConfig, thinking_prompts: Mapping[str, str]
) -> MoTProcessor:
    """Make the processor of a BAGEL.

    Args:
        tokenizer: of `bagel_tokenizer`; it is changed.
        config: of the model.
        thinking_prompts: "text" or "image" -> the text that asks for a thought before such an answer.

    Raises:
        ConversionError: a tokenizer or prompts that no processor of ours has.
    """
    tokenizer.bos_token, tokenizer.eos_token = TOKENS["im_start"], TOKENS["im_end"]
    tokenizer.pad_token = tokenizer.pad_token or TOKENS["im_end"]
    markers = {"boi_token": TOKENS["vision_start"], "eoi_token": TOKENS["vision_end"]}
    placeholders = {f"{name}_token": token for name, token in PLACEHOLDERS.items()}
    set_special_attributes(tokenizer, markers | placeholders)
    side = config.patch_size * (FLUX_DOWNSAMPLING if config.vae_config is None else config.vae_downsampling)
    patch = config.encoders["vision"]["patch_size"]
    pictures = scaling_of_table(side, config.latent_position_table_size[0], SHORTEST_LATENTS)
    seen = scaling_of_table(patch, config.continuous_modalities["vision"]["position_table_size"][0], SHORTEST_FEATURES)
    try:
        return MoTProcessor(
            tokenizer,
            image_processor=pictures,
            encoder_processor=seen,
            frames_texts=True,
            thinking_prompts=dict(thinking_prompts),
        )
    except ValueError as error:
        raise ConversionError(f"the processor of the source: {error}") from error


def scaling_of_table(unit: int, patches: int, shortest: int) -> MoTImageProcessor:
    """Scale pictures as BAGEL does, down to what a table of positions of patches x patches holds.

    Args:
        unit: pixels along the side of a patch.
    """
    longest = unit * patches
    return MoTImageProcessor(
        downsampling=unit,
        fit="scale",
        longest_side=longest,
        shortest_side=min(shortest, longest // 2),
        most_scaled_pixels=MOST_PIXELS,
    )


def bagel_generation_config(token_ids: Mapping[str, int]) -> GenerationConfig:
    """Return the settings with which BAGEL answers, draws and edits.

    A text begins with `im_start` and ends with `im_end`. Fifty times are 49 steps, and a thought of 1,000 tokens counts
    the one that begins it.
    """
    return GenerationConfig(
        bos_token_id=token_ids["im_start"],
        eos_token_id=token_ids["im_end"],
        pad_token_id=token_ids["im_end"],
        generation_mode="text",
        max_new_tokens=512,
        max_think_tokens=999,
        image_size="prompt",
        num_inference_steps=50,
        time_spacing="points",
        timestep_shift=3.0,
        guidance_scale=4.0,
        image_guidance_scale=2.0,
        guidance_renorm="global",
        guidance_interval=[0.4, 1.0],
        editing={"guidance_renorm": "text_channel", "guidance_interval": [0.0, 1.0]},
    )
