import base64
import re
import wave
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import recursively_apply
from PIL import Image, ImageFilter

from modeling_mot import MoTForCausalLM
from training.config import ConfigError
from training.data import DataConfig, SourceConfig, TemplateConfig, collate
from training.data.config import InterleavingConfig, carried_path
from training.data.reading.sources import open_source
from training.data.rows import directions_of
from training.evaluation.end_of_run import describe_measures, make_samples
from training.evaluation.losses import evaluate_losses, evaluation_note, is_repeated, target_objective
from training.evaluation.retrieval import PictureGallery, descriptor, retrieval_share, rgb_to_lab
from training.evaluation.sampling import Sampler, write_wav
from training.evaluation.sheet import SampleSheet, plot_losses
from training.evaluation.subjects import NamedPicture, SampleSubjects, find_subjects
from training.model.building import build_model
from training.recipe import EvaluationConfig, ModelConfig, SamplesConfig, check_subjects

from .tiny import MadeUpStream, tiny_config, tiny_model


def emoji_source(split: str = "train", **fields) -> SourceConfig:
    templates = [TemplateConfig(["text:name", "image:image"]), TemplateConfig(["text:name", "audio:audio"])]
    values = {"name": "emoji", "path": "carried", "config": "emoji", "split": split, "templates": templates}
    return SourceConfig(**(values | fields))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Every fifth of the carried training pictures."""
    from training.data.reading.records import decode_picture

    records = open_source(emoji_source()).records
    return [decode_picture(records[index]["image"]) for index in range(0, len(records), 5)]


@pytest.fixture(scope="module")
def gallery(pictures) -> PictureGallery:
    return PictureGallery(pictures)


def share(gallery, pictures) -> float:
    return retrieval_share(gallery.ranks(pictures, range(len(pictures))))


# ---------------------------------------------------------------------------------------------------------- retrieval


def test_every_picture_finds_itself(gallery, pictures):
    assert share(gallery, pictures) == 1.0


def test_shifted_pictures_find_their_originals(gallery, pictures):
    def shifted(picture):
        moved = Image.new("RGB", picture.size, "white")
        moved.paste(picture, (1, 1))
        return moved

    assert share(gallery, [shifted(picture) for picture in pictures]) >= 0.95


def test_noisy_pictures_find_their_originals(gallery, pictures):
    random = np.random.default_rng(0)

    def noisy(picture):
        values = np.asarray(picture, dtype=float) + random.normal(0, 20, (64, 64, 3))
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))

    assert share(gallery, [noisy(picture) for picture in pictures]) >= 0.95


def test_blurred_pictures_find_their_originals(gallery, pictures):
    assert share(gallery, [picture.filter(ImageFilter.GaussianBlur(1.5)) for picture in pictures]) >= 0.95


def test_other_pictures_are_not_right(gallery, pictures):
    ranks = gallery.ranks(pictures[1:] + pictures[:1], range(len(pictures)))
    assert retrieval_share(ranks) < 0.05 and np.median(ranks) > 20


def test_a_picture_equal_to_the_named_one_is_not_nearer():
    twin, other = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    assert PictureGallery([twin, other, twin.copy()]).ranks([twin], [2]).tolist() == [0]


def test_any_picture_of_the_named_concept_is_right(pictures):
    some, drawn = pictures[:12], [picture.filter(ImageFilter.GaussianBlur(3)) for picture in pictures[4:16]]
    concepts = ["dog", "cat", "sun", "cup"] * 3
    ranks = PictureGallery(some, concepts).ranks(drawn, range(12))
    for picture, index, rank in zip(drawn, range(12), ranks, strict=True):
        distances = [np.linalg.norm(descriptor(picture) - descriptor(other)) for other in some]
        nearest = min(d for d, concept in zip(distances, concepts, strict=True) if concept == concepts[index])
        assert rank == sum(d < nearest - 1e-6 for d in distances)
    assert 0 < sum(ranks == 0) < 12
    alone = PictureGallery(some, concepts).ranks(drawn, range(12), by_concept=False)
    assert alone.tolist() == PictureGallery(some).ranks(drawn, range(12)).tolist() != ranks.tolist()


def test_descriptor_does_not_depend_on_size():
    picture = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    larger = picture.resize((256, 256), Image.Resampling.NEAREST)
    np.testing.assert_allclose(descriptor(picture), descriptor(larger), atol=1e-12)


def test_colours_convert_to_published_lab_values():
    # Bruce Lindbloom's calculator, sRGB and D65.
    rgb = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    lab = [[53.2408, 80.0925, 67.2032], [87.7347, -86.1827, 83.1793], [32.2970, 79.1875, -107.8602], [100, 0, 0]]
    np.testing.assert_allclose(rgb_to_lab(rgb), lab, atol=0.02)


# ------------------------------------------------------------------------------------------------------------- losses


def held_out(model, config=None):
    AcceleratorState._reset_state(reset_partial_state=True)
    stream = MadeUpStream()
    rows = {"text-to-image": [stream.row(i) for i in range(5)], "text": [stream.row(i) for i in range(5, 7)]}
    config = config or EvaluationConfig(batch_rows=2)
    return rows, evaluate_losses(model.eval(), rows, collate, config, Accelerator(cpu=True))


def test_held_out_loss_is_the_mean_over_targets_of_the_modality():
    model = tiny_model()
    rows, figures = held_out(model)
    sums, counts = dict.fromkeys(model.config.modalities, 0.0), dict.fromkeys(model.config.modalities, 0)
    for direction in rows.values():
        for row in direction:
            logits = model(**{k: v for k, v in collate([row]).items() if k != "labels"}).logits[0]
            for place in range(1, len(row["labels"])):
                if row["labels"][place] != -100:
                    name = model.config.modalities[row["modality_ids"][place]]
                    sums[name] -= logits[place - 1].log_softmax(-1)[row["labels"][place]].item()
                    counts[name] += 1
    for name in model.config.modalities:
        assert figures[f"eval/loss_{name}"] == pytest.approx(sums[name] / counts[name], rel=1e-5)


def test_held_out_loss_does_not_depend_on_the_batch():
    figures = [held_out(tiny_model(), EvaluationConfig(batch_rows=size))[1] for size in (1, 5)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_each_direction_has_the_loss_of_its_target():
    assert [target_objective(name, tiny_config()) for name in ("text-to-image", "image-to-text", "text")] == [
        "image",
        "text",
        "text",
    ]
    _, figures = held_out(tiny_model())
    assert {"eval/text-to-image/loss", "eval/text/loss"} <= set(figures)


def test_every_source_has_the_loss_of_its_direction_and_the_direction_that_of_all():
    AcceleratorState._reset_state(reset_partial_state=True)
    model, stream = tiny_model().eval(), MadeUpStream()
    rows = {"a/text": [stream.row(0)], "b/c/text": [stream.row(1), stream.row(2)], "b/c/interleaved": [stream.row(3)]}
    arguments = collate, EvaluationConfig(batch_rows=2), Accelerator(cpu=True)
    figures = evaluate_losses(model, rows, *arguments)
    alone = {name: evaluate_losses(model, {"text": rows[name]}, *arguments)["eval/text/loss"] for name in rows}
    assert figures["eval/a/text/loss"] == pytest.approx(alone["a/text"], rel=1e-6)
    assert figures["eval/b/c/text/loss"] == pytest.approx(alone["b/c/text"], rel=1e-6)
    together = evaluate_losses(model, {"text": [*rows["a/text"], *rows["b/c/text"]]}, *arguments)
    assert figures["eval/text/loss"] == pytest.approx(together["eval/text/loss"], rel=1e-6)
    assert figures["eval/b/c/interleaved/loss_text"] == pytest.approx(alone["b/c/interleaved"], rel=1e-6)

    # Interleaved documents: every token that has a label, of whichever modality.
    [row] = rows["b/c/interleaved"]
    logits = model(**{k: v for k, v in collate([row]).items() if k != "labels"}).logits[0].log_softmax(-1)
    losses = [-logits[p - 1, row["labels"][p]].item() for p in range(1, len(row["labels"])) if row["labels"][p] != -100]
    assert figures["eval/b/c/interleaved/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert {is_repeated(key, figures) for key in figures} == {False}
    assert is_repeated("eval/a/text/loss", {"eval/a/text/loss": 1.0, "eval/text/loss": 1.0})


def test_expert_choice_is_stated_where_it_is_used():
    assert "expert choice" in evaluation_note(tiny_config("moe-4x"))
    assert evaluation_note(tiny_config("mot")) is None


def test_directions_follow_from_the_templates():
    source = emoji_source(templates=[TemplateConfig(["image:image", "text:name"]), TemplateConfig(["text:{name}!"])])
    assert directions_of(source) == {
        "text-to-image": ("text:name", "image:image"),
        "image-to-text": ("image:image", "text:name"),
        "text": ("text:{name}!",),
    }
    alone = [TemplateConfig(["audio:audio"]), TemplateConfig(["image:image"])]
    turns = TemplateConfig(["text:name", "audio:audio"], interleaving=InterleavingConfig())
    assert directions_of(emoji_source(templates=[turns])) == {}
    assert directions_of(emoji_source(templates=[turns, *alone])) == {
        "speech": ("audio:audio",),
        "image": ("image:image",),
    }


# ------------------------------------------------------------------------------------------------------------ samples


class SpellingProcessor:
    """A processor with the tokens of tiny.py: letters are 10 to 35, a picture is four codes, a unit 10 samples."""

    def __call__(self, documents, continue_with=None, add_eos=None):
        opening = {"image": [3], "audio": [5], "text": [], None: []}[continue_with]
        return {"input_ids": [[1, *(i for s in d for i in self.ids(s)), *opening] for d in documents]}

    def ids(self, segment):
        if segment["type"] == "image":
            return self.encode_images([segment["image"]])[0]
        return [10 + ord(letter) - ord("a") for letter in segment["text"] if letter.isalpha()]

    def encode_images(self, images):
        grey = [np.asarray(image.convert("L").resize((2, 2)), dtype=int).ravel() for image in images]
        return [[3, *(40 + values * 19 // 255).tolist(), 4] for values in grey]

    def decode_document(self, ids):
        kind = {3: "image", 5: "audio"}.get(ids[0], "text")
        if kind == "image":
            assert len(ids) == 6 and all(40 <= i < 60 for i in ids[1:-1])
            pixels = (np.array(ids[1:-1]) - 40).reshape(2, 2) * 13
            return [{"type": "image", "image": Image.fromarray(pixels.astype(np.uint8)).resize((64, 64))}]
        if kind == "audio":
            assert ids[-1] == 6 and all(60 <= i < 70 for i in ids[1:-1])
            return [{"type": "audio", "audio": np.zeros(10 * (len(ids) - 2), np.float32), "sampling_rate": 250}]
        return [{"type": "text", "text": "".join(chr(ord("a") + i - 10) for i in ids if 10 <= i < 36)}]


@pytest.fixture
def sampler():
    return Sampler(tiny_model().eval(), SpellingProcessor(), SamplesConfig(batch=2, max_text_tokens=5))


def test_only_the_models_generation_follows_the_autocast_of_training():
    seen = []

    class Watching(SpellingProcessor):
        def encode_images(self, images):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().encode_images(images)

        def decode_document(self, ids):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().decode_document(ids)

    model, inside = tiny_model().eval(), []
    model.register_forward_pre_hook(lambda module, inputs: inside.append(torch.is_autocast_enabled("cpu")))
    config = SamplesConfig(batch=2, max_text_tokens=2)
    sampler = Sampler(model, Watching(), config, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    pictures = sampler.draw(["cat"])
    sampler.reconstruct(pictures), sampler.read(pictures), sampler.speak(["cat"]), sampler.continue_text(["cat"])
    assert inside and all(inside) and seen and not any(seen)


def test_a_picture_is_drawn_for_every_name(sampler):
    assert [picture.size for picture in sampler.draw(["cat", "dog", "a"])] == [(64, 64)] * 3


def test_a_drawing_does_not_depend_on_its_batch(sampler):
    names = ["cat", "elephant", "a"]
    together = sampler.draw(names)
    alone = [sampler.draw([name])[0] for name in names]
    assert [picture.tobytes() for picture in together] == [picture.tobytes() for picture in alone]


def test_guidance_of_one_changes_nothing_and_more_does_something():
    model, pictures = tiny_model(initializer_range=0.5).eval(), {}
    for scale in (1.0, 8.0):
        config = SamplesConfig(guidance_scale=scale)
        pictures[scale] = [p.tobytes() for p in Sampler(model, SpellingProcessor(), config).draw(["cat", "dog", "emu"])]
    assert pictures[1.0] != pictures[8.0]


def test_names_are_read_as_text(sampler):
    read = sampler.read([Image.new("RGB", (64, 64), colour) for colour in ("red", "white", "black")])
    assert len(read) == 3 and all(re.fullmatch("[a-z]{0,5}", text) for text in read)


def ending_model(origin):
    """A new model of the trainer, or one that it goes on with; its likeliest token is always the end."""
    initial = tiny_model() if origin == "initial" else None
    made = build_model(ModelConfig(), tiny_config(), 0, initial=initial).eval()
    made.generation_config.sequence_bias = [[[2], 100.0]]
    return made


@pytest.mark.parametrize("origin", ["new", "initial"])
def test_text_that_is_asked_for_is_not_empty_wherever_the_model_is_loaded(tmp_path, origin):
    made, prompt = ending_model(origin), torch.tensor([[1, 3, 40, 41, 42, 43, 4]])
    made.save_pretrained(tmp_path)
    for one in (made, MoTForCausalLM.from_pretrained(tmp_path)):
        for answer in (
            one.generate(prompt, max_new_tokens=5, do_sample=False)[0, 7:].tolist(),
            one.generate_batch([{"input_ids": prompt[0], "do_sample": False}])["req_0"].generated_tokens,
        ):
            assert len(answer) == 2 and answer[0] != 2 and answer[1] == 2


def test_a_setting_that_the_checkpoint_has_is_kept():
    initial = tiny_model()
    initial.generation_config.min_new_tokens = 3
    assert build_model(ModelConfig(), tiny_config(), 0, initial=initial).generation_config.min_new_tokens == 3


def test_spoken_names_are_waveforms_no_longer_than_asked(sampler):
    sampler.config.max_speech_tokens = 7
    for audio, rate in sampler.speak(["cat", "dog"]):
        assert rate == 250 and 10 <= len(audio) <= 70


def test_sampling_can_be_stopped_between_batches(sampler):
    def stop():
        raise KeyboardInterrupt

    sampler.check_stop = stop
    with pytest.raises(KeyboardInterrupt):
        sampler.draw(["cat"])


def test_a_model_that_knows_its_pictures_measures_as_right(tmp_path, monkeypatch, pictures):
    named = [NamedPicture(f"name {index}", picture) for index, picture in enumerate(pictures[:6])]
    images = {p.name: p.image for p in named}
    names = {id(p.image): p.name for p in named}
    monkeypatch.setattr(Sampler, "draw", lambda self, asked: [images[name] for name in asked])
    monkeypatch.setattr(Sampler, "reconstruct", lambda self, originals: originals)
    monkeypatch.setattr(Sampler, "read", lambda self, originals: [names[id(o)] for o in originals[:-1]] + ["wrong"])
    subjects = SampleSubjects(
        held_in=named[:4], held_out=named[4:], distractors=[NamedPicture("", picture) for picture in pictures[6:20]]
    )
    config = SamplesConfig(shown=3)
    sheet, measures = make_samples(tiny_model(), SpellingProcessor(), subjects, config, tmp_path / "samples", "title")
    # A picture without error counts as one of a single grey level in one of its values.
    perfect = 10 * np.log10(255**2 * 64 * 64 * 3)
    expected = {
        "gallery_size": 20,
        "drawn": 4,
        "drawn_right": 1.0,
        "reconstructed_right": 1.0,
        "read_right": 0.75,
        "held_out_drawn": 2,
        "held_out_drawn_right": 1.0,
        "held_out_reconstructed_right": 1.0,
        "held_out_read_right": 0.5,
        "drawn_psnr": perfect,
        "reconstructed_psnr": perfect,
        "held_out_drawn_psnr": perfect,
        "held_out_reconstructed_psnr": perfect,
    }
    assert measures == pytest.approx(expected)
    assert len(sheet.pictures) == 3 and len(list((tmp_path / "samples").glob("*.png"))) == 6
    lines = describe_measures(measures, config)
    assert "100.0%" in lines[0][1] and "89.0 dB (encoded and decoded originals: 89.0 dB)" in lines[2][1]


def test_subjects_are_what_the_run_trained_on_and_the_rest_are_distractors():
    data = DataConfig(sources=[emoji_source(limit=5)], validation_sources=[emoji_source("validation", limit=3)])
    subjects = find_subjects(data, SamplesConfig(spoken=2))
    records = open_source(emoji_source()).records
    assert [p.name for p in subjects.held_in] == records["name"][:5]
    assert [len(subjects.held_out), subjects.spoken] == [3, records["name"][:2]]
    assert len(subjects.held_in) + len(subjects.held_out) + len(subjects.distractors) == 1911
    assert carried_path().is_dir()


def test_a_picture_of_the_named_concept_is_right_and_the_very_picture_is_counted_apart(tmp_path, monkeypatch, pictures):
    # Asked for each picture, the model draws the other one of the same concept.
    named = [NamedPicture(f"{'ab'[i % 2]}, style {i}", picture, "ab"[i % 2]) for i, picture in enumerate(pictures[:4])]
    other = {p.name: q.image for p, q in zip(named, named[2:] + named[:2], strict=True)}
    monkeypatch.setattr(Sampler, "draw", lambda self, asked: [other[name] for name in asked])
    monkeypatch.setattr(Sampler, "reconstruct", lambda self, originals: originals)
    monkeypatch.setattr(Sampler, "read", lambda self, originals: ["" for _ in originals])
    config = SamplesConfig(concept="name", held_out_label="never seen in this style")
    subjects = SampleSubjects(held_in=named[:3], held_out=named[3:])
    sheet, measures = make_samples(tiny_model(), SpellingProcessor(), subjects, config, tmp_path, "title")
    assert [measures[key] for key in ("drawn_right", "drawn_same", "held_out_drawn_right")] == [1.0, 0.0, 1.0]
    assert any("never seen in this style" in what for what, _ in sheet.figures)
    sheet.write_html(tmp_path / "sheet.html")
    assert "Names never seen in this style" in (tmp_path / "sheet.html").read_text()


def test_subjects_know_what_they_show_and_a_concept_is_a_column_of_the_captions(tmp_path):
    caption = TemplateConfig(["text:{name}, {category}", "image:image"])
    data = DataConfig(sources=[emoji_source(limit=5, templates=[caption])])
    subjects = find_subjects(data, SamplesConfig(concept="category"))
    records = open_source(emoji_source()).records
    assert [p.concept for p in subjects.held_in + subjects.distractors] == records["category"]
    with pytest.raises(ConfigError, match="samples.concept='style' is no column .* name, category"):
        check_subjects(data, SamplesConfig(concept="style"))


def test_distractors_come_from_their_own_sources_too(tmp_path):
    data = DataConfig(sources=[emoji_source(limit=5)])
    further = [emoji_source(split="validation", name="further"), emoji_source(split="validation", limit=3)]
    config = SamplesConfig(concept="name", distractors=further)
    check_subjects(data, config)
    subjects = find_subjects(data, config)
    names, held_out = open_source(emoji_source()).records["name"], open_source(further[0]).records["name"]
    assert [p.concept for p in subjects.held_in] == names[:5] and subjects.held_out == []
    assert [p.concept for p in subjects.distractors] == [*names[5:], *held_out, *held_out]

    texts = emoji_source(name="texts", templates=[TemplateConfig(["text:name"])])
    with pytest.raises(ConfigError, match="samples.distractors: 'texts' has no template of a text and an image"):
        check_subjects(data, SamplesConfig(distractors=[texts]))
    with pytest.raises(ConfigError, match="samples.distractors: .*validaton"):
        check_subjects(data, SamplesConfig(distractors=[emoji_source(split="validaton")]))


# ------------------------------------------------------------------------------------------------------------- sheets


@pytest.fixture
def sheet(tmp_path, pictures):
    write_wav(tmp_path / "a.wav", np.sin(np.arange(100)), 16000)
    group = [("<b>cat</b>", *pictures[:3], "dog"), ("sun", *pictures[3:6], "sun")]
    spoken = [("cat", tmp_path / "a.wav")]
    return SampleSheet("a & b", [("share", "50 %")], group, group[:1], spoken, [("once", " upon")])


def test_the_html_sheet_is_self_contained_and_escaped(sheet, tmp_path):
    sheet.write_html(tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    sources = re.findall(r"src=['\"]([^'\"]*)", page)
    assert len(sources) == 10 and all(source.startswith("data:") for source in sources)
    assert all(base64.b64decode(source.partition(",")[2]) for source in sources)
    assert "<b>cat</b>" not in page and "&lt;b&gt;cat" in page and "http" not in page


def test_the_png_sheet_holds_every_picture(sheet, tmp_path):
    sheet.write_png(tmp_path / "sheet.png", columns=2)
    image = Image.open(tmp_path / "sheet.png")
    assert image.width > 6 * 72 and image.height > 2 * 72


def test_wav_files_hold_the_waveform(tmp_path):
    write_wav(tmp_path / "tone.wav", np.array([0.0, 0.5, -1.0, 2.0]), 8000)
    with wave.open(str(tmp_path / "tone.wav")) as file:
        samples = np.frombuffer(file.readframes(4), dtype="<i2")
        assert file.getframerate() == 8000 and samples.tolist() == [0, 16383, -32767, 32767]


def test_losses_are_plotted(tmp_path):
    lines = ['{"step": 1, "loss_text": 3.0, "loss_image": null}', '{"step": 2, "loss_text": 2.0, "loss_image": 5.0}']
    lines += ['{"step": 2, "eval/loss_text": 2.5}', '{"step": 3, "loss_te']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png", ["text", "image", "speech"])
    assert Image.open(tmp_path / "losses.png").width > 1000


def test_generation_stays_within_torch_no_grad(sampler):
    sampler.draw(["cat"])
    assert all(parameter.grad is None for parameter in sampler.model.parameters()) and torch.is_grad_enabled()


def test_held_out_batches_arrive_on_the_device_whole():
    """Routing among them: an index left behind on the host would stop the forward on an accelerator."""
    model, seen = tiny_model(), {}

    class Arrived(Exception):
        pass

    class Probe:
        config = model.config

        def __call__(self, **batch):
            seen.update(batch)
            raise Arrived

    class OnMeta:
        device, process_index, num_processes, autocast = torch.device("meta"), 0, 1, nullcontext

    rows = {"text-to-image": [MadeUpStream().row(0)]}
    with pytest.raises(Arrived):
        evaluate_losses(Probe(), rows, partial(collate, config=model.config), EvaluationConfig(), OnMeta())
    devices = set()
    recursively_apply(lambda tensor: devices.add(tensor.device.type), seen)
    assert devices == {"meta"} and seen["routing"].order.device.type == "meta"
