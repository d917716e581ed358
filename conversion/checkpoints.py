"""Read and write folders of safetensors tensor by tensor, so that no model is ever whole in memory.

    reader = CheckpointReader(source)
    entries = [Entry(name, reader.shape(name), reader.dtype(name), partial(reader.read, name)) for name in reader.names]
    with new_folder(out, overwrite=False) as folder:
        write_tensors(folder, entries, "5GB")

Nothing here unpickles.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save

from conversion.key_maps import ConversionError
from modeling_mot.hub_trust import check_links, leads_outside, shard_files


WEIGHTS = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# safetensors' names of the element types that weights have, and of those that buffers may have too
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHER_DTYPES = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in (DTYPES | _OTHER_DTYPES).items()}
# Everything except pickled weights and other formats of the same weights.
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICEN*", "NOTICE*")


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written: its name, shape and dtype, and the function that makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


# -------------------------------------------------------------------------------------------------------------- reading


def fetch(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Find the folder of a checkpoint and, if it came from the Hub, its commit. Pickled weights are never fetched.

    Args:
        source: a folder, or a name on the Hub.
        revision: branch, tag or commit of a name on the Hub.

    Raises:
        ConversionError: there is no such folder or repository, the Hub is out of reach, or the folder has a link that
            leads out of it.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ConversionError(
                f"--revision {revision} is of names on the Hub, but {source} is a folder; leave it out"
            )
        try:
            check_links(Path(source))
        except ValueError as error:
            raise ConversionError(str(error)) from error
        return Path(source), None
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(_FETCHED)))
    except LocalEntryNotFoundError as error:
        raise ConversionError(
            f"{source!r} is no folder, and was not found on the Hub or in its cache: {error}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConversionError(f"{source!r} is no folder, and could not be fetched from the Hub: {error}") from error
    return folder, folder.name  # a snapshot's folder is named after its commit


class CheckpointReader:
    """Read the tensors of a folder one at a time, from one file of safetensors or from several and their index.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.
        weights: another name of the one file (diffusers: `diffusion_pytorch_model.safetensors`).

    Raises:
        ConversionError: there are no weights, only pickled ones, or other weights than the index says.
    """

    def __init__(self, folder: str | Path, weights: str = WEIGHTS):
        self.folder = Path(folder)
        self._files = self._find(weights)
        self._headers = {}
        for file in sorted(set(self._files.values())):
            self._headers |= {name: header for name, header in _read_header(self.folder / file).items()}
        if not self._files:
            raise ConversionError(f"{self.folder} holds no tensors; is the download complete?")
        if lost := [name for name in self._files if name not in self._headers]:
            raise ConversionError(
                f"{self.folder}: the index names {lost[0]!r} and {len(lost) - 1} more that no file holds"
            )

    def _find(self, weights: str) -> dict[str, str]:
        index = self.folder / f"{weights}.index.json"
        if index.is_file():
            try:
                return shard_files(index)
            except ValueError as error:
                raise ConversionError(str(error)) from error
        if (self.folder / weights).is_file():
            if leads_outside(self.folder / weights, self.folder):
                raise ConversionError(f"{self.folder / weights} is a link that leads outside; put a copy in its place")
            return dict.fromkeys(_read_header(self.folder / weights), weights)
        pickled = sorted(path.name for pattern in PICKLED for path in self.folder.glob(pattern))
        if pickled:
            raise ConversionError(
                f"{self.folder} has its weights in {pickled[0]}, which would be unpickled, and unpickling runs the "
                "code inside. If you trust it, load it with transformers and save it again (save_pretrained writes "
                "safetensors), or take the repository's revision with safetensors, such as refs/pr/N"
            )
        raise ConversionError(f"{self.folder} holds neither {weights} nor {index.name}; is it a checkpoint's folder?")

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._headers[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype. Raises ConversionError for quantized weights: integers, floats of at most 8 bits."""
        code = self._headers[name]["dtype"]
        if code not in DTYPES:
            raise ConversionError(f"{name} is stored as {code}; convert the checkpoint before it was quantized")
        return DTYPES[code]

    def has_values(self, name: str) -> bool:
        """False for a tensor with a side of 0; its other sides then mean nothing."""
        return 0 not in self.shape(name)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape, or of quantized weights. Raises ConversionError."""
        self.dtype(name)
        if self.shape(name) != shape:
            raise ConversionError(f"{name} has shape {self.shape(name)}, where config.json says {shape}")

    def num_bytes(self) -> int:
        """Return the bytes of all tensors together."""
        return sum(end - begin for begin, end in (self._headers[name]["data_offsets"] for name in self._files))

    def entry(self, name: str, target: str, dtype: torch.dtype | None = None) -> Entry:
        """Return the entry that writes a tensor as it is under the name `target`, in `dtype` or in its own."""
        dtype = dtype or self.dtype(name)
        return Entry(target, self.shape(name), dtype, lambda: self.read(name).to(dtype))

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor. The file is opened for this tensor alone, so its memory is free again with the tensor.

        Raises:
            ConversionError: see `dtype`.
        """
        self.dtype(name)
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def fingerprints(self) -> dict[str, str]:
        """File -> sha256 of each file of weights."""
        return {file: _sha256(self.folder / file) for file in sorted(set(self._files.values()))}


