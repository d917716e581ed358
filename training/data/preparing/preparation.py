"""A prepared source: how its records become tokens on the disk, and how the tokens are read.

A source is prepared in parts (a shard, or a range of records), in parallel. One process tokenises a part from start to
end and writes a chunk whenever enough bytes have come together. So any number of processes makes the same chunks, and
an interrupted preparation goes on behind its whole chunks.

Chunks are written into a folder `<name>-<fingerprint>.partial`. When all are there, `meta.json` is written and the
folder gets the name `<name>-<fingerprint>`: a folder of this name is complete. The fingerprint covers everything that
the tokens were made from, so a change makes another folder. `TokenizedSource` maps the chunks into memory.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from modeling_mot.latent_vae import encode_pixels, vae_fingerprint
from training.config import digest_of
from training.data.config import Segment, SourceConfig
from training.data.documents import ImageColumn, TokenColumn, Vocabulary
from training.data.preparing.batch_tokenizer import HOLD_IMAGES, BatchTokenizer, Preparing, kept_segments
from training.data.reading.records import SHARD_RECORDS, BadRecord, LeftOut, Source
from training.data.reading.sources import file_digest, open_source
from training.data.roles import FEATURES


logger = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------------------- chunks

# A segment's images are in two columns: the name of the segment with one of these endings.
VALUES, SIZES = "|values", "|sizes"


def table_schema(segments: list[Segment], images: str | None) -> pa.Schema:
    """List the columns of a prepared source whose images are kept as "pixels", as "latents", or are codes (None)."""

    def lists(of: pa.DataType) -> pa.DataType:
        return pa.list_(pa.list_(of))

    columns = {"record": pa.int64()} | {str(segment): lists(pa.int32()) for segment in segments}
    for segment in segments if images else []:
        if segment.type in HOLD_IMAGES:
            is_pixels = images == "pixels" or segment.type == FEATURES
            columns[f"{segment}{VALUES}"] = lists(pa.uint8() if is_pixels else pa.float16())
            columns[f"{segment}{SIZES}"] = lists(pa.int32())
    return pa.schema(columns)


def build_table(rows: dict[str, list], pixels: dict[str, list], schema: pa.Schema, vae) -> pa.Table:
    """Build the table of a batch. Images are laid out flat, without a Python object for each value."""
    columns = {name: pa.array(values, type=schema.field(name).type) for name, values in rows.items()}
    for name, records in pixels.items():
        # All images of the batch, one after another.
        versions = [images for variants in records for images in variants]
        flat = [image for images in versions for image in images]
        is_pixels = vae is None or name.startswith(f"{FEATURES}:")
        if not is_pixels:
            flat = encode_latents(vae, flat)
        dtype = np.uint8 if is_pixels else np.float16
        values = np.concatenate([image.ravel() for image in flat]) if flat else np.empty(0, dtype)
        sizes = np.array([image.shape[1:] for image in flat], dtype=np.int32).ravel()
        lengths = np.array([image.size for image in flat], dtype=np.int64)
        # Where the images of each version end, then where the versions of each record end.
        ends = np.concatenate([[0], np.cumsum([len(images) for images in versions], dtype=np.int64)])
        of_records = np.concatenate([[0], np.cumsum([len(variants) for variants in records], dtype=np.int64)])
        value_ends = np.concatenate([[0], np.cumsum(lengths)])[ends]
        for part, flat_values, offsets in ((VALUES, values, value_ends), (SIZES, sizes, 2 * ends)):
            inner = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat_values))
            columns[name + part] = pa.ListArray.from_arrays(pa.array(of_records, pa.int32()), inner)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def encode_latents(vae, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Encode pictures, all of one size together.  (3, H, W) uint8 -> (C, h, w) float16, each"""
    latents: list[np.ndarray] = [None] * len(pictures)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(pictures):
        by_size.setdefault(picture.shape, []).append(place)
    for places in by_size.values():
        pixels = torch.from_numpy(np.stack([pictures[place] for place in places])).float() / 127.5 - 1
        encoded = encode_pixels(vae, pixels).cpu().numpy().astype(np.float16)
        for place, values in zip(places, encoded, strict=True):
            latents[place] = values
    return latents


