"""Decoding token by token: a MoT's `generate()` beside that of transformers' Llama of equal active size and weights."""

from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training.benchmark.peers import build_mot
from training.benchmark.rounds import compare, interleave


VOCAB_SIZE, PROMPT, NEW_TOKENS = 8192, 32, 96
TEXT_SHARES = {1: 1.0, 16: 0.5}  # sequences -> share of the vocabulary that is text: one tower a step, and both


def build(size: dict, dtype: torch.dtype, towers: int) -> dict[str, torch.nn.Module]:
    """Llama and a MoT of so many towers, all with its weights, so that the same follows from both."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, rms_norm_eps=1e-5, initializer_range=0.1, **size))
    models = {"llama": llama, "mot": build_mot(llama, size, towers)}
    return {name: model.to(dtype).eval() for name, model in models.items()}


def token_ranges(modalities: list[str], text_share: float) -> dict[str, list[int]]:
    """A share of the vocabulary for text, the first of the modalities, and equal parts of the rest for the others."""
    text, *others = modalities
    first = min(int(text_share * VOCAB_SIZE), VOCAB_SIZE - len(others)) if others else VOCAB_SIZE
    edges = torch.linspace(first, VOCAB_SIZE, len(others) + 1).int().tolist()
    return {text: [0, first]} | {name: list(span) for name, span in zip(others, zip(edges, edges[1:]))}


def decode(model: torch.nn.Module, batch: int) -> torch.Tensor:
    """-> (R, PROMPT + NEW_TOKENS)"""
    ids = torch.randint(1, VOCAB_SIZE, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)


def share_of_agreement(models: dict[str, torch.nn.Module], batch: int) -> float:
    """Share of the MoT's tokens that are Llama's likeliest, or within rounding of it, after what stands before them."""
    tokens = decode(models["mot"], batch)
    with torch.no_grad():
        logits = models["llama"](tokens[:, :-1]).logits[:, PROMPT - 1 :].float()
    chosen = logits.gather(-1, tokens[:, PROMPT:, None]).squeeze(-1)
    tolerance = 1e-3 if models["llama"].dtype == torch.float32 else 0.25
    return (chosen >= logits.amax(dim=-1) - tolerance).float().mean().item()


def time_decode(size: dict, dtype: torch.dtype, towers: int, rounds: int) -> dict:
    """Seconds of a greedy token, the prompt's forward included, for each batch, and their ratios.

    Returns:
        dict: `batches`: for each number of sequences what `compare` makes of it, `seconds` being those of one step.
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
