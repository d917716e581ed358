"""A source as tokens: prepared once, kept on disk as Arrow, memory-mapped.

A prepared source is a folder `<name>-<fingerprint>/` with `data.arrow` and `meta.json`. It is written beside its place
and moved there whole, so what is in place is complete. The fingerprint covers everything the tokens were made from; a
change of any of it makes another folder.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter

from .augmentation import change_picture, change_sound, generator, may_flip
from .config import AugmentationConfig, Segment, SourceConfig
from .media import decode_picture, decode_sound
from .sources import Source, open_source


logger = logging.getLogger(__name__)

# Part of every fingerprint: raise it when the same records must give other tokens than before.
FORMAT_VERSION = 1
BATCH_SIZE = 64


@dataclass(frozen=True)
class Vocabulary:
    """What packing needs to know of the processor.

    Attributes:
        modalities: names in the order of `modality_ids`, text first.
        bounds: (M + 1,) first ids of the modalities' contiguous ranges, and the size of the vocabulary.
    """

    modalities: tuple[str, ...]
    bounds: tuple[int, ...]
    pad: int
    bos: int
    eos: int

    @classmethod
    def of(cls, processor) -> "Vocabulary":
        ranges = processor.modality_token_ranges
        bounds = [ranges[name][0] for name in ranges] + [list(ranges.values())[-1][1]]
        if any(ranges[name][1] != bounds[i + 1] for i, name in enumerate(ranges)) or bounds[0] != 0:
            raise ValueError(
                f"modality_token_ranges={ranges} must be contiguous and start at 0, in the order of the names"
            )
        tokenizer = processor.tokenizer
        pad, bos, eos = (getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos"))
        return cls(tuple(ranges), tuple(bounds), pad, bos, eos)

    def modality_ids(self, input_ids: np.ndarray) -> np.ndarray:
        """The index of each token's modality."""
        return np.searchsorted(self.bounds, input_ids, side="right") - 1


class TokenColumn:
    """The ids of one segment of every record, in `variants` versions, read from the memory-mapped file.

    Attributes:
        lengths: (records, variants) number of tokens.
    """

    def __init__(self, chunks: Iterable):
        self._starts, self._bounds, self._values, lengths = [0], [], [], []
        for chunk in chunks:
            outer = np.asarray(chunk.offsets)
            inner = np.asarray(chunk.values.offsets)
            counts = np.diff(outer)
            self.variants = int(counts[0])
            assert (counts == self.variants).all()
            bounds = inner[outer[0] : outer[-1] + 1]
            self._bounds.append(bounds)
            self._values.append(np.asarray(chunk.values.values))
            self._starts.append(self._starts[-1] + len(counts))
            lengths.append(np.diff(bounds).reshape(-1, self.variants))
        self.lengths = np.concatenate(lengths)

    def ids(self, record: int, variant: int) -> np.ndarray:
        """Token ids of one version of one record.  (n,) int32"""
        chunk = int(np.searchsorted(self._starts, record, side="right")) - 1
        place = (record - self._starts[chunk]) * self.variants + variant % self.variants
        bounds = self._bounds[chunk]
        return self._values[chunk][bounds[place] : bounds[place + 1]]


class TokenizedSource:
    """Map-style tokens of a source.

    Attributes:
        config: the source's configuration.
        vocabulary: `Vocabulary` of the processor that made the tokens.
        fingerprint: over everything the tokens were made from.
        skipped: reasons and numbers of records left out (`on_error: skip`).
        columns: `Segment` -> `TokenColumn`; texts have one variant, pictures and sounds one or more.
    """

    def __init__(self, config: SourceConfig, folder: Path):
        self.config, self.folder = config, Path(folder)
        meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint, self.skipped = meta["fingerprint"], meta["skipped"]
        fields = meta["vocabulary"]
        self.vocabulary = Vocabulary(
            tuple(fields["modalities"]), tuple(fields["bounds"]), fields["pad"], fields["bos"], fields["eos"]
        )
        self.dataset = datasets.Dataset.from_file(str(self.folder / "data.arrow"))
        table = self.dataset.data.table
        self.columns = {segment: TokenColumn(table.column(str(segment)).chunks) for segment in config.segments}
        self.records = np.asarray(table.column("record"))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, list[list[int]]]:
        """The ids of every segment of a record, a list per variant."""
        row = self.dataset[int(index)]
        return {str(segment): row[str(segment)] for segment in self.columns}

    @property
    def variants(self) -> int:
        """The largest number of variants of any segment."""
        return max(column.variants for column in self.columns.values())

    @classmethod
    def prepare(
        cls,
        config: SourceConfig,
        processor,
        cache_dir: str | Path,
        num_proc: int = 1,
        augmentation: AugmentationConfig | None = None,
    ) -> "TokenizedSource":
        """Tokenise a source, or find it tokenised in `cache_dir`.

        Args:
            processor: a `MoTProcessor`.
            num_proc: processes that tokenise; 1: this one.
            augmentation: changed copies of pictures and sounds; None: each record as it is.

        Raises:
            ValueError: a record that cannot be used, by source, record number and column (`on_error: raise`), or
                nothing left of the source.
        """
        config.validate()
        source = open_source(config)
        fingerprint = _fingerprint(source, processor, augmentation)
        folder = Path(cache_dir) / f"{_file_name(config.name)}-{fingerprint[:16]}"
        if not (folder / "meta.json").is_file():
            _prepare(folder, fingerprint, source, processor, augmentation, num_proc)
        return cls(config, folder)