def write_chunk(folder: Path, part: int, number: int, tables: list[pa.Table], described: dict) -> None:
    """Write chunk `number` of a part and, after it, its description: a chunk that has one is whole.

    Args:
        tables: the records of the chunk; none where all records were left out.
        described: more entries of the description, beside `file`, `records`, `size` and `sha256`.
    """
    name = f"{part:05d}-{number:05d}"
    if tables:
        # One record batch: each costs memory wherever the source is opened.
        table = pa.concat_tables(tables).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        data = sink.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        described |= {"file": f"{name}.arrow", "records": len(table), "size": data.size, "sha256": digest}
        write_whole(folder / described["file"], data)
    write_with_digest(folder / f"{name}.json", described)


def written_chunks(folder: Path, part: int) -> Iterator[dict]:
    """Read the descriptions of the whole chunks of a part, in order, up to the first that is not whole."""
    number = 0
    while (path := folder / f"{part:05d}-{number:05d}.json").is_file():
        try:
            described = read_with_digest(path)
        except ValueError:
            return
        if "file" in described and chunk_damage(folder, described):
            return
        yield described
        number += 1


def write_with_digest(path: Path, described: dict) -> None:
    """Write a JSON object with its own hash."""
    write_whole(path, json.dumps(described | {"digest": digest_of(described)}, indent=1).encode())


def read_with_digest(path: Path) -> dict:
    """Read a JSON object that `write_with_digest` wrote.

    Raises:
        ValueError: the file has changed since.
    """
    try:
        described = json.loads(path.read_bytes())
        if described.pop("digest") == digest_of(described):
            return described
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path.name} is not as it was written")


def chunk_damage(folder: Path, described: dict, anew: bool = False) -> str | None:
    """Say what is wrong with a chunk; None: nothing.

    A process hashes a file once, and again when its size, time of change or inode have changed.

    Args:
        anew: hash the file in any case.
    """
    path = folder / described["file"]
    try:
        found = path.stat()
    except OSError as error:
        return f"{path.name} is missing: {error.strerror}"
    if found.st_size != described["size"]:
        return f"{path.name} has {found.st_size} bytes instead of {described['size']}"
    digest = file_digest.__wrapped__ if anew else file_digest
    if digest(path, found.st_size, found.st_mtime_ns, found.st_ino) != described["sha256"]:
        return f"{path.name} has another hash than was noted when it was written"
    return None


def open_chunk(path: Path) -> pa.Table:
    """Map a chunk into memory. Its file does not stay open: a source may have more files than a process may open."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def write_whole(path: Path, data) -> None:
    """Write a file beside its place, then move it there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- parts

# The records of a batch, the bytes of a batch, and the bytes of a chunk in memory and on disk.
BATCH_SIZE, BATCH_BYTES, CHUNK_BYTES = 64, 2**27, 2**25


@dataclass
class Preparation:
    """Everything that it takes to prepare any part of a source. It can be sent to other processes.

    Attributes:
        folder: the folder of the chunks, `<place>.partial`.
    """

    folder: Path
    tokenizer: BatchTokenizer

    def part(self, part: int, report: Callable[[int, int], None]) -> None:
        """Prepare the missing chunks of a part.

        Args:
            report: is told the number of records that were done before, then for each batch the number of records read
                and of tokens made.
        """
        # Where the part was interrupted.
        source, preparing = self.tokenizer.source, self.tokenizer.preparing
        schema = table_schema(self.tokenizer.segments, preparing.images)
        chunks = list(written_chunks(self.folder, part))
        skip, number = sum(chunk["read"] for chunk in chunks), len(chunks)
        report(skip, 0)
        if chunks and chunks[-1]["last"]:
            return

        # A chunk is written when it is full.
        tables, noted, left_out = [], _nothing(), LeftOut()

        def write() -> None:
            write_chunk(self.folder, part, number, tables, noted | {"left_out": asdict(left_out)})

        for batch in _batches(source.read(part, skip)):
            if sum(table.nbytes for table in tables) >= CHUNK_BYTES:
                write()
                tables, noted, left_out = [], _nothing(), LeftOut()
                number += 1
            rows, pixels, unusable = self.tokenizer(batch)
            tokens = sum(len(versions[0]) for name, column in rows.items() if name != "record" for versions in column)
            noted["read"] += len(batch)
            noted["tokens"] += tokens
            left_out.join(unusable)
            if rows["record"]:
                tables.append(build_table(rows, pixels, schema, preparing.vae))
            report(len(batch), tokens)
        noted["last"] = True
        write()


