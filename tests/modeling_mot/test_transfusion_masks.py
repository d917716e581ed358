"""Who sees whom around images that are diffused, found by moving one token and looking at what else moves."""

import random
from itertools import product

import pytest
import torch

from modeling_mot.attention_masks import documents_of, find_image_blocks, image_positions

from .naive_transfusion import BOS, EOS, PATCH, image, positions, tiny_config, tiny_model, uncompiled_flex, visible


SIZES = [(4, 4), (2, 2), (2, 6), (4, 2)]


@pytest.fixture(autouse=True)
def flex_is_not_compiled(monkeypatch):
    uncompiled_flex(monkeypatch)


def random_document(rng, fewest_images=0):
    """Tokens, and the sizes of the images among them."""
    kinds = [rng.choice("ti") for _ in range(rng.randint(1, 4))] + ["i"] * fewest_images
    rng.shuffle(kinds)
    tokens, sizes = [BOS], []
    for kind in kinds:
        if kind == "t":
            tokens += [rng.randint(10, 59) for _ in range(rng.randint(1, 3))]
        else:
            sizes.append(rng.choice(SIZES))
            tokens += image(*sizes[-1])
    return tokens + [EOS], sizes


def inputs_of(sizes, rng, clean=None):
    """Images, some of them clean where `noised_images_visible` has a use for it, with fixed noise."""
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    latents = torch.randn(len(sizes), 2, height, width)
    return {
        "latents": latents,
        "image_sizes": sizes,
        "timesteps": torch.tensor([rng.randint(0, 999) for _ in sizes]),
        "noise": torch.randn_like(latents),
        "clean_images": torch.tensor([rng.random() < 0.5 for _ in sizes] if clean is None else clean),
    }


def moved(model, tokens, images, **kwargs):
    """(L, L) booleans: does the last hidden state at a query move with what comes in at a key?

    Row 0 of the batch is the row itself; in row k + 1 the embedding (of token or patch) at k is another one.
    """
    length = len(tokens)
    copies = {
        name: value * (length + 1) if name == "image_sizes" else torch.cat([value] * (length + 1))
        for name, value in images.items()
    }

    def shake(module, args, given):
        embeds = given["inputs_embeds"].clone()
        for place in range(length):
            embeds[place + 1, place] += 3 * torch.randn(embeds.shape[-1])
        return args, given | {"inputs_embeds": embeds}

    handle = model.model.register_forward_pre_hook(shake, with_kwargs=True)
    hidden = []
    handle_out = model.model.register_forward_hook(lambda module, args, out: hidden.append(out.last_hidden_state))
    kwargs = {name: value.expand(length + 1, -1) for name, value in kwargs.items()}
    with torch.no_grad():
        model(torch.tensor([tokens] * (length + 1)), **copies, **kwargs)
    handle.remove(), handle_out.remove()
    return ((hidden[0][1:] - hidden[0][:1]).abs().amax(-1) > 1e-5).T


OPTIONS = list(product([False, True], [True, False]))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "mot_ranges"])
@pytest.mark.parametrize(("markers", "noised_visible"), OPTIONS)
def test_in_a_packed_row_a_token_moves_exactly_what_the_rule_allows(attention, markers, noised_visible):
    model = tiny_model(
        "dense", markers_in_image_block=markers, noised_images_visible=noised_visible, attn_implementation=attention
    )
    for seed in range(2):
        rng = random.Random(f"{seed}{markers}{noised_visible}")
        packed = [random_document(rng, fewest_images=1) for _ in range(3)]
        tokens = [token for document, _ in packed for token in document] + [0, 0]
        documents = [number for number, (document, _) in enumerate(packed) for _ in document] + [-1, -1]
        images = inputs_of([size for _, sizes in packed for size in sizes], rng)
        seen = moved(model, tokens, images, document_ids=torch.tensor([documents]))
        assert torch.equal(seen, visible(model.config, tokens, documents, clean=images["clean_images"]))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "mot_ranges"])
@pytest.mark.parametrize(("markers", "noised_visible"), OPTIONS)
def test_in_a_left_padded_row_a_token_moves_exactly_what_the_rule_allows(attention, markers, noised_visible):
    model = tiny_model(
        "mot", markers_in_image_block=markers, noised_images_visible=noised_visible, attn_implementation=attention
    )
    rng = random.Random(f"{markers}{noised_visible}")
    for padded in (0, 3):
        document, sizes = random_document(rng, fewest_images=2)
        tokens, images = [0] * padded + document, inputs_of(sizes, rng)
        mask = torch.tensor([[0] * padded + [1] * len(document)])
        seen = moved(model, tokens, images, attention_mask=mask)
        expected = visible(model.config, tokens, padding=range(padded), clean=images["clean_images"])
        assert torch.equal(seen[padded:], expected[padded:])


