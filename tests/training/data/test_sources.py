"""Data sets, folders of pictures and interleaved JSONL as sources, and what is refused."""

import json

import pytest
from datasets import Dataset, DatasetDict

from training.data import RowStream, SourceConfig, TemplateConfig
from training.data.reading import sources as fingerprints
from training.data.reading.sources import open_source

from .conftest import png, wav


CAPTIONED = [TemplateConfig(["text:text", "image:image"])]
INTERLEAVED = [TemplateConfig(["document:segments"])]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, colour in (("cat", "red"), ("dog", "blue"), ("more/fox", "green")):
        (folder / f"{name}.png").write_bytes(png(colour))
    return folder


def documents(folder, *lines):
    path = folder / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"segments": line}) for line in lines))
    return path


def test_a_caption_file_beside_each_picture(pictures):
    for name in ("cat", "dog", "more/fox"):
        (pictures / f"{name}.txt").write_text(f"a {name[-3:]}\n")
    records = list(open_source(SourceConfig("p", str(pictures), CAPTIONED)))
    assert [(r["text"], r["image"].rsplit("/", 1)[1]) for r in records] == [
        ("a cat", "cat.png"),
        ("a dog", "dog.png"),
        ("a fox", "fox.png"),
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_metadata_file_names_pictures_and_captions(pictures, kind):
    rows = [("dog.png", "a dog"), ("more/fox.png", "a fox")]
    if kind == "csv":
        (pictures / "metadata.csv").write_text("file_name,text\n" + "\n".join(f"{f},{t}" for f, t in rows))
    else:
        (pictures / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f, "text": t}) for f, t in rows))
    records = list(open_source(SourceConfig("p", str(pictures), CAPTIONED)))
    assert [record["text"] for record in records] == ["a dog", "a fox"]


def test_a_picture_without_caption_is_refused_or_counted(pictures):
    (pictures / "cat.txt").write_text("a cat")
    with pytest.raises(ValueError, match=r"dog.png has no caption.*on_error: skip"):
        open_source(SourceConfig("p", str(pictures), CAPTIONED))
    source = open_source(SourceConfig("p", str(pictures), CAPTIONED, on_error="skip"))
    assert source.num_records == 1 and source.skipped == {"picture without a caption": 2}


def test_interleaved_documents_keep_their_order(pictures, prepare, processor, data_config):
    (pictures / "say.wav").write_bytes(wav(0.5))
    path = documents(
        pictures,
        [
            {"type": "text", "text": "first"},
            {"type": "image", "image": "cat.png"},
            {"type": "text", "text": "then"},
            {"type": "image", "image": "more/fox.png"},
            {"type": "audio", "audio": "say.wav"},
        ],
    )
    source = prepare(SourceConfig("d", str(path), INTERLEAVED))
    row = RowStream(data_config(block_documents=1, row_length=64), [source]).row(0)
    text = lambda words: processor.encode_segment({"type": "text", "text": words})  # noqa: E731
    picture = lambda grey: [3, *[263 + grey // 16] * 4, 4]  # noqa: E731
    expected = [1, *text("first"), *picture(76), *text("then"), *picture(75), 5, *[279 + 8] * 2, 6, 2]
    assert row["input_ids"][row["document_ids"] == 0].tolist() == expected


def test_a_long_interleaved_document_of_text_alone_is_split_and_one_with_a_picture_refused(
    pictures, prepare, data_config
):
    long = [{"type": "text", "text": "x" * 100}]
    source = prepare(SourceConfig("d", str(documents(pictures, long)), INTERLEAVED))
    rows = list(RowStream(data_config(row_length=32, block_documents=1), [source]).block(0))
    assert sum((row["document_ids"] >= 0).sum() for row in rows) == 102
    with_picture = [*long, {"type": "image", "image": "cat.png"}]
    source = prepare(SourceConfig("d", str(documents(pictures, with_picture)), INTERLEAVED))
    with pytest.raises(ValueError, match="row_length=32 .*108"):
        RowStream(data_config(row_length=32), [source])


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "more/../../secret.png"])
def test_a_path_that_leaves_the_folder_is_refused(pictures, path):
    (pictures.parent / "secret.png").write_bytes(png("red"))
    file = documents(pictures, [{"type": "image", "image": path}])
    with pytest.raises(ValueError, match="leads outside"):
        open_source(SourceConfig("d", str(file), INTERLEAVED))


