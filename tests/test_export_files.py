"""Exported files that are damaged, foreign or of another model, and exports asked wrongly."""

import json
import shutil
import sys
import zipfile

import pytest
import torch
from refusals import FileSizeLimit, everything
from small_presets import write_preset

from fastscore.export import export_onnx, export_pt2, load_exported
from fastscore.export import onnx as onnx_module
from fastscore.export import pt2 as pt2_module
from fastscore.export.graphs import GRAPHS, load_model
from fastscore.export.manifest import instruction_sets, make_manifest, read_manifest


@pytest.fixture(scope="module")
def manifest(preset):
    """What a .pt2 of the preset says of itself here."""
    model = load_model(preset, torch.device("cpu"))
    versions = {"fastscore": "0.1.0", "torch": torch.__version__}
    return make_manifest("pt2", model, 64, versions, processor=instruction_sets())


@pytest.fixture
def archive(manifest, tmp_path):
    """A .pt2 with a true manifest, and in place of compiled code, which is read last, a text."""

    def write(change=None, graphs=GRAPHS):
        values = json.loads(manifest.text())
        if change is not None:
            change(values)
        path = tmp_path / "small.pt2"
        with zipfile.ZipFile(path, "w") as file:
            for graph in graphs:
                file.writestr(f"archive/data/aotinductor/{graph}/a.wrapper.so", "no code" * 100)
            file.writestr("archive/extra/fastscore.json", json.dumps(values))
        return path

    return write


def test_manifest_survives_its_text(manifest):
    assert read_manifest(manifest.text(), "here") == manifest


class TestArchives:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"version": 2}, "has export format 2, this fastscore reads format 1; export"),
            ({"format": "other"}, "was not written by fastscore export"),
            ({"machine": "sparc"}, "was compiled for sparc, this machine is"),
            ({"processor": ["avx1024"]}, "a processor with avx1024, which this one lacks"),
            ({"device": "cuda"}, "was exported for cuda, not for cpu; choose --device cuda"),
            ({"versions": {"torch": "1.13.0"}}, "was compiled for torch 1.13, and this is torch 2"),
            ({"labels": 3}, "labels: expected a list"),
            ({"surplus": 3}, "unknown key 'surplus'"),
        ],
    )
    def test_another_version_machine_or_device_is_refused(self, change, said, archive):
        path = archive(lambda values: values.update(change))
        with pytest.raises(ValueError, match=said):
            load_exported(path)

    def test_code_that_cannot_be_loaded_is_refused(self, archive):
        with pytest.raises(ValueError, match=r"small.pt2 cannot be loaded \(.*\); export the mode"):
            load_exported(archive())

    def test_absent_graph_is_named(self, archive):
        with pytest.raises(ValueError, match="lacks the graph vocoder; export"):
            load_exported(archive(graphs=("guided", "unguided")))

    @pytest.mark.parametrize("share", [0.2, 0.9])
    def test_truncated_archive_is_refused(self, share, archive):
        path = archive()
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=r"truncated or damaged .*; export the model again"):
            load_exported(path)

    def test_a_flipped_bit_is_found(self, archive):
        path = archive()
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged in archive/data/aotinductor/guided/"):
            load_exported(path)

    def test_weights_of_another_preset_are_refused(self, archive, preset, tmp_path):
        other = write_preset(tmp_path / "other", seed=7)
        said = r"other weights than preset .*other has: its classifier is [0-9a-f]{12}, the preset"
        with pytest.raises(ValueError, match=said):
            load_exported(archive(), preset=other)
        # of its own preset they are not; the code is what is wrong here
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_exported(archive(), preset=preset)

    def test_command_line_says_one_sentence(self, archive, refused, here):
        command = ["sample", "yes", "--quiet", "--out", "a.wav", "--model", archive()]
        assert "for the runtime pt2, but onnx was asked for" in refused(
            *command, "--runtime", "onnx"
        )
        assert "cannot be loaded" in refused(*command, "--runtime", "pt2")
        assert "other weights than preset digits" in refused(
            *command, "--runtime", "pt2", "--preset", "digits"
        )
        assert "--model was given without --runtime" in refused(*command)
        assert "--runtime was given without --model" in refused(*command[:-2], "--runtime", "pt2")
        assert everything(here) == []


class TestForeignFiles:
    def test_every_kind_is_told_apart(self, preset, tmp_path):
        def load(name, data=None):
            path = tmp_path / name
            if data is not None:
                path.write_bytes(data)
            with pytest.raises(ValueError, match=name) as refusal:
                load_exported(path)
            return str(refusal.value)

        assert "does not exist; write it with fastscore export" in load("absent.pt2")
        shutil.copy(preset / "score.safetensors", tmp_path / "score.pt2")
        assert "is not an exported model" in load("score.pt2")
        torch.save({"a": 1}, tmp_path / "pickle.pt2")
        assert "an archive that fastscore export did not write" in load("pickle.pt2")
        assert "one graph of an ONNX export" in load("guided.onnx", b"\x08\x09")
        assert "is not an exported model" in load("empty.pt2", b"")
        (tmp_path / "folder").mkdir()
        assert "a folder without manifest.json" in load("folder")

    def test_runtime_must_be_known(self, tmp_path):
        with pytest.raises(ValueError, match="runtime 'tvm' is unknown; choose one of pt2, onnx"):
            load_exported(tmp_path, "tvm")


