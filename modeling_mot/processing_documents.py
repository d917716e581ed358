"""Decode token ids to documents of text, pictures and sounds."""

from reprlib import repr as shortened
from typing import Any

import torch

from .checks_fields import is_whole
from .configuration_mot import check_spans
from .processing_vocabulary import FEATURES


# B sequences, L tokens of a sequence, (h, w) codes of an image


def token_rows(ids: Any, size: int, name: str = "generated_outputs") -> list:
    """Return the ids that a model returned, (B, L) or one sequence, as a list.

    Args:
        size: the number of tokens.
        name: what an error calls the ids.

    Raises:
        ValueError: they are no token ids.
    """
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(rows, (list, tuple)):
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    checked = rows if isinstance(rows, (list, tuple)) else [rows]
    for row in checked:
        for token in row if isinstance(row, (list, tuple)) and checked is rows else [row]:
            if not is_whole(token, 0) or token >= size:
                raise ValueError(
                    f"{name} has {shortened(token)}, and must be token ids, (batch, length), in [0, {size})"
                )
    return rows


class DocumentDecoder:
    """Read one sequence of tokens with the tokenizers of a processor.

    Padding, begin and end tokens are dropped. An image is boi, codes, eoi; its grid is the next of `image_grids`, or
    the tokenizer's own, or the square of as many codes. With an image processor an image is boi, placeholders, eoi, and
    stands for the next of `images`. What an encoder sees of a picture is an image like it, unless it stands directly
    behind the image of the same picture.

    With `allow_incomplete` a cut image is filled up with codes of a blank picture, a cut sound is decoded as far as it
    goes, and stray codes, placeholders and images without a picture are dropped. Fewer `images` than the document has
    are then its last ones, since `generate()` returns the pictures that it drew itself.

    Raises:
        ValueError: ids outside the vocabulary; codes outside their markers; images or sounds that are cut off; more or
            fewer `images` than the document has.
    """

    def __init__(self, processor: Any):
        tokenizer = processor.tokenizer
        self.processor = processor
        self.tokenizer = tokenizer
        # Images are diffused: a placeholder stands for each patch, and the pictures come beside the tokens.
        self.continuous = processor.image_processor is not None
        self.vision_token_id = processor.placeholder_token_ids.get(FEATURES)
        self.size = max(last for _, last in processor.modality_token_ranges.values())
        self.ranges = dict(processor.modality_token_ranges)
        self.ranges |= {name: [token, token + 1] for name, token in processor.placeholder_token_ids.items()}
        # begin token of a span -> (its modality, its end token)
        begin_of_speech, end_of_speech = (
            getattr(tokenizer, f"{name}_of_speech_token_id", None) for name in ("begin", "end")
        )
        self.spans = {
            tokenizer.boi_token_id: ("image", tokenizer.eoi_token_id),
            begin_of_speech: ("speech", end_of_speech),
        }
        self.dropped = {
            tokenizer.pad_token_id,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.eoi_token_id,
            end_of_speech,
        }

    def decode(self, ids: Any, images: list | None, image_grids: list | None, allow_incomplete: bool) -> list[dict]:
        """Decode a document to segments; see `MoTProcessor.decode_document`."""
        # Check what is given, and hold grids and pictures ready for the images.
        ids = self.checked(ids)
        for name, given in (("images", images), ("image_grids", image_grids)):
            if not isinstance(given, (list, tuple, type(None))):
                raise ValueError(f"{name}={shortened(given)} must be a list, with one for each image of the document")
        grids = iter(image_grids or [])
        pictures = iter(self.pictures(ids, images, image_grids, allow_incomplete))

        # Read token by token, or span by span.
        segments: list[dict] = []
        text: list[int] = []  # tokens of text that belong to no segment yet
        position = 0
        behind_latents = -1  # the position behind the last image of latents
        while position < len(ids):
            token = ids[position]
            # A begin marker: everything to its end marker is one image or sound.
            if token in self.spans:
                self.flush(text, segments)
                modality, end = self.spans[token]
                is_seen = self.vision_token_id in ids[position + 1 : position + 2]
                is_seen_again = is_seen and position == behind_latents
                codes, position, complete = self.span(ids, position + 1, FEATURES if is_seen else modality, end)
                if is_seen_again:
                    continue
                if modality == "image" and self.continuous:
                    behind_latents = -1 if is_seen else position
                    picture = next(pictures) if codes else None
                    segment = self.given_image(len(codes), picture, complete, allow_incomplete)
                elif modality == "image":
                    segment = self.image(codes, next(grids, None), complete, allow_incomplete)
                else:
                    segment = self.sound(codes, complete, allow_incomplete)
                segments += [segment] if segment else []
                continue

            # Text, and tokens that are left out; a code has no place here.
            if not self.is_text(token):
                if not allow_incomplete:
                    name = self.tokenizer.convert_ids_to_tokens(token)
                    raise ValueError(f"{name} at position {position} stands outside its begin and end markers")
            elif token in self.dropped:
                self.flush(text, segments)
            else:
                text.append(token)
            position += 1
        self.flush(text, segments)

        # All grids are used.
        left = sum(1 for _ in grids)
        if left:
            raise ValueError(
                f"{len(image_grids)} image_grids were given but the document has {len(image_grids) - left} images"
            )
        return segments

    def checked(self, ids: Any) -> list[int]:
        """Return one sequence of ids as a list; ValueError for other shapes and ids outside the vocabulary."""
        # A list, array or tensor, with or without an axis of sequences.
        try:
            ids = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"ids={shortened(ids)} must be one sequence of token ids: {error}") from None
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(
                f"decode_document takes one sequence of token ids, not {ids.dtype} of shape {tuple(ids.shape)}"
            )

        # Every id is one of the vocabulary.
        outside = ((ids < 0) | (ids >= self.size)).nonzero().flatten()
        if len(outside):
            position = int(outside[0])
            raise ValueError(
                f"token id {int(ids[position])} at position {position} is outside the vocabulary, [0, {self.size}); "
                f"a model of more rows needs tokenizer_vocab_size={self.size} in its configuration"
            )
        return ids.tolist()

    def pictures(
        self, ids: list[int], images: list | None, image_grids: list | None, allow_incomplete: bool
    ) -> list[Any]:
        """Return the picture of each image of placeholders; None for the first ones if there are fewer pictures."""
        # Pictures are given only where placeholders stand for them.
        if not self.continuous:
            if images is not None:
                raise ValueError("images= go with an image processor; this processor decodes pictures from their codes")
            return []
        if image_grids is not None:
            raise ValueError("image_grids= go with an image tokenizer; this processor takes its pictures from images=")

        # An image counts where its begin token and a placeholder stand: a cut one may have no placeholder yet. What an
        # encoder sees counts too, but not behind the latents of the same picture and their end token.
        begin, image, seen = self.tokenizer.boi_token_id, self.tokenizer.image_token_id, self.vision_token_id
        count = 0
        for place, (one, other) in enumerate(zip(ids, ids[1:])):
            is_seen_again = place >= 2 and ids[place - 2] == image
            count += one == begin and (other == image or other == seen and not is_seen_again)
        given = len(images or [])
        if given > count or (given < count and not allow_incomplete):
            raise ValueError(
                f"the document has {count} images of placeholders but images= gives {given}; pass the pictures of this "
                "sequence in order, those of the prompt and those that generate() returned"
            )
        return [None] * (count - given) + list(images or [])

    def is_text(self, token: int) -> bool:
        """True if the token is no code and no placeholder."""
        return not any(first <= token < last for name, (first, last) in self.ranges.items() if name != "text")

    def span(self, ids: list[int], start: int, modality: str, end: int) -> tuple[list[int], int, bool]:
        """Read codes from `start`.  -> the codes, the position behind the span, True if its end marker is there"""
        first, last = self.ranges.get(modality, [0, 0])
        position = start
        while position < len(ids) and first <= ids[position] < last:
            position += 1
        codes = [token - first for token in ids[start:position]]
        complete = position < len(ids) and ids[position] == end
        return codes, position + int(complete), complete

    def flush(self, text: list[int], segments: list[dict]) -> None:
        """Make the tokens of text that have come together a segment."""
        if text:
            segments.append({"type": "text", "text": self.tokenizer.decode(text)})
            text.clear()

    def image(self, codes: list[int], grid: Any, complete: bool, allow_incomplete: bool) -> dict | None:
        """Decode an image of codes to a segment; None if nothing can be shown."""
        tokenizer = self.processor.image_tokenizer
        if tokenizer is None:
            raise ValueError("the document holds an image but this processor has no image tokenizer")
        check_spans(grid, None)
        height, width = grid or tokenizer.image_grid or (round(len(codes) ** 0.5),) * 2

        # Too few codes are filled up from a blank picture, too many are cut off.
        if not complete or len(codes) != height * width:
            if not allow_incomplete:
                missing = "" if complete else f" and no {self.tokenizer.eoi_token}"
                raise ValueError(
                    f"an image has {len(codes)} codes{missing}, but its grid of {height} x {width} needs "
                    f"{height * width}; generate on, pass its image_grids, or allow_incomplete=True to fill it up"
                )
            if not codes:
                return None
            codes = (codes + tokenizer.blank_codes((height, width))[len(codes) :])[: height * width]

        picture = tokenizer.decode([torch.tensor(codes).view(height, width)])[0]
        return {"type": "image", "image": picture}

    def given_image(self, length: int, picture: Any, complete: bool, allow_incomplete: bool) -> dict | None:
        """Make a segment of the picture of an image of placeholders; None if the picture was not given."""
        if not allow_incomplete and not (length and complete):
            missing = "" if complete else f" and no {self.tokenizer.eoi_token}"
            raise ValueError(f"an image has {length} placeholders{missing}; generate on, or pass allow_incomplete=True")
        return None if picture is None else {"type": "image", "image": picture}

    def sound(self, codes: list[int], complete: bool, allow_incomplete: bool) -> dict | None:
        """Decode a sound of speech units to a segment; None if there are no units."""
        # A cut sound is decoded as far as it goes.
        tokenizer = self.processor.speech_tokenizer
        if tokenizer is None:
            raise ValueError("the document holds speech but this processor has no speech tokenizer")
        if (not complete or not codes) and not allow_incomplete:
            missing = "" if complete else f" and no {self.tokenizer.end_of_speech_token}"
            raise ValueError(f"a sound has {len(codes)} units{missing}; generate on, or pass allow_incomplete=True")
        if not codes:
            return None
        waveform = tokenizer.decode([torch.tensor(codes)])[0]
        return {"type": "audio", "audio": waveform, "sampling_rate": tokenizer.sampling_rate}
