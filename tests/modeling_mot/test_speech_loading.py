"""One reader of sounds: the same units however one is handed over, or the same named error."""

import math
import struct

import numpy as np
import pytest
import torch

from modeling_mot.media_loading import load_sound
from modeling_mot.speech_tokenizer import SpeechTokenizerConfig, resample
from training.data.reading.records import decode_sound

from .media_forms import WAVE, chat_ids, outcome, outcomes_of_file, sound_file
from .test_speech_tokenizer import tokenizer_with_random_units


soundfile = pytest.importorskip("soundfile")


SOUNDS = {
    "wav": ("WAV", "PCM_16", 16_000),
    "wav of 8 bits": ("WAV", "PCM_U8", 8_000),
    "wav of 24 bits": ("WAV", "PCM_24", 48_000),
    "wav of floats": ("WAV", "FLOAT", 44_100),
    "wav of doubles": ("WAV", "DOUBLE", 22_050),
    "flac": ("FLAC", "PCM_16", 96_000),
    "ogg": ("OGG", "VORBIS", 16_000),
    "opus": ("OGG", "OPUS", 48_000),
    "mp3": ("MP3", "MPEG_LAYER_III", 44_100),
    "aiff": ("AIFF", "PCM_16", 11_025),
    "an odd rate": ("WAV", "PCM_16", 11_127),
    "a high odd rate": ("WAV", "PCM_16", 192_001),
}


def wav_header(rate: int = 16_000, channels: int = 1, bits: int = 16, promised: int = 200) -> bytes:
    fields = struct.pack(
        "<IHHIIHH", 16, 1, channels, rate, rate * channels * bits // 8 % 2**32, channels * bits // 8, bits
    )
    return (
        b"RIFF" + struct.pack("<I", 236) + b"WAVEfmt " + fields + b"data" + struct.pack("<I", promised) + b"\1\2" * 100
    )


@pytest.mark.parametrize("suffix", [".wav", ".raw"])
@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_gives_the_same_tokens_everywhere(processor, site, name, suffix):
    kind, subtype, rate = SOUNDS[name]
    content = sound_file(WAVE, rate, kind, subtype)
    found = outcomes_of_file(processor, site, "audio", content, suffix)
    assert isinstance(found[0], list) and found == [found[0]] * len(found)
    path = site[0] / "whole.sound"
    path.write_bytes(content)
    wave, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
    for array in (wave, wave.T, wave.mean(axis=1), torch.from_numpy(wave)):
        assert processor.encode_audio([array], own_rate)[0] == found[0]
        assert chat_ids(processor, {"type": "audio", "audio": array, "sampling_rate": own_rate}) == found[0]
        segment = {"type": "audio", "audio": array, "sampling_rate": own_rate}
        assert processor([segment], add_eos=False)["input_ids"][1:] == found[0]
        decoded = dict(zip(("array", "sampling_rate"), decode_sound({"array": array, "sampling_rate": own_rate})))
        assert processor.encode_audio([decoded])[0] == found[0]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"RIFF", wav_header(rate=0), wav_header(rate=1), wav_header(rate=2**31 - 1), wav_header(channels=0),
        wav_header(bits=0), wav_header(promised=0), sound_file(np.array([np.nan] * 50), 16_000, subtype="FLOAT"),
        sound_file(np.array([np.inf] * 50), 16_000, subtype="FLOAT"),
        sound_file(np.array([1e300] * 50), 16_000, subtype="DOUBLE"),
        sound_file(np.array([1e30] * 50), 16_000, subtype="FLOAT"),
    ],
)  # fmt: skip
def test_a_broken_sound_is_the_same_error_everywhere(processor, site, content):
    found = outcomes_of_file(processor, site, "audio", content, ".wav")
    error = found[0] if isinstance(found[0], str) else ""
    assert error.startswith("the sound") and found == [error] * len(found)


