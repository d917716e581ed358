"""The data section of a recipe: sources, how their columns become documents, augmentation, rows."""

import math
import os
import re
import string
import sys
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from training.config import check_options, option


SEGMENT_TYPES = ("text", "image", "audio", "document")
TARGETS = ("all", "last")
LATENTS = ("cached", "on_the_fly")
# The roles in which a picture may stand in a document, in this order; see training/data/roles.py.
ROLES = ("noised", "latents", "features")
FORMATS = ("auto", "dataset", "pictures", "sounds", "jsonl", "parquet", "text", "webdataset")
# Variants are counted in 16 bits; a row and the documents of a block are held in memory.
_MOST_VARIANTS, _MOST_LENGTH = 2**15 - 1, 2**24
# Pillow opens no larger picture; sums of bytes stay within 64 bits.
_MOST_PIXELS, _MOST_BYTES = 178_956_970, sys.maxsize // 2
# Shares that are written with three digits add up to about 1.
_MOST_LOST_SHARE = 0.002
MODALITY_OF_TYPE = {"text": "text", "image": "image", "audio": "speech"}


@dataclass(frozen=True)
class Segment:
    """`type:column`. A text may also be a format over columns: `text:{word}: {definition}`."""

    type: str
    column: str

    @classmethod
    @lru_cache(maxsize=1024)
    def parse(cls, written: str) -> "Segment":
        """Read a segment as it is written in a recipe; the type `speech` is another name of `audio`.

        Raises:
            ValueError: an unknown type, or no format over columns.
        """
        kind, separator, column = written.partition(":")
        kind = "audio" if kind == "speech" else kind
        if kind not in SEGMENT_TYPES or not separator or not column.strip():
            raise ValueError(
                f"segments has {written!r}; write type:column with a type of {', '.join(SEGMENT_TYPES)} (or speech), "
                "such as image:picture or text:{word}: {definition}"
            )
        if "{" in column and kind != "text":
            raise ValueError(f"segments has {written!r}; only a text can be a format, write {kind}:column")
        segment = cls(kind, column if "{" in column else column.strip())
        try:
            if "" in segment.columns:
                raise ValueError("a column has no name")
            # A few letters of width or precision could ask for gigabytes of text.
            if any(len(number) > 4 for _, _, form, _ in segment.parts for number in re.findall(r"\d+", form or "")):
                raise ValueError("a width has more than four digits")
            segment.fill(dict.fromkeys(segment.columns, ""))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"segments has {written!r}, which is no format over columns such as text:{{word}}: {{definition}}: "
                f"{error}"
            ) from error
        return segment

    @cached_property
    def parts(self) -> list[tuple[str, str | None, str, str | None]]:
        """List (text before a column, column, format, conversion); the last may have no column."""
        if "{" not in self.column:
            return [("", self.column, "", None)]
        return list(string.Formatter().parse(self.column))

    @cached_property
    def columns(self) -> list[str]:
        """The columns that the segment reads."""
        return [name for _, name, _, _ in self.parts if name is not None]

    @cached_property
    def dispensable(self) -> set[str]:
        """The columns without which a format still reads well: each stands alone, between ends of sentences."""
        if len(self.columns) < 2:
            return set()
        afters = [before for before, *_ in self.parts[1:]] + [""]
        return {
            name
            for (before, name, *_), after in zip(self.parts, afters, strict=True)
            if name is not None and not after.strip() and re.search(r"(^\s*|[.!?…][\"')\]]*\s+)$", before)
        }

    def fill(self, values: dict[str, str]) -> str:
        """Put a text for each column into the format."""
        if "{" not in self.column:
            return values[self.column]
        formatter, text = string.Formatter(), ""
        for before, name, form, conversion in self.parts:
            text += before
            if name is not None:
                text += formatter.format_field(formatter.convert_field(values[name], conversion), form)
        return text

    def __str__(self) -> str:
        return f"{self.type}:{self.column}"


