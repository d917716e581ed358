"""Data: sources -> interleaved documents -> tokens -> packed rows."""

from training.data.collate import collate
from training.data.config import AugmentationConfig, DataConfig, SourceConfig, TemplateConfig, carried_path
from training.data.preparing.batch_tokenizer import Preparing
from training.data.preparing.preparation import TokenizedSource
from training.data.rows import build_stream, prepare_sources, single_direction_rows
from training.data.stream import RowStream


__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "Preparing",
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