def test_a_link_that_leaves_the_folder_is_refused(pictures):
    (pictures.parent / "secret.png").write_bytes(png("red"))
    (pictures / "link.png").symlink_to(pictures.parent / "secret.png")
    with pytest.raises(ValueError, match="leads outside"):
        open_source(SourceConfig("d", str(documents(pictures, [{"type": "image", "image": "link.png"}])), INTERLEAVED))


def test_the_fingerprint_of_a_folder_opens_no_link_that_leaves_it(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "secret").write_text("b")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    opened = []
    monkeypatch.setattr(fingerprints, "content_fingerprint", lambda file: opened.append(file.name) or "")
    first = fingerprints.local_fingerprint(tmp_path / "in")
    assert opened == ["a.txt"]
    (tmp_path / "secret").write_text("longer")
    assert fingerprints.local_fingerprint(tmp_path / "in") != first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([{"type": "image", "image": "no.png"}], "no.png does not exist"),
        ([{"type": "video", "video": "x"}], "must have a type of text, image or audio"),
        ([], "has no segments"),
    ],
)
def test_a_bad_document_is_refused_by_its_number(pictures, line, message):
    with pytest.raises(ValueError, match=f"document 1.*{message}"):
        open_source(SourceConfig("d", str(documents(pictures, line)), INTERLEAVED))


def test_broken_json_is_refused_by_its_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"segments": [{"type": "text", "text": "a"}]}\n{"segments": \n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        open_source(SourceConfig("d", str(path), INTERLEAVED))


def test_streaming_gives_the_same_tokens(text_source, prepare):
    plain, streamed = prepare(text_source()), prepare(text_source(streaming=True))
    assert [plain[i] for i in range(30)] == [streamed[i] for i in range(30)]


def test_limit_takes_the_first_records(text_source, prepare):
    whole = prepare(text_source())
    for streaming in (False, True):
        first = prepare(text_source(limit=4, streaming=streaming))
        assert [first[i] for i in range(len(first))] == [whole[i] for i in range(4)]


def test_a_data_set_saved_to_disk_is_read(tmp_path, prepare):
    DatasetDict(train=Dataset.from_dict({"text": ["a", "b"]})).save_to_disk(tmp_path / "saved")
    assert len(prepare(SourceConfig("s", str(tmp_path / "saved"), [TemplateConfig(["text:text"])]))) == 2


def test_a_folder_that_is_made_again_under_its_name_is_read_anew(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.parquet\n---\n# A set\n"
    )
    config, found = SourceConfig("set", str(folder), [TemplateConfig(["text:word"])], format="dataset"), []
    for words in (["a", "b"], ["c", "d", "e"]):
        Dataset.from_dict({"word": words}).to_parquet(folder / "train.parquet")
        source = open_source(config)
        assert [record["word"] for record in source] == words
        found.append(source.fingerprint)
    assert found[0] != found[1]


def test_unknown_names_are_refused_with_the_nearest(trimodal_folder, carried):
    with pytest.raises(ValueError, match=r"no column of text:nane 'nane'; did you mean 'name'"):
        open_source(SourceConfig("x", str(trimodal_folder), [TemplateConfig(["text:nane"])]))
    with pytest.raises(ValueError, match=r"no config 'emojis'; did you mean 'emoji'"):
        open_source(SourceConfig("x", "carried", [TemplateConfig(["text:name"])], config="emojis"))
    with pytest.raises(ValueError, match=r"no split 'validatoin'; did you mean 'validation'"):
        open_source(SourceConfig("x", "carried", [TemplateConfig(["text:name"])], config="emoji", split="validatoin"))


def test_a_missing_path_is_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path / "nothing.jsonl"):
        with pytest.raises(ValueError, match="does not exist"):
            open_source(SourceConfig("x", str(path), [TemplateConfig(["text:text"])]))


def test_only_records_that_match_are_read(tmp_path):
    def named(**fields):
        templates = [TemplateConfig(segments=["text:name"])]
        source = SourceConfig(name="emoji", path="carried", config="emoji", templates=templates, **fields)
        return open_source(source)

    everything = [record["name"] for record in named()]
    hearts = named(match={"name": "heart$"})
    assert [record["name"] for record in hearts] == [name for name in everything if name.endswith("heart")]
    assert len(list(named(match={"name": "heart$"}, limit=3))) == 3
    assert hearts.fingerprint not in (named().fingerprint, named(match={"name": "^heart"}).fingerprint)
    with pytest.raises(ValueError, match="column of match 'nam'.*did you mean 'name'"):
        named(match={"nam": "heart"})
    with pytest.raises(ValueError, match=r"match.name='\(' of source 'emoji' is no regular expression"):
        named(match={"name": "("})