@dataclass(frozen=True)
class InterleavingConfig:
    """A text and its sound by turns: the document changes from one to the other at words that are drawn.

    The lengths are those of SpiRit-LM (arXiv 2402.05755, appendix A), which balance the tokens of text and of speech.
    """

    words: str = option(
        "words", "column with the words' timings: a list of {word: ..., start: ..., end: ...}, in seconds"
    )
    text_words: tuple[int, int] = option((10, 30), "fewest and most words of a stretch of text", ge=1, le=_MOST_LENGTH)
    speech_words: tuple[int, int] = option(
        (5, 15), "fewest and most words of a stretch of speech", ge=1, le=_MOST_LENGTH
    )
    variants: int = option(
        4, "draws that are kept of each record; a record that comes again is another", ge=1, le=_MOST_VARIANTS
    )
    seed: int = option(0, "of the draws", ge=0)

    def __post_init__(self):
        self.validate()

    def validate(self) -> None:
        """Raise a ValueError that names the field, the value and the way out, where one is wrong."""
        check_options(self)
        for name in ("text_words", "speech_words"):
            fewest, most = getattr(self, name)
            if fewest > most:
                raise ValueError(
                    f"{name}=[{fewest}, {most}] has its bounds the wrong way round; write [{most}, {fewest}]"
                )


@dataclass(frozen=True)
class Interleaved(Segment):
    """A text and its sound by turns, made of two segments of a record and the timings in `column`."""

    text: Segment
    audio: Segment
    settings: InterleavingConfig

    def __str__(self) -> str:
        how = self.settings
        lengths = f"text {how.text_words[0]}-{how.text_words[1]}, speech {how.speech_words[0]}-{how.speech_words[1]}"
        drawn = f"{lengths}, {how.variants} variants, seed {how.seed}"
        return f"{self.text} by turns with {self.audio} at {self.column} ({drawn})"


def local_path(written: str, name: str) -> Path:
    """Expand the `~` that a path may begin with.

    Raises:
        ValueError: it begins with the home of an unknown user.
    """
    try:
        return Path(written).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name}={written}: {error}; write the path out") from error


def _check_sum(what: str, weighted: "list[TemplateConfig] | list[SourceConfig]") -> None:
    if not math.isfinite(sum(entry.weight for entry in weighted)):
        raise ValueError(f"the {what} add up to more than a number holds; give smaller ones, only their ratios count")


