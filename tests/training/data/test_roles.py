"""Rows in which a picture stands in several roles, against BAGEL's own rows and against documents written out."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from conversion.bagel_layout import bagel_map
from tests.conversion.bagel_sources import FIXTURES, numbers, training_batch
from tests.training.tiny_bagel import IMAGE, VISION, VOCABULARY, Column, ToyBagelProcessor, bagel_model
from training.data import DataConfig, Preparing, RowStream, SourceConfig, TemplateConfig, TokenizedSource
from training.data.collate import collate
from training.data.config import ROLES
from training.data.documents import build_row
from training.data.roles import compose_parts, features_segment, parts_of
from training.data.rows import prepare_held_out, single_direction_rows
from training.data.stream import mean_document_length, tokens_by_modality
from training.optimization import set_trained

from .conftest import png, small_vae


@pytest.fixture(scope="module")
def model():
    return bagel_model()


# ----------------------------------------------------------------------------------------------------- BAGEL's own rows

# The documents of the original's rows: segments, roles where they are not the default.
DOCUMENTS = {
    1: [(["text:a", "image:b", "text:c"], {"b": list(ROLES)})],
    2: [
        (["text:a", "image:b"], None),
        (["image:a", "text:b", "text:c"], None),
        (["image:a", "text:b", "image:c", "text:d"], {"a": ["latents", "features"], "c": ["noised"]}),
    ],
}


def spans_of(row) -> list[np.ndarray]:
    """The tokens of each text and each copy of a picture of a row."""
    ids, kind = row["token_ids"].numpy().copy(), row["kind"].numpy()
    ids[kind == 1], ids[kind == 2] = VISION, IMAGE
    return np.split(ids, np.cumsum(row["split_lens"].numpy())[:-1])


def document_of(template, spans, latents, pictures):
    """Compose a document of the next spans and pictures."""
    columns, images = {}, {}
    for part in parts_of(template):
        columns[part.segment] = Column([next(spans)])
        if part.role != "text":
            images[part.segment] = Column([[next(pictures if part.role == "features" else latents)]])
    source = SimpleNamespace(columns=columns, image_columns=images, vocabulary=VOCABULARY)
    return compose_parts(source, parts_of(template), 0, 0)


def composed(row: int, model) -> tuple[dict, dict]:
    """A row that our templates make, and the batch that BAGEL's numbers are of."""
    want = numbers(f"f_train_row{row}")
    batch = training_batch(model.config, want)
    latents = iter(
        [values[:, :height, :width].numpy() for values, (height, width) in zip(batch["latents"], batch["image_sizes"])]
    )
    pictures = iter(
        [
            values[:, :height, :width].numpy()
            for values, (height, width) in zip(batch["encoder_pixel_values"], batch["encoder_image_sizes"])
        ]
    )
    spans, documents = iter(spans_of(want)), []
    for segments, roles in DOCUMENTS[row]:
        template = TemplateConfig(segments, caption_first=None, targets="last", roles=roles)
        if row == 2 and roles:  # a picture that is drawn, and a text that is learnt behind it
            parts = parts_of(template)
            assert [(part.role, part.is_learnt) for part in parts] == [
                ("latents", False), ("features", False), ("text", False), ("noised", True), ("text", True),
            ]  # fmt: skip
        documents.append(document_of(template, spans, latents, pictures))
    return build_row(documents, len(want["token_ids"]), VOCABULARY), batch


@pytest.mark.parametrize("row", [1, 2])
def test_rows_are_those_of_the_original(model, row):
    want = numbers(f"f_train_row{row}")
    made, batch = composed(row, model)
    assert np.array_equal(made["input_ids"], batch["input_ids"][0])
    assert np.array_equal(made["position_ids"], want["position_ids"])
    assert np.array_equal(made["document_ids"], batch["document_ids"][0])
    # Labels are shifted inside of the forward.
    shifted = np.append(made["labels"][1:], -100)
    shifted[np.append(np.diff(made["document_ids"]), 1) != 0] = -100
    assert np.array_equal(shifted, batch["shift_labels"][0])
    assert [image["clean"] for image in made["images"]] == batch["clean_images"].tolist()


@pytest.mark.parametrize("row", [1, 2])
def test_losses_of_rows_are_those_of_the_original(model, row):
    want = numbers(f"f_train_row{row}")
    made, batch = composed(row, model)
    noise = {name: batch[name] for name in ("timesteps", "noise")}
    with torch.no_grad():
        output = model(**collate([made], model.config), **noise)
    losses = {name: output.loss_sums[name] / output.loss_counts[name] for name in output.loss_sums}
    torch.testing.assert_close(losses["text"], want["ce_mean"], atol=3e-5, rtol=0)
    torch.testing.assert_close(losses["image_diffusion"], want["mse_mean"], atol=3e-5, rtol=0)


