"""A processor of a few lines with the methods that data preparation uses, and small sources on disk."""

import hashlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from training.data import DataConfig, Preparing, SourceConfig, TemplateConfig, TokenizedSource


class ToyProcessor:
    """One text token per byte; four codes per picture (mean of each quadrant); one unit per 4,000 samples of sound."""

    BOI, EOI, BOS, EOS, PAD, BEGIN_SPEECH, END_SPEECH, BYTES = 3, 4, 1, 2, 0, 5, 6, 7
    modality_token_ranges = {"text": [0, 263], "image": [263, 279], "speech": [279, 295]}
    tokenizer, bos_token_id = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS), BOS

    def __init__(self, salt: str = ""):
        self.salt = salt
        self.images_encoded = 0

    def fingerprint(self) -> str:
        return hashlib.sha256(("toy" + self.salt).encode()).hexdigest()

    def encode_segment(self, segment: dict) -> list[int]:
        assert segment["type"] == "text"
        return [self.BYTES + byte for byte in segment["text"].encode()]

    def encode_images(self, pictures: list) -> list[list[int]]:
        self.images_encoded += len(pictures)
        return [[self.BOI, *self._codes(picture), self.EOI] for picture in pictures]

    def _codes(self, picture: Image.Image) -> list[int]:
        grey = np.asarray(picture.convert("L").resize((2, 2), Image.Resampling.BOX))
        return [263 + int(value) // 16 for value in grey.ravel()]

    def encode_audio(self, sounds: list) -> list[list[int]]:
        units = []
        for sound in sounds:
            blocks = np.array_split(np.abs(sound["array"]), max(1, len(sound["array"]) // 4000))
            units.append([279 + min(15, int(block.mean() * 16)) for block in blocks])
        return [[self.BEGIN_SPEECH, *sound, self.END_SPEECH] for sound in units]


def png(colour, size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def wav(seconds: float, level: float = 0.5) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(int(16_000 * seconds), level, dtype=np.float32), 16_000, format="WAV")
    return buffer.getvalue()


@pytest.fixture
def processor():
    return ToyProcessor()


TEXTS = ["thing abcdefghij", "flip it", "so it is"]


def continuous(image_size=(8, 8), downsampling=4, fit="crop", with_speech=False):
    """A small MoTProcessor that keeps pictures as pixels; 4 tokens a picture unless told otherwise."""
    from modeling_mot.image_processing import MoTImageProcessor
    from modeling_mot.processing_mot import MoTProcessor
    from modeling_mot.processing_vocabulary import extend_tokenizer
    from tests.modeling_mot.test_speech_tokenizer import tokenizer_with_random_units
    from training.tokenizers.text import train_text_tokenizer

    speech = tokenizer_with_random_units() if with_speech else None
    tokenizer = extend_tokenizer(train_text_tokenizer(TEXTS, 300), 0, speech.num_units if speech else 0)
    return MoTProcessor(tokenizer, None, speech, MoTImageProcessor(list(image_size), downsampling, fit=fit))


def small_vae(seed: int = 0):
    """An untrained autoencoder: 2 pixels to a latent, 4 channels."""
    import torch

    from modeling_mot.latent_vae import build_vae

    torch.manual_seed(seed)
    sizes = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return build_vae({"_class_name": "AutoencoderKL", "scaling_factor": 0.7, "shift_factor": 0.1} | sizes | blocks)


def small_transfusion(processor, **fields):
    """A MoTTransfusionConfig for `continuous()` and `small_vae()`."""
    from modeling_mot.configuration_mot_transfusion import MoTTransfusionConfig

    vae_config = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "latent_channels": 4}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"latent_channels": 4, "latent_size": [4, 4], "patchifier": "linear", "vae_config": vae_config}
    return MoTTransfusionConfig(**(processor.config_kwargs() | sizes | images | fields))


@pytest.fixture
def trimodal_folder(tmp_path):
    """A parquet data set of 40 records with names, pictures and sounds of different lengths."""
    import datasets

    binary = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features(name=datasets.Value("string"), picture=binary, sound=binary)
    rows = {
        "name": [f"thing {'abcdefghij'[i % 10] * (i // 4 + 1)}" for i in range(40)],
        "picture": [{"bytes": png((6 * i, 255 - 6 * i, 128)), "path": f"{i}.png"} for i in range(40)],
        "sound": [{"bytes": wav(0.5 + i / 40, i / 40), "path": f"{i}.wav"} for i in range(40)],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    table = table.cast_column("picture", datasets.Image()).cast_column("sound", datasets.Audio(decode=False))
    folder = tmp_path / "trimodal"
    folder.mkdir()
    table.to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.fixture
def text_folder(tmp_path):
    """Thirty texts of 1 to 90 letters."""
    import datasets

    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [chr(97 + i % 26) * (3 * i + 1) for i in range(30)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.fixture
def pair_source(trimodal_folder):
    """pair_source(**template fields) -> configuration of text and picture pairs."""

    def make(segments=("text:name", "image:picture"), name="pairs", source=None, **template):
        templates = [TemplateConfig(segments=list(segments), **template)]
        return SourceConfig(name=name, path=str(trimodal_folder), templates=templates, **(source or {}))

    return make


@pytest.fixture
def text_source(text_folder):
    def make(name="texts", **fields):
        return SourceConfig(name=name, path=str(text_folder), templates=[TemplateConfig(["text:text"])], **fields)

    return make


@pytest.fixture
def prepare(processor, tmp_path):
    """prepare(source, augmentation=None) -> TokenizedSource in a temporary cache."""

    def run(source, augmentation=None, **options):
        return TokenizedSource.prepare(
            source, Preparing(processor, tmp_path / "cache", augmentation=augmentation, **options)
        )

    return run


@pytest.fixture
def data_config():
    def make(**fields):
        return DataConfig(**({"row_length": 128, "block_documents": 32, "seed": 3} | fields))

    return make


@pytest.fixture(scope="session")
def carried(tmp_path_factory):
    """The carried data set's path, with `datasets`' own cache in a temporary folder."""
    import datasets

    from training.data.config import carried_path

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    return str(carried_path())
