"""Token ids back to documents: text, pictures, waveforms."""

from typing import Any

import torch


class DocumentDecoder:
    """Reads one sequence of tokens with the tokenizers of a processor.

    Padding, begin and end tokens are dropped. An image is boi, codes, eoi; its grid is the next of `image_grids`, or
    the tokenizer's own, or the square of as many codes. Raises ValueError for ids outside the vocabulary, codes outside
    their markers, and images or sounds that are cut off, with the counts. With `allow_incomplete`, a cut image is
    filled up with codes of a blank picture, a cut sound is decoded as far as it goes, and stray codes are dropped.
    """

    def __init__(self, processor: Any):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.ranges = processor.modality_token_ranges
        tokenizer = self.tokenizer
        self.spans = {
            tokenizer.boi_token_id: ("image", tokenizer.eoi_token_id),
            tokenizer.begin_of_speech_token_id: ("speech", tokenizer.end_of_speech_token_id),
        }
        self.dropped = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        self.dropped |= {tokenizer.eoi_token_id, tokenizer.end_of_speech_token_id}

    def decode(self, ids: Any, image_grids: list | None, allow_incomplete: bool) -> list[dict]:
        ids = self.checked(ids)
        grids = iter(image_grids or [])
        segments, text, position = [], [], 0
        while position < len(ids):
            token = ids[position]
            if token in self.spans:
                self.flush(text, segments)
                modality, end = self.spans[token]
                codes, position, complete = self.span(ids, position + 1, modality, end)
                if modality == "image":
                    segment = self.image(codes, next(grids, None), complete, allow_incomplete)
                else:
                    segment = self.sound(codes, complete, allow_incomplete)
                segments += [segment] if segment else []
                continue
            if not self.ranges["text"][0] <= token < self.ranges["text"][1]:
                if not allow_incomplete:
                    name = self.tokenizer.convert_ids_to_tokens(token)
                    raise ValueError(f"{name} at position {position} stands outside its begin and end markers")
            elif token in self.dropped:
                self.flush(text, segments)
            else:
                text.append(token)
            position += 1
        self.flush(text, segments)
        left = sum(1 for _ in grids)
        if left:
            raise ValueError(
                f"{len(image_grids)} image_grids were given but the document has {len(image_grids) - left} images"
            )
        return segments

    def checked(self, ids: Any) -> list[int]:
        ids = torch.as_tensor(ids)
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(
                f"decode_document takes one sequence of token ids, not {ids.dtype} of shape {tuple(ids.shape)}"
            )
        size = max(last for _, last in self.ranges.values())
        outside = ((ids < 0) | (ids >= size)).nonzero().flatten()
        if len(outside):
            position = int(outside[0])
            raise ValueError(
                f"token id {int(ids[position])} at position {position} is outside the vocabulary, [0, {size})"
            )
        return ids.tolist()

    def span(self, ids: list[int], start: int, modality: str, end: int) -> tuple[list[int], int, bool]:
        """Codes from `start`, the position behind the span, and whether its end marker was there."""
        first, last = self.ranges.get(modality, [0, 0])
        position = start
        while position < len(ids) and first <= ids[position] < last:
            position += 1
        codes = [token - first for token in ids[start:position]]
        complete = position < len(ids) and ids[position] == end
        return codes, position + int(complete), complete

    def flush(self, text: list[int], segments: list[dict]) -> None:
        if text:
            segments.append({"type": "text", "text": self.tokenizer.decode(text)})
            text.clear()

    def image(self, codes: list[int], grid: Any, complete: bool, allow_incomplete: bool) -> dict | None:
        tokenizer = self.processor.image_tokenizer
        if tokenizer is None:
            raise ValueError("the document holds an image but this processor has no image tokenizer")
        height, width = grid or tokenizer.image_grid or (round(len(codes) ** 0.5),) * 2
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

    def sound(self, codes: list[int], complete: bool, allow_incomplete: bool) -> dict | None:
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