@dataclass
class TemplateConfig:
    """How the columns of a record become a document. A source draws one of its templates for each document."""

    segments: list[str] = option(doc="type:column for each segment; type is text, image, audio or document")
    weight: float = option(1.0, "share among the templates of the source", gt=0)
    caption_first: float | None = option(
        0.8,
        "probability that the text stands before the pictures and sounds, else after; null: always as written",
        ge=0,
        le=1,
    )
    caption_dropout: float = option(
        0.0,
        "probability of dropping the text that stands before the first picture or sound (for guidance); with targets: "
        "last and caption_first: null, of dropping all texts before the last segment, such as an instruction",
        ge=0,
        le=1,
    )
    targets: str = option(
        "all",
        "all, or last: only the last segment is learnt. Labels before it are left out and earlier continuous images "
        "are clean; the BOI before a picture is a target, and so is the end of the document",
    )
    interleaving: InterleavingConfig | None = field(
        default=None, metadata={"doc": "the text and its sound by turns, at words; null: one after the other"}
    )
    roles: dict[str, list[str]] | None = option(
        None,
        "for models that look at pictures through an encoder and draw them too: column of a picture -> its copies, out "
        "of noised (learnt), latents and features; null: a learnt one is noised and, if something follows, all three; "
        "one before is latents and features, or features alone if the last segment is a text",
    )
    latents_dropout: float = option(0.0, "with roles: probability of leaving out a copy as latents", ge=0, lt=1)
    features_dropout: float = option(0.0, "with roles: probability of leaving out a copy as features", ge=0, lt=1)

    def __post_init__(self):
        self.validate()

    @property
    def parsed(self) -> list[Segment]:
        """The segments, read."""
        return [Segment.parse(written) for written in self.segments]

    @property
    def interleaved(self) -> Interleaved | None:
        """The segment that takes the place of a text and its sound, None where they stand one after the other."""
        if self.interleaving is None:
            return None
        text, audio = sorted(self.parsed, key=lambda segment: segment.type != "text")
        return Interleaved("interleaved", self.interleaving.words, text, audio, self.interleaving)

    @property
    def has_both(self) -> bool:
        """True if there are texts as well as pictures or sounds, so that their order can be drawn."""
        kinds = {segment.type for segment in self.parsed}
        return self.interleaving is None and "text" in kinds and bool(kinds & {"image", "audio"})

    def validate(self) -> None:
        """Raise a ValueError that names the field, the value and the way out, where one is wrong."""
        check_options(self)
        if not self.segments:
            raise ValueError("segments is empty; name at least one, such as [text:caption, image:image]")
        kinds = [segment.type for segment in self.parsed]
        if "document" in kinds and len(kinds) > 1:
            raise ValueError(f"segments={self.segments}: a document column is a whole document; give it alone")
        if self.targets not in TARGETS:
            raise ValueError(
                f"targets={self.targets!r} of template {self.segments} must be one of {', '.join(TARGETS)}"
            )
        turns = sum((a == "text") != (b == "text") for a, b in zip(kinds, kinds[1:], strict=False))
        if self.has_both and self.caption_first is not None and turns > 1:
            raise ValueError(
                f"segments={self.segments} interleaves text with pictures or sounds, so caption_first="
                f"{self.caption_first} has no meaning; set caption_first: null to keep the order as written"
            )
        for column, roles in (self.roles or {}).items():
            if Segment("image", column) not in self.parsed:
                raise ValueError(
                    f"roles names {column!r}, which is no picture of segments={self.segments}; name the column of an "
                    "image: segment"
                )
            if not roles or len(set(roles)) < len(roles) or not set(roles) <= set(ROLES):
                raise ValueError(
                    f"roles.{column}={roles} must be one or more of {', '.join(ROLES)}, each once; leave the segment "
                    "out for none"
                )
        if self.interleaving is not None:
            self.interleaving.validate()
            if sorted(kinds) != ["audio", "text"]:
                raise ValueError(
                    f"segments={self.segments} with interleaving: a text and its sound are interleaved, nothing else; "
                    "write [text:column, audio:column], or leave interleaving out"
                )
            for name, neutral in (("targets", "all"), ("caption_dropout", 0.0)):
                if (value := getattr(self, name)) != neutral:
                    raise ValueError(
                        f"{name}={value!r} of template {self.segments} has no meaning with interleaving, whose "
                        f"documents are learnt whole; leave {name} out"
                    )


@dataclass
class SourceConfig:
    """One data set. `path` is `carried`, a local folder or file, or a data set's name on the Hub."""

    name: str = option(doc="name of the source, used in reports and in the order; unique")
    path: str = option(
        doc="carried, a local folder or file, a glob of shards (/data/*.tar, hf://datasets/owner/name/*.parquet), or a "
        "name on the Hub"
    )
    templates: list[TemplateConfig] = option(doc="how its columns become documents")
    format: str = option(
        "auto",
        "auto, dataset, pictures or sounds (a folder of them with captions), or shards that are read one by one, "
        "without a copy: jsonl (also .gz, .zst), parquet, text (.txt, one record a line), webdataset (.tar)",
    )
    config: str | None = option(None, "configuration of the data set")
    split: str = option(
        "train", "split of the data set; in a folder, files in folders named as a split, such as validation, are of it"
    )
    revision: str | None = option(None, "revision of a data set on the Hub")
    weight: float = option(1.0, "share in the mixture, in the unit of data.weights_by", gt=0)
    streaming: bool = option(False, "read over the network without a local copy of the raw data set")
    match: dict[str, str] | None = option(
        None, "column -> regular expression; only records in whose columns they are found; null: all"
    )
    limit: int | None = option(None, "only the first N records, of those that match; null: all", ge=1, le=sys.maxsize)
    on_error: str = option(
        "raise", "what to do with a record, or the rest of a shard, that cannot be used: raise, or skip and count"
    )

    def __post_init__(self):
        self.validate()

    @property
    def segments(self) -> list[Segment]:
        """All different segments of all templates, in order."""
        return list(dict.fromkeys(segment for template in self.templates for segment in template.parsed))

    @property
    def prepared_segments(self) -> list[Segment]:
        """All segments whose tokens are kept: those of the templates, then the interleaved ones."""
        interleaved = [template.interleaved for template in self.templates]
        return [*self.segments, *dict.fromkeys(segment for segment in interleaved if segment is not None)]

    def validate(self) -> None:
        """Raise a ValueError that names the field, the value and the way out, where one is wrong."""
        if not self.name or not self.path:
            raise ValueError(f"name={self.name!r} and path={self.path!r} of a source must not be empty")
        for name in ("name", "path", "config", "split", "revision"):
            if re.search("[\0\ud800-\udfff]", value := getattr(self, name) or ""):
                raise ValueError(f"{name}={value!r} of source {self.name!r} holds a character that no name has")
        check_options(self, f"source {self.name!r:.120}: ")
        if not self.templates:
            raise ValueError(f"source {self.name!r} has no templates; give at least one with its segments")
        _check_sum(f"weights of the templates of source {self.name!r}", self.templates)
        for column, expression in (self.match or {}).items():
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(
                    f"match.{column}={expression!r} of source {self.name!r} is no regular expression: {error}"
                ) from error
        for name, allowed in (("on_error", ("raise", "skip")), ("format", FORMATS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} of source {self.name!r} must be one of {', '.join(allowed)}"
                )


