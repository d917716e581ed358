"""Rows to a batch of tensors."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from modeling_mot.attention_masks import find_image_blocks, find_placeholders, plan_rows
from modeling_mot.latent_images import draw_timesteps
from modeling_mot.tower_routing import ModalityRouting
from training.data.documents import is_transfusion


# N rows of L tokens; M images of C channels, (h, w) latents or pixels

# Each tower's slice is padded to a multiple of this, so that kernels are not compiled for new sizes in every step.
TOWER_ROWS = 16
ROW_FIELDS = ("input_ids", "modality_ids", "position_ids", "document_ids", "labels")


def collate(
    rows: list[dict],
    config=None,
    multiple_of: int = 1,
    noise_seed: int | str | None = None,
    row_numbers: Sequence[int] | None = None,
) -> dict:
    """Stack rows.  N x (L,) -> (N, L) int64 tensors

    Rows with continuous images add, in order of appearance over the rows, `latents` (M, C, h, w) or `pixel_values`
    (M, 3, H, W) in [-1, 1], both float32; `image_sizes` (M, 2) where sizes differ, the images then being padded at
    bottom and right with zeros; `clean_images` and `image_first` (M,) bool. A batch without an image has none of these.
    Rows whose pictures have roles add the pictures of encoders alike: `encoder_pixel_values`, `encoder_image_sizes`.

    Args:
        rows: rows of a `RowStream` or of `single_direction_rows`.
        config: the model's configuration. When given, the batch carries the forward's `routing` and, where each token
            sees a range of tokens, its `attention_plan`: the forward itself then has no step that depends on the data.
            Where the images of the model share a position, `position_ids` are left to the model, except for rows with
            clean copies, which have the positions of the images that they repeat, and for rows whose pictures have
            roles, which say their positions themselves. On a grid they are left to it too.
        multiple_of: pads each tower's slice, see `ModalityRouting.from_modality_ids`.
        noise_seed: with a Transfusion configuration, adds the `timesteps` (M,) and the `noise` (M, C, h, w) of the
            latents. The noise of a row depends on nothing but this seed and the row's number: not on the other rows of
            the batch, nor on the number of processes. Clean images have zeros.
        row_numbers: the number of each row in the stream or the held-out set; needed with `noise_seed`.

    Raises:
        ValueError: no rows, rows of different lengths, a noise seed without numbers, or pixels that do not divide into
            latents.
    """
    # Rows of one length become (N, L) tensors.
    if not rows:
        raise ValueError("collate got no rows; is the stream's range empty?")
    lengths = {len(row["input_ids"]) for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"collate got rows of lengths {sorted(lengths)}; make them with one row_length")
    batch = {
        name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.int64, copy=False))
        for name in ROW_FIELDS
    }
    # Continuous images of all rows are stacked.
    images = [image for row in rows for image in row.get("images", ())]
    if images:
        batch |= stack_images(images, config)
    if pictures := [picture for row in rows for picture in row.get("pictures", ())]:
        batch |= stack_pictures(pictures)
    # Everything that depends on the data is decided here, in the thread that makes batches.
    if config is not None:
        batch["routing"] = ModalityRouting.from_modality_ids(batch["modality_ids"], config, multiple_of)
        ids, documents, clean = batch["input_ids"], batch["document_ids"], batch.get("clean_images")
        plan = plan_rows(config, ids, documents, clean, batch["modality_ids"])
        if plan is not None:
            batch["attention_plan"] = plan
        if getattr(config, "image_positions", None) == "shared" and "pictures" not in rows[0]:
            share_positions(batch, config)
        elif getattr(config, "image_positions", None) == "grid":
            del batch["position_ids"]
    # The noise of diffusion follows from the rows' numbers.
    if images and noise_seed is not None and is_transfusion(config):
        if row_numbers is None or len(row_numbers) != len(rows):
            raise ValueError(
                f"row_numbers={row_numbers} must give the number of each of {len(rows)} rows, which noise_seed="
                f"{noise_seed!r} is joined with; pass the places of the rows in their stream"
            )
        batch |= draw_noise(rows, batch, config, noise_seed, row_numbers)
    return batch


def stack_images(images: list[dict], config=None) -> dict[str, torch.Tensor]:
    """Stack images for the model. A model without a VAE takes pixels as latents.  M x (C, h, w) -> (M, C, h, w)"""
    values = [image["values"] for image in images]
    name = "latents"
    if values[0].dtype == np.uint8:
        name = "latents" if is_transfusion(config) and config.vae_config is None else "pixel_values"
    stacked, sizes = _stack(values)
    batch = {name: stacked}
    if not bool((sizes == sizes[0]).all()):
        batch["image_sizes"] = torch.from_numpy(sizes)
    for key, field in (("clean_images", "clean"), ("image_first", "first")):
        batch[key] = torch.tensor([image[field] for image in images])
    return batch


def stack_pictures(pictures: list[np.ndarray]) -> dict[str, torch.Tensor | list]:
    """Stack pictures for encoders.  M x (3, H, W) uint8 -> (M, 3, H, W) in [-1, 1], and M sizes"""
    stacked, sizes = _stack(pictures)
    # A list: the forward would wait for a tensor on a device.
    return {"encoder_pixel_values": stacked, "encoder_image_sizes": sizes.tolist()}


def _stack(values: list[np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
    """Stack images, the smaller ones padded at bottom and right; pixels are scaled to [-1, 1].

    M x (C, h, w) -> (M, C, h, w) float32, and heights and widths, (M, 2)
    """
    sizes = np.array([value.shape[1:] for value in values], dtype=np.int64)
    stacked = np.zeros((len(values), values[0].shape[0], *sizes.max(axis=0)), dtype=np.float32)
    for target, value in zip(stacked, values, strict=True):
        if value.dtype == np.uint8:
            value = value.astype(np.float32) / np.float32(127.5) - 1
        target[:, : value.shape[1], : value.shape[2]] = value
    return torch.from_numpy(stacked), sizes


def latent_sizes(batch: dict, config) -> list[tuple[int, int]]:
    """Find (h, w) of the latents of each image of a batch.

    Raises:
        ValueError: pixels that the VAE's factor does not divide.
    """
    values = batch.get("latents", batch.get("pixel_values"))
    if values is None:
        return []
    sizes = batch["image_sizes"].tolist() if "image_sizes" in batch else [values.shape[2:]] * len(values)
    factor = 1 if "latents" in batch else config.vae_downsampling
    if wrong := [size for size in sizes if size[0] % factor or size[1] % factor]:
        raise ValueError(
            f"a picture of {wrong[0][0]} x {wrong[0][1]} pixels is not divisible by the VAE's down-sampling, {factor}; "
            "prepare the data with a processor whose downsampling is that of the model"
        )
    return [(height // factor, width // factor) for height, width in sizes]


def count_noised(batch: dict, config) -> int:
    """Count the elements of the latents of all noised images: the targets of the diffusion loss."""
    sizes = latent_sizes(batch, config)
    clean = batch["clean_images"].tolist() if sizes else []
    return sum(
        config.latent_channels * height * width for (height, width), is_clean in zip(sizes, clean) if not is_clean
    )


def draw_noise(
    rows: list[dict], batch: dict, config, seed: int | str, numbers: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Draw `timesteps` (M,) and `noise` (M, C, h, w) of a batch, each row's from its own generator; see `collate`."""
    sizes = latent_sizes(batch, config)
    shape = (len(sizes), config.latent_channels, *np.max(sizes, axis=0).tolist())
    noise, timesteps, start = torch.zeros(shape), [], 0
    for row, number in zip(rows, numbers, strict=True):
        images = row.get("images", ())
        stop = start + len(images)
        generator = row_generator(seed, number)
        if images:
            first = batch["image_first"][start:stop]
            timesteps.append(draw_timesteps(config, first, generator, sizes=sizes[start:stop]))
        for place in range(start, stop):
            if not batch["clean_images"][place]:
                height, width = sizes[place]
                drawn = torch.randn(config.latent_channels, height, width, generator=generator)
                noise[place, :, :height, :width] = drawn
        start = stop
    timesteps = torch.cat(timesteps)
    return {"timesteps": timesteps.masked_fill(batch["clean_images"], 0), "noise": noise}


