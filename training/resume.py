"""What a run goes on from, and whether it is still the same run, and the same on all ranks."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from training.checkpoints import gather_objects, move_aside, newest_intact, remove_unfinished
from training.config import ConfigError
from training.run_folder import RunFolder


DATA = "data"
# Keys that change nothing of what is computed; of the data the fingerprint says whether they are the same.
_FREE = (
    "data.", "evaluation.", "samples.", "model.gradient_checkpointing", "train.output_dir", "train.resume",
    "train.overwrite", "train.save_", "train.keep_checkpoints", "train.not_finite_limit", "train.tracker",
    "train.progress_bar", "train.processes", "train.timeout_seconds", "train.cpu", "train.rows", "train.accumulation",
)  # fmt: skip


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def refuse_different(accelerator: Accelerator, values: Mapping[str, Any]) -> None:
    """Refuse ranks that were not started with the same: each would train on, and none would be what was asked for.

    Args:
        values: JSON values, nested or not. Digests are compared; the values travel only where those differ.

    Raises:
        ConfigError: on every rank, with the keys that differ, and their values on the first ranks that differ.
    """
    if accelerator.num_processes == 1:
        return
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    if len(set(gather_objects(digest, dist.group.WORLD))) == 1:
        return
    of_ranks = [flatten(of_rank) for of_rank in gather_objects(values, dist.group.WORLD)]
    different = []
    for key in dict.fromkeys(key for of_rank in of_ranks for key in of_rank):
        found = [of_rank.get(key) for of_rank in of_ranks]
        if (rank := next((rank for rank, value in enumerate(found) if value != found[0]), None)) is not None:
            different.append(f"{key} is {found[0]!r} on rank 0, {found[rank]!r} on rank {rank}")
    raise ConfigError(f"ranks differ: {'; '.join(different)}. Start all of them with the same recipe and the same data")


def find_checkpoint(
    run: RunFolder, resume: bool | str, accelerator: Accelerator
) -> tuple[dict[str, Any] | None, list[str]]:
    """(the manifest of the newest intact checkpoint, or None; what there is to say of others). Every rank calls it.

    Damaged ones that are newer are renamed, so that they are not in the way of those to come.

    Raises:
        ConfigError: there are checkpoints, but none is intact.
    """
    if not resume or not run.saved_steps():
        return None, []
    manifest, damaged = newest_intact(run, accelerator.process_index, accelerator.num_processes)
    found = [f"{folder.name} is passed over: {reason}" for folder, reason in damaged]
    if manifest is None:
        raise ConfigError(
            f"train.resume={resume}: no checkpoint in {run.checkpoints} is intact ({'; '.join(found)}). They are left as "
            "they are; choose another train.output_dir to begin anew"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        move_aside([folder for folder, _ in damaged])
        remove_unfinished(run)
    accelerator.wait_for_everyone()
    return manifest, found


def refuse_changes(
    stored: Mapping[str, Any], present: Mapping[str, Any], despite: Sequence[str], changed_source: str | None = None
) -> list[str]:
    """Refuse to go on with what would not be the same run; returns what is different and was allowed to be.

    Args:
        stored, present: `config` (the recipe as a tree), `data_fingerprint`, `rows_in_a_step`.
        despite: keys that may differ, or "data".
        changed_source: which source is not what it was, where that is known.

    Raises:
        ConfigError: anything else differs, or a key in `despite` is none.
    """
    before, now = flatten(stored["config"]), flatten(present["config"])
    for key in despite:
        if key != DATA and key not in now and key not in before:
            near = difflib.get_close_matches(key, [DATA, *now], n=1)
            raise ConfigError(
                f"train.resume_despite names {key!r}, which is no key{f'; did you mean {near[0]}?' if near else ''}"
            )
    changes = {
        key: (before.get(key), now.get(key))
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and not key.startswith(_FREE)
    }
    if stored["rows_in_a_step"] != present["rows_in_a_step"]:
        changes["train.rows"] = (
            f"{stored['rows_in_a_step']} rows in a step",
            f"{present['rows_in_a_step']} (train.rows x train.accumulation x processes)",
        )
    if stored["data_fingerprint"] != present["data_fingerprint"]:
        changes[DATA] = (stored["data_fingerprint"][:12], present["data_fingerprint"][:12])
        if changed_source is not None:
            changes[DATA] = (changes[DATA][0], f"{changes[DATA][1]} ({changed_source})")
    refused = {key: values for key, values in changes.items() if key not in despite}
    if refused:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in refused.items())
        raise ConfigError(
            f"the run would not go on as it began: {listed}. Restore {'it' if len(refused) == 1 else 'them'}, or allow it "
            f"by name: train.resume_despite=[{', '.join(refused)}]"
        )
    return [f"{key} was {old!r}, is {new!r}" for key, (old, new) in changes.items()]
