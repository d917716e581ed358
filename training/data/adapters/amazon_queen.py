"""The speech of the game Flight of the Amazon Queen with its text, as a data set.

Get the package (35 MB; free to redistribute, not for resale alone):
    apt-get download flight-of-the-amazon-queen && dpkg -x flight-of-the-amazon-queen_*.deb unpacked
    python -m training.data.adapters.amazon_queen unpacked --out DIR

Human speech of many voices, MP3 at 11 kHz. Each line of dialogue in the `.DOG` tables is paired with its clips.
"""

import argparse
import re
import struct
from pathlib import Path

from datasets import Audio, Features, Value

from training.data.adapters.parquet_folder import by_group, print_counts, write_folder


FEATURES = Features(
    id=Value("string"),
    text=Value("string"),
    speaker=Value("string"),
    dialogue=Value("string"),
    audio=Audio(decode=False),
)
# A pause or a gesture between the sentences of a line: *03, *AF, *GD120.
_COMMAND = re.compile(r"\*(?:\d\d|[A-Z]{2}\d*)")
_BANK_HEADER = 20
CARD = """# Flight of the Amazon Queen: lines of dialogue with their speech

Human speech, English, many voices, MP3 at 11 kHz: `text`, `audio`, `speaker` (the hero Joe, or the other person of the
dialogue), `dialogue` (validation holds whole dialogues). Copyright John Passfield and Steven Stamatiadis; the game's
licence allows free distribution with its notices, not resale on its own. Made by
`python -m training.data.adapters.amazon_queen` from the Debian package `flight-of-the-amazon-queen`.
"""


def read_archive(data: bytes) -> dict[str, bytes]:
    """Read a `queen.1c` archive: file name -> content.

    Raises:
        ValueError: not such an archive.
    """
    if data[:4] != b"QTBL":
        raise ValueError(f"the archive starts with {data[:4]!r}, not b'QTBL'; give the package's queen.1c")
    (count,) = struct.unpack_from(">H", data, 13)
    files = {}
    for entry in range(count):
        name, _, offset, size = struct.unpack_from(">12sBII", data, 15 + 21 * entry)
        files[name.split(b"\0")[0].decode("latin-1")] = data[offset : offset + size]
    return files


def dialogue_lines(table: bytes) -> list[tuple[str, str]]:
    """Read (prefix, line) of a `.DOG` table. A prefix is dialogue number, line number and J (Joe) or P (other person).

    The table is big-endian: counts, then for each of the two speakers entries of a skipped word, the line's number, a
    length byte and the text, padded to four bytes.
    """
    table = table[_BANK_HEADER:]
    levels, _, dialogue, joe_lines, person_lines = struct.unpack_from(">5h", table)
    (person_start,) = struct.unpack_from(">H", table, 22)
    lines = []
    for speaker, position, count in (("J", 32 + abs(levels) * 96, joe_lines), ("P", person_start, person_lines)):
        for _ in range(count + 1):
            if position + 5 > len(table):
                break
            number, length = struct.unpack_from(">2xHB", table, position)
            text = table[position + 5 : position + 5 + length].decode("latin-1")
            lines.append((f"{dialogue:02d}{number:04X}{speaker}", text))
            position += -(-(5 + length) // 4) * 4
    return lines


def paired_clips(files: dict[str, bytes]) -> list[dict]:
    """Make one row for every clip whose text is known, sorted by id."""
    rows = {}
    for name, table in files.items():
        if not name.endswith(".DOG"):
            continue
        for prefix, line in dialogue_lines(table):
            for part, text in enumerate(_COMMAND.split(line), start=1):
                clip = f"{prefix}{part:X}"
                if text.strip() and f"{clip}.SB" in files:
                    rows[clip] = {
                        "id": clip,
                        "text": text.strip(),
                        "speaker": "joe" if prefix.endswith("J") else f"person {prefix[:2]}",
                        "dialogue": prefix[:2],
                        "audio": {"bytes": files[f"{clip}.SB"], "path": f"{clip}.mp3"},
                    }
    return [rows[clip] for clip in sorted(rows)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.adapters.amazon_queen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", type=Path, help="folder of the unpacked package, or queen.1c itself")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    options = parser.parse_args(arguments)
    found = [options.package] if options.package.is_file() else sorted(options.package.rglob("queen.1c"))
    if not found:
        parser.exit(1, f"error: {options.package} holds no queen.1c; unpack the package there\n")
    try:
        rows = paired_clips(read_archive(found[0].read_bytes()))
        counts = write_folder(options.out, {"default": (FEATURES, by_group(rows, "dialogue", 0.06))}, CARD)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print_counts(options.out, counts)


if __name__ == "__main__":
    main()
