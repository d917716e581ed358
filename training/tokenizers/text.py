"""Train a byte-level BPE text tokenizer: `python -m training.tokenizers.text --output DIR`."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_mot.hub_trust import load_tokenizer, reading
from modeling_mot.processing_vocabulary import SPECIAL_TOKENS, add_bos, set_special_attributes, special
from training.tokenizers.sources import (
    TEXT_SUFFIXES,
    add_output_arguments,
    add_source_arguments,
    carried_source,
    check_output,
    in_one_line,
    number,
    publish,
    read_column_values,
)


# Real words are shorter. A file that is not text may be one long word, and training takes the square of its length.
_MOST_WORD = 1000
_MOST_SAMPLE = 100_000


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` entries: special tokens, all 256 bytes, and merges.

    No text is out of vocabulary, and decoding gives back the exact text.

    Raises:
        ValueError: `vocab_size` has no room for a merge.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size <= smallest:
        raise ValueError(f"vocab_size={vocab_size} leaves no room for merges: bytes and special tokens take {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[special(token) for token in SPECIAL_TOKENS.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )

    # Words are cut for training alone; the tokenizer itself takes words of any length.
    as_words = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([as_words, pre_tokenizers.FixedLength(_MOST_WORD)])
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = as_words

    # transformers knows three of the special tokens as its own; the others are ours.
    common = {name: SPECIAL_TOKENS[name] for name in ("pad_token", "bos_token", "eos_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **common)
    set_special_attributes(tokenizer, {k: v for k, v in SPECIAL_TOKENS.items() if k not in common})
    add_bos(tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def read_texts(sources: list[str], columns: list[str], limit: int | None) -> Iterator[str]:
    """Yield the texts of columns and the lines of files. A column's value is text, even if it is the name of a file."""
    for value in read_column_values(sources, columns, limit, TEXT_SUFFIXES):
        if isinstance(value, Path):
            with open(value, encoding="utf-8") as lines, reading(f"{value} is no text in UTF-8"):
                yield from lines
        elif isinstance(value, str):
            yield value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.tokenizers.text", description=__doc__)
    add_output_arguments(parser)
    add_source_arguments(parser, "texts", "default: text, name, keywords, definition, example")
    parser.add_argument(
        "--vocab-size",
        type=number(int, ge=1, le=2**24),
        default=4096,
        help="entries, special tokens included (default: 4096)",
    )
    parser.add_argument(
        "--min-frequency",
        type=number(int, ge=0, le=2**63),
        default=2,
        help="a merge must occur this often (default: 2)",
    )
    parser.add_argument(
        "--from-pretrained",
        metavar="NAME",
        help="train nothing: take this fast tokenizer (Hub name or folder); assembling the processor extends it",
    )
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Run the command; return the figures that it prints."""
    arguments = build_parser().parse_args(argv)
    check_output(arguments.output, arguments.overwrite)

    # Load a tokenizer, or train one on all texts.
    if arguments.from_pretrained:
        with in_one_line("--from-pretrained: "):
            tokenizer = load_tokenizer(arguments.from_pretrained)
    else:
        where = arguments.source or [carried_source("emoji"), carried_source("definitions")]
        columns = arguments.column or ["text", "name", "keywords", "definition", "example"]
        with in_one_line():
            texts = list(read_texts(where, columns, arguments.limit))
            if not texts:
                raise ValueError(f"no text in {', '.join(where)}")
            tokenizer = train_text_tokenizer(texts, arguments.vocab_size, arguments.min_frequency)

    # The folder appears when it is complete.
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
        tokenizer.save_pretrained(Path(folder) / "text")
        publish(Path(folder) / "text", arguments.output)

    # How well a trained tokenizer compresses, on a sample of its texts.
    figures = {"vocab_size": len(tokenizer)}
    if not arguments.from_pretrained:
        sample = [text[:_MOST_SAMPLE] for text in texts[:: max(1, len(texts) // 2000)]]
        count = sum(len(ids) for ids in tokenizer(sample, add_special_tokens=False)["input_ids"])
        figures["characters_per_token"] = round(sum(map(len, sample)) / max(1, count), 3)
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
