"""A stranger's checkpoint: its code is neither run nor passed on, no file outside of its folder is read, and junk is
refused in one line."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from conversion.export_dense import main as export_dense
from conversion.upcycle import main as upcycle
from conversion.vae import main as vae
from conversion.validation import validate
from model_cards.card import model_card
from modeling_mot import MoTConfig, MoTForCausalLM
from modeling_mot.hub_trust import load_tokenizer

from .sources import save_source


VAE = str(Path(__file__).resolve().parents[2] / "training" / "assets" / "vae")
INDEX = "model.safetensors.index.json"
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoProcessor")
EVIL = {
    "auto_map": dict.fromkeys(AUTO_CLASSES, "attacker/repo--evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    "custom_pipelines": {"text-generation": {"impl": "attacker/repo--evil.Evil", "pt": ["AutoModel"]}},
    "custom_generate": "attacker/repo",
    "_name_or_path": "attacker/repo",
    "name_or_path": "attacker/repo",
}
# Their fields are a closed list, of which none names code.
CLOSED = (
    "image_tokenizer_config.json",
    "speech_tokenizer_config.json",
    "image_processor_config.json",
    "conversion.json",
)


def poisoned(source: Path, folder: Path) -> Path:
    """A copy whose every file of settings names the code of an attacker, which ends the process that runs it."""
    shutil.copytree(source, folder)
    for file in folder.rglob("*.json"):
        if file.name in CLOSED or file.name in ("tokenizer.json", INDEX):
            continue
        tree = json.loads(file.read_text())
        if tree.get("vae_config"):
            tree["vae_config"] |= EVIL
        file.write_text(json.dumps(tree | EVIL))
    (folder / "custom_generate").mkdir()
    for file in (folder / "evil.py", folder / "custom_generate" / "generate.py"):
        file.write_text("raise SystemExit('attacked')")
    return folder


def assert_clean(folder: Path) -> None:
    """No word of the attacker, and `auto_map`, where there is one, is ours."""
    for file in folder.rglob("*"):
        if file.is_file():
            assert not any(word in file.read_bytes() for word in (b"attack", b"evil", b"Evil")), file
    assert not (folder / "evil.py").exists()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "source"
    save_source(folder, "llama", tokenizer=True, shard_size="20KB")
    return folder


@pytest.fixture
def source(dense, tmp_path):
    """A copy of a Llama in shards that a test may change."""
    return shutil.copytree(dense, tmp_path / "source")


def refusal(capsys, folder, *options, command=upcycle):
    """The one line in which a conversion is refused; nothing is left of it."""
    out = folder.parent / "out"
    assert command([str(folder), str(out), *map(str, options)]) == 2
    assert not out.exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# ------------------------------------------------------------------------------------------------------- named code


@pytest.mark.parametrize("kind", ["saved_tokens", "saved_pictures"])
def test_code_that_a_checkpoint_names_is_neither_run_nor_saved(kind, request, tmp_path):
    source = poisoned(request.getfixturevalue(kind), tmp_path / "poisoned")
    AutoConfig.from_pretrained(source).save_pretrained(tmp_path / "config")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "out")
    AutoProcessor.from_pretrained(source).save_pretrained(tmp_path / "out")
    load_tokenizer(source).save_pretrained(tmp_path / "tokenizer")
    for name in ("config", "out", "tokenizer"):
        assert_clean(tmp_path / name)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert saved == json.loads((request.getfixturevalue(kind) / "config.json").read_text())["auto_map"]


def test_what_was_saved_of_a_hostile_checkpoint_loads_in_a_clean_process(saved_tokens, tmp_path):
    source = poisoned(saved_tokens, tmp_path / "poisoned")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "out")
    AutoProcessor.from_pretrained(source).save_pretrained(tmp_path / "out")
    assert validate(tmp_path / "out")["model"] == "MoTForCausalLM"


def test_a_loaded_auto_map_serves_to_load_and_is_not_saved(tmp_path):
    theirs = {"AutoModelForCausalLM": "owner/mot--modeling_mot.MoTForCausalLM"}
    config = MoTConfig(auto_map=theirs)
    assert config.auto_map["AutoModelForCausalLM"] == theirs["AutoModelForCausalLM"]
    assert config.to_dict()["auto_map"] == MoTConfig().to_dict()["auto_map"] == MoTConfig.auto_classes


class OwnModel(MoTForCausalLM):
    """A model that somebody derives and registers is saved under its own name."""


def test_a_model_that_this_process_registers_keeps_its_name(saved_tokens, tmp_path):
    OwnModel.register_for_auto_class("AutoModelForCausalLM")
    for before, after in ((saved_tokens, "first"), (tmp_path / "first", "second")):
        OwnModel.from_pretrained(before).save_pretrained(tmp_path / after)
        saved = json.loads((tmp_path / after / "config.json").read_text())["auto_map"]
        assert saved == MoTConfig.auto_classes | {"AutoModelForCausalLM": "test_trust.OwnModel"}


@pytest.mark.parametrize("command", ["upcycle", "export", "import", "export_vae"])
def test_conversions_pass_on_no_code(command, dense, saved_tokens, saved_pictures, tmp_path):
    kind = {"upcycle": dense, "export": saved_tokens}.get(command, saved_pictures)
    source, out = poisoned(kind, tmp_path / "poisoned"), str(tmp_path / "out")
    if command == "export":
        tensors = {k: v for file in source.glob("model-*.safetensors") for k, v in load_file(file).items()}
        same = {k: tensors[k.replace(".image", ".text").replace(".speech", ".text")] for k in tensors}
        for file in source.glob("model*"):
            file.unlink()
        save_file({k: v.clone() for k, v in same.items()}, source / "model.safetensors", metadata={"format": "pt"})
    run = {
        "upcycle": lambda: upcycle([str(source), out, "--image-codes", "4", "--ignore-fields", *EVIL]),
        "export": lambda: export_dense([str(source), out]),
        "import": lambda: vae(["import", str(source), str(tmp_path / "vae"), out]),
        "export_vae": lambda: vae(["export", str(source), out]),
    }
    if command == "import":
        assert vae(["export", str(saved_pictures), str(tmp_path / "vae")]) == 0
    assert run[command]() == 0
    assert_clean(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- files outside


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "secret" / "s.safetensors")
    return tmp_path / "secret" / "s.safetensors"


@pytest.mark.parametrize(
    "name", ["../secret/s.safetensors", "a/../../secret/s.safetensors", "{secret}", "link.safetensors"]
)
@pytest.mark.parametrize("kind", ["conversion", "model", "frame"])
def test_an_index_names_no_file_outside_of_its_folder(name, kind, source, saved_tokens, secret, tmp_path, capsys):
    name = name.format(secret=secret)
    folder = source if kind == "conversion" else shutil.copytree(saved_tokens, tmp_path / "tokens")
    (folder / "link.safetensors").symlink_to(secret)
    tree = json.loads((folder / INDEX).read_text())
    tree["weight_map"]["vae.x" if kind == "frame" else next(iter(tree["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(tree))
    if kind == "conversion":
        assert "link.safetensors is a link to" in refusal(capsys, folder, "--image-codes", "4")
        (folder / "link.safetensors").unlink()
        if name != "link.safetensors":
            assert f"names {name!r}, which is outside" in refusal(capsys, folder, "--image-codes", "4")
    else:
        with pytest.raises(ValueError, match="is outside of its folder"):
            MoTForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "LICENSE", "deep/er"])
@pytest.mark.parametrize("command", [upcycle, export_dense])
def test_links_out_of_a_source_are_refused(name, command, source, secret, capsys):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    assert f"{name} is a link to {secret}, outside of" in refusal(capsys, source, command=command)


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(dense, tmp_path):
    """Its files are links to blobs beside the snapshots, which are the same repository's."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(dense.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert upcycle([str(snapshot), str(tmp_path / "out"), "--image-codes", "4"]) == 0


