"""Find out whether a drawn picture is the named one: nearest neighbours in a feature space that no model here uses.

A picture is described by the directions of its edges (HOG: gradients of the luminance in 8 x 8 cells and 9 directions)
and by its colours (CIELAB means of 8 x 8 cells, as the difference from white), each of length one. The space has no
weights, reads no tokens, and gives the same figures on every machine.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from PIL import Image

from modeling_mot.media_loading import flatten


SIDE, CELLS, DIRECTIONS = 64, 8, 9
# Smaller differences, of at most 2, are rounding errors of equal pictures.
_TIE = 1e-5


def descriptor(image: Image.Image) -> np.ndarray:
    """Describe a picture of any size.  -> (CELLS^2 * (DIRECTIONS + 3),) float64"""
    # The luminance's gradient at each pixel.
    rgb = np.asarray(flatten(image).resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64) / 255
    lab = rgb_to_lab(rgb)
    down, right = np.gradient(lab[..., 0])
    # Soft votes: a gradient between two directions counts for both, or a small change would move it whole.
    angle = np.arctan2(down, right) % np.pi / np.pi * DIRECTIONS
    low, share = np.floor(angle).astype(int), angle % 1
    votes = np.zeros((SIDE, SIDE, DIRECTIONS))
    rows, columns = np.indices((SIDE, SIDE))
    magnitude = np.hypot(down, right)
    np.add.at(votes, (rows, columns, low % DIRECTIONS), magnitude * (1 - share))
    np.add.at(votes, (rows, columns, (low + 1) % DIRECTIONS), magnitude * share)
    edges = _unit(_cell_means(votes))
    colours = _unit(_cell_means(lab - np.array([100.0, 0.0, 0.0])))
    return np.concatenate([edges, colours])


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB in [0, 1] to CIELAB (D65).  (..., 3) -> (..., 3)"""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    ratio = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _cell_means(values: np.ndarray) -> np.ndarray:
    """Average each cell.  (SIDE, SIDE, C) -> (CELLS, CELLS, C)"""
    width = SIDE // CELLS
    return values.reshape(CELLS, width, CELLS, width, -1).mean(axis=(1, 3))


def _unit(values: np.ndarray) -> np.ndarray:
    flat = values.ravel()
    return flat / max(np.linalg.norm(flat), 1e-12)


class PictureGallery:
    """The pictures among which a drawn picture must find the one that it was named after.

    Args:
        pictures: the gallery.
        concepts: what each picture shows. A drawn picture may find any picture of the named concept. By default each
            picture is a concept of its own.
    """

    def __init__(self, pictures: Sequence[Image.Image], concepts: Sequence[Hashable] | None = None):
        self.descriptors = np.stack([descriptor(picture) for picture in pictures])
        self.has_concepts = concepts is not None
        concepts = range(len(pictures)) if concepts is None else concepts
        numbers = {concept: number for number, concept in enumerate(dict.fromkeys(concepts))}
        self.concepts = np.array([numbers[concept] for concept in concepts])

    def ranks(self, pictures: Sequence[Image.Image], named: Sequence[int], by_concept: bool = True) -> np.ndarray:
        """Count for each picture the gallery pictures that are nearer than all of the named concept; 0 is right.

        Args:
            pictures: drawn pictures.
            named: the index of each picture's named one in the gallery. A gallery picture that equals the named one
                (flags of dependencies do) does not count as nearer.
            by_concept: False to ask for the very picture, whatever the others show.
        """
        queries = np.stack([descriptor(picture) for picture in pictures])
        distances = 2 - queries @ self.descriptors.T  # half of the squared distance, since both parts have length 1
        own = distances[np.arange(len(queries)), np.asarray(named)]
        if by_concept:
            others = self.concepts != self.concepts[np.asarray(named)][:, None]
            own = np.where(others, np.inf, distances).min(axis=1)
        return (distances < own[:, None] - _TIE).sum(axis=1)


def retrieval_share(ranks: np.ndarray) -> float:
    """Return the share of pictures whose nearest neighbour is the named one."""
    return float(np.mean(ranks == 0)) if len(ranks) else float("nan")
