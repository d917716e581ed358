"""Preparing a source: killed and gone on with, by several processes, and what becomes of damaged files."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from training.data import SourceConfig, TemplateConfig, TokenizedSource
from training.data.preparing import preparation as module

from .conftest import ToyProcessor, png
from .test_shards import lines


TEXTS = [TemplateConfig(["text:text"])]


@pytest.fixture
def shards(tmp_path):
    """Three shards of 200 texts, and how often their records come."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        texts = [{"text": f"{shard} {'x' * (i % 50)} {i}"} for i in range(200)]
        (folder / f"{shard}.jsonl").write_bytes(lines(*texts))
    return SourceConfig("texts", f"{folder}/*.jsonl", TEXTS)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)


def contents(source):
    return {path.name: path.read_bytes() for path in source.folder.glob("*.arrow")}, source.records.tolist()


class Failing(ToyProcessor):
    """Fails after so many texts."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def encode_segment(self, segment):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().encode_segment(segment)


class Counting(ToyProcessor):
    texts = 0

    def encode_segment(self, segment):
        self.texts += 1
        return super().encode_segment(segment)


def test_an_interrupted_preparation_goes_on_and_gives_the_same_files(tmp_path, shards, small_chunks):
    whole = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "whole")
    for after in (70, 1, 0, 150, 130):
        with pytest.raises(KeyboardInterrupt):
            TokenizedSource.prepare(shards, Failing(after), tmp_path / "resumed")
        assert not list((tmp_path / "resumed").rglob("meta.json"))
    rest = Counting()
    resumed = TokenizedSource.prepare(shards, rest, tmp_path / "resumed")
    assert contents(resumed) == contents(whole)
    # 600 texts in batches of 64 (the last of a shard has 8): one was whole after the first run, two each after the others.
    assert rest.texts < 600 - 64 * 3


def test_a_chunk_that_is_cut_short_while_it_is_made_is_made_again(tmp_path, shards, small_chunks):
    whole = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        TokenizedSource.prepare(shards, Failing(350), tmp_path / "resumed")
    first, second = sorted((tmp_path / "resumed").rglob("*.arrow"))[1:3]
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    assert contents(TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "resumed")) == contents(whole)


def test_the_files_are_the_same_for_any_number_of_processes(tmp_path, shards):
    one, two = (
        TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / str(workers), num_proc=workers) for workers in (1, 2)
    )
    assert contents(one) == contents(two)
    notes = [json.loads((source.folder / "meta.json").read_text()) for source in (one, two)]
    assert notes[0] == notes[1] and notes[0]["tokens"] == one.columns[shards.segments[0]].lengths.sum()


_SLOW = """
import sys, time
from training.data import SourceConfig, TemplateConfig, TokenizedSource
from training.data.preparing import preparation
from tests.training.data.conftest import ToyProcessor

class Slow(ToyProcessor):
    def encode_segment(self, segment):
        time.sleep(0.002)
        return super().encode_segment(segment)

