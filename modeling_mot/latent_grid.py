"""Positions of images and videos on three axes: time, row and column of each patch (Cosmos 3, Qwen3-VL).

A text token has one position on all three axes. A patch has the time of its frame, and its row and column from 0. Text
behind an image or a video goes on behind the last time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .attention_masks import document_starts
from .checks_fields import is_real


# B batch, L row length, n patches of one run of placeholders, P patches of all runs


class VideoSize(NamedTuple):
    """What is drawn where a picture has several frames.

    Attributes:
        frames, height, width: of the latents.
        given: how many frames, from the first one on, have no noise.
        frames_per_second: None for the rate at which each frame moves the time by 1.
    """

    frames: int
    height: int
    width: int
    given: int = 0
    frames_per_second: float | None = None


class Grid(NamedTuple):
    """The patches of one run of placeholders: an image, or the frames of a video.

    Attributes:
        offsets: (3, n) time, row and column; the time counts from that of the first frame.
        advance: how far the position moves on behind the run.
    """

    offsets: torch.Tensor
    advance: int

    @classmethod
    def of(cls, config, size: tuple[int, int], frames: int = 1, frames_per_second: float | None = None) -> "Grid":
        """Count the patches of `frames` frames of (h, w) latents.

        Args:
            frames_per_second: of a video; None for the rate at which each frame moves the time by 1.
        """
        rows, columns = config.patch_grid(*size)
        times = torch.arange(frames)
        if frames > 1 and frames_per_second is not None and config.base_frames_per_second is not None:
            times = times.float() / frames_per_second * config.base_frames_per_second
        axes = (times, torch.arange(rows).to(times.dtype), torch.arange(columns).to(times.dtype))
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        return cls(offsets, math.ceil(times[-1].item()) + config.modality_margin + 1)

    def at(self, config, positions: torch.Tensor) -> torch.Tensor:
        """Return the positions of the patches of runs that begin at these positions.  (R,) -> (3, R, n)"""
        offsets = self.offsets.to(positions.device)[:, None].repeat(1, len(positions), 1)
        offsets[0] += (positions + config.modality_margin)[:, None]
        return offsets


def frames_of_runs(runs: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Share images among runs of placeholders: a run takes one after another until it is full.  -> images of each run

    Args:
        runs: placeholders of each run.
        lengths: patches of each image, in order of appearance.

    Raises:
        ValueError: a run that no number of images fills, or images without a run.
    """
    counts, images = [], list(lengths)
    for number, room in enumerate(runs):
        begin = len(images)
        while images and room > 0:
            room -= images.pop(0)
        if room:
            raise ValueError(
                f"run {number} of placeholders has room for {runs[number]} patches, which whole images do not fill: "
                f"the images have {list(lengths)}"
            )
        counts.append(begin - len(images))
    if images:
        raise ValueError(f"{len(images)} of {len(lengths)} images came without placeholders in input_ids")
    return counts


def grid_positions(
    config,
    places,
    sizes: list[tuple[int, int]],
    frames: Sequence[int] | None = None,
    frames_per_second: float | Sequence[float] | None = None,
) -> torch.Tensor:
    """Count positions on three axes, from 0 in each document, without a wait for the device.  -> (3, B, L)

    Args:
        places: `ImagePlaces` of the rows.
        sizes: (h, w) latents of each image, in order of appearance over the flattened rows.
        frames: how many images each run of placeholders holds; default: one.
        frames_per_second: of videos, for all or for each run; see `Grid.of`.

    Raises:
        ValueError: rates of another number than there are runs, or that are no positive numbers.
    """
    # The grids of all runs, of which the host knows the sizes.
    frames = [1] * len(sizes) if frames is None else list(frames)
    rates = frames_per_second
    rates = list(rates) if isinstance(rates, Sequence) else [rates] * len(frames)
    if len(rates) != len(frames):
        raise ValueError(f"frames_per_second has {len(rates)} rates for {len(frames)} images and videos; give one each")
    if wrong := [rate for rate in rates if rate is not None and not (is_real(rate) and rate > 0)]:
        raise ValueError(f"frames_per_second has {wrong[0]!r}; a rate is a positive number")
    firsts = [sum(frames[:run]) for run in range(len(frames))]
    grids = [Grid.of(config, sizes[first], count, rate) for first, count, rate in zip(firsts, frames, rates)]

    # A text token moves the position by 1, a run moves it as a whole at its first patch.
    is_patch, device = places.is_patch, places.input_ids.device
    lengths = [grid.offsets.shape[1] for grid in grids]
    patches = torch.argsort(~is_patch.flatten(), stable=True)[: sum(lengths)]
    moves = (~is_patch).long()
    if places.attention_mask is not None:
        moves = moves * places.attention_mask
    advances = torch.tensor([grid.advance for grid in grids], dtype=torch.long).to(device)
    begins = torch.tensor([sum(lengths[:run]) for run in range(len(grids))], dtype=torch.long).to(device)
    moves = moves.flatten().index_copy(0, patches[begins], advances).view_as(moves)
    counted = moves.cumsum(dim=1) - moves
    if places.document_ids is not None:
        counted = counted - torch.where(document_starts(places.document_ids), counted, 0).cummax(dim=1).values

    # Text has one position on all axes; a patch counts from the first one of its run.
    if not grids:
        return counted.expand(3, -1, -1)
    offsets = torch.cat([grid.offsets for grid in grids], dim=1).to(device)
    start = counted.flatten()[patches[begins]] + config.modality_margin
    numbers = torch.repeat_interleave(torch.arange(len(grids)), torch.tensor(lengths)).to(device)
    offsets[0] += start[numbers]
    positions = counted.flatten().to(offsets.dtype).repeat(3, 1)
    return positions.index_copy(1, patches, offsets).view(3, *counted.shape)
