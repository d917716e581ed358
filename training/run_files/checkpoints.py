"""Write, verify and read the checkpoints of a run, and decide which runs may go on from a checkpoint.

They are sharded safetensors and JSON, with nothing pickled. A checkpoint is there whole or not at all, and it is
verified before it is used.

    checkpoints/step-00000100/
        state/shard-0000R-model-0000P-of-00003.safetensors    by torch.distributed.checkpoint: rank R's share of part P
                                                              (weights, optimizer, average); any world reads it
        pretrained/                                           configuration and processor, to build a model from
        manifest.json                                         written last: step, rows, configuration, world, and the
                                                              size and sha256 of every other file and of itself
    checkpoints/latest                                        the name of the newest one

A checkpoint is written under another name, each file and folder is flushed to the disk, and then it is renamed.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from modeling_mot import MoTPreTrainedModel, MoTProcessor
from training.config import ConfigError, digest_of, flatten
from training.optimization import default_warmup
from training.run_files.folder import RunFolder, sync_folder, sync_tree, write_json
from training.world import gather_objects


FORMAT = 1
MANIFEST = "manifest.json"
# The parts that a rank's file is split into, so that writing one needs memory for one.
_PARTS = {"model": 1, "optimizer": 2, "average": 3}


class SaveError(OSError):
    """A checkpoint could not be written, on any of the ranks; those before it are untouched."""


class DamagedError(ValueError):
    """A checkpoint is not what was written; the message says in what."""


# ------------------------------------------------------------------------------------------------------ what is in them


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """List the stored tensors of a model, by name: parameters, tied ones once, and the buffers of its state."""
    stored = set(model.state_dict())
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in stored}


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None = None
) -> dict[str, torch.Tensor]:
    """List every tensor that a run goes on with, as `model.<name>`, `optimizer.<kind>.<name>` and `average.<name>`.

    The tensors share memory with the model and are sharded where the model is.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if value.ndim:
                tensors[f"optimizer.{kind}.{name}"] = value
    if ema is not None:
        averages = zip(trained, ema.shadow_params, strict=True)
        tensors |= {f"average.{name}": average for name, average in averages}
    return tensors


