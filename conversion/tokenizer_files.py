"""The tokenizer of a MoT for a dense model: the same files, without the processor around it and the tokens it cuts off."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from conversion.commands import read_json, reading
from conversion.key_maps import ConversionError
from modeling_mot.hub_trust import without_code
from modeling_mot.processing_prompts import as_it_was


TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # a folder of those with names of their own
FILES = (
    TOKENIZER, SETTINGS, TEMPLATE, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt",
)  # fmt: skip


def check_cut(folder: Path, vocab_size: int) -> None:
    """Refuse to cut what cannot be cut: a vocabulary's own tokens, which merges are made of. Raises ConversionError."""
    if not (folder / TOKENIZER).is_file():
        return
    with reading(f"{folder / TOKENIZER} cannot be read"):
        own = Tokenizer.from_file(str(folder / TOKENIZER)).get_vocab_size(with_added_tokens=False)
    if vocab_size < own:
        raise ConversionError(
            f"--vocab-size {vocab_size} cuts into the {own} tokens of {folder / TOKENIZER}; keep those"
        )


def copy_tokenizer(source: Path, out: Path, vocab_size: int) -> None:
    """Copy a tokenizer's files, where there are any.

    Args:
        vocab_size: added tokens from here on, the settings that name them and a chat template that writes them are left
            out.
    """
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, out / TEMPLATES)
    cut = _cut_tokens(out / TOKENIZER, vocab_size) if (out / TOKENIZER).is_file() else []
    for path in (out / TEMPLATE, *(out / TEMPLATES).glob("*.jinja")):
        if path.is_file():
            template = as_it_was(path.read_text(encoding="utf-8"))
            path.write_text(template, encoding="utf-8")
            if _writes(template, cut):
                path.unlink()
    if (out / SETTINGS).is_file():
        settings = {
            name: value
            for name, value in without_code(read_json(out / SETTINGS)).items()
            # The processor is a MoT's, and so is its code.
            if name != "processor_class" and not _writes(json.dumps(value, ensure_ascii=False), cut)
        }
        _write_json(out / SETTINGS, settings)


def _cut_tokens(path: Path, vocab_size: int) -> list[str]:
    """Take the added tokens from `vocab_size` on out of a tokenizer.json. -> those tokens"""
    with reading(f"{path.name} of the source cannot be read"):
        Tokenizer.from_file(str(path))
    tree = read_json(path)
    cut = [token["content"] for token in tree["added_tokens"] if token["id"] >= vocab_size]
    if cut:
        tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < vocab_size]
        # A begin token that was added, together with the template that puts it before a text.
        if _writes(json.dumps(tree.get("post_processor"), ensure_ascii=False), cut):
            tree["post_processor"] = None
        _write_json(path, tree)
    return cut


def _writes(text: str, tokens: list[str]) -> bool:
    return any(token in text for token in tokens)


def _write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
