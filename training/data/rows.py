"""The rows of a run: the training stream, and held-out rows by source and direction."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np

from modeling_mot import MoTProcessor
from training.config import ConfigError, digest_of
from training.data.config import MODALITY_OF_TYPE, DataConfig, Segment, SourceConfig, TemplateConfig
from training.data.documents import IGNORED, Document, Vocabulary, build_row, document_lengths, pack
from training.data.preparing.batch_tokenizer import Preparing
from training.data.preparing.preparation import TokenizedSource
from training.data.roles import compose_parts, part_lengths, parts_of
from training.data.stream import RowStream, check_row_length, compose_record


# L tokens of a row

MODALITIES = tuple(MODALITY_OF_TYPE.values())
# The name that documents without a direction have among directions.
INTERLEAVED = "interleaved"


def single_direction_rows(
    source: TokenizedSource,
    direction: str,
    row_length: int,
    segments: tuple[str, ...] | None = None,
    limit: int | None = None,
    start: int = 0,
) -> list[dict]:
    """Pack the records of a source as documents of one direction.

    Args:
        source: a tokenised source; variant 0, the unchanged one, is used.
        direction: `text-to-image`, `image-to-text`, `text-to-speech` and so on, one modality alone: `text`, or several
            that are given: `image+text-to-image`.
        row_length: tokens of a row.
        segments: the segments to take, such as `("text:name", "image:image")`, in the order of the direction; None: the
            first segment of each modality.
        limit: number of records; None: all.
        start: first record.

    Returns:
        Rows as of a `RowStream`, each array (L,). Labels are -100 except on the target: the codes of a picture or the
        units of a sound without the markers around them, or the tokens of a text with the end of the document.
        A continuous image that is the target has no labels, since it is diffused; one that is given is clean.

    Raises:
        ValueError: a direction that the source has no segments for, or a document that is longer than a row.
    """
    # One document for each record; a text may be longer than a row, no other document.
    chosen = _choose(source, direction, segments)
    stop = len(source) if limit is None else min(len(source), start + limit)
    vocabulary, parts = source.vocabulary, None
    if vocabulary.has_roles:
        parts = parts_of(_template_of(source.config, chosen))
        lengths = sum(of_part[start:stop, 0] for of_part in part_lengths(source, parts))
    else:
        columns = [source.columns[segment] for segment in chosen]
        lengths = sum(column.lengths[start:stop, 0].astype(np.int64) for column in columns) + vocabulary.frame_length
    if not len(lengths):
        raise ValueError(
            f"start={start} and limit={limit} leave no record of the {len(source)} of {source.config.name!r}"
        )
    longest = int(lengths.max())
    if longest > row_length and (len(chosen) > 1 or chosen[0].type != "text"):
        raise ValueError(
            f"row_length={row_length} is shorter than a {direction} document of {longest} tokens of source "
            f"{source.config.name!r}; set row_length to {longest} or more"
        )

    # A picture or a sound that is the target has no labels at its markers.
    def document(record: int) -> Document:
        if parts is not None:
            return compose_parts(source, parts, record, 0)
        document = compose_record(source, chosen, record, 0, targets="last")
        if chosen[-1].type != "text":
            document.labels[vocabulary.modality_ids(document.ids) == 0] = IGNORED
        return document

    return _packed(document, lengths, row_length, vocabulary, start)


def interleaved_rows(
    source: TokenizedSource, template: TemplateConfig, row_length: int, clean_copies: bool = False
) -> list[dict]:
    """Pack the records of a source as documents that are learnt as in training: in the order as written.

    Args:
        source: a tokenised source; variant 0 is used: unchanged pictures and sounds, and the first draw of a text and
            its sound by turns. So two evaluations see the same documents.
        template: one of the source's, such as a document column, or one with `interleaving`.
        row_length: tokens of a row.
        clean_copies: see `compose`; as in the training data.

    Returns:
        Rows as of a `RowStream`, each array (L,). Every token that training learns has a label.

    Raises:
        ValueError: a document with a picture or a sound that is longer than a row.
    """
    check_row_length(source, row_length, clean_copies)
    vocabulary = source.vocabulary
    if vocabulary.has_roles:
        parts = parts_of(template)
        lengths = sum(of_part[:, 0] for of_part in part_lengths(source, parts))
        return _packed(lambda record: compose_parts(source, parts, record, 0), lengths, row_length, vocabulary)
    segments = template.parsed if template.interleaved is None else [template.interleaved]
    lengths = document_lengths(source.columns, vocabulary, segments, template.targets, clean_copies)[:, 0]

    def document(record: int) -> Document:
        return compose_record(source, segments, record, 0, template.targets, clean_copies)

    return _packed(document, lengths, row_length, vocabulary)


def _packed(
    document: Callable[[int], Document], lengths: np.ndarray, row_length: int, vocabulary: Vocabulary, start: int = 0
) -> list[dict]:
    """Pack `document(start)`, `document(start + 1)`, ... into rows; `lengths` are their numbers of tokens."""
    return [
        build_row([document(start + p.document).cut(p.start, p.stop) for p in pieces], row_length, vocabulary)
        for pieces in pack(lengths, row_length)
    ]


def _template_of(config: SourceConfig, segments: list[Segment]) -> TemplateConfig:
    """Return the template of these segments, as it is learnt; with roles, no other documents have been prepared.

    Raises:
        ValueError: there is none.
    """
    for template in config.templates:
        if template.parsed == segments:
            return template
    raise ValueError(
        f"source {config.name!r} has no template of {[str(segment) for segment in segments]} in this order, so its "
        "pictures have no roles in such documents; the templates are "
        f"{', '.join(str(template.segments) for template in config.templates)}"
    )


def _choose(source: TokenizedSource, direction: str, segments: tuple[str, ...] | None) -> list[Segment]:
    """Choose the segments of a direction, in its order."""
    given, _, target = direction.rpartition("-to-")
    wanted = [*(given.split("+") if given else []), target]
    if any(name not in MODALITIES for name in wanted):
        raise ValueError(
            f"direction={direction!r} is not a modality, nor two joined by -to-, of which the first may be several "
            f"joined by +; the modalities are {MODALITIES}"
        )
    known = source.config.segments if source.vocabulary.has_roles else list(source.columns)
    if segments is not None:
        chosen = [Segment.parse(written) for written in segments]
        kinds = [MODALITY_OF_TYPE.get(segment.type) for segment in chosen]
        if kinds != wanted or any(segment not in known for segment in chosen):
            raise ValueError(
                f"segments={segments} do not make {direction!r} of source {source.config.name!r}, "
                f"which has {[str(segment) for segment in known]}"
            )
        return chosen
    chosen = []
    for name in wanted:
        fitting = [segment for segment in known if MODALITY_OF_TYPE.get(segment.type) == name]
        if not fitting:
            raise ValueError(
                f"direction={direction!r} needs {name}, but source {source.config.name!r} has "
                f"{[str(segment) for segment in known]}; add a template with such a segment"
            )
        # The first that is not taken yet: an image may be made from another.
        chosen.append(next((segment for segment in fitting if segment not in chosen), fitting[0]))
    return chosen


def prepare_sources(
    config: DataConfig, processor, workers: int = 1, validation: bool = False, vae=None, progress: bool = False
) -> list[TokenizedSource]:
    """Tokenise all training sources, or all validation sources (never augmented), or find them in the cache.

    Args:
        workers: processes that tokenise; 1: this one.
        vae: a diffusers autoencoder that makes the latents of continuous images, where `config.latents` is "cached".
            Without it their pixels are kept.
        progress: shows a bar for each source that is tokenised.
    """
    preparing = Preparing(
        processor,
        config.cache_path,
        augmentation=None if validation else config.augmentation,
        limits=config.limits,
        vae=vae if config.latents == "cached" else None,
        workers=workers,
        progress=progress,
    )
    sources = config.validation_sources if validation else config.sources
    return [TokenizedSource.prepare(source, preparing) for source in sources]


def build_stream(config: DataConfig, processor, workers: int = 1, vae=None) -> RowStream:
    """Build the training stream of a data section."""
    config.validate()
    return RowStream(config, prepare_sources(config, processor, workers, vae=vae))


def prepare_rows(
    data: DataConfig, processor: MoTProcessor, held_out_rows: int, vae=None
) -> tuple[RowStream, dict[str, list[dict]], str]:
    """Tokenise the sources of a recipe, or find them in the cache, and pack the held-out rows.

    Args:
        vae: a diffusers autoencoder for continuous images, see `prepare_sources`.

    Returns:
        The stream; the held-out rows, see `prepare_held_out`; a fingerprint of the training data and of how it is
        mixed, which a resumed run must share.

    Raises:
        ConfigError: a source that cannot be used, with the source, the record and the way out.
    """
    with _naming_data(data):
        sources = prepare_sources(data, processor, vae=vae)
        stream = RowStream(data, sources)
    held_out = prepare_held_out(data, processor, held_out_rows, vae)
    return stream, held_out, _fingerprint(data, sources)


def prepare_held_out(
    data: DataConfig, processor: MoTProcessor, most: int, vae=None, progress: bool = False
) -> dict[str, list[dict]]:
    """Tokenise the held-out sources, or find them in the cache, and pack their rows by source and direction.

    Args:
        most: rows of each direction of each source; 0: nothing is tokenised.
        vae, progress: see `prepare_sources`.

    Returns:
        `<source>/<direction>` -> packed rows. A template that no direction comes from, such as a document column or
        one with `interleaving`, gives `<source>/interleaved`: the first such template of a source.

    Raises:
        ConfigError: a source that cannot be used, with the source, the record and the way out.
    """
    held_out = {}
    with _naming_data(data):
        for source in prepare_sources(data, processor, 1, True, vae, progress) if most else []:
            name = source.config.name
            for direction, segments in directions_of(source.config, source.vocabulary.has_roles).items():
                rows = single_direction_rows(source, direction, data.row_length, segments)
                held_out[f"{name}/{direction}"] = rows[:most]
            template = interleaved_template(source.config, source.vocabulary.has_roles)
            if template is not None:
                rows = interleaved_rows(source, template, data.row_length, data.clean_copies)
                held_out[f"{name}/{INTERLEAVED}"] = rows[:most]
    return held_out


@contextmanager
def _naming_data(data: DataConfig) -> Iterator[None]:
    """Turn errors of data into a ConfigError that names the section, and the cache if it cannot be written."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    except OSError as error:
        raise ConfigError(f"data: {error}; what is prepared is kept in data.cache_dir={data.cache_path}") from error


