"""Records to columns of token ids and of pixels."""

import numpy as np
from PIL import Image

from modeling_mot.image_loading_mot import flatten

from .augmentation import change_picture, change_sound, generator, may_flip
from .config import AugmentationConfig, Limits, Segment
from .media import decode_picture, decode_sound
from .shards import BrokenShard
from .sources import Source


# Decoded pixels that are held at once before they are encoded.
_GROUP_PIXELS = 2**26


class BatchTokenizer:
    """Batches of numbered records to columns, and counts of what was left out. Can go to other processes.

    A column holds the ids of a segment in a list per record and variant. Where the processor keeps pictures as pixels,
    `image_columns` holds them beside the ids: lists of (3, H, W) uint8 arrays in the order of their placeholders.
    """

    def __init__(
        self, source: Source, processor, augmentation: AugmentationConfig | None, limits: Limits | None = None
    ):
        self.source, self.config, self.limits = source, source.config, limits or Limits()
        self.processor, self.augmentation = processor, augmentation
        self.variants = augmentation.variants if augmentation else 1
        of_codes = getattr(getattr(processor, "image_tokenizer", None), "config", None)
        of_pixels = getattr(processor, "image_processor", None)
        self.continuous = of_pixels is not None
        self.background = tuple(getattr(of_pixels or of_codes, "background", (255, 255, 255)))

    def __call__(
        self, batch: list[tuple[int, dict | ValueError]]
    ) -> tuple[dict[str, list], dict[str, list], dict[str, int]]:
        rows: dict[str, list] = {"record": []} | {str(segment): [] for segment in self.config.segments}
        images: dict[str, list] = {str(segment): [] for segment in self.config.segments if self._holds_images(segment)}
        usable, pixels, skipped = [], 0, {}
        for number, record in batch:
            try:
                if isinstance(record, ValueError):
                    raise record
                usable.append((number, self._inputs(number, record)))
            except ValueError as error:
                if self.config.on_error == "raise":
                    raise ValueError(
                        f"source {self.config.name!r}, {self.source.name_of(number)}: {error}; {_way_out(error)}"
                    ) from error
                reason = _reason(error)
                skipped[reason] = skipped.get(reason, 0) + 1
                continue
            pixels += sum(map(_pixels, usable[-1][1].values()))
            if pixels > _GROUP_PIXELS:
                self._encode_records(usable, rows, images)
                usable, pixels = [], 0
        self._encode_records(usable, rows, images)
        return rows, images, skipped

    def _holds_images(self, segment: Segment) -> bool:
        return self.continuous and segment.type in ("image", "document")

    def _encode_records(self, usable: list[tuple[int, dict]], rows: dict[str, list], images: dict[str, list]) -> None:
        """Add records to the columns."""
        rows["record"] += [number for number, _ in usable]
        for segment in self.config.segments:
            ids, pixels = self._encode(segment, [inputs[segment] for _, inputs in usable])
            rows[str(segment)] += ids
            if self._holds_images(segment):
                images[str(segment)] += pixels

    def _inputs(self, number: int, record: dict) -> dict[Segment, list]:
        """What the processor is to encode for each segment of a record: a list over variants."""
        texts = {s: text_of(s, record) for s in self.config.segments if s.type == "text"}
        caption = "; ".join(texts.values())
        inputs: dict[Segment, list] = {segment: [text] for segment, text in texts.items()}
        for place, segment in enumerate(self.config.segments):
            if segment.type in ("image", "audio"):
                try:
                    inputs[segment] = self._media(segment.type, record.get(segment.column), caption, number, place)
                except ValueError as error:
                    raise ValueError(f"column {segment.column!r}: {error}") from error
            elif segment.type == "document":
                inputs[segment] = self._document(segment, record, number)
        return inputs

    def _media(self, kind: str, value, caption: str, number: int, place: int) -> list:
        """One picture or sound in all its variants, the first one unchanged."""
        config, changed = self.augmentation, range(1, self.variants)
        if kind == "image":
            picture, flip = decode_picture(value, self.limits), may_flip(caption)
            flat = flatten(picture, self.background) if changed else picture
            pictures = [picture] + [
                change_picture(flat, config, generator(config, number, v, place), flip) for v in changed
            ]
            # Here, where a picture that does not fit is an error of its record.
            return self.processor.image_processor.fit_pictures(pictures) if self.continuous else pictures
        wave, rate = decode_sound(value, self.limits)
        waves = [wave] + [change_sound(wave, config, generator(config, number, v, place)) for v in changed]
        return [{"array": wave, "sampling_rate": rate} for wave in waves]

    def _document(self, segment: Segment, record: dict, number: int) -> list[list[dict]]:
        """An interleaved document in all its variants: lists of segments with decoded values."""
        parts = record.get(segment.column)
        if not isinstance(parts, list) or not parts:
            raise ValueError(f"column {segment.column!r} is {parts!r}, not a list of segments")
        if wrong := [part for part in parts if not isinstance(part, dict)]:
            raise ValueError(f"column {segment.column!r}: segment {wrong[0]!r:.80} is no mapping with a type")
        texts = (part.get("text") for part in parts if part.get("type") == "text")
        caption = " ".join(text for text in texts if isinstance(text, str))
        documents: list[list[dict]] = [[] for _ in range(self.variants)]
        for place, part in enumerate(parts):
            kind = part.get("type")
            if kind == "text":
                if not isinstance(part.get("text"), str) or not part["text"].strip():
                    raise ValueError(f"column {segment.column!r}, segment {place}: the text is empty")
                values = [part["text"]] * self.variants
            elif kind in ("image", "audio"):
                try:
                    values = self._media(kind, part.get(kind), caption, number, place)
                except ValueError as error:
                    raise ValueError(f"column {segment.column!r}, segment {place}: {error}") from error
            else:
                raise ValueError(
                    f"column {segment.column!r}, segment {place}: type {kind!r} is not text, image or audio"
                )
            for document, value in zip(documents, values, strict=True):
                document.append({"type": kind, kind: value})
        return documents

    def _encode(self, segment: Segment, inputs: list[list]) -> tuple[list[list[list[int]]], list[list[list]]]:
        """(records, variants) inputs -> the same nesting of lists of ids, and of lists of pixels."""
        if segment.type == "text":
            return [[self._text_ids(text) for text in texts] for texts in inputs], []
        flat = [value for values in inputs for value in values]
        if segment.type == "document":
            encoded = [self._document_ids(document) for document in flat]
        elif segment.type == "image":
            encoded = [(ids, pixels) for ids, pixels in zip(*self._image_ids(flat), strict=True)]
        else:
            encoded = [(list(ids), []) for ids in (self.processor.encode_audio(flat) if flat else [])]
        nested = iter(encoded)
        pairs = [[next(nested) for _ in values] for values in inputs]
        return tuple([[pair[part] for pair in of_record] for of_record in pairs] for part in (0, 1))

    def _text_ids(self, text: str) -> list[int]:
        return list(self.processor.encode_segment({"type": "text", "text": text}))

    def _image_ids(self, pictures: list) -> tuple[list[list[int]], list[list[np.ndarray]]]:
        """The ids of each picture, and a list of its pixels, empty where the ids say it all."""
        if self.continuous:
            return [self.processor.placeholder_ids(*pixels.shape[1:]) for pixels in pictures], [[p] for p in pictures]
        ids = self.processor.encode_images(pictures) if pictures else []
        return [list(of_picture) for of_picture in ids], [[] for _ in pictures]

    def _document_ids(self, document: list[dict]) -> tuple[list[int], list[np.ndarray]]:
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


