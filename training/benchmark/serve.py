"""Time eight requests of text and images served together, beside the same requests one after another."""

from functools import partial

import torch

from modeling_mot import MoTConfig, MoTForCausalLM, MoTTransfusionConfig, MoTTransfusionModel
from training.benchmark.rounds import compare, interleave


VOCAB_SIZE, REQUESTS, NEW_TOKENS = 8192, 8, 65
BOS, BOI, EOI, IMAGE = 1, 3, 4, 5
LATENTS, STEPS, GUIDANCE = (16, 16), 10, 3.0


def build(kind: str, size: dict, dtype: torch.dtype) -> torch.nn.Module:
    """Build two towers with random weights.

    Args:
        kind: "codes": images are 8 x 8 tokens; "diffusion": images are 8 x 8 patches, and there is a U-Net.
    """
    torch.manual_seed(0)
    shared = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS, "boi_token_id": BOI, "eoi_token_id": EOI}
    if kind == "codes":
        ranges = {"text": [0, VOCAB_SIZE // 2], "image": [VOCAB_SIZE // 2, VOCAB_SIZE]}
        config = MoTConfig.from_variant(
            "mot", modality_token_ranges=ranges, image_grid=[8, 8], initializer_range=0.1, **shared, **size
        )
        return MoTForCausalLM(config).to(dtype).eval()
    config = MoTTransfusionConfig.from_variant(
        "mot", image_token_id=IMAGE, latent_size=LATENTS, unet_channels=[32, 64], unet_layers=1, unet_norm_groups=8,
        caption_dropout=0.1, prediction_type="v_prediction", initializer_range=0.1, **shared, **size,
    )  # fmt: skip
    return MoTTransfusionModel(config).to(dtype).eval()


def requests(kind: str) -> list[dict]:
    """Make prompts of 16 to 44 tokens. Every other prompt ends with BOI, so that an image follows."""
    generator, made = torch.Generator().manual_seed(1), []
    for number in range(REQUESTS):
        ids = torch.randint(6, VOCAB_SIZE // 2, (16 + 4 * number,), generator=generator)
        ids[0] = BOS
        request = {"input_ids": ids, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        if number % 2:
            ids[-1] = BOI
        if kind == "diffusion":
            request |= {"generator": torch.Generator().manual_seed(number), "generation_mode": "text"}
            request |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        made.append(request)
    return made


def together(model: torch.nn.Module, kind: str) -> list:
    results = model.generate_batch(requests(kind)).values()
    if errors := [result.error for result in results if result.error]:
        raise SystemExit(errors[0])
    return [result.output for result in results]


def one_by_one(model: torch.nn.Module, kind: str) -> list:
    return [model.generate(request.pop("input_ids")[None], **request) for request in requests(kind)]


def share_of_agreement(kind: str, model: torch.nn.Module) -> float:
    """Return the share of new tokens that are the same in both ways, in each request up to the first that differs.

    A diffused picture counts as one token.
    """
    same, total = 0, 0
    for ours, theirs in zip(together(model, kind), one_by_one(model, kind), strict=True):
        if kind == "diffusion":
            for latents, wanted in zip(ours.latents[0], theirs.latents[0], strict=True):
                same += (latents - wanted).abs().max().item() < (1e-2 if model.dtype == torch.float32 else 0.5)
                total += 1
            ours, theirs = ours.sequences, theirs.sequences
        equal = (ours[0, -NEW_TOKENS:] == theirs[0, -NEW_TOKENS:]).long().cumprod(0)
        same, total = same + int(equal.sum()), total + NEW_TOKENS
    return same / total


def time_serve(size: dict, dtype: torch.dtype, rounds: int) -> dict:
    """Time all eight requests, with image codes and with diffused images.

    In float32 the outputs have to be the same. In bfloat16, products of eight rows are rounded differently from
    products of one row, and random weights make tokens almost equally likely; the share that agrees is reported.

    Returns:
        dict: "codes" and "diffusion" -> the figures of `compare`, and `agreement`.

    Raises:
        SystemExit: outputs differ in float32.
    """
    figures = {}
    for kind in ("codes", "diffusion"):
        model = build(kind, size, dtype)
        agreement = share_of_agreement(kind, model)
        if agreement < 1 and dtype == torch.float32:
            raise SystemExit(f"of the {kind} {1 - agreement:.1%} differ from those made alone: nothing was timed")
        contestants = {"together": partial(together, model, kind), "one by one": partial(one_by_one, model, kind)}
        figures[kind] = compare(interleave(contestants, rounds), [("together", "one by one")])
        figures[kind]["agreement"] = agreement
    return figures
