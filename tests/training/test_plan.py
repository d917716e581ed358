"""Plans against models that were really built and run, FSDP2's real messages, and figures reckoned by hand."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from modeling_mot import MoTConfig
from training.model.adapters import LoraConfig
from training.model.costs import forward_flops, patchifier_flops, recomputed_flops, training_flops
from training.optimization import set_trained
from training.plan.__main__ import changed_flops
from training.plan.activations import count_kept, loss_bytes, made_up_batch
from training.plan.cluster import Mesh
from training.plan.communication import Traffic, plan_traffic, seconds_of_traffic
from training.plan.memory import plan_memory
from training.plan.parameters import count_parameters, fsdp_units, meta_model

from .data.conftest import small_vae
from .plans import FSDP_CASES, LENGTH, MODELS, ROWS, TOKENS, batch_of, config_of, model_of


ROOT = Path(__file__).resolve().parents[2]


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", MODELS)
def test_parameters_by_part_are_those_of_a_real_model(name):
    model = model_of(name)
    real = {id(parameter): parameter.numel() for parameter in model.parameters()}

    def of(*modules) -> int:
        return sum(real.pop(id(parameter)) for module in modules for parameter in module.parameters())

    layers = model.model.layers
    attentions = [layer.self_attn for layer in layers]
    norms = [model.model.norm, *(layer.input_layernorm for layer in layers)]
    norms += [layer.post_attention_layernorm for layer in layers]
    norms += [
        getattr(attention, part)
        for attention in attentions
        for part in ("q_norm", "k_norm")
        if hasattr(attention, part)
    ]
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    expected = {
        "embeddings": of(model.model.embed_tokens),
        "norms": of(*norms),
        "attention": of(*(getattr(attention, part) for attention in attentions for part in projections)),
        "feed-forward": of(*(layer.mlp for layer in layers)),
    }
    if name != "tied":
        expected["output layer"] = of(model.lm_head)
    if name.startswith("transfusion-"):
        expected["patchifier"] = of(model.patchifier)
    counted = count_parameters(meta_model(model.config))
    assert {part: sum(towers.values()) for part, towers in counted.items()} == expected and not real


@pytest.mark.parametrize("name", MODELS)
def test_parameters_by_tower_are_those_of_a_real_model(name):
    model = model_of(name)
    expected = {}
    for path, parameter in model.named_parameters():
        # A tower's name is a part of the names of its parameters, and of no others'.
        tower = next((tower for tower in model.config.tower_names if f".{tower}." in path), "shared")
        expected[tower] = expected.get(tower, 0) + parameter.numel()
    counted = {}
    for towers in count_parameters(meta_model(model.config)).values():
        for tower, number in towers.items():
            counted[tower] = counted.get(tower, 0) + number
    assert counted == expected


def test_a_vae_is_counted_by_itself():
    config = config_of("transfusion-mot", latent_channels=4)
    config.vae_config = {**small_vae().config, "_class_name": "AutoencoderKL"}
    counted = count_parameters(meta_model(config))
    assert sum(counted.pop("VAE (frozen)").values()) == sum(p.numel() for p in small_vae().parameters())
    assert sum(sum(towers.values()) for towers in counted.values()) == config.num_parameters()


# ---------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_a_micro_batch_are_what_torch_counts(name):
    model = model_of(name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch_of(model.config), use_cache=False)
    assert forward_flops(model.config, TOKENS, LENGTH) == counter.get_total_flops()


def counted_step(name: str, checkpointing: bool) -> int:
    model = model_of(name).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch_of(model.config), use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "left_out"), [("mot", 0), ("dense", 2 * 48 * 2 * 48 * 32)])
def test_checkpointing_spends_the_flops_planned_but_for_a_last_product(name, left_out):
    # PyTorch recomputes up to the last tensor that a backward needs; where nothing follows it, not the last product.
    spent = counted_step(name, True) - counted_step(name, False)
    assert spent == recomputed_flops(config_of(name), TOKENS, LENGTH) - left_out


def test_checkpointing_recomputes_a_patchifiers_blocks_too():
    spent = counted_step("transfusion-mot", True) - counted_step("transfusion-mot", False)
    config = config_of("transfusion-mot")
    planned = recomputed_flops(config, TOKENS, LENGTH)
    layers = planned - TOKENS["image"] // 4 * patchifier_flops(config)
    assert layers < spent <= planned


# Fine-tuning: a tower as it is, adapters in another, and 8 bits for both.
TUNED = {"frozen_towers": ["text"], "lora": LoraConfig(["image"], rank=4), "frozen_dtype": "int8"}


@pytest.mark.parametrize("name", ["mot", "transfusion-mot"])
@pytest.mark.parametrize(
    "trained",
    [
        TUNED,
        {"lora": LoraConfig(rank=8)},
        {"frozen_towers": ["image"]},
        {"frozen_towers": ["text"], "gradient_stops": ["text"]},
    ],
)
def test_flops_of_frozen_weights_and_adapters_are_what_torch_counts(name, trained):
    planned = training_flops(config_of(name), TOKENS, LENGTH)
    changed = changed_flops(meta_model(config_of(name), **trained), TOKENS)
    whole, tuned = model_of(name).train(), model_of(name).train()
    set_trained(tuned, **trained)
    steps = []
    for model in (whole, tuned):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**batch_of(model.config), use_cache=False).loss.backward()
        steps.append(counter.get_total_flops())
    assert steps[1] - steps[0] == changed
    assert name != "mot" or steps[0] == planned  # a patchifier's first convolution has no gradient of its input


# --------------------------------------------------------------------------------------------------------------- memory


def kept_by_a_real_forward(model, batch: dict, bf16: bool = False) -> int:
    """Bytes of all that autograd holds, but parameters and what has as many elements as the logits."""
    held, parameters = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        logits = model(**batch, use_cache=False).logits
    own = [t.untyped_storage() for t in held.values() if t.numel() != logits.numel()]
    return sum(storage.nbytes() for storage in own if storage.data_ptr() not in parameters)


# In bf16, a CPU's group norm keeps its statistics in float32 and the kernel without data says otherwise: a few bytes.
@pytest.mark.parametrize(
    ("name", "bf16"),
    [*((name, False) for name in MODELS), ("dense", True), ("moe-4x", True), ("mot", True), ("tied", True)],
)
def test_activations_are_what_a_real_forward_keeps(name, bf16):
    model = model_of(name, num_hidden_layers=3).train()
    kept = count_kept(model.config, TOKENS, ROWS, bf16=bf16)
    assert kept.of_model(3, False) + kept.copies == kept_by_a_real_forward(model, batch_of(model.config), bf16)


@pytest.mark.parametrize("name", ["dense", "mot", "transfusion-hybrid"])
def test_checkpoints_are_what_a_real_forward_keeps(name):
    model = model_of(name, num_hidden_layers=3).train()
    model.gradient_checkpointing_enable()
    planned = count_kept(model.config, TOKENS, ROWS).of_model(3, True)
    assert planned == kept_by_a_real_forward(model, batch_of(model.config))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("trained", [TUNED, {"lora": LoraConfig(rank=8)}, {"frozen_towers": ["image"]}])
def test_activations_beside_frozen_weights_are_what_a_real_forward_keeps(trained, bf16):
    model = model_of("mot", num_hidden_layers=3).train()
    kept = count_kept(model.config, TOKENS, ROWS, bf16=bf16, trained=trained)
    set_trained(model, **trained)
    assert kept.of_model(3, False) + kept.copies == kept_by_a_real_forward(model, batch_of(model.config), bf16)


def test_frozen_weights_have_no_state_of_training_and_the_bytes_that_they_are_held_in():
    model = model_of("transfusion-mot")
    kept = count_kept(model.config, TOKENS, ROWS, trained=TUNED)
    settings = {"bf16": False, "checkpointing": False, "averaged": True}
    parts = plan_memory(meta_model(model.config, **TUNED), kept, ROWS * LENGTH, Mesh(), **settings)
    set_trained(model, **TUNED)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert parts["frozen weights"] == sum(value.nbytes for value in model.parameters() if not value.requires_grad)
    assert parts["frozen weights"] < 0.4 * sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    for part in ("weights (float32)", "gradients (float32)", "moving average (float32)"):
        assert parts[part] == trained
    assert parts["optimizer (AdamW, 2 x float32)"] == 2 * trained


def test_eager_attention_keeps_probabilities():
    model = model_of("mot")
    model.set_attn_implementation("eager")
    kept = count_kept(model.config, TOKENS, ROWS, attention="eager")
    assert kept.of_model(2, False) == kept_by_a_real_forward(model.train(), batch_of(model.config))
    assert kept.layer > count_kept(model.config, TOKENS, ROWS).layer


class LiveBytes(TorchDispatchMode):
    """The most bytes that the results of operators took at once."""

    def __init__(self, wanted=lambda tensor: True):
        super().__init__()
        self.wanted, self.live, self.now, self.peak = wanted, set(), 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and self.wanted(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in self.live:
                    self.live.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage.data_ptr(), storage.nbytes())
        return output

    def _forget(self, pointer: int, size: int) -> None:
        self.live.discard(pointer)
        self.now -= size


@pytest.mark.parametrize("z_loss", [0.0, 1e-5])
@pytest.mark.parametrize("bf16", [False, True])
def test_loss_takes_what_a_real_backward_takes(bf16, z_loss):
    model = model_of("mot", vocab_size=500, z_loss_coefficient=z_loss).train()
    with LiveBytes(lambda tensor: tensor.numel() == ROWS * LENGTH * 500) as measured:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(**batch_of(model.config), use_cache=False)
        output.loss.backward()
    assert loss_bytes(model.config, ROWS * LENGTH, bf16) == measured.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vocabulary", [100, 1000])
@pytest.mark.parametrize("name", ["dense", "mot"])
def test_memory_of_one_process_is_what_a_real_step_takes(name, vocabulary, checkpointing):
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "max_position_embeddings": 512}
    model = model_of(name, vocab_size=vocabulary, **sizes).train()
    tokens = {"text": 500, "image": 524}
    if checkpointing:
        model.gradient_checkpointing_enable()
    with LiveBytes() as measured:
        output = model(**made_up_batch(model.config, tokens, 2), use_cache=False)
        output.loss.backward()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    settings = {"bf16": False, "checkpointing": checkpointing, "averaged": False}
    parts = plan_memory(model, count_kept(model.config, tokens, 2), 1024, Mesh(), **settings)
    # Operators did not make the weights, and there was no optimizer.
    assert parts["optimizer (AdamW, 2 x float32)"] == 2 * parts["weights (float32)"] == 2 * weights
    assert 0.87 < measured.peak / (sum(parts.values()) - 3 * weights) < 1.05


def test_each_process_holds_its_share_of_sixteen_bytes_a_parameter():
    # 16 B of state per parameter, of which each of 64 processes has its share.
    model = meta_model(MoTConfig.from_preset("chameleon-7b", "mot", modalities=["text", "image"]))
    kept = count_kept(model.config, {"text": 4096, "image": 4096}, 2, bf16=True, sharded=True)
    settings = {"bf16": True, "checkpointing": True, "averaged": True}
    parts = plan_memory(model, kept, 8192, Mesh(64), **settings)
    total = model.config.num_parameters()
    state = [size for part, size in parts.items() if "float32" in part]
    assert sum(state) == pytest.approx((16 + 4) * total / 64, rel=1e-6)
    layer, embeddings = (total - 2 * 65536 * 4096) // 32, 65536 * 4096
    assert parts["gathered units"] == pytest.approx(2 * (2 * layer + embeddings), rel=1e-3)
    assert parts["gradients being reduced"] == pytest.approx((2 + 4) * layer, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- messages


@pytest.fixture(scope="module")
def real_messages() -> list[dict]:
    words = [sys.executable, "-W", "ignore", "-m", "tests.training.fsdp_messages"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("index", range(len(FSDP_CASES)))
def test_messages_and_shards_are_those_of_fsdp2(real_messages, index):
    name, replicate, bf16, reshard, micro_batches = FSDP_CASES[index]
    mesh = Mesh(8, replicate, reshard)
    units = fsdp_units(meta_model(config_of(name)), reshard)
    traffic = plan_traffic(units, mesh, bf16, micro_batches)
    assert real_messages[index] == {
        "held": sum(unit.shard_numel(mesh.shard) for unit in units),
        "losses_without_logits": micro_batches,
        "all_gather": traffic.gather_forward + traffic.gather_backward,
        "reduce_scatter": traffic.reduce_scatter,
        "all_reduce": traffic.all_reduce,
    }


@pytest.mark.parametrize(
    ("variant", "modalities", "billions", "gigabytes"),
    [("dense", 2, 6.98, 55), ("mot", 2, 13.4, 106), ("mot", 3, 19.9, 156), ("moe-4x", 2, 19.9, 156)],
)
def test_7b_moves_what_its_parameters_make(variant, modalities, billions, gigabytes):
    # The paper's section 6.1 with the real matrices: FFN 8 D^2, vocabulary 65,536. Parameters in bf16 there and back,
    # and gradients in float32, would be 8 B each; the output layer stays from the forward to the backward.
    names = ["text", "image", "speech"][:modalities]
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 65536}
    # 8/3 D, up to a multiple of 64 so that no shard is padded.
    config = MoTConfig.from_variant(variant, modalities=names, intermediate_size=64 * 171, **sizes)
    units = fsdp_units(meta_model(config))
    total, root = sum(unit.numel for unit in units), next(unit.numel for unit in units if unit.kind == "root")
    assert total == config.num_parameters() and total / 1e9 == pytest.approx(billions, abs=0.06)
    received = plan_traffic(units, Mesh(64), bf16=True).total
    # A router's four rows go to 64 processes as 64.
    assert received == pytest.approx((8 * total - 2 * root) * 63 / 64, rel=5e-4)
    assert 8 * total * 63 / 64 / 1e9 == pytest.approx(gigabytes, abs=1)


def test_messages_take_the_way_that_their_group_takes():
    traffic = Traffic(gather_forward=300, gather_backward=200, reduce_scatter=100, all_reduce=60)
    assert seconds_of_traffic(traffic, Mesh(64, 8), network=2, link=10, per_node=8) == 600 / 10 + 60 / 2
    assert seconds_of_traffic(traffic, Mesh(64), network=2, link=10, per_node=8) == 600 / 2 + 60 / 2
    assert seconds_of_traffic(traffic, Mesh(8), network=2, link=10, per_node=8) == 660 / 10
    assert seconds_of_traffic(traffic, Mesh(8), network=2, link=None, per_node=8) == 660 / 2
