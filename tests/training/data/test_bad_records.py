"""`on_error`: what cannot become a document is left out and counted, or refused by name, in whatever file it stands."""

import gzip
import math
import os
import tracemalloc
from datetime import date
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from pyarrow import parquet

from training.data import Preparing, SourceConfig, TemplateConfig, TokenizedSource
from training.data.config import Limits, Segment
from training.data.reading.records import BadRecord, LeftOut, text_of
from training.data.reading.sources import open_source

from .conftest import ToyProcessor, png, wav
from .test_shards import lines, tar


TEXT = ["text:text"]
PAIR = ["text:text", "image:image"]
DOCUMENT = ["document:segments"]


def source_of(path, segments, on_error="skip", **fields):
    return SourceConfig("x", str(path), [TemplateConfig(segments)], on_error=on_error, **fields)


def texts_of(source, segment="text:text"):
    return [bytes(token - ToyProcessor.BYTES for token in source[i][segment][0]).decode() for i in range(len(source))]


BAD_LINES = {
    "not JSON": b"{]\n",
    "a list": b'["text"]\n',
    "a number": b"3\n",
    "not UTF-8": b'{"text": "caf\xe9"}\n',
    "a surrogate in bytes": b'{"text": "\xed\xa0\x80"}\n',
    "a lone surrogate": b'{"text": "a\\ud800b"}\n',
    "a lone surrogate in a list": b'{"text": ["a", "\\udfff"]}\n',
    "a null byte": b'\0{"text": "a"}\n',
    "a key twice": b'{"text": "a", "text": "b"}\n',
    "nested too deep": b'{"text": "a", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "nested deep": b'{"text": "a", "more": ' + b'{"a": ' * 300 + b"1" + b"}" * 300 + b"}\n",
    "an endless integer": b'{"text": ' + b"9" * 5000 + b"}\n",
    "NaN": b'{"text": NaN}\n',
    "infinity": b'{"text": 1e999}\n',
    "null": b'{"text": null}\n',
    "a list of nothing": b'{"text": [null, NaN, ""]}\n',
    "a mapping": b'{"text": {"bytes": "a"}}\n',
    "lists in a list": b'{"text": [["a"]]}\n',
    "blank": b'{"text": " "}\n',
    "no such column": b'{"txt": "a"}\n',
    "too long": b'{"text": "' + b"a" * 200_000 + b'"}\n',
}
GOOD = [b'{"text": "first"}\r\n', b"\n", b'  {"text": "last", "more": NaN}  \n']


@pytest.mark.parametrize("name", ["0.jsonl", "0.jsonl.gz"])
def test_every_bad_line_is_left_out_and_counted(tmp_path, prepare, name):
    data = b"\xef\xbb\xbf" + GOOD[0] + b"".join(BAD_LINES.values()) + GOOD[1] + GOOD[2].rstrip(b"\n")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = prepare(source_of(tmp_path / name, TEXT), limits=Limits(max_record_bytes=150_000))
    assert texts_of(source) == ["first", "last"]
    assert sum(source.skipped.values()) == len(BAD_LINES)
    assert source.skipped.keys() == source.first_skipped.keys()


@pytest.mark.parametrize("name", ["0.jsonl", "0.jsonl.gz"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_every_bad_line_is_refused_by_its_place(tmp_path, kind, name):
    data = GOOD[0] + GOOD[1] + BAD_LINES[kind] + GOOD[2]
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    place = "shard 0.jsonl.gz, record 1" if name.endswith("gz") else "0.jsonl, document 2"
    with pytest.raises(ValueError, match=f"source 'x', .*{place}.*on_error: skip") as raised:
        config = source_of(tmp_path / name, TEXT, "raise")
        list(
            open_source(config, Limits(max_record_bytes=150_000)).each(
                lambda record: text_of(Segment.parse(TEXT[0]), record)
            )
        )
    assert type(raised.value) is ValueError


def test_a_line_of_any_length_is_passed_in_little_memory(tmp_path):
    line = gzip.compress(b'{"text": "') + gzip.compress(b"a" * 2**24) * 4 + gzip.compress(b'"}\n{"text": "last"}\n')
    (tmp_path / "0.jsonl.gz").write_bytes(line)
    tracemalloc.start()
    source = open_source(source_of(tmp_path / "0.jsonl.gz", TEXT), Limits(max_record_bytes=2**20))
    assert [record["text"] for record in source] == ["last"]
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


GOOD_DOCUMENT = [{"type": "text", "text": "a"}, {"type": "image", "image": "good.png"}]
BAD_DOCUMENTS = {
    "no list": "abc",
    "null": None,
    "empty": [],
    "texts": ["a"],
    "no type": [{"text": "a"}],
    "another type": [{"type": "video", "video": "x"}],
    "a list for a type": [{"type": ["text"], "text": "a"}],
    "a number for a text": [{"type": "text", "text": 3}],
    "a lone surrogate": [{"type": "text", "text": "\ud800"}],
    "nothing for a picture": [{"type": "image"}],
    "no such file": [{"type": "image", "image": "no.png"}],
    "a null byte in a name": [{"type": "image", "image": "a\0b"}],
    "a name that is too long": [{"type": "image", "image": "a" * 300}],
    "a path that is too long": [{"type": "image", "image": "a/" * 3000}],
    "a surrogate in a name": [{"type": "image", "image": "\ud800.png"}],
    "a folder for a picture": [{"type": "image", "image": "."}],
    "a name for bytes": [{"type": "image", "image": {"bytes": "good.png"}}],
    "a list for bytes": [{"type": "image", "image": {"bytes": [1, 2]}}],
    "a broken picture": [{"type": "image", "image": "bad.png"}],
    "a broken sound": [{"type": "audio", "audio": "bad.png"}],
}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good.png").write_bytes(png("red"))
    (folder / "bad.png").write_bytes(b"no picture")
    (tmp_path / "secret.png").write_bytes(png("blue"))
    return folder


@pytest.mark.parametrize("name", ["0.jsonl", "0.jsonl.gz"])
def test_every_bad_document_is_left_out_and_counted(pictures, prepare, name):
    documents = [GOOD_DOCUMENT, *BAD_DOCUMENTS.values(), GOOD_DOCUMENT]
    data = lines(*({"segments": segments} for segments in documents))
    (pictures / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = prepare(source_of(pictures / name, DOCUMENT))
    assert len(source) == 2 and sum(source.skipped.values()) == len(BAD_DOCUMENTS)


@pytest.mark.parametrize("value", [{"bytes": ""}, {"bytes": 0}, {"bytes": []}, {"bytes": None}, {}])
@pytest.mark.parametrize("name", ["0.jsonl", "0.jsonl.gz"])
def test_bytes_that_are_none_open_no_file_from_outside(pictures, prepare, name, value):
    data = lines({"text": "a", "image": "good.png"}, {"text": "b", "image": value | {"path": "../secret.png"}})
    (pictures / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = prepare(source_of(pictures / name, PAIR))
    kind = type(value.get("bytes")).__name__
    said = (
        "file leads outside the folder of its source"
        if kind == "NoneType"
        else f"is a record with a {kind} under 'bytes'"
    )
    assert source.skipped == {f"column 'image': the picture {said}": 1}


def text_that_is_not_utf_8():
    offsets = np.arange(4, dtype=np.int32).tobytes()
    return pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(b"a\xffb")])


BAD_COLUMNS = {
    "not UTF-8": (text_that_is_not_utf_8(), ["a", "b"]),
    "NaN": (pa.array([1.5, math.nan, 2.0]), ["1.5", "2.0"]),
    "infinite": (pa.array([1.5, math.inf, None]), ["1.5"]),
    "out of time": (pa.array([0, 2**62], pa.timestamp("us")), ["1970-01-01 00:00:00"]),
    "bytes": (pa.array([b"a", b"b"]), []),
    "lists of bytes": (pa.array([[b"a"], [b"b"]]), []),
    "mappings": (pa.array([{"bytes": b"a"}, {"bytes": b"b"}]), []),
}


@pytest.mark.parametrize("way", ["shards", "set", "stream"])
@pytest.mark.parametrize("kind", BAD_COLUMNS)
def test_every_bad_value_of_a_table_is_left_out_and_counted(tmp_path, prepare, kind, way):
    column, good = BAD_COLUMNS[kind]
    parquet.write_table(pa.table({"text": column}), tmp_path / "train.parquet")
    path = f"{tmp_path}/*.parquet" if way == "shards" else tmp_path
    config = source_of(path, TEXT, streaming=way == "stream")
    if good:
        source = prepare(config)
        assert texts_of(source) == good and sum(source.skipped.values()) == len(column) - len(good)
        config.on_error = "raise"
    with pytest.raises(ValueError, match="source 'x'.*(record [012]|left out)"):
        prepare(config)


def test_a_table_with_a_column_twice_is_refused(tmp_path, prepare):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="shard 0.parquet breaks off: two columns are named 'text'"):
        prepare(source_of(f"{tmp_path}/*.parquet", TEXT, "raise"))


@pytest.mark.parametrize(
    "members",
    [
        [("0.txt", b"caf\xe9"), ("0.png", png("red"))],
        [("0.txt", b"a")],
        [("0.txt", b"a"), ("0.txt", b"b"), ("0.png", png("red"))],
        [("0.txt", b"a"), ("0.png", b"no picture")],
        [("0.json", b"[" * 100_000), ("0.txt", b"a"), ("0.png", png("red"))],
        [("0.json", b'{"txt": "a", "txt": "b"}'), ("0.png", png("red"))],
        [("0.json", b'{"txt": "a", "png": {"bytes": "/etc/hostname"}}')],
    ],
)
def test_every_bad_record_of_a_tar_is_left_out_and_counted(tmp_path, prepare, members):
    path = tar(tmp_path / "0.tar", [*members, ("1.txt", b"\xef\xbb\xbfgood"), ("1.png", png("red"))])
    source = prepare(source_of(path, ["text:txt", "image:png"]))
    assert texts_of(source, "text:txt") == ["good"] and sum(source.skipped.values()) == 1


class Choosy(ToyProcessor):
    """Encodes no picture that is blue, in whatever batch it comes."""

    def encode_images(self, pictures):
        if any(picture.getpixel((0, 0))[:3] == (0, 0, 255) for picture in pictures):
            raise ValueError("blue is none of the codes")
        return super().encode_images(pictures)


def test_what_decodes_but_does_not_encode_is_named_or_left_out_alone(tmp_path, processor):
    colours = ["red", "blue", "green", "blue", "white"]
    path = tar(tmp_path / "0.tar", [(f"{i}.png", png(colour)) for i, colour in enumerate(colours)])
    config = source_of(path, ["image:png"])
    source = TokenizedSource.prepare(config, Preparing(Choosy(), tmp_path / "cache"))
    assert source.records.tolist() == [0, 2, 4]
    assert source.skipped == {"column 'png': it does not encode": 2}
    assert source.first_skipped == {"column 'png': it does not encode": "shard 0.tar, record 1"}
    alone = [processor.encode_images([Image.new("RGB", (8, 8), colours[i])]) for i in (0, 2, 4)]
    assert [source[i]["image:png"] for i in range(3)] == alone
    config.on_error = "raise"
    with pytest.raises(ValueError, match="shard 0.tar, record 1: column 'png': it does not encode: blue is none"):
        TokenizedSource.prepare(config, Preparing(Choosy(), tmp_path / "other"))


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, AssertionError, RuntimeError])
def test_a_fault_of_the_program_is_never_left_out(text_source, tmp_path, error):
    class Faulty(ToyProcessor):
        def encode_segment(self, segment):
            raise error("a fault")

    with pytest.raises(error, match="a fault"):
        TokenizedSource.prepare(text_source(on_error="skip"), Preparing(Faulty(), tmp_path / "cache"))


def test_the_reasons_that_are_counted_apart_are_bounded():
    left_out, config = LeftOut(), source_of("0.jsonl", TEXT)
    for number in range(80):
        left_out.add(config, f"record {number}", BadRecord(f"reason {number}"))
    assert len(left_out.counts) == 51 and sum(left_out.counts.values()) == 80
    assert left_out.first["other reasons"] == "record 50"


def test_names_that_no_terminal_takes_are_written_out(tmp_path, prepare):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in (
        (b"/\xff.png", b"broken"),
        (b"/\xff.txt", b"a"),
        (b"/good.png", png("red")),
        (b"/good.txt", b"b"),
    ):
        with open(os.fsencode(folder) + name, "wb") as file:
            file.write(data)
    source = prepare(source_of(folder, PAIR))
    assert list(source.first_skipped.values()) == ["\\udcff.png"]


@pytest.mark.parametrize("step", [1, 2])
def test_each_uses_every_record_and_passes_over_those_that_cannot_be(tmp_path, step):
    (tmp_path / "0.jsonl").write_bytes(lines(*({"text": word} for word in ("1", "x", "3", "4"))))
    source = open_source(source_of(tmp_path / "0.jsonl", TEXT))
    assert list(source.each(lambda record: int(record["text"]), step)) == ([1, 3, 4] if step == 1 else [1, 3])
    source.config.on_error = "raise"
    with pytest.raises(ValueError, match=r"source 'x', record 1: invalid literal .* \(0.jsonl, document 2\)"):
        list(source.each(lambda record: int(record["text"])))


# --------------------------------------------------------------------------------------------------- text that is none


@pytest.mark.parametrize(
    "written", ["{title} by {author}", "{title}: {author}", "{title} ({author})", "{author}, {title}"]
)
@pytest.mark.parametrize("author", [None, "", " ", math.nan, [], [None]])
def test_a_format_without_a_value_is_no_text(written, author):
    segment = Segment.parse("text:" + written)
    with pytest.raises(BadRecord, match="without a value: column 'author'"):
        text_of(segment, {"title": "x", "author": author})
    assert text_of(segment, {"title": "x", "author": "y"}) == written.format(title="x", author="y")


@pytest.mark.parametrize(
    ("written", "values", "expected"),
    [
        ("{word}: {about} ({more}). {note}", {"word": "a", "about": "b", "more": "c"}, "a: b (c)."),
        ("{first} {last}", {"last": "Bach"}, "Bach"),
        ("{first} {last}", {"first": "Johann"}, "Johann"),
        ('He said "{words}." {more}', {"words": "no"}, 'He said "no."'),
        ("{n:>3}{{}} {n!r}", {"n": 7}, "7{} '7'"),
    ],
)
def test_a_sentence_or_a_word_of_its_own_may_be_missing(written, values, expected):
    assert text_of(Segment.parse("text:" + written), values) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "True"), (7, "7"), (1.5, "1.5"), (Decimal("2.50"), "2.50"), (date(2024, 2, 1), "2024-02-01"),
        (["hound", None, "cur"], "hound, cur"), ([1, 2], "1, 2"), (np.float32(1.5), "1.5"),
    ],
)  # fmt: skip
def test_plain_values_are_texts(value, expected):
    assert text_of(Segment.parse("text:a"), {"a": value}) == expected