@pytest.mark.parametrize("row", [1, 2])
def test_a_frozen_tower_that_stops_gradients_is_the_originals_freeze_und(row):
    model, want = bagel_model(), numbers(f"f_train_row{row}")
    made, batch = composed(row, model)
    norms = json.loads((FIXTURES / f"f_grad_norms_row{row}.json").read_text())
    set_trained(model, ["understanding"], ["embeddings", "encoders"], gradient_stops=["understanding"])
    output = model(**collate([made], model.config), timesteps=batch["timesteps"], noise=batch["noise"])
    torch.testing.assert_close(output.loss, want["ce_mean"] + want["mse_mean"], atol=3e-5, rtol=0)
    output.loss.backward()
    reached = 0
    for name, of_name in norms.items():
        gradient = model.get_parameter(bagel_map().forward(name)[0]).grad
        norm = 0.0 if gradient is None else gradient.norm().item()
        assert norm == pytest.approx(of_name["total_freeze_und"] or 0.0, rel=1e-4, abs=1e-6), name
        reached += norm > 0
    assert reached == sum(bool(of_name["total_freeze_und"]) for of_name in norms.values()) > 30


# --------------------------------------------------------------------------------------------------------- from records

TEMPLATES = {
    "draw": TemplateConfig(["text:caption", "image:after"], caption_first=None, targets="last", caption_dropout=0.1),
    "edit": TemplateConfig(
        ["image:before", "text:wish", "image:after"],
        caption_first=None,
        targets="last",
        caption_dropout=0.2,
        latents_dropout=0.3,
        features_dropout=0.4,
    ),
    "look": TemplateConfig(["image:before", "text:wish", "text:caption"], caption_first=None, targets="last"),
}
LATENTS_COPY, FEATURES_COPY = [152, *[IMAGE] * 8, 153], [152, *[VISION] * 8, 153]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(template names, ...) -> a prepared source of twelve records with pictures of colours of their own."""
    folder = tmp_path_factory.mktemp("edits")
    binary = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    kinds = {"before": binary, "after": binary, "wish": datasets.Value("string"), "caption": datasets.Value("string")}
    rows = {
        "before": [{"bytes": png((number, 0, 0), (64, 32)), "path": None} for number in range(12)],
        "after": [{"bytes": png((0, number, 0), (64, 32)), "path": None} for number in range(12)],
        "wish": ["w" * (number + 1) for number in range(12)],
        "caption": ["c" * (number % 3 + 1) for number in range(12)],
    }
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    table.cast_column("before", datasets.Image()).cast_column("after", datasets.Image()).to_parquet(
        str(folder / "train.parquet")
    )

    def prepare(*names, vae=None, **options):
        config = SourceConfig("edits", str(folder), [TEMPLATES[name] for name in names], **options)
        return TokenizedSource.prepare(config, Preparing(ToyBagelProcessor(), folder / "cache", vae=vae))

    return prepare


def text(letter: str, count: int) -> list[int]:
    return [150, *[ord(letter) % 150] * count, 151]


def test_only_the_copies_that_templates_need_are_kept(source):
    assert [str(segment) for segment in source("look").columns] == ["features:before", "text:wish", "text:caption"]
    kept = source("draw", "edit")
    assert {str(segment) for segment in kept.image_columns} == {"image:after", "image:before", "features:before"}
    (pixels,) = kept.image_columns[features_segment(TEMPLATES["edit"].parsed[0])].images(3, 0)
    assert pixels.shape == (3, 28, 56) and pixels.dtype == np.uint8 and (pixels[0] == 3).all()


def test_latents_are_cached_and_features_stay_pixels(source):
    kept = source("edit", vae=small_vae())
    kinds = {str(name): column.images(0, 0)[0].dtype for name, column in kept.image_columns.items()}
    assert kinds == {"image:before": np.float16, "image:after": np.float16, "features:before": np.uint8}
    RowStream(DataConfig(row_length=128, block_documents=4), [kept])  # its images are alike


def test_an_edit_is_both_copies_an_instruction_and_the_noised_target(source):
    (row,) = single_direction_rows(source("edit"), "image+text-to-image", 64, limit=1)
    ids = [*LATENTS_COPY, *FEATURES_COPY, *text("w", 1), *LATENTS_COPY]
    assert row["input_ids"][: len(ids)].tolist() == ids and (row["labels"] == -100).all()
    assert row["position_ids"][: len(ids)].tolist() == [*[0] * 10, *[1] * 10, 2, 3, 4, *[5] * 10]
    assert [(image["clean"], int(image["values"][1, 0, 0])) for image in row["images"]] == [(True, 0), (False, 0)]
    assert [picture.shape for picture in row["pictures"]] == [(3, 28, 56)]


def test_an_answer_is_learnt_up_to_its_end_and_the_question_is_not(source):
    made = source("look")
    document = compose_parts(made, parts_of(TEMPLATES["look"]), 4, 0)
    assert document.ids.tolist() == [*FEATURES_COPY, *text("w", 5), *text("c", 2)]
    assert document.labels.tolist() == [-100] * (10 + 7 + 1) + text("c", 2)[1:]
    assert document.position_ids.tolist() == [*[0] * 10, *range(1, 12)]
    assert not document.images and len(document.pictures) == 1


def test_dropped_copies_leave_their_positions_and_dropped_texts_do_not(source):
    parts = parts_of(TEMPLATES["edit"])
    assert [(part.role, part.dropout) for part in parts] == [
        ("latents", 0.3), ("features", 0.4), ("text", 0.2), ("noised", 0.0),
    ]  # fmt: skip
    made = source("edit")

    def positions(*omitted):
        return list(dict.fromkeys(compose_parts(made, parts, 0, 0, sum(1 << p for p in omitted)).position_ids.tolist()))

    assert positions() == [0, 1, 2, 3, 4, 5]
    assert positions(0) == [1, 2, 3, 4, 5]
    assert positions(2) == [0, 1, 2]
    assert positions(0, 1, 2) == [2]


def test_each_part_is_left_out_by_itself_as_often_as_its_template_says(source):
    stream = RowStream(DataConfig(row_length=128, block_documents=4000, seed=5), [source("edit")])
    draws = stream.draws(0)
    dropped = (draws.omitted[:, None] >> np.arange(4)) & 1
    expected = np.array([0.3, 0.4, 0.2, 0.0])
    assert np.abs(dropped.mean(axis=0) - expected).max() < 0.03
    for one in range(3):
        for other in range(one):
            together = (dropped[:, one] * dropped[:, other]).mean()
            assert together == pytest.approx(expected[one] * expected[other], abs=0.03)


def test_rows_are_packed_by_what_is_left(source):
    stream = RowStream(DataConfig(row_length=96, block_documents=64, seed=1), [source("draw", "edit", "look")])
    draws = stream.draws(0)
    assert [len(stream.document(draws, number)) for number in range(64)] == draws.length.tolist()
    rows = list(stream.block(0))
    assert sum((row["document_ids"] >= 0).sum() for row in rows) == draws.length.sum()
    assert stream.report(2)["fill_rate"] > 0.8


def test_mean_lengths_and_shares_are_those_of_many_documents(source):
    made = source("draw", "edit", "look")
    stream = RowStream(DataConfig(row_length=96, block_documents=6000, seed=1), [made])
    draws = stream.draws(0)
    assert mean_document_length(made) == pytest.approx(draws.length.mean(), rel=0.02)
    counts = sum(
        np.bincount(VOCABULARY.modality_ids(stream.document(draws, number).ids), minlength=3) for number in range(2000)
    )
    assert tokens_by_modality([made])[0] == pytest.approx(counts / 2000, rel=0.06)


def test_batches_hold_pictures_for_vae_and_encoder(source, model):
    stream = RowStream(DataConfig(row_length=96, block_documents=16, seed=1), [source("draw", "edit", "look")])
    rows = [stream.row(number) for number in range(3)]
    batch = collate(rows, model.config, noise_seed=0, row_numbers=range(3))
    assert len(batch["pixel_values"]) == sum(len(row["images"]) for row in rows)
    assert len(batch["encoder_pixel_values"]) == sum(len(row["pictures"]) for row in rows)
    with torch.no_grad():
        output = model(**batch)
        alone = [
            model(**collate([row], model.config, noise_seed=0, row_numbers=[number])) for number, row in enumerate(rows)
        ]
    for name, count in output.loss_counts.items():
        assert count == sum(one.loss_counts[name] for one in alone)
        torch.testing.assert_close(output.loss_sums[name], sum(one.loss_sums[name] for one in alone))


def test_held_out_rows_are_of_the_templates_as_written(source, tmp_path):
    made, looked = source("draw", "edit"), source("look")
    looked.config.name = "looks"
    config = DataConfig(row_length=96, validation_sources=[made.config, looked.config], cache_dir=str(tmp_path))
    held_out = prepare_held_out(config, ToyBagelProcessor(), 2)
    assert list(held_out) == ["edits/text-to-image", "edits/image+text-to-image", "looks/image+text-to-text"]
    assert all(len(rows) == 2 and "pictures" in rows[0] for rows in held_out.values())


CONVERSATION = [
    {"type": "text", "text": "a"},
    {"type": "image", "image": 3},
    {"type": "text", "text": "bb"},
    {"type": "image", "image": 4, "roles": ["latents", "features"]},
    {"type": "image", "image": 5},
]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A prepared column of documents with several pictures."""
    folder = tmp_path_factory.mktemp("conversations")
    for number, colour in enumerate((3, 4, 5)):
        (folder / f"{colour}.png").write_bytes(png((colour, number, 0), (64, 32)))
    parts = [part | ({"image": f"{part['image']}.png"} if "image" in part else {}) for part in CONVERSATION]
    (folder / "train.jsonl").write_text(json.dumps({"parts": parts}) + "\n")

    def prepare(**template):
        config = SourceConfig("talks", str(folder / "train.jsonl"), [TemplateConfig(["document:parts"], **template)])
        return TokenizedSource.prepare(config, Preparing(ToyBagelProcessor(), folder / "cache"))

    return prepare