def row_generator(seed: int | str, number: int) -> torch.Generator:
    """Make a generator that follows from a seed and a row's number alone."""
    return torch.Generator().manual_seed(seed_of(f"{seed}/{int(number)}"))


def seed_of(words: str) -> int:
    """Make a seed for torch's generators from a text, so that no two purposes share a seed."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")


def share_positions(batch: dict, config) -> None:
    """Remove `position_ids`, so that the model gives an image one position; compute them if there are clean copies."""
    positions, documents = batch.pop("position_ids"), batch["document_ids"]
    if not config.noised_images_advance:
        return  # a clean copy stands behind its image, at whose position the model goes on
    # Documents follow one another and their positions grow, except at a clean copy, whose positions fall back to those
    # of its image. So the first place that reaches a token's key is the token itself, or the token that it repeats.
    keys = positions + documents * positions.shape[1]
    reached = keys.cummax(dim=1).values
    is_copy = torch.zeros_like(documents, dtype=torch.bool)
    is_copy[:, 1:] = (keys[:, 1:] <= reached[:, :-1]) & (documents[:, 1:] >= 0)
    if not is_copy.any():
        return
    # A position moves on at every token that is no copy, but only once for each image.
    kinds = find_placeholders(config, batch["input_ids"])
    blocks = find_image_blocks(kinds, documents, config.markers_in_image_block)
    moves = (~is_copy).long()
    moves[:, 1:] *= (blocks[:, 1:] < 0) | (blocks[:, 1:] != blocks[:, :-1])
    counted = moves.cumsum(dim=1)
    own = torch.searchsorted(reached, keys.contiguous())
    start = torch.searchsorted(reached, keys - positions)
    batch["position_ids"] = counted.gather(1, own) - counted.gather(1, start)
