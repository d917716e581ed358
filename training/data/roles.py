"""Documents whose pictures stand in several roles: as noised latents, as clean latents, as features of an encoder.

Models that look at pictures through an encoder and draw them too (BAGEL) read one picture in several copies, each with
markers of its own, in the order of `ROLES`. The copy that is noised is learnt. The others are context, for what comes
after them. A document is a list of parts, texts and copies, each of which training may leave out (dropout), so that the
model can be guided by it. A text stands between a begin and an end token of its own; the document has none.

A document column is one part, whose pictures say their roles themselves, or else the processor does. Beside its tokens
and latents are kept the pictures for the encoder, and which latents are clean.
"""

from typing import NamedTuple

import numpy as np

from training.data.config import ROLES, Segment, SourceConfig, TemplateConfig
from training.data.documents import IGNORED, Document


# n tokens of a document

TEXT, NOISED, LATENTS, FEATURES = ("text", *ROLES)
DOCUMENT = "document"
CLEAN = "clean"  # the segment that says for each image of latents of a document whether it is clean


class Part(NamedTuple):
    """A text of a document, or one copy of a picture.

    Attributes:
        segment: where its tokens and pictures are kept.
        role: "text", "noised", "latents" or "features"; or "document" for a whole one.
        is_learnt: whether it has a loss; of a document whether all its texts have one, and not the last segment alone.
        dropout: probability of leaving it out.
    """

    segment: Segment
    role: str
    is_learnt: bool
    dropout: float = 0.0


def parts_of(template: TemplateConfig) -> list[Part]:
    """List the parts of a document of a template, in order.

    `template.roles` says in which roles a picture stands. By default a learnt picture is noised and, if something
    follows it, repeated as context; a picture before them is latents and features if the last segment is a picture,
    else features alone.

    Raises:
        ValueError: a template whose order is drawn, or a segment that is neither text nor picture.
    """
    segments = template.parsed
    if template.has_both and template.caption_first is not None:
        raise ValueError(
            f"segments={template.segments} with caption_first={template.caption_first}: a model whose pictures have "
            "roles learns documents in the order as written; set caption_first: null"
        )
    parts = []
    for place, segment in enumerate(segments):
        is_last = place == len(segments) - 1
        is_learnt = template.targets == "all" or is_last
        if segment.type == "text":
            parts.append(Part(segment, TEXT, is_learnt, 0.0 if is_learnt else template.caption_dropout))
        elif segment.type == "image":
            roles = (template.roles or {}).get(segment.column)
            if roles is None and is_learnt:
                roles = [NOISED] if is_last else ROLES
            elif roles is None:
                roles = [LATENTS, FEATURES] if segments[-1].type == "image" else [FEATURES]
            parts += [_copy(segment, role, template) for role in ROLES if role in roles]
        elif segment.type == DOCUMENT:
            _refuse_dropouts(template)
            parts.append(Part(segment, DOCUMENT, template.targets == "all"))
        else:
            raise ValueError(
                f"segments={template.segments}: a model whose pictures have roles learns texts and pictures, no "
                f"{segment.type}; leave it out"
            )
    return parts


def _refuse_dropouts(template: TemplateConfig) -> None:
    for name in ("caption_dropout", "latents_dropout", "features_dropout"):
        if (value := getattr(template, name)) > 0:
            raise ValueError(
                f"{name}={value} of segments={template.segments}: the parts of a document column are not left out; "
                "give a segment for each column, or leave it out"
            )


def _copy(segment: Segment, role: str, template: TemplateConfig) -> Part:
    dropouts = {NOISED: 0.0, LATENTS: template.latents_dropout, FEATURES: template.features_dropout}
    kept_in = features_segment(segment) if role == FEATURES else segment
    return Part(kept_in, role, role == NOISED, dropouts[role])


def features_segment(segment: Segment) -> Segment:
    """Return the segment under which the features' copies of a picture, or of a document's pictures, are kept."""
    return Segment(FEATURES, segment.column)


def clean_segment(segment: Segment) -> Segment:
    """Return the segment under which is kept which latents of a document are clean."""
    return Segment(CLEAN, segment.column)


def segments_of_parts(config: SourceConfig) -> list[Segment]:
    """List the segments that the parts of a source's templates are kept under, each once."""
    segments: dict[Segment, None] = {}
    for template in config.templates:
        for part in parts_of(template):
            segments[part.segment] = None
            if part.role == DOCUMENT:
                segments |= dict.fromkeys((features_segment(part.segment), clean_segment(part.segment)))
    return list(segments)


def part_lengths(source, parts: list[Part]) -> list[np.ndarray]:
    """Count the tokens of each part of every record.  parts x (records, variants)"""
    return [source.columns[part.segment].lengths.astype(np.int64) for part in parts]