@dataclass
class AugmentationConfig:
    """Changed copies of pictures and sounds, made before they become tokens.

    Variant 0 of a record is the record as it is. The other `variants - 1` are changed.
    """

    variants: int = option(
        4, "tokenised variants of each record, the unchanged one among them", ge=1, le=_MOST_VARIANTS
    )
    seed: int = option(0, "of the changes", ge=0)
    shift: float = option(
        0.06, "pictures: largest shift in each direction, as a share of the side, on white", ge=0, lt=1
    )
    flip: bool = option(True, "pictures: mirror half of them, if the caption stays true (no directions, texts, ...)")
    brightness: float = option(0.1, "pictures: largest relative change of brightness", ge=0, lt=1)
    contrast: float = option(0.1, "pictures: largest relative change of contrast", ge=0, lt=1)
    saturation: float = option(0.2, "pictures: largest relative change of saturation", ge=0, lt=1)
    gain: float = option(6.0, "sound: largest change of level, in dB", ge=0, le=100)
    speed: float = option(0.08, "sound: largest relative change of speed and pitch together, by resampling", ge=0, lt=1)
    noise: float = option(0.003, "sound: largest level of added white noise, as a share of full scale", ge=0, le=1)

    def __post_init__(self):
        self.validate()

    def validate(self) -> None:
        """Raise a ValueError that names the field, the value and the way out, where one is wrong."""
        check_options(self)


@dataclass(frozen=True)
class Limits:
    """The most that one record may take. It is checked before anything is decoded: no file can fill the memory."""

    max_pixels: int = 50_000_000
    max_audio_seconds: float = 600.0
    max_record_bytes: int = 2**26
    max_group_bytes: int = 2**31


