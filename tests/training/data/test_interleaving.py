"""A text and its sound by turns at words, against SpiRit-LM's protocol written out naively."""

import itertools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from modeling_mot import MoTConfig, MoTForCausalLM
from modeling_mot.processing_mot import MoTProcessor
from modeling_mot.processing_vocabulary import extend_tokenizer
from tests.modeling_mot.test_speech_tokenizer import tokenizer_with_random_units
from training.config import ConfigError, build, digest_of
from training.data import AugmentationConfig, DataConfig, Preparing, RowStream, SourceConfig, TemplateConfig, collate
from training.data import TokenizedSource as Tokenized
from training.data.config import InterleavingConfig, Segment
from training.data.preparing.batch_tokenizer import change_sound, generator
from training.data.preparing.interleaving import timed
from training.data.reading.records import BadRecord
from training.data.rows import _fingerprint, prepare_held_out
from training.evaluation.losses import evaluate_losses
from training.recipe import EvaluationConfig
from training.tokenizers.text import train_text_tokenizer


TEXT, AUDIO = Segment.parse("text:text"), Segment.parse("audio:audio")
WORDS = ["The", "well-known", "cat,", "(said):", "sat", "on", "Dr.", "Smith's", "24", "mats", "–", "naïve", "isn't"]
SHORT = {"text_words": (2, 4), "speech_words": (1, 3)}
ENDLESS = (10**6, 10**6)


def processor(deduplicate=False):
    speech = tokenizer_with_random_units(4, deduplicate=deduplicate)
    tokenizer = extend_tokenizer(train_text_tokenizer([" ".join(WORDS)], 300), 0, speech.num_units)
    return MoTProcessor(tokenizer, None, speech)


