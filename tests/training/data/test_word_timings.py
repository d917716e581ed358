"""Where timings of words come from: flite's own, and what recognisers of transformers hear."""

import ctypes
import json

import datasets
import numpy as np
import pytest
import soundfile
import torch

from training.data import Preparing, SourceConfig, TemplateConfig, TokenizedSource
from training.data.adapters import recognised_words, spoken_text
from training.data.adapters.speech_synthesis import synthesise_words
from training.data.config import InterleavingConfig

from .test_interleaving import processor


LETTERS = "abcdefghijklmnopqrstuvwxyz'"


def has_flite() -> bool:
    try:
        ctypes.CDLL("libflite_cmu_us_slt.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps folders of one name in one place."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


flite = pytest.mark.skipif(not has_flite(), reason="needs Debian's flite")


def prepared(folder, cache) -> TokenizedSource:
    """The data set of an adapter, prepared with an interleaving template: it is refused if a timing is wrong."""
    template = TemplateConfig(["text:text", "audio:audio"], interleaving=InterleavingConfig(variants=2))
    return TokenizedSource.prepare(SourceConfig("made", str(folder), [template]), Preparing(processor(), cache))


# ---------------------------------------------------------------------------------------------------------------- flite


@flite
def test_spoken_words_are_loud_where_their_timings_say():
    wave, words = synthesise_words("The well-known cat, he said, sat on Dr. Smith's 24 mats.", "slt")
    assert [word["word"] for word in words] == (
        ["The", "well-known", "cat", "he", "said", "sat", "on", "Dr", "Smith's", "24", "mats"]
    )
    loudness = [np.abs(wave[int(w["start"] * 16_000) : int(w["end"] * 16_000)]).mean() for w in words]
    assert min(loudness) > 0.01
    # The pauses of the commas are silent, and the times go from one end of the sound to the other.
    for before, after in ((2, 3), (4, 5)):
        start, end = words[before]["end"] + 0.02, words[after]["start"] - 0.02
        assert end > start and np.abs(wave[int(start * 16_000) : int(end * 16_000)]).mean() < min(loudness) / 2
    assert words[0]["start"] < 0.05 and len(wave) / 16_000 - words[-1]["end"] < 0.05


@flite
def test_spoken_texts_become_an_interleaved_source(tmp_path):
    lines = ["Two cats sat here.", "", "naïve café", "日本語", "A dog (it barks)!", "Two cats sat here."]
    (tmp_path / "texts.txt").write_text("\n".join([*lines, *(f"Line number {n} of many." for n in range(20))]))
    spoken_text.main(["--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out"), "--limit", "14"])
    made = datasets.load_dataset(str(tmp_path / "out"))
    texts = [text for split in made.values() for text in split["text"]]
    assert len(texts) == 13 and "日本語" not in texts and "naïve café" in texts
    assert len(prepared(tmp_path / "out", tmp_path / "cache")) == len(made["train"])


@flite
def test_the_carried_definitions_are_spoken_in_their_splits(tmp_path, capsys):
    spoken_text.main(["--out", str(tmp_path / "out"), "--limit", "10"])
    assert "default/train: 10 rows" in capsys.readouterr().out
    made = datasets.load_dataset(str(tmp_path / "out"))
    assert len(made["validation"]) == 1 and all(": " in text for text in made["train"]["text"])