@dataclass
class DataConfig:
    """Sources, how they are mixed, and the rows that their documents are packed into."""

    row_length: int = option(512, "tokens of a row", ge=8, le=_MOST_LENGTH)
    seed: int = option(0, "of the order of records, templates and variants", ge=0)
    sources: list[SourceConfig] = field(default_factory=list, metadata={"doc": "training sources"})
    validation_sources: list[SourceConfig] = field(default_factory=list, metadata={"doc": "held-out sources"})
    weights_by: str = option("documents", "what the sources' weights are shares of: documents or tokens")
    token_shares: dict[str, float] | None = option(
        None,
        "modality -> its share of all tokens, such as {text: 0.5, image: 0.5}; captions and markers are text. The "
        "weights of sources then count only among those of the same modality; null: the weights alone decide",
        gt=0,
        le=1,
    )
    block_documents: int | None = option(
        None,
        "documents that are mixed and packed together; more: fuller rows; null: 1,024 or, for rows of more than 1,024 "
        "tokens, as many as make 256 rows",
        ge=1,
        le=_MOST_LENGTH,
    )
    replaced_codes: float = option(
        0.0,
        "largest share of a document's picture codes and speech units that are random in the input; targets stay",
        ge=0,
        le=1,
    )
    latents: str = option(
        "cached",
        "latents of images that stay continuous: cached (encoded once, kept on disk) or on_the_fly (pixels are kept)",
    )
    clean_copies: bool = option(
        False,
        "repeat each learnt continuous image, clean and at the same positions, if other tokens follow it; for a model "
        "in which later tokens do not see noised images",
    )
    cache_dir: str | None = option(
        None, "folder of tokenised data; null: MOT_CACHE or ~/.cache/mixture_of_transformers"
    )
    augmentation: AugmentationConfig | None = option(None, "changed copies of training pictures and sounds; null: none")
    max_pixels: int = option(
        Limits.max_pixels, "largest picture that is decoded, width x height", gt=0, le=_MOST_PIXELS
    )
    max_audio_seconds: float = option(Limits.max_audio_seconds, "longest sound that is decoded", gt=0, le=_MOST_BYTES)
    max_record_bytes: int = option(
        Limits.max_record_bytes,
        "largest record of a shard: a line of JSONL, the members of a webdataset key",
        gt=0,
        le=_MOST_BYTES,
    )
    max_group_bytes: int = option(
        Limits.max_group_bytes, "largest row group of a parquet shard, decompressed", gt=0, le=_MOST_BYTES
    )

    @property
    def limits(self) -> Limits:
        """The limits of one record."""
        return Limits(self.max_pixels, self.max_audio_seconds, self.max_record_bytes, self.max_group_bytes)

    @property
    def cache_path(self) -> Path:
        """The folder of prepared sources."""
        folder = self.cache_dir or os.environ.get("MOT_CACHE") or "~/.cache/mixture_of_transformers"
        return local_path(folder, "cache_dir")

    def validate(self) -> None:
        """Raise a ValueError that names the field, the value and the way out, where one is wrong."""
        if not self.sources:
            raise ValueError("sources is empty; name at least one, such as {name: emoji, path: carried, config: emoji}")
        for field_name in ("sources", "validation_sources"):
            names = [source.name for source in getattr(self, field_name)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{field_name} has two sources named {twice[0]!r}; give each a name of its own")
        check_options(self)
        if self.latents not in LATENTS:
            raise ValueError(f"latents={self.latents!r} must be one of {', '.join(LATENTS)}")
        if self.weights_by not in ("documents", "tokens"):
            raise ValueError(f"weights_by={self.weights_by!r} must be documents or tokens")
        _check_sum("weights of the sources", self.sources)
        if self.token_shares is not None:
            self._check_token_shares()
        for source in (*self.sources, *self.validation_sources):
            source.validate()
            for template in source.templates:
                template.validate()
        if self.augmentation is not None:
            self.augmentation.validate()

    def _check_token_shares(self) -> None:
        """Refuse shares that do not add up to 1, or that are not those of the modalities that the sources have."""
        shares = self.token_shares
        if abs(sum(shares.values()) - 1) > _MOST_LOST_SHARE:
            raise ValueError(f"token_shares={shares} add up to {sum(shares.values()):.4g}; make them add up to 1")
        kinds = {segment.type for source in self.sources for segment in source.segments}
        if "document" in kinds:
            return  # its records say what it holds; the stream checks the shares again
        there = {"text", *(MODALITY_OF_TYPE[kind] for kind in kinds)}
        for name in shares:
            if name not in there:
                raise ValueError(
                    f"token_shares has {name}={shares[name]}, but no source has {name}; leave it out, or add a source "
                    f"with {name}; there are {', '.join(sorted(there))}"
                )
        if missing := sorted(there - set(shares)):
            raise ValueError(
                f"token_shares={shares} has no share of {', '.join(missing)}, which the sources have; state it too"
            )


def carried_path() -> Path:
    """Return the folder of the carried data set; `datasets.load_dataset(str(carried_path()), "emoji")` loads it."""
    return Path(__file__).parent / "carried"
