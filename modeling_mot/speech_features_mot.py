"""Sound to frames and back, without weights: decoding, resampling, log-mel, MFCC with deltas, Griffin-Lim.

Shapes: S samples, T frames of 10 ms, F mel bands, C features of a frame.
"""

import io
import math
import os
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.audio_utils import mel_filter_bank


HOP_SECONDS = 0.010
WINDOW_SECONDS = 0.025
LOG_FLOOR = 1e-6


def load_audio_source(source: Any, sampling_rate: int | None, target_rate: int) -> torch.Tensor:
    """Mono float32 samples at `target_rate` of an array, tensor, path, URL, bytes or `datasets` record.  -> (S,)

    Arrays come at `sampling_rate` (`target_rate` when None); files and bytes say their own rate. Raises
    FileNotFoundError for a missing file, ImportError where a decoder is needed and soundfile is missing, ValueError
    for what does not decode or is empty.
    """
    if isinstance(source, dict):
        if source.get("array") is not None:
            return load_audio_source(source["array"], source.get("sampling_rate") or sampling_rate, target_rate)
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        samples, sampling_rate = decode_audio(source)
    elif isinstance(source, (np.ndarray, torch.Tensor, list, tuple)):
        samples = np.asarray(source.detach().cpu() if isinstance(source, torch.Tensor) else source)
    else:
        raise ValueError(f"sound cannot be made from {type(source).__name__}; give an array, path or bytes")
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min or -1)
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim == 2:
        # (S, channels) as soundfile has it, or (channels, S): there are fewer channels than samples.
        samples = samples.mean(axis=int(samples.shape[0] > samples.shape[1]))
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(f"sound must have shape (samples,) with at least one sample, not {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError("sound holds values that are not finite")
    return resample(torch.from_numpy(samples.copy()), sampling_rate or target_rate, target_rate)


def decode_audio(source: Any) -> tuple[np.ndarray, int]:
    """Samples (S,) or (S, channels), float32, and their rate, by soundfile (WAV, FLAC, OGG, MP3)."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("decoding sound files needs soundfile: pip install soundfile (or pass arrays)") from error
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, stream = f"sound of {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        import urllib.request

        with urllib.request.urlopen(source, timeout=60) as response:
            name, stream = source, io.BytesIO(response.read())
    else:
        if not os.path.isfile(source):
            raise FileNotFoundError(f"no such sound file: {source}")
        name, stream = str(source), os.fspath(source)
    try:
        return soundfile.read(stream, dtype="float32")
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} does not decode as sound: {error}") from error


def resample(samples: torch.Tensor, source_rate: int, target_rate: int, zeros: int = 16) -> torch.Tensor:
    """Band-limited interpolation with a Hann-windowed sinc of `zeros` zero crossings a side.  (S,) -> (S',)

    S' = ceil(S * target_rate / source_rate).
    """
    if source_rate < 1 or target_rate < 1:
        raise ValueError(f"sampling rates must be positive, not {source_rate} and {target_rate}")
    if source_rate == target_rate:
        return samples
    divisor = math.gcd(int(source_rate), int(target_rate))
    step, phases = int(source_rate) // divisor, int(target_rate) // divisor
    cutoff = 0.97 * min(step, phases) / step
    width = math.ceil(zeros / cutoff)
    taps = torch.arange(-width, width + step, dtype=torch.float64)
    shifts = torch.arange(phases, dtype=torch.float64)[:, None] * step / phases
    times = (taps - shifts) * cutoff
    window = torch.where(times.abs() < zeros, torch.cos(times * math.pi / zeros / 2).square(), 0.0)
    kernels = (torch.sinc(times) * window * cutoff).to(samples.dtype)
    length = math.ceil(len(samples) * phases / step)
    padded = nn.functional.pad(samples, (width, width + step))
    # One convolution with stride `step` makes all `phases` outputs between two input steps.
    return nn.functional.conv1d(padded[None, None], kernels[:, None], stride=step)[0].T.flatten()[:length]


class SpeechFrontEnd:
    """Fixed (untrained) analysis at 100 frames a second, and its approximate inverse."""

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
        """Windowed spectra of S / hop frames, each centred on its own 10 ms; S must divide.  (S,) -> (T, bins)"""
        edge = self.window_length - self.hop
        padded = nn.functional.pad(samples, (edge // 2, edge - edge // 2))
        cut = padded.unfold(0, self.window_length, self.hop) * self.window
        return torch.fft.rfft(cut, n=self.fft_length)

    def log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """Natural logarithm of mel power.  (S,) -> (T, F)"""
        return (self.frames(samples).abs().square() @ self.filters).clamp(min=LOG_FLOOR).log()

    def mfcc(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Orthonormal DCT-II of the log-mel bands, with first and second differences.  (T, F) -> (T, C)"""
        static = log_mel @ self.cosines.T
        first = deltas(static)
        return torch.cat([static, first, deltas(first)], dim=1)

    def griffin_lim(self, log_mel: torch.Tensor, iterations: int = 60, seed: int = 0) -> torch.Tensor:
        """A waveform whose spectrogram resembles `log_mel`, phases by alternating projections.  (T, F) -> (S,)"""
        # Least squares under non-negativity, approximated by the clamped pseudo-inverse of the mel filters.
        power = (log_mel.exp() @ torch.linalg.pinv(self.filters)).clamp(min=0)
        magnitude = power.sqrt()
        generator = torch.Generator().manual_seed(seed)
        phases = torch.rand(magnitude.shape, generator=generator) * 2 * math.pi
        spectra = torch.polar(magnitude, phases)
        previous = torch.zeros_like(spectra)
        for _ in range(iterations):
            rebuilt = self.frames(self.overlap_add(spectra))
            # The fast variant: extrapolate from the last two projections (Perraudin et al., 2013).
            spectra = rebuilt + 0.9 * (rebuilt - previous)
            spectra = magnitude * spectra / spectra.abs().clamp(min=1e-9)
            previous = rebuilt
        return self.overlap_add(spectra)

    def overlap_add(self, spectra: torch.Tensor) -> torch.Tensor:
        """Least-squares inverse of `frames`.  (T, bins) -> (S,)"""
        cut = torch.fft.irfft(spectra, n=self.fft_length)[:, : self.window_length] * self.window
        count, edge = len(cut), self.window_length - self.hop
        length = count * self.hop + edge
        fold = lambda x: nn.functional.fold(  # noqa: E731
            x.T[None], (1, length), (1, self.window_length), stride=(1, self.hop)
        ).flatten()
        weight = fold(self.window.square().expand(count, -1))
        samples = fold(cut) / weight.clamp(min=1e-3)
        return samples[edge // 2 : edge // 2 + count * self.hop]


def dct_matrix(size: int) -> torch.Tensor:
    """Orthonormal DCT-II.  -> (size, size), one coefficient a row"""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (k + 0.5) * k[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def deltas(features: torch.Tensor, width: int = 2) -> torch.Tensor:
    """Slope of a least-squares line over 2 * width + 1 frames, edges repeated.  (T, C) -> (T, C)"""
    padded = torch.cat([features[:1].expand(width, -1), features, features[-1:].expand(width, -1)])
    count = len(features)
    slope = sum(n * (padded[width + n :][:count] - padded[width - n :][:count]) for n in range(1, width + 1))
    return slope / (2 * sum(n * n for n in range(1, width + 1)))
