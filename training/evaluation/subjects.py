"""The names, pictures and texts that a run is asked for at its end, from the data section of its recipe."""

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from PIL import Image

from training.data.config import DataConfig, Segment, SourceConfig
from training.data.reading.records import decode_picture, text_of
from training.data.reading.sources import open_source
from training.evaluation.edits import Edit, find_edits
from training.recipe import SamplesConfig, pair_of, text_of_sources, texts_of


_TEXT_PROMPT_WORDS = 4


@dataclass
class NamedPicture:
    """A picture, the text that goes with it, and what it shows: None if no other picture shows the same."""

    name: str
    image: Image.Image
    concept: Hashable = None


@dataclass
class SampleSubjects:
    """The names, pictures and texts that a run can be asked for.

    Attributes:
        held_in: named pictures that the run was trained on.
        held_out: named pictures that the run was not trained on.
        distractors: further pictures among which a drawn one must find its own.
        spoken: names for which the run has heard the sound.
        texts: beginnings of held-out running text.
        edits, held_out_edits: pictures to be changed, of concepts that the run was trained on and of others.
    """

    held_in: list[NamedPicture] = field(default_factory=list)
    held_out: list[NamedPicture] = field(default_factory=list)
    distractors: list[NamedPicture] = field(default_factory=list)
    spoken: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    held_out_edits: list[Edit] = field(default_factory=list)

    def describe(self, config: SamplesConfig) -> str:
        """Say in words how many of them `config` asks for."""
        numbers = {
            "pictures": len(self.held_in[: config.measured]) + len(self.held_out[: config.held_out]),
            "edits": len(self.edits) + len(self.held_out_edits),
            "sounds": len(self.spoken[: config.spoken]),
            "texts": len(self.texts[: config.texts]),
        }
        return ", ".join(f"{number} {kind}" for kind, number in numbers.items() if number) or "nothing"


def find_subjects(data: DataConfig, config: SamplesConfig) -> SampleSubjects:
    """Read the names and pictures of the first fitting sources, names to speak, and texts to continue."""
    subjects = SampleSubjects()

    # Named pictures, those trained on and those held out.
    if (pair := pair_of(data.sources, "image")) is not None:
        subjects.held_in, rest = _named_pictures(*pair, config)
        subjects.distractors.extend(rest)
    if (pair := pair_of(data.validation_sources, "image")) is not None:
        subjects.held_out, rest = _named_pictures(*pair, config, config.held_out_names or ())
        if config.held_out_names is not None:
            by_name = {picture.name.strip(): picture for picture in subjects.held_out}
            chosen = [by_name[name] for name in config.held_out_names]
            rest += [picture for picture in subjects.held_out if picture not in chosen]
            subjects.held_out = chosen
        subjects.distractors.extend(rest)
    for source in config.distractors:
        for pictures in _named_pictures(*pair_of([source], "image"), config):
            subjects.distractors.extend(pictures)

    # Edits, sounds and texts.
    subjects.edits = find_edits(data.sources, config.edits)
    subjects.held_out_edits = find_edits(data.validation_sources, config.edits)
    if (pair := pair_of(data.sources, "audio")) is not None and config.spoken:
        source, text, _ = pair
        subjects.spoken = list(islice(texts_of(source, text), config.spoken))
    if (found := text_of_sources(data.validation_sources or data.sources)) is not None and config.texts:
        source, text = found
        lines = islice(texts_of(source, text), config.texts)
        subjects.texts = [" ".join(line.split(" ")[:_TEXT_PROMPT_WORDS]) for line in lines]
    return subjects


def _named_pictures(
    source: SourceConfig, text: Segment, image: Segment, config: SamplesConfig, names: Sequence[str] = ()
) -> tuple[list[NamedPicture], list[NamedPicture]]:
    """Return the named pictures that a source's limit lets through, and those beyond without their names.

    They are the first `config.gallery` in all. Pictures of these `names` are found wherever they stand.
    """
    unlimited = dataclasses.replace(source, limit=None)
    missing = set(names)
    named, rest = [], []
    for index, record in enumerate(_records(unlimited)):
        if index >= config.gallery and not missing:
            break
        try:
            is_named = source.limit is None or index < source.limit
            name = text_of(text, record) if is_named else ""
            if index >= config.gallery and name.strip() not in missing:
                continue
            missing.discard(name.strip())
            concept = None if config.concept is None else record[config.concept]
            (named if is_named else rest).append(NamedPicture(name, decode_picture(record[image.column]), concept))
        except ValueError:
            # The source has been tokenised, so such a record is here only with `on_error: skip`.
            continue
    return named, rest


def _records(source: SourceConfig) -> Iterator[dict]:
    return iter(open_source(source))
