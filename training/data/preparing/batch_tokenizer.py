"""Batches of records to columns of token ids and pixels, with changed copies of pictures and sounds."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from modeling_mot.media_loading import flatten
from training.data.config import AugmentationConfig, Interleaved, Limits, Segment, SourceConfig
from training.data.documents import Vocabulary
from training.data.preparing.interleaving import Cut, Timed, spans_of, timed, without_runs
from training.data.reading.records import (
    BadRecord,
    LeftOut,
    Source,
    blaming,
    check_parts,
    decode_picture,
    decode_sound,
    text_of,
)
from training.data.roles import CLEAN, DOCUMENT, FEATURES, LATENTS, segments_of_parts


# (H, W) a picture in pixels; N samples of a sound

# ------------------------------------------------------------------------------------------------------- changed copies

# Captions with these words may contradict a mirrored picture: directions, things to read, things known by their sides.
_SIDED = re.compile(
    r"(left|right|east|west|clock|counter|watch|letter|word|number|digit|text|writ|alphabet|key|button|sign|symbol|flag|"
    r"map|globe|calendar|arrow|question|exclamation|note|ruler|score|book|newspaper|page|moon|quarter|hundred|medal|"
    r"facing|plus|zodiac|mirror|logo|label|card|banknote|receipt|japan|\d)"
)


def may_flip(caption: str) -> bool:
    """True if a caption stays true when its picture is mirrored.

    False for an empty caption, and for a caption that names a direction, something to read (letters, numbers, signs,
    clocks, books) or something with a left and a right (flags, maps, phases of the moon). The rule searches for parts
    of words, so it refuses some captions that would stay true.
    """
    return bool(caption.strip()) and _SIDED.search(caption.lower()) is None


def change_picture(
    picture: Image.Image, config: AugmentationConfig, rng: np.random.Generator, flip_allowed: bool
) -> Image.Image:
    """Make one changed copy: mirrored or not, shifted on white, colours changed.  (H, W) RGB -> (H, W) RGB"""
    # The picture, mirrored and shifted.
    flip, across, down, *colours = rng.uniform(-1, 1, 6)
    if config.flip and flip_allowed and flip > 0:
        picture = ImageOps.mirror(picture)
    offset = round(across * config.shift * picture.width), round(down * config.shift * picture.height)
    if offset != (0, 0):
        canvas = Image.new("RGB", picture.size, "white")
        canvas.paste(picture, offset)
        picture = canvas

    # Its colours. Contrast about white and brightness as an exponent both leave white white.
    brightness, contrast, saturation = colours
    picture = ImageEnhance.Color(picture).enhance(1 + saturation * config.saturation)
    pixels = np.asarray(picture, dtype=np.float32) / 255
    pixels = (1 - (1 - pixels) * (1 + contrast * config.contrast)).clip(0, 1)
    pixels = pixels ** (1 + brightness * config.brightness)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def change_sound(wave: np.ndarray, config: AugmentationConfig, rng: np.random.Generator) -> np.ndarray:
    """Make one changed copy: faster and higher or slower and lower, louder or softer, noisy.  (N,) -> (N',) float32"""
    speed, gain, noise = rng.uniform(-1, 1, 3)
    speed = 1 + speed * config.speed
    positions = np.arange(max(1, round(len(wave) / speed))) * speed
    wave = np.interp(positions, np.arange(len(wave)), wave)
    wave = wave * 10 ** (gain * config.gain / 20)
    wave = wave + rng.standard_normal(len(wave)) * abs(noise) * config.noise
    return wave.clip(-1, 1).astype(np.float32)


def generator(config: AugmentationConfig, record: int, variant: int, segment: int = 0) -> np.random.Generator:
    """Make the random numbers of one variant of one segment of one record."""
    return np.random.default_rng([config.seed, record, variant, segment])


# -------------------------------------------------------------------------------------------------------------- batches

# The types of segments that may hold pictures.
HOLD_IMAGES = ("image", "document", FEATURES)
# The decoded pixels that are held at once before they are encoded.
_GROUP_PIXELS = 2**26


@dataclass(frozen=True)
class Preparing:
    """How records become tokens, and where the tokens are kept.

    Attributes:
        processor: a `MoTProcessor`.
        cache: the folder of prepared sources.
        augmentation: changed copies of pictures and sounds; None: each record as it is.
        limits: the most that a record may take.
        vae: for a processor that keeps pictures as pixels: an autoencoder of diffusers, whose latents are kept as
            float16 in the place of the pixels; None: the pixels are kept, as uint8.
        workers: processes that tokenise; 1: this one.
        progress: shows a bar with records and tokens per second.
    """

    processor: object
    cache: str | Path
    augmentation: AugmentationConfig | None = None
    limits: Limits = Limits()
    vae: object = None
    workers: int = 1
    progress: bool = False

    @property
    def images(self) -> str | None:
        """Say what pictures are kept as: "pixels" or "latents"; None where they become codes."""
        if getattr(self.processor, "image_processor", None) is None:
            return None
        return "pixels" if self.vae is None else "latents"


def kept_segments(config: SourceConfig, vocabulary: Vocabulary) -> list[Segment]:
    """List the segments of a source whose tokens are kept."""
    return segments_of_parts(config) if vocabulary.has_roles else config.prepared_segments


class BatchTokenizer:
    """Tokenises batches of numbered records, and counts those left out. It can be sent to other processes.

    A column holds the ids of a segment in a list per record and variant. Where the processor keeps pictures as pixels,
    a second column holds them beside the ids: lists of (3, H, W) uint8 arrays in the order of their placeholders.
    Copies of pictures as features are a segment of their own, see `kept_segments`.
    """

    def __init__(self, source: Source, preparing: Preparing):
        self.source = source
        self.config = source.config
        self.preparing = preparing
        self.processor = preparing.processor
        self.augmentation = preparing.augmentation
        self.variants = preparing.augmentation.variants if preparing.augmentation else 1
        self.continuous = preparing.images is not None
        # Sounds are cut before runs of a unit become one: the cuts are times.
        vocabulary = Vocabulary.of(self.processor)
        self.has_roles = vocabulary.has_roles
        self.segments = kept_segments(self.config, vocabulary)
        self.speech = getattr(self.processor, "speech_tokenizer", None)
        is_cut = any(isinstance(segment, Interleaved) for segment in self.segments)
        self.deduplicates_later = is_cut and self.speech is not None and self.speech.config.deduplicate
        # Transparent pictures are laid on the background that the processor lays them on.
        of_codes = getattr(getattr(self.processor, "image_tokenizer", None), "config", None)
        of_pixels = getattr(self.processor, "image_processor", None)
        self.background = tuple(getattr(of_pixels or of_codes, "background", (255, 255, 255)))

    def __call__(self, batch: list[tuple[int, dict | BadRecord]]) -> tuple[dict[str, list], dict[str, list], LeftOut]:
        # Records are decoded one by one, and encoded together as long as their pixels fit.
        rows: dict[str, list] = {"record": []} | {str(segment): [] for segment in self.segments}
        images: dict[str, list] = {str(segment): [] for segment in self.segments if self._holds_images(segment)}
        usable, pixels, left_out = [], 0, LeftOut()
        for number, record in batch:
            try:
                if isinstance(record, BadRecord):
                    raise record
                usable.append((number, self._inputs(number, record)))
            except BadRecord as error:
                self.source.leave_out(number, error, left_out)
                continue
            pixels += sum(map(_pixels, usable[-1][1].values()))
            if pixels > _GROUP_PIXELS:
                self._encode_records(usable, rows, images, left_out)
                usable, pixels = [], 0
        self._encode_records(usable, rows, images, left_out)
        return rows, images, left_out

    def _holds_images(self, segment: Segment) -> bool:
        return self.continuous and segment.type in HOLD_IMAGES

    def _encode_records(
        self, usable: list[tuple[int, dict]], rows: dict[str, list], images: dict[str, list], left_out: LeftOut
    ) -> None:
        """Add records to the columns."""
        encoded: dict[Segment, tuple[list, list]] = {}
        try:
            for segment in self.segments:
                inputs = [inputs[segment] for _, inputs in usable]
                if isinstance(segment, Interleaved):
                    sounds, numbers = encoded[segment.audio][0], [number for number, _ in usable]
                    encoded[segment] = self._interleave(segment, numbers, inputs, sounds), []
                else:
                    encoded[segment] = self._encode(segment, inputs)
        except BadRecord as error:
            if len(usable) == 1:
                self.source.leave_out(usable[0][0], error, left_out)
            else:  # one by one, to find the record at fault
                for item in usable:
                    self._encode_records([item], rows, images, left_out)
            return
        rows["record"] += [number for number, _ in usable]
        for segment, (ids, pixels) in encoded.items():
            if segment.type == "audio" and self.deduplicates_later:
                ids = [[without_runs(of_sound) for of_sound in of_record] for of_record in ids]
            rows[str(segment)] += ids
            if self._holds_images(segment):
                images[str(segment)] += pixels

    def _inputs(self, number: int, record: dict) -> dict[Segment, list]:
        """Decode a record: for each segment a list of inputs of the processor, over variants."""
        texts = {s: text_of(s, record) for s in self.config.segments if s.type == "text"}
        caption = "; ".join(texts.values())
        inputs: dict[Segment, list] = {segment: [text] for segment, text in texts.items()}
        for segment in self.segments:
            document = Segment(DOCUMENT, segment.column)
            if document in inputs:
                inputs[segment] = inputs[document]  # its pictures for the encoder, or which latents are clean
            elif segment.type in ("image", "audio", FEATURES):
                # All copies of a picture are changed alike.
                medium = Segment("image", segment.column) if segment.type == FEATURES else segment
                place, where = (number, self.config.segments.index(medium)), f"column {segment.column!r}"
                inputs[segment] = inputs.get(medium) or self._media(
                    medium.type, record.get(segment.column), caption, place, where
                )
            elif segment.type == "document":
                inputs[segment] = self._document(segment, record, number)
            elif isinstance(segment, Interleaved):
                inputs[segment] = self._timed(segment, record, texts[segment.text], inputs[segment.audio])
        return inputs

    def _timed(self, segment: Interleaved, record: dict, text: str, sounds: list[dict]) -> list[Timed]:
        """Find the places between the words of a text, for each variant of its sound."""
        lengths = [len(sound["array"]) for sound in sounds]
        seconds = lengths[0] / sounds[0]["sampling_rate"]
        first = timed(text, record.get(segment.column), seconds, segment.column)
        # A changed sound is faster or slower throughout.
        speeds = [length / lengths[0] for length in lengths]
        return [Timed(text, [Cut(place, time * speed) for place, time in first.cuts]) for speed in speeds]

    def _media(self, kind: str, value, caption: str, place: tuple[int, int], where: str) -> list:
        """Decode one picture or sound in all its variants, the first one unchanged.

        Args:
            place: the number of its record, and the number of the segment in the record.
            where: the name of the place in an error.
        """
        config, changed = self.augmentation, range(1, self.variants)
        file = _file_name(value)
        # A picture; one that stays pixels is fitted to the size that the processor keeps.
        if kind == "image":
            with blaming(where, file):
                picture = decode_picture(value, self.preparing.limits)
                flat = flatten(picture, self.background) if changed else picture
            flip = may_flip(caption)
            pictures = [picture] + [
                change_picture(flat, config, generator(config, place[0], v, place[1]), flip) for v in changed
            ]
            if not self.continuous:
                return pictures
            with blaming(where, file):
                return self.processor.image_processor.fit_pictures(pictures)
        # A sound.
        with blaming(where, file):
            wave, rate = decode_sound(value, self.preparing.limits)
        waves = [wave] + [change_sound(wave, config, generator(config, place[0], v, place[1])) for v in changed]
        return [{"array": wave, "sampling_rate": rate} for wave in waves]

    def _document(self, segment: Segment, record: dict, number: int) -> list[list[dict]]:
        """Decode an interleaved document in all its variants: lists of segments with decoded values."""
        parts = check_parts(record.get(segment.column), segment.column)
        caption = " ".join(part["text"] for part in parts if part["type"] == "text")
        documents: list[list[dict]] = [[] for _ in range(self.variants)]
        for place, part in enumerate(parts):
            kind = part["type"]
            if kind == "text":
                values = [part["text"]] * self.variants
            else:
                where = f"column {segment.column!r}, segment {place}"
                values = self._media(kind, part.get(kind), caption, (number, place), where)
            given = {"roles": part["roles"]} if part.get("roles") is not None else {}
            for document, value in zip(documents, values, strict=True):
                document.append({"type": kind, kind: value} | given)
        if self.has_roles:
            with blaming(f"column {segment.column!r}"):
                for document in documents:
                    self._set_roles(document)
        return documents

    def _set_roles(self, document: list[dict]) -> None:
        """Give each picture of a document its roles and, if it is to be features, its pixels for the encoder."""
        pictures = [part for part in document if part["type"] == "image"]
        for part, roles in zip(pictures, self.processor.roles_of(document), strict=True):
            part["roles"] = roles
            if FEATURES in roles:
                ((_, (part["seen"],)),) = self._features([part["image"]])

    def _encode(self, segment: Segment, inputs: list[list]) -> tuple[list[list[list[int]]], list[list[list]]]:
        """Encode (records, variants) inputs to the same nesting of lists of ids, and of lists of pixels.

        Raises:
            BadRecord: an input was decoded, but cannot be encoded.
        """
        with blaming(f"column {segment.column!r}: it does not encode"):
            return self._encoded(segment, inputs)

    def _encoded(self, segment: Segment, inputs: list[list]) -> tuple[list[list[list[int]]], list[list[list]]]:
        if segment.type == "text":
            return [[self._text_ids(text) for text in texts] for texts in inputs], []
        flat = [value for values in inputs for value in values]
        if segment.type == "document":
            encoded = [self._document_ids(document) for document in flat]
        elif segment.type == FEATURES and flat and isinstance(flat[0], list):
            encoded = [([], [part["seen"] for part in document if "seen" in part]) for document in flat]
        elif segment.type == FEATURES:
            encoded = self._features(flat)
        elif segment.type == CLEAN:
            encoded = [([int(role == LATENTS) for role in _latents(document)], []) for document in flat]
        elif segment.type == "image":
            encoded = [(ids, pixels) for ids, pixels in zip(*self._image_ids(flat), strict=True)]
        else:
            options = {"deduplicate": False} if self.deduplicates_later else {}
            encoded = [(list(ids), []) for ids in (self.processor.encode_audio(flat, **options) if flat else [])]
        nested = iter(encoded)
        pairs = [[next(nested) for _ in values] for values in inputs]
        return tuple([[pair[part] for pair in of_record] for of_record in pairs] for part in (0, 1))

    def _interleave(
        self, segment: Interleaved, numbers: list[int], inputs: list[list[Timed]], sounds: list[list[list[int]]]
    ) -> list[list[list[int]]]:
        """Make the ids of every draw of every record.

        Args:
            numbers: of the records.
            inputs, sounds: of each record and each variant of its sound, where it can be cut, and its ids.
        """
        settings, rate = segment.settings, self.speech.units_per_second
        columns = []
        for number, variants, ids in zip(numbers, inputs, sounds, strict=True):
            draws = []
            for draw in range(settings.variants):
                source, (begin, *units, end) = variants[draw % len(variants)], ids[draw % len(ids)]
                random = np.random.default_rng([settings.seed, number, draw])
                tokens = []
                for is_speech, start, stop in spans_of(source, len(units), rate, settings, random):
                    if is_speech:
                        span = without_runs(units[start:stop]) if self.deduplicates_later else units[start:stop]
                        tokens += [begin, *span, end]
                    else:
                        tokens += self._text_ids(source.text[start:stop])
                draws.append(tokens)
            columns.append(draws)
        return columns

    def _text_ids(self, text: str) -> list[int]:
        return list(self.processor.encode_segment({"type": "text", "text": text}))

    def _image_ids(self, pictures: list) -> tuple[list[list[int]], list[list[np.ndarray]]]:
        """Give the ids of each picture, and a list of its pixels, empty where the ids are its codes."""
        if self.continuous:
            return [self.processor.placeholder_ids(*pixels.shape[1:]) for pixels in pictures], [[p] for p in pictures]
        ids = self.processor.encode_images(pictures) if pictures else []
        return [list(of_picture) for of_picture in ids], [[] for _ in pictures]

    def _features(self, pictures: list[np.ndarray]) -> list[tuple[list[int], list[np.ndarray]]]:
        """Give the ids of each picture that an encoder reads, and its pixels, made of those that become latents."""
        fitted = self.processor.encoder_processor.fit_pictures([np.moveaxis(pixels, 0, -1) for pixels in pictures])
        return [(self.processor.features_ids(*pixels.shape[1:]), [pixels]) for pixels in fitted]

    def _document_ids(self, document: list[dict]) -> tuple[list[int], list[np.ndarray]]:
        if self.has_roles:
            return self._copies_ids(document)
        # Pictures and sounds of the document are encoded together, by their places.
        encoded: dict[int, list[int]] = {}
        places = {kind: [p for p, part in enumerate(document) if part["type"] == kind] for kind in ("image", "audio")}
        ids, pixels = self._image_ids([document[place]["image"] for place in places["image"]])
        encoded |= zip(places["image"], ids, strict=True)
        if places["audio"]:
            sounds = self.processor.encode_audio([document[place]["audio"] for place in places["audio"]])
            encoded |= zip(places["audio"], sounds, strict=True)
        tokens = [
            token
            for place, part in enumerate(document)
            for token in (encoded[place] if place in encoded else self._text_ids(part["text"]))
        ]
        return tokens, [values for of_picture in pixels for values in of_picture]

    def _copies_ids(self, document: list[dict]) -> tuple[list[int], list[np.ndarray]]:
        """Give the ids of a document whose pictures stand in their roles, and the pixels of each copy as latents."""
        tokens: list[int] = []
        pixels: list[np.ndarray] = []
        for part in document:
            if part["type"] == "text":
                tokens += self._text_ids(part["text"])
                continue
            for role in part["roles"]:
                if role == FEATURES:
                    tokens += self.processor.features_ids(*part["seen"].shape[1:])
                else:
                    tokens += self.processor.placeholder_ids(*part["image"].shape[1:])
                    pixels.append(part["image"])
        return tokens, pixels


def _latents(document: list[dict]) -> list[str]:
    """List the roles of the copies as latents of a document, in order."""
    return [role for part in document for role in part.get("roles", ()) if role != FEATURES]


def _file_name(value) -> str | None:
    """Name the file that holds a picture or sound, or held it before it was packed."""
    value = value.get("path") if isinstance(value, dict) else value
    return str(value) if isinstance(value, (str, Path)) and value else None


def _pixels(values: list) -> int:
    """Count the pixels of the decoded pictures among the inputs of a segment."""
    flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
    pictures = [part.get("image") if isinstance(part, dict) else part for part in flat]
    return sum(picture.width * picture.height for picture in pictures if isinstance(picture, Image.Image))
