"""The commands that train tokenizers: what they learn, what they read, what they refuse."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from modeling_mot.image_tokenizer import ImageTokenizerConfig, MoTImageTokenizer
from modeling_mot.processing_mot import MoTProcessor
from modeling_mot.processing_vocabulary import SPECIAL_TOKENS
from modeling_mot.speech_tokenizer import MoTSpeechTokenizer
from training.tokenizers import image as image_command
from training.tokenizers import processor as processor_command
from training.tokenizers import speech as speech_command
from training.tokenizers import text as text_command
from training.tokenizers import vae as vae_command
from training.tokenizers.kmeans import assign, kmeans
from training.tokenizers.sources import read_media
from training.tokenizers.text import read_texts, train_text_tokenizer
from training.tokenizers.vq_training import Codebook, VQTrainingConfig, augment, reconstruction_loss, train_vq


COMMANDS = [text_command, image_command, speech_command, processor_command]


# -- k-means ----------------------------------------------------------------------------------------------------------


def test_kmeans_finds_separated_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = 100 * torch.randn(12, 5, generator=generator)
    points = (centres[:, None] + torch.randn(12, 40, 5, generator=generator)).flatten(0, 1)
    found = kmeans(points, 12)
    means = points.view(12, 40, 5).mean(1)
    assert torch.cdist(means, found).min(1).values.max() < 1e-3


def test_kmeans_is_no_worse_than_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    points = torch.randn(800, 4, generator=torch.Generator().manual_seed(0))
    ours = assign(points, kmeans(points, 20, iterations=100))[1].sum()
    theirs = cluster.KMeans(20, n_init=1, random_state=0).fit(points.numpy()).inertia_
    assert ours <= 1.05 * theirs


def test_assign_equals_brute_force():
    points, centroids = torch.randn(50, 3), torch.randn(7, 3)
    distances = torch.cdist(points.double(), centroids.double()).square()
    indices, found = assign(points, centroids)
    assert torch.equal(indices, distances.argmin(1))
    torch.testing.assert_close(found.double(), distances.min(1).values, atol=1e-5, rtol=1e-5)


def test_kmeans_leaves_no_cluster_empty():
    points = torch.cat([torch.zeros(500, 2), torch.randn(20, 2)])
    counts = torch.bincount(assign(points, kmeans(points, 15))[0], minlength=15)
    assert (counts > 0).all()


def test_kmeans_refuses_too_few_points():
    with pytest.raises(ValueError, match="only 2 distinct"):
        kmeans(torch.tensor([[0.0], [1.0], [0.0]]), 3)


# -- text -------------------------------------------------------------------------------------------------------------


def test_every_byte_is_in_the_alphabet():
    tokenizer = train_text_tokenizer(["abc"] * 3, 300)
    value = bytes(range(128)).decode() + "éß漢🍎"
    assert tokenizer.decode(tokenizer.encode(value, add_special_tokens=False)) == value


def test_special_tokens_come_first_and_fill_the_asked_size():
    tokenizer = train_text_tokenizer(["the quick brown fox jumps over the lazy dog " * 4] * 4, 290)
    assert len(tokenizer) == 290
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS.values())) == list(range(len(SPECIAL_TOKENS)))


def test_frequent_words_become_one_token():
    assert train_text_tokenizer(["strawberry jam", "strawberry"] * 8, 320).tokenize("strawberry") == ["strawberry"]


def test_too_small_vocabulary_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no room for merges"):
        (tmp_path / "a.txt").write_text("some text")
        text_command.main(
            ["--output", str(tmp_path / "out"), "--source", str(tmp_path / "a.txt"), "--vocab-size", "200"]
        )
    assert not (tmp_path / "out").exists()


# -- pictures ---------------------------------------------------------------------------------------------------------

TINY_SIZES = [
    "--image-size",
    "16",
    "--channels",
    "8",
    "16",
    "--latent-channels",
    "4",
    "--code-dim",
    "4",
    "--codes",
    "8",
]


def pictures(count: int = 24) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        picture = np.full((16, 16, 3), 255, np.uint8)
        top, left = generator.integers(0, 8, 2)
        picture[top : top + 8, left : left + 8] = generator.choice([[220, 30, 30], [30, 30, 220], [30, 160, 30]])
        found.append(picture)
    return found


@pytest.fixture
def picture_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, picture in enumerate(pictures()):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


def tiny_tokenizer(codes: int = 8) -> MoTImageTokenizer:
    model = {"block_out_channels": [16, 16], "layers_per_block": 1, "latent_channels": 8, "vq_embed_dim": 8}
    model |= {"num_vq_embeddings": codes, "norm_num_groups": 4, "mid_block_add_attention": False}
    return MoTImageTokenizer(ImageTokenizerConfig(image_size=[16, 16], patch_size=2, model=model))


def test_training_lowers_the_error_and_uses_the_codes():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    data = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures()]
    pixels = torch.stack(data).float() / 127.5 - 1

    def error() -> float:
        with torch.no_grad():
            return (tokenizer.decode_codes(tokenizer.encode_pixels(pixels)) - pixels).abs().mean().item()

    before = error()
    train_vq(tokenizer, data, VQTrainingConfig(steps=150, batch_size=8, bf16=False), log=lambda line: None)
    assert error() < 0.4 * before
    assert len(tokenizer.encode_pixels(pixels).unique()) >= 6
    assert not any(p.requires_grad for p in tokenizer.model.parameters())


def test_codebook_follows_the_mean_of_its_latents():
    codebook = Codebook(torch.tensor([[0.0, 0.0], [10.0, 10.0]]), decay=0.5)
    latents = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
    for _ in range(40):
        codebook.update(latents, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(codebook.weight, torch.tensor([[2.0, 0.0], [9.0, 9.0]]))


def test_unused_codes_are_restarted_on_latents():
    codebook = Codebook(torch.tensor([[0.0], [100.0]]), decay=0.5)
    latents = torch.tensor([[0.1], [0.2], [5.0], [0.3]])
    for _ in range(10):
        codebook.update(latents, torch.zeros(4, dtype=torch.long))
    assert codebook.restart_unused(latents, torch.Generator().manual_seed(0)) == 1
    assert codebook.weight[1].item() in [value.item() for value in latents]


def test_reconstruction_loss_of_a_constant_error_is_its_closed_form():
    pixels = torch.zeros(1, 3, 8, 8)
    config = VQTrainingConfig(l1=1.0, gradient=7.0, coarse=0.5)
    assert reconstruction_loss(pixels + 0.25, pixels, config).item() == pytest.approx(0.25 + 2 * 0.5 * 0.25)


def test_augmentation_only_mirrors_and_shifts():
    pixels = torch.rand(4, 3, 8, 8)
    config = VQTrainingConfig(flip=1.0, shift=0)
    assert torch.equal(augment(pixels, config, torch.Generator()), pixels.flip(-1))


def test_image_command_trains_on_a_folder(picture_folder, tmp_path):
    arguments = ["--source", str(picture_folder), "--output", str(tmp_path / "out"), "--steps", "20", *TINY_SIZES]
    figures = image_command.main([*arguments, "--sheet", str(tmp_path / "sheet.png")])
    tokenizer = MoTImageTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.num_codes == 8 and tokenizer.image_grid == [4, 4] and figures["pictures"] == 24
    assert (tmp_path / "sheet.png").is_file() and {p.name for p in tmp_path.iterdir()} == {
        "out",
        "pictures",
        "sheet.png",
    }


def test_image_command_names_a_broken_picture_and_writes_nothing(picture_folder, tmp_path):
    (picture_folder / "0.png").write_bytes(b"x")
    with pytest.raises(SystemExit, match="does not decode: .*0.png"):
        image_command.main(["--source", str(picture_folder), "--output", str(tmp_path / "out"), *TINY_SIZES])
    assert not (tmp_path / "out").exists()


# -- sound ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sound_folder(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    folder = tmp_path / "sounds"
    folder.mkdir()
    time = np.arange(8000) / 16_000
    for index, frequency in enumerate((200, 500, 1000, 2000)):
        soundfile.write(folder / f"{index}.wav", np.sin(2 * np.pi * frequency * time * (1 + time)), 16_000)
    return folder


def test_speech_command_trains_on_a_folder(sound_folder, tmp_path):
    figures = speech_command.main(["--source", str(sound_folder), "--output", str(tmp_path / "out"), "--units", "12"])
    tokenizer = MoTSpeechTokenizer.from_pretrained(tmp_path / "out")
    assert figures["units_used"] == 12 and figures["sounds"] == 4
    assert tokenizer.centroids.shape == (12, 39) and tokenizer.templates.shape == (12, 4, 40)
    features = torch.cat([tokenizer.features(tokenizer.preprocess(p)) for p in sorted(sound_folder.iterdir())])
    torch.testing.assert_close(features.mean(0), tokenizer.mean, atol=1e-3, rtol=1e-3)


def test_templates_are_the_means_of_their_units(sound_folder, tmp_path):
    speech_command.main(["--source", str(sound_folder), "--output", str(tmp_path / "out"), "--units", "5"])
    tokenizer = MoTSpeechTokenizer.from_pretrained(tmp_path / "out")
    paths = sorted(sound_folder.iterdir())
    units = torch.cat(tokenizer.encode(paths))
    spectra = [tokenizer.front_end.log_mel(tokenizer.preprocess(path)).view(-1, 4, 40) for path in paths]
    expected = torch.cat(spectra)[units == units[0]].mean(0)
    torch.testing.assert_close(tokenizer.templates[units[0]], expected, atol=1e-2, rtol=1e-3)


def test_too_little_sound_is_refused(sound_folder, tmp_path):
    with pytest.raises(SystemExit, match="500 clusters were asked for"):
        speech_command.main(["--source", str(sound_folder), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# -- all of them ------------------------------------------------------------------------------------------------------


def test_assembled_processor_speaks_all_modalities(picture_folder, sound_folder, tmp_path):
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"a {word} box"}) for word in ["red", "blue", "green"])
    )
    out = lambda name: str(tmp_path / name)  # noqa: E731
    text_command.main(
        ["--source", out("texts.jsonl"), "--output", out("t"), "--vocab-size", "280", "--min-frequency", "1"]
    )
    image_command.main(["--source", str(picture_folder), "--output", out("i"), "--steps", "5", *TINY_SIZES])
    speech_command.main(["--source", str(sound_folder), "--output", out("s"), "--units", "6"])
    arguments = ["--text", out("t"), "--image", out("i"), "--speech", out("s"), "--output", out("p")]
    processor_command.main([*arguments, "--no-code"])
    processor = MoTProcessor.from_pretrained(out("p"))
    assert not list((tmp_path / "p").glob("*.py"))
    document = [{"type": "text", "text": "a red box"}, {"type": "image", "image": picture_folder / "0.png"}]
    document += [{"type": "audio", "audio": sound_folder / "0.wav"}]
    segments = processor.decode_document(processor(document)["input_ids"])
    assert [segment["type"] for segment in segments] == ["text", "image", "audio"]


def test_parquet_columns_are_read_with_lists_flattened(tmp_path):
    from datasets import Dataset

    from training.tokenizers.sources import read_column_values

    records = Dataset.from_dict({"name": ["apple", "pear"], "keywords": [["red", "fruit"], []]})
    records.to_parquet(tmp_path / "a.parquet")
    found = list(read_column_values([str(tmp_path / "a.parquet")], ["name", "keywords"], None, ()))
    assert [value for value in found if isinstance(value, str)] == ["apple", "red", "fruit", "pear"]


def test_an_unknown_column_is_named_with_those_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"words": "x"}')
    with pytest.raises(SystemExit, match="no column text.*it has words"):
        text_command.main(
            ["--source", str(tmp_path / "a.jsonl"), "--column", "text", "--output", str(tmp_path / "out")]
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_existing_output_is_not_overwritten(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    extra = ["--text", "x"] if command is processor_command else []
    with pytest.raises(SystemExit, match="--overwrite"):
        command.main(["--output", str(tmp_path / "out"), *extra])
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_overwrite_replaces_the_folder(sound_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    arguments = ["--source", str(sound_folder), "--output", str(tmp_path / "out"), "--units", "4", "--overwrite"]
    speech_command.main(arguments)
    assert not (tmp_path / "out" / "old").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_source_is_named(command, tmp_path):
    flag = "--text" if command is processor_command else "--source"
    with pytest.raises(SystemExit, match="nowhere"):
        command.main([flag, str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    assert all(action.help for action in command.build_parser()._actions)


# ------------------------------------------------------------------------------------- files that records name


@pytest.fixture
def secret(tmp_path):
    """A picture, a sound and a text that no source has a right to."""
    folder = tmp_path / "secret"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "s.png")
    soundfile.write(folder / "s.wav", np.zeros(16_000, dtype=np.float32), 16_000)
    (folder / "s.txt").write_text("xyzzy plugh " * 50)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_column_that_names_a_file_is_text(kind, secret, tmp_path):
    records = datasets.Dataset.from_list([{"text": str(secret / "s.txt")}, {"text": "a"}])
    source = tmp_path / f"a.{kind}"
    records.to_parquet(source) if kind == "parquet" else records.to_json(source)
    assert list(read_texts([str(source)], ["text"], None)) == [str(secret / "s.txt"), "a"]


@pytest.mark.parametrize("name", ["{secret}/{file}", "../secret/{file}", "in/../../secret/{file}", "link"])
@pytest.mark.parametrize(
    ("command", "column", "file"),
    [(image_command, "image", "s.png"), (vae_command, "image", "s.png"), (speech_command, "audio", "s.wav")],
)
def test_records_name_no_file_outside_of_their_source(command, column, file, name, secret, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(secret / file)
    name = name.format(secret=secret, file=file)
    datasets.Dataset.from_list([{column: name}]).to_parquet(tmp_path / "data" / "a.parquet")
    with pytest.raises(SystemExit, match="which is outside of its folder"):
        command.main(["--source", str(tmp_path / "data" / "a.parquet"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "file"),
    [(text_command, "s.txt"), (image_command, "s.png"), (vae_command, "s.png"), (speech_command, "s.wav")],
)
def test_links_out_of_a_folder_of_files_are_refused(command, file, secret, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / file).symlink_to(secret / file)
    with pytest.raises(SystemExit, match="is a link that leads outside"):
        command.main(["--source", str(tmp_path / "data"), "--output", str(tmp_path / "out")])


def test_a_record_may_name_a_file_of_its_source(secret, tmp_path):
    shutil.copytree(secret, tmp_path / "data" / "in")
    datasets.Dataset.from_list([{"image": "in/s.png"}]).to_parquet(tmp_path / "data" / "a.parquet")
    (found,) = read_media([str(tmp_path / "data" / "a.parquet")], ["image"], None, ())
    assert Path(found) == tmp_path / "data" / "in" / "s.png"


# ------------------------------------------------------------------------------------- what cannot be used is one line


OPTIONS = [
    (text_command, "--vocab-size", ["0", "x", "nan", str(10**30)]),
    (text_command, "--min-frequency", ["-1"]),
    (image_command, "--batch-size", ["0", "-1"]),
    (image_command, "--steps", ["0", "-1"]),
    (image_command, "--lr", ["nan", "inf", "-1"]),
    (vae_command, "--layers", ["-1"]),
    (vae_command, "--kl", ["nan", "-1"]),
    (speech_command, "--units", ["0", str(10**30)]),
    (processor_command, "--downsampling", ["0", "-8"]),
    *((command, "--seed", ["-1", str(10**30)]) for command in COMMANDS),
]


@pytest.mark.parametrize(("command", "option", "values"), OPTIONS)
def test_numbers_out_of_range_name_their_option(command, option, values, tmp_path, capsys):
    extra = ["--text", "x"] if command is processor_command else []
    for value in values:
        with pytest.raises(SystemExit) as ended:
            command.main([f"{option}={value}", "--output", str(tmp_path / "out"), *extra])
        assert ended.value.code == 2 and f"error: argument {option}" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/x", "a\0b"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(command, place):
    extra = ["--text", "/nowhere"] if command is processor_command else ["--source", "/nowhere"]
    with pytest.raises(SystemExit, match="error: --output .* cannot be written"):
        command.main(["--output", place, *extra])


@pytest.mark.parametrize(("place", "said"), [("/dev/null/x.png", "cannot be written"), ("x.nope", "no suffix")])
@pytest.mark.parametrize("command", [image_command, vae_command])
def test_a_sheet_that_cannot_be_written_is_refused_before_any_work(command, place, said, tmp_path):
    with pytest.raises(SystemExit, match=f"error: --sheet .*{said}"):
        command.main(["--output", str(tmp_path / "out"), "--source", "/nowhere", "--sheet", place])


@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", b"\xff\xfe"), ("a.json", b""), ("a.jsonl", b'{"text": '), ("a.csv", b"\xff\xfe\0")]
)
def test_a_file_of_texts_that_is_none_is_named(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit, match=rf"error: .*{name}"):
        text_command.main(["--source", str(tmp_path / name), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_with_the_suffix_of_a_file_is_passed_over(tmp_path):
    (tmp_path / "bad.txt").symlink_to(tmp_path)
    (tmp_path / "b.txt").write_text("a\n")
    assert list(read_texts([str(tmp_path)], ["text"], None)) == ["a\n"]


def test_a_word_without_end_takes_no_longer_than_its_letters():
    texts = ["the thing " * 20, "a" * 2**20]
    tokenizer = train_text_tokenizer(texts, 300)
    assert tokenizer.decode(tokenizer(texts[0], add_special_tokens=False)["input_ids"]) == texts[0]
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "ByteLevel"


def test_words_of_usual_length_are_learnt_as_they_are_without_the_bound(monkeypatch):
    texts = ["a thing is a thing of that kind", "x" * 999] * 5
    bounded = train_text_tokenizer(texts, 320).get_vocab()
    monkeypatch.setattr(text_command, "_MOST_WORD", 10**6)
    assert train_text_tokenizer(texts, 320).get_vocab() == bounded


def _junk_text(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"ByteLevel"', "3"))


@pytest.mark.parametrize(
    ("part", "break_it", "said"),
    [
        ("text", _junk_text, "--text: the tokenizer of .* cannot be read"),
        ("speech", lambda folder: (folder / "model.safetensors").write_bytes(b"junk"), "model.safetensors cannot be"),
        ("speech", lambda folder: (folder / "speech_tokenizer_config.json").write_text("3"),
        "config.json holds no JSON"),
        ("speech", lambda folder: (folder / "speech_tokenizer_config.json").write_bytes(b"\xff"), "config.json cannot"),
        ("speech", lambda folder: (folder / "speech_tokenizer_config.json").write_text("[" * 10**5),
        "config.json cannot"),
        ("speech", shutil.rmtree, "--speech: "),
    ],
)  # fmt: skip
def test_a_part_that_is_damaged_is_named(part, break_it, said, sound_folder, tmp_path):
    train_text_tokenizer(["a thing"], 300).save_pretrained(tmp_path / "text")
    speech_command.main(["--source", str(sound_folder), "--output", str(tmp_path / "speech"), "--units", "2"])
    break_it(tmp_path / part)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        processor_command.main(
            [f"--{part}={tmp_path / part}" for part in ("text", "speech")] + ["--output", str(tmp_path / "out")]
        )
