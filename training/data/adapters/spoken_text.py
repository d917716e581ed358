"""Make a data set of texts, their sounds, and the timings of their words, with Debian's flite.

    apt-get install flite
    python -m training.data.adapters.spoken_text --out DIR --limit 2000

The texts are the carried definitions, or the lines of a file. Use the data set with a template that interleaves:

    - {segments: ["text:text", "audio:audio"], interleaving: {words: words}}

A text in which flite speaks other words than are written (letters that it does not know) is left out and counted.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from datasets import Audio, Features, Value
from pyarrow import parquet
from tqdm import tqdm

from training.data.adapters.parquet_folder import by_group, print_counts, refuse_full_folder, write_folder
from training.data.adapters.speech_synthesis import SAMPLING_RATE, VOICES, encode_opus, synthesise_words
from training.data.config import carried_path
from training.data.preparing.interleaving import timed


FEATURES = Features(
    id=Value("string"),
    text=Value("string"),
    audio=Audio(decode=False),
    words=[{"word": Value("string"), "start": Value("float64"), "end": Value("float64")}],
)
COMPRESSION = 0.98  # of libsndfile's Opus encoder, as of the carried speech
CARD = """# Texts with their speech and the timings of its words

`text`, `audio` (Ogg Opus, 16 kHz) and `words`, a list of `{{word, start, end}}` in seconds. Synthetic speech: flite's
voice `{voice}`, which permits free use. The texts are {texts}. Made by `python -m training.data.adapters.spoken_text`.
"""


def spoken(texts: Iterable[str], voice: str) -> tuple[list[dict], int]:
    """Make the rows of some texts, and count the texts that are left out."""
    rows, left_out = [], 0
    for text in texts:
        try:
            wave, words = synthesise_words(text, voice)
            timed(text, words, len(wave) / SAMPLING_RATE, "words")
        except ValueError:
            left_out += 1
            continue
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        sound = {"bytes": encode_opus(wave, COMPRESSION), "path": f"{name}.ogg"}
        rows.append({"id": name, "text": text, "audio": sound, "words": words})
    return rows, left_out


def carried_texts(limit: int | None) -> dict[str, list[str]]:
    """List the carried definitions by split; at most a tenth of `limit` are of the validation split."""
    texts = {}
    for split, most in (("train", limit), ("validation", limit and max(1, limit // 10))):
        table = parquet.read_table(carried_path() / "definitions" / f"{split}.parquet", columns=["word", "definition"])
        texts[split] = [f"{row['word']}: {row['definition']}" for row in table.to_pylist()[:most]]
    return texts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.adapters.spoken_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument("--texts", type=Path, help="file with a text on each line; default: the carried definitions")
    parser.add_argument("--voice", choices=VOICES, default="slt", help="flite's voice (default slt)")
    parser.add_argument("--limit", type=int, help="only the first so many texts")
    options = parser.parse_args(arguments)
    try:
        refuse_full_folder(options.out)
        # The carried texts have their splits; a file's lines are split here.
        if options.texts is None:
            texts = carried_texts(options.limit)
        else:
            lines = [line.strip() for line in options.texts.read_text(encoding="utf-8").splitlines()]
            rows = [{"text": line} for line in dict.fromkeys(filter(None, lines))][: options.limit]
            texts = {split: [row["text"] for row in rows] for split, rows in by_group(rows, "text").items()}

        # Speak them, and write them down.
        splits, left_out = {}, 0
        for split, of_split in texts.items():
            bar = tqdm(of_split, desc=split, unit=" texts", disable=not sys.stderr.isatty())
            splits[split], count = spoken(bar, options.voice)
            left_out += count
        if not any(splits.values()):
            raise ValueError(f"no text could be spoken; {left_out} were left out")
        source = "WordNet's definitions, as carried" if options.texts is None else f"the lines of {options.texts.name}"
        card = CARD.format(voice=options.voice, texts=source)
        counts = write_folder(options.out, {"default": (FEATURES, splits)}, card)
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{left_out} texts left out")
    print_counts(options.out, counts)


if __name__ == "__main__":
    main()