def optimizer_scalars(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Collect what AdamW keeps beside its tensors: its count of updates, which is the same for all parameters."""
    scalars: dict[str, set[float]] = {}
    kinds: set[str] = set()
    for state in optimizer.state.values():
        for kind, value in state.items():
            if value.ndim:
                kinds.add(kind)
            else:
                scalars.setdefault(kind, set()).add(value.item())
    assert all(len(values) == 1 for values in scalars.values()), f"parameters differ in {scalars}"
    return {"tensors": sorted(kinds), "scalars": {kind: values.pop() for kind, values in scalars.items()}}


def _make_room(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Make state for every parameter, as the first update would, for values to be read into."""
    optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    fused = optimizer.defaults.get("fused")
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        device = parameter.device if fused else "cpu"
        optimizer.state[parameter] = {
            **{
                kind: torch.tensor(value, dtype=torch.float32, device=device)
                for kind, value in stored["scalars"].items()
            },
            **{kind: torch.zeros_like(parameter) for kind in stored["tensors"]},
        }


# -------------------------------------------------------------------------------------------------------------- writing


class Checkpointer:
    """Writes the checkpoints of a run, one at a time; every rank calls the same methods.

    Args:
        accelerator: the processes of the run.
        processor: saved with every checkpoint.
        describe: JSON values for every manifest (configuration, data, world).
        keep: how many of the newest checkpoints are left on the disk.
        asynchronous: write from a copy in memory while training goes on; `save` then returns once that copy is made.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Accelerator,
        processor: MoTProcessor,
        describe: Mapping[str, Any],
        keep: int,
        asynchronous: bool = False,
    ):
        self.run = run
        self.processes = processes = accelerator.num_processes
        self.rank = accelerator.process_index
        self.processor = processor
        self.describe = dict(describe)
        self.keep = keep
        # The group is its own: collectives of a save must not meet those of a step. It works on the CPU's memory.
        self.group = dist.new_group(backend="gloo") if processes > 1 else None
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self.pending: Future | None = None

    def save(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: MoTPreTrainedModel) -> None:
        """Write the checkpoint of a step.

        Args:
            state: JSON values for the manifest, its `step` among them; `describe` and the files' hashes are added.
            tensors: see `state_tensors`.
            model: its configuration is saved with the processor, for a model to be built from.

        Raises:
            SaveError: on every rank, if any could not write; an asynchronous save raises it in `finish`.
        """
        self.finish()
        step = state["step"]
        manifest = {**self.describe, **state}
        write_files = partial(write_description, model=model, processor=self.processor)
        if self.executor is None:
            self._write(step, tensors, manifest, write_files)
            return
        tensors = DefaultStager(StagingOptions(False, False, False, False)).stage(dict(tensors))
        self.pending = self.executor.submit(self._write, step, tensors, manifest, write_files)

    def finish(self, wait: bool = True) -> None:
        """Learn the outcome of an asynchronous save, if it is known, or wait for it.  Raises SaveError if it failed."""
        if self.pending is not None and (wait or self.pending.done()):
            pending, self.pending = self.pending, None
            pending.result()

    def _write(self, step: int, tensors: Mapping, manifest: Mapping, write_files: Callable) -> None:
        final = self.run.checkpoint(step)
        folder = final.with_name(f".{final.name}.tmp")
        # Each stage ends on all ranks before the next begins; the manifest, which makes the files valid, comes last.
        try:
            self._together(lambda: self._begin(folder, write_files))
            self._together(lambda: self._write_tensors(folder / "state", tensors))
            hashes = self._together(lambda: _hashes(folder, f"state/shard-{self.rank + 1:05d}-*"))
            files = {name: entry for of_rank in hashes for name, entry in of_rank.items()}
            self._together(lambda: self._commit(folder, final, {**manifest, "step": step}, files))
        except SaveError:
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _begin(self, folder: Path, write_files: Callable[[Path], None]) -> None:
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "state").mkdir(parents=True)
            (folder / "pretrained").mkdir()
            with _system_errors():
                write_files(folder / "pretrained")

    def _write_tensors(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        parts = {name: _PARTS[name.partition(".")[0]] for name in tensors}
        writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=parts, save_distributed=True)
        with _without_warnings():
            dcp.save(dict(tensors), storage_writer=writer, process_group=self.group, no_dist=self.group is None)

    def _commit(self, folder: Path, final: Path, manifest: dict, files: dict) -> None:
        if self.rank:
            return
        files |= _hashes(folder, "pretrained/**/*")
        manifest |= {"format": FORMAT, "files": dict(sorted(files.items()))}
        write_json(folder / MANIFEST, {**manifest, "sha256": digest_of(manifest)})
        sync_tree(folder)
        os.rename(folder, final)
        sync_folder(final.parent)
        self.run.point_latest(final.name)
        for step in self.run.saved_steps()[: -self.keep]:
            if step != manifest["step"]:
                _remove(self.run.checkpoint(step))

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """Run `action` and return its results of all ranks; SaveError on every rank if it failed on any."""
        failure, result = None, None
        try:
            result = action()
        except (OSError, SafetensorError, CheckpointException) as error:
            rank, cause = _cause(error)
            who = f" (rank {self.rank if rank is None else rank})" if self.processes > 1 else ""
            failure = f"{type(cause).__name__}: {cause}{who}"
        outcomes = gather_objects((failure, result), self.group)
        for failure, _ in outcomes:
            if failure is not None:
                raise SaveError(failure)
        return [result for _, result in outcomes]


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raise OSError where a disk is full: safetensors and tokenizers, in Rust, raise SafetensorError and Exception."""
    try:
        yield
    except Exception as error:
        if type(error) in (Exception, SafetensorError):
            raise OSError(str(error)) from error
        raise


def _cause(error: BaseException) -> tuple[int | None, BaseException]:
    """Find (the rank that failed, where torch.distributed.checkpoint tells it, and its error)."""
    if not isinstance(error, CheckpointException):
        return None, error
    failures = [(rank, failure) for rank, (failure, _) in error.failures.items()]
    # The others only say that they waited for the one that failed.
    return next(((rank, failure) for rank, failure in failures if isinstance(failure, OSError)), failures[0])


def _remove(folder: Path) -> None:
    """Delete a checkpoint; while it is half deleted it does not have a checkpoint's name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _hashes(folder: Path, pattern: str) -> dict[str, dict]:
    """Relative path -> size and sha256 of a file, read back from the disk."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): _hash(path) for path in files}


def _hash(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


# ------------------------------------------------------------------------------------------------ verifying and reading


def verify(folder: Path, rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are as they were written. This rank computes its share of hashes.

    Raises:
        DamagedError: anything is missing, changed or too much.
    """
    # The manifest, which has its own hash.
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest, stored_format = manifest.pop("sha256"), manifest["format"]
        files = {name: {"bytes": of["bytes"], "sha256": of["sha256"]} for name, of in manifest["files"].items()}
    except FileNotFoundError as error:
        raise DamagedError(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error!r}") from error
    if digest != digest_of(manifest):
        raise DamagedError(f"{MANIFEST} does not have the sha256 it states")
    if stored_format != FORMAT:
        raise DamagedError(f"{MANIFEST} is of format {stored_format}, this version reads {FORMAT}")
    # The files: all of them and no others, of the right size, then of the right content.
    found = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise DamagedError(f"{path.relative_to(folder)} is a link or no file")
        if path.is_file() and path != folder / MANIFEST:
            found.add(path.relative_to(folder).as_posix())
    if missing := sorted(set(files) - found):
        raise DamagedError(f"{missing[0]} is missing")
    if foreign := sorted(found - set(files)):
        raise DamagedError(f"{foreign[0]} does not belong to it")
    for name, entry in files.items():
        if (size := (folder / name).stat().st_size) != entry["bytes"]:
            raise DamagedError(f"{name} has {size} bytes, not {entry['bytes']}")
    for name in list(files)[rank::processes]:
        if _hash(folder / name) != files[name]:
            raise DamagedError(f"{name} does not have the sha256 that was written")
    return manifest


def newest_intact(
    run: RunFolder, rank: int = 0, processes: int = 1
) -> tuple[dict[str, Any] | None, list[tuple[Path, str]]]:
    """Find (the manifest of the newest intact checkpoint or None, the damaged ones and why). Every rank calls it."""
    skipped = []
    group = dist.group.WORLD if processes > 1 else None
    for step in reversed(run.saved_steps()):
        folder, reason, manifest = run.checkpoint(step), None, None
        try:
            manifest = verify(folder, rank, processes)
        except DamagedError as error:
            reason = str(error)
        reasons = [reason for reason in gather_objects(reason, group) if reason is not None]
        if not reasons:
            return manifest, skipped
        skipped.append((folder, reasons[0]))
    return None, skipped


def load_state(
    folder: Path,
    manifest: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None = None,
) -> None:
    """Fill model, optimizer and average, sharded or not, from a checkpoint of any world.

    Raises:
        ConfigError: a tensor that the checkpoint lacks or has in another shape.
    """
    _make_room(model, optimizer, manifest["optimizer"])
    read_tensors(folder, state_tensors(model, optimizer, ema))


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors by name from a checkpoint; every rank calls it.

    Raises:
        ConfigError: a tensor that the checkpoint lacks or has in another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder / "state"))
    try:
        with _without_warnings():
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        cause = _cause(error)[1]
        raise ConfigError(f"{folder} does not fit this model: {type(cause).__name__}: {cause}") from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence torch's warning that there is one process, which is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def move_aside(folders: list[Path]) -> None:
    """Give damaged checkpoints a name that no run looks for; nothing is deleted."""
    for folder in folders:
        target, number = folder.with_name(f"damaged-{folder.name}"), 1
        while target.exists():
            target, number = folder.with_name(f"damaged-{folder.name}-{number}"), number + 1
        os.rename(folder, target)


def remove_unfinished(run: RunFolder) -> None:
    """Delete what a killed process was writing or deleting."""
    if run.checkpoints.is_dir():
        for entry in run.checkpoints.iterdir():
            if re.fullmatch(r"\.step-\d+\.(tmp|removed)", entry.name):
                shutil.rmtree(entry, ignore_errors=True)


# ------------------------------------------------------------------------------------------ folders for from_pretrained


def write_description(folder: Path, model: MoTPreTrainedModel, processor: MoTProcessor) -> None:
    """Write what a model is built from, without its weights: configuration and processor."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config._from_model_config = None  # as MoTPreTrainedModel.save_pretrained does
        model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Make a folder beside `folder` that takes its place if the block ends without an error."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _system_errors():
            yield temporary
        sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)
    sync_folder(folder.parent)


# ------------------------------------------------------------------------------------------ which runs may go on

DATA = "data"
# Keys that do not change the results of a step. For `data.`, the fingerprint tells whether the rows are the same.
_FREE = (
    "data.", "evaluation.", "samples.", "model.gradient_checkpointing", "train.output_dir", "train.resume",
    "train.overwrite", "train.save_", "train.keep_checkpoints", "train.not_finite_limit", "train.tracker",
    "train.progress_bar", "train.processes", "train.timeout_seconds", "train.cpu", "train.rows", "train.accumulation",
    "train.tokens_per_step",
)  # fmt: skip


def find_checkpoint(
    run: RunFolder, resume: bool | str, accelerator: Accelerator
) -> tuple[dict[str, Any] | None, list[str]]:
    """Find (the manifest of the newest intact checkpoint or None, lines about damaged ones). Every rank calls it.

    Newer checkpoints that are damaged are renamed, so that they are not in the way of later ones.

    Raises:
        ConfigError: there are checkpoints, but none is intact.
    """
    if not resume or not run.saved_steps():
        return None, []
    manifest, damaged = newest_intact(run, accelerator.process_index, accelerator.num_processes)
    found = [f"{folder.name} is passed over: {reason}" for folder, reason in damaged]
    if manifest is None:
        raise ConfigError(
            f"train.resume={resume}: no checkpoint in {run.checkpoints} is intact ({'; '.join(found)}). They are left "
            "as they are; choose another train.output_dir to begin anew"
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
    """Refuse to go on with a run that would not be the same; return the differences that were allowed.

    A value that follows from another key (`optimizer.warmup_steps` from `train.steps`) is allowed with that key.

    Args:
        stored, present: `config` (the recipe as a tree), `data_fingerprint`, `rows_in_a_step`.
        despite: keys that may differ, or "data".
        changed_source: which source has changed, if that is known.

    Raises:
        ConfigError: anything else differs, or a key in `despite` is none.
    """
    before, now = flatten(stored["config"]), flatten(present["config"])
    for key in despite:
        if key != DATA and key not in now and key not in before:
            near = difflib.get_close_matches(key, [DATA, *now], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"train.resume_despite names {key!r}, which is no key{hint}")

    # What differs: keys of the recipe, the size of a step, the rows.
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
        where = "" if changed_source is None else f" ({changed_source})"
        changes[DATA] = (stored["data_fingerprint"][:12], f"{present['data_fingerprint'][:12]}{where}")

    # Changes that `despite` allows neither by their own key nor by the key that they follow from.
    names = {key: _origin(key, before, now) for key in changes}
    refused = [key for key in changes if names[key] not in despite and key not in despite]
    told = {key: f"{key} was {old!r}, is {new!r}" for key, (old, new) in changes.items()}
    if refused:
        allowed = dict.fromkeys([*despite, *(names[key] for key in refused)])
        raise ConfigError(
            f"the run would not go on as it began: {'; '.join(told[key] for key in refused)}. "
            f"Restore {'it' if len(refused) == 1 else 'them'}, or allow it by name: "
            f"train.resume_despite=[{', '.join(allowed)}]"
        )
    return list(told.values())


# Key -> the key that its value follows from if the recipe leaves it open, and how.
_DERIVED = {"optimizer.warmup_steps": ("train.steps", default_warmup)}


def _origin(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Find the key that both values of `key` follow from; `key` itself if one of them was chosen."""
    if key not in _DERIVED:
        return key
    origin, rule = _DERIVED[key]
    follows = all(origin in values and values.get(key) == rule(values[origin]) for values in (before, now))
    return origin if follows else key
