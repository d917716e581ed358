"""Experts that choose tokens, and tokens that choose experts, against loops."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from modeling_mot import ModalityRouting
from modeling_mot.tower_experts import ExpertChoiceFeedForward
from training.data import collate


def mixture(tiny_config, num_experts=4):
    feed_forward = ExpertChoiceFeedForward(tiny_config("moe-4x", num_experts=num_experts))
    for parameter in feed_forward.parameters():
        parameter.data.normal_(std=0.3)
    return feed_forward


def naive(feed_forward, tokens, choice):
    """Each token and each expert by itself, with the softmax of the router as weight."""
    n, num_experts = len(tokens), len(feed_forward.experts)
    affinity = (tokens @ feed_forward.router.weight.T).softmax(-1)
    rows = [torch.zeros_like(token) for token in tokens]
    for e, expert in enumerate(feed_forward.experts):
        if choice == "token":
            chosen = [i for i in range(n) if max(range(num_experts), key=affinity[i].tolist().__getitem__) == e]
        else:
            capacity = n // num_experts + (1 if e < n % num_experts else 0)
            chosen = sorted(range(n), key=(-affinity[:, e]).tolist().__getitem__)[:capacity]
        for i in chosen:
            rows[i] = rows[i] + affinity[i, e] * expert(tokens[i])
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 3, 4, 7, 16, 30])
@pytest.mark.parametrize("choice", ["expert", "token"])
def test_equals_a_loop_in_outputs_and_gradients(tiny_config, n, choice):
    feed_forward = mixture(tiny_config)
    tokens, upstream = torch.randn(n, 32, requires_grad=True), torch.randn(n, 32)
    wanted = [tokens, *feed_forward.parameters()]
    results = []
    with torch.no_grad():
        expected = naive(feed_forward, tokens, choice)
    for output in (feed_forward(tokens, token_choice=choice == "token"), naive(feed_forward, tokens, choice)):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        grads = torch.autograd.grad((output * upstream).sum(), wanted, allow_unused=True)
        results.append([torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_experts", [2, 4, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 9, 20, 23])
@pytest.mark.parametrize("token_choice", [False, True])
def test_exactly_n_tokens_are_processed(tiny_config, n, num_experts, token_choice):
    feed_forward, processed = mixture(tiny_config, num_experts), []
    for expert in feed_forward.experts:
        expert.register_forward_hook(lambda module, args, output: processed.append(len(args[0])))
    assert feed_forward(torch.randn(n, 32), token_choice=token_choice).shape == (n, 32)
    assert sum(processed) == n
    if not token_choice:
        assert max(processed) - min(processed) <= 1


def test_every_expert_has_a_gradient_on_zero_tokens(tiny_config):
    feed_forward = mixture(tiny_config)
    feed_forward(torch.randn(0, 32)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in feed_forward.parameters())


def test_bfloat16_stays_bfloat16(tiny_config):
    assert mixture(tiny_config).bfloat16()(torch.randn(9, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_expert_choice_looks_at_later_tokens_and_token_choice_does_not(tiny_model):
    model, ids = tiny_model("moe-4x"), torch.randint(0, 60, (1, 12))
    other = torch.cat([ids[:, :6], torch.randint(0, 60, (1, 6))], dim=1)
    with torch.no_grad():
        experts = [model(x).logits[:, :6] for x in (ids, other)]
        tokens = [model(x, token_choice=True).logits[:, :6] for x in (ids, other)]
    assert not torch.allclose(*experts)
    torch.testing.assert_close(*tokens)


def test_hybrid_has_experts_in_the_text_tower_only(tiny_model):
    model, seen = tiny_model("hybrid"), {}
    for tower, module in model.model.layers[0].mlp.items():
        module.register_forward_pre_hook(
            lambda m, args, tower=tower: seen.update({tower: (type(m).__name__, len(args[0]))})
        )
    model(torch.tensor([[8, 9, 31, 32, 33, 50]]))
    assert seen == {"text": ("ExpertChoiceFeedForward", 2), "image": ("LlamaMLP", 3), "speech": ("LlamaMLP", 1)}


# ---------------------------------------------------------------------- padding

PADDED = {
    "moe-4x": ("moe-4x", {}),
    "hybrid": ("hybrid", {}),
    "all_towers": ("mot", {"moe_towers": ["text", "image", "speech"]}),
}
LENGTHS = (9, 5, 7)


def padded_model(tiny_model, name, **fields):
    variant, more = PADDED.get(name, (name, {}))
    return tiny_model(variant, **more, **fields)


def documents():
    """Rows of several lengths with all modalities, each with targets of its own."""
    rows = [torch.randint(7, 60, (1, length)) for length in LENGTHS]
    return rows, [torch.cat([torch.full((1, 1), -100), row[:, 1:]], dim=1) for row in rows]


def pad_rows(rows, side, value, longest):
    pads = [(longest - row.shape[1], 0) if side == "left" else (0, longest - row.shape[1]) for row in rows]
    return torch.cat([torch.nn.functional.pad(row, pad, value=value) for row, pad in zip(rows, pads)])


def padded_batch(rows, labels, side, longest=12):
    mask = pad_rows([torch.ones_like(row) for row in rows], side, 0, longest)
    return {
        "input_ids": pad_rows(rows, side, 0, longest),
        "labels": pad_rows(labels, side, -100, longest),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def padding_free(rows, labels):
    """The same tokens in one row: positions that begin anew begin a document."""
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0)
    return {"input_ids": torch.cat(rows, 1), "labels": torch.cat(labels, 1), "position_ids": positions}


def assert_equal_runs(model, padded, is_token, plain):
    """Logits of tokens, loss and gradients of two batches of the same tokens."""
    results = []
    for batch in (padded, plain):
        model.zero_grad()
        output = model(**batch, use_cache=False)
        output.loss.backward()
        results.append((output, [parameter.grad.clone() for parameter in model.parameters()]))
    (ours, our_grads), (wanted, wanted_grads) = results
    torch.testing.assert_close(ours.logits[is_token], wanted.logits.flatten(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.loss, wanted.loss)
    for grad, expected in zip(our_grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("marks", ["0", "1", "0010", "1111111", "0011101", "1110100110", "10000000001"])
def test_padding_takes_no_expert_and_no_capacity(tiny_config, marks):
    feed_forward, processed = mixture(tiny_config), []
    for expert in feed_forward.experts:
        expert.register_forward_hook(lambda module, args, output: processed.append(len(args[0])))
    is_token = torch.tensor([mark == "1" for mark in marks])
    rows, upstream = torch.randn(len(marks), 32, requires_grad=True), torch.randn(len(marks), 32)
    output = feed_forward(rows, is_token)
    assert sum(processed) == len(marks)  # as many products as without padding: sizes do not depend on the data
    expected = torch.zeros_like(output)
    if is_token.any():
        expected = expected.masked_scatter(is_token.unsqueeze(-1), naive(feed_forward, rows[is_token], "expert"))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    wanted, results = [rows, *feed_forward.parameters()], []
    for of_either in (output, expected):
        total = (of_either * upstream).sum() + 0 * sum(tensor.sum() for tensor in wanted)
        results.append(torch.autograd.grad(total, wanted))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padding_needs_nothing_from_the_data(tiny_config):
    with FakeTensorMode():
        output = mixture(tiny_config)(torch.randn(9, 32), torch.randint(0, 2, (9,)).bool())
        output.sum().backward()  # a value read back would raise DataDependentOutputException
    assert output.shape == (9, 32)


def test_one_compiled_graph_serves_every_amount_of_padding(tiny_config):
    torch._dynamo.reset()
    feed_forward, rows = mixture(tiny_config), torch.randn(11, 32)
    compiled = torch.compile(feed_forward, fullgraph=True, backend="eager")  # a break in the graph would raise
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (11, 7, 2, 0):
            is_token = torch.arange(11) >= 11 - number
            torch.testing.assert_close(compiled(rows, is_token), feed_forward(rows, is_token))


def test_sixteen_padded_positions_move_no_logit_of_a_trained_row(tiny_model):
    """The rows of the trainer mark padding by documents, and routing and plan are made ahead."""
    for name in PADDED:
        model, (documents_, _) = padded_model(tiny_model, name), documents()
        ids = torch.cat(documents_, 1)[0].numpy()
        modality_ids = model.model.modality_ids_of(torch.from_numpy(ids)[None])[0].numpy()
        row = {"input_ids": ids, "modality_ids": modality_ids, "labels": ids}
        row |= {"position_ids": np.arange(len(ids)), "document_ids": np.zeros_like(ids)}
        fill = dict.fromkeys(row, 0) | {"labels": -100, "document_ids": -1}
        padded = {key: np.pad(value, (0, 16), constant_values=fill[key]) for key, value in row.items()}
        with torch.no_grad():
            expected = model(**collate([row], model.config, multiple_of=16)).logits
            logits = model(**collate([padded], model.config, multiple_of=16)).logits[:, : len(ids)]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PADDED)
def test_padded_batch_equals_its_tokens_in_a_padding_free_row(tiny_model, name, side):
    rows, labels = documents()
    padded = padded_batch(rows, labels, side)
    assert_equal_runs(
        padded_model(tiny_model, name), padded, padded["attention_mask"].bool(), padding_free(rows, labels)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PADDED)
def test_packed_row_with_padding_equals_the_row_without(tiny_model, name, checkpointing):
    model, (rows, labels) = padded_model(tiny_model, name).train(), documents()
    if checkpointing:
        model.gradient_checkpointing_enable()
    plain = padding_free(rows, labels)
    plain["document_ids"] = torch.cat([torch.full_like(row, number) for number, row in enumerate(rows)], 1)
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0, "document_ids": -1}
    padded = {key: torch.nn.functional.pad(value, (0, 16), value=fill[key]) for key, value in plain.items()}
    modality_ids = model.model.modality_ids_of(padded["input_ids"])
    padded["routing"] = ModalityRouting.from_modality_ids(modality_ids, model.config, multiple_of=4)
    assert_equal_runs(model, padded, padded["document_ids"] >= 0, plain)


@pytest.mark.parametrize(("name", "marks"), [("moe-4x", True), ("mot", False), ("dense", False)])
def test_only_mixtures_are_told_of_padding(tiny_model, name, marks):
    model, seen, (rows, labels) = tiny_model(name), [], documents()
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[1].is_token))
    batch = padded_batch(rows, labels, "left")
    model(**batch)
    model(batch["input_ids"], labels=batch["labels"])
    assert [mark is not None for mark in seen] == [marks, False]


# As transformers' own suites have it: `test_left_padding_compatibility` and
# `test_eager_padding_matches_padding_free_with_position_ids`.


@pytest.mark.parametrize("name", ["moe-4x", "hybrid", "mot"])
def test_next_logits_with_left_padding_equal_those_without(tiny_model, name):
    model, ids = tiny_model(name), torch.randint(7, 60, (2, 8))
    mask = torch.cat([torch.zeros(2, 32, dtype=torch.long), torch.ones_like(ids)], dim=1)
    padded = torch.nn.functional.pad(ids, (32, 0))
    with torch.no_grad():
        expected = model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        logits = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["moe-4x", "hybrid", "mot"])
def test_padded_logits_equal_padding_free_ones_by_positions(tiny_model, name, implementation):
    model, (rows, labels) = tiny_model(name), documents()
    model.set_attn_implementation(implementation)
    padded = padded_batch(rows, labels, "left")
    assert_equal_runs(model, padded, padded["attention_mask"].bool(), padding_free(rows, labels))


@pytest.mark.parametrize("name", ["moe-4x", "hybrid", "mot"])
def test_generation_with_left_padding_equals_that_of_each_prompt(tiny_model, name):
    model, (rows, labels) = tiny_model(name), documents()
    batch = padded_batch(rows, labels, "left", max(LENGTHS))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
    for row, generated in zip(rows, together):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **settings)[0, row.shape[1] :]
        assert torch.equal(generated[-6:], alone)
