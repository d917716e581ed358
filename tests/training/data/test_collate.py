from itertools import islice

import pytest
import torch

from modeling_mot import ModalityRouting
from training.data import RowStream, collate


def test_collate_stacks_rows(prepare, pair_source, data_config):
    rows = list(islice(RowStream(data_config(), [prepare(pair_source())]).rows(), 3))
    batch = collate(rows)
    assert set(batch) == {"input_ids", "modality_ids", "position_ids", "document_ids", "labels"}
    assert all(value.shape == (3, 128) and value.dtype == torch.long for value in batch.values())
    assert torch.equal(batch["labels"][1], torch.from_numpy(rows[1]["labels"]))


def test_collate_builds_the_routing_of_the_batch(prepare, pair_source, data_config, tiny_config):
    batch = collate(list(islice(RowStream(data_config(), [prepare(pair_source())]).rows(), 2)), config=tiny_config())
    routing, modality_ids = batch["routing"], batch["modality_ids"].flatten()
    assert isinstance(routing, ModalityRouting)
    assert routing.counts == tuple((modality_ids == index).sum().item() for index in range(3))
    assert torch.equal(modality_ids[routing.order], modality_ids.sort(stable=True).values)


def test_collate_refuses_no_rows():
    with pytest.raises(ValueError, match="no rows"):
        collate([])
