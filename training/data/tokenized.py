"""A source as tokens and, where images stay continuous, pixels or latents: prepared once, kept on disk as Arrow,
memory-mapped.

A prepared source is a folder `<name>-<fingerprint>/` with `data.arrow` and `meta.json`. It is written beside its place
and moved there whole, so what is in place is complete. The fingerprint covers everything the tokens were made from; a
change of any of it makes another folder.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from .batch_tokenizer import BatchTokenizer, text_of
from .columns import ImageColumn, TokenColumn, Vocabulary
from .config import AugmentationConfig, Segment, SourceConfig
from .sources import Source, open_source


__all__ = ["TokenizedSource", "Vocabulary", "text_of"]


logger = logging.getLogger(__name__)

# Part of every fingerprint: raise it when the same records must give other tokens than before.
FORMAT_VERSION = 2
BATCH_SIZE = 64
# What follows a segment in the names of the columns of its images.
_VALUES, _SIZES = "|values", "|sizes"


class TokenizedSource:
    """Map-style tokens of a source.

    Attributes:
        config: the source's configuration.
        vocabulary: `Vocabulary` of the processor that made the tokens.
        fingerprint: over everything the tokens were made from.
        skipped: reasons and numbers of records left out (`on_error: skip`).
        columns: `Segment` -> `TokenColumn`; texts have one variant, pictures and sounds one or more.
        images: what images are kept as, "pixels" or "latents"; None where they are codes.
        image_columns: `Segment` -> `ImageColumn` of the segments that may hold images; none where images are codes.
    """

    def __init__(self, config: SourceConfig, folder: Path):
        self.config, self.folder = config, Path(folder)
        meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint, self.skipped = meta["fingerprint"], meta["skipped"]
        self.vocabulary = Vocabulary.from_dict(meta["vocabulary"])
        self.dataset = datasets.Dataset.from_file(str(self.folder / "data.arrow"))
        table = self.dataset.data.table
        self.columns = {segment: TokenColumn(table.column(str(segment)).chunks) for segment in config.segments}
        self.records = np.asarray(table.column("record"))
        self.images = meta["images"]
        self.image_columns = {
            segment: ImageColumn(
                *(TokenColumn(table.column(f"{segment}{part}").chunks) for part in (_VALUES, _SIZES)), meta["channels"]
            )
            for segment in config.segments
            if f"{segment}{_VALUES}" in table.column_names
        }

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
        vae=None,
    ) -> "TokenizedSource":
        """Tokenise a source, or find it tokenised in `cache_dir`.

        Args:
            processor: a `MoTProcessor`.
            num_proc: processes that tokenise; 1: this one.
            augmentation: changed copies of pictures and sounds; None: each record as it is.
            vae: for a processor that keeps pictures as pixels: an autoencoder of diffusers, whose latents are kept as
                float16 in their place; None: the pixels are kept, as uint8.

        Raises:
            ValueError: a record that cannot be used, by source, record number and column (`on_error: raise`), or
                nothing left of the source.
        """
        config.validate()
        source = open_source(config)
        if getattr(processor, "image_processor", None) is None:
            vae = None
        fingerprint = _fingerprint(source, processor, augmentation, vae)
        folder = Path(cache_dir) / f"{_file_name(config.name)}-{fingerprint[:16]}"
        if not (folder / "meta.json").is_file():
            _prepare(folder, fingerprint, source, processor, augmentation, num_proc, vae)
        return cls(config, folder)


def _fingerprint(source: Source, processor, augmentation: AugmentationConfig | None, vae) -> str:
    made_from = {
        "format": FORMAT_VERSION,
        "source": source.fingerprint,
        "processor": processor.fingerprint(),
        "segments": [str(segment) for segment in source.config.segments],
        "on_error": source.config.on_error,
        "augmentation": asdict(augmentation) if augmentation else None,
    }
    if vae is not None:
        from modeling_mot.latents_mot import vae_fingerprint

        made_from["vae"] = vae_fingerprint(vae)
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in name)


def _prepare(folder: Path, fingerprint: str, source: Source, processor, augmentation, num_proc: int, vae) -> None:
    segments = source.config.segments
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = BatchTokenizer(source.config, processor, augmentation)
    images = None if not tokenizer.continuous else "pixels" if vae is None else "latents"
    features = _features(segments, images)
    skipped, written = dict(source.skipped), 0
    try:
        with ArrowWriter(features=features, path=str(partial / "data.arrow")) as writer:
            for rows, pixels, reasons in _tokenised_batches(tokenizer, source, num_proc):
                for reason, count in reasons.items():
                    skipped[reason] = skipped.get(reason, 0) + count
                if rows["record"]:
                    writer.write_table(_table(rows, pixels, features, vae))
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
            "images": images,
            "channels": vae.config.latent_channels if images == "latents" else 3,
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


def _features(segments: list[Segment], images: str | None) -> datasets.Features:
    def lists(of: str) -> datasets.List:
        return datasets.List(datasets.List(datasets.Value(of)))

    features = {"record": datasets.Value("int64")} | {str(segment): lists("int32") for segment in segments}
    for segment in segments if images else []:
        if segment.type in ("image", "document"):
            features[f"{segment}{_VALUES}"] = lists("uint8" if images == "pixels" else "float16")
            features[f"{segment}{_SIZES}"] = lists("int32")
    return datasets.Features(features)


def _table(rows: dict[str, list], pixels: dict[str, list], features: datasets.Features, vae) -> pa.Table:
    """A batch as written; images are laid out flat, without a Python object for each of their values."""
    schema = features.arrow_schema
    columns = {name: pa.array(values, type=schema.field(name).type) for name, values in rows.items()}
    for name, records in pixels.items():
        versions = [images for variants in records for images in variants]
        flat = [image for images in versions for image in images]
        if vae is not None:
            flat = encode_latents(vae, flat)
        dtype = np.uint8 if vae is None else np.float16
        values = np.concatenate([image.ravel() for image in flat]) if flat else np.empty(0, dtype)
        sizes = np.array([image.shape[1:] for image in flat], dtype=np.int32).ravel()
        lengths = np.array([image.size for image in flat], dtype=np.int64)
        # Where the images of each version end, then where the versions of each record end.
        ends = np.concatenate([[0], np.cumsum([len(images) for images in versions], dtype=np.int64)])
        of_records = np.concatenate([[0], np.cumsum([len(variants) for variants in records], dtype=np.int64)])
        value_ends = np.concatenate([[0], np.cumsum(lengths)])[ends]
        for part, flat_values, offsets in ((_VALUES, values, value_ends), (_SIZES, sizes, 2 * ends)):
            inner = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat_values))
            columns[name + part] = pa.ListArray.from_arrays(pa.array(of_records, pa.int32()), inner)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def encode_latents(vae, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Latents of pictures, those of one size encoded together.  (3, H, W) uint8 -> (C, h, w) float16, each"""
    import torch

    from modeling_mot.latents_mot import encode_pixels

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


def _batches(source: Source) -> Iterator[list[tuple[int, dict]]]:
    batch = []
    for number, record in enumerate(source):
        batch.append((number, record))
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokenised_batches(tokenizer: BatchTokenizer, source: Source, num_proc: int):
    if num_proc <= 1:
        yield from map(tokenizer, _batches(source))
        return
    import multiprocessing

    # Fresh processes: a forked one inherits torch's threads in an unusable state.
    with multiprocessing.get_context("spawn").Pool(num_proc) as pool:
        yield from pool.imap(tokenizer, _batches(source))