def _fingerprint(source: Source, processor, augmentation: AugmentationConfig | None) -> str:
    made_from = {
        "format": FORMAT_VERSION,
        "source": source.fingerprint,
        "processor": processor.fingerprint(),
        "segments": [str(segment) for segment in source.config.segments],
        "on_error": source.config.on_error,
        "augmentation": asdict(augmentation) if augmentation else None,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in name)


def _prepare(folder: Path, fingerprint: str, source: Source, processor, augmentation, num_proc: int) -> None:
    segments = source.config.segments
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    ids = datasets.List(datasets.List(datasets.Value("int32")))
    features = datasets.Features({"record": datasets.Value("int64")} | {str(segment): ids for segment in segments})
    skipped, written = dict(source.skipped), 0
    try:
        tokenizer = BatchTokenizer(source.config, processor, augmentation)
        with ArrowWriter(features=features, path=str(partial / "data.arrow")) as writer:
            for rows, reasons in _tokenised_batches(tokenizer, source, num_proc):
                for reason, count in reasons.items():
                    skipped[reason] = skipped.get(reason, 0) + count
                if rows["record"]:
                    writer.write_batch(rows)
                    written += len(rows["record"])
            if not written:
                raise ValueError(
                    f"source {source.config.name!r} ({source.config.path}) has no usable record; left out: {skipped}"
                )
            writer.finalize()
        meta = {
            "fingerprint": fingerprint,
            "records": written,
            "skipped": skipped,
            "vocabulary": asdict(Vocabulary.of(processor)),
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        try:
            partial.replace(folder)
        except OSError:
            # Another process was first; its tokens are the same.
            if not (folder / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if skipped:
        logger.warning("source %r: left out %s", source.config.name, skipped)


def _batches(source: Source) -> Iterator[list[tuple[int, dict]]]:
    batch = []
    for number, record in enumerate(source):
        batch.append((number, record))
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokenised_batches(tokenizer: "BatchTokenizer", source: Source, num_proc: int):
    if num_proc <= 1:
        yield from map(tokenizer, _batches(source))
        return
    import multiprocessing

    # Fresh processes: a forked one inherits torch's threads in an unusable state.
    with multiprocessing.get_context("spawn").Pool(num_proc) as pool:
        yield from pool.imap(tokenizer, _batches(source))


class BatchTokenizer:
    """Batches of numbered records to columns of ids, and counts of what was left out. Can go to other processes."""

    def __init__(self, config: SourceConfig, processor, augmentation: AugmentationConfig | None):
        self.config, self.processor, self.augmentation = config, processor, augmentation
        self.variants = augmentation.variants if augmentation else 1

    def __call__(self, batch: list[tuple[int, dict]]) -> tuple[dict[str, list], dict[str, int]]:
        usable, skipped = [], {}
        for number, record in batch:
            try:
                usable.append((number, self._inputs(number, record)))
            except ValueError as error:
                if self.config.on_error == "raise":
                    raise ValueError(
                        f"source {self.config.name!r}, record {number}: {error}; "
                        "mend or remove it, or set on_error: skip to leave such records out"
                    ) from error
                reason = str(error).split(":")[0][:80]
                skipped[reason] = skipped.get(reason, 0) + 1
        rows = {"record": [number for number, _ in usable]}
        for segment in self.config.segments:
            rows[str(segment)] = self._encode(segment, [inputs[segment] for _, inputs in usable])
        return rows, skipped

    def _inputs(self, number: int, record: dict) -> dict[Segment, list]:
        """What the processor is to encode for each segment of a record: a list over variants."""
        texts = {s: text_of(s, record) for s in self.config.segments if s.type == "text"}
        caption = "; ".join(texts.values())
        inputs: dict[Segment, list] = {segment: [text] for segment, text in texts.items()}
        for place, segment in enumerate(self.config.segments):
            if segment.type in ("image", "audio"):
                try:
                    inputs[segment] = self._media(segment.type, record.get(segment.column), caption, number, place)
                except ValueError as error:
                    raise ValueError(f"column {segment.column!r}: {error}") from error
            elif segment.type == "document":
                inputs[segment] = self._document(segment, record, number)
        return inputs

    def _media(self, kind: str, value, caption: str, number: int, place: int) -> list:
        """One picture or sound in all its variants, the first one unchanged."""
        config, changed = self.augmentation, range(1, self.variants)
        if kind == "image":
            picture = decode_picture(value)
            flip = may_flip(caption)
            return [picture] + [
                change_picture(picture, config, generator(config, number, v, place), flip) for v in changed
            ]
        wave, rate = decode_sound(value)
        waves = [wave] + [change_sound(wave, config, generator(config, number, v, place)) for v in changed]
        return [{"array": wave, "sampling_rate": rate} for wave in waves]

    def _document(self, segment: Segment, record: dict, number: int) -> list[list[dict]]:
        """An interleaved document in all its variants: lists of segments with decoded values."""
        parts = record.get(segment.column)
        if not isinstance(parts, list) or not parts:
            raise ValueError(f"column {segment.column!r} is {parts!r}, not a list of segments")
        caption = " ".join(part["text"] for part in parts if part.get("type") == "text" and part.get("text"))
        documents: list[list[dict]] = [[] for _ in range(self.variants)]
        for place, part in enumerate(parts):
            kind = part.get("type")
            if kind == "text":
                if not str(part.get("text") or "").strip():
                    raise ValueError(f"column {segment.column!r}, segment {place}: the text is empty")
                values = [part["text"]] * self.variants
            elif kind in ("image", "audio"):
                try:
                    values = self._media(kind, part.get(kind), caption, number, place)
                except ValueError as error:
                    raise ValueError(f"column {segment.column!r}, segment {place}: {error}") from error
            else:
                raise ValueError(
                    f"column {segment.column!r}, segment {place}: type {kind!r} is not text, image or audio"
                )
            for document, value in zip(documents, values, strict=True):
                document.append({"type": kind, kind: value})
        return documents

    def _encode(self, segment: Segment, inputs: list[list]) -> list[list[list[int]]]:
        """(records, variants) inputs -> the same nesting of lists of ids."""
        if segment.type == "text":
            return [[self._text_ids(text) for text in texts] for texts in inputs]
        if segment.type == "document":
            return [[self._document_ids(document) for document in documents] for documents in inputs]
        flat = [value for values in inputs for value in values]
        encode = self.processor.encode_images if segment.type == "image" else self.processor.encode_audio
        ids = iter(encode(flat) if flat else [])
        return [[list(next(ids)) for _ in values] for values in inputs]

    def _text_ids(self, text: str) -> list[int]:
        return list(self.processor.encode_segment({"type": "text", "text": text}))

    def _document_ids(self, document: list[dict]) -> list[int]:
        encoded: dict[int, list[int]] = {}
        for kind, encode in (("image", self.processor.encode_images), ("audio", self.processor.encode_audio)):
            places = [place for place, part in enumerate(document) if part["type"] == kind]
            if places:
                encoded |= zip(places, encode([document[place][kind] for place in places]), strict=True)
        return [
            token
            for place, part in enumerate(document)
            for token in (encoded[place] if place in encoded else self._text_ids(part["text"]))
        ]


def text_of(segment: Segment, record: dict) -> str:
    """The text of a segment: a column (a list is joined by commas), or a format over columns.

    Raises:
        ValueError: nothing is left of it.
    """
    values = {name: _plain(record.get(name)) for name in segment.columns}
    text = (segment.column.format(**values) if "{" in segment.column else values[segment.column]).strip()
    if not text:
        raise ValueError(f"the text of {segment} is empty")
    return text


def _plain(value) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