def make_record(random, length: int) -> tuple[dict, np.ndarray]:
    """A text of `length` words with odd white space, its sound, and timings with pauses and very short words."""
    words = ["A", *(WORDS[place] for place in random.integers(len(WORDS), size=length - 1))]
    text = words[0] + "".join(random.choice([" ", "  ", "\n"]) + word for word in words[1:])
    time, timings = 0.3, []
    for word in words:
        end = time + random.choice([0.005, 0.1, 0.43])
        timings.append({"word": word.lower().strip(",.:?()"), "start": round(time, 4), "end": round(end, 4)})
        time = end + random.choice([0.0, 0.0, 0.27])
    samples = int(16_000 * (time + 0.2))
    loud = np.repeat(random.uniform(0, 0.5, samples // 2000 + 1), 2000)[:samples]
    return {"text": text, "words": timings}, (random.standard_normal(samples) * loud).clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards of six records with 1 to 40 words."""
    path, random = tmp_path_factory.mktemp("spoken"), np.random.default_rng(0)
    for shard, lengths in enumerate([(1, 2, 3, 9, 20, 40), (4, 5, 6, 12, 16, 25)]):
        lines = []
        for length in lengths:
            record, wave = make_record(random, length)
            record["audio"] = f"{shard}-{length}.wav"
            soundfile.write(path / record["audio"], wave, 16_000, subtype="FLOAT")
            lines.append(json.dumps(record))
        (path / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return path


def records_of(folder) -> list[dict]:
    """The records with their numbers in the source, and their sounds."""
    found = []
    for shard in range(2):
        for place, line in enumerate((folder / f"{shard}.jsonl").read_text().splitlines()):
            record = json.loads(line)
            wave, _ = soundfile.read(folder / record["audio"], dtype="float32")
            found.append(record | {"number": shard * 2**32 + place, "wave": wave})
    return found


def source_of(folder, templates=None, **settings) -> SourceConfig:
    interleaving = InterleavingConfig(**(SHORT | settings))
    templates = templates or [TemplateConfig(["text:text", "audio:audio"], interleaving=interleaving)]
    return SourceConfig("spoken", f"{folder}/*.jsonl", templates)


def naive(record, draw, settings, tokens_of, units, deduplicate=False, speed=1.0) -> list:
    """SpiRit-LM's interleaving, word by word and unit by unit: ids of texts, and lists of units."""
    # Pieces of the text and of the units, one for each word.
    times = [time for time in record["words"] if time["word"] != "–"]
    pieces, waiting = [], ""
    for piece in re.findall(r"\s*\S+", record["text"]):
        # No word is a dash: it stays with the word behind it.
        waiting += piece
        if piece.strip() != "–":
            pieces.append(waiting)
            waiting = ""
    pieces[-1] += waiting
    changes = [round((a["end"] + b["start"]) / 2 * speed * 25) for a, b in itertools.pairwise(times)]
    owner = [sum(change <= unit for change in changes) for unit in range(len(units))]

    # A word without a unit of its own cannot be told from its neighbour.
    groups, before = [[0]], 0
    for word, change in enumerate(changes, start=1):
        if change == before or change >= len(units):
            groups[-1].append(word)
        else:
            groups.append([word])
            before = change

    # Modality and length are drawn by turns.
    random = np.random.default_rng([settings.seed, record["number"], draw])
    speech, spans = random.integers(2) == 1, []
    while groups:
        fewest, most = settings.speech_words if speech else settings.text_words
        count = random.integers(fewest, most + 1)
        chosen, groups = [word for group in groups[:count] for word in group], groups[count:]
        if speech:
            mine = [unit for unit, word in zip(units, owner, strict=True) if word in chosen]
            spans.append([unit for unit, _ in itertools.groupby(mine)] if deduplicate else mine)
        else:
            spans.append(tokens_of("".join(pieces[word] for word in chosen)))
        speech = not speech
    return spans


def spans_in(ids: list[int], processor) -> list[tuple[bool, list[int]]]:
    """Split the ids of a document: (is speech, ids without markers)."""
    begin, end = (processor.token_id(f"{name}_of_speech") for name in ("begin", "end"))
    spans: list[tuple[bool, list[int]]] = []
    inside = False
    for token in ids:
        if token == begin:
            inside = True
            spans.append((True, []))
        elif token == end:
            inside = False
        elif inside or (spans and not spans[-1][0]):
            spans[-1][1].append(token)
        else:
            spans.append((False, [token]))
    return spans


@pytest.mark.parametrize("deduplicate", [False, True])
def test_documents_are_those_of_the_naive_protocol(folder, tmp_path, deduplicate):
    config, mine = source_of(folder, variants=5), processor(deduplicate)
    source = Tokenized.prepare(config, Preparing(mine, tmp_path))
    *_, segment = config.prepared_segments
    settings, whole = segment.settings, 0
    for place, record in enumerate(records_of(folder)):
        assert source.records[place] == record["number"]
        units = mine.encode_audio([record["wave"]], 16_000, deduplicate=False)[0][1:-1]
        for draw in range(5):
            ids = source.columns[segment].ids(place, draw).tolist()
            expected = naive(record, draw, settings, mine.encode_text, units, deduplicate)
            assert [span for _, span in spans_in(ids, mine)] == expected
            whole += len(expected) == 1
        # The columns of text and sound are those that stand alone.
        assert source.columns[TEXT].ids(place, 0).tolist() == mine.encode_text(record["text"])
        assert source.columns[AUDIO].ids(place, 0).tolist() == mine.encode_audio([record["wave"]], 16_000)[0]
    assert 5 <= whole < 30  # the text of one word has nothing to change to


def test_runs_are_made_one_within_a_span(folder, tmp_path):
    sizes = []
    for deduplicate in (False, True):
        config = source_of(folder, speech_words=ENDLESS, text_words=ENDLESS, variants=2)
        source = Tokenized.prepare(config, Preparing(processor(deduplicate), tmp_path))
        sizes.append(source.columns[AUDIO].lengths.sum())
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_one_span_is_the_plain_document(folder, tmp_path, deduplicate):
    config = source_of(folder, text_words=ENDLESS, speech_words=ENDLESS, variants=8)
    source = Tokenized.prepare(config, Preparing(processor(deduplicate), tmp_path))
    *_, segment = config.prepared_segments
    found = {"text": 0, "speech": 0}
    for place in range(len(source)):
        text, sound = (source.columns[plain].ids(place, 0).tolist() for plain in (TEXT, AUDIO))
        for draw in range(8):
            ids = source.columns[segment].ids(place, draw).tolist()
            assert ids in (text, sound)
            found["text" if ids == text else "speech"] += 1
    # Either modality begins: a fair coin.
    assert 30 < found["text"] < 66 and sum(found.values()) == 96


def test_boundaries_fall_between_words_and_lengths_are_drawn_evenly(folder, tmp_path):
    config, mine = source_of(folder, variants=40), processor()
    source = Tokenized.prepare(config, Preparing(mine, tmp_path))
    *_, segment = config.prepared_segments
    lengths = []
    for place, record in enumerate(records_of(folder)):
        starts = [match.start() for match in re.finditer(r"\s+\S+", record["text"])]
        allowed = {0, *starts, len(record["text"])}
        for draw in range(40):
            spans = spans_in(source.columns[segment].ids(place, draw).tolist(), mine)
            assert all(a[0] != b[0] for a, b in itertools.pairwise(spans)) and all(ids for _, ids in spans)
            position = 0
            for is_speech, ids in spans:
                if is_speech:
                    continue
                text = mine.tokenizer.decode(ids)
                # Some place of the text, between words, and after the text before it.
                places = [start for start in allowed if start >= position and record["text"].startswith(text, start)]
                assert places and any(start + len(text) in allowed for start in places)
                position = min(places) + len(text)
            lengths += [len(mine.tokenizer.decode(ids).split()) for is_speech, ids in spans[:-1] if not is_speech]
    counts = np.bincount(lengths, minlength=8)
    assert counts[:2].sum() == 0  # at least two words; more than four where words have no unit of their own
    assert counts[2] > 0.1 * sum(counts) and counts[4] > 0.1 * sum(counts)


def test_changed_sounds_are_cut_at_their_own_times(folder, tmp_path):
    augmentation = AugmentationConfig(variants=2, speed=0.3)
    config, mine = source_of(folder, variants=3), processor()
    source = Tokenized.prepare(config, Preparing(mine, tmp_path, augmentation=augmentation))
    *_, segment = config.prepared_segments
    for place, record in enumerate(records_of(folder)):
        wave = change_sound(record["wave"], augmentation, generator(augmentation, record["number"], 1, 1))
        units = mine.encode_audio([wave], 16_000)[0][1:-1]
        assert source.columns[AUDIO].ids(place, 1).tolist()[1:-1] == units
        ids = source.columns[segment].ids(place, 1).tolist()
        speed = len(wave) / len(record["wave"])
        expected = naive(record, 1, segment.settings, mine.encode_text, units, speed=speed)
        assert [span for _, span in spans_in(ids, mine)] == expected


def test_any_number_of_processes_makes_the_same_files(folder, tmp_path):
    config, files = source_of(folder), []
    for workers in (1, 2):
        source = Tokenized.prepare(config, Preparing(processor(True), tmp_path / str(workers), workers=workers))
        files.append({path.name: path.read_bytes() for path in source.folder.glob("*.arrow")})
    assert files[0] == files[1] and len(files[0]) == 2


# -------------------------------------------------------------------------------------------------------------- streams


def is_of(ids: np.ndarray, mine) -> str:
    speech = mine.token_id("begin_of_speech") in ids.tolist()
    text = any(not is_speech and span for is_speech, span in spans_in(ids[1:-1].tolist(), mine))
    return "interleaved" if speech and text else "speech" if speech else "text"


def three(**settings) -> list[TemplateConfig]:
    interleaving = InterleavingConfig(**(SHORT | settings))
    return [
        TemplateConfig(["text:text"], weight=1),
        TemplateConfig(["audio:audio"], weight=2),
        TemplateConfig(["text:text", "audio:audio"], weight=3, interleaving=interleaving),
    ]


def test_shares_of_documents_are_the_weights_of_the_templates(folder, tmp_path):
    mine = processor()
    source = Tokenized.prepare(source_of(folder, three()), Preparing(mine, tmp_path))
    stream = RowStream(DataConfig(row_length=2048, seed=1, block_documents=512), [source])
    kinds = {"text": 0, "speech": 0, "interleaved": 0}
    for block in range(4):
        draws = stream.draws(block)
        for number in range(len(draws)):
            document = stream.document(draws, number)
            assert len(document) == draws.length[number]
            learnt = document.labels[1:]
            assert document.labels[0] == -100 and (learnt == document.ids[1:]).all()  # markers are learnt, too
            if draws.template[number] == 2:
                kinds["interleaved"] += 1
            else:
                kinds[is_of(document.ids, mine)] += 1
    shares = np.array(list(kinds.values())) / 2048
    assert np.abs(shares - np.array([1, 2, 3]) / 6).max() < 0.04


def test_shares_of_tokens_are_the_weights_of_sources(folder, tmp_path):
    preparing = Preparing(processor(), tmp_path)
    sources = []
    for name, template in zip(("text", "speech", "both"), three(), strict=True):
        template.weight = 1.0
        config = SourceConfig(name, f"{folder}/*.jsonl", [template])
        sources.append(Tokenized.prepare(config, preparing))
    stream = RowStream(DataConfig(row_length=2048, weights_by="tokens", block_documents=2048), sources)
    shares = [figures["share_of_tokens"] for figures in stream.report(2)["sources"].values()]
    assert np.abs(np.array(shares) - 1 / 3).max() < 0.03


def test_a_record_that_comes_again_is_another_draw_until_all_have_been(folder, tmp_path):
    source = Tokenized.prepare(source_of(folder, variants=4), Preparing(processor(), tmp_path))
    stream = RowStream(DataConfig(row_length=2048, block_documents=12), [source])
    drawn = [stream.draws(block) for block in range(4)]
    for record in range(12):
        assert sorted(int(draws.variant[draws.record == record][0]) for draws in drawn) == [0, 1, 2, 3]


def test_a_stream_goes_on_where_it_was(folder, tmp_path):
    source = Tokenized.prepare(source_of(folder, three()), Preparing(processor(), tmp_path))
    config = DataConfig(row_length=1024, block_documents=32, seed=5)
    first, second = RowStream(config, [source]), RowStream(config, [source])
    second.restore(first.position(70))
    for row in range(70, 80):
        one, other = first.row(row), second.row(row)
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_document_longer_than_a_row_is_refused(folder, tmp_path):
    source = Tokenized.prepare(source_of(folder), Preparing(processor(), tmp_path))
    with pytest.raises(ValueError, match=r"row_length=64 is shorter than the document of record \d of shard 0\.jsonl"):
        RowStream(DataConfig(row_length=64), [source])


# ------------------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("deduplicate", [False, True])
def test_held_out_losses_are_those_of_the_first_draws(folder, tmp_path, deduplicate):
    """Against the naive protocol's documents, one by one without padding, and the model's own logits."""
    config, mine = source_of(folder, three()), processor(deduplicate)
    data = DataConfig(512, sources=[config], validation_sources=[config], cache_dir=str(tmp_path))
    held_out = prepare_held_out(data, mine, 100)
    assert list(held_out) == ["spoken/text", "spoken/speech", "spoken/interleaved"]
    torch.manual_seed(0)
    ranges = mine.modality_token_ranges
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": ranges["speech"][1], "modality_token_ranges": ranges, "modalities": list(ranges)}
    model = MoTForCausalLM(MoTConfig(**sizes)).eval()
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = collate, EvaluationConfig(batch_rows=2), Accelerator(cpu=True)
    figures = evaluate_losses(model, held_out, *arguments)

    losses = {"text": [], "speech": []}
    settings = InterleavingConfig(**SHORT)
    begin, end = (mine.token_id(f"{name}_of_speech") for name in ("begin", "end"))
    for record in records_of(folder):
        units = mine.encode_audio([record["wave"]], 16_000, deduplicate=False)[0][1:-1]
        ids = [mine.bos_token_id]
        for span in naive(record, 0, settings, mine.encode_text, units, deduplicate):
            ids += [begin, *span, end] if span[0] >= ranges["speech"][0] else span
        ids = torch.tensor([[*ids, mine.tokenizer.eos_token_id]])
        with torch.no_grad():
            found = -model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        for loss, token in zip(found.flatten().tolist(), ids[0, 1:].tolist(), strict=True):
            losses["speech" if token >= ranges["speech"][0] else "text"].append(loss)
    for name, of_tokens in losses.items():
        assert figures[f"eval/spoken/interleaved/loss_{name}"] == pytest.approx(np.mean(of_tokens), rel=1e-5)
    assert figures["eval/spoken/interleaved/loss"] == pytest.approx(np.mean(sum(losses.values(), [])), rel=1e-5)
    assert {"eval/spoken/text/loss", "eval/spoken/speech/loss"} <= figures.keys()

    # The next evaluation, also one that draws more of each record, has the same figures.
    more = source_of(folder, three(variants=9))
    again = prepare_held_out(replace(data, validation_sources=[more]), mine, 100)
    assert evaluate_losses(model, again, *arguments) == figures


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_older_recipes_keep_their_fingerprints(folder, tmp_path):
    template = TemplateConfig(["text:text", "audio:audio"], weight=2)
    config = SourceConfig("spoken", f"{folder}/*.jsonl", [template])
    assert config.prepared_segments == config.segments == [TEXT, AUDIO]
    source, data = Tokenized.prepare(config, Preparing(processor(), tmp_path)), DataConfig(sources=[config])
    old = {
        name: asdict(template)[name] for name in ("segments", "weight", "caption_first", "caption_dropout", "targets")
    }
    made_of = {
        "sources": [source.fingerprint],
        "mixture": [["spoken", 1.0, [old]]],
        "rows": [512, 0, "documents", None, 0.0],
    }
    assert _fingerprint(data, [source]) == digest_of(made_of)
    meta = json.loads((source.folder / "meta.json").read_text())
    assert meta["made_from"]["segments"] == digest_of(["text:text", "audio:audio"])


@pytest.mark.parametrize("change", [{"text_words": (2, 5)}, {"speech_words": (2, 3)}, {"variants": 5}, {"seed": 1}])
def test_other_draws_are_prepared_anew(folder, tmp_path, change):
    preparing = Preparing(processor(), tmp_path)
    one, other = (Tokenized.prepare(source_of(folder, **settings), preparing) for settings in ({}, change))
    assert one.fingerprint != other.fingerprint and one.folder != other.folder


def test_two_templates_may_draw_differently(folder, tmp_path):
    templates = [*three(), *three(seed=1)[2:]]
    source = Tokenized.prepare(source_of(folder, templates), Preparing(processor(), tmp_path))
    assert len(source.columns) == 4
    one, other = list(source.columns.values())[2:]
    assert any(one.ids(place, 0).tolist() != other.ids(place, 0).tolist() for place in range(12))


# --------------------------------------------------------------------------------------------------------------- errors

GOOD = [("the", 0.0, 0.4), ("cat", 0.4, 0.9), ("sat", 1.0, 2.0)]


def as_words(*timings) -> list[dict]:
    return [dict(zip(("word", "start", "end"), timing, strict=True)) for timing in timings]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (None, "it has no timings of words: None"),
        ([], r"it has no timings of words: \[\]"),
        ("the cat", "it has no timings of words"),
        (["the"], "a timing must have a word, and its start and end in seconds: timing 0 is 'the'"),
        (as_words(("the", 0, None)), "timing 0 is"),
        (as_words(("the", 0, float("nan"))), "timing 0 is"),
        (as_words(("the", 0, 10**400)), "timing 0 is"),
        (as_words(("the", 0, True)), "timing 0 is"),
        (as_words((3, 0, 1)), "timing 0 is"),
        (as_words(("the", -0.1, 0.4)), "outside of the sound: word 0, 'the', lasts from -0.1 to 0.4 of 2.000"),
        (as_words(*GOOD[:2], ("sat", 1.0, 2.1)), "outside of the sound: word 2, 'sat', lasts from 1.0 to 2.1 of 2.000"),
        (as_words(GOOD[0], ("cat", 0.3, 0.9), GOOD[2]), "one after another: word 1, 'cat', lasts from 0.3 to 0.9, and"),
        (as_words(GOOD[0], ("cat", 0.9, 0.5), GOOD[2]), "one after another: word 1"),
        (as_words(GOOD[1], GOOD[0]), "not one after another"),
        (as_words(("cat", 0.0, 0.4), ("the", 0.4, 0.9), GOOD[2]), "word 0 is 'cat', where the text goes on with 'The"),
        (as_words(GOOD[0], ("dog", 0.4, 0.9), GOOD[2]), "word 1 is 'dog', where the text goes on with ' cat sat.'"),
        (as_words(*GOOD[:2]), "none is left for 'sat.'"),
        (as_words(*GOOD, ("down", 2.0, 2.0)), r"word 3 is 'down', where the text goes on with '\.'"),
    ],
)  # fmt: skip
def test_timings_that_cannot_be_are_refused(words, message):
    with pytest.raises(BadRecord, match=f"column 'spoken': .*{message}"):
        timed("The cat sat.", words, 2.0, "spoken")


