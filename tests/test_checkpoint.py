"""Checkpoints come back equal, and everything else is refused in one sentence."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastscore.checkpoint import (
    first_difference,
    load_checkpoint,
    load_into,
    require_config,
    save_checkpoint,
)

CONFIG = {"channels": [32, 64], "mel": {"hop_length": 256, "f_max": 8000.0}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def stored(path):
    tensors = {"weight": torch.randn(3, 4), "count": torch.tensor(7)}
    save_checkpoint(path, "classifier", CONFIG, tensors)
    return path


def _header(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _write_header(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


class TestRoundTrip:
    def test_tensors_configuration_and_notes_return_unchanged(self, path):
        base = torch.randn(4, 6)
        tensors = {
            "plain": base,
            "transposed": base.t(),
            "shared": base,
            "whole": torch.arange(5),
            "double": torch.randn(2, dtype=torch.float64),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
        }
        save_checkpoint(path, "score", CONFIG, tensors, extra={"steps": 12, "note": "é"})
        loaded = load_checkpoint(path, "score")
        assert loaded.kind == "score"
        assert loaded.config == CONFIG
        assert loaded.extra == {"steps": 12, "note": "é"}
        assert loaded.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded.tensors[name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[name], tensor)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_storage_halves_the_file_and_loads_as_float32(self, path, tmp_path, dtype):
        weight, index = torch.randn(64, 64), torch.arange(3)
        save_checkpoint(tmp_path / "full.safetensors", "m", {}, {"w": weight, "i": index})
        save_checkpoint(path, "m", {}, {"w": weight, "i": index}, dtype=dtype)
        half = getattr(torch, dtype)
        loaded = load_checkpoint(path).tensors
        assert loaded["w"].dtype == torch.float32
        assert torch.equal(loaded["w"], weight.to(half).float())
        assert torch.equal(loaded["i"], index)
        assert load_checkpoint(path, upcast=False).tensors["w"].dtype == half
        saved = (tmp_path / "full.safetensors").stat().st_size - path.stat().st_size
        assert abs(saved - 2 * 64 * 64) < 16

    def test_equal_content_gives_equal_bytes(self, tmp_path):
        a, b = torch.randn(3), torch.randn(2, 2)
        notes = {str(i): i for i in range(20)}
        save_checkpoint(tmp_path / "1", "m", {"x": 1, "y": 2}, {"a": a, "b": b}, notes)
        reverse = dict(reversed(notes.items()))
        save_checkpoint(tmp_path / "2", "m", {"y": 2, "x": 1}, {"b": b, "a": a}, reverse)
        assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()

    def test_any_safetensors_reader_can_open_it(self, stored):
        from safetensors import safe_open

        with safe_open(stored, "pt") as file:
            assert file.metadata()["kind"] == "classifier"
            assert file.get_tensor("weight").shape == (3, 4)


class TestRefusedWrites:
    def test_value_that_overflows_the_storage_type(self, path):
        with pytest.raises(ValueError, match=r"'w' reaches 1e\+05, which overflows float16"):
            save_checkpoint(path, "m", {}, {"w": torch.tensor([1.0, -1e5])}, dtype="float16")
        assert not path.exists()

    def test_unknown_storage_type(self, path):
        with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
            save_checkpoint(path, "m", {}, {}, dtype="int8")

    def test_configuration_that_json_cannot_hold(self, path):
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            save_checkpoint(path, "m", {"f": torch.nn.ReLU}, {})
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            save_checkpoint(path, "m", {"f": float("nan")}, {})
        assert not path.exists()


class TestRefusedReads:
    def test_missing_folder_and_empty(self, tmp_path, path):
        with pytest.raises(ValueError, match="does not exist"):
            load_checkpoint(path)
        with pytest.raises(ValueError, match="is a folder"):
            load_checkpoint(tmp_path)
        path.touch()
        with pytest.raises(ValueError, match="is empty"):
            load_checkpoint(path)

    def test_truncated_at_every_length(self, stored):
        data = stored.read_bytes()
        for length in {*range(1, len(data), 7), len(data) - 1}:
            stored.write_bytes(data[:length])
            with pytest.raises(ValueError, match=r"truncated|not a safetensors") as error:
                load_checkpoint(stored)
            assert "\n" not in str(error.value)

    def test_trailing_bytes(self, stored):
        stored.write_bytes(stored.read_bytes() + b"x")
        with pytest.raises(ValueError, match="corrupt"):
            load_checkpoint(stored)

    def test_corrupt_header(self, stored):
        header, body = _header(stored)
        header["weight"]["shape"] = [3, 5]
        _write_header(stored, header, body)
        with pytest.raises(ValueError, match="corrupt"):
            load_checkpoint(stored)
        header["weight"] = 3
        _write_header(stored, header, body)
        with pytest.raises(ValueError, match="corrupt header"):
            load_checkpoint(stored)
        stored.write_bytes(struct.pack("<Q", 4) + b"{..." + body)
        with pytest.raises(ValueError, match="corrupt header"):
            load_checkpoint(stored)

    def test_other_formats_are_named(self, path):
        torch.save({"a": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match="PyTorch or zip archive"):
            load_checkpoint(path)
        path.write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(ValueError, match="pickle"):
            load_checkpoint(path)
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(ValueError, match="Git LFS pointer"):
            load_checkpoint(path)
        path.write_text("<!DOCTYPE html><html>not found</html>")
        with pytest.raises(ValueError, match="HTML"):
            load_checkpoint(path)
        path.write_text("some notes about a model")
        with pytest.raises(ValueError, match="is not a safetensors file"):
            load_checkpoint(path)

    def test_foreign_safetensors_are_described(self, path):
        save_file({"ups.0.weight": torch.zeros(1), "resblocks.0.weight": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=r"did not write .*HiFi-GAN"):
            load_checkpoint(path)
        save_file({"lin.weight": torch.zeros(1)}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=r"1 tensors, the first 'lin.weight', format 'pt'"):
            load_checkpoint(path)

    def test_wrong_kind_and_newer_version(self, stored):
        with pytest.raises(ValueError, match="holds a 'classifier' model, but a 'vocoder' model"):
            load_checkpoint(stored, "vocoder")
        header, body = _header(stored)
        header["__metadata__"]["version"] = "2"
        _write_header(stored, header, body)
        with pytest.raises(ValueError, match="version 2, this fastscore reads version 1"):
            load_checkpoint(stored)

    def test_configuration_that_differs(self, stored):
        loaded = load_checkpoint(stored)
        require_config(loaded, CONFIG)
        other = CONFIG | {"mel": {"hop_length": 160, "f_max": 8000.0}}
        with pytest.raises(ValueError, match=r"mel\.hop_length is 256 in the file, but 160"):
            require_config(loaded, other)


@pytest.mark.parametrize(
    ("a", "b", "key"),
    [
        ({"a": [1, 2]}, {"a": (1, 2)}, None),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "a"),
        ({"a": 1}, {"a": 1, "b": 2}, "b"),
        ({"a": 1, "b": 2}, {"a": 1}, "b"),
        ({"a": 1}, {"a": True}, "a"),
        ({"a": {"b": None}}, {"a": {"b": 0}}, "a.b"),
    ],
)
def test_first_difference(a, b, key):
    found = first_difference(a, b)
    assert (found and found[0]) == key


class TestLoadInto:
    def test_copies_every_tensor(self):
        source, target = nn.Linear(3, 2), nn.Linear(3, 2)
        load_into(target, source.state_dict(), "m.safetensors")
        assert torch.equal(source.weight, target.weight)
        assert torch.equal(source.bias, target.bias)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("bias"), r"m\.st lacks the tensor 'bias' that Linear needs"),
            (lambda t: t.update(scale=torch.ones(1)), "holds the tensor 'scale' that Linear does"),
            (lambda t: t.update(bias=torch.ones(5)), r"'bias' has shape \(5,\), but .*\(2,\)"),
        ],
    )
    def test_names_the_first_wrong_tensor_and_changes_nothing(self, change, message):
        tensors = nn.Linear(3, 2).state_dict()
        change(tensors)
        target = nn.Linear(3, 2)
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_into(target, tensors, "m.st")
        assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())