def prepare(place: Path, made_from: dict, tokenizer: BatchTokenizer) -> None:
    """Make a prepared source, or finish it, or wait while another process does.

    Args:
        place: the folder of the prepared source.
        made_from: everything that its tokens depend on, by name.

    Raises:
        ValueError: a record that cannot be used (`on_error: raise`), or nothing left of the source.
        RuntimeError: a worker died.
    """
    partial = place.with_name(f"{place.name}.partial")
    with _alone(place):
        if (place / "meta.json").is_file():
            return
        partial.mkdir(exist_ok=True)
        warn_of_change(place, made_from, tokenizer.source)
        if not (partial / "meta.json").is_file():
            work = Preparation(partial, tokenizer)
            _prepare_parts(work)
            _finish(work, made_from)
        if place.exists():
            raise ValueError(f"{place} is no prepared source, as it has no meta.json; move it away")
        partial.replace(place)
    for described in place.glob("*-*.json"):
        described.unlink()


def _alone(place: Path):
    """Make a context in which no other process prepares this source. The wait for it has no limit.

    Raises:
        ValueError: the folder cannot be written to.
    """
    # A lock of the operating system is free again when its holder dies.
    lock = FileLock(f"{place}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=1)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"data.cache_dir={place.parent} cannot be written: {error}; set data.cache_dir, or the variable MOT_CACHE, "
            "to a folder that can"
        ) from error
    except Timeout:
        logger.warning("waiting for another process that prepares %s", place.name)
        return lock.acquire()


def _prepare_parts(work: Preparation) -> None:
    source, preparing = work.tokenizer.source, work.tokenizer.preparing
    with tqdm(
        total=source.num_records, unit=" records", desc=source.config.name, disable=not preparing.progress
    ) as bar:
        tokens = 0

        def report(records: int, made: int) -> None:
            nonlocal tokens
            tokens += made
            bar.update(records)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s" if elapsed else "", refresh=False)

        if preparing.workers <= 1 or source.num_parts == 1:
            for part in range(source.num_parts):
                work.part(part, report)
        else:
            _prepare_in_processes(work, min(preparing.workers, source.num_parts), report)


