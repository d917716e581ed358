"""CLIP score of pictures and their captions, as a module of `evaluate`.

`evaluate.load("training/evaluation/metrics/clip_score")`. `torchmetrics` computes it. This file imports public packages
only, so that it can be pushed to the Hub as it is.
"""

import os
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import AutoModel, AutoProcessor


_DESCRIPTION = """
The CLIP score is 100 times the mean cosine between the embeddings of a picture and of its caption, at least 0. Papers
also write the cosine itself (0.214 for a score of 21.4). A figure belongs to one CLIP model.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: pictures.
    references: the caption of each.
    clip: a CLIP model of transformers by folder or Hub name, such as `openai/clip-vit-large-patch14`.
    batch_size: pictures that go through the model together.
    device: where the model runs; default: the CPU.

Returns:
    clip_score: 100 times the mean cosine, at least 0.
    clip: the name of the model.
    pictures: their number.

Examples:
    >>> clip_score = evaluate.load("training/evaluation/metrics/clip_score")
    >>> results = clip_score.compute(predictions=drawn, references=captions, clip="openai/clip-vit-large-patch14")
"""
_CITATION = """
@inproceedings{hessel2021clipscore,
    title = {CLIPScore: A Reference-free Evaluation Metric for Image Captioning},
    author = {Jack Hessel and Ari Holtzman and Maxwell Forbes and Ronan Le Bras and Yejin Choi},
    booktitle = {EMNLP},
    year = {2021}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ClipScore(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(predictions=datasets.Image(), references=datasets.Value("string")),
            codebase_urls=["https://github.com/Lightning-AI/torchmetrics"],
            reference_urls=["https://arxiv.org/abs/2104.08718"],
        )

    def _compute(
        self,
        predictions: list,
        references: list[str],
        clip: str = "openai/clip-vit-large-patch14",
        batch_size: int = 32,
        device: str | None = None,
    ) -> dict:
        if not predictions:
            raise ValueError("there are no pictures, so there is no CLIP score")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; at least one picture goes through the model")
        model = Embeddings(AutoModel.from_pretrained(clip).to(device or "cpu").eval())
        processor = AutoProcessor.from_pretrained(clip)
        # A module of `evaluate` computes the figure of what it is given: never of other processes' pictures too.
        score = CLIPScore(model_name_or_path=lambda: (model, processor), sync_on_compute=False).to(device or "cpu")
        for start in range(0, len(predictions), batch_size):
            some = [picture.convert("RGB") for picture in predictions[start : start + batch_size]]
            pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device or "cpu") for picture in some]
            with torch.inference_mode():
                score.update(pixels, list(references[start : start + batch_size]))
        name = os.path.basename(os.path.normpath(clip)) if os.path.isdir(clip) else clip
        return {"clip_score": float(score.compute()), "clip": name, "pictures": len(predictions)}


class Embeddings(torch.nn.Module):
    """A CLIP model whose embeddings are tensors, as torchmetrics wants them; transformers 5 wraps them in outputs."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output
