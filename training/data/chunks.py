"""Files of a prepared source: tables of ids and images, each written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from .config import Segment


# What follows a segment in the names of the columns of its images.
VALUES, SIZES = "|values", "|sizes"


def table_schema(segments: list[Segment], images: str | None) -> pa.Schema:
    """Columns of a prepared source whose images are kept as "pixels", "latents", or are codes (None)."""

    def lists(of: pa.DataType) -> pa.DataType:
        return pa.list_(pa.list_(of))

    columns = {"record": pa.int64()} | {str(segment): lists(pa.int32()) for segment in segments}
    for segment in segments if images else []:
        if segment.type in ("image", "document"):
            columns[f"{segment}{VALUES}"] = lists(pa.uint8() if images == "pixels" else pa.float16())
            columns[f"{segment}{SIZES}"] = lists(pa.int32())
    return pa.schema(columns)


def build_table(rows: dict[str, list], pixels: dict[str, list], schema: pa.Schema, vae) -> pa.Table:
    """A batch as written; images are laid out flat, without a Python object for each of their values."""
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
        for part, flat_values, offsets in ((VALUES, values, value_ends), (SIZES, sizes, 2 * ends)):
            inner = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat_values))
            columns[name + part] = pa.ListArray.from_arrays(pa.array(of_records, pa.int32()), inner)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def encode_latents(vae, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Latents of pictures, those of one size encoded together.  (3, H, W) uint8 -> (C, h, w) float16, each"""
    import torch

    from modeling_mot.latent_vae import encode_pixels

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
    """Write chunk `number` of a part and, after it, its description: what has one is whole.

    Args:
        tables: its records; none where all that was read was left out.
        described: what to note of it beside `file`, `records`, `size` and `sha256`.
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
    write_description(folder / f"{name}.json", described)


def written_chunks(folder: Path, part: int) -> Iterator[dict]:
    """Descriptions of the whole chunks of a part, in order, up to the first that is not."""
    number = 0
    while (path := folder / f"{part:05d}-{number:05d}.json").is_file():
        try:
            described = read_description(path)
        except ValueError:
            return
        if "file" in described and chunk_damage(folder, described):
            return
        yield described
        number += 1


def write_description(path: Path, described: dict) -> None:
    """Write a JSON object with its own hash."""
    write_whole(path, json.dumps(described | {"digest": _digest(described)}, indent=1).encode())


def read_description(path: Path) -> dict:
    """What `write_description` wrote.

    Raises:
        ValueError: it is not as it was written.
    """
    try:
        described = json.loads(path.read_bytes())
        if described.pop("digest") == _digest(described):
            return described
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path.name} is not as it was written")


def _digest(described: dict) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def chunk_damage(folder: Path, described: dict, anew: bool = False) -> str | None:
    """What is wrong with a chunk; None: nothing.

    A process hashes a file once, and again when its size, time of change or inode are others.

    Args:
        anew: hash it in any case.
    """
    path = folder / described["file"]
    try:
        found = path.stat()
    except OSError as error:
        return f"{path.name} is missing: {error.strerror}"
    if found.st_size != described["size"]:
        return f"{path.name} has {found.st_size} bytes instead of {described['size']}"
    digest = _file_digest.__wrapped__ if anew else _file_digest
    if digest(path, found.st_size, found.st_mtime_ns, found.st_ino) != described["sha256"]:
        return f"{path.name} has another hash than was noted when it was written"
    return None


@cache
def _file_digest(path: Path, size: int, changed: int, inode: int) -> str:
    with pa.memory_map(str(path)) as file:
        return hashlib.sha256(file.read_buffer()).hexdigest()


def open_chunk(path: Path) -> pa.Table:
    """A chunk, memory-mapped. The file itself does not stay open: a source may have more than a process may open."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def write_whole(path: Path, data) -> None:
    """Write a file beside its place and move it there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
