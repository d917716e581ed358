"""The order of documents and what rows hold, against naive recomputation and whole-epoch counts."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest

from training.config import digest_of
from training.data import RowStream, TemplateConfig
from training.data.rows import _fingerprint

from .conftest import ToyProcessor


BOS, EOS, BOI = ToyProcessor.BOS, ToyProcessor.EOS, ToyProcessor.BOI


def documents_of(rows):
    """The documents of packed rows, as tuples of ids, read off document_ids."""
    found = []
    for row in rows:
        for number in range(row["document_ids"].max() + 1):
            found.append(tuple(row["input_ids"][row["document_ids"] == number].tolist()))
    return found


def expected_pair(source, record, text_first):
    parts = source[record]
    text, picture = parts["text:name"][0], parts["image:picture"][0]
    return (BOS, *(text + picture if text_first else picture + text), EOS)


def test_an_epoch_holds_every_document_exactly_once(prepare, pair_source, data_config):
    source = prepare(pair_source(caption_first=1.0))
    stream = RowStream(data_config(block_documents=20), [source])
    rows = [row for block in range(2) for row in stream.block(block)]
    assert Counter(documents_of(rows)) == Counter(expected_pair(source, record, True) for record in range(40))


@pytest.mark.parametrize("targets", ["all", "last"])
def test_documents_of_a_tokenizer_without_a_begin_token_begin_with_their_first_segment(
    prepare, pair_source, data_config, processor, targets
):
    processor.bos_token_id = None
    source = prepare(pair_source(caption_first=None, targets=targets))
    stream = RowStream(data_config(block_documents=40), [source])
    rows = list(stream.block(0))
    assert Counter(documents_of(rows)) == Counter(expected_pair(source, record, True)[1:] for record in range(40))
    draws = stream.draws(0)
    assert sorted(draws.length) == sorted(map(len, documents_of(rows)))
    for row in rows:  # nothing predicts the first token of a document
        starts = np.flatnonzero(row["position_ids"] == 0)
        assert (row["labels"][starts] == -100).all()


def test_each_epoch_has_another_order(prepare, pair_source, data_config):
    stream = RowStream(data_config(block_documents=40), [prepare(pair_source())])
    first, second = stream.draws(0).record, stream.draws(1).record
    assert sorted(first) == sorted(second) == list(range(40))
    assert not np.array_equal(first, second)


def test_caption_stands_first_with_the_given_probability_and_is_not_inverted(prepare, pair_source, data_config):
    source = prepare(pair_source(caption_first=0.8))
    stream = RowStream(data_config(block_documents=4000), [source])
    documents = documents_of(stream.block(0))
    first = sum(document[1] != BOI for document in documents)
    # 4,000 draws: five standard deviations are 0.032.
    assert abs(first / len(documents) - 0.8) < 0.032


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_caption_order_is_certain_at_the_ends(prepare, pair_source, data_config, probability):
    stream = RowStream(data_config(), [prepare(pair_source(caption_first=probability))])
    assert {document[1] != BOI for document in documents_of(stream.block(0))} == {probability == 1.0}


def test_written_order_is_kept_without_caption_first(prepare, pair_source, data_config):
    source = prepare(pair_source(("image:picture", "text:name"), caption_first=None))
    assert all(document[1] == BOI for document in documents_of(RowStream(data_config(), [source]).block(0)))


def test_dropout_is_the_probability_of_dropping(prepare, pair_source, data_config):
    source = prepare(pair_source(caption_first=1.0, caption_dropout=0.1))
    stream = RowStream(data_config(block_documents=4000), [source])
    dropped = sum(document[1] == BOI for document in documents_of(stream.block(0)))
    # Five standard deviations are 0.024.
    assert abs(dropped / 4000 - 0.1) < 0.024


def test_a_text_that_comes_after_is_never_dropped(prepare, pair_source, data_config):
    source = prepare(pair_source(caption_first=0.0, caption_dropout=1.0))
    documents = documents_of(RowStream(data_config(block_documents=40), [source]).block(0))
    assert Counter(documents) == Counter(expected_pair(source, record, False) for record in range(40))


def test_a_dropped_caption_leaves_the_picture_alone(prepare, pair_source, data_config):
    source = prepare(pair_source(caption_first=1.0, caption_dropout=1.0))
    documents = documents_of(RowStream(data_config(block_documents=40), [source]).block(0))
    pictures = Counter((BOS, *source[record]["image:picture"][0], EOS) for record in range(40))
    assert Counter(documents) == pictures


def test_sources_have_their_exact_share_after_every_block(prepare, pair_source, text_source, data_config):
    weights = [5.0, 2.0, 0.3]
    sources = [
        prepare(pair_source(name="a", source={"weight": weights[0]})),
        prepare(text_source(name="b", weight=weights[1])),
        prepare(text_source(name="c", weight=weights[2])),
    ]
    stream = RowStream(data_config(block_documents=7), sources)
    counts = np.zeros(3)
    for block in range(200):
        draws = stream.draws(block)
        assert len(draws) == 7
        counts += np.bincount(draws.source, minlength=3)
        assert np.abs(counts - 7 * (block + 1) * np.array(weights) / 7.3).max() <= 1


def test_weights_by_tokens_give_shares_of_tokens(prepare, pair_source, text_source, data_config):
    sources = [prepare(pair_source(source={"weight": 1.0})), prepare(text_source(weight=3.0))]
    stream = RowStream(data_config(weights_by="tokens", block_documents=600), sources)
    report = stream.report(blocks=4)
    assert report["sources"]["texts"]["share_of_tokens"] == pytest.approx(0.75, abs=0.01)


def modality_shares(stream, rows=400):
    counts = np.zeros(3)
    for row in islice(stream.rows(), rows):
        counts += np.bincount(row["modality_ids"][row["document_ids"] >= 0], minlength=3)
    return counts / counts.sum()


@pytest.fixture
def three_sources(prepare, pair_source, text_source):
    """Texts; pictures with names; two sources of sounds with names, of weights 1 and 2."""
    sounds = ("text:name", "audio:sound")
    return [
        prepare(text_source(weight=5.0)),
        prepare(pair_source(caption_dropout=0.3)),
        prepare(pair_source(sounds, name="one")),
        prepare(pair_source(sounds, name="two", source={"weight": 2.0})),
    ]


@pytest.mark.parametrize("wanted", [(0.8, 0.1, 0.1), (0.9, 0.02, 0.08)])
@pytest.mark.parametrize("weights_by", ["documents", "tokens"])
def test_token_shares_are_those_of_the_rows(three_sources, data_config, wanted, weights_by):
    shares = dict(zip(("text", "image", "speech"), wanted, strict=True))
    stream = RowStream(data_config(token_shares=shares, weights_by=weights_by, block_documents=2000), three_sources)
    assert modality_shares(stream) == pytest.approx(wanted, abs=0.01)
    report = stream.report(blocks=2)
    assert report["shares_of_modalities"] == pytest.approx(shares)
    of_sources = {name: source["share_of_documents"] for name, source in report["sources"].items()}
    assert of_sources["two"] / of_sources["one"] == pytest.approx(2, rel=0.02)


def test_token_shares_that_no_mixture_has_are_refused(three_sources, data_config):
    def refused(sources, message, **shares):
        with pytest.raises(ValueError, match=message):
            RowStream(data_config(token_shares=shares), sources)

    texts, pictures, sounds, _ = three_sources
    refused(
        [texts, sounds], "image=0.1, but there is no source with more image than other", text=0.8, image=0.1, speech=0.1
    )
    refused([pictures, sounds], "no source of text alone", text=0.8, image=0.1, speech=0.1)
    refused(three_sources, "has no share of speech", text=0.5, image=0.5)
    refused([texts, pictures], "cannot be reached.*the sources of image: text 0.[0-9]+, image", text=0.1, image=0.9)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"text": 0.5, "image": 0.4}, "add up to 0.9"),
        ({"text": 0.5, "image": 0.4, "speech": 0.1}, "has speech=0.1, but no source has speech"),
        ({"text": 0.5, "taste": 0.5}, "has taste=0.5, but no source has taste"),
        ({"text": 1.0}, "no share of image"),
        ({"text": 1.2, "image": -0.2}, "token_shares"),
    ],
)
def test_token_shares_are_checked_before_data_are_read(pair_source, text_source, data_config, shares, message):
    with pytest.raises(ValueError, match=message):
        data_config(token_shares=shares, sources=[pair_source(), text_source()]).validate()


def older(template: TemplateConfig) -> dict:
    """The settings of a template before there were interleaving and roles."""
    later = ("interleaving", "roles", "latents_dropout", "features_dropout")
    return {name: value for name, value in asdict(template).items() if name not in later}


def test_token_shares_change_the_fingerprint_only_where_they_are_set(prepare, pair_source, text_source, data_config):
    """A run that began before there were shares goes on: its fingerprint stays."""
    sources = [prepare(text_source()), prepare(pair_source())]
    without, with_shares = (
        _fingerprint(data_config(token_shares=shares), sources) for shares in (None, {"text": 0.9, "image": 0.1})
    )
    made_of = {
        "sources": [source.fingerprint for source in sources],
        "mixture": [[s.config.name, s.config.weight, [older(t) for t in s.config.templates]] for s in sources],
        "rows": [128, 3, "documents", 32, 0.0],
    }
    assert without == digest_of(made_of) != with_shares


def test_templates_come_by_weight(prepare, trimodal_folder, data_config, pair_source):
    config = pair_source()
    config.templates = [TemplateConfig(["text:name"], weight=1.0), TemplateConfig(["audio:sound"], weight=3.0)]
    draws = RowStream(data_config(block_documents=4000), [prepare(config)]).draws(0)
    assert abs((draws.template == 1).mean() - 0.75) < 0.035


def test_a_row_depends_on_seed_and_index_alone(prepare, pair_source, text_source, data_config):
    sources = [prepare(pair_source()), prepare(text_source())]
    walked = list(islice(RowStream(data_config(), sources).rows(), 60))
    for start in (0, 1, 17, 42, 59):
        fresh = RowStream(data_config(), sources)
        for name, value in fresh.row(start).items():
            assert np.array_equal(value, walked[start][name])


def test_another_seed_is_another_order(prepare, pair_source, data_config):
    source = prepare(pair_source())
    one, other = (RowStream(data_config(seed=seed), [source]).row(0)["input_ids"] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_rows_carry_positions_labels_and_modalities_of_their_documents(prepare, pair_source, text_source, data_config):
    stream = RowStream(data_config(), [prepare(pair_source()), prepare(text_source())])
    for row in islice(stream.rows(), 30):
        previous, position = None, 0
        for place in range(128):
            document, token = row["document_ids"][place], row["input_ids"][place]
            position = position + 1 if document == previous else 0
            if document == -1:
                assert (token, row["labels"][place], row["position_ids"][place]) == (ToyProcessor.PAD, -100, 0)
            else:
                assert row["position_ids"][place] == position
                assert row["labels"][place] == (-100 if position == 0 else token)
            assert row["modality_ids"][place] == (0 if token < 263 else 1 if token < 279 else 2)
            previous = document


def test_a_long_text_is_split_over_consecutive_rows_and_nothing_is_lost(prepare, text_source, data_config):
    source = prepare(text_source())
    stream = RowStream(data_config(row_length=16, block_documents=30), [source])
    rows, draws = list(stream.block(0)), stream.draws(0)
    tokens = Counter(token for row in rows for token in row["input_ids"][row["document_ids"] >= 0].tolist())
    expected = Counter()
    for record in range(30):
        expected.update([BOS, *source[record]["text:text"][0], EOS])
    assert tokens == expected
    packed = [row["input_ids"].tolist() for row in rows]
    for number in np.flatnonzero(draws.length > 16):
        whole = stream.document(draws, int(number)).ids.tolist()
        parts = [whole[start : start + 16] for start in range(0, len(whole), 16)]
        follow = [
            all(row[: len(part)] == part for row, part in zip(packed[first:], parts, strict=False))
            for first in range(len(packed) - len(parts) + 1)
        ]
        assert any(follow)


def test_a_row_shorter_than_a_picture_is_refused_with_a_way_out(prepare, pair_source, data_config):
    source = prepare(pair_source())
    longest = max(len(expected_pair(source, record, True)) for record in range(40))
    with pytest.raises(ValueError, match=rf"row_length=12 .* of source 'pairs'.* set row_length to {longest}"):
        RowStream(data_config(row_length=12), [source])
    RowStream(data_config(row_length=longest), [source])


def test_rows_are_nearly_full(prepare, pair_source, text_source, data_config):
    stream = RowStream(
        data_config(row_length=256, block_documents=512), [prepare(pair_source()), prepare(text_source())]
    )
    assert stream.report(blocks=4)["fill_rate"] > 0.98


def test_every_variant_of_a_record_comes_before_any_comes_again(prepare, pair_source, data_config):
    from training.data import AugmentationConfig

    source = prepare(pair_source(), augmentation=AugmentationConfig(variants=3))
    stream = RowStream(data_config(block_documents=40), [source])
    seen = Counter()
    for block in range(3):
        draws = stream.draws(block)
        seen.update(zip(draws.record.tolist(), draws.variant.tolist(), strict=True))
    assert set(seen.values()) == {1} and len(seen) == 120


def test_sources_of_different_processors_do_not_mix(prepare, pair_source, text_source, data_config, tmp_path):
    from training.data import Preparing, TokenizedSource

    other = ToyProcessor("other")
    other.modality_token_ranges = {"text": [0, 300], "image": [300, 320]}
    foreign = TokenizedSource.prepare(text_source(), Preparing(other, tmp_path / "cache"))
    with pytest.raises(ValueError, match="different"):
        RowStream(data_config(), [prepare(pair_source()), foreign])


def test_replaced_codes_change_only_codes_of_the_input_and_stay_in_their_modality(prepare, pair_source, data_config):
    source = prepare(pair_source())
    clean = list(RowStream(data_config(block_documents=400), [source]).block(0))
    noisy = list(RowStream(data_config(block_documents=400, replaced_codes=1.0), [source]).block(0))
    shares = []
    for before, after in zip(clean, noisy, strict=True):
        for key in ("labels", "modality_ids", "document_ids", "position_ids"):
            assert np.array_equal(before[key], after[key])
        changed = before["input_ids"] != after["input_ids"]
        assert not changed[before["modality_ids"] == 0].any()
        assert np.array_equal(source.vocabulary.modality_ids(after["input_ids"]), before["modality_ids"])
        codes = before["modality_ids"] > 0
        shares += [
            changed[codes & (before["document_ids"] == number)].mean()
            for number in np.unique(before["document_ids"][codes])
        ]
    # Shares are uniform in [0, 1], some replacements being the code that stood there: a little under a half on average.
    assert 0.35 < np.mean(shares) < 0.5 and np.min(shares) < 0.1 and np.max(shares) > 0.7


def test_replaced_codes_are_a_function_of_the_row(prepare, pair_source, data_config):
    source = prepare(pair_source())
    streams = [RowStream(data_config(replaced_codes=0.5), [source]) for _ in range(2)]
    third = list(islice(streams[0].rows(), 4))[3]
    assert all(np.array_equal(value, streams[1].row(3)[key]) for key, value in third.items())


@pytest.mark.parametrize("caption_first", [0.0, 1.0])
def test_targets_last_learns_the_last_segment_and_the_end(prepare, pair_source, data_config, caption_first):
    source = prepare(pair_source(caption_first=caption_first, targets="last"))
    stream = RowStream(data_config(block_documents=40), [source])
    lengths = {}
    for record in range(40):
        text, picture = (source[record][name][0] for name in ("text:name", "image:picture"))
        lengths[expected_pair(source, record, caption_first == 1.0)] = 1 + len(picture if caption_first else text)
    for row in stream.block(0):
        for number in range(row["document_ids"].max() + 1):
            ids, labels = (row[name][row["document_ids"] == number].tolist() for name in ("input_ids", "labels"))
            learnt = lengths[tuple(ids)]
            assert labels == [-100] * (len(ids) - learnt) + ids[-learnt:]


def test_a_restored_stream_goes_on_without_counting_earlier_blocks(prepare, pair_source, text_source, data_config):
    sources = [prepare(pair_source(source={"weight": 2.3})), prepare(text_source())]
    walked = list(islice(RowStream(data_config(), sources).rows(), 90))
    for index in (0, 1, 40, 77):
        position = json.loads(json.dumps(RowStream(data_config(), sources).position(index)))
        restored = RowStream(data_config(), sources)
        restored.restore(position)
        drawn, draws = [], restored.draws
        restored.draws = lambda block: drawn.append(block) or draws(block)  # noqa: B023
        for number in range(index, 90):
            for name, value in restored.row(number).items():
                assert np.array_equal(value, walked[number][name])
        assert min(drawn) == position["block"]


def test_rows_before_a_restored_position_are_found_too(prepare, pair_source, text_source, data_config):
    sources = [prepare(pair_source()), prepare(text_source())]
    stream = RowStream(data_config(), sources)
    expected, position = stream.row(3)["input_ids"], stream.position(50)
    restored = RowStream(data_config(), sources)
    restored.restore(position)
    later = restored.row(60)["input_ids"]
    assert np.array_equal(restored.row(3)["input_ids"], expected)
    assert np.array_equal(restored.row(60)["input_ids"], later)
    assert restored.position(50) == position


def test_a_position_of_another_mixture_is_refused(prepare, pair_source, text_source, data_config):
    sources = [prepare(pair_source()), prepare(text_source())]
    position = RowStream(data_config(), sources).position(50)
    for other in (RowStream(data_config(), sources[:1]), RowStream(data_config(block_documents=31), sources)):
        with pytest.raises(ValueError, match="position of row 50 has .* documents before block"):
            other.restore(position)


def test_a_row_composes_its_own_documents_alone(prepare, pair_source, data_config):
    stream = RowStream(data_config(block_documents=400), [prepare(pair_source())])
    composed, document = [], stream.document
    stream.document = lambda draws, number: composed.append(number) or document(draws, number)
    assert len(composed) == 0 and stream.row(20)["document_ids"].max() + 1 == len(composed)


def test_threads_that_ask_at_once_find_the_same_rows(prepare, pair_source, text_source, data_config):
    sources = [prepare(pair_source(source={"weight": 2.3})), prepare(text_source())]
    walked = list(islice(RowStream(data_config(), sources).rows(), 120))
    stream = RowStream(data_config(), sources)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(stream.row, [*range(0, 120, 2), *range(119, 0, -2)]))
    for row, index in zip(found, [*range(0, 120, 2), *range(119, 0, -2)], strict=True):
        assert np.array_equal(row["input_ids"], walked[index]["input_ids"])


def test_long_rows_of_carried_text_and_pictures_are_filled(carried, processor, data_config, tmp_path):
    from training.data import DataConfig, SourceConfig
    from training.data.rows import prepare_sources

    pairs = [TemplateConfig(["text:name", "image:image"])]
    definitions = [TemplateConfig(["text:{word}: {definition}"])]
    config = DataConfig(
        row_length=4096,
        cache_dir=str(tmp_path),
        sources=[
            SourceConfig("emoji", "carried", pairs, config="emoji", limit=64, weight=0.85),
            SourceConfig("definitions", "carried", definitions, config="definitions", limit=640, weight=0.15),
        ],
    )
    assert RowStream(config, prepare_sources(config, processor)).report(blocks=3)["fill_rate"] >= 0.99


@pytest.mark.parametrize("seed", range(3))
def test_long_rows_of_heavy_tailed_lengths_are_filled(seed):
    from training.data.documents import pack
    from training.data.stream import _block_documents

    random = np.random.default_rng(seed)
    # A Pareto tail without a mean to speak of, and pictures of 258 tokens with their captions.
    texts = (60 * (random.pareto(1.2, 20_000) + 1)).astype(int)
    pictures = 258 + random.geometric(0.05, 10_000)
    lengths = random.permutation(np.concatenate([texts, pictures]))
    lengths = lengths[: _block_documents(4096, lengths.mean())]
    rows = pack(lengths, 4096)
    assert sum(piece.stop - piece.start for row in rows for piece in row) == lengths.sum()
    assert lengths.sum() / (4096 * len(rows)) >= 0.99
