"""Data: sources -> interleaved documents -> tokens -> packed rows."""

from pathlib import Path

from .collate import collate
from .config import AugmentationConfig, DataConfig, SourceConfig, TemplateConfig
from .evaluation_rows import single_direction_rows
from .stream import RowStream
from .tokenized import TokenizedSource


__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "RowStream",
    "SourceConfig",
    "TemplateConfig",
    "TokenizedSource",
    "build_stream",
    "carried_path",
    "collate",
    "prepare_sources",
    "single_direction_rows",
]


def carried_path() -> Path:
    """The folder of the carried data set; `datasets.load_dataset(str(carried_path()), "emoji")` loads it."""
    return Path(__file__).parent / "carried"


def prepare_sources(
    config: DataConfig, processor, num_proc: int = 1, validation: bool = False, vae=None, progress: bool = False
) -> list[TokenizedSource]:
    """Tokenise all training sources, or all validation sources (never augmented), or find them in the cache.

    Args:
        vae: a diffusers autoencoder that makes the latents of continuous images, where `config.latents` is "cached".
            Without it their pixels are kept.
        progress: shows a bar for each source that is tokenised.
    """
    vae = vae if config.latents == "cached" else None
    sources = config.validation_sources if validation else config.sources
    augmentation = None if validation else config.augmentation
    return [
        TokenizedSource.prepare(
            source, processor, config.cache_path, num_proc, augmentation, vae, config.limits, progress
        )
        for source in sources
    ]


def build_stream(config: DataConfig, processor, num_proc: int = 1, vae=None) -> RowStream:
    """The training stream of a data section."""
    config.validate()
    return RowStream(config, prepare_sources(config, processor, num_proc, vae=vae))
