"""The rows of a run: the training stream, and held-out rows in one direction each."""

import hashlib
import json
from dataclasses import asdict

from modeling_mot import MoTProcessor
from training.config import ConfigError
from training.data import DataConfig, RowStream, SourceConfig, TokenizedSource, prepare_sources, single_direction_rows
from training.data.config import MODALITY_OF_TYPE


def prepare_rows(
    data: DataConfig, processor: MoTProcessor, held_out_rows: int, vae=None
) -> tuple[RowStream, dict[str, list[dict]], str]:
    """Tokenise what a recipe names, or find it in the cache.

    Args:
        vae: a diffusers autoencoder for continuous images, see `prepare_sources`.

    Returns:
        The stream; direction -> at most `held_out_rows` packed held-out rows; a fingerprint of the training data and of
        how it is mixed, which a resumed run must share.

    Raises:
        ConfigError: a source that cannot be used, with the source, the record and the way out.
    """
    try:
        sources = prepare_sources(data, processor, vae=vae)
        stream = RowStream(data, sources)
        held_out: dict[str, list[dict]] = {}
        for source in prepare_sources(data, processor, validation=True, vae=vae) if held_out_rows else []:
            for direction, segments in directions_of(source.config).items():
                if direction not in held_out:
                    rows = single_direction_rows(source, direction, data.row_length, segments)
                    held_out[direction] = rows[:held_out_rows]
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    except OSError as error:
        raise ConfigError(f"data: {error}; what is prepared is kept in data.cache_dir={data.cache_path}") from error
    return stream, held_out, _fingerprint(data, sources)


def directions_of(source: SourceConfig) -> dict[str, tuple[str, ...]]:
    """What can be asked of a source: `text` of a template of text alone, both ways of one of a text and another, and
    the last segment from the others (`image+text-to-image`) of one that learns only that."""
    directions = {}
    for template in source.templates:
        segments = template.parsed
        kinds = [segment.type for segment in segments]
        if template.targets == "last" and len(kinds) > 1 and (len(kinds) > 2 or template.caption_first is None):
            *given, target = (MODALITY_OF_TYPE[kind] for kind in kinds)
            directions.setdefault(f"{'+'.join(given)}-to-{target}", tuple(map(str, segments)))
            continue
        if kinds == ["text"]:
            directions.setdefault("text", (str(segments[0]),))
        if len(kinds) == 2 and kinds.count("text") == 1:
            text, other = sorted(segments, key=lambda segment: segment.type != "text")
            modality = MODALITY_OF_TYPE[other.type]
            directions.setdefault(f"text-to-{modality}", (str(text), str(other)))
            directions.setdefault(f"{modality}-to-text", (str(other), str(text)))
    return directions


def _fingerprint(data: DataConfig, sources: list[TokenizedSource]) -> str:
    made_of = {
        "sources": [source.fingerprint for source in sources],
        "mixture": [
            [source.config.name, source.config.weight, [asdict(template) for template in source.config.templates]]
            for source in sources
        ],
        "rows": [data.row_length, data.seed, data.weights_by, data.block_documents, data.replaced_codes],
    }
    if data.clean_copies:
        made_of["clean_copies"] = True
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
