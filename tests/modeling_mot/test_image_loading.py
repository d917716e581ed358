"""One reader of pictures: the same tokens however one is handed over, or the same named error."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_mot.image_processing import MoTImageProcessor
from modeling_mot.image_tokenizer import ImageTokenizerConfig
from modeling_mot.media_loading import fit_picture, load_fitted, load_picture
from training.data.reading.records import decode_picture

from .media_forms import COLOURS, chat_ids, encoded, outcome, outcomes_of_file


ALPHA = np.tile(np.linspace(0, 255, 30).astype(np.uint8), (20, 1))
GREYS = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
SIXTEEN = np.random.default_rng(1).integers(0, 65536, (20, 30, 4), dtype=np.uint16)


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"") -> bytes:
    """A PNG by hand, of what Pillow does not write."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 9)),
    ]
    chunks = [
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in [*parts, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def sixteen_bits(values: np.ndarray, colour: int) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, colour, rows)


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([COLOURS, ALPHA]))


def animated(kind: str) -> bytes:
    more = [Image.new("RGB", (30, 20), "red")]
    return encoded(Image.fromarray(COLOURS), kind, save_all=True, append_images=more, **LOSSLESS.get(kind, {}))


LOSSLESS = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
high = lambda values: (values >> 8).astype(np.uint8)  # noqa: E731
grey = lambda values: np.repeat(values[..., None], 3, axis=2)  # noqa: E731

