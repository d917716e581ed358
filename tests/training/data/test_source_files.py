"""What a source is made of: the fingerprint covers its files and the files its records name, and nothing else."""

import json
import logging
import os
import time

import pytest
from datasets import Dataset, DatasetDict

from training.data import SourceConfig, TemplateConfig
from training.data.reading.sources import open_source

from .conftest import png, wav


PAIR = ["text:text", "image:image"]


def source_of(path, segments, **fields):
    return SourceConfig("x", str(path), [TemplateConfig(segments)], **fields)


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures that records name, and one picture and a folder of a run that they do not."""
    folder = tmp_path / "data"
    (folder / "runs").mkdir(parents=True)
    for name in ("a", "b", "unnamed", "runs/sample"):
        (folder / f"{name}.png").write_bytes(png("red"))
    (folder / "runs" / "metrics.jsonl").write_text("{}\n")
    return folder


def records():
    return [{"text": name, "image": f"{name}.png"} for name in "ab"]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def document(row):
    return {"document": [{"type": "text", "text": row["text"]}, {"type": "image", "image": row["image"]}]}


def write_jsonl(folder):
    (folder / "0.jsonl").write_text(jsonl(records()))
    return source_of(folder / "0.jsonl", PAIR)


def write_documents(folder):
    (folder / "0.jsonl").write_text(jsonl(map(document, records())))
    return source_of(folder / "0.jsonl", ["document:document"])


def write_glob(folder):
    write_jsonl(folder)
    return source_of(folder / "*.jsonl", PAIR)


def write_parquet(folder):
    Dataset.from_list(records()).to_parquet(str(folder / "0.parquet"))
    return source_of(folder / "0.parquet", PAIR)


def write_parquet_with_a_dot(folder):
    Dataset.from_list([{"text": row["text"], "my.image": row["image"]} for row in records()]).to_parquet(
        str(folder / "0.parquet")
    )
    return source_of(folder / "0.parquet", ["text:text", "image:my.image"])


def write_parquet_of_paths(folder):
    rows = [row | {"image": {"bytes": None, "path": row["image"]}} for row in records()]
    rows += [{"text": "inside", "image": {"bytes": png("blue"), "path": "nowhere.png"}}]
    Dataset.from_list(rows).to_parquet(str(folder / "0.parquet"))
    return source_of(folder / "0.parquet", PAIR)


def write_parquet_of_documents(folder):
    Dataset.from_list(list(map(document, records()))).to_parquet(str(folder / "0.parquet"))
    return source_of(folder / "0.parquet", ["document:document"])


def write_captions(folder):
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    (folder / "unnamed.png").unlink()
    (folder / "runs" / "sample.png").unlink()
    return source_of(folder, PAIR)


def write_metadata(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.png,a\nb.png,b\n")
    return source_of(folder, PAIR)


def write_folder_of_a_set(folder):
    Dataset.from_list(records()).to_parquet(str(folder / "train.parquet"))
    return source_of(folder, PAIR)


def write_saved_set(folder):
    DatasetDict(train=Dataset.from_list(records())).save_to_disk(str(folder / "saved"))
    (folder / "a.png").rename(folder / "saved" / "a.png")
    (folder / "b.png").rename(folder / "saved" / "b.png")
    return source_of(folder / "saved", PAIR, match={"text": "a|b"})


WRITERS = [
    write_jsonl,
    write_documents,
    write_glob,
    write_parquet,
    write_parquet_of_paths,
    write_parquet_with_a_dot,
    write_parquet_of_documents,
    write_captions,
    write_metadata,
    write_folder_of_a_set,
    write_saved_set,
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("most", [2**31, 0], ids=["content", "stamps"])
def test_a_source_is_the_files_it_reads_and_no_others(folder, write, most, monkeypatch):
    monkeypatch.setattr("training.data.reading.sources.CONTENT_FINGERPRINT_BYTES", most)
    config = write(folder)
    first = open_source(config).fingerprint
    (folder / "notes.md").write_text("a note")
    (folder / "runs" / "metrics.jsonl").write_text('{"loss": 1}\n')
    (folder / "runs" / "model.safetensors").write_bytes(b"0" * 100)
    (folder / "saved" if (folder / "saved").exists() else folder).joinpath("more.log").write_text("a")
    if write is not write_captions:
        (folder / "runs" / "sample.png").write_bytes(png("green"))
        (folder / "unnamed.png").unlink()
    assert open_source(config).fingerprint == first
    next(folder.rglob("b.png")).write_bytes(png("green"))
    assert open_source(config).fingerprint != first


def test_a_text_alone_does_not_look_for_pictures(folder):
    write_jsonl(folder)
    config = source_of(folder / "0.jsonl", ["text:text"])
    first = open_source(config).fingerprint
    (folder / "b.png").write_bytes(png("green"))
    assert open_source(config).fingerprint == first
    (folder / "0.jsonl").write_text(jsonl([{"text": "other"}]))
    assert open_source(config).fingerprint != first


@pytest.mark.parametrize("write", [write_captions, write_metadata])
def test_a_caption_that_changed_is_another_source(folder, write):
    config = write(folder)
    first = open_source(config).fingerprint
    name = "a.txt" if write is write_captions else "metadata.csv"
    (folder / name).write_text(
        (folder / name).read_text().replace("a", "c", 1) if name == "a.txt" else "file_name,text\na.png,c\nb.png,b\n"
    )
    assert open_source(config).fingerprint != first


def test_pictures_that_no_line_names_are_counted(folder, caplog):
    config = write_metadata(folder)
    with caplog.at_level(logging.WARNING):
        assert len(list(open_source(config))) == 2
        open_source(config)
    said = "2 pictures are left out, as no line of metadata.jsonl or metadata.csv names them (first: sample.png; unna"
    assert caplog.text.count(said) == 1


def test_lines_of_a_text_file_are_records(tmp_path, prepare):
    for name, text in (("a.txt", "\ufeffone\r\n\n  two\n \nthree"), ("b.txt", "four\n")):
        (tmp_path / name).write_bytes(text.encode())
    lines = [record["text"] for record in open_source(source_of(tmp_path / "a.txt", ["text:text"]))]
    assert lines == ["one", "  two", "three"]
    for path in (tmp_path / "*.txt", tmp_path):
        assert [record["text"] for record in open_source(source_of(path, ["text:text"]))] == [*lines, "four"]
    (tmp_path / "b.txt").write_bytes(b"good\n\xff\xfe\n")
    source = prepare(source_of(tmp_path / "b.txt", ["text:text"], on_error="skip"))
    assert len(source) == 1 and source.skipped == {"the line is not UTF-8": 1}
    with pytest.raises(ValueError, match="no column of text:caption 'caption'; there is 'text'"):
        open_source(source_of(tmp_path / "a.txt", ["text:caption"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("one.png", png("red"), "is a single picture; give the folder that it lies in"),
        ("one.wav", wav(0.5), "is a single sound; give the folder that it lies in"),
        ("one.heic", b"0", "is a single picture; give the folder"),
        ("one.csv", b"text\na\n", r"is a .csv file; give the folder that it lies in"),
        ("one.md", b"a", "is a file of no format that is read; .*set format"),
        ("empty", None, "is an empty folder"),
        ("notes/one.md", b"a", "is a folder without files of a format that is read"),
    ],
)
def test_what_exists_is_decided_here_and_at_once(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: pytest.fail("the Hub was asked"))
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for written in (name.split("/")[0], tmp_path / name.split("/")[0]):
        with pytest.raises(ValueError, match=message):
            open_source(source_of(written, ["text:text"]))


def test_a_name_that_is_not_there_is_first_looked_for_here(tmp_path, monkeypatch, capfd):
    """Nobody answers under this address; the library itself would try for 25 seconds."""
    monkeypatch.setattr("training.data.reading.sources.is_offline_mode", lambda: False)
    asked = []

    def refuse(*_, **__):
        asked.append(1)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "data").mkdir(parents=True)
    begin = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"path my/nope does not exist here \(the folder my does, and holds data\), nor"
    ):
        open_source(source_of("my/nope", ["text:text"]))
    with pytest.raises(ValueError, match="'other/nope' is neither a local .* the Hub is out of reach"):
        open_source(source_of("other/nope", ["text:text"]))
    with pytest.raises(ValueError, match="'mye' is neither a local .*; did you mean my?"):
        open_source(source_of("mye", ["text:text"]))
    assert time.perf_counter() - begin < 10 and len(asked) == 6
    assert "Retry" not in capfd.readouterr().err
    assert os.listdir(tmp_path) == ["my"]


def test_a_card_that_names_a_missing_file_is_refused_in_one_short_line(tmp_path):
    head = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: gone/train.parquet\n"
    (tmp_path / "README.md").write_text(f"---\n{head}---\n")
    with pytest.raises(ValueError, match="gone/train.parquet") as refused:
        open_source(source_of(tmp_path, PAIR))
    assert len(str(refused.value)) < 300 + 2 * len(str(tmp_path)) and "\n" not in str(refused.value)
