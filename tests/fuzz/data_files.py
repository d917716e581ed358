"""Bad sources of data: damaged files and hostile records, beside good ones, in every format."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from training.config import build
from training.data import (
    AugmentationConfig,
    DataConfig,
    Preparing,
    RowStream,
    SourceConfig,
    TemplateConfig,
    TokenizedSource,
)
from training.data.config import Limits

from . import files, values
from .case import Case, Place, WrongResult
from .media import processors
from .values import INF, NAN


GOOD = 4  # good records of each source
SEGMENTS = ["text:txt", "image:png", "audio:wav"]
NAMES = (
    "data",
    "shard",
    "record",
    "the line",
    "the record",
    "segment",
    "column",
    "picture",
    "sound",
    "texts",
    "metadata",
    "path",
    "on_error",
    "source",
)


def read(rng: Random, place: Place) -> Case:
    """Prepare a source with a bad record or a damaged file. With `on_error: skip` the good records remain."""
    make = rng.choice([_bad_record, _bad_record, _bad_record, _damaged_file, _bad_settings])
    return make(rng, place)


def _prepared(
    folder: Path, source: SourceConfig, limits: Limits | None = None, augmentation: AugmentationConfig | None = None
) -> TokenizedSource:
    return TokenizedSource.prepare(
        source, Preparing(processors()[0], folder / "cache", augmentation, limits or Limits())
    )


def _rows(source: TokenizedSource, config: DataConfig | None = None) -> None:
    """Read the first rows of a stream over a source."""
    config = config or DataConfig(row_length=512, block_documents=8, sources=[source.config])
    stream = RowStream(config, [source])
    for index in range(3):
        stream.row(index)


# -------------------------------------------------------------------------------------------------------- good sources


def _good_records(rng: Random) -> list[dict[str, Any]]:
    return [
        {"txt": f"thing {n}", "png": files.picture(rng, size=(8, 8)), "wav": files.sound(rng, seconds=0.1)}
        for n in range(GOOD)
    ]


def _write(kind: str, folder: Path, records: list[dict[str, Any]]) -> Path:
    """Write a source of one shard.  -> its path"""
    folder.mkdir(exist_ok=True)
    path = folder / f"shard.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for number, record in enumerate(records):
                for suffix, value in record.items():
                    data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return path
    if kind == "parquet":
        binary = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [
            {"txt": r["txt"]}
            | {c: {"bytes": r[c], "path": None} if isinstance(r[c], bytes) else r[c] for c in ("png", "wav")}
            for r in records
        ]
        schema = pa.schema([("txt", pa.string()), ("png", binary), ("wav", binary)])
        parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        return path
    lines = b""
    for number, record in enumerate(records):
        written = {}
        for name, value in record.items():
            if isinstance(value, bytes):
                written[name] = f"{number}.{name}"
                (folder / written[name]).write_bytes(value)
            else:
                written[name] = value
        lines += json.dumps(written).encode() + b"\n"
    path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    return path


def _write_folder(folder: Path, records: list[dict[str, Any]]) -> Path:
    """Write a folder of pictures with captions beside them."""
    folder.mkdir(exist_ok=True)
    for number, record in enumerate(records):
        (folder / f"{number}.png").write_bytes(record["png"])
        (folder / f"{number}.txt").write_text(record["txt"])
    return folder


def good(folder: Path) -> None:
    """Read good sources of every format."""
    records = _good_records(Random(0))
    for kind in ("tar", "parquet", "jsonl", "jsonl.gz", "pictures"):
        segments, path = SEGMENTS, folder / kind
        if kind == "pictures":
            segments, path = ["text:text", "image:image"], _write_folder(path, records)
        else:
            path = _write(kind, path, records)
        prepared = _prepared(folder, SourceConfig("x", str(path), [TemplateConfig(segments, caption_first=None)]))
        if len(prepared) != GOOD:
            raise WrongResult(f"{len(prepared)} of {GOOD} records of {kind} are left")
        _rows(prepared)


# --------------------------------------------------------------------------------------------------------- bad records


_NAMES_IN_LINES: tuple = (
    "no-such", "a\0b", "a" * 300, "", ".", "/dev/zero", None, 3, [], {"bytes": None}, {"bytes": "x"}, ["a"], "é" * 200,
    "\ud800.png", "http://outside.invalid/a.png", {"array": [1.0], "sampling_rate": 1},
    {"array": None, "sampling_rate": -1},
    {"array": [1.0] * 1600, "sampling_rate": 11_127}, {"array": [[]], "sampling_rate": 16_000},
    {"array": ["a"], "sampling_rate": "b"},
)  # fmt: skip


def _bad_value(rng: Random, place: Place, folder: Path, column: str, kind: str) -> tuple[Any, str]:
    """Draw a value for a column of a record; a file that the record names is looked for in `folder`."""
    if column == "txt":
        value = rng.choice(
            [
                "\ud800",
                "a\udfff",
                "\0",
                "a\0b",
                "",
                " ",
                None,
                3,
                2.5,
                [],
                ["a"],
                {"a": 1},
                True,
                values.text(rng)[:5000],
            ]
        )
        if kind in ("parquet", "tar") and (
            not isinstance(value, str) or "\ud800" <= max(value, default="") <= "\udfff"
        ):
            value = "\0"
        return value, f"text {values.shown(value)}"
    secret = "secret.png" if column == "png" else "secret.wav"
    if kind not in ("parquet", "tar") and rng.random() < 0.6:
        others = [*_NAMES_IN_LINES, {"path": str(place.outside / secret)}]
        value = files.outside_path(rng, folder, place.outside, secret) if rng.random() < 0.2 else rng.choice(others)
        return value, f"{column} {values.shown(value)}"
    if kind == "parquet" and rng.random() < 0.5:
        paths = [str(place.outside / secret), f"../outside/{secret}", None, "a\0b", "x" * 300]
        value = {"bytes": rng.choice([None, b""]), "path": rng.choice(paths)}
        return value, f"{column} {values.shown(value)}"
    if rng.random() < 0.25:
        return files.pickled(place.ran), f"{column} that is a pickle"
    data, says = files.bad_picture(rng) if column == "png" else files.bad_sound(rng)
    return data, f"{column}: {says}"


def _bad_record(rng: Random, place: Place) -> Case:
    records = _good_records(rng)
    if rng.random() < 0.2:
        return _bad_captions(rng, place, records)
    kind, folder = rng.choice(["tar", "parquet", "jsonl", "jsonl", "jsonl.gz"]), place.inside / "data"
    folder.mkdir()
    column = rng.choice(["txt", "png", "wav"])
    bad, says = _bad_value(rng, place, folder, column, kind)
    segments = [segment for segment in SEGMENTS if rng.random() < 0.7 or segment.endswith(column)]
    if kind.startswith("jsonl") and rng.random() < 0.25:
        path = _write(kind, folder, records)
        line = _insert_bad_line(rng, path)
        return _case(rng, place, path, segments, f"{kind}: line {values.shown(line)}", least=GOOD)
    records.insert(rng.randrange(GOOD + 1), records[0] | {column: bad})
    return _case(rng, place, _write(kind, folder, records), segments, f"{kind}: {says}", least=GOOD)


_LINES = (
    b'{"txt": "a"', b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"3", b'{"txt": 1e999999}',
    b"\0", b"",
    b'{"txt": "\\ud800"}', b'{"txt": 1' + b"0" * 10_000 + b"}", b'{"txt": "a", "txt": "b"}', b'{"txt": NaN}',
    b'\xef\xbb\xbf{"txt": "a"}',
)  # fmt: skip


def _insert_bad_line(rng: Random, path: Path) -> bytes:
    is_zipped, line = path.suffix == ".gz", rng.choice(_LINES)
    lines = (gzip.decompress(path.read_bytes()) if is_zipped else path.read_bytes()).splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines) + 1), line + b"\n")
    path.write_bytes(gzip.compress(b"".join(lines)) if is_zipped else b"".join(lines))
    return line


def _bad_captions(rng: Random, place: Place, records: list[dict[str, Any]]) -> Case:
    """Write a folder of pictures with bad captions or metadata."""
    folder = _write_folder(place.inside / "data", records)
    (folder / "9.png").write_bytes(records[0]["png"])
    caption, least = folder / "9.txt", GOOD
    way = rng.choice(["link", "bytes", "bytes", "picture link", "metadata", "folder", "loop"])
    if way == "link":
        caption.symlink_to(place.outside / "secret.txt")
    elif way == "bytes":
        caption.write_bytes(
            rng.choice(
                [
                    b"\xff\xfe\xfd",
                    b"\0",
                    b"",
                    "\ud800".encode("utf-8", "surrogatepass"),
                    b"a" * 2**20,
                    files.pickled(place.ran),
                ]
            )
        )
    elif way == "picture link":
        (folder / "9.png").unlink()
        (folder / "9.png").symlink_to(place.outside / "secret.png")
        caption.write_text("a")
    elif way == "folder":
        caption.mkdir()
    elif way == "loop":
        caption.write_text("a")
        (folder / "loop").symlink_to(folder)
    else:
        name = files.outside_path(rng, folder, place.outside, "secret.png")
        kind, rows = (
            rng.choice(["jsonl", "csv"]),
            [f"{n}.png" for n in range(GOOD)] + [rng.choice([name, "no-such.png", "a\0b", "", "x" * 300])],
        )
        text = "".join(json.dumps({"file_name": row, "text": "a"}) + "\n" for row in rows)
        if kind == "csv":
            text = "file_name,text\n" + "".join(f"{row},a\n" for row in rows)
        (folder / f"metadata.{kind}").write_text(text)
        way, least = f"metadata.{kind} that names {values.shown(rows[-1])}", None
    return _case(rng, place, folder, ["text:text", "image:image"], f"pictures: {way}", least, format="pictures")


def _case(
    rng: Random, place: Place, path: Path, segments: list[str], says: str, least: int | None, **settings: Any
) -> Case:
    """Prepare a source with either kind of `on_error`.

    Args:
        least: with `skip` at least so many records are left; None: there may be none, for the file as a whole is bad.
    """
    on_error = rng.choice(["raise", "skip"])
    augmentation = AugmentationConfig(variants=2) if rng.random() < 0.2 else None
    limits = Limits(max_pixels=rng.choice([50_000_000, 10_000]), max_audio_seconds=rng.choice([600.0, 0.2]))

    def call() -> None:
        source = SourceConfig(
            "x", str(path), [TemplateConfig(segments, caption_first=None)], on_error=on_error, **settings
        )
        try:
            prepared = _prepared(place.inside, source, limits, augmentation)
        except ValueError as error:
            if on_error == "skip" and least:
                raise WrongResult(f"on_error: skip did not skip: {type(error).__name__}: {error}") from error
            raise
        if on_error == "skip" and least and len(prepared) < least:
            raise WrongResult(f"{len(prepared)} records are left of {least} good ones")
        _rows(prepared)

    return Case(f"{says}, on_error={on_error}", call, (*NAMES, path.name))


# ------------------------------------------------------------------------------------------------------- damaged files


def _damaged_file(rng: Random, place: Place) -> Case:
    records, folder = _good_records(rng), place.inside / "data"
    kind = rng.choice(["tar", "parquet", "jsonl", "jsonl.gz", "bomb", "tar of links"])
    if kind == "bomb":
        folder.mkdir()
        path = folder / "shard.jsonl.gz"
        path.write_bytes(files.zipped_bomb())
    elif kind == "tar of links":
        path = _tar_of_links(rng, place, folder)
    else:
        path = _write(kind, folder, records)
        path.write_bytes(files.damaged(rng, path.read_bytes()))
    segments = (
        SEGMENTS
        if kind in ("tar", "parquet", "jsonl", "jsonl.gz")
        else ["text:txt" if kind.startswith("tar") else "text:text"]
    )
    return _case(rng, place, path, segments, f"damaged {kind}", least=None)


def _tar_of_links(rng: Random, place: Place, folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "shard.tar", "w") as archive:
        member = tarfile.TarInfo(
            rng.choice(
                ["0.txt", "../outside/secret.txt", "/etc/x.txt", "a\0b.txt", "0" * 5000 + ".txt", "0." + "x" * 300]
            )
        )
        member.type = rng.choice(
            [
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.FIFOTYPE,
                tarfile.CHRTYPE,
                tarfile.REGTYPE,
                tarfile.DIRTYPE,
                b"S",
            ]
        )
        member.linkname = str(place.outside / "secret.txt")
        archive.addfile(member)
    if rng.random() < 0.5:
        size = tarfile.TarInfo("0.txt")
        size.size, size.type = (
            rng.choice([2**40, 2**62, 2**33]),
            rng.choice([tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME]),
        )
        (folder / "shard.tar").write_bytes(size.tobuf(tarfile.GNU_FORMAT) + b"a" * 512)
    return folder / "shard.tar"


# ------------------------------------------------------------------------------------------------------------ settings


# Section -> key -> bad values, as YAML holds them.
_SETTINGS: dict[str, dict[str, tuple]] = {
    "source": {
        "name": ("", "a/b", "..", "\0", "x" * 300, "é" * 200, None, 3),
        "path": ("", "no-such", "\0", "*", "**", "/dev/null", "http://outside.invalid/a.jsonl", "x" * 5000, None, 3),
        "format": ("nope", None, "parquet", "webdataset", "pictures", "dataset"),
        "weight": (0, -1, NAN, INF, "1"),
        "limit": (0, -1, NAN, 2.5, "3", 10**30),
        "match": ({"txt": "("}, {"nope": "a"}, {"txt": 3}, {3: "a"}, "txt", {"txt": "(a*)*b"}),
        "on_error": ("nope", None, 3),
        "split": ("nope", "", None),
        "templates": ([], None, [3], "text:txt"),
        "streaming": (3, "yes", True),
        "config": ("nope", 3),
        "revision": ("nope", 3),
    },
    "template": {
        "segments": (
            [], ["nope"], ["text:"], ["text:nope"], [3], None, "text:txt", ["text:{"], ["text:{0}"], ["text:{txt[0]}"],
            ["text:{txt.__class__}"], ["text:{txt!r:>99999999999}"], ["text:{txt:>3000000000}"], ["document:txt"],
            ["image:txt"], ["text:txt"] * 1000, ["text:{txt:{txt}}"],
        ),
        "weight": (0, -1, NAN, INF),
        "caption_first": (-1, 2, NAN, "x"),
        "caption_dropout": (-1, 2, NAN),
        "targets": ("nope", None),
    },
    "augmentation": {
        "variants": (0, -1, NAN, 2.5, "3"),
        "seed": (-1, NAN, 2**70, "x"),
        "shift": (-1, 1, NAN),
        "gain": (-1, NAN, INF, 10**9),
        "speed": (-1, 1, NAN, 0.999999999),
        "noise": (-1, NAN, INF),
        "brightness": (NAN, -1, 5),
        "flip": ("x", 3),
    },
    "data": {
        **dict.fromkeys(
            ("max_pixels", "max_audio_seconds", "max_record_bytes", "max_group_bytes"), (0, -1, NAN, INF, "x", 1)
        ),
        "row_length": (0, -1, 9, NAN, 10**12, "x"),
        "block_documents": (0, -1, 10**12, NAN),
        "replaced_codes": (-1, 2, NAN),
        "seed": (-1, NAN, 2**70),
    },
}  # fmt: skip


def _bad_settings(rng: Random, place: Place) -> Case:
    """Make a data section with a bad value, over a good shard."""
    path = _write(rng.choice(["jsonl", "parquet", "tar"]), place.inside / "data", _good_records(rng))
    section = rng.choice(list(_SETTINGS))
    name = rng.choice(sorted(_SETTINGS[section]))
    bad = rng.choice(_SETTINGS[section][name])
    template = {"segments": SEGMENTS, "caption_first": None}
    source = {"name": "x", "path": str(path), "templates": [template]}
    data = {"row_length": 512, "block_documents": 8, "sources": [source]}
    sections = {"template": template, "source": source, "data": data, "augmentation": {"variants": 2}}
    sections[section][name] = bad
    if section == "augmentation":
        data["augmentation"] = sections[section]

    def call() -> None:
        config = build(DataConfig, data)
        config.validate()
        _rows(_prepared(place.inside, config.sources[0], config.limits, config.augmentation), config)

    return Case(f"{section}: {name}={values.shown(bad)}", call, (name, *NAMES))