class TestOnnxFolders:
    @pytest.fixture
    def folder(self, preset, tmp_path, monkeypatch):
        """A folder as export writes it, but of graphs with nothing in them."""
        pytest.importorskip("onnxscript")

        def write(model, name, manifest, path):
            path.write_bytes(b"no graph")
            return 0.0, 0.0

        monkeypatch.setattr(onnx_module, "_write", write)
        return export_onnx(preset, tmp_path / "small").path

    def test_files_of_several_exports_are_not_mixed(self, folder):
        (folder / "guided.onnx").write_bytes(b"another graph")
        with pytest.raises(ValueError, match=r"guided.onnx is damaged or from another export"):
            load_exported(folder)
        (folder / "guided.onnx").unlink()
        with pytest.raises(ValueError, match=r"lacks guided.onnx; export the model again"):
            load_exported(folder, "onnx")

    def test_damaged_manifest_is_refused(self, folder):
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text[:-40])
        with pytest.raises(ValueError, match="has a damaged manifest; export the model again"):
            load_exported(folder)

    def test_other_runtime_is_refused(self, folder):
        with pytest.raises(ValueError, match="for the runtime onnx, but pt2 was asked for"):
            load_exported(folder, "pt2")

    def test_what_onnxruntime_cannot_read_is_named(self, folder):
        pytest.importorskip("onnxruntime")
        with pytest.raises(ValueError, match=r"onnxruntime cannot read .*guided.onnx \("):
            load_exported(folder)

    def test_missing_onnxruntime_names_the_extra(self, folder, refused, here, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        said = refused("sample", "yes", "--runtime", "onnx", "--model", folder, "--out", "a.wav")
        assert (
            said == "--runtime onnx needs onnxruntime; install it: pip install 'fastscore[export]'"
        )
        assert everything(here) == []


class TestExports:
    def test_bad_targets_are_refused_before_any_work(self, refused, here, monkeypatch):
        monkeypatch.setattr(pt2_module, "load_model", None)
        monkeypatch.setattr(onnx_module, "load_model", None)
        assert "does not end in .pt2" in refused("export", "--out", "guided.onnx")
        assert "folder nowhere does not exist" in refused("export", "--out", "nowhere/a.pt2")
        assert "a graph each; name a folder" in refused("export", "--onnx", "out.onnx")
        assert "max_batch 2 must be" in refused("export", "--out", "a.pt2", "--max-batch", 2)
        assert "--device cuda goes with --out" in refused(
            "export", "--onnx", "small", "--device", "cuda"
        )
        assert "one of the arguments --out --onnx is required" in refused("export")
        assert everything(here) == []

    def test_unknown_preset_and_device_are_refused(self, refused, here):
        assert "preset 'digit' is neither" in refused("export", "digit", "--onnx", "small")
        assert "device 'tpu" in refused("export", "--out", "a.pt2", "--device", "tpu")
        assert everything(here) == []

    def test_missing_compiler_is_named(self, preset, refused, here, monkeypatch):
        from torch._inductor import cpp_builder, exc

        def absent():
            raise exc.InvalidCxxCompiler

        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", absent)
        said = refused("export", preset, "--out", "a.pt2")
        assert "no C++ compiler was found; install one" in said
        assert "export with --onnx" in said
        assert everything(here) == []

    def test_failing_compiler_is_named(self, preset, refused, here, monkeypatch):
        from torch._inductor import exc

        def fail(*_, **__):
            raise exc.CppCompileError(["g++", "a.cpp"], "a.cpp\nno space left on device")

        monkeypatch.setattr(torch._inductor, "aot_compile", fail)
        said = refused("export", preset, "--out", "a.pt2")
        assert "failed on the graph guided (no space left on device); name another one" in said
        assert everything(here) == []

    def test_missing_exporter_names_the_extra(self, preset, refused, here, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        said = refused("export", preset, "--onnx", "small")
        assert said == "--onnx needs onnxscript; install it: pip install 'fastscore[export]'"
        assert everything(here) == []

    def test_interrupted_export_leaves_nothing(self, preset, here, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(pt2_module, "_compile", stop)
        with pytest.raises(KeyboardInterrupt):
            export_pt2(preset, here / "a.pt2")
        monkeypatch.setattr(onnx_module, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(preset, here / "small")
        assert everything(here) == []

    def test_full_disk_leaves_the_old_file(self, preset, here, monkeypatch):
        monkeypatch.setattr(pt2_module, "_compile", lambda *_: ([], 0.0, 0.0))
        monkeypatch.setattr(pt2_module, "_archive", lambda *_: bytes(100_000))
        (here / "a.pt2").write_bytes(b"old")
        with FileSizeLimit(50_000), pytest.raises(ValueError, match=r"cannot write .*a.pt2: File"):
            export_pt2(preset, here / "a.pt2")
        assert everything(here) == ["a.pt2"]
        assert (here / "a.pt2").read_bytes() == b"old"