@pytest.mark.parametrize(
    "name", ["int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "float64"]
)
def test_samples_are_scaled_by_the_range_of_their_type(name):
    exact = np.array([-1.0, -0.5, 0.0, 0.25, 0.5])
    dtype = np.dtype(name)
    half = 2.0 ** (8 * dtype.itemsize - 1)
    values = exact if dtype.kind == "f" else exact * half + (half if dtype.kind == "u" else 0)
    for source in (values.astype(dtype), values.astype(dtype)[:, None], values.astype(dtype)[None]):
        samples, rate = load_sound(source, 16_000)
        assert rate == 16_000 and samples.dtype == np.float32 and samples.tolist() == exact.tolist()


@pytest.mark.parametrize("form", [(2, 300), (300, 2), (300,)])
def test_channels_are_averaged_whichever_stand_first(form):
    values = np.arange(600, dtype=np.float32)[: math.prod(form)].reshape(form) / 1000
    expected = values.mean(axis=int(form == (300, 2))) if len(form) == 2 else values
    assert np.array_equal(load_sound(values, 16_000)[0], expected)
    assert np.array_equal(decode_sound({"array": values, "sampling_rate": 16_000})[0], expected)


NO_SOUNDS = [
    np.array([100, -100] * 50), [100, -100] * 50, np.zeros(9, bool), np.zeros(9, complex), np.zeros(9, object),
    np.zeros(9, "U2"), np.zeros((2, 2, 2)),
    np.zeros(0), np.zeros((0, 2)), np.float32(1), [np.nan], [[1.0], [1.0, 2.0]], ["a"],
    np.broadcast_to(np.float32(0), (10**11,)), np.broadcast_to(np.int16(0), (10**9, 3)),
]  # fmt: skip


@pytest.mark.parametrize("bad", NO_SOUNDS)
def test_what_is_no_sound_is_the_same_error_everywhere(processor, bad):
    record = {"array": bad, "sampling_rate": 16_000}
    found = [outcome(load_sound, bad, 16_000), outcome(decode_sound, record), outcome(processor.encode_audio, [record])]
    assert isinstance(found[0], str) and found == [found[0]] * 3


@pytest.mark.parametrize(
    "rate", [0, -1, 1, 999, 768_001, 10**400, 0.5, 16_000.5, math.nan, math.inf, True, "16000", [16_000]]
)
def test_a_rate_that_is_none_is_refused_everywhere(processor, rate):
    wave = WAVE[:, 0]
    record = {"array": wave, "sampling_rate": rate}
    calls = [
        lambda: load_sound(wave, rate), lambda: decode_sound(record), lambda: processor.encode_audio([wave], rate),
        lambda: processor.encode_audio([record]),
        lambda: processor([{"type": "audio", "audio": wave, "sampling_rate": rate}]),
        lambda: chat_ids(processor, {"type": "audio", "audio": wave, "sampling_rate": rate}),
        lambda: resample(torch.zeros(9), rate, 16_000), lambda: SpeechTokenizerConfig(sampling_rate=rate),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="rate=.* (from|at least) 1000,? .*768000"):
            call()


def test_an_array_without_a_rate_is_warned_of_and_refused_in_training(processor, monkeypatch):
    from modeling_mot import media_loading

    warned = []
    monkeypatch.setattr(media_loading.logger, "warning_once", warned.append)
    speech = tokenizer_with_random_units(sampling_rate=24_000)
    warned.clear()
    expected = speech.encode([WAVE], 24_000)[0]
    assert not warned and torch.equal(speech.encode([WAVE])[0], expected) and "24000 Hz" in warned.pop()
    for call in (
        lambda: processor(text="<|audio|>", audio=[WAVE]),
        lambda: processor([{"type": "audio", "audio": WAVE}]),
        lambda: chat_ids(processor, {"type": "audio", "audio": WAVE}),
    ):
        call()
        assert "without its sampling_rate" in warned.pop() and not warned
    processor(text="<|audio|>", audio=[WAVE], sampling_rate=16_000)
    processor.encode_audio([sound_file(WAVE, 16_000)])
    assert not warned
    for value in (WAVE, {"array": WAVE}, {"array": WAVE, "sampling_rate": None}, WAVE[:, 0].tolist()):
        with pytest.raises(ValueError, match="an array without its sampling_rate"):
            decode_sound(value)


def test_the_rate_of_a_chats_block_is_obeyed(processor):
    wave = np.sin(np.arange(48_000) * 0.02)
    ids = chat_ids(processor, {"type": "audio", "audio": wave, "sampling_rate": 48_000})
    assert len(ids) == 25 + 2


def test_a_file_in_a_chats_block_with_a_rate_says_its_own(processor, site):
    path = site[0] / "own.wav"
    path.write_bytes(sound_file(WAVE, 48_000))
    expected = processor.encode_audio([path])[0]
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes())):
        assert chat_ids(processor, {"type": "audio", "audio": source, "sampling_rate": 8_000}) == expected


def test_sounds_of_other_lengths_than_allowed_are_refused_before_they_are_decoded():
    speech = tokenizer_with_random_units(max_seconds=2.0)
    assert len(speech.encode([sound_file(np.zeros(32_000), 16_000)])[0]) == 50
    for source in (sound_file(np.zeros(32_001), 16_000), np.zeros(32_001, np.float32)):
        with pytest.raises(ValueError, match="too long: 2 seconds of 1 channels at 16000 Hz; max_seconds is 2"):
            speech.encode([source], 16_000)
    assert "max_seconds" not in SpeechTokenizerConfig().to_dict() and speech.config.to_dict()["max_seconds"] == 2.0


@pytest.mark.parametrize("rate", [1_001, 7_919, 11_127, 15_999, 16_001, 44_101, 192_001, 767_999])
def test_odd_rates_are_resampled_as_exactly_as_usual_ones(rate):
    tone = lambda at: np.sin(2 * np.pi * 200 * np.arange(int(at * 0.3)) / at).astype(np.float32)  # noqa: E731
    found = resample(torch.from_numpy(tone(rate)), rate, 16_000).numpy()
    assert len(found) == math.ceil(int(rate * 0.3) * 16_000 / rate)
    middle = slice(1_000, 3_000)
    np.testing.assert_allclose(found[middle], tone(16_000)[middle], atol=2e-4)


def test_resampling_between_filters_equals_the_exact_filter():
    """Every output by its own filter, written out."""
    samples = torch.randn(300, dtype=torch.float64)
    found = resample(samples.float(), 11_127, 16_000)
    cutoff = 0.97
    times = (torch.arange(len(found), dtype=torch.float64)[:, None] * 11_127 / 16_000 - torch.arange(300)) * cutoff
    window = torch.where(times.abs() < 16, torch.cos(times * math.pi / 32).square(), 0.0)
    exact = (torch.sinc(times) * window * cutoff).double() @ samples
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
