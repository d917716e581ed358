"""Time decoding: a MoT's `generate()` beside that of transformers' Llama of equal active size and weights.

R sequences.
"""

from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training.benchmark.peers import build_mot
from training.benchmark.rounds import compare, interleave


VOCAB_SIZE, PROMPT, NEW_TOKENS = 8192, 32, 96
TEXT_SHARES = {1: 1.0, 16: 0.5}  # sequences -> text's share of the vocabulary: one tower in a step, or both


def build(size: dict, dtype: torch.dtype, towers: int) -> dict[str, torch.nn.Module]:
    """Build Llama, and a MoT whose towers all have the Llama's weights, so that both generate the same."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, rms_norm_eps=1e-5, initializer_range=0.1, **size))
    models = {"llama": llama, "mot": build_mot(llama, size, towers)}
    return {name: model.to(dtype).eval() for name, model in models.items()}


def token_ranges(modalities: list[str], text_share: float) -> dict[str, list[int]]:
    """Give text, the first modality, its share of the vocabulary, and the others equal parts of the rest."""
    text, *others = modalities
    first = min(int(text_share * VOCAB_SIZE), VOCAB_SIZE - len(others)) if others else VOCAB_SIZE
    edges = torch.linspace(first, VOCAB_SIZE, len(others) + 1).int().tolist()
    return {text: [0, first]} | {name: list(span) for name, span in zip(others, zip(edges, edges[1:]))}


def decode(model: torch.nn.Module, batch: int) -> torch.Tensor:
    """Continue `batch` random prompts greedily.  -> (R, PROMPT + NEW_TOKENS)"""
    ids = torch.randint(1, VOCAB_SIZE, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)


def share_of_agreement(models: dict[str, torch.nn.Module], batch: int) -> float:
    """Return the share of the MoT's tokens that Llama finds likeliest too, up to rounding, after the same tokens."""
    tokens = decode(models["mot"], batch)
    with torch.no_grad():
        logits = models["llama"](tokens[:, :-1]).logits[:, PROMPT - 1 :].float()
    chosen = logits.gather(-1, tokens[:, PROMPT:, None]).squeeze(-1)
    tolerance = 1e-3 if models["llama"].dtype == torch.float32 else 0.25
    return (chosen >= logits.amax(dim=-1) - tolerance).float().mean().item()


def time_decode(size: dict, dtype: torch.dtype, towers: int, rounds: int) -> dict:
    """Time a greedy token, including its part of the prompt's forward, for each batch.

    Returns:
        dict: `batches`: number of sequences -> the figures of `compare`; `seconds` are those of one step.

    Raises:
        SystemExit: the two models generate different tokens.
    """
    models, figures = build(size, dtype, towers), {}
    for batch, share in TEXT_SHARES.items():
        config = models["mot"].config
        config.modality_token_ranges = token_ranges(config.modalities, share)
        if (agreement := share_of_agreement(models, batch)) < 1:
            raise SystemExit(f"of the tokens {1 - agreement:.1%} differ from llama's: nothing was timed")
        seconds = interleave({name: partial(decode, model, batch) for name, model in models.items()}, rounds)
        figures[str(batch)] = compare(seconds, [("mot", "llama")], each=NEW_TOKENS)
    return {"batches": figures}
