"""Encode sounds as speech units and decode them: k-means over features of frames.

There are 25 units a second by default, as in the paper's setting with speech. The default features are MFCC with their
differences, as in HuBERT's first iteration, which need no weights; any speech encoder of transformers (HuBERT, wav2vec
2.0, WavLM, Whisper) can take their place. Decoding is simple: every unit keeps the mean log-mel spectrogram of its 40
ms, and Griffin-Lim finds a waveform.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.audio_utils import mel_filter_bank

from .checks_fields import Maybe, Number, OneOf, Typed, Whole, check_fields
from .hub_trust import reading
from .image_tokenizer import (
    fingerprint,
    from_known_fields,
    nearest_code,
    read_hub_json,
    without_autocast,
    without_defaults,
)
from .media_loading import MAX_RATE, MIN_RATE, check_rate, load_sound


# S samples, T frames of 10 ms, U units, C features, K centroids, F mel bands

SPEECH_TOKENIZER_CONFIG_NAME = "speech_tokenizer_config.json"
SPEECH_TOKENIZER_WEIGHTS_NAME = "model.safetensors"

CONFIG_RULES = {
    "num_units": Whole(1, 2**24),
    "units_per_second": Whole(1, 100),
    "sampling_rate": Whole(MIN_RATE, MAX_RATE),
    "features": OneOf(("mfcc", "encoder")),
    "num_mel_bands": Whole(1, 2**10),
    "num_coefficients": Whole(1, 2**10),
    "loudness": Number(),
    "deduplicate": Typed(bool),
    "encoder": Maybe(Typed(str)),
    "encoder_layer": Whole(-(2**10), 2**10),
    "griffin_lim_iterations": Whole(0, 10**6),
    "max_seconds": Number(open="low"),
}


@dataclass
class SpeechTokenizerConfig:
    """How a sound becomes units: one of `num_units` clusters of features, `units_per_second` times a second.

    `features`: "mfcc", or "encoder" for a transformers speech encoder named by `encoder` (Hub name or folder), whose
    hidden state number `encoder_layer` is used (-1: the last). Features of 10 or 20 ms are averaged within a unit.
    `loudness`: samples are scaled to this root mean square first (0: left alone). `deduplicate`: runs of one unit
    become a single one; durations are then lost. Sounds longer than `max_seconds` are refused before they are decoded.

    Raises:
        ValueError: a field with an impossible value, by name.
    """

    num_units: int = 500
    units_per_second: int = 25
    sampling_rate: int = 16_000
    features: str = "mfcc"
    num_mel_bands: int = 40
    num_coefficients: int = 13
    loudness: float = 0.1
    deduplicate: bool = False
    encoder: str | None = None
    encoder_layer: int = -1
    griffin_lim_iterations: int = 60
    max_seconds: float = 600.0

    def __post_init__(self):
        check_fields(self, CONFIG_RULES)
        if (self.features == "encoder") != bool(self.encoder):
            raise ValueError(
                f"features={self.features!r} with encoder={self.encoder!r}: name an encoder exactly when it is used"
            )
        if round(1 / HOP_SECONDS) % self.units_per_second or self.sampling_rate % round(1 / HOP_SECONDS):
            raise ValueError(
                f"units_per_second={self.units_per_second} must divide 100 and sampling_rate={self.sampling_rate} be a "
                "multiple of 100: frames are 10 ms"
            )
        if self.num_coefficients > self.num_mel_bands:
            raise ValueError(
                f"num_coefficients={self.num_coefficients} must be at most num_mel_bands={self.num_mel_bands}, of "
                "which they are made"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SpeechTokenizerConfig":
        """Make a configuration of the content of `speech_tokenizer_config.json`; ValueError for unknown names."""
        return from_known_fields(cls, values, "speech tokenizer")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `speech_tokenizer_config.json`."""
        return without_defaults(self, "max_seconds")


