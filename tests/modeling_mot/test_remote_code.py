"""A saved folder with its code, loaded by a process that has never heard of this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_mot import MoTForCausalLM, MoTModel


# A finder before all others: the package is not there, wherever it is installed.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_mot", "training", "conversion"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
try:
    import modeling_mot
    raise SystemExit("the package is importable: this process is not clean")
except ModuleNotFoundError:
    pass
"""


def run_clean(code, folder, workspace):
    """Run code in isolated mode from an empty folder, with caches of its own."""
    empty, home = workspace / "empty", workspace / "home"
    empty.mkdir()
    home.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS"))
    }
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + code, str(folder)],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


LOAD = """
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
expected = load_file(folder + "/expected.safetensors")
ids = expected["input_ids"]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.modalities == ["text", "image", "speech"], config
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(model(ids).logits, expected["logits"]), "logits differ"
    assert torch.equal(base(ids).last_hidden_state, expected["hidden"]), "hidden states differ"
    generated = model.generate(ids[:1, :4], max_new_tokens=8, do_sample=False)
assert torch.equal(generated, expected["generated"]), "generated tokens differ"
again = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert type(again).__name__ == type(model).__name__ == "MoTForCausalLM"
print("loaded")
"""


def save_with_expectations(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    ids = torch.randint(7, 60, (2, 9))
    ids[0, :4] = torch.tensor([1, 9, 12, 3])
    with torch.no_grad():
        expected = {
            "input_ids": ids,
            "logits": model(ids).logits,
            "hidden": model.model(ids).last_hidden_state,
            "generated": model.generate(ids[:1, :4], max_new_tokens=8, do_sample=False),
        }
    save_file(expected, folder / "expected.safetensors")


def test_export_loads_in_a_clean_process_bit_for_bit(tiny_model, tmp_path):
    folder = tmp_path / "model"
    save_with_expectations(tiny_model(qk_norm="layer"), folder)
    assert "loaded" in run_clean(LOAD, folder, tmp_path)


def test_sharded_export_loads_in_a_clean_process_bit_for_bit(tiny_model, tmp_path):
    folder = tmp_path / "model"
    save_with_expectations(tiny_model("hybrid", tie_word_embeddings=True), folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert "loaded" in run_clean(LOAD, folder, tmp_path)


def test_export_is_flat_and_holds_every_file_the_model_needs(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.glob("*.py")}
    assert {"configuration_mot.py", "modeling_mot.py", "tower_routing.py", "generation_mot.py"} <= files
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_mot.MoTForCausalLM"
    assert auto_map["AutoModel"] == "modeling_mot.MoTModel"


# ---------------------------------------------------------------------- damaged checkpoints


def drop_tensor(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.image.up_proj.weight", "model.norm.text.weight", "lm_head.weight"]
)
def test_checkpoint_with_a_missing_tensor_is_refused(tiny_model, tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    drop_tensor(tmp_path, name)
    with pytest.raises(ValueError, match=f"lacks 1 tensors of MoTForCausalLM, '{name}'"):
        MoTForCausalLM.from_pretrained(tmp_path)


def test_missing_tensors_are_listed_to_who_asks(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    drop_tensor(tmp_path, "lm_head.weight")
    _, info = MoTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}


def test_a_missing_shard_is_refused(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(Exception, match="model-00001"):
        MoTForCausalLM.from_pretrained(tmp_path)


def test_bare_transformer_gets_a_new_head(tiny_model, tmp_path):
    tiny_model().model.save_pretrained(tmp_path)
    assert MoTForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (60, 32)


def test_tied_checkpoint_needs_no_head(tiny_model, tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = MoTForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_base_model_loads_from_a_causal_checkpoint(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    base = MoTModel.from_pretrained(tmp_path)
    assert torch.equal(base.norm["image"].weight, model.model.norm["image"].weight)
