"""Time a training step of a MoT beside transformers' Llama of equal active size and the paper's Algorithm 1."""

import torch
from torch.profiler import ProfilerActivity, profile

from modeling_mot.tower_routing import ModalityRouting
from training.benchmark.peers import SIZES, BooleanMaskMoT, build_llama, build_mot, made_up_batch
from training.benchmark.rounds import compare, interleave, peak_bytes
from training.data.collate import TOWER_ROWS


WARM_UP = 6


def contestants(
    size: dict, dtype: torch.dtype, towers: int, vocab_size: int, compiled: bool = False, products: tuple[str, ...] = ()
) -> dict[str, torch.nn.Module]:
    """Build the models that are compared, all with the same weights.

    Args:
        compiled: compile each layer, and leave `masks` out.
        products: add a MoT for each of these ways to compute the products of the towers.

    Returns:
        dict: `llama`; `mot`, with `towers` towers; `dense`, the same code with one tower; `masks`, Algorithm 1; and
            `mot_...` for each of `products`.
    """
    llama = build_llama(size, dtype, vocab_size)
    models = {"llama": llama, "mot": build_mot(llama, size, towers), "dense": build_mot(llama, size, 1)}
    for word in products:
        models[f"mot_{word}"] = build_mot(llama, size, towers)
        models[f"mot_{word}"].set_tower_products(word)
    if not compiled:
        return models | {"masks": BooleanMaskMoT(build_mot(llama, size, towers))}
    for model in models.values():
        for layer in model.model.layers:
            layer.compile()
    return models


def loss_of(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Compute the mean cross-entropy of a training step; of a MoT as the trainer does, with routing and no logits."""
    ids = batch["input_ids"]
    if isinstance(model, BooleanMaskMoT):
        return model(ids, batch["modality_ids"], labels=ids)[0]
    if not hasattr(model.config, "towers"):
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    modality_ids = batch["modality_ids"] if len(model.config.tower_names) > 1 else torch.zeros_like(ids)
    routing = ModalityRouting.from_modality_ids(modality_ids, model.config, TOWER_ROWS)
    return model(ids, modality_ids=modality_ids, labels=ids, routing=routing, use_cache=False, skip_logits=True).loss


def check_equal(models: dict[str, torch.nn.Module], batch: dict) -> None:
    """Check that all models have the same loss and the same gradient of the embedding, up to rounding.

    Raises:
        SystemExit: one differs from `llama`.
    """
    tolerance = 1e-4 if models["llama"].dtype == torch.float32 else 5e-2
    results = {}
    for name, model in models.items():
        loss = loss_of(model, batch)
        loss.backward()
        embedding = next(value for key, value in model.named_parameters() if key.endswith("embed_tokens.weight"))
        results[name] = (loss.item(), embedding.grad.float().clone())
        model.zero_grad()
    loss, gradient = results["llama"]
    for name, (other, other_gradient) in results.items():
        apart = max(abs(other / loss - 1), ((other_gradient - gradient).norm() / gradient.norm()).item())
        if apart > tolerance:
            raise SystemExit(f"{name} differs from llama by {apart:.2e}: nothing was timed")


def step(model: torch.nn.Module, batch: dict, optimizer: torch.optim.Optimizer | None = None) -> None:
    model.zero_grad()  # as the trainer does: a new gradient need not be added to zeros
    loss_of(model, batch).backward()
    if optimizer is not None:
        optimizer.step()


def time_train(
    size: str,
    dtype: torch.dtype,
    towers: int,
    rounds: int,
    rows: int,
    length: int,
    vocab_size: int,
    optimizer: bool = False,
    compiled: bool = False,
    products: tuple[str, ...] = (),
) -> dict:
    """Time forward and backward of each contestant; with `optimizer`, AdamW's update too.

    Returns:
        dict: the figures of `compare`, and `tokens_per_second`.
    """
    models = contestants(SIZES[size], dtype, towers, vocab_size, compiled, products)
    # No batch comes twice: as in a training, the towers get different numbers of tokens in every step.
    batches = [made_up_batch(rows, length, vocab_size, towers, seed=seed) for seed in range(WARM_UP + rounds)]
    check_equal(models, batches[0])

    # A step of each contestant on its next batch.
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if optimizer else None
        for name, model in models.items()
    }
    turns = {name: iter(batches) for name in models}
    calls = {name: lambda name=name: step(models[name], next(turns[name]), optimizers[name]) for name in models}

    # The ratios of the contestants that take part.
    pairs = [("mot", "llama"), ("dense", "llama"), ("mot", "dense"), ("mot", "masks"), ("masks", "llama")]
    pairs = [pair for pair in pairs if set(pair) <= set(models)] + [(f"mot_{word}", "mot") for word in products]
    figures = compare(interleave(calls, rounds, warm_up=WARM_UP), pairs)
    tokens = rows * length
    return figures | {"tokens_per_second": {name: tokens / value for name, value in figures["seconds"].items()}}


def profile_steps(size: str, dtype: torch.dtype, towers: int, rows: int, length: int, vocab_size: int) -> dict:
    """Profile forward and backward of one step, the fastest of five.

    Returns:
        dict: contestant -> {operator: milliseconds}, the costliest operator first.
    """
    models, batch = contestants(SIZES[size], dtype, towers, vocab_size), made_up_batch(rows, length, vocab_size, towers)
    figures = {}
    for name in ("llama", "mot"):
        step(models[name], batch)
        steps = []
        for _ in range(5):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                step(models[name], batch)
            steps.append({row.key: row.self_cpu_time_total / 1000 for row in profiler.key_averages()})
        best = min(steps, key=lambda operators: sum(operators.values()))
        figures[name] = dict(sorted(best.items(), key=lambda item: -item[1]))
    return figures


def memory_of_a_step(size: str, dtype: torch.dtype, towers: int, rows: int, length: int, vocab_size: int) -> dict:
    """Return the peak bytes of forward and backward of one step, beyond weights and gradients, in a fresh process."""
    arguments = (size, dtype, towers, rows, length, vocab_size)
    return {name: peak_bytes(_build, _step, name, *arguments) for name in ("llama", "mot")}


def _build(name: str, size: str, dtype: torch.dtype, towers: int, rows: int, length: int, vocab_size: int):
    llama = build_llama(SIZES[size], dtype, vocab_size)
    model = llama if name == "llama" else build_mot(llama, SIZES[size], towers)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, made_up_batch(rows, length, vocab_size, towers)


def _step(built, *arguments) -> None:
    model, batch = built
    loss_of(model, batch).backward()  # adds to the gradients that exist already
