"""Make a data set of real speech with its text and the timings of its words, as a speech recogniser hears them.

    python -m training.data.adapters.recognised_words SOUNDS --model openai/whisper-small --out DIR

SOUNDS is anything that a recipe's `path` may be: a folder of sounds, shards, a data set on the Hub. The model is a
Whisper, or any CTC model of transformers (wav2vec 2.0, HuBERT, MMS). The text is what the model hears; with `--text`
it is a column, and records in which the model hears other words are left out and counted. Use the data set with a
template that interleaves:

    - {segments: ["text:text", "audio:audio"], interleaving: {words: words}}
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import Audio, Features, Value
from tqdm import tqdm

from modeling_mot.speech_tokenizer import resample
from training.data.adapters.parquet_folder import print_counts, refuse_full_folder, write_folder
from training.data.config import FORMATS, Limits, Segment, SourceConfig, TemplateConfig
from training.data.preparing.interleaving import timed
from training.data.reading.records import decode_sound, text_of
from training.data.reading.sources import open_source


FEATURES = Features(
    text=Value("string"),
    audio=Audio(decode=False),
    words=[{"word": Value("string"), "start": Value("float64"), "end": Value("float64")}],
)
CARD = """# Speech with its text and the timings of its words

`text`, `audio` and `words`, a list of `{{word, start, end}}` in seconds, from `{path}` ({split}). The timings, and the
text unless it came with the sounds, are those of `{model}`.
Made by `python -m training.data.adapters.recognised_words`.
"""


def load_recogniser(model: str):
    """Load a recogniser of transformers by its Hub name or folder, on a GPU if there is one."""
    from transformers import pipeline

    device = 0 if torch.cuda.is_available() else -1
    return pipeline("automatic-speech-recognition", model=model, device=device, trust_remote_code=False)


def recognise(recogniser, wave, rate: int) -> tuple[str, list[dict]]:
    """Recognise a sound: its text, and {"word", "start", "end"} of each word, in order and within the sound.

    Args:
        wave, rate: samples, (N,) float32, and their rate in Hz.
    """
    ours = recogniser.feature_extractor.sampling_rate
    samples = resample(torch.from_numpy(wave), rate, ours).numpy()
    heard = recogniser({"raw": samples, "sampling_rate": ours}, return_timestamps="word")

    # Where the model hears no end, the word lasts as long as the sound; times overlap where its windows meet.
    words, last, seconds = [], 0.0, len(wave) / rate
    for chunk in heard["chunks"]:
        start, end = (seconds if time is None else float(time) for time in chunk["timestamp"])
        start = min(max(start, last), seconds)
        last = min(max(end, start), seconds)
        words.append({"word": chunk["text"].strip(), "start": round(start, 4), "end": round(last, 4)})
        last = words[-1]["end"]
    return heard["text"].strip(), words


def rows_of(source, recogniser, audio: str, text: str | None) -> tuple[list[dict], int]:
    """Make the rows of a source, and count the records that are left out.

    Args:
        audio: column of the sound.
        text: column of the text; None: what is heard.
    """
    rows, left_out = [], 0

    def row(record: dict) -> dict | None:
        wave, rate = decode_sound(record[audio], Limits())
        heard, words = recognise(recogniser, wave, rate)
        written = heard if text is None else text_of(Segment.parse(f"text:{text}"), record)
        try:
            timed(written, words, len(wave) / rate, "words")
        except ValueError:
            return None
        return {"text": written, "audio": as_file(record[audio]), "words": words}

    bar = tqdm(source.each(row), total=source.num_records, unit=" sounds", disable=not sys.stderr.isatty())
    for made in bar:
        if made is None:
            left_out += 1
        else:
            rows.append(made)
    return rows, left_out


def as_file(sound) -> dict:
    """Return the encoded file of a sound, as a column of sounds holds it."""
    if isinstance(sound, dict) and sound.get("bytes") is not None:
        return {"bytes": sound["bytes"], "path": Path(sound.get("path") or "sound").name}
    path = Path(sound["path"] if isinstance(sound, dict) else sound)
    return {"bytes": path.read_bytes(), "path": path.name}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.adapters.recognised_words",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sounds", help="a local folder or file, a glob of shards, or a data set's name on the Hub")
    parser.add_argument("--model", required=True, help="a recogniser's name on the Hub, or its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument("--audio", default="audio", help="column of the sounds (default audio)")
    parser.add_argument("--text", help="column of the texts; default: the text is what the model hears")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="of the sounds, as in a recipe")
    parser.add_argument("--config", help="configuration of the data set")
    parser.add_argument("--split", default="train", help="split of the data set (default train)")
    parser.add_argument("--limit", type=int, help="only the first so many records")
    options = parser.parse_args(arguments)
    columns = [f"audio:{options.audio}", *([f"text:{options.text}"] if options.text else [])]
    try:
        refuse_full_folder(options.out)
        config = SourceConfig(
            "sounds",
            options.sounds,
            [TemplateConfig(columns)],
            format=options.format,
            config=options.config,
            split=options.split,
            limit=options.limit,
        )
        rows, left_out = rows_of(open_source(config), load_recogniser(options.model), options.audio, options.text)
        if not rows:
            raise ValueError(f"{options.sounds} has no sound with words; {left_out} were left out")
        card = CARD.format(path=options.sounds, split=options.split, model=options.model)
        counts = write_folder(options.out, {"default": (FEATURES, {options.split: rows})}, card)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{left_out} records left out: the words are not those of the text, or none is heard")
    print_counts(options.out, counts)


if __name__ == "__main__":
    main()