def test_the_text_is_cut_before_white_space_and_the_sound_within_pauses():
    words = as_words(("<>", 0.0, 0.1), ("THE", 0.1, 0.4), ("well", 0.4, 0.6), ("known", 0.6, 0.9), ("cafe", 1.1, 2.04))
    text = '"The  well-known\n(café)!"'
    cuts = timed(text, words, 2.0, "words").cuts
    assert [(text[: cut.character], cut.seconds) for cut in cuts] == [
        ('"The', 0.4),
        ('"The  well-', 0.6),
        ('"The  well-known', 1.0),
    ]


def test_a_bad_record_is_named_or_left_out(folder, tmp_path):
    lines = (folder / "0.jsonl").read_text().splitlines()
    bad = json.loads(lines[2])
    bad["words"][1]["start"] = -1
    copy = tmp_path / "bad"
    copy.mkdir()
    for file in folder.glob("*.wav"):
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "0.jsonl").write_text("\n".join([*lines[:2], json.dumps(bad), *lines[3:]]))
    config = source_of(copy)
    expected = (
        r"'spoken', shard 0.jsonl, record 2: column 'words': a word is outside .*; mend or remove it, or set on_err"
    )
    with pytest.raises(ValueError, match=expected):
        Tokenized.prepare(config, Preparing(processor(), tmp_path / "cache"))
    config.on_error = "skip"
    source = Tokenized.prepare(config, Preparing(processor(), tmp_path / "cache"))
    assert len(source) == 5 and source.skipped == {"column 'words': a word is outside of the sound": 1}


