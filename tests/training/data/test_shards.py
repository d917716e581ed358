"""Shards of JSONL, parquet and webdataset: the same documents as the same records in one data set; broken shards."""

import gzip
import io
import json
import tarfile

import fsspec
import pytest
from datasets import Dataset, Features, Image, Value

from training.data import SourceConfig, TemplateConfig
from training.data.reading.sources import open_source

from .conftest import png, wav


PAIRS = [TemplateConfig(["text:txt", "image:png"])]
TEXTS = [TemplateConfig(["text:text"])]
RECORDS = [(f"thing {'ab'[i % 2] * (i + 1)}", png((9 * i, 40, 255 - 9 * i))) for i in range(20)]


def tar(path, members):
    """A tar of (name, bytes) pairs."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_shards(kind, folder, records=RECORDS):
    """The records in shards of seven."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(records), 7)):
        some = records[start : start + 7]
        if kind == "webdataset":
            tar(
                folder / f"{number}.tar",
                [
                    (f"{start + i}.{e}", v)
                    for i, (t, p) in enumerate(some)
                    for e, v in (("txt", t.encode()), ("png", p))
                ],
            )
        elif kind == "parquet":
            features = Features(txt=Value("string"), png=Image())
            rows = {"txt": [t for t, _ in some], "png": [{"bytes": p, "path": None} for _, p in some]}
            Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{number}.parquet"))
        else:
            for i, (_, picture) in enumerate(some):
                (folder / f"{start + i}.png").write_bytes(picture)
            written = lines(*({"txt": t, "png": f"{start + i}.png"} for i, (t, _) in enumerate(some)))
            (folder / f"{number}.{kind}").write_bytes(gzip.compress(written) if kind.endswith("gz") else written)
    return folder


def ids_of(source):
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "jsonl", "jsonl.gz"])
def test_shards_give_the_tokens_of_their_records_in_order(tmp_path, prepare, processor, kind):
    folder = write_shards(kind, tmp_path / "shards")
    suffix = "tar" if kind == "webdataset" else kind
    source = prepare(SourceConfig("s", f"{folder}/*.{suffix}", PAIRS))
    assert len(source) == 20
    for record, (text, picture) in zip(ids_of(source), RECORDS, strict=True):
        assert record["text:txt"] == [processor.encode_segment({"type": "text", "text": text})]
        from training.data.reading.records import decode_picture

        assert record["image:png"] == processor.encode_images([decode_picture(picture)])


def test_a_folder_of_tars_is_a_webdataset(tmp_path, prepare):
    assert len(prepare(SourceConfig("s", str(write_shards("webdataset", tmp_path / "s")), PAIRS))) == 20


def test_limit_and_match_go_over_the_shards(tmp_path, prepare, processor):
    pattern = f"{write_shards('webdataset', tmp_path / 's')}/*.tar"
    source = prepare(SourceConfig("s", pattern, PAIRS, match={"txt": "b"}, limit=8))
    texts = [text for text, _ in RECORDS if "b" in text][:8]
    assert [r["text:txt"][0] for r in ids_of(source)] == [
        processor.encode_segment({"type": "text", "text": text}) for text in texts
    ]


@pytest.mark.parametrize("sound", [("audio", "audio"), ("speech", "speech"), ("speech", "audio"), ("audio", "speech")])
def test_interleaved_documents_of_a_webdataset_name_its_members(tmp_path, prepare, processor, sound):
    segments = [
        {"type": "text", "text": "see"},
        {"type": "image", "image": "1.png"},
        {"type": sound[0], sound[1]: "wav"},
    ]
    members = [("a.json", lines({"segments": segments})), ("a.1.png", png((80, 80, 80))), ("a.wav", wav(0.5))]
    source = prepare(SourceConfig("s", str(tar(tmp_path / "a.tar", members)), [TemplateConfig(["document:segments"])]))
    (ids,) = source[0]["document:segments"]
    assert ids == [*processor.encode_segment({"type": "text", "text": "see"}), 3, *[263 + 5] * 4, 4, 5, 287, 287, 6]


def test_interleaved_documents_in_many_files_find_their_pictures(tmp_path, prepare):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "cat.png").write_bytes(png("red"))
    document = {"segments": [{"type": "text", "text": "a cat"}, {"type": "image", "image": "cat.png"}]}
    for name in "ab":
        (folder / f"{name}.jsonl").write_bytes(lines(document, document))
    source = prepare(SourceConfig("s", f"{folder}/*.jsonl", [TemplateConfig(["document:segments"])]))
    assert len(source) == 4 and len({str(record) for record in ids_of(source)}) == 1


def test_a_column_that_is_not_there_is_refused_with_the_nearest(tmp_path):
    for kind, suffix in (("webdataset", "tar"), ("parquet", "parquet")):
        folder = write_shards(kind, tmp_path / kind)
        config = SourceConfig("s", f"{folder}/*.{suffix}", [TemplateConfig(["text:text"])])
        with pytest.raises(ValueError, match="no column of text:text 'text'; did you mean 'txt'"):
            open_source(config)


