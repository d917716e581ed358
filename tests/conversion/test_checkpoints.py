"""Checkpoints are read and written tensor by tensor, whole or not at all, and never unpickled."""

import json
import os
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversion.checkpoints import CheckpointReader, Entry, check_output, fetch, new_folder, write_tensors
from conversion.key_maps import ConversionError


def tensors():
    return {
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "odd": torch.randn(7).half(),
        "scalar": torch.tensor(2.5),
        "matrix": torch.randn(4, 6),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(9),
        "mask": torch.tensor([True, False]),
    }


def entries(values):
    return [Entry(name, tuple(value.shape), value.dtype, partial(lambda v: v, value)) for name, value in values.items()]


def test_the_library_reads_what_is_written(tmp_path):
    values = tensors()
    write_tensors(tmp_path, entries(values), metadata={"source": "here"})
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "source": "here"}


def test_every_tensor_begins_at_a_multiple_of_its_size(tmp_path):
    write_tensors(tmp_path, entries(tensors()))
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "BOOL": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0


def test_shards_hold_at_most_their_size_and_the_index_finds_everything(tmp_path):
    values = {f"w{i}": torch.randn(10, 10) for i in range(7)}
    write_tensors(tmp_path, entries(values), max_shard_size=1000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    for name, value in values.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], value)
    reader = CheckpointReader(tmp_path)
    assert set(reader.names) == set(values) and torch.equal(reader.read("w3"), values["w3"])
    assert reader.num_bytes() == 2800 and len(reader.fingerprints()) == 4


def test_a_tensor_is_made_only_when_its_turn_comes(tmp_path):
    alive = []

    def make(index):
        alive.append(index)
        return torch.full((2,), float(index))

    made = [Entry(f"t{i}", (2,), torch.float32, partial(make, i)) for i in range(3)]
    assert alive == []
    write_tensors(tmp_path, made)
    assert alive == [0, 1, 2]


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"t was to be torch.float32 \(3,\)"):
        write_tensors(tmp_path, [Entry("t", (3,), torch.float32, lambda: torch.zeros(2))])


def test_a_full_disk_is_noticed_before_anything_is_made(tmp_path):
    huge = Entry("t", (1 << 50,), torch.float32, lambda: pytest.fail("made"))
    with pytest.raises(ConversionError, match="make room"):
        write_tensors(tmp_path, [huge])


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="pytorch_model.bin.*save it again"):
        CheckpointReader(tmp_path)


def test_a_folder_without_weights_and_a_truncated_file_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="holds neither model.safetensors nor"):
        CheckpointReader(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:-4])
    with pytest.raises(ConversionError, match="no whole file of safetensors"):
        CheckpointReader(tmp_path)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(ConversionError, match="names two.safetensors, which are not there"):
        CheckpointReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(ConversionError, match="the index names 'b'"):
        CheckpointReader(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("stopped")
    assert os.listdir(tmp_path) == []
    with new_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        assert not out.exists()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["config.json"]


def test_nothing_is_overwritten_without_being_told(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(ConversionError, match="exists; name another folder, or replace it with --overwrite"):
        check_output(out, overwrite=False)
    with new_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new" and os.listdir(tmp_path) == ["out"]


def test_what_is_no_checkpoint_is_not_replaced_even_when_told(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConversionError, match="holds no config.json"):
        check_output(tmp_path, overwrite=True)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(tmp_path):
    for name in ("nobody/nothing", str(tmp_path / "absent"), "a/b/c"):
        with pytest.raises(ConversionError, match="is no folder"):
            fetch(name)
    with pytest.raises(ConversionError, match="--revision main is of names on the Hub"):
        fetch(str(tmp_path), "main")
    assert fetch(str(tmp_path)) == (tmp_path, None)