@pytest.mark.parametrize(
    "value", [b"a", bytearray(b"a"), {"a": 1}, {"bytes": b"a"}, [b"a"], [["a"]], np.zeros(2), np.bytes_(b"a"), object()]
)
def test_other_values_are_refused_as_texts(value):
    with pytest.raises(BadRecord, match="the column of a text holds"):
        text_of(Segment.parse("text:a"), {"a": value})


@pytest.mark.parametrize("written", ["text:{", "text:{a", "text:{}", "text:{a:{b}}", "text:{a:d}", "text:{a!x}"])
def test_a_format_that_is_none_is_refused_at_once(written):
    with pytest.raises(ValueError, match="segments has"):
        TemplateConfig([written])


@pytest.mark.parametrize("way", ["shards", "set", "stream"])
def test_labels_are_their_names(tmp_path, prepare, way):
    features = Features(label=ClassLabel(names=["cat", "dog"]), all=List(ClassLabel(names=["x", "y"])))
    rows = {"label": [1, 0, -1, None], "all": [[0], [1, 0], [0], [1]]}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    path = f"{tmp_path}/*.parquet" if way == "shards" else tmp_path
    source = prepare(source_of(path, ["text:{label} {all}"], streaming=way == "stream"))
    assert texts_of(source, "text:{label} {all}") == ["dog x", "cat y, x", "x", "y"]
    assert len(prepare(source_of(path, ["text:label"], streaming=way == "stream"))) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_and_sounds_in_lists_stay_encoded(tmp_path, prepare, streaming):
    """`datasets` would decode them, sounds with a package that is not needed here."""
    part = {
        "type": Value("string"),
        "text": Value("string"),
        "image": datasets.Image(),
        "audio": datasets.Audio(decode=False),
    }
    empty = dict.fromkeys(part)
    sound = {"bytes": wav(0.5), "path": None}
    parts = [{"type": "image", "image": {"bytes": png("red"), "path": None}}, {"type": "audio", "audio": sound}]
    table = Dataset.from_dict({"segments": [[empty | p for p in parts]]}, features=Features(segments=List(part)))
    table.to_parquet(str(tmp_path / "train.parquet"))
    source = prepare(source_of(tmp_path, DOCUMENT, streaming=streaming))
    assert source[0]["document:segments"][0] == [3, *[263 + 76 // 16] * 4, 4, 5, 287, 287, 6]


def test_the_first_few_records_of_a_reason_are_named_at_once(tmp_path, prepare):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png("red") if number == 3 else b"broken")
        (folder / f"{number}.txt").write_text("a")
    source = prepare(source_of(folder, PAIR))
    names = "0.png; 1.png; 2.png; 4.png; 5.png"
    assert source.left_out.lines() == [f"7 x column 'image': the picture does not decode (first: {names})"]
    with pytest.raises(ValueError, match=rf"with on_error: skip, and left out 7 x .* \(first: {names}\); set on_error"):
        prepare(source_of(folder, PAIR, "raise"))
