"""Pixels and latents in the prepared cache: what they equal, and what makes them anew."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import AugmentationConfig, Preparing, SourceConfig, TemplateConfig, TokenizedSource
from training.data.config import Segment

from .conftest import continuous, png, small_vae, wav


PICTURE = Segment("image", "picture")


@pytest.fixture(scope="module")
def vae():
    return small_vae()


def prepare(config, tmp_path, processor=None, **options):
    return TokenizedSource.prepare(config, Preparing(processor or continuous(), tmp_path / "cache", **options))


def random_png(seed: int, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_pixels_are_those_of_the_image_processor(pair_source, trimodal_folder, tmp_path):
    import datasets

    source, processor = prepare(pair_source(), tmp_path), continuous()
    records = datasets.Dataset.from_parquet(str(trimodal_folder / "train.parquet"))
    records = records.cast_column("picture", datasets.Image(decode=False))
    assert source.images == "pixels" and list(source.image_columns) == [PICTURE]
    for number in range(40):
        picture = Image.open(io.BytesIO(records[number]["picture"]["bytes"]))
        (values,) = source.image_columns[PICTURE].images(number, 0)
        assert values.dtype == np.uint8
        assert np.array_equal(values, processor.image_processor.fit_pictures([picture])[0])
        assert source[number]["image:picture"] == processor.encode_images([picture])


def test_discrete_sources_have_no_images(prepare, pair_source):
    source = prepare(pair_source())
    assert source.images is None and not source.image_columns


def test_latents_are_the_vaes_to_the_precision_of_float16(pair_source, tmp_path, vae):
    pixels, latents = prepare(pair_source(), tmp_path), prepare(pair_source(), tmp_path, vae=vae)
    assert latents.images == "latents"
    for number in range(40):
        (picture,), (values,) = (s.image_columns[PICTURE].images(number, 0) for s in (pixels, latents))
        assert values.dtype == np.float16 and values.shape == (4, 4, 4)
        with torch.no_grad():
            posterior = vae.encode(torch.tensor(picture)[None].float() / 127.5 - 1).latent_dist
        expected = (posterior.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        assert np.allclose(values.astype(np.float32), expected[0].numpy(), atol=2e-3)


def test_every_variant_has_its_own_image(pair_source, tmp_path, vae):
    for chosen in (None, vae):
        plain = prepare(pair_source(), tmp_path, vae=chosen)
        source = prepare(pair_source(), tmp_path, vae=chosen, augmentation=AugmentationConfig(variants=3))
        assert source[0]["text:name"] == plain[0]["text:name"] and len(source[0]["image:picture"]) == 3
        for number in range(40):
            first, *others = (source.image_columns[PICTURE].images(number, variant)[0] for variant in range(3))
            assert np.allclose(first, plain.image_columns[PICTURE].images(number, 0)[0], atol=1e-3)
            assert any(not np.array_equal(first, other) for other in others)


def interleaved(folder) -> SourceConfig:
    """Three documents: two pictures of different sizes, none, and one with a sound."""
    sizes = {"wide": (24, 8), "tall": (8, 16), "small": (8, 8)}
    for number, (name, size) in enumerate(sizes.items()):
        (folder / f"{name}.png").write_bytes(random_png(number, *size))
    (folder / "say.wav").write_bytes(wav(0.5))
    text = {"type": "text", "text": "so it is"}
    documents = [
        [{"type": "image", "image": "wide.png"}, text, {"type": "image", "image": "tall.png"}],
        [text],
        [{"type": "audio", "audio": "say.wav"}, text, {"type": "image", "image": "small.png"}, text],
    ]
    path = folder / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"segments": document}) for document in documents))
    return SourceConfig("d", str(path), [TemplateConfig(["document:segments"])])


def test_documents_keep_several_pictures_of_their_own_sizes(tmp_path, vae):
    config, processor = interleaved(tmp_path), continuous(fit="keep", with_speech=True)
    pixels = prepare(config, tmp_path, processor)
    latents = prepare(config, tmp_path, processor, vae=vae)
    segment = Segment("document", "segments")
    names = [["wide", "tall"], [], ["small"]]
    for number, pictures in enumerate(names):
        images = pixels.image_columns[segment].images(number, 0)
        encoded = latents.image_columns[segment].images(number, 0)
        assert len(images) == len(encoded) == len(pictures)
        for name, image, values in zip(pictures, images, encoded, strict=True):
            with Image.open(tmp_path / f"{name}.png") as picture:
                assert np.array_equal(image, np.moveaxis(np.asarray(picture), -1, 0))
            assert values.shape == (4, image.shape[1] // 2, image.shape[2] // 2)
    ids = pixels[0]["document:segments"][0]
    assert ids.count(processor.image_token_id) == 6 * 2 + 2 * 4
    assert pixels[0] == latents[0]


def test_several_processes_make_the_same(pair_source, tmp_path):
    one, two = (
        TokenizedSource.prepare(pair_source(), Preparing(continuous(), tmp_path / str(number), workers=number))
        for number in (1, 2)
    )
    assert one.fingerprint == two.fingerprint
    for number in range(40):
        images = [source.image_columns[PICTURE].images(number, 0)[0] for source in (one, two)]
        assert np.array_equal(*images)


def test_what_changes_latents_changes_the_fingerprint(pair_source, tmp_path, vae):
    other = small_vae(seed=1)
    rescaled = small_vae()
    rescaled.register_to_config(scaling_factor=0.5)
    prints = [prepare(pair_source(), tmp_path, vae=chosen).fingerprint for chosen in (None, vae, other, rescaled)]
    prints.append(prepare(pair_source(), tmp_path, continuous(downsampling=2), vae=vae).fingerprint)
    assert len(set(prints)) == len(prints)
    assert prepare(pair_source(), tmp_path, vae=small_vae()).fingerprint == prints[1]


def test_a_vae_changes_nothing_where_pictures_are_codes(prepare, pair_source, vae):
    assert prepare(pair_source()).folder == prepare(pair_source(), vae=vae).folder


def test_a_second_preparation_encodes_nothing(pair_source, tmp_path, vae, monkeypatch):
    first = prepare(pair_source(), tmp_path, vae=vae)
    monkeypatch.setattr("training.data.preparing.preparation.encode_latents", lambda *_: pytest.fail("encoded again"))
    assert prepare(pair_source(), tmp_path, vae=vae).folder == first.folder


def test_a_picture_that_does_not_divide_is_refused_by_record(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "a.png").write_bytes(png("red", (10, 8)))
    (folder / "a.txt").write_text("flip it")
    config = SourceConfig("odd", str(folder), [TemplateConfig(["text:text", "image:image"])])
    with pytest.raises(ValueError, match="source 'odd', record 0: column 'image': .*8 x 10 pixels do not divide"):
        prepare(config, tmp_path, continuous(fit="keep"))
    (folder / "b.png").write_bytes(png("red", (12, 8)))
    (folder / "b.txt").write_text("flip it")
    config.on_error = "skip"
    source = prepare(config, tmp_path, continuous(fit="keep"))
    assert len(source) == 1 and sum(source.skipped.values()) == 1
