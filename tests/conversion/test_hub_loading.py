"""Pushed by `push_to_hub`, loaded by name in a process that has never heard of this package, at two revisions."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from modeling_mot import MoTForCausalLM
from tests.conversion.hub_server import Blob
from tests.modeling_mot.test_remote_code import BLOCK


REPO = "ada/loaded"

PUSH = """
import sys
from modeling_mot import MoTForCausalLM, MoTProcessor
folder, repo = sys.argv[1:]
processor = MoTProcessor.from_pretrained(folder)
model = MoTForCausalLM.from_pretrained(folder)
processor.push_to_hub(repo)
model.push_to_hub(repo, tags=["mine"], max_shard_size="100KB")
"""

# Unpickling is an error of this process, whoever asks for it.
LOAD = """
def refuse(event, arguments):
    assert event != "pickle.find_class", f"unpickled: {arguments}"

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
sys.addaudithook(refuse)
torch.load = None
repo, first, second, expected = sys.argv[1:]
expected = load_file(expected)

def load(revision, **kwargs):
    return AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True, **kwargs).eval()

def logits(model):
    with torch.no_grad():
        return model(expected["input_ids"]).logits

old, new, mixed = load(first), load(second), load(second, code_revision=first)
assert torch.equal(logits(old), expected["old"]) and torch.equal(logits(new), expected["new"])
assert torch.equal(logits(mixed), expected["new"])
is_new = [hasattr(sys.modules[type(model).__module__], "NEWER") for model in (old, new, mixed)]
assert is_new == [False, True, False], is_new
processor = AutoProcessor.from_pretrained(repo, revision=first, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repo, revision=first)
ids = processor([{"type": "text", "text": "a cat"}])["input_ids"]
assert type(processor).__module__.startswith("transformers_modules.") and len(ids) > 2
assert processor.image_tokenizer is not None and tokenizer.get_vocab() == processor.tokenizer.get_vocab()
try:
    AutoModelForCausalLM.from_pretrained(repo, revision=first, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code ran that nobody trusted")
old.push_to_hub("ada/passed-on")
processor.push_to_hub("ada/passed-on")
print("loaded")
"""


def run(code, environment, *arguments, cwd):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def pushed(hub, client, saved_tokens):
    run(PUSH, client.environment(), saved_tokens, REPO, cwd=saved_tokens.parents[1])
    return hub.repositories["models", REPO]


def test_push_to_hub_uploads_what_loading_needs_and_a_card(pushed, hub, saved_tokens):
    files = hub.files(REPO)
    saved = {path.relative_to(saved_tokens).as_posix() for path in saved_tokens.rglob("*") if path.is_file()}
    assert {path for path in saved if not path.startswith("model-")} <= files.keys()
    assert {"model-00001-of-00004.safetensors", "model.safetensors.index.json"} <= files.keys()
    card = files["README.md"].decode()
    assert all(text in card for text in ("library_name: transformers", "- custom_code", "- mine", f"# {REPO}"))
    assert "More Information Needed" not in card
    assert len(pushed.commits) == 3  # the empty one, the processor's, and the model's with the card


def test_two_revisions_load_by_name_in_a_clean_process(pushed, client, saved_tokens, tmp_path):
    model = MoTForCausalLM.from_pretrained(saved_tokens)
    model.save_pretrained(tmp_path / "old", max_shard_size="100KB")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "new", max_shard_size="100KB")
    expected = {"input_ids": torch.tensor([[1, 40, 41, 42, 43]])}
    for name in ("old", "new"):
        loaded = MoTForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            expected[name] = loaded(expected["input_ids"]).logits
    save_file(expected, tmp_path / "expected.safetensors")

    first = pushed.branches["main"]
    weights = {file.name: Blob(file.read_bytes(), is_large=True) for file in (tmp_path / "new").glob("*.safetensors")}
    client.hub.large |= {blob.sha256: blob.content for blob in weights.values()}
    files = pushed.commits[first] | weights
    code = files["modeling_mot.py"].content + b"\nNEWER = True\n"
    second = pushed.commit("main", files | {"modeling_mot.py": Blob(code, is_large=False)})

    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= client.hub.environment(tmp_path / "home", "ada") | {"OMP_NUM_THREADS": "1"}
    arguments = (REPO, first, second, tmp_path / "expected.safetensors")
    assert "loaded" in run(BLOCK + LOAD, environment, *arguments, cwd=tmp_path / "empty")

    # What was loaded by name is passed on whole, its code included.
    passed_on = client.hub.files("ada/passed-on")
    code = {path: content for path, content in client.hub.files(REPO, revision=first).items() if path.endswith(".py")}
    assert {path: content for path, content in passed_on.items() if path.endswith(".py")} == code
    assert {"model.safetensors", "tokenizer.json", "image_tokenizer/config.json", "README.md"} <= passed_on.keys()
    auto_map = json.loads(passed_on["config.json"])["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_mot.MoTForCausalLM"