def provenance(source: str, folder: Path, commit: str | None, reader: CheckpointReader) -> dict:
    """Return the origin that `conversion.json` records. A folder is recorded by its name, not by its path.

    Args:
        folder, commit: as `fetch` gave them for `source`.
    """
    name = source if commit else folder.resolve().name
    return {"source": name, "revision": commit, "sha256": reader.fingerprints()}


def _read_header(path: Path) -> dict[str, dict]:
    try:
        with safe_open(path, framework="pt"):  # the library checks it against the file's size
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path} is no whole file of safetensors: {error}") from error
    header.pop("__metadata__", None)
    return header


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- writing


def write_tensors(
    folder: Path,
    entries: Sequence[Entry],
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
    weights: str = WEIGHTS,
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index. Each tensor is made when it is written.

    Args:
        entries: in the order of the files; names must differ.
        max_shard_size: bytes, or such as "5GB"; a larger tensor gets a file of its own.
        metadata: texts beside `{"format": "pt"}` in each file.

    Raises:
        ConversionError: the disk lacks the room.
        ValueError: a tensor is made in another shape or type than its entry says.
    """
    by_name = {entry.name: entry for entry in entries}
    assert len(by_name) == len(entries), "two entries have one name"
    try:
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda entry: entry.num_bytes,
            filename_pattern=weights.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=max_shard_size,
        )
    except (ValueError, OverflowError) as error:
        raise ConversionError(f"max_shard_size={max_shard_size!r} is no size, such as '5GB': {error}") from error

    # A full disk is found before anything is written.
    needed, free = sum(entry.num_bytes for entry in entries), shutil.disk_usage(folder).free
    if needed > free:
        raise ConversionError(
            f"{needed:,} bytes are to be written to {folder.parent}, which has {free:,} left; make room"
        )

    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, [by_name[name] for name in names], {"format": "pt"} | dict(metadata or {}))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / f"{weights}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, entries: list[Entry], metadata: dict[str, str]) -> None:
    """Write a file of safetensors. The library's writer takes all tensors at once, this one takes one at a time."""
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # so that each begins at a multiple of its size

    # The header holds the place of each tensor, and is filled up to a multiple of 8 bytes.
    header, end = {"__metadata__": metadata}, 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    # The tensors, one after another.
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in entries:
            tensor = entry.make()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.name} was to be {entry.dtype} {entry.shape} and is {tensor.dtype} {tuple(tensor.shape)}"
                )
            if entry.num_elements:
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            del tensor  # before the next is made
        file.flush()
        os.fsync(file.fileno())


def write_model(
    folder: Path,
    model: PreTrainedModel,
    entries: Sequence[Entry],
    max_shard_size: int | str = "5GB",
    processor: ProcessorMixin | None = None,
) -> None:
    """Write the files of `model.save_pretrained(folder)`, with the values of `entries`; the model may be on `meta`.

    Args:
        model: a model of `modeling_mot`; `model.config.dtype` is the dtype of the weights.
        processor: is saved beside the model.
    """
    model.config.architectures = [type(model).__name__]
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    model.generation_config._from_model_config = None  # or a reader would lose `image_grid` and the like
    model.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    write_tensors(folder, entries, max_shard_size)


def check_output(folder: Path, overwrite: bool, known_by: str = "config.json") -> None:
    """Refuse a folder that exists, unless it is a checkpoint that may be replaced. Raises ConversionError.

    Args:
        known_by: the file that such a checkpoint has.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise ConversionError(f"{folder} exists; name another folder, or replace it with --overwrite")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / known_by).is_file()):
        raise ConversionError(f"{folder} holds no {known_by}, so --overwrite does not replace it; name another folder")


@contextmanager
def new_folder(folder: Path, overwrite: bool = False, known_by: str = "config.json") -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the block ends without an error, and is removed otherwise.

    Raises:
        ConversionError: see `check_output`.
    """
    check_output(folder, overwrite, known_by)
    folder = folder.absolute()
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
