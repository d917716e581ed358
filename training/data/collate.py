"""Rows to a batch of tensors."""

import numpy as np
import torch


ROW_FIELDS = ("input_ids", "modality_ids", "position_ids", "document_ids", "labels")


def collate(rows: list[dict[str, np.ndarray]], config=None, multiple_of: int = 1) -> dict:
    """Stack rows.  N x (L,) -> (N, L) int64 tensors

    Args:
        rows: rows of a `RowStream` or of `single_direction_rows`.
        config: a `MoTConfig`; when given, the batch carries the forward's `routing`, so that the forward itself has no
            step that depends on the data.
        multiple_of: pads each tower's slice, see `ModalityRouting.from_modality_ids`.

    Raises:
        ValueError: no rows, or rows of different lengths.
    """
    if not rows:
        raise ValueError("collate got no rows; is the stream's range empty?")
    lengths = {len(row["input_ids"]) for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"collate got rows of lengths {sorted(lengths)}; make them with one row_length")
    batch = {
        name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.int64, copy=False))
        for name in ROW_FIELDS
    }
    if config is not None:
        from modeling_mot.modality_routing import ModalityRouting

        batch["routing"] = ModalityRouting.from_modality_ids(batch["modality_ids"], config, multiple_of)
    return batch
