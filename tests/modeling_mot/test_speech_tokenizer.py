"""Speech units: features against naive transforms, units against brute force, the way back, bad input."""

import io
import math
import sys

import numpy as np
import pytest
import torch

from modeling_mot.media_loading import load_sound
from modeling_mot.speech_tokenizer import MoTSpeechTokenizer, SpeechFrontEnd, SpeechTokenizerConfig, deltas, resample


RATE = 16_000


def tone(frequency: float, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def chirp(seconds: float = 1.0) -> np.ndarray:
    t = np.arange(int(seconds * RATE)) / RATE
    return np.sin(2 * np.pi * (200 * t + 800 * t**2)).astype(np.float32)


def tokenizer_with_random_units(num_units: int = 16, **settings) -> MoTSpeechTokenizer:
    config = SpeechTokenizerConfig(num_units=num_units, griffin_lim_iterations=4, **settings)
    tokenizer = MoTSpeechTokenizer(config)
    points = tokenizer.features(tokenizer.preprocess(chirp()))
    generator = torch.Generator().manual_seed(0)
    tokenizer.mean, tokenizer.scale = points.mean(0), points.std(0)
    tokenizer.centroids = torch.randn(num_units, points.shape[1], generator=generator)
    shape = (num_units, tokenizer.frames_per_unit, config.num_mel_bands)
    tokenizer.templates = torch.randn(shape, generator=generator) - 3
    return tokenizer


def naive_log_mel(samples: np.ndarray, front_end: SpeechFrontEnd, frame: int) -> np.ndarray:
    """One frame by a written-out Fourier sum and triangles on the HTK mel scale."""
    centre = frame * 160 + 80
    cut = np.array(
        [samples[i] if 0 <= i < len(samples) else 0.0 for i in range(centre - 200, centre + 200)], np.float64
    )
    cut *= 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    k = np.arange(257)[:, None]
    power = np.abs((cut * np.exp(-2j * np.pi * k * np.arange(400) / 512)).sum(1)) ** 2
    hertz = k[:, 0] * RATE / 512
    low, high = (2595 * math.log10(1 + f / 700) for f in (20.0, 8000.0))
    corners = 700 * (10 ** (np.linspace(low, high, front_end.filters.shape[1] + 2) / 2595) - 1)
    bands = []
    for left, middle, right in zip(corners, corners[1:], corners[2:], strict=False):
        triangle = np.minimum((hertz - left) / (middle - left), (right - hertz) / (right - middle))
        bands.append((power * np.maximum(triangle, 0)).sum())
    return np.log(np.maximum(bands, 1e-6))


def test_log_mel_equals_a_written_out_transform():
    front_end, samples = SpeechFrontEnd(), np.random.default_rng(0).normal(size=1600).astype(np.float32)
    found = front_end.log_mel(torch.from_numpy(samples))
    assert found.shape == (10, 40)
    for frame in (0, 4, 9):
        np.testing.assert_allclose(found[frame].numpy(), naive_log_mel(samples, front_end, frame), atol=2e-3)


def test_mfcc_equals_scipys_dct():
    from scipy.fft import dct

    front_end = SpeechFrontEnd()
    log_mel = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    expected = dct(log_mel.numpy(), type=2, norm="ortho", axis=1)[:, :13]
    np.testing.assert_allclose(front_end.mfcc(log_mel)[:, :13].numpy(), expected, atol=1e-5)


def test_deltas_of_a_line_are_its_slope():
    line = torch.arange(10.0)[:, None] * torch.tensor([[2.0, -0.5]])
    torch.testing.assert_close(deltas(line)[2:-2], torch.tensor([[2.0, -0.5]]).expand(6, -1))


def test_deltas_equal_the_regression_formula():
    x = np.random.default_rng(0).normal(size=(6, 1))
    edge = lambda i: x[min(max(i, 0), 5), 0]  # noqa: E731
    expected = [sum(n * (edge(t + n) - edge(t - n)) for n in (1, 2)) / 10 for t in range(6)]
    np.testing.assert_allclose(deltas(torch.from_numpy(x))[:, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("seconds, units", [(1.0, 25), (0.5, 13), (0.001, 1), (0.04, 1), (0.041, 2)])
def test_there_are_25_units_a_second(seconds, units):
    assert len(tokenizer_with_random_units().encode([chirp(2.0)[: int(seconds * RATE)]])[0]) == units


def test_units_are_the_nearest_centroids():
    tokenizer = tokenizer_with_random_units()
    features = tokenizer.features(tokenizer.preprocess(chirp())).double()
    scaled = (features - tokenizer.mean.double()) / tokenizer.scale.double()
    expected = [int((tokenizer.centroids.double() - point).square().sum(1).argmin()) for point in scaled]
    assert tokenizer.encode([chirp()])[0].tolist() == expected


def test_unit_features_are_means_of_their_frames():
    tokenizer = tokenizer_with_random_units()
    samples = tokenizer.preprocess(chirp())
    frames = tokenizer.front_end.mfcc(tokenizer.front_end.log_mel(samples))
    torch.testing.assert_close(tokenizer.features(samples)[3], frames[12:16].mean(0))


def test_deduplication_removes_repeats_only():
    plain, short = tokenizer_with_random_units(4), tokenizer_with_random_units(4, deduplicate=True)
    units = plain.encode([chirp()])[0].tolist()
    expected = [u for i, u in enumerate(units) if i == 0 or u != units[i - 1]]
    assert short.encode([chirp()])[0].tolist() == expected and len(expected) < len(units)


def test_loudness_does_not_change_units():
    tokenizer = tokenizer_with_random_units()
    assert torch.equal(*tokenizer.encode([chirp(), chirp() * 0.05]))


@pytest.mark.parametrize("source, target", [(11_025, 16_000), (44_100, 16_000), (16_000, 22_050), (48_000, 16_000)])
def test_resampled_tone_equals_the_tone_sampled_anew(source, target):
    found = resample(torch.from_numpy(tone(1000, rate=source)), source, target).numpy()
    expected = tone(1000, rate=target)
    assert abs(len(found) - len(expected)) <= 2
    middle = slice(target // 10, target // 3)
    np.testing.assert_allclose(found[middle], expected[middle], atol=2e-3)


def test_resampling_removes_what_would_alias():
    found = resample(torch.from_numpy(tone(7000)), 16_000, 8_000)
    assert found[400:-400].abs().max() < 1e-2


def test_griffin_lim_keeps_a_tones_pitch():
    front_end = SpeechFrontEnd()
    rebuilt = front_end.griffin_lim(front_end.log_mel(torch.from_numpy(tone(1000))), iterations=30)
    spectrum = np.abs(np.fft.rfft(rebuilt.numpy()))
    assert abs(spectrum.argmax() * RATE / len(rebuilt) - 1000) < 60


def test_overlap_add_inverts_the_analysis():
    front_end, samples = SpeechFrontEnd(), torch.from_numpy(chirp())
    rebuilt = front_end.overlap_add(front_end.frames(samples))
    torch.testing.assert_close(rebuilt[200:-200], samples[200:-200], atol=1e-4, rtol=0)


def test_decoded_units_are_float32_of_the_stated_length():
    waveform = tokenizer_with_random_units().decode([torch.tensor([0, 3, 3])])[0]
    assert waveform.dtype == np.float32 and waveform.shape == (3 * 640,) and np.isfinite(waveform).all()


def wav_bytes(samples: np.ndarray, rate: int = RATE) -> bytes:
    soundfile = pytest.importorskip("soundfile")
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def test_all_forms_of_a_sound_give_the_same_units(tmp_path):
    tokenizer, samples = tokenizer_with_random_units(), chirp()
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(samples))
    forms = [
        samples,
        torch.from_numpy(samples),
        path,
        str(path),
        path.read_bytes(),
        {"array": samples, "sampling_rate": RATE},
        {"bytes": path.read_bytes(), "path": None},
        np.stack([samples, samples]),
        np.stack([samples, samples], axis=1),
    ]
    units = tokenizer.encode(forms)
    assert all(torch.equal(sequence, units[0]) for sequence in units)


def test_a_files_own_rate_is_obeyed():
    samples, rate = load_sound(wav_bytes(tone(500, rate=8000), 8000), sampling_rate=RATE)
    assert rate == 8000 and len(samples) == 4000
    units = tokenizer_with_random_units().encode([wav_bytes(tone(500, rate=8000), 8000)])[0]
    assert len(units) == 13  # of half a second


def test_saved_and_loaded_tokenizers_agree(tmp_path):
    tokenizer = tokenizer_with_random_units()
    tokenizer.save_pretrained(tmp_path)
    loaded = MoTSpeechTokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode([chirp()])[0], tokenizer.encode([chirp()])[0])
    assert loaded.fingerprint() == tokenizer.fingerprint()


@pytest.fixture(scope="module")
def hubert_folder(tmp_path_factory):
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8, 8, 8, 8, 8, 8),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    folder = tmp_path_factory.mktemp("hubert")
    HubertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=80,
        max_source_positions=100,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    folder = tmp_path_factory.mktemp("whisper")
    WhisperModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["hubert_folder", "whisper_folder"])