@pytest.mark.parametrize("setting", ["vocab_file", "merges_file", "tokenizer_file", "gguf_file"])
def test_settings_of_a_tokenizer_name_no_file_outside(setting, source, saved_tokens, tmp_path, secret, capsys):
    for folder in (source, shutil.copytree(saved_tokens, tmp_path / "tokens")):
        tree = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(tree | {setting: str(secret)}))
    assert f"{setting}='{secret}', which is outside" in refusal(capsys, source, "--image-codes", "4")
    with pytest.raises(ValueError, match=f"{setting}='{secret}'"):
        AutoProcessor.from_pretrained(tmp_path / "tokens")


# ------------------------------------------------------------------------------------------------------------- junk


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("content", ["", "junk", "[]", "null", DEEP, '{"a": ' * 100_000, b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_no_settings_is_refused_by_name(name, content, source, capsys):
    (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refusal(capsys, source, "--image-codes", "4")
    assert name in said or "tokenizer" in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {}, {"a": None}, {"a": 3}, {"a": ["b"]}, {"a": ""}, {"a": "."}, {"a": "x\0y"}, {"a": "x" * 5000}],
)
def test_an_index_that_is_none_is_refused(weight_map, source, capsys):
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert INDEX in refusal(capsys, source, "--image-codes", "4")


FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**18, 1.5, True, "x", [], {}], ids=str)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("architecture", ["llama", "smollm3"])
def test_sizes_that_the_tensors_have_not_are_refused_before_anything_is_built(
    architecture, field, value, source, tmp_path, capsys
):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": architecture, field: value}))
    assert field in refusal(capsys, source, "--image-codes", "4") or value == []


@pytest.mark.parametrize("value", [0, -1, 10**9, "x"])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_sizes_of_a_mot_are_held_against_its_tensors(field, value, tokens, capsys):
    config = json.loads((tokens / "config.json").read_text())
    (tokens / "config.json").write_text(json.dumps(config | {field: value}))
    assert f"{field}={value!r}" in refusal(capsys, tokens, command=export_dense)