def directions_of(source: SourceConfig, as_written: bool = False) -> dict[str, tuple[str, ...]]:
    """List the directions that a source can be asked for, each with its segments.

    A template of one segment gives its modality: `text`, `image` or `speech`. One of a text and another segment gives
    both ways. One that learns only its last segment gives that segment from the others (`image+text-to-image`). One
    with `interleaving` gives none: its documents change direction at every stretch.

    Args:
        as_written: each template gives its last segment from the others alone.
    """
    directions = {}
    for template in source.templates:
        if template.interleaving is not None:
            continue
        segments = template.parsed
        kinds = [segment.type for segment in segments]
        learns_last = template.targets == "last" and (len(kinds) > 2 or template.caption_first is None)
        if len(kinds) > 1 and (as_written or learns_last):
            *given, target = (MODALITY_OF_TYPE[kind] for kind in kinds)
            directions.setdefault(f"{'+'.join(given)}-to-{target}", tuple(map(str, segments)))
            continue
        if len(kinds) == 1 and kinds[0] in MODALITY_OF_TYPE:
            directions.setdefault(MODALITY_OF_TYPE[kinds[0]], (str(segments[0]),))
        if len(kinds) == 2 and kinds.count("text") == 1:
            text, other = sorted(segments, key=lambda segment: segment.type != "text")
            modality = MODALITY_OF_TYPE[other.type]
            directions.setdefault(f"text-to-{modality}", (str(text), str(other)))
            directions.setdefault(f"{modality}-to-text", (str(other), str(text)))
    return directions


def interleaved_template(source: SourceConfig, as_written: bool = False) -> TemplateConfig | None:
    """Find the first template of a source that no direction comes from, see `directions_of`; None without one."""
    alone = (replace(source, templates=[template]) for template in source.templates)
    return next((one.templates[0] for one in alone if not directions_of(one, as_written)), None)


def _fingerprint(data: DataConfig, sources: list[TokenizedSource]) -> str:
    made_of = {
        "sources": [source.fingerprint for source in sources],
        "mixture": [
            [source.config.name, source.config.weight, [_described(template) for template in source.config.templates]]
            for source in sources
        ],
        "rows": [data.row_length, data.seed, data.weights_by, data.block_documents, data.replaced_codes],
    }
    if data.clean_copies:
        made_of["clean_copies"] = True
    if data.token_shares is not None:
        made_of["token_shares"] = data.token_shares
    return digest_of(made_of)


def _described(template: TemplateConfig) -> dict:
    """List the settings of a template, without those that older runs do not know where they change nothing."""
    later = {"interleaving": None, "roles": None, "latents_dropout": 0.0, "features_dropout": 0.0}
    return {name: value for name, value in asdict(template).items() if name not in later or value != later[name]}
