"""Sound to frames and back, without weights: resampling, log-mel, MFCC with deltas, Griffin-Lim.

Shapes: S samples, T frames of 10 ms, F mel bands, C features of a frame.
"""

import math

import torch
from torch import nn
from transformers.audio_utils import mel_filter_bank

from .speech_loading_mot import check_rate


HOP_SECONDS = 0.010
WINDOW_SECONDS = 0.025
LOG_FLOOR = 1e-6
# Of resampling: the weights of all filters, the inputs (or products) at a time, and the filters of a zero crossing.
_MOST_WEIGHTS = 2**21
_SAMPLES_AT_ONCE = 2**20
_PHASES_PER_CROSSING = 1024


def resample(samples: torch.Tensor, source_rate: int, target_rate: int, zeros: int = 16) -> torch.Tensor:
    """Band-limited interpolation with a Hann-windowed sinc of `zeros` zero crossings a side.  (S,) -> (S',)

    S' = ceil(S * target_rate / source_rate). The memory for filters is bounded whatever the rates.
    """
    source_rate, target_rate = check_rate(source_rate, "source_rate"), check_rate(target_rate, "target_rate")
    if source_rate == target_rate:
        return samples
    divisor = math.gcd(source_rate, target_rate)
    step, phases = source_rate // divisor, target_rate // divisor
    cutoff = 0.97 * min(step, phases) / step
    width = math.ceil(zeros / cutoff)
    length = math.ceil(len(samples) * phases / step)
    padded = nn.functional.pad(samples, (width, width + step))
    few_phases = phases * (2 * width + step) <= _MOST_WEIGHTS
    return (_resample_by_phases if few_phases else _resample_between)(
        padded, step, phases, cutoff, zeros, width, length
    )


def _windowed_sinc(times: torch.Tensor, cutoff: float, zeros: int) -> torch.Tensor:
    """The filter at `times`, in zero crossings."""
    window = torch.where(times.abs() < zeros, torch.cos(times * math.pi / zeros / 2).square(), 0.0)
    return torch.sinc(times) * window * cutoff


def _resample_by_phases(
    padded: torch.Tensor, step: int, phases: int, cutoff: float, zeros: int, width: int, length: int
) -> torch.Tensor:
    """A filter for each of the `phases` outputs between `step` inputs; the usual rates have few."""
    taps = torch.arange(-width, width + step, dtype=torch.float64)
    shifts = torch.arange(phases, dtype=torch.float64)[:, None] * step / phases
    kernels = _windowed_sinc((taps - shifts) * cutoff, cutoff, zeros).to(padded.dtype)
    groups, at_once, made = math.ceil(length / phases), max(1, _SAMPLES_AT_ONCE // step), []
    for first in range(0, groups, at_once):
        end = (min(first + at_once, groups) - 1) * step + 2 * width + step
        # One convolution with stride `step` makes all `phases` outputs between two input steps.
        part = padded[None, None, first * step : end]
        made.append(nn.functional.conv1d(part, kernels[:, None], stride=step)[0].T.flatten())
    return torch.cat(made)[:length]


def _resample_between(
    padded: torch.Tensor, step: int, phases: int, cutoff: float, zeros: int, width: int, length: int
) -> torch.Tensor:
    """Filters of a bounded number of phases, and those between two of them on a straight line: errors below 1e-5."""
    taps = torch.arange(-width, width + 2, dtype=torch.float64)
    steps = math.ceil(_PHASES_PER_CROSSING * cutoff)
    shifts = torch.arange(steps + 1, dtype=torch.float64)[:, None] / steps
    kernels = _windowed_sinc((taps - shifts) * cutoff, cutoff, zeros).to(padded.dtype)
    windows, made = padded.unfold(0, len(taps), 1), []
    for outputs in torch.arange(length).split(max(1, _SAMPLES_AT_ONCE // len(taps))):
        places = outputs * step
        between = (places % phases).double() * steps / phases
        lower = between.long()
        share = (between - lower).to(padded.dtype)[:, None]
        filters = torch.lerp(kernels[lower], kernels[lower + 1], share)
        made.append((windows[places // phases] * filters).sum(1))
    return torch.cat(made)


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