preparation.CHUNK_BYTES = 1
TokenizedSource.prepare(SourceConfig("texts", sys.argv[1], [TemplateConfig(["text:text"])]), Slow(), sys.argv[2])
"""


def test_a_killed_preparation_loses_nothing_and_leaves_no_lock(tmp_path, shards, small_chunks):
    whole = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "whole")
    cache = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", _SLOW, shards.path, str(cache)], cwd=Path(__file__).parents[3])
    while len(list(cache.rglob("*.json"))) < 3 and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not list(cache.rglob("meta.json"))
    rest = Counting()
    assert contents(TokenizedSource.prepare(shards, rest, cache)) == contents(whole)
    assert rest.texts <= 600 - 3 * 64


def test_of_several_that_ask_at_once_one_prepares(tmp_path, shards):
    # Each has a lock of its own: whether they are threads or processes is all the same to the operating system.
    processors = [Counting() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda one: TokenizedSource.prepare(shards, one, tmp_path / "cache"), processors))
    assert [len(source) for source in found] == [600] * 4
    assert sorted(processor.texts for processor in processors) == [0, 0, 0, 600]


class Dying(ToyProcessor):
    def encode_segment(self, segment):
        os.kill(os.getpid(), signal.SIGKILL)


class DyingWhileItReports(ToyProcessor):
    def encode_segment(self, segment):
        module._worker["reports"]._wlock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processor", [Dying, DyingWhileItReports])
def test_a_worker_that_dies_is_an_error_and_not_a_hang(tmp_path, shards, processor):
    with pytest.raises(RuntimeError, match="source 'texts' died.*fewer workers"):
        TokenizedSource.prepare(shards, processor(), tmp_path / "cache", num_proc=2)


def test_damaged_files_are_named_with_the_way_out(tmp_path, shards):
    source = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")
    path = source.folder / "00001-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for use in (source.verify, lambda: TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")):
        with pytest.raises(
            ValueError, match=r"'texts' is damaged: 00001-00000.arrow has another hash.*remove .*made again"
        ):
            use()
    path.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=rf"00001-00000.arrow has {len(data) - 8} bytes instead of {len(data)}"):
        TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")
    path.unlink()
    with pytest.raises(ValueError, match="00001-00000.arrow is missing"):
        TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")


def test_a_source_that_shrank_is_prepared_anew_and_named(tmp_path, shards, caplog):
    before = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")
    Path(shards.path).parent.joinpath("1.jsonl").unlink()
    with caplog.at_level(logging.WARNING):
        after = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")
    assert len(after) == 400 and after.fingerprint != before.fingerprint
    assert "'texts'" in caplog.text and "(600 records; gone: 1.jsonl); preparing it anew" in caplog.text


def test_a_run_does_not_go_on_over_a_source_that_changed(tmp_path, shards, data_config):
    from training.data import RowStream

    config = data_config(block_documents=20)
    before = RowStream(config, [TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")])
    path = Path(shards.path).parent / "2.jsonl"
    path.write_bytes(path.read_bytes().replace(b" 7", b" 8"))
    after = RowStream(config, [TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")])
    with pytest.raises(ValueError, match="source 'texts' .* is not what it was at row 30"):
        after.restore(before.position(30))


def test_a_source_of_many_files_does_not_keep_them_open(tmp_path, shards, small_chunks):
    source = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")
    assert len(contents(source)[0]) == 12
    opened = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert not [name for name in opened if name.endswith(".arrow")]
    assert bytes(t - 7 for t in source[399]["text:text"][0]).decode().startswith("1 ")


def test_no_flipped_bit_is_trained_on(tmp_path, shards):
    """Whichever bit of whichever file: the source is refused by the name of the file."""
    source, random = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache"), np.random.default_rng(0)
    for path in sorted(source.folder.iterdir()):
        whole = path.read_bytes()
        for place in random.integers(8 * len(whole), size=20):
            data = bytearray(whole)
            data[place // 8] ^= 1 << place % 8
            path.write_bytes(data)
            with pytest.raises(ValueError, match=f"'texts' is damaged: {path.name} .*remove .*made again"):
                TokenizedSource(shards, source.folder)
        path.write_bytes(whole)
    assert len(TokenizedSource(shards, source.folder)) == len(source)


def test_a_file_is_hashed_once_and_again_when_it_is_another(tmp_path, shards):
    source = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")
    path, hashed = source.folder / "00001-00000.arrow", lambda: module._file_digest.cache_info().misses
    before = hashed()
    TokenizedSource(shards, source.folder)
    assert hashed() == before
    os.utime(path, ns=(0, 0))
    for _ in range(2):
        TokenizedSource(shards, source.folder)
        assert hashed() == before + 1
    # What was done to it without a trace is found where all is hashed anew.
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match="00001-00000.arrow has another hash"):
        TokenizedSource(shards, source.folder).verify()


@pytest.mark.parametrize("file", ["00000-00000.json", "00000-00000.arrow"])
def test_what_was_damaged_while_it_was_made_is_made_again(tmp_path, shards, small_chunks, monkeypatch, file):
    whole = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "whole")
    with monkeypatch.context() as broken:
        broken.setattr(
            "training.data.preparing.preparation._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob(f"*.partial/{file}")
    # A number among those it holds: what was read, or a token.
    data = bytearray(path.read_bytes())
    place = data.index(b'"read": ') + 8 if file.endswith("json") else len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)
    again = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")
    assert contents(again) == contents(whole)


def test_a_source_that_failed_is_tried_again(tmp_path):
    """Nothing is kept of it: what made it fail may be mended without a change of its files."""
    (tmp_path / "0.jsonl").write_text('{"text": "a"}\n' * 3)
    config = SourceConfig("x", f"{tmp_path}/0.jsonl", [TemplateConfig(["text:text"])], on_error="skip")

    class Failing(ToyProcessor):
        def encode_segment(self, segment):
            raise ValueError("not today")

    with pytest.raises(ValueError, match=r"no usable record; left out: .* \(first: 0.jsonl, document 1: .*\)"):
        TokenizedSource.prepare(config, Failing(), tmp_path / "cache")
    assert len(TokenizedSource.prepare(config, ToyProcessor(), tmp_path / "cache")) == 3


@pytest.mark.parametrize("kind", ["jsonl", "shards", "parquet", "set"])
def test_what_is_prepared_depends_on_the_files_that_records_name(tmp_path, kind):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.png").write_bytes(png("red"))
    if kind in ("jsonl", "shards"):
        (folder / "0.jsonl").write_text('{"image": "a.png"}\n')
    else:
        Dataset.from_dict({"image": ["a.png"]}).to_parquet(str(folder / "train.parquet"))
    path = {"jsonl": "0.jsonl", "shards": "*.jsonl", "parquet": "*.parquet", "set": ""}[kind]
    config = SourceConfig("x", f"{folder}/{path}", [TemplateConfig(["image:image"])])
    red = TokenizedSource.prepare(config, ToyProcessor(), tmp_path / "cache")[0]
    (folder / "a.png").write_bytes(png("white"))
    assert TokenizedSource.prepare(config, ToyProcessor(), tmp_path / "cache")[0] != red


@pytest.mark.parametrize(
    "place", ["/dev/null", "/dev/null/cache", "file", "file/cache", "/proc/cache", "a\0b", "a" * 300]
)
def test_a_cache_that_cannot_be_written_is_refused_with_the_way_out(tmp_path, shards, place):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="cache_dir=.* cannot be written: .*; set data.cache_dir, or .* MOT_CACHE"):
        TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / place)


def test_a_full_cache_is_read_where_nothing_can_be_written(tmp_path, shards, monkeypatch):
    source = TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")

    def refuse(*_, **__):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    monkeypatch.setattr("training.data.preparing.preparation.FileLock.acquire", refuse)
    assert contents(TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")) == contents(source)
    with pytest.raises(ValueError, match="cannot be written: .*Read-only"):
        TokenizedSource.prepare(shards, ToyProcessor("other"), tmp_path / "cache")


def test_a_name_of_any_length_is_prepared(tmp_path, shards):
    shards.name = "名" * 300
    assert len(TokenizedSource.prepare(shards, ToyProcessor(), tmp_path / "cache")) == 600
