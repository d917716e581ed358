"""What the data cards of a recipe's sources say of licences, for the manifest of a run and so for its model card."""

import logging
import re
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard

from . import carried_path
from .config import DataConfig


logger = logging.getLogger(__name__)
KEYS = ("pretty_name", "license", "license_name", "license_link", "language")


def data_cards(config: DataConfig) -> dict[str, dict]:
    """`path` of a source -> what the README.md of its folder declares of `KEYS`, and `attribution`, the section of it
    that a heading with the word licence names; only of sources in local folders that have one. Data sets on the Hub have
    their cards there."""
    cards = {}
    for path in dict.fromkeys(source.path for source in (*config.sources, *config.validation_sources)):
        file = (carried_path() if path == "carried" else Path(path).expanduser()) / "README.md"
        if file.is_file():
            try:
                cards[path] = _declared(DatasetCard(file.read_text(encoding="utf-8")))
            except (ValueError, yaml.YAMLError) as error:
                logger.warning("%s is not read, its licence is not in the manifest: %s", file, error)
    return cards


def _declared(card: DatasetCard) -> dict:
    found = {key: card.data.get(key) for key in KEYS if card.data.get(key) is not None}
    section = re.search(
        r"^##+[^\n]*licen[cs]e[^\n]*\n(.*?)(?=^#|\Z)", card.text, re.IGNORECASE | re.MULTILINE | re.DOTALL
    )
    return found | ({"attribution": section[1].strip()} if section else {})
