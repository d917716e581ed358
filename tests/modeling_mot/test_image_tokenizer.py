"""The VQ image tokenizer: pixels, codes, grids, storage, bad input."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_mot.image_tokenizer import ImageTokenizerConfig, MoTImageTokenizer, nearest_code
from modeling_mot.media_loading import fit_picture, load_picture


TINY = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 32,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


def tiny_tokenizer(**overrides) -> MoTImageTokenizer:
    torch.manual_seed(0)
    tokenizer = MoTImageTokenizer(ImageTokenizerConfig(image_size=[16, 16], patch_size=2, model=TINY, **overrides))
    tokenizer.codebook.data.normal_()
    return tokenizer


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_codes_are_the_nearest_codebook_rows():
    tokenizer = tiny_tokenizer()
    pixels = tokenizer.preprocess(noise(16, 16))[None]
    latents = tokenizer.latents(pixels)[0].double()
    codebook = tokenizer.codebook.double()
    expected = torch.empty(4, 4, dtype=torch.long)
    for row in range(4):
        for column in range(4):
            expected[row, column] = (codebook - latents[:, row, column]).square().sum(1).argmin()
    assert torch.equal(tokenizer.encode([noise(16, 16)])[0], expected)


def test_nearest_code_prefers_the_lowest_index():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert nearest_code(torch.tensor([[1.0, 0.1]]), codebook).tolist() == [0]


def test_encoding_equals_diffusers_quantizer():
    tokenizer = tiny_tokenizer()
    pixels = torch.stack([tokenizer.preprocess(noise(16, 16, seed)) for seed in range(3)])
    _, _, (_, _, indices) = tokenizer.model.quantize(tokenizer.latents(pixels))
    assert torch.equal(torch.stack(tokenizer.encode([noise(16, 16, seed) for seed in range(3)])).flatten(), indices)


def test_a_picture_alone_equals_the_picture_in_a_batch():
    tokenizer = tiny_tokenizer()
    pictures = [noise(16, 16, seed) for seed in range(5)]
    alone = [tokenizer.encode([picture])[0] for picture in pictures]
    assert all(torch.equal(a, b) for a, b in zip(alone, tokenizer.encode(pictures), strict=True))


def test_rectangles_make_rectangular_grids():
    tokenizer = tiny_tokenizer(fit="keep")
    grids = tokenizer.encode([noise(32, 16), noise(8, 24)])
    assert [tuple(grid.shape) for grid in grids] == [(8, 4), (2, 6)]
    assert [picture.size for picture in tokenizer.decode(grids)] == [(16, 32), (24, 8)]
    assert tokenizer.image_grid is None


def test_chameleon_preset_makes_1024_tokens():
    with torch.device("meta"):
        tokenizer = MoTImageTokenizer.from_preset("chameleon-512")
    assert tokenizer.image_grid == [32, 32] and tokenizer.num_codes == 8192


def test_alpha_is_flattened_on_the_background():
    rgba = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (fit_picture(rgba, ImageTokenizerConfig(image_size=16)) == 255).all()
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    assert abs(int(fit_picture(half, ImageTokenizerConfig(image_size=16))[0, 0, 1]) - 127) <= 1


def test_crop_keeps_the_middle_and_pad_keeps_everything():
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 200
    assert (fit_picture(Image.fromarray(picture), ImageTokenizerConfig(image_size=10)) == 200).all()
    padded = fit_picture(Image.fromarray(picture), ImageTokenizerConfig(image_size=30, fit="pad"))
    assert (padded[10:20] == picture).all() and (padded[:10] == 255).all()


def test_all_forms_of_a_picture_give_the_same_codes(tmp_path):
    tokenizer, array = tiny_tokenizer(), noise(16, 16)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    forms = [
        array,
        Image.fromarray(array),
        path,
        str(path),
        path.read_bytes(),
        {"bytes": path.read_bytes(), "path": None},
        np.moveaxis(array, -1, 0),
        torch.from_numpy(array),
        array / 255.0,
    ]
    codes = tokenizer.encode(forms)
    assert all(torch.equal(grid, codes[0]) for grid in codes)


@pytest.mark.parametrize("storage_dtype", ["float32", "float16", "bfloat16"])
def test_saved_and_loaded_tokenizers_agree(tmp_path, storage_dtype):
    tokenizer = tiny_tokenizer(storage_dtype=storage_dtype)
    tokenizer.save_pretrained(tmp_path)
    loaded = MoTImageTokenizer.from_pretrained(tmp_path)
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert loaded.fingerprint() == tokenizer.fingerprint()
    grids = [torch.stack(t.encode([noise(16, 16, s) for s in range(4)])) for t in (tokenizer, loaded)]
    assert torch.equal(*grids)


def test_saved_folder_is_in_diffusers_layout(tmp_path):
    from diffusers import VQModel

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = VQModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert torch.equal(model.quantize.embedding.weight, tokenizer.codebook)


def test_existing_vq_model_can_be_wrapped(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ImageTokenizerConfig(image_size=16, patch_size=2)
    wrapped = MoTImageTokenizer.from_backend(str(tmp_path), "diffusers", config)
    assert torch.equal(wrapped.encode([noise(16, 16)])[0], tiny_tokenizer().encode([noise(16, 16)])[0])


@pytest.fixture(scope="module")
def chameleon_folder(tmp_path_factory):
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    torch.manual_seed(0)
    config = ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=32,
        latent_channels=8,
        resolution=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        attn_resolutions=None,
    )
    folder = tmp_path_factory.mktemp("chameleon")
    model = ChameleonVQVAE(config)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save_pretrained(folder)
    return folder


def test_chameleon_codes_equal_transformers(chameleon_folder, tmp_path):
    from transformers import ChameleonVQVAE

    tokenizer = MoTImageTokenizer.from_backend(str(chameleon_folder), "chameleon", ImageTokenizerConfig(image_size=16))
    tokenizer.save_pretrained(tmp_path)
    tokenizer = MoTImageTokenizer.from_pretrained(tmp_path)
    reference = ChameleonVQVAE.from_pretrained(chameleon_folder)
    with torch.no_grad():
        expected = reference.encode(tokenizer.preprocess(noise(16, 16))[None]).image_tokens
    assert torch.equal(tokenizer.encode([noise(16, 16)])[0].flatten(), expected.flatten())


def test_chameleon_without_decoder_says_so(chameleon_folder):
    tokenizer = MoTImageTokenizer.from_backend(str(chameleon_folder), "chameleon", ImageTokenizerConfig(image_size=16))
    with pytest.raises(NotImplementedError, match="no decoder"):
        tokenizer.decode([torch.zeros(8, 8, dtype=torch.long)])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        tiny_tokenizer().encode([tmp_path / "nowhere.png"])


def test_broken_picture_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="the picture does not decode: .*broken.png"):
        tiny_tokenizer().encode([str(path)])


def test_truncated_picture_is_refused():
    stream = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(stream, "PNG")
    with pytest.raises(ValueError, match="does not decode"):
        load_picture(stream.getvalue()[:2000])


def test_huge_picture_is_refused_before_decoding(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (3000, 2000)).save(path)
    with pytest.raises(ValueError, match="too large: 3000 x 2000 pixels; max_pixels is 1000000 .*huge.png"):
        load_picture(path, max_pixels=1_000_000)


def test_pillow_decompression_bomb_becomes_a_named_error(monkeypatch, tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (3000, 2000)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="the picture is too large: .*bomb.png"):
        load_picture(path)


@pytest.mark.parametrize("bad", [np.zeros((5, 5, 7)), np.full((4, 4, 3), 3.0), np.zeros((0, 4, 3), np.uint8), 7, None])
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(ValueError):
        load_picture(bad)


def test_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not divisible by the down-sampling, 4"):
        tiny_tokenizer(fit="keep").encode([noise(18, 16)])


@pytest.mark.parametrize("grid", [torch.full((4, 4), 32), torch.full((4, 4), -1), torch.zeros(16)])
def test_bad_grids_are_refused(grid):
    with pytest.raises(ValueError):
        tiny_tokenizer().decode([grid])


def test_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="colour"):
        ImageTokenizerConfig.from_dict({"colour": 1})


def test_blank_codes_decode_like_a_blank_picture():
    tokenizer = tiny_tokenizer()
    expected = tokenizer.encode([np.full((16, 16, 3), 255, np.uint8)])[0].flatten().tolist()
    assert tokenizer.blank_codes((4, 4)) == expected


CHAMELEON_PICTURES = {
    "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "rescale_factor": 0.0078,
}  # fmt: skip


@pytest.mark.parametrize("size", [(16, 16), (21, 37), (64, 17), (7, 9)])
def test_pictures_are_prepared_as_chameleons_processor_does(size, tmp_path):
    from transformers import ChameleonImageProcessorPil

    tiny_tokenizer(image_processor=CHAMELEON_PICTURES).save_pretrained(tmp_path)
    tokenizer, picture = MoTImageTokenizer.from_pretrained(tmp_path), Image.fromarray(noise(*size))
    expected = ChameleonImageProcessorPil(**CHAMELEON_PICTURES)(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(tokenizer.preprocess(picture), expected.float())


def test_an_image_processor_makes_pictures_of_one_size():
    tokenizer = tiny_tokenizer(image_processor=CHAMELEON_PICTURES)
    assert len(tokenizer.blank_codes((2, 4))) == 8
    with pytest.raises(ValueError, match="only; give it in the size wanted"):
        tokenizer.encode([noise(20, 20)], size=(8, 16))
    other = CHAMELEON_PICTURES | {"crop_size": {"height": 8, "width": 8}}
    with pytest.raises(ValueError, match="its crop_size must be"):
        tiny_tokenizer(image_processor=other).encode([noise(20, 20)])


def test_without_an_image_processor_the_configuration_is_written_as_before():
    assert "image_processor" not in tiny_tokenizer().config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": -1}, "batch_size=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"image_size": [64.5, 64]}, "image_size=\\[64.5, 64\\] must not have 64.5"),
        ({"image_size": [True, 64]}, "image_size=\\[True, 64\\]"),
        ({"image_size": [64, 64, 3]}, "image_size=\\[64, 64, 3\\]"),
        ({"background": [0, 0, 256]}, "background=.*256"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"fit": "corp"}, "fit='corp' .* did you mean 'crop'"),
        ({"model": {"norm_num_groups": 0}}, "model.norm_num_groups=0"),
        ({"model": {"block_out_channels": [8, 12], "norm_num_groups": 8}}, "12 is not a multiple"),
        ({"model": {"num_vq_embeddings": 10**12}}, "model.num_vq_embeddings=1000000000000"),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageTokenizerConfig(**fields)


@pytest.mark.parametrize("settings", [[], None, "small-64"])
def test_settings_that_are_no_mapping_are_refused(settings):
    with pytest.raises(ValueError, match="settings of the image tokenizer"):
        ImageTokenizerConfig.from_dict(settings)


def test_codes_and_pictures_do_not_follow_an_autocast():
    tokenizer, pictures = tiny_tokenizer(), [noise(16, 16, seed) for seed in range(8)]
    codes = tokenizer.encode(pictures)
    decoded = [np.asarray(picture) for picture in tokenizer.decode(codes)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
        assert tokenizer.latents(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
        assert all(map(torch.equal, tokenizer.encode(pictures), codes))
        assert all(np.array_equal(a, b) for a, b in zip(map(np.asarray, tokenizer.decode(codes)), decoded, strict=True))
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