# A file, and the array that it holds, upright; None: an error.
FILES = {
    "png": (lambda: encoded(Image.fromarray(COLOURS)), COLOURS),
    "bmp": (lambda: encoded(Image.fromarray(COLOURS), "BMP"), COLOURS),
    "ppm": (lambda: encoded(Image.fromarray(COLOURS), "PPM"), COLOURS),
    "tiff": (lambda: encoded(Image.fromarray(COLOURS), "TIFF", compression="tiff_lzw"), COLOURS),
    "webp": (lambda: encoded(Image.fromarray(COLOURS), "WEBP", lossless=True), COLOURS),
    "jpeg2000": (lambda: encoded(Image.fromarray(COLOURS), "JPEG2000"), COLOURS),
    "png of greys": (lambda: encoded(Image.fromarray(ALPHA)), grey(ALPHA)),
    "png of one bit": (lambda: encoded(Image.fromarray(ALPHA > 99)), grey((ALPHA > 99) * np.uint8(255))),
    "png with alpha": (lambda: encoded(rgba()), np.dstack([COLOURS, ALPHA])),
    "webp with alpha": (lambda: encoded(rgba(), "WEBP", lossless=True, exact=True), np.dstack([COLOURS, ALPHA])),
    "png of 16-bit greys": (lambda: encoded(Image.fromarray(GREYS)), GREYS),
    "tiff of 16-bit greys": (lambda: encoded(Image.fromarray(GREYS), "TIFF"), GREYS),
    "tiff of big-endian greys": (lambda: encoded(Image.fromarray(GREYS.astype(">u2")), "TIFF"), GREYS),
    "pgm of 16-bit greys": (lambda: b"P5 30 20 65535\n" + GREYS.astype(">u2").tobytes(), GREYS),
    "tiff of 32-bit greys": (lambda: encoded(Image.fromarray(GREYS.astype(np.int32)), "TIFF"), GREYS),
    "tiff of floats": (lambda: encoded(Image.fromarray(np.float32(ALPHA / 255)), "TIFF"), grey(ALPHA)),
    "png of 16-bit colours": (lambda: sixteen_bits(SIXTEEN[..., :3], 2), SIXTEEN[..., :3]),
    "png of 16-bit colours with alpha": (lambda: sixteen_bits(SIXTEEN, 6), SIXTEEN),
    "animated gif": (lambda: animated("GIF"), np.asarray(Image.open(io.BytesIO(animated("GIF"))).convert("RGB"))),
    "animated png": (lambda: animated("PNG"), COLOURS),
    "animated webp": (lambda: animated("WEBP"), COLOURS),
    "tiff of pages": (lambda: animated("TIFF"), COLOURS),
    "greys beyond 16 bits": (lambda: encoded(Image.fromarray(np.full((20, 30), 70_000, np.int32)), "TIFF"), None),
    "negative greys": (lambda: encoded(Image.fromarray(np.full((20, 30), -1, np.int32)), "TIFF"), None),
    "floats beyond one": (lambda: encoded(Image.fromarray(np.full((20, 30), 1.5, np.float32)), "TIFF"), None),
    "floats not finite": (lambda: encoded(Image.fromarray(np.full((20, 30), np.nan, np.float32)), "TIFF"), None),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", None),
    "a cut png": (lambda: encoded(Image.fromarray(COLOURS))[:900], None),
    "no pixels": (lambda: png(0, 5, 8, 2), None),
    "a bomb": (lambda: png(2**31 - 1, 2**31 - 1, 8, 0), None),
    "nothing": (lambda: b"", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_picture_gives_the_same_tokens_everywhere(processor, site, name):
    make, array = FILES[name]
    content = make()
    found = outcomes_of_file(processor, site, "image", content, ".png")
    assert found == [found[0]] * len(found)
    if array is None:
        assert isinstance(found[0], str) and found[0].startswith("the picture")
        return
    lazy = Image.open(io.BytesIO(content))
    kept = load_picture(content)
    for source in (array, torch.from_numpy(array.copy()), lazy, kept, decode_picture(kept)):
        assert outcome(lambda source=source: processor.encode_images([source])[0]) == found[0]


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_is_what_pillow_makes_of_it(mode):
    steps = {"La": ["LA", "La"], "RGBa": ["RGBA", "RGBa"], "PA": ["P", "PA"], "LAB": []}.get(mode, [mode])
    picture = Image.fromarray(COLOURS)
    if mode.startswith("I;16"):
        picture = Image.fromarray(GREYS.astype(">u2" if mode == "I;16B" else "<u2"))
    elif mode == "LAB":
        picture = Image.merge("LAB", Image.fromarray(COLOURS).split())
    else:
        for step in steps:
            picture = picture.convert(step)
    assert picture.mode == mode
    expected = picture.convert("LA") if mode == "La" else picture
    expected = Image.fromarray(high(GREYS)) if mode.startswith("I;16") else expected
    found = load_picture(picture)
    assert np.array_equal(found, expected.convert(found.mode)) and found.mode in ("RGB", "RGBA")
    assert np.array_equal(load_picture(found), found)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_upright(processor, site, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(COLOURS), kind, exif=exif, **LOSSLESS.get(kind, {}))
    # Turning written out, of the pixels as they are without an orientation.
    plain = np.asarray(Image.open(io.BytesIO(encoded(Image.fromarray(COLOURS), kind, **LOSSLESS.get(kind, {})))))
    turns = {2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}
    quarters, mirrored = turns.get(orientation, (0, 0))
    expected = np.rot90(plain, quarters)
    expected = expected[:, ::-1] if mirrored else expected
    assert np.array_equal(load_picture(content), expected)
    assert np.array_equal(load_picture(Image.open(io.BytesIO(content))), expected)
    found = outcomes_of_file(processor, site, "image", content, ".x") if orientation in (1, 6) else []
    assert all(ids == processor.encode_images([expected.copy()])[0] for ids in found)


ARRAYS = {
    "uint8": (COLOURS, COLOURS),
    "uint8 (H, W)": (ALPHA, grey(ALPHA)),
    "uint8 (H, W, 1)": (ALPHA[..., None], grey(ALPHA)),
    "uint8 (1, H, W)": (ALPHA[None], grey(ALPHA)),
    "uint8 (3, H, W)": (np.moveaxis(COLOURS, -1, 0), COLOURS),
    "bool": (ALPHA > 99, grey((ALPHA > 99) * np.uint8(255))),
    "uint16": (GREYS, grey(high(GREYS))),
    "uint16 (H, W, 3)": (SIXTEEN[..., :3], high(SIXTEEN[..., :3])),
    "int64": (COLOURS.astype(np.int64), COLOURS),
    "int32": (COLOURS.astype(np.int32), COLOURS),
    "float16": ((COLOURS / 255).astype(np.float16), COLOURS),
    "float32": ((COLOURS / 255).astype(np.float32), COLOURS),
    "float64": (COLOURS / 255, COLOURS),
    "float32 (H, W)": ((ALPHA / 255).astype(np.float32), grey(ALPHA)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_gives_the_same_tokens_everywhere(processor, name):
    array, expected = ARRAYS[name]
    ids = processor.encode_images([Image.fromarray(expected)])[0]
    tensors = [torch.from_numpy(array.copy())]
    for source in (array, *tensors, {"array": array}):
        assert processor.encode_images([source])[0] == ids
        assert processor.encode_images([decode_picture(source)])[0] == ids
        assert chat_ids(processor, {"type": "image", "image": source}) == ids


def test_bfloat16_is_a_float():
    exact = torch.tensor([[0.0, 0.5, 1.0]] * 3, dtype=torch.bfloat16)
    assert np.asarray(load_picture(exact))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "bad",
    [
        np.full((4, 4), 300), np.full((4, 4), -1), np.full((4, 4), 1.5), np.full((4, 4), -0.1), np.full((4, 4), np.nan),
        np.zeros((4, 4), complex), np.zeros((4, 4), object), np.zeros((4, 4), "U2"), np.zeros((5, 5, 2)), np.zeros(4),
        np.zeros((1, 4, 4, 3)), np.zeros((0, 4)), np.broadcast_to(np.uint8(0), (10**5, 10**5)),
        torch.empty(4, 4, device="meta"), [1, 2], 7,
        None, {}, {"path": None}, {"bytes": "text"}, {"path": {"path": "x"}}, "a\0b", "x" * 5000, "\ud800",
    ],
)  # fmt: skip
def test_what_is_no_picture_is_the_same_error_everywhere(processor, bad):
    found = [outcome(function, bad) for function in (load_picture, decode_picture)]
    found.append(outcome(processor.encode_images, [bad]))
    assert isinstance(found[0], str) and found == [found[0]] * 3


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("resample_name", ["bicubic", "bilinear", "lanczos", "nearest", "box"])
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (7, 1999), (1500, 11), (40, 30), (31, 97)])
def test_cut_first_equals_scaled_then_cut(fit, resample_name, size):
    """The whole picture scaled, then its middle, by the rule of the documentation written out."""
    picture = Image.fromarray(np.random.default_rng(2).integers(64, 192, (*size[::-1], 3), dtype=np.uint8))
    config = ImageTokenizerConfig(image_size=[24, 32], fit=fit, resample=resample_name)
    scale = (max if fit == "crop" else min)(32 / size[0], 24 / size[1])
    scaled = [max(1, round(side * scale)) for side in size]
    whole = picture.resize(scaled, getattr(Image.Resampling, resample_name.upper()))
    expected = Image.new("RGB", (32, 24), "white")
    expected.paste(whole, ((32 - scaled[0]) // 2, (24 - scaled[1]) // 2))
    difference = np.abs(fit_picture(picture, config).astype(int) - np.asarray(expected, dtype=int))
    # Between two pixels alike in distance, the nearest is a matter of rounding.
    assert (difference > 1).mean() <= (0.1 if resample_name in ("nearest", "box") else 0)


def test_transparency_shows_the_background_whatever_the_way(processor):
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    plain = Image.new("RGB", (16, 16), (10, 200, 30))
    palette = Image.new("P", (16, 16), 0)
    palette.info["transparency"] = 0
    expected = processor.encode_images([plain])[0]
    for source in (clear, palette, encoded(palette, "GIF"), encoded(clear)):
        assert processor.encode_images([source])[0] == processor.encode_images([decode_picture(source)])[0] == expected


def test_kept_pictures_have_a_limit_of_their_own():
    config = ImageTokenizerConfig(fit="keep", max_kept_pixels=600)
    assert load_fitted(COLOURS, config).shape == (20, 30, 3)
    config = ImageTokenizerConfig(fit="keep", max_kept_pixels=599)
    with pytest.raises(ValueError, match="too large: 30 x 20 pixels; max_kept_pixels is 599"):
        load_fitted(COLOURS, config)
    assert load_fitted(COLOURS, config, size=(8, 8)).shape == (8, 8, 3)
    for default in (ImageTokenizerConfig(), MoTImageProcessor()):
        assert "max_kept_pixels" not in default.to_dict()  # fingerprints stay


def test_a_picture_for_chameleon_is_cut_before_it_is_scaled():
    from modeling_mot.media_loading import cut_long_side

    thin = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20_001, 1, 3), dtype=np.uint8))
    found = cut_long_side(thin)
    assert found.size == (1, 17) and np.array_equal(found, np.asarray(thin)[9_992:10_009])
    ordinary = Image.fromarray(COLOURS)
    assert cut_long_side(ordinary) is ordinary


def test_an_allocation_that_fails_is_an_error_of_the_picture(monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ValueError, match="the picture does not decode: MemoryError"):
        load_picture(Image.new("CMYK", (4, 4)))
