"""Documents whose pictures stand in several roles: as noised latents, as clean latents, as features of an encoder.

Models that look at pictures through an encoder and draw them too (BAGEL) read one picture in several copies, each with
markers of its own, in the order of `ROLES`. The copy that is noised is learnt. The others are context, for what comes
after them. A document is a list of parts, texts and copies, each of which training may leave out (dropout), so that the
model can be guided by it. A text stands between a begin and an end token of its own; the document has none.
"""

from typing import NamedTuple

import numpy as np

from training.data.config import ROLES, Segment, SourceConfig, TemplateConfig
from training.data.documents import IGNORED, Document, Vocabulary


# n tokens of a document

TEXT, NOISED, LATENTS, FEATURES = ("text", *ROLES)


class Part(NamedTuple):
    """A text of a document, or one copy of a picture.

    Attributes:
        segment: where its tokens and pictures are kept.
        role: "text", "noised", "latents" or "features".
        is_learnt: whether it has a loss.
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
        else:
            raise ValueError(
                f"segments={template.segments}: a model whose pictures have roles learns texts and pictures, no "
                f"{segment.type}; give a text: or image: segment for each column"
            )
    return parts


def _copy(segment: Segment, role: str, template: TemplateConfig) -> Part:
    dropouts = {NOISED: 0.0, LATENTS: template.latents_dropout, FEATURES: template.features_dropout}
    kept_in = features_segment(segment) if role == FEATURES else segment
    return Part(kept_in, role, role == NOISED, dropouts[role])


def features_segment(segment: Segment) -> Segment:
    """Return the segment under which the features' copies of a picture are kept."""
    return Segment(FEATURES, segment.column)


def kept_segments(config: SourceConfig, vocabulary: Vocabulary) -> list[Segment]:
    """List the segments of a source whose tokens are kept; with roles, those of the parts of its templates."""
    if not vocabulary.has_roles:
        return config.prepared_segments
    return list(dict.fromkeys(part.segment for template in config.templates for part in parts_of(template)))


def part_lengths(source, parts: list[Part]) -> list[np.ndarray]:
    """Count the tokens of each part of every record.  parts x (records, variants)"""
    return [source.columns[part.segment].lengths.astype(np.int64) for part in parts]


def mean_tokens(source, parts: list[Part]) -> np.ndarray:
    """Average the tokens of a document by modality, over records, variants and what is left out.  (modalities,)"""
    vocabulary, means = source.vocabulary, np.zeros(len(source.vocabulary.modalities))
    for part, lengths in zip(parts, part_lengths(source, parts), strict=True):
        kept = (1 - part.dropout) * lengths.mean()
        markers = kept if part.role == TEXT else (1 - part.dropout) * 2
        means[0] += markers
        if part.role != TEXT:
            means[vocabulary.features_modality if part.role == FEATURES else vocabulary.image_modality] += (
                kept - markers
            )
    return means


def draw_omitted(parts: list[Part], uniform: np.ndarray) -> np.ndarray:
    """Draw which parts are left out, each by itself.  (documents, at least parts) in [0, 1) -> (documents,) bit sets"""
    dropouts = np.array([part.dropout for part in parts])
    return (uniform[:, : len(parts)] < dropouts) @ (1 << np.arange(len(parts), dtype=np.int64))


def is_omitted(omitted: np.ndarray | int, place: int):
    """True where the part at a place is in the bit set."""
    return (omitted >> place) & 1 == 1


def compose_parts(source, parts: list[Part], record: int, variant: int, omitted: int = 0) -> Document:
    """Compose the document of a record.

    A text has consecutive positions; a copy of a picture has one, with its markers. A noised copy takes no position of
    its own, so the clean copy behind it stands at the same one. A copy that is left out takes its position all the
    same, a text does not (BAGEL). The first token of a learnt text is no target, and neither are markers of pictures:
    whoever asks for a picture writes them.

    Args:
        omitted: a bit set of the parts that are left out.
    """
    ids, labels, positions, images, pictures = [], [], [], [], []
    position = 0
    texts = [place for place, part in enumerate(parts) if part.role == TEXT and not is_omitted(omitted, place)]
    for place, part in enumerate(parts):
        own = source.columns[part.segment].ids(record, variant).astype(np.int64)
        if part.role == TEXT:
            if not is_omitted(omitted, place):
                ids.append(own)
                labels.append(np.where(np.arange(len(own)) > 0, own, IGNORED) if part.is_learnt else _none(own))
                positions.append(position + np.arange(len(own)))
                position += len(own)
            continue
        if not is_omitted(omitted, place):
            ids.append(own)
            labels.append(_none(own))
            positions.append(np.full(len(own), position))
            (values,) = source.image_columns[part.segment].images(record, variant)
            if part.role == FEATURES:
                pictures.append(values)
            else:
                first = bool(texts) and place < texts[0]
                images.append({"values": values, "clean": not part.is_learnt, "first": first})
        position += part.role != NOISED
    return Document(*map(np.concatenate, (ids, labels, positions)), images, pictures)


def _none(ids: np.ndarray) -> np.ndarray:
    return np.full(len(ids), IGNORED, dtype=np.int64)