def test_a_glob_without_a_shard_and_one_of_unknown_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no webdataset shards"):
        open_source(SourceConfig("s", f"{tmp_path}/*.tar", PAIRS))
    with pytest.raises(ValueError, match="does not end as shards do"):
        open_source(SourceConfig("s", f"{tmp_path}/*.bin", PAIRS))


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "jsonl.gz", "jsonl"])
def test_a_truncated_shard_is_named_or_the_rest_of_it_left_out(tmp_path, prepare, kind):
    records = [(text * 40, picture) for text, picture in RECORDS]
    folder = write_shards(kind, tmp_path / "shards", records)
    suffix = "tar" if kind == "webdataset" else kind
    cut(folder / f"1.{suffix}", 0.7)
    with pytest.raises(ValueError, match=rf"source 's', shard 1.{suffix}, record \d.* breaks off.*fetch it again"):
        prepare(SourceConfig("s", f"{folder}/*.{suffix}", PAIRS))
    source = prepare(SourceConfig("s", f"{folder}/*.{suffix}", PAIRS, on_error="skip"))
    whole = [number for number in source.records.tolist() if number >> 32 != 1]
    assert whole == [*range(7), *(2 * 2**32 + i for i in range(6))]
    assert len(source) - len(whole) < 7
    ((reason, count),) = source.skipped.items()
    assert reason.startswith(f"shard 1.{suffix} breaks off") and count == 1


def test_a_truncated_file_of_a_data_set_is_an_error_of_its_source(tmp_path):
    folder = write_shards("parquet", tmp_path / "set")
    cut(folder / "1.parquet", 0.7)
    with pytest.raises(ValueError, match=r"source 's': .*set (cannot be read|is neither).*[Pp]arquet"):
        open_source(SourceConfig("s", str(folder), PAIRS))


def test_flipped_bytes_are_named(tmp_path, prepare):
    folder = write_shards("jsonl.gz", tmp_path / "shards")
    data = bytearray((folder / "1.jsonl.gz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "1.jsonl.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"source 's', shard 1.jsonl.gz"):
        prepare(SourceConfig("s", f"{folder}/*.jsonl.gz", PAIRS))


def test_a_line_that_is_not_json_is_named_or_left_out(tmp_path, prepare):
    (tmp_path / "0.jsonl").write_bytes(lines({"text": "a"}) + b"{]\n[1]\n" + lines({"text": "b"}))
    (tmp_path / "1.jsonl").write_bytes(lines({"text": "c"}))
    with pytest.raises(ValueError, match="shard 0.jsonl, record 1: the line is not JSON: line 2"):
        prepare(SourceConfig("s", f"{tmp_path}/*.jsonl", TEXTS))
    source = prepare(SourceConfig("s", f"{tmp_path}/*.jsonl", TEXTS, on_error="skip"))
    assert len(source) == 3
    assert source.skipped == {"the line is not JSON": 1, "the line is no JSON object": 1}


def test_a_shard_that_shrinks_while_it_is_prepared_is_named(tmp_path):
    folder = write_shards("jsonl", tmp_path / "shards")
    source = open_source(SourceConfig("s", f"{folder}/*.jsonl", PAIRS))
    cut(folder / "2.jsonl", 0.5)
    with pytest.raises(ValueError, match=r"shard 2.jsonl breaks off: it has \d+ bytes, and had"):
        list(source)


def test_zstd_is_read_or_the_package_for_it_is_named(tmp_path, prepare):
    (tmp_path / "0.jsonl.zst").write_bytes(b"")
    config = SourceConfig("s", f"{tmp_path}/*.jsonl.zst", TEXTS)
    try:
        import zstandard
    except ImportError:
        with pytest.raises(ValueError, match="pip install zstandard"):
            open_source(config)
        return
    whole = zstandard.compress(lines(*({"text": f"{i} {i**9}"} for i in range(50_000))))
    (tmp_path / "0.jsonl.zst").write_bytes(whole)
    assert sum(1 for _ in open_source(config)) == 50_000
    (tmp_path / "0.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"shard 0.jsonl.zst breaks off: line \d+ is cut short"):
        list(open_source(config))


def test_a_streamed_data_set_is_read_in_its_shards(tmp_path, prepare):
    folder = tmp_path / "set"
    folder.mkdir()
    for shard in range(3):
        texts = {"text": [f"{shard} {i}" for i in range(5)]}
        Dataset.from_dict(texts).to_parquet(str(folder / f"train-{shard:05d}-of-00003.parquet"))
    plain, streamed = (
        prepare(SourceConfig("s", str(folder), TEXTS, streaming=streaming)) for streaming in (False, True)
    )
    assert ids_of(plain) == ids_of(streamed)
    assert streamed.records.tolist() == [(shard << 32) + i for shard in range(3) for i in range(5)]


@pytest.fixture
def remote(tmp_path):
    """The shards of a storage that is not a disk."""
    storage = fsspec.filesystem("memory")
    for path in write_shards("webdataset", tmp_path / "shards").iterdir():
        storage.pipe(f"/remote/{path.name}", path.read_bytes())
    yield "memory://remote/*.tar"
    storage.rm("/remote", recursive=True)


def test_shards_of_a_remote_storage_are_read_in_place(tmp_path, prepare, remote):
    config = SourceConfig("s", f"{tmp_path}/shards/*.tar", PAIRS)
    assert ids_of(prepare(config)) == ids_of(prepare(SourceConfig("r", remote, PAIRS)))


def test_a_storage_that_does_not_answer_is_no_broken_shard(prepare, remote, monkeypatch):
    """It is never skipped: the shard is whole, and comes when the storage does."""

    def unreachable(self, *_, **__):
        raise TimeoutError("no answer")

    source = SourceConfig("r", remote, PAIRS, on_error="skip")
    open_source(source)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem._open", unreachable)
    with pytest.raises(ConnectionError, match="shard memory://.*0.tar cannot be reached: no answer"):
        prepare(source)