def test_a_column_that_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no column of .* at timings .* 'timings'"):
        Tokenized.prepare(source_of(folder, words="timings"), Preparing(processor(), tmp_path))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"segments": ["text:text"]}, "a text and its sound are interleaved, nothing else"),
        ({"segments": ["text:a", "audio:b", "image:c"], "caption_first": None}, "a text and its sound are interleaved"),
        ({"segments": ["text:a", "audio:b"], "targets": "last"}, "targets='last' .* no meaning with interleaving"),
        ({"segments": ["text:a", "audio:b"], "caption_dropout": 0.5}, "caption_dropout=0.5 .* with interleaving"),
    ],
)
def test_templates_that_cannot_be_interleaved_are_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        build(TemplateConfig, template | {"interleaving": {}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_words": [30, 10]}, r"text_words=\[30, 10\] has its bounds the wrong way round"),
        ({"text_words": [0, 10]}, "text_words.0=0 must be at least 1"),
        ({"speech_words": [5]}, "speech_words must hold 2 values"),
        ({"variants": 0}, "variants=0 must be at least 1"),
        ({"word": "words"}, "did you mean interleaving.words"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(TemplateConfig, {"segments": ["text:a", "audio:b"], "interleaving": settings})


def test_the_example_of_the_page_is_a_data_section():
    page = Path(__file__).parents[3].joinpath("training/README.md").read_text(encoding="utf-8")
    written = re.search(r"```yaml\n(data:.*?)```", page, re.DOTALL)[1]
    data = build(DataConfig, yaml.safe_load(written)["data"])
    data.validate()
    assert [len(source.prepared_segments) for source in data.sources] == [1, 1, 3]


def test_the_defaults_are_those_of_the_paper():
    template = build(TemplateConfig, {"segments": ["audio:b", "text:a"], "interleaving": {}})
    assert template.interleaving.text_words == (10, 30) and template.interleaving.speech_words == (5, 15)
    assert template.interleaved.text == Segment.parse("text:a")
