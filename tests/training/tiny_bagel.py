"""The tiny BAGEL of the fixtures, and what its training data are made with."""

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from conversion.import_bagel import import_bagel
from modeling_mot import MoTTransfusionModel
from modeling_mot.image_processing import MoTImageProcessor
from tests.conversion.bagel_sources import CHECKPOINT, TOKEN_IDS
from training.data.config import ROLES
from training.data.documents import Vocabulary


IMAGE, VISION = 160, 161  # placeholders, behind the vocabulary


@functools.cache
def checkpoint() -> Path:
    """A folder with the imported model."""
    folder = Path(tempfile.mkdtemp()) / "bagel"
    import_bagel(str(CHECKPOINT), folder, token_ids=TOKEN_IDS)
    return folder


def bagel_model() -> MoTTransfusionModel:
    return MoTTransfusionModel.from_pretrained(checkpoint())


class ToyBagelProcessor:
    """A token for each byte, pictures of 32 x 64 pixels for the VAE and of 28 x 56 for the encoder."""

    modalities = ["text", "vision", "image"]
    modality_token_ranges = {"text": [0, 160]}
    placeholder_token_ids = {"image": IMAGE, "vision": VISION}
    image_token_id, bos_token_id = IMAGE, None
    tokenizer = SimpleNamespace(pad_token_id=151, eos_token_id=151, boi_token_id=152, eoi_token_id=153)
    image_processor = MoTImageProcessor([32, 64], downsampling=16)
    encoder_processor = MoTImageProcessor([28, 56], downsampling=14)

    def fingerprint(self) -> str:
        return "toy bagel"

    def encode_segment(self, segment: dict) -> list[int]:
        return [150, *(byte % 150 for byte in segment["text"].encode()), 151]

    def roles_of(self, document: list[dict]) -> list[tuple[str, ...]]:
        """As given; else all three, but for a last picture."""
        last = len(document) - 1
        return [
            tuple(part.get("roles") or (ROLES if place < last else ("noised",)))
            for place, part in enumerate(document)
            if part["type"] == "image"
        ]

    def placeholder_ids(self, height: int, width: int) -> list[int]:
        return [152, *[IMAGE] * (height * width // 16**2), 153]

    def features_ids(self, height: int, width: int) -> list[int]:
        return [152, *[VISION] * (height * width // 14**2), 153]


VOCABULARY = Vocabulary.of(ToyBagelProcessor())
assert VOCABULARY.placeholders == {IMAGE: 2, VISION: 1}


class Column:
    """One version of one segment of a few records, as `TokenColumn` and `ImageColumn` give them."""

    def __init__(self, records: list):
        self.records = records

    @property
    def lengths(self) -> np.ndarray:
        return np.array([[len(record)] for record in self.records])

    def ids(self, record: int, variant: int) -> np.ndarray:
        return np.asarray(self.records[record])

    def images(self, record: int, variant: int) -> list[np.ndarray]:
        return self.records[record]