@pytest.mark.parametrize("targets", ["all", "last"])
def test_documents_say_the_roles_of_their_pictures(conversations, targets):
    made = conversations(targets=targets)
    document = compose_parts(made, parts_of(made.config.templates[0]), 0, 0)
    three = [*LATENTS_COPY, *LATENTS_COPY, *FEATURES_COPY]
    expected = [*text("a", 1), *three, *text("b", 2), *LATENTS_COPY, *FEATURES_COPY, *LATENTS_COPY]
    assert document.ids.tolist() == expected
    positions = [0, 1, 2, *[3] * 20, *[4] * 10, 5, 6, 7, 8, *[9] * 10, *[10] * 10, *[11] * 10]
    assert document.position_ids.tolist() == positions
    copies = [(image["clean"], int(image["values"][0, 0, 0])) for image in document.images]
    assert copies == [(False, 3), (True, 3), (True, 4), (False, 5)]
    assert [int(picture[0, 0, 0]) for picture in document.pictures] == [3, 4]
    learnt = [label for label in document.labels.tolist() if label != -100]
    assert learnt == ([*text("a", 1)[1:], *text("b", 2)[1:]] if targets == "all" else [])


def test_documents_are_packed_and_evaluated(conversations, tmp_path, model):
    made = conversations()
    stream = RowStream(DataConfig(row_length=160, block_documents=4), [made])
    assert stream.report(1)["shares_of_modalities"].keys() == {"text", "vision", "image"}
    counts = np.bincount(VOCABULARY.modality_ids(stream.row(0)["input_ids"][:67]), minlength=3)
    assert tokens_by_modality([made])[0] == pytest.approx(counts)
    config = DataConfig(row_length=160, validation_sources=[made.config], cache_dir=str(tmp_path))
    held_out = prepare_held_out(config, ToyBagelProcessor(), 2)
    assert list(held_out) == ["talks/interleaved"]
    with torch.no_grad():
        output = model(**collate(held_out["talks/interleaved"], model.config))
    assert output.loss_counts["image_diffusion"] == 2 * 16 * 4 * 8


def test_a_document_column_leaves_nothing_out(conversations):
    with pytest.raises(ValueError, match="features_dropout=0.3 of segments=.* give a segment for each column"):
        conversations(features_dropout=0.3)


WRONG = {
    "a text": ({"roles": {"wish": ["latents"]}}, "roles names 'wish', which is no picture of segments="),
    "unknown": ({"roles": {"before": ["clean"]}}, r"roles.before=\['clean'\] must be one or more of noised, latents"),
    "none": ({"roles": {"before": []}}, "leave the segment out for none"),
    "dropout": ({"latents_dropout": 1.0}, "latents_dropout=1.0 must be at least 0 and below 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_roles_are_refused(name):
    fields, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        TemplateConfig(["image:before", "text:wish", "image:after"], caption_first=None, targets="last", **fields)


def test_an_order_that_is_drawn_is_refused():
    with pytest.raises(ValueError, match="caption_first=0.8: a model whose pictures have roles .* set caption_first"):
        parts_of(TemplateConfig(["text:caption", "image:after"]))