def text_of(segment: Segment, record: dict) -> str:
    """The text of a segment: a column (a list is joined by commas), or a format over columns.

    Raises:
        ValueError: nothing is left of it.
    """
    values = {name: _plain(record.get(name)) for name in segment.columns}
    text = (segment.column.format(**values) if "{" in segment.column else values[segment.column]).strip()
    if not text:
        raise ValueError(f"the text of {segment} is empty")
    return text


def _reason(error: ValueError) -> str:
    """What a count of records left out is kept under: the message without what differs from record to record."""
    if isinstance(error, BrokenShard):
        return str(error)
    where, *rest = str(error).split(": ")
    return ": ".join([where.split(",")[0], *rest[:1]] if where.startswith("column") else [where])[:100]


def _way_out(error: ValueError) -> str:
    if isinstance(error, BrokenShard):
        return "fetch it again or remove it, or set on_error: skip to leave the rest of it out"
    return "mend or remove it, or set on_error: skip to leave such records out"


def _pixels(values: list) -> int:
    """Of the decoded pictures among the inputs of a segment."""
    flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
    pictures = [part.get("image") if isinstance(part, dict) else part for part in flat]
    return sum(picture.width * picture.height for picture in pictures if isinstance(picture, Image.Image))


def _plain(value) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        raise ValueError("the column of a text holds bytes")
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
