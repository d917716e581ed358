"""Two ranks that share every layer, by the plan of the configuration; `python -m ... FOLDER` is one of them."""

import os
import sys

import torch
import torch.distributed as dist

from modeling_mot import MoTForCausalLM
from tests.training.ranks import start_ranks


LAYERS = {
    "plain": {},
    "rms": {"qk_norm": "rms"},
    "rms_all_heads": {"qk_norm": "rms_all_heads"},
    "layer": {"qk_norm": "layer"},
    "towers": {
        "tower_configs": {
            "image": {"hidden_size": 20, "gated_mlp": False, "hidden_act": "relu2", "qk_norm": "rms"},
            "speech": {"hidden_size": 40, "intermediate_size": 24},
        }
    },
}
IDS = torch.tensor([[9, 12, 35, 40, 7, 50, 51, 8, 31, 11], [8, 8, 30, 31, 32, 33, 9, 59, 58, 10]])


def gradients(model):
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}


def compare(folder: str) -> None:
    whole = MoTForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    shared = MoTForCausalLM.from_pretrained(folder, attn_implementation="sdpa", tp_plan="auto")
    for name in ("self_attn.q_proj.image", "self_attn.o_proj.text", "mlp.speech.up_proj"):
        weight = shared.get_parameter(f"model.layers.1.{name}.weight")
        assert weight.to_local().numel() == weight.numel() // 2, name
    outputs = [model(IDS, labels=IDS) for model in (whole, shared)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    wanted, given = gradients(whole), gradients(shared)
    assert wanted.keys() == given.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_shared_layers_have_the_logits_and_gradients_of_whole_ones(tiny_model, tmp_path):
    folders = [str(tmp_path / name) for name in LAYERS]
    for folder, fields in zip(folders, LAYERS.values()):
        tiny_model(**fields).save_pretrained(folder)
    ranks = start_ranks("tests.modeling_mot.test_tensor_parallel", folders, fsdp=False)
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for folder in sys.argv[1:]:
        compare(folder)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's own end sometimes aborts a process whose work is done