def test_a_noised_image_moves_its_clean_copy_never_and_the_copy_is_context():
    model = tiny_model("mot", noised_images_visible=False, markers_in_image_block=True)
    tokens = [BOS, 10, *image(2, 2), *image(2, 2), 11, EOS]  # noised, then clean
    images = inputs_of([(2, 2)] * 2, random.Random(0), clean=[False, True])
    seen = moved(model, tokens, images)
    noised, copy, text = range(2, 5), range(5, 8), 8
    assert not seen[5:][:, list(noised)].any()
    assert seen[text][list(copy)].all() and not seen[list(noised)][:, list(copy)].any()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "mot_ranges"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("variant", ["dense", "mot"])
def test_packed_row_equals_separate_documents(variant, shared, attention):
    torch.manual_seed(1)
    model = tiny_model(
        variant,
        image_positions="shared" if shared else "consecutive",
        markers_in_image_block=shared,
        attn_implementation=attention,
    )
    rng = random.Random(variant)
    packed = [random_document(rng, fewest_images=n) for n in (1, 0, 2)]
    sizes = [size for _, own in packed for size in own]
    images = inputs_of(sizes, rng)
    tokens = [token for document, _ in packed for token in document]
    documents = [number for number, (document, _) in enumerate(packed) for _ in document]
    with torch.no_grad():
        whole = model(torch.tensor([tokens]), document_ids=torch.tensor([documents]), **images)
        start, first = 0, 0
        for document, own in packed:
            part = {name: value[first : first + len(own)] for name, value in images.items()} if own else {}
            # Without a cache transformers takes positions that are not consecutive for new documents.
            alone = model(torch.tensor([document]), use_cache=False, **part)
            torch.testing.assert_close(
                whole.logits[0, start : start + len(document)], alone.logits[0], rtol=1e-4, atol=1e-4
            )
            if own:
                torch.testing.assert_close(
                    whole.prediction[first : first + len(own)], alone.prediction, rtol=1e-4, atol=1e-4
                )
            start, first = start + len(document), first + len(own)