@pytest.mark.parametrize("code", ["I32", "U8", "F8_E4M3", "F8_E5M2", "BOOL", "NONE"])
@pytest.mark.parametrize("command", [upcycle, export_dense])
def test_quantized_weights_are_refused_by_their_type(code, command, source, tokens, capsys):
    folder = source if command is upcycle else tokens
    for file in folder.glob("model-*.safetensors"):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                width = {"I32": 4}.get(code, 1)
                entry |= {"dtype": code, "shape": [*entry["shape"][:-1], entry["shape"][-1] * 4 // width]}
        encoded = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    said = refusal(capsys, folder, *(["--image-codes", "4"] if command is upcycle else []), command=command)
    assert ("convert the checkpoint before it was quantized" in said and code in said) or code == "NONE"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", "-5"], "--max-length -5 must be at least 1"),
        (["--max-length", "0"], "--max-length 0 must be at least 1"),
        (["--init", "image=perturbed:inf"], "'perturbed:inf' is none of"),
        (["--init", "image=perturbed:nan"], "'perturbed:nan' is none of"),
        (["--init", "image=perturbed:-1"], "'perturbed:-1' is none of"),
        (["--init", "image=perturbed:1e30"], "'perturbed:1e30' is none of"),
        (["--init", "image=copy", "image=fresh"], "names 'image' twice"),
        (["--set", "hidden_dropout=0.1", "hidden_dropout=0.2"], "names 'hidden_dropout' twice"),
        (["--image-codes", "1000000000"], "--image-codes 1000000000 must be at most"),
        (["--moe-text", "1000000000"], "--moe-text 1000000000 must be at most"),
        (["--modalities", "text", "image", "speech", "--speech-units", "1000000000"], "--speech-units 1000000000 must"),
        (["--max-shard-size", "nan"], "max_shard_size='nan' is no size"),
        (["--max-shard-size", "1e400GB"], "max_shard_size='1e400GB' is no size"),
        (["--set", "initializer_range=x"], "these options contradict each other"),
        (["--set", "attention_dropout=null"], "these options contradict each other"),
        (["--set", f"max_speech_tokens={DEEP}"], "these options contradict each other"),
    ],
)
def test_options_out_of_range_are_refused(options, message, source, capsys):
    assert message in refusal(capsys, source, *([] if "--image-codes" in options else ["--image-codes", "4"]), *options)


@pytest.mark.parametrize(
    "setting",
    [
        "unet_channels=[1000000000,1000000000]",
        "unet_channels=[1048576,1048576]",
        "unet_layers=1000000000",
        "num_train_timesteps=1000000000000",
        "unet_channels=x",
        "unet_channels=[null]",
    ],
)
def test_sizes_of_a_patchifier_are_refused_before_it_is_built(setting, source, capsys):
    options = {"unet_norm_groups": "16", "unet_channels": "[32,64]", "unet_layers": "1"}
    name, _, value = setting.partition("=")
    settings = [f"{name}={value}" for name, value in (options | {name: value}).items()]
    said = refusal(capsys, source, "--transfusion", "--vae", VAE, "--image-size", "32", "32", "--set", *settings)
    assert name in said


def test_a_vae_of_whole_numbers_is_not_exported(saved_pictures, tmp_path, capsys):
    folder = shutil.copytree(saved_pictures, tmp_path / "pictures")
    tensors = load_file(folder / "model.safetensors")
    whole = {name: tensor.int() if name.startswith("vae.") else tensor for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    assert vae(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "is stored as I32" in capsys.readouterr().err


@pytest.mark.parametrize("fields", [{}, {"hidden_size": 16}, {"auto_map": {}}])
def test_a_configuration_that_says_not_what_it_is_of_makes_no_model(fields, tokens, monkeypatch):
    (tokens / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(MoTForCausalLM, "__init__", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match="has no model_type"):
        MoTForCausalLM.from_pretrained(tokens)


@pytest.mark.parametrize(("name", "said"), [("model.safetensors", "damaged"), ("pytorch_model.bin", "pickled")])
def test_weights_that_are_junk_are_named(name, said, tokens):
    for file in tokens.glob("model*.safetensors*"):
        file.unlink()
    (tokens / name).write_bytes(pickle.dumps(Path("/")) if said == "pickled" else b"\xff" * 64)
    with pytest.raises(ValueError, match=f"the weights of .*{said}"):
        MoTForCausalLM.from_pretrained(tokens)


def test_a_card_names_the_configuration_that_it_cannot_read(tokens):
    stored = json.loads((tokens / "config.json").read_text())
    (tokens / "config.json").write_text(json.dumps(stored | {"eoi_token_id": 2.5}))
    with pytest.raises(ValueError, match="config.json cannot be read: .*eoi_token_id"):
        model_card(tokens)
