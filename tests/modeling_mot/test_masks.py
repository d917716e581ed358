"""Who sees whom, found by changing one token and looking at what moves."""

import pytest
import torch

from modeling_mot.attention_masks import document_positions, flash_documents


def sees(model, ids, **kwargs):
    """(L, L) booleans: does the output at a query move with the token at a key?"""
    with torch.no_grad():
        before = model(ids, **kwargs).logits[0]
        columns = []
        for place in range(ids.shape[1]):
            other = ids.clone()
            other[0, place] = (ids[0, place] + 1) % 30  # text stays text
            columns.append((model(other, **kwargs).logits[0] - before).abs().amax(-1) > 1e-6)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
@pytest.mark.parametrize("documents", [None, [0, 0, 0, 1, 1, 2, -1, -1], [5, 5, 3, 3, 3, 3, 4, 4]])
def test_a_token_sees_the_earlier_ones_of_its_document(tiny_model, attention, documents):
    model = tiny_model(attn_implementation=attention)
    ids = torch.randint(7, 29, (1, 8))
    kwargs = {} if documents is None else {"document_ids": torch.tensor([documents])}
    labels = documents or [0] * 8
    expected = torch.tensor([[k <= q and labels[k] == labels[q] for k in range(8)] for q in range(8)])
    assert torch.equal(sees(model, ids, **kwargs), expected)


@pytest.mark.parametrize("attention", ["mot_ranges", "sdpa", "eager"])
def test_nothing_sees_padding(tiny_model, attention):
    model = tiny_model(attn_implementation=attention)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    seen = sees(model, torch.randint(7, 29, (1, 7)), attention_mask=mask)
    expected = torch.tensor([[k <= q and bool(mask[0, k]) for k in range(7)] for q in range(7)])
    assert torch.equal(seen[2:6], expected[2:6])


def test_documents_and_padding_combine(tiny_model):
    model, ids = tiny_model(), torch.randint(7, 29, (1, 7))
    mask, documents = torch.tensor([[0, 1, 1, 1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    seen = sees(model, ids, attention_mask=mask, document_ids=documents)
    expected = [[k <= q and k > 0 and (k < 3) == (q < 3) for k in range(7)] for q in range(7)]
    assert torch.equal(seen[1:], torch.tensor(expected)[1:])


def test_positions_begin_at_zero_in_each_document():
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [7, 7, 7, 7, 7, 7, 7, 7]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_flash_lengths_are_those_of_the_documents():
    plan = flash_documents(torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]]))
    assert plan["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 12] and plan["max_length_k"] == 6


def test_given_positions_are_used(tiny_model):
    model, ids = tiny_model(), torch.randint(7, 29, (1, 5))
    mask = torch.ones_like(ids)
    consecutive = model(ids, attention_mask=mask).logits
    shifted = model(ids, attention_mask=mask, position_ids=torch.arange(5)[None] + 17).logits
    stretched = model(ids, attention_mask=mask, position_ids=2 * torch.arange(5)[None]).logits
    torch.testing.assert_close(shifted, consecutive, rtol=1e-4, atol=1e-4)  # RoPE knows differences only
    assert not torch.allclose(stretched, consecutive, atol=1e-3)


def test_documents_of_another_shape_are_refused(tiny_model):
    with pytest.raises(ValueError, match="document_ids has shape"):
        tiny_model()(torch.randint(7, 29, (1, 5)), document_ids=torch.zeros(1, 4, dtype=torch.long))


def test_documents_on_top_of_a_cache_are_refused(tiny_model):
    model, ids = tiny_model(), torch.randint(7, 29, (1, 5))
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled past_key_values"):
        model(ids, past_key_values=past, document_ids=torch.zeros_like(ids))