@pytest.mark.parametrize(("markers", "noised_visible"), OPTIONS)
def test_eager_sdpa_and_flex_give_the_same_numbers(markers, noised_visible):
    rng = random.Random(0)
    rows = [random_document(rng, fewest_images=1) for _ in range(2)]
    length = max(len(document) for document, _ in rows)
    ids = torch.tensor([document + [0] * (length - len(document)) for document, _ in rows])
    documents = torch.tensor([[0] * len(document) + [-1] * (length - len(document)) for document, _ in rows])
    images = inputs_of([size for _, sizes in rows for size in sizes], rng)
    outputs = []
    for attention in ("eager", "sdpa", "flex_attention", "mot_ranges"):
        torch.manual_seed(0)
        model = tiny_model(
            markers_in_image_block=markers, noised_images_visible=noised_visible, attn_implementation=attention
        )
        with torch.no_grad():
            outputs.append(model(ids, document_ids=documents, labels=ids, **images))
    for other in outputs[1:]:
        for name in ("logits", "prediction", "loss"):
            torch.testing.assert_close(getattr(other, name), getattr(outputs[0], name), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_flex_gives_the_same_numbers(monkeypatch, request):
    if "slow" not in request.config.getoption("-m"):
        pytest.skip("its kernel takes half a minute to compile: pytest -m slow")
    monkeypatch.undo()
    ids = torch.tensor([[BOS, 10, *image(), 11, *image(), EOS]])
    images, outputs = inputs_of([(4, 4)] * 2, random.Random(0)), []
    for attention in ("sdpa", "flex_attention"):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(tiny_model(attn_implementation=attention)(ids, **images).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- positions


def positions_seen(model, ids, **kwargs):
    """Those that the transformer is given."""
    seen = []
    handle = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, **kwargs)
    handle.remove()
    return seen[0].expand_as(ids)


@pytest.mark.parametrize("markers", [False, True])
@pytest.mark.parametrize("kind", ["consecutive", "shared"])
def test_positions_in_a_packed_row_are_counted_one_by_one(kind, markers):
    model, rng = tiny_model(image_positions=kind, markers_in_image_block=markers), random.Random(3)
    for _ in range(3):
        packed = [random_document(rng, fewest_images=1) for _ in range(3)]
        tokens = [token for document, _ in packed for token in document] + [0, 0]
        documents = [number for number, (document, _) in enumerate(packed) for _ in document] + [-1, -1]
        images = inputs_of([size for _, sizes in packed for size in sizes], rng)
        seen = positions_seen(model, torch.tensor([tokens]), document_ids=torch.tensor([documents]), **images)[0]
        expected = positions(model.config, tokens, documents)
        assert torch.equal(seen[:-2], expected[:-2])  # of the padding it does not matter


@pytest.mark.parametrize("markers", [False, True])
def test_shared_positions_of_left_padded_rows_are_counted_one_by_one(markers):
    model, rng = tiny_model(image_positions="shared", markers_in_image_block=markers), random.Random(4)
    for padded in (0, 1, 4):
        document, sizes = random_document(rng, fewest_images=2)
        tokens = [0] * padded + document
        mask = torch.tensor([[0] * padded + [1] * len(document)])
        for given in ({"attention_mask": mask}, {} if padded == 0 else {"attention_mask": mask.bool()}):
            seen = positions_seen(model, torch.tensor([tokens]), **given, **inputs_of(sizes, rng))[0]
            assert torch.equal(seen, positions(model.config, tokens, padding=range(padded)))
        prompts = model.positions_of_prompts(torch.tensor([tokens]), mask)
        assert torch.equal(prompts[0], positions(model.config, tokens, padding=range(padded)))


def test_positions_of_prompts_are_consecutive_behind_the_padding():
    model, tokens = tiny_model(), [0, 0, BOS, *image(), 10]
    prompts = model.positions_of_prompts(torch.tensor([tokens]), torch.tensor([[0, 0] + [1] * 8]))
    assert torch.equal(prompts[0], positions(model.config, tokens, padding=range(2)))


def test_positions_that_return_to_zero_begin_a_document():
    """As in transformers, whose own rule would take shared positions for new documents."""
    first, second = [BOS, 10, *image(), EOS], [BOS, *image(2, 2), 11, EOS]
    tokens, documents = first + second, [0] * len(first) + [1] * len(second)
    images = inputs_of([(4, 4), (2, 2)], random.Random(0))
    for kind in ("consecutive", "shared"):
        model = tiny_model(image_positions=kind)
        places = positions(model.config, tokens, documents)[None]
        assert documents_of(places)[0].tolist() == documents
        with torch.no_grad():
            by_positions = model(torch.tensor([tokens]), position_ids=places, **images)
            by_documents = model(torch.tensor([tokens]), document_ids=torch.tensor([documents]), **images)
        assert torch.equal(by_positions.logits, by_documents.logits)


def test_a_document_that_ends_in_an_image_takes_nothing_of_the_next_into_its_block():
    patch = torch.tensor([[False, False, True, True, False, True, False]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    blocks = find_image_blocks(patch, documents, with_markers=True)
    assert blocks.tolist() == [[-1, 0, 0, 0, 1, 1, 1]]
    assert image_positions(blocks, documents, None).tolist() == [[0, 1, 1, 1, 0, 0, 0]]


def test_images_without_a_token_between_them_are_parted_by_their_documents():
    blocks = find_image_blocks(torch.ones(1, 4).bool(), torch.tensor([[0, 0, 1, 1]]), with_markers=False)
    assert blocks.tolist() == [[0, 0, 1, 1]]


def test_shared_positions_do_not_follow_from_a_cache():
    model = tiny_model(image_positions="shared")
    with torch.no_grad():
        past = model(torch.tensor([[BOS, 10]]), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="position_ids are needed"):
            model(torch.tensor([[11]]), past_key_values=past)


def test_flash_attention_is_refused_for_it_knows_no_image_blocks():
    with pytest.raises(ValueError, match="Flash Attention"):
        tiny_model(attn_implementation="flash_attention_2")


def test_placeholders_are_of_the_image_modality_and_markers_are_text():
    model = tiny_model(modalities=("text", "image", "speech"))
    ids = torch.tensor([[BOS, 10, *image(2, 2), 6, 41, 7]])
    assert model.model.modality_ids_of(ids).tolist() == [[0, 0, 0, 1, 0, 0, 2, 0]]
    assert tiny_config().image_modality == 1 and tiny_config().image_token_id == PATCH
