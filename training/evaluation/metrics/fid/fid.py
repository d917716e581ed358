"""Frechet distance of drawn pictures from real ones, as a module of `evaluate`; with Inception it is FID.

`evaluate.load("training/evaluation/metrics/fid")`. `torchmetrics` computes it. This file imports public packages only,
so that it can be pushed to the Hub as it is.
"""

import importlib.util
import os
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from transformers import AutoImageProcessor, AutoModel


_DESCRIPTION = """
The Frechet distance between two sets of pictures: between normal distributions with the means and covariances of their
feature vectors. It is FID with the vectors of Inception v3 alone, and with another network it has another name and
another scale. It falls with the number of pictures: published figures are of 30,000 or 50,000.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: drawn pictures.
    references: as many real pictures.
    feature_network: `inception-v3` (default; it needs torch-fidelity), a vision model of transformers by folder or Hub
        name, or a callable: list of RGB pictures -> (N, D).
    batch_size: pictures that go through the network together.
    device: where the network runs; default: the CPU.

Returns:
    fid: with `inception-v3`; comparable with published figures of as many pictures.
    frechet_distance: with any other network; never comparable with FID.
    feature_network: its name.
    pictures: the number of predictions.

Examples:
    >>> fid = evaluate.load("training/evaluation/metrics/fid")
    >>> results = fid.compute(predictions=drawn, references=real, feature_network="google/vit-base-patch16-224")
"""
_CITATION = """
@inproceedings{heusel2017gans,
    title = {GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium},
    author = {Martin Heusel and Hubert Ramsauer and Thomas Unterthiner and Bernhard Nessler and Sepp Hochreiter},
    booktitle = {NeurIPS},
    year = {2017}
}
"""
INCEPTION = "inception-v3"


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class FrechetDistance(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(predictions=datasets.Image(), references=datasets.Image()),
            codebase_urls=["https://github.com/Lightning-AI/torchmetrics"],
            reference_urls=["https://arxiv.org/abs/1706.08500"],
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        feature_network: str | Callable = INCEPTION,
        batch_size: int = 32,
        device: str | None = None,
    ) -> dict:
        if len(predictions) < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, and there are {len(predictions)}")
        drawn, real = (features_of(some, feature_network, batch_size, device) for some in (predictions, references))
        given = torch.nn.Identity()
        given.num_features = drawn.shape[1]
        # A module of `evaluate` computes the figure of what it is given: never of other processes' pictures too.
        distance = FrechetInceptionDistance(feature=given, sync_on_compute=False)
        distance.update(real, real=True)
        distance.update(drawn, real=False)
        key = "fid" if feature_network == INCEPTION else "frechet_distance"
        name = name_of(feature_network)
        return {key: float(distance.compute()), "feature_network": name, "pictures": len(predictions)}


# ------------------------------------------------------- the network: the same lines stand in fid.py and kid.py


def features_of(pictures: list, network: str | Callable, batch_size: int, device: str | None) -> torch.Tensor:
    """Turn pictures into vectors by a network.  -> (N, D) float64"""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; at least one picture goes through the network")
    embed = network if callable(network) else _inception(device) if network == INCEPTION else _vision(network, device)
    rgb = [picture.convert("RGB") for picture in pictures]
    with torch.inference_mode():
        parts = [embed(rgb[start : start + batch_size]) for start in range(0, len(rgb), batch_size)]
    return torch.cat([part.detach().double().cpu() for part in parts])


def name_of(network: str | Callable) -> str:
    """Name a network: by its name on the Hub, a folder's last part, or `name` or the class of a callable."""
    if callable(network):
        return getattr(network, "name", type(network).__name__)
    return os.path.basename(os.path.normpath(network)) if os.path.isdir(network) else network


def _inception(device: str | None) -> Callable:
    """Load the network of published figures; torch-fidelity holds it, and fetches its weights once."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(
            "feature_network='inception-v3' needs torch-fidelity (pip install torch-fidelity); or give a vision model "
            "of transformers, whose figures then have another name"
        )
    # Without anti-aliasing, pictures are scaled as in the code of the published figures.
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False).to(device or "cpu").eval()

    def embed(pictures: list) -> torch.Tensor:
        pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device or "cpu") for picture in pictures]
        alike = len({one.shape for one in pixels}) == 1
        batches = [torch.stack(pixels)] if alike else [one[None] for one in pixels]
        return torch.cat([network(batch) for batch in batches])

    return embed


def _vision(name: str, device: str | None) -> Callable:
    """Load a vision model of transformers: its image features, pooled output, or the mean over its tokens."""
    processor = AutoImageProcessor.from_pretrained(name)
    model = AutoModel.from_pretrained(name).to(device or "cpu").eval()

    def embed(pictures: list) -> torch.Tensor:
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        if hasattr(model, "get_image_features"):
            output = model.get_image_features(pixel_values=pixels)
            return output if isinstance(output, torch.Tensor) else output.pooler_output
        output = model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(1) if pooled is None else pooled).flatten(1)

    return embed