def _prepare_in_processes(work: Preparation, workers: int, report: Callable[[int, int], None]) -> None:
    # Fresh processes: a forked one inherits torch's threads in an unusable state.
    context = multiprocessing.get_context("spawn")
    reports, stop = context.Queue(), context.Event()
    listener = threading.Thread(target=lambda: [report(*told) for told in iter(reports.get, None)], daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(
        workers, context, _start_worker, (work, reports, stop, max(1, os.cpu_count() // workers))
    )
    has_died = False
    try:
        futures = [pool.submit(_prepare_part, part) for part in range(work.tokenizer.source.num_parts)]
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool as error:
        has_died = True
        raise RuntimeError(
            f"a process that tokenised source {work.tokenizer.config.name!r} died, perhaps for want of memory; prepare "
            "again with fewer workers"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        # A killed worker may have held the queue's lock, or left half a report: then the listener is not waited for.
        if not has_died:
            reports.put(None)
            listener.join()


def _start_worker(work: Preparation, reports, stop, threads: int) -> None:
    # Ctrl-C reaches all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _worker.update(work=work, reports=reports, stop=stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# The work of a worker process, its queue of reports, and the event that stops it.
_worker: dict = {}


def _prepare_part(part: int) -> None:
    def report(records: int, tokens: int) -> None:
        if _worker["stop"].is_set():
            raise RuntimeError("stopped, as another part failed")
        _worker["reports"].put((records, tokens))

    _worker["work"].part(part, report)


def _finish(work: Preparation, made_from: dict) -> None:
    source, preparing = work.tokenizer.source, work.tokenizer.preparing
    chunks, tokens, left_out = [], 0, LeftOut()
    # The chunks of all parts, in order.
    left_out.join(source.left_out)
    for part in range(source.num_parts):
        for chunk in written_chunks(work.folder, part):
            tokens += chunk["tokens"]
            left_out.join(LeftOut(**chunk["left_out"]))
            if "file" in chunk:
                chunks.append({name: chunk[name] for name in ("file", "records", "size", "sha256")})
    if not chunks:
        # Nothing is kept: the reason may lie in something that the fingerprint does not cover.
        shutil.rmtree(work.folder)
        raise ValueError(
            f"source {source.config.name!r} ({source.config.path}) has no usable record; left out: "
            f"{'; '.join(left_out.lines()) or 'none, as it has no records'}"
        )
    meta = {
        "fingerprint": digest_of(made_from),
        "made_from": {name: digest_of(value) for name, value in made_from.items()},
        "origin": origin_of(source.config),
        "records": sum(chunk["records"] for chunk in chunks),
        "tokens": tokens,
        "skipped": left_out.counts,
        "first_skipped": left_out.first,
        "more_skipped": left_out.more,
        "shards": source.shards,
        "vocabulary": asdict(Vocabulary.of(preparing.processor)),
        "images": preparing.images,
        "channels": preparing.vae.config.latent_channels if preparing.images == "latents" else 3,
        "chunks": chunks,
    }
    write_with_digest(work.folder / "meta.json", meta)
    for line in left_out.lines():
        logger.warning("source %r: left out: %s", source.config.name, line)


def origin_of(config: SourceConfig) -> dict:
    """Say where a source comes from, whatever is there now."""
    names = ("path", "format", "config", "split", "revision", "limit", "match", "streaming")
    return {name: getattr(config, name) for name in names}


def warn_of_change(place: Path, made_from: dict, source: Source) -> None:
    """Say what has changed since a source was prepared last, where that is known."""
    # The newest earlier preparation of this source.
    prefix = place.name.rpartition("-")[0]
    notes = sorted(place.parent.glob(f"{prefix}-*/meta.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(notes):
        try:
            meta = read_with_digest(path)
        except ValueError:  # of an earlier version, or damaged
            continue
        if "made_from" not in meta or meta["origin"] != origin_of(source.config):
            continue

        # Changed files are worth a warning; another tokenizer or other segments were chosen on purpose.
        before, now = set(meta["shards"]), set(source.shards)
        changed = [name for name, value in made_from.items() if meta["made_from"].get(name) != digest_of(value)]
        if "source" in changed and ("segments" not in changed or before != now):
            differences = (("gone", sorted(before - now)[:5]), ("new", sorted(now - before)[:5]))
            details = "".join(f"; {word}: {', '.join(names)}" for word, names in differences if names)
            logger.warning(
                "source %r (%s): its files are not what they were when %s was prepared (%d records%s); preparing it "
                "anew",
                source.config.name,
                source.config.path,
                path.parent.name,
                meta["records"],
                details,
            )
        elif changed := [name for name in changed if name != "source"]:
            logger.info(
                "source %r (%s): preparing it anew, with other %s than when %s was prepared",
                source.config.name,
                source.config.path,
                ", ".join(changed),
                path.parent.name,
            )
        return


def _nothing() -> dict:
    return {"read": 0, "tokens": 0, "last": False}


def _batches(items: Iterator[tuple[int, dict | BadRecord]]) -> Iterator[list]:
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += _bytes_in(item[1])
        if len(batch) == BATCH_SIZE or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bytes_in(value) -> int:
    """Estimate the bytes that a record takes in memory."""
    size, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, (bytes, str)):
            size += len(item)
        elif isinstance(item, (dict, list)):
            size += 64
            left += item.values() if isinstance(item, dict) else item
        else:
            size += 16
    return size


# ------------------------------------------------------------------------------------------------- the tokenised source

# A part of every fingerprint. Raise it when the same records must give other tokens than before.
FORMAT_VERSION = 4


class TokenizedSource:
    """The tokens of a source, record by record.

    Attributes:
        config: the source's configuration.
        vocabulary: `Vocabulary` of the processor that made the tokens.
        fingerprint: over everything the tokens were made from.
        left_out: the records that were left out (`on_error: skip`).
        tokens: ids of all segments of all records, of the first variant.
        records: (len,) the number of each record in its source.
        columns: `Segment` -> `TokenColumn`; texts have one variant, pictures and sounds one or more.
        images: "pixels" or "latents", as images are kept; None where they are codes.
        image_columns: `Segment` -> `ImageColumn` of the segments that may hold images; none where images are codes.
    """

    def __init__(self, config: SourceConfig, folder: Path):
        self.config = config
        self.folder = Path(folder)
        # The description, and the chunks that it names.
        try:
            meta = read_with_digest(self.folder / "meta.json")
        except ValueError as error:
            raise ValueError(self._damaged([str(error)])) from error
        self.fingerprint = meta["fingerprint"]
        self.tokens = meta["tokens"]
        self.left_out = LeftOut(meta["skipped"], meta["first_skipped"], meta.get("more_skipped", {}))
        self._chunks = meta["chunks"]
        self._shards = meta["shards"]
        self._refuse_damage()

        # The columns, which stay on the disk.
        self.vocabulary = Vocabulary.from_dict(meta["vocabulary"])
        self.table = table = pa.concat_tables(open_chunk(self.folder / chunk["file"]) for chunk in self._chunks)
        segments = kept_segments(config, self.vocabulary)
        self.columns = {segment: TokenColumn(table.column(str(segment)).chunks) for segment in segments}
        self.records = np.asarray(table.column("record"))
        self.images = meta["images"]
        self.image_columns = {
            segment: ImageColumn(
                *(TokenColumn(table.column(f"{segment}{part}").chunks) for part in (VALUES, SIZES)),
                3 if segment.type == FEATURES else meta["channels"],
            )
            for segment in segments
            if f"{segment}{VALUES}" in table.column_names
        }

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, list[list[int]]]:
        """Give the ids of every segment of a record, a list per variant."""
        names = [str(segment) for segment in self.columns]
        return self.table.slice(int(index), 1).select(names).to_pylist()[0]

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            ValueError: a file has changed since it was written.
        """
        self._refuse_damage(anew=True)

    def _refuse_damage(self, anew: bool = False) -> None:
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
            found = pool.map(lambda chunk: chunk_damage(self.folder, chunk, anew), self._chunks)
        if damage := [what for what in found if what is not None]:
            raise ValueError(self._damaged(damage))

    def _damaged(self, what: list[str]) -> str:
        more = f" and {len(what) - 3} more" if len(what) > 3 else ""
        return (
            f"prepared source {self.config.name!r} is damaged: {'; '.join(what[:3])}{more}; remove {self.folder}, and "
            "it is made again"
        )

    def name_of(self, index: int) -> str:
        """Name the record at `index` for a message."""
        number = int(self.records[index])
        if not self._shards:
            return f"record {number}"
        return f"record {number % SHARD_RECORDS} of shard {self._shards[number // SHARD_RECORDS]}"

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> number of records that were left out."""
        return self.left_out.counts

    @property
    def first_skipped(self) -> dict[str, str]:
        """Reason -> name of the first record that was left out."""
        return self.left_out.first

    @property
    def variants(self) -> int:
        """The largest number of variants of any segment."""
        return max(column.variants for column in self.columns.values())

    @classmethod
    def prepare(cls, config: SourceConfig, preparing: Preparing) -> "TokenizedSource":
        """Tokenise a source, or find it tokenised in the cache.

        Raises:
            ValueError: a record that cannot be used, by source, record number and column (`on_error: raise`), or
                nothing left of the source; a prepared file that has changed since it was written.
        """
        config.validate()
        source = open_source(config, preparing.limits)
        made_from = _made_from(source, preparing)
        folder = Path(preparing.cache) / f"{_safe_name(config.name)}-{digest_of(made_from)[:16]}"
        if not os.path.isfile(folder / "meta.json"):
            prepare(folder, made_from, BatchTokenizer(source, preparing))
        prepared = cls(config, folder)
        # `on_error` is no part of the fingerprint: chunks that are finished when a bad record is met are kept.
        if prepared.skipped and config.on_error == "raise":
            raise ValueError(
                f"source {config.name!r} was prepared with on_error: skip, and left out "
                f"{'; '.join(prepared.left_out.lines())}; set on_error: skip, or mend these records"
            )
        return prepared


def _made_from(source: Source, preparing: Preparing) -> dict:
    """List everything that the tokens of a source depend on."""
    made_from = {
        "format": FORMAT_VERSION,
        "source": source.fingerprint,
        "processor": preparing.processor.fingerprint(),
        "segments": [str(segment) for segment in kept_segments(source.config, Vocabulary.of(preparing.processor))],
        "augmentation": asdict(preparing.augmentation) if preparing.augmentation else None,
        "limits": asdict(preparing.limits),
    }
    if preparing.images == "latents":
        made_from["vae"] = vae_fingerprint(preparing.vae)
    return made_from


def _safe_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in name)[:50]
