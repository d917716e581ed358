"""Prepared carried data against the carried processor's own documents."""

from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest

import training
from modeling_mot.processing_mot import MoTProcessor
from training.data import DataConfig, Preparing, RowStream, SourceConfig, TemplateConfig, TokenizedSource


PROCESSOR = Path(training.__file__).parent / "assets" / "processor"


@pytest.fixture(scope="module")
def processor():
    return MoTProcessor.from_pretrained(PROCESSOR)


def test_documents_of_rows_are_those_of_the_processor(processor, carried, tmp_path):
    template = TemplateConfig(["text:name", "image:image", "audio:audio"], caption_first=0.5)
    config = SourceConfig("emoji", "carried", [template], config="emoji", limit=8)
    source = TokenizedSource.prepare(config, Preparing(processor, tmp_path))
    records = datasets.load_dataset(carried, "emoji", split="train").select(range(8))
    expected = set()
    for record in records:
        text = {"type": "text", "text": record["name"]}
        others = [{"type": "image", "image": record["image"]}, {"type": "audio", "audio": record["audio"]["bytes"]}]
        for document in ([text, *others], [*others, text]):
            expected.add(tuple(np.asarray(processor(document)["input_ids"]).ravel().tolist()))
    stream = RowStream(DataConfig(row_length=256, block_documents=16), [source])
    found = set()
    for row in islice(stream.rows(), 40):
        for number in range(row["document_ids"].max() + 1):
            inside = row["document_ids"] == number
            found.add(tuple(row["input_ids"][inside].tolist()))
            assert np.array_equal(row["modality_ids"][inside], processor.modality_ids_of(row["input_ids"][inside]))
    assert found == expected