def mean_tokens(source, parts: list[Part]) -> np.ndarray:
    """Average the tokens of a document by modality, over records, variants and what is left out.  (modalities,)

    How those of a document column are shared is seen in up to 1,024 records.
    """
    vocabulary, means = source.vocabulary, np.zeros(len(source.vocabulary.modalities))
    modalities = dict.fromkeys((NOISED, LATENTS), vocabulary.image_modality) | {FEATURES: vocabulary.features_modality}
    for part, lengths in zip(parts, part_lengths(source, parts), strict=True):
        if part.role == DOCUMENT:
            records = np.unique(np.linspace(0, len(lengths) - 1, 1024).astype(np.int64)).tolist()
            ids = np.concatenate([source.columns[part.segment].ids(record, 0) for record in records])
            counts = np.bincount(vocabulary.modality_ids(ids), minlength=len(means))
            means += lengths.mean() * counts / counts.sum()
            continue
        markers = lengths.mean() if part.role == TEXT else 2
        means[0] += (1 - part.dropout) * markers
        means[modalities.get(part.role, 0)] += (1 - part.dropout) * (lengths.mean() - markers)
    return means


def draw_omitted(parts: list[Part], uniform: np.ndarray) -> np.ndarray:
    """Draw which parts are left out, each by itself.  (documents, at least parts) in [0, 1) -> (documents,) bit sets"""
    dropouts = np.array([part.dropout for part in parts])
    return (uniform[:, : len(parts)] < dropouts) @ (1 << np.arange(len(parts), dtype=np.int64))


def is_omitted(omitted: np.ndarray | int, place: int):
    """True where the part at a place is in the bit set."""
    return (omitted >> place) & 1 == 1


class Copy(NamedTuple):
    """A part of a record: a text, or one copy of a picture with its values, (C, h, w)."""

    role: str
    ids: np.ndarray
    is_learnt: bool
    is_omitted: bool = False
    values: np.ndarray | None = None


def compose_parts(source, parts: list[Part], record: int, variant: int, omitted: int = 0) -> Document:
    """Compose the document of a record, see `join_copies`.

    Args:
        omitted: a bit set of the parts that are left out.
    """
    if parts[0].role == DOCUMENT:
        return join_copies(_copies_of_document(source, parts[0], record, variant))
    copies = []
    for place, part in enumerate(parts):
        ids, values = source.columns[part.segment].ids(record, variant), None
        if part.role != TEXT:
            (values,) = source.image_columns[part.segment].images(record, variant)
        copies.append(Copy(part.role, ids, part.is_learnt, bool(is_omitted(omitted, place)), values))
    return join_copies(copies)


def _copies_of_document(source, part: Part, record: int, variant: int) -> list[Copy]:
    """Take a document column apart: each text ends with the end token, each picture with its end marker."""
    vocabulary, segment = source.vocabulary, part.segment
    ids = source.columns[segment].ids(record, variant)
    latents = iter(source.image_columns[segment].images(record, variant))
    pictures = iter(source.image_columns[features_segment(segment)].images(record, variant))
    clean = iter(source.columns[clean_segment(segment)].ids(record, variant).tolist())
    ends = np.flatnonzero((ids == vocabulary.eos) | (ids == vocabulary.eoi))
    spans, copies = np.split(ids, ends[:-1] + 1), []
    for place, span in enumerate(spans):
        if span[1] == vocabulary.image_token:
            is_noised = not next(clean)
            copies.append(Copy(NOISED if is_noised else LATENTS, span, is_noised, values=next(latents)))
        elif span[1] == vocabulary.features_token:
            copies.append(Copy(FEATURES, span, False, values=next(pictures)))
        else:
            copies.append(Copy(TEXT, span, part.is_learnt or place == len(spans) - 1))
    return copies


def join_copies(copies: list[Copy]) -> Document:
    """Join texts and copies of pictures to a document.

    A text has consecutive positions; a copy of a picture has one, with its markers. A noised copy takes no position of
    its own, so the clean copy behind it stands at the same one. A copy that is left out takes its position all the
    same, a text does not (BAGEL). The first token of a learnt text is no target, and neither are markers of pictures:
    whoever asks for a picture writes them.
    """
    ids, labels, positions, images, pictures = [], [], [], [], []
    position = 0
    texts = [place for place, copy in enumerate(copies) if copy.role == TEXT and not copy.is_omitted]
    for place, (role, of_copy, is_learnt, is_omitted, values) in enumerate(copies):
        own, moves = of_copy.astype(np.int64), len(of_copy) if role == TEXT else int(role != NOISED)
        if not is_omitted:
            ids.append(own)
            labels.append(np.full(len(own), IGNORED, dtype=np.int64))
            if role == TEXT and is_learnt:
                labels[-1][1:] = own[1:]
            positions.append(position + (np.arange(len(own)) if role == TEXT else np.zeros(len(own), dtype=np.int64)))
            if role == FEATURES:
                pictures.append(values)
            elif role != TEXT:
                is_first = bool(texts) and place < texts[0]
                images.append({"values": values, "clean": not is_learnt, "first": is_first})
        position += 0 if role == TEXT and is_omitted else moves
    return Document(*map(np.concatenate, (ids, labels, positions)), images, pictures)