def test_without_flite_the_command_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    spoken_text.synthesise_words.__globals__["_flite"].cache_clear()
    with pytest.raises(SystemExit):
        spoken_text.main(["--out", str(tmp_path / "out"), "--limit", "1"])
    assert "flite is not installed; on Debian: apt-get install flite" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- recognisers


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder of four sounds of noise, at 8 and 16 kHz."""
    folder, random = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for number, rate in enumerate((16_000, 8_000, 16_000, 8_000)):
        wave = random.uniform(-0.5, 0.5, int(rate * (1.1 + number))) * np.sin(
            np.arange(int(rate * (1.1 + number))) / 900
        )
        soundfile.write(folder / f"{number}.wav", wave, rate)
        (folder / f"{number}.txt").write_text("Two words, and four more")
    return folder


@pytest.fixture(scope="module")
def ctc_model(tmp_path_factory):
    """A wav2vec 2.0 of random weights that hears random letters."""
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder = tmp_path_factory.mktemp("ctc")
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]
    (folder / "letters.json").write_text(json.dumps({letter: place for place, letter in enumerate(vocabulary)}))
    Wav2Vec2CTCTokenizer(str(folder / "letters.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[32] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    model = Wav2Vec2ForCTC(config)
    # Letters change from frame to frame, and every few letters a word ends.
    torch.nn.init.normal_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    with torch.no_grad():
        model.lm_head.weight[:4] = 0
        model.lm_head.weight[4] *= 2
    model.save_pretrained(folder)
    return folder


def test_a_ctc_model_makes_texts_and_timings(sounds, ctc_model, tmp_path, capsys):
    recognised_words.main([str(sounds), "--model", str(ctc_model), "--out", str(tmp_path / "out")])
    assert "default/train: 4 rows" in capsys.readouterr().out
    (made,) = datasets.load_dataset(str(tmp_path / "out")).values()
    for row in made:
        assert " ".join(word["word"] for word in row["words"]) == row["text"] and len(row["words"]) > 1
        times = [time for word in row["words"] for time in (word["start"], word["end"])]
        assert times == sorted(times) and times[0] >= 0
    files = {(sounds / f"{number}.wav").read_bytes() for number in range(4)}
    assert {row["bytes"] for row in made.with_format("arrow")[:]["audio"].to_pylist()} == files
    assert len(prepared(tmp_path / "out", tmp_path / "cache")) == 4


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A Whisper of random weights, except that its positions say what is heard: " Two words, and four more"."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    # Bytes, the marks that steer Whisper, and its timestamps.
    folder = tmp_path_factory.mktemp("whisper")
    marks = ["startoftranscript", "en", "translate", "transcribe", "startofprev", "nospeech", "notimestamps"]
    stamps = [f"{place * 0.02:.2f}" for place in range(1501)]
    letters = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = WhisperTokenizer(vocab={letter: place for place, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens([f"<|{mark}|>" for mark in (*marks, *stamps)], special_tokens=True)
    ids = {mark: tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for mark in ("endoftext", *marks, "0.00", "0.80")}
    ends = {"eos_token_id": ids["endoftext"], "pad_token_id": ids["endoftext"], "bos_token_id": ids["endoftext"]}
    starts = {"decoder_start_token_id": ids["startoftranscript"], "suppress_tokens": [], "begin_suppress_tokens": []}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=64,
        **ends,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    text = tokenizer(" Two words, and four more", add_special_tokens=False)["input_ids"]
    heard = [ids["en"], ids["transcribe"], ids["0.00"], *text, ids["0.80"], ids["endoftext"]]
    with torch.no_grad():
        table = torch.nn.functional.normalize(torch.randn(len(tokenizer), 64), dim=1)
        model.model.decoder.embed_tokens.weight.copy_(table)
        model.model.decoder.embed_positions.weight[: len(heard)] = 20 * table[heard]

    # What a Whisper needs for timings of words.
    settings = {
        "lang_to_id": {"<|en|>": ids["en"]},
        "task_to_id": {"transcribe": ids["transcribe"], "translate": ids["translate"]},
        "no_timestamps_token_id": ids["notimestamps"],
        "prev_sot_token_id": ids["startofprev"],
        "alignment_heads": [[0, 0], [0, 1]],
        "is_multilingual": True,
        "max_length": 60,
        "_from_model_config": False,
    }
    for name, value in (settings | ends | starts).items():
        setattr(model.generation_config, name, value)
    for part in (model, tokenizer, WhisperFeatureExtractor()):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [[], ["--text", "text"]])
def test_a_whisper_times_the_words(sounds, whisper, tmp_path, options):
    recognised_words.main([str(sounds), "--model", str(whisper), "--out", str(tmp_path / "out"), *options])
    (made,) = datasets.load_dataset(str(tmp_path / "out")).values()
    assert len(made) == 4 and len(prepared(tmp_path / "out", tmp_path / "cache")) == 4
    for row in made:
        words = [word["word"] for word in row["words"]]
        assert words[-5:] == ["Two", "words,", "and", "four", "more"]
        assert (
            row["text"] == "Two words, and four more" if options else row["text"].endswith("Two words, and four more")
        )


def test_records_in_which_other_words_are_heard_are_left_out(sounds, ctc_model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        arguments = [str(sounds), "--model", str(ctc_model), "--text", "text", "--out", str(tmp_path / "out")]
        recognised_words.main(arguments)
    assert "has no sound with words; 4 were left out" in capsys.readouterr().err


class Heard:
    """A recogniser that hears what it is told."""

    def __init__(self, *chunks):
        self.feature_extractor = type("Extractor", (), {"sampling_rate": 16_000})
        self.heard = {"text": "".join(text for text, _ in chunks)}
        self.heard["chunks"] = [{"text": text, "timestamp": times} for text, times in chunks]

    def __call__(self, sound, return_timestamps):
        assert return_timestamps == "word" and len(sound["raw"]) == 16_000 and sound["raw"].dtype == np.float32
        return self.heard


def test_times_of_a_recogniser_are_put_in_order_and_within_the_sound():
    model = Heard((" Two,", (0.0, 0.4)), (" three", (0.38, 0.36)), (" four.", (0.9, None)), (" five", (1.2, 1.4)))
    text, words = recognised_words.recognise(model, np.zeros(8_000, np.float32), 8_000)
    assert text == "Two, three four. five"
    assert [tuple(word.values()) for word in words] == [
        ("Two,", 0.0, 0.4),
        ("three", 0.4, 0.4),
        ("four.", 0.9, 1.0),
        ("five", 1.0, 1.0),
    ]