def test_encoders_of_transformers_give_25_units_a_second(name, request):
    folder = str(request.getfixturevalue(name))
    tokenizer = tokenizer_with_random_units(features="encoder", encoder=folder)
    lengths = [len(units) for units in tokenizer.encode([chirp(), chirp()[: RATE // 4], np.tile(chirp(), 5)])]
    assert lengths == [25, 7, 125] and tokenizer.centroids.shape[1] == 16


def test_hubert_features_are_its_hidden_states(hubert_folder):
    from transformers import HubertModel

    tokenizer = tokenizer_with_random_units(features="encoder", encoder=str(hubert_folder), encoder_layer=1)
    samples = tokenizer.preprocess(chirp())
    padded = torch.nn.functional.pad(samples, (160, 320))
    padded = (padded - padded.mean()) / (padded.var() + 1e-7).sqrt()
    with torch.no_grad():
        hidden = (
            HubertModel.from_pretrained(hubert_folder).eval()(padded[None], output_hidden_states=True).hidden_states
        )
    torch.testing.assert_close(tokenizer.features(samples)[4], hidden[1][0, 8:10].mean(0))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.wav"):
        tokenizer_with_random_units().encode([tmp_path / "nowhere.wav"])


def test_broken_sound_is_named(tmp_path):
    pytest.importorskip("soundfile")
    path = tmp_path / "broken.wav"
    path.write_bytes(b"not a sound")
    with pytest.raises(ValueError, match="the sound does not decode: .*broken.wav"):
        tokenizer_with_random_units().encode([path])


def test_missing_soundfile_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match="pip install soundfile"):
        tokenizer_with_random_units().encode([b"RIFF"])


@pytest.mark.parametrize("bad", [np.zeros(0), np.zeros((2, 3, 4)), np.array([np.nan]), 7])
def test_what_is_no_sound_is_refused(bad):
    with pytest.raises(ValueError):
        tokenizer_with_random_units().encode([bad])


@pytest.mark.parametrize("units", [torch.tensor([16]), torch.tensor([-1]), torch.zeros(0), torch.zeros(2, 2)])
def test_bad_units_are_refused(units):
    with pytest.raises(ValueError):
        tokenizer_with_random_units().decode([units])


def test_untrained_tokenizer_says_so():
    with pytest.raises(ValueError, match="no centroids"):
        MoTSpeechTokenizer(SpeechTokenizerConfig()).encode([chirp()])


@pytest.mark.parametrize(
    "settings", [{"features": "encoder"}, {"features": "plp"}, {"units_per_second": 30}, {"encoder": "x"}]
)
def test_contradictory_settings_are_refused(settings):
    with pytest.raises(ValueError):
        SpeechTokenizerConfig(**settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_units": 0}, "num_units=0"),
        ({"units_per_second": 0}, "units_per_second=0"),
        ({"sampling_rate": 1}, "sampling_rate=1"),
        ({"sampling_rate": 16_000.0}, "sampling_rate=16000.0"),
        ({"loudness": math.nan}, "loudness=nan"),
        ({"loudness": -0.1}, "loudness=-0.1"),
        ({"num_mel_bands": 0}, "num_mel_bands=0"),
        ({"num_coefficients": 41}, "num_coefficients=41 must be at most num_mel_bands=40"),
        ({"deduplicate": 1}, "deduplicate=1"),
        ({"griffin_lim_iterations": -1}, "griffin_lim_iterations=-1"),
        ({"features": "mfc"}, "features='mfc' .* did you mean 'mfcc'"),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        SpeechTokenizerConfig(**fields)


def test_units_and_sounds_do_not_follow_an_autocast():
    tokenizer = tokenizer_with_random_units(num_units=64)
    units = tokenizer.encode([chirp()])[0]
    sound = tokenizer.decode([units])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.features(tokenizer.preprocess(chirp())).dtype == torch.float32
        assert torch.equal(tokenizer.encode([chirp()])[0], units)
        assert np.array_equal(tokenizer.decode([units])[0], sound)
