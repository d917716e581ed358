"""Write a data set as a folder of parquet files with a data card, whole or not at all."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
from datasets import Audio, Features, Image, Value
from pyarrow import parquet


ENCODED_FILE = {"bytes": Value("binary"), "path": Value("string")}


def write_split(rows: list[dict], features: Features, path: Path) -> None:
    """Make one parquet file that carries the features, pictures and sound as encoded bytes.

    `Audio(decode=False)`: decoding is left to soundfile, so that torchcodec is not needed to write or read the set.
    """
    stored = Features(
        {name: ENCODED_FILE if isinstance(kind, (Image, Audio)) else kind for name, kind in features.items()}
    )
    types = {field.name: field.type for field in stored.arrow_schema}
    columns = [pa.array([row[name] for row in rows], type=types[name]) for name in features]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_arrays(columns, schema=features.arrow_schema)
    parquet.write_table(table, path, compression="zstd", compression_level=19, row_group_size=4096)


def refuse_full_folder(out: Path) -> None:
    """Raise a ValueError if `out` holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not an empty folder; remove it or name another")


def write_folder(
    out: Path,
    configs: dict[str, tuple[Features, dict[str, list[dict]]]],
    card: str,
    files: dict[str, bytes] | None = None,
    head: str = "",
) -> dict[str, int]:
    """Write `{config: (features, {split: rows})}` to `out`; the first configuration is the default.

    Returns the numbers of rows by `config/split`.

    Args:
        card: the text of README.md after its YAML head, which is made here.
        head: more of the YAML head, such as the licence.
        files: other files, by path in the folder, such as licences.
    """
    refuse_full_folder(out)
    counts = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "folder"
        lines = ["---", *head.splitlines(), "configs:"]
        for number, (config, (features, splits)) in enumerate(configs.items()):
            lines += [f"- config_name: {config}", *(["  default: true"] if number == 0 else []), "  data_files:"]
            for split, rows in splits.items():
                if rows:
                    write_split(rows, features, folder / config / f"{split}.parquet")
                    lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
                    counts[f"{config}/{split}"] = len(rows)
        (folder / "README.md").write_text("\n".join([*lines, "---", "", card]), encoding="utf-8")
        for name, data in (files or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
    return counts


def held_out(group: str, share: float, salt: str = "") -> bool:
    """True if a group of records is held out: a fixed draw with probability `share`."""
    return int(hashlib.sha256(f"{salt} {group}".encode()).hexdigest()[:8], 16) < share * 2**32


def by_group(rows: list[dict], group: str, share: float = 0.1, salt: str = "") -> dict[str, list[dict]]:
    """Split into train and validation, so that no value of the column `group` is in both."""
    splits = {"train": [], "validation": []}
    for row in rows:
        splits["validation" if held_out(row[group], share, salt) else "train"].append(row)
    return splits


def print_counts(out: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        print(f"{name}: {count:,} rows")
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 1e6:.2f} MB")