class MoTSpeechTokenizer:
    """Encode sounds as units in [0, num_units), and decode such units.

    Train it with `python -m training.tokenizers.speech`, or load it, before use.

    Args:
        config: how sounds become units.
        tensors: `mean` and `scale` (C,) of the features; `centroids` (K, C) of features so scaled; `templates` (K,
            frames of a unit, F), the log-mel spectrograms that decoding strings together. None: not trained yet.
        encoder: a loaded speech encoder, for `features="encoder"`; default: loaded by its name when it is needed.

    Raises:
        ValueError: another number of centroids than `config.num_units`.

    Example, from the root of the repository, which carries a tokenizer:
        >>> tokenizer = MoTSpeechTokenizer.from_pretrained("training/assets/processor", subfolder="speech_tokenizer")
        >>> tone = np.sin(np.arange(16_000) * 0.2).astype(np.float32)
        >>> (units,) = tokenizer.encode([tone], sampling_rate=16_000)
        >>> units.shape, tokenizer.decode([units])[0].shape
        (torch.Size([25]), (16000,))
    """

    def __init__(
        self,
        config: SpeechTokenizerConfig,
        tensors: dict[str, torch.Tensor] | None = None,
        encoder: nn.Module | None = None,
    ):
        self.config = config
        self.front_end = SpeechFrontEnd(config.sampling_rate, config.num_mel_bands, config.num_coefficients)
        self.encoder = encoder
        tensors = tensors or {}
        self.mean = tensors.get("mean")
        self.scale = tensors.get("scale")
        self.centroids = tensors.get("centroids")
        self.templates = tensors.get("templates")
        if self.centroids is not None and len(self.centroids) != config.num_units:
            raise ValueError(f"num_units={config.num_units} but there are {len(self.centroids)} centroids")

    # ------------------------------------------------------------------------------------------------------------ sizes

    @property
    def num_units(self) -> int:
        """K, the number of units."""
        return self.config.num_units

    @property
    def sampling_rate(self) -> int:
        """Samples a second of the tokenizer, in Hz."""
        return self.config.sampling_rate

    @property
    def units_per_second(self) -> int:
        """Units a second of sound."""
        return self.config.units_per_second

    @property
    def frames_per_unit(self) -> int:
        """Frames of 10 ms that a unit stands for."""
        return round(1 / HOP_SECONDS) // self.config.units_per_second

    @property
    def samples_per_unit(self) -> int:
        """Samples that a unit stands for."""
        return self.config.sampling_rate // self.config.units_per_second

    # --------------------------------------------------------------------------------------------------------- encoding

    def preprocess(self, audio: Any, sampling_rate: int | None = None, **access: bool) -> torch.Tensor:
        """Read one sound: mono samples at the tokenizer's rate.  -> (S,)

        The samples are scaled to the configured loudness, and padded with silence to whole units. The arguments are
        those of `encode`.
        """
        # Read the sound, at the tokenizer's rate.
        ours = self.config.sampling_rate
        wave, rate = load_sound(audio, sampling_rate, ours, self.config.max_seconds, **access)
        samples = resample(torch.from_numpy(wave), rate, ours)

        # Silence is not made louder.
        level = samples.square().mean().sqrt()
        if self.config.loudness and level > 1e-5:
            samples = samples * (self.config.loudness / level)

        # Silence fills the last unit up.
        units = math.ceil(len(samples) / self.samples_per_unit)
        return nn.functional.pad(samples, (0, units * self.samples_per_unit - len(samples)))

    @without_autocast()
    @torch.no_grad()
    def features(self, samples: torch.Tensor) -> torch.Tensor:
        """Compute the features of each unit, not scaled yet.  (S,) -> (U, C)"""
        units = len(samples) // self.samples_per_unit
        if self.config.features == "mfcc":
            frames = self.front_end.mfcc(self.front_end.log_mel(samples))
        else:
            frames = self.encoder_frames(samples, units)
        return frames.view(units, -1, frames.shape[-1]).mean(1)

    def encoder_frames(self, samples: torch.Tensor, units: int) -> torch.Tensor:
        """Return hidden states of the speech encoder, a whole number of frames for each unit.  (S,) -> (T, C)"""
        # Encoders differ in their frames.
        encoder = self.load_encoder()
        if hasattr(encoder.config, "num_mel_bins"):
            hidden, rate = self.whisper_frames(encoder, samples)
        else:
            # HuBERT, wav2vec 2.0 and WavLM hear samples of mean 0 and variance 1.
            rate = self.config.sampling_rate / math.prod(encoder.config.conv_stride)
            # Without padding, the convolutions lose frames at the edges.
            edge = int(self.config.sampling_rate / rate)
            padded = nn.functional.pad(samples, (edge // 2, edge))
            padded = (padded - padded.mean()) / (padded.var() + 1e-7).sqrt()
            hidden = encoder(padded[None], output_hidden_states=True).hidden_states[self.config.encoder_layer][0]

        # Repeat the last frame, or cut, to a whole number of frames.
        per_unit = max(1, round(rate / self.config.units_per_second))
        wanted = units * per_unit
        if len(hidden) < wanted:
            hidden = torch.cat([hidden, hidden[-1:].expand(wanted - len(hidden), -1)])
        return hidden[:wanted]

    def whisper_frames(self, encoder: nn.Module, samples: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return hidden states of Whisper's encoder, chunk by chunk, and how many come a second.  (S,) -> (T, C)"""
        from transformers import WhisperFeatureExtractor

        seconds = encoder.config.max_source_positions // 50
        extractor = WhisperFeatureExtractor(
            feature_size=encoder.config.num_mel_bins, sampling_rate=self.config.sampling_rate, chunk_length=seconds
        )
        # Whisper hears chunks of a fixed length, padded; frames of the padding are left out.
        parts = []
        for chunk in samples.split(seconds * self.config.sampling_rate):
            inputs = extractor(chunk.numpy(), sampling_rate=self.config.sampling_rate, return_tensors="pt")
            states = encoder(inputs.input_features, output_hidden_states=True).hidden_states
            hidden = states[self.config.encoder_layer][0]
            parts.append(hidden[: math.ceil(len(chunk) * 50 / self.config.sampling_rate)])
        return torch.cat(parts), 50.0

    def load_encoder(self) -> nn.Module:
        """Return the speech encoder, which is loaded by its name when it is first needed."""
        if self.encoder is None:
            from transformers import AutoModel

            self.encoder = AutoModel.from_pretrained(self.config.encoder, dtype=torch.float32, trust_remote_code=False)
        # Of Whisper and other encoder-decoders the encoder alone is needed.
        encoder = self.encoder.get_encoder() if self.encoder.config.is_encoder_decoder else self.encoder
        return encoder.eval().requires_grad_(False)

    def encode(self, audio: list[Any], sampling_rate: int | None = None, **access: bool) -> list[torch.Tensor]:
        """Encode each sound as units, (U,) int64.

        Args:
            audio: sounds in any form that `load_sound` takes.
            sampling_rate: in Hz, of arrays; files have their own, and records may.
            access: `allow_urls` and `allow_paths` of `load_sound`.
        """
        if not isinstance(audio, (list, tuple)):
            raise ValueError(f"encode takes a list of sounds, not {type(audio).__name__}")
        return [self.encode_one(source, sampling_rate, **access) for source in audio]

    @without_autocast()
    def encode_one(self, source: Any, sampling_rate: int | None = None, **access: bool) -> torch.Tensor:
        """Encode one sound as units, (U,) int64; ValueError if the tokenizer is not trained yet."""
        if self.centroids is None:
            raise ValueError(
                "this speech tokenizer has no centroids yet; train it with training.tokenizers.speech or load it"
            )
        scaled = (self.features(self.preprocess(source, sampling_rate, **access)) - self.mean) / self.scale
        units = nearest_code(scaled, self.centroids)
        return torch.unique_consecutive(units) if self.config.deduplicate else units

    # --------------------------------------------------------------------------------------------------------- decoding

    def decode(self, units: list[torch.Tensor]) -> list[np.ndarray]:
        """Decode each sequence of units to samples, float32 at `sampling_rate`.  (U,) -> (U * samples_per_unit,)

        The speech is recognisable but sounds buzzy: units carry no pitch, so Griffin-Lim finds a noisy voice.
        """
        return [self.decode_one(torch.as_tensor(sequence, dtype=torch.long)) for sequence in units]

    @without_autocast()
    @torch.no_grad()
    def decode_one(self, units: torch.Tensor) -> np.ndarray:
        """Decode one sequence of units to samples; ValueError for an empty one and for units out of range."""
        if units.ndim != 1 or len(units) == 0:
            raise ValueError(f"speech units must have shape (units,) with at least one unit, not {tuple(units.shape)}")
        if int(units.min()) < 0 or int(units.max()) >= self.num_units:
            raise ValueError(f"speech units lie in [0, {self.num_units}), not [{int(units.min())}, {int(units.max())}]")
        log_mel = self.templates[units].flatten(0, 1)
        return self.front_end.griffin_lim(log_mel, self.config.griffin_lim_iterations).numpy().astype(np.float32)

    # ----------------------------------------------------------------------------------------------- saving and loading

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors by name, as the constructor takes them."""
        return {"mean": self.mean, "scale": self.scale, "centroids": self.centroids, "templates": self.templates}

    def fingerprint(self) -> str:
        """Return the sha256 of the configuration and the tensors."""
        return fingerprint(self.config.to_dict(), self.tensors())

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `model.safetensors` and `speech_tokenizer_config.json`, which names an encoder but does not hold it."""
        if self.centroids is None:
            raise ValueError("a speech tokenizer without centroids cannot be saved; train it first")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.tensors().items()}, directory / SPEECH_TOKENIZER_WEIGHTS_NAME)
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        (directory / SPEECH_TOKENIZER_CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, subfolder: str = "", **hub_kwargs
    ) -> "MoTSpeechTokenizer":
        """Load a folder or Hub repository that `save_pretrained` wrote."""
        from transformers.utils import cached_file

        values = read_hub_json(name_or_path, SPEECH_TOKENIZER_CONFIG_NAME, subfolder, **hub_kwargs)
        weights = cached_file(str(name_or_path), SPEECH_TOKENIZER_WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs)
        config = SpeechTokenizerConfig.from_dict(values)
        with reading(f"{weights} cannot be read"):
            tensors = load_file(weights)
        return cls(config, tensors)


# ----------------------------------------------------------------------------------------------------------- resampling

# Most weights of all filters together, inputs (or products) at a time, and filters of a zero crossing.
_MOST_WEIGHTS = 2**21
_SAMPLES_AT_ONCE = 2**20
_PHASES_PER_CROSSING = 1024


def resample(samples: torch.Tensor, source_rate: int, target_rate: int, zeros: int = 16) -> torch.Tensor:
    """Interpolate a band-limited sound with a Hann-windowed sinc of `zeros` zero crossings a side.  (S,) -> (S',)

    S' = ceil(S * target_rate / source_rate). The memory for filters is bounded for any rates.

    Args:
        source_rate, target_rate: in Hz.

    Raises:
        ValueError: a rate that `check_rate` refuses.
    """
    # Equal rates need no filter.
    source_rate, target_rate = check_rate(source_rate, "source_rate"), check_rate(target_rate, "target_rate")
    if source_rate == target_rate:
        return samples

    # `phases` outputs stand between two inputs that are `step` apart; then the pattern repeats.
    divisor = math.gcd(source_rate, target_rate)
    step = source_rate // divisor
    phases = target_rate // divisor
    cutoff = 0.97 * min(step, phases) / step
    width = math.ceil(zeros / cutoff)
    length = math.ceil(len(samples) * phases / step)
    padded = nn.functional.pad(samples, (width, width + step))
    has_few_phases = phases * (2 * width + step) <= _MOST_WEIGHTS
    interpolate = _resample_by_phases if has_few_phases else _resample_between
    return interpolate(padded, step, phases, cutoff, zeros, width, length)


def _windowed_sinc(times: torch.Tensor, cutoff: float, zeros: int) -> torch.Tensor:
    """Compute the filter at `times`, which count zero crossings."""
    window = torch.where(times.abs() < zeros, torch.cos(times * math.pi / zeros / 2).square(), 0.0)
    return torch.sinc(times) * window * cutoff


def _resample_by_phases(
    padded: torch.Tensor, step: int, phases: int, cutoff: float, zeros: int, width: int, length: int
) -> torch.Tensor:
    """Use an exact filter for each of the `phases` outputs; the usual rates have few."""
    # The filter of each output, shifted by its place between two inputs.
    taps = torch.arange(-width, width + step, dtype=torch.float64)
    shifts = torch.arange(phases, dtype=torch.float64)[:, None] * step / phases
    kernels = _windowed_sinc((taps - shifts) * cutoff, cutoff, zeros).to(padded.dtype)

    # One convolution with stride `step` makes all `phases` outputs between two input steps.
    groups = math.ceil(length / phases)
    at_once = max(1, _SAMPLES_AT_ONCE // step)
    made = []
    for first in range(0, groups, at_once):
        end = (min(first + at_once, groups) - 1) * step + 2 * width + step
        part = padded[None, None, first * step : end]
        made.append(nn.functional.conv1d(part, kernels[:, None], stride=step)[0].T.flatten())
    return torch.cat(made)[:length]


def _resample_between(
    padded: torch.Tensor, step: int, phases: int, cutoff: float, zeros: int, width: int, length: int
) -> torch.Tensor:
    """Interpolate between the filters of a bounded number of phases, on a straight line; errors are below 1e-5."""
    # Filters at even steps between two inputs.
    taps = torch.arange(-width, width + 2, dtype=torch.float64)
    steps = math.ceil(_PHASES_PER_CROSSING * cutoff)
    shifts = torch.arange(steps + 1, dtype=torch.float64)[:, None] / steps
    kernels = _windowed_sinc((taps - shifts) * cutoff, cutoff, zeros).to(padded.dtype)

    # Mix the two filters next to each output, and apply the mixture to the inputs around it.
    windows = padded.unfold(0, len(taps), 1)
    made = []
    for outputs in torch.arange(length).split(max(1, _SAMPLES_AT_ONCE // len(taps))):
        places = outputs * step
        between = (places % phases).double() * steps / phases
        lower = between.long()
        share = (between - lower).to(padded.dtype)[:, None]
        filters = torch.lerp(kernels[lower], kernels[lower + 1], share)
        made.append((windows[places // phases] * filters).sum(1))
    return torch.cat(made)


# -------------------------------------------------------------------------------------------------------------- spectra

HOP_SECONDS = 0.010
WINDOW_SECONDS = 0.025
LOG_FLOOR = 1e-6


class SpeechFrontEnd:
    """Analyse samples at 100 frames a second by fixed filters, and invert the analysis approximately."""

    def __init__(self, sampling_rate: int = 16_000, num_mel_bands: int = 40, num_coefficients: int = 13):
        self.sampling_rate = sampling_rate
        self.hop = round(sampling_rate * HOP_SECONDS)
        self.window_length = round(sampling_rate * WINDOW_SECONDS)
        self.fft_length = 1 << (self.window_length - 1).bit_length()
        self.num_coefficients = num_coefficients
        self.window = torch.hann_window(self.window_length, periodic=True)
        filters = mel_filter_bank(
            num_frequency_bins=self.fft_length // 2 + 1,
            num_mel_filters=num_mel_bands,
            min_frequency=20.0,
            max_frequency=sampling_rate / 2,
            sampling_rate=sampling_rate,
            norm=None,
            mel_scale="htk",
        )
        self.filters = torch.from_numpy(filters).float()
        self.cosines = dct_matrix(num_mel_bands)[:num_coefficients]

    def frames(self, samples: torch.Tensor) -> torch.Tensor:
        """Compute spectra of windows that are centred on each 10 ms, which must divide S.  (S,) -> (T, bins)"""
        edge = self.window_length - self.hop
        padded = nn.functional.pad(samples, (edge // 2, edge - edge // 2))
        cut = padded.unfold(0, self.window_length, self.hop) * self.window
        return torch.fft.rfft(cut, n=self.fft_length)

    def log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """Compute the natural logarithm of the power of mel bands.  (S,) -> (T, F)"""
        return (self.frames(samples).abs().square() @ self.filters).clamp(min=LOG_FLOOR).log()

    def mfcc(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Compute the orthonormal DCT-II of log-mel bands, and its first and second differences.  (T, F) -> (T, C)"""
        static = log_mel @ self.cosines.T
        first = deltas(static)
        return torch.cat([static, first, deltas(first)], dim=1)

    def griffin_lim(self, log_mel: torch.Tensor, iterations: int = 60, seed: int = 0) -> torch.Tensor:
        """Find samples whose spectrogram resembles `log_mel`.  (T, F) -> (S,)

        The phases come from alternating projections: Griffin and Lim (1984), in the fast variant of Perraudin et al.
        (2013).
        """
        # Least squares under non-negativity, approximated by the clamped pseudo-inverse of the mel filters.
        power = (log_mel.exp() @ torch.linalg.pinv(self.filters)).clamp(min=0)
        magnitude = power.sqrt()
        generator = torch.Generator().manual_seed(seed)

        # Project in turn on the spectra of real samples and on those of the wanted magnitude.
        phases = torch.rand(magnitude.shape, generator=generator) * 2 * math.pi
        spectra = torch.polar(magnitude, phases)
        previous = torch.zeros_like(spectra)
        for _ in range(iterations):
            rebuilt = self.frames(self.overlap_add(spectra))
            # The fast variant extrapolates from the last two projections.
            spectra = rebuilt + 0.9 * (rebuilt - previous)
            spectra = magnitude * spectra / spectra.abs().clamp(min=1e-9)
            previous = rebuilt
        return self.overlap_add(spectra)

    def overlap_add(self, spectra: torch.Tensor) -> torch.Tensor:
        """Invert `frames` by least squares.  (T, bins) -> (S,)"""
        # Each frame back in time, under the window once more.
        cut = torch.fft.irfft(spectra, n=self.fft_length)[:, : self.window_length] * self.window
        count = len(cut)
        edge = self.window_length - self.hop

        def added(windows: torch.Tensor) -> torch.Tensor:
            size, kernel = (1, count * self.hop + edge), (1, self.window_length)
            return nn.functional.fold(windows.T[None], size, kernel, stride=(1, self.hop)).flatten()

        # Windows overlap: divide by the sum of their squares.
        weight = added(self.window.square().expand(count, -1))
        samples = added(cut) / weight.clamp(min=1e-3)
        return samples[edge // 2 : edge // 2 + count * self.hop]


def dct_matrix(size: int) -> torch.Tensor:
    """Make the matrix of the orthonormal DCT-II, with one coefficient a row.  -> (size, size)"""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (k + 0.5) * k[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def deltas(features: torch.Tensor, width: int = 2) -> torch.Tensor:
    """Compute the slope of a least-squares line over 2 * width + 1 frames; the edges repeat.  (T, C) -> (T, C)"""
    padded = torch.cat([features[:1].expand(width, -1), features, features[-1:].expand(width, -1)])
    count = len(features)
    slope = sum(n * (padded[width + n :][:count] - padded[width - n :][:count]) for n in range(1, width + 1))
    return slope / (2 * sum(n * n for n in range(1, width + 1)))
