"""What is published is what its name says, and holds no secret, no pickle and no archive, whatever it is called."""

import io
import json
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from conversion.contents import problem_of
from conversion.repository_files import repository_files


REPOSITORY = Path(__file__).resolve().parents[2]
# Of the right form; put together here, so that no scanner takes this file for a leak.
SECRETS = [
    "hf_" + "aB3" * 12,
    "AKIA" + "A1B2C3D4E5F6G7H8",
    "aws_secret_access_key = " + "a/B+" * 10,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 9,
    "glpat-" + "a1B2" * 6,
    "sk-" + "a1B2" * 12,
    "sk-proj-" + "a1B2" * 12,
    "xoxb-" + "1234567890-abc",
    "AIza" + "a1B2C" * 7,
    "npm_" + "a1B2" * 9,
    "-----BEGIN " + "RSA PRIVATE KEY-----",
    "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "machine huggingface.co login ada " + "password tower",
    "https://ada:" + "tower@huggingface.co/ada/x",
]


class Attack:
    def __reduce__(self):
        return os.system, ("true",)


PICKLES = [pickle.dumps(Attack(), protocol) for protocol in range(6)]


def picture(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 50).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr("archive/data.pkl", PICKLES[2])
    return buffer.getvalue()


def png_with(kind: bytes, data: bytes) -> bytes:
    """A picture with a chunk more, right after its header."""
    whole = picture("PNG")
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    return whole[:33] + chunk + whole[33:]


def texts(text: str, compressed: bool = False, kind: str = "text") -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    getattr(info, "add_text" if kind == "text" else "add_itxt")("Comment", text, zip=compressed)
    return info


def safetensors(metadata: dict[str, str], name: str = "a") -> bytes:
    from safetensors.torch import save

    return save({name: torch.zeros(2)}, metadata)


def found(folder: Path, name: str, content: bytes | str) -> str | None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return problem_of(folder / name)


GOOD = {
    "a.png": picture("PNG", pnginfo=texts("a caption")),
    "b.png": picture("PNG", dpi=(72, 72), icc_profile=b"profile" * 20),
    "a.jpg": picture("JPEG", comment=b"a caption"),
    "b.jpeg": picture("JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    "a.webp": picture("WEBP"),
    "b.webp": picture("WEBP", lossless=True, exif=b"Exif\0\0"),
    "model.safetensors": safetensors({"format": "pt"}),
    "config.json": '{"a": "\\ud83d\\ude00"}',
    "README.md": "# A model\n\n`hf_hub_download`, sk-learn, https://huggingface.co/a@b, sk-toggleable__control-label 1",
    "merges.txt": "#version: 0.2\na b\n",
    "LICENSE": "Permission is hereby granted",
    "tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_as_it_should_be_passes(name, tmp_path):
    assert found(tmp_path, name, GOOD[name]) is None


def test_what_this_repository_holds_passes():
    files = [
        file
        for folder in ("training/assets", "model_cards", "modeling_mot")
        for file in (REPOSITORY / folder).rglob("*.*")
    ]
    files = [file for file in files if file.suffix in (".png", ".json", ".md", ".py", ".safetensors", ".jinja", ".txt")]
    assert len(files) > 50
    assert {str(file): problem for file in files if (problem := problem_of(file))} == {}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    "content", [*PICKLES, archive(), b"\x7fELF\x02\x01\x01\0", b"\0" * 64, b"\xff\xfe\xfd"], ids=range(10)
)
def test_other_content_under_a_good_name_is_refused(name, content, tmp_path):
    said = found(tmp_path, name, content)
    is_dead_text = name == "tokenizer.model" and content in (b"\x7fELF\x02\x01\x01\0", b"\0" * 64, b"\xff\xfe\xfd")
    assert said is not None or is_dead_text


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("README.md", lambda secret: f"my key: {secret}\n"),
        ("chat_template.jinja", lambda secret: "{# " + secret + " #}"),
        ("config.json", lambda secret: json.dumps({"a": {"b": [secret]}})),
        ("tokenizer_config.json", lambda secret: '{"a": "' + "".join(f"\\u{ord(c):04x}" for c in secret) + '"}'),
        ("LICENSE", lambda secret: secret),
        ("a.png", lambda secret: picture("PNG", pnginfo=texts(secret))),
        ("b.png", lambda secret: picture("PNG", pnginfo=texts(secret, compressed=True))),
        ("c.png", lambda secret: picture("PNG", pnginfo=texts(secret, compressed=True, kind="itxt"))),
        ("a.jpg", lambda secret: picture("JPEG", comment=secret.encode())),
        ("a.webp", lambda secret: picture("WEBP", xmp=secret.encode())),
        ("model.safetensors", lambda secret: safetensors({"note": secret})),
        ("speech.safetensors", lambda secret: safetensors({}, name=secret)),
    ],
)
def test_secrets_are_found_and_not_shown(name, around, secret, tmp_path):
    said = found(tmp_path, name, around(secret))
    assert "holds what looks like a" in said
    assert secret[:8] not in said


@pytest.mark.parametrize("carried", [*PICKLES[2:], archive()], ids=range(5))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_nothing_follows_a_picture(kind, carried, tmp_path):
    said = found(tmp_path, f"a.{kind.lower()}", picture(kind) + carried)
    assert "follow behind the picture's end" in said


@pytest.mark.parametrize("carried", [*PICKLES[2:], archive()], ids=range(5))
@pytest.mark.parametrize(
    "around",
    [
        lambda carried: png_with(b"tEXt", b"a\0" + carried),
        lambda carried: png_with(b"zTXt", b"a\0\0" + zlib.compress(carried)),
        lambda carried: png_with(b"iCCP", b"a\0\0" + zlib.compress(carried)),
        lambda carried: png_with(b"prVt", carried),
        lambda carried: picture("JPEG", comment=carried),
        lambda carried: picture("WEBP", xmp=carried),
    ],
)
def test_nothing_that_runs_stands_beside_the_pixels(around, carried, tmp_path):
    content = around(carried)
    suffix = {b"\x89P": "png", b"\xff\xd8": "jpg", b"RI": "webp"}[content[:2]]
    assert found(tmp_path, f"a.{suffix}", content) is not None


def test_a_text_that_unpacks_to_too_much_is_not_unpacked(tmp_path):
    content = png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28), 1))
    assert "too large" in found(tmp_path, "a.png", content)


def test_weights_that_are_an_archive_as_well_are_refused(tmp_path):
    data = torch.frombuffer(bytearray(archive()), dtype=torch.uint8)
    save_file({"a": data}, tmp_path / "model.safetensors")
    assert "is an archive as well" in problem_of(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["a.png", "LICENSE", "README.md"])
def test_a_folder_with_such_a_file_is_not_published(name, tokens):
    (tokens / name).write_bytes(PICKLES[2])
    with pytest.raises(ValueError, match=f"{name}: is not what its name says|{name}: holds a pickle"):
        repository_files(tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoTokenizer": [None, "eve/code--evil.Evil"]}},
        {"custom_pipelines": {"text-generation": {"impl": "eve/code--evil.Evil"}}},
        {"text_config": {"auto_map": {"AutoConfig": "eve/code--evil.Evil"}}},
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "image_tokenizer/config.json"])
def test_code_of_another_repository_is_found_at_any_depth(name, fields, tokens):
    tree = json.loads((tokens / name).read_text())
    (tokens / name).write_text(json.dumps(tree | fields))
    with pytest.raises(ValueError, match="eve/code--evil.Evil is code of another repository"):
        repository_files(tokens)
