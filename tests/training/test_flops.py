import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_mot import MoTForCausalLM
from training.model.costs import forward_flops, forward_flops_per_token, peak_flops, training_flops

from .tiny import tiny_config


VARIANTS = [
    "dense", "moe-4x", "mot", "hybrid", "loo-text", "loo-image", "loo-speech", "untied-feed-forward",
    "untied-feed-forward-qkv", "untied-feed-forward-attention",
]  # fmt: skip
LENGTH, ROWS = 24, 3


def counted(config, modality_ids: torch.Tensor, backward: bool = False) -> int:
    """What torch's counter sees of a real model."""
    config._attn_implementation = "sdpa"
    model = MoTForCausalLM(config)
    first = torch.tensor([config.modality_token_ranges[name][0] for name in config.modalities])
    # The counter does not know the CPU's fused attention; as matrix products it counts it.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(input_ids=first[modality_ids], modality_ids=modality_ids, use_cache=False)
        if backward:
            output.logits.sum().backward()
    return counter.get_total_flops()


def by_modality(config, modality_ids: torch.Tensor) -> dict[str, int]:
    return {name: int((modality_ids == index).sum()) for index, name in enumerate(config.modalities)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_form_is_what_torch_counts(variant):
    # 72 tokens, of which no modality has a multiple of four.
    modality_ids = torch.tensor([0] * 39 + [1] * 22 + [2] * 11).reshape(ROWS, LENGTH)
    config = tiny_config(variant)
    assert forward_flops(config, by_modality(config, modality_ids), LENGTH) == counted(config, modality_ids)


def test_closed_form_holds_with_grouped_queries_and_a_head_dimension_of_its_own():
    modality_ids = torch.randint(0, 3, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    config = tiny_config("mot", num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, qk_norm="rms")
    assert forward_flops(config, by_modality(config, modality_ids), LENGTH) == counted(config, modality_ids)


def test_closed_form_holds_when_modalities_are_absent():
    modality_ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    config = tiny_config("mot")
    assert forward_flops(config, by_modality(config, modality_ids), LENGTH) == counted(config, modality_ids)


def test_variants_differ_by_their_routers_alone():
    dense, mot, moe, hybrid = (
        forward_flops_per_token(tiny_config(variant), LENGTH) for variant in ("dense", "mot", "moe-4x", "hybrid")
    )
    router = 2 * 2 * 32 * 4  # two layers of a product of 32 by 4
    assert dense == mot
    assert moe == {name: flops + router for name, flops in dense.items()}
    assert hybrid == dense | {"text": dense["text"] + router}


def test_a_backward_costs_twice_a_forward():
    modality_ids = torch.randint(0, 3, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    config = tiny_config("mot")
    expected = training_flops(config, by_modality(config, modality_ids), LENGTH)
    assert counted(config, modality_ids, backward=True) == expected


def test_peak_of_a_cpu_is_measured_and_positive():
    peak, source = peak_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert peak > 1e8 and "measured" in source
