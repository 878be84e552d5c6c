"""Parcels: what was packed comes back to the byte, in any order, or not at all."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
PART = st.text("abc.é ", min_size=1, max_size=4).filter(lambda s: s not in (".", "..", " "))


@pytest.fixture(scope="module")
def parcels():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        yield importlib.import_module("parcels")


def write(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def packed(parcels, tmp_path):
    """One file over four parcels of 100 bytes, an empty one, and a small one."""
    source = write(
        tmp_path / "run", {"state.ckpt": os.urandom(321), "a/empty": b"", "a/small": b"some text"}
    )
    parcels.pack([source], tmp_path / "sent", 100)
    return tmp_path / "sent", {f"run/{k}": v for k, v in contents(source).items()}


@settings(max_examples=60, deadline=None)
@given(
    files=st.dictionaries(PART, st.binary(max_size=300), min_size=1, max_size=6),
    size=st.integers(1, 400),
)
def test_what_was_packed_comes_back(parcels, tmp_path_factory, files, size):
    folder = tmp_path_factory.mktemp("parcels")
    source = write(folder / "source", files)
    manifest = parcels.pack([source], folder / "sent", size, "x")
    sent = contents(folder / "sent")
    data = [d for name, d in sorted(sent.items()) if not name.endswith(".json")]
    assert all(len(d) == size for d in data[:-1])
    assert b"".join(data) == b"".join(d for _, d in sorted(files.items()))
    done, missing = parcels.unpack([folder / "sent"], folder / "got")
    assert (sorted(done), missing) == (sorted(f"source/{n}" for n in files), [])
    assert contents(folder / "got" / "source") == files
    assert len(manifest.parcels) == len(data)


def test_parcels_arrive_in_any_order_and_in_several_goes(parcels, packed, tmp_path):
    sent, files = packed
    manifest = sent / "data.parcels.json"
    names = [f"data-{i:05d}" for i in (3, 1, 4, 2)]
    for i, name in enumerate(names):
        go = tmp_path / f"go{i}"
        go.mkdir()
        shutil.copy(manifest, go)
        shutil.copy(sent / name, go)
        done, missing = parcels.unpack([go], tmp_path / "got")
        assert missing == sorted(names[i + 1 :])
        assert sorted(done) == (sorted(files) if i == 3 else [])
        if i < 3:
            assert set(contents(tmp_path / "got")) == {
                f".parcels/{n}" for n in (manifest.name, *names[: i + 1])
            }
    assert contents(tmp_path / "got") == files


def test_several_folders_of_one_go(parcels, packed, tmp_path):
    sent, files = packed
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(sent / "data.parcels.json", other)
    (sent / "data-00002").rename(other / "data-00002")
    assert parcels.unpack([other, sent], tmp_path / "got") == (sorted(files), [])


def test_the_program_says_what_is_missing(packed, tmp_path):
    sent, _ = packed
    (sent / "data-00002").unlink()
    command = [sys.executable, ROOT / "bench" / "parcels.py", "unpack", sent]
    run = subprocess.run(
        [*command, "--out", tmp_path / "got"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "missing still: data-00002" in run.stderr
    assert not {"run/a/small", "run/state.ckpt"} & set(contents(tmp_path / "got"))
    damaged = sent / "data-00001"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    run = subprocess.run(
        [*command, "--out", tmp_path / "new"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "data-00001 is damaged" in run.stderr


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"?" + d[1:]])
@pytest.mark.parametrize("name", ["data-00001", "data-00004"])
def test_a_damaged_parcel_is_refused_and_nothing_written(parcels, packed, tmp_path, name, change):
    sent, _ = packed
    (sent / name).write_bytes(change((sent / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        parcels.unpack([sent], tmp_path / "got")
    assert contents(tmp_path / "got") == {}


def test_a_damaged_copy_gives_way_to_a_whole_one(parcels, packed, tmp_path):
    sent, files = packed
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "data-00001").write_bytes(b"half")
    assert parcels.unpack([bad, sent], tmp_path / "got") == (sorted(files), [])
    assert contents(tmp_path / "got") == files


def changed_manifest(sent, change):
    path = sent / "data.parcels.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/../../evil", "..", "", ".", "a\\..\\evil", "c:evil", ".parcels/x"],
)
def test_paths_out_of_the_folder_are_refused(parcels, packed, tmp_path, name):
    sent, _ = packed
    changed_manifest(sent, lambda v: v["files"][0].update(name=name))
    with pytest.raises(ValueError, match="outside the folder"):
        parcels.unpack([sent], tmp_path / "got" / "deep")
    assert contents(tmp_path / "got") == {}


def test_links_out_of_the_folder_are_refused(parcels, packed, tmp_path):
    sent, _ = packed
    for place in ("run", "run/state.ckpt"):
        got, outside = tmp_path / f"got-{place[-4:]}", tmp_path / f"outside-{place[-4:]}"
        (got / place).parent.mkdir(parents=True)
        outside.mkdir()
        (got / place).symlink_to(outside / "file" if "/" in place else outside)
        with pytest.raises(ValueError, match="link"):
            parcels.unpack([sent], got)
        assert contents(outside) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(format="other"),
        lambda v: v.update(version=2),
        lambda v: v.update(prefix="other"),
        lambda v: v["files"][0].update(bytes=-1),
        lambda v: v["files"][0].update(bytes=1.5),
        lambda v: v["files"].pop(),
        lambda v: v["parcels"][0].update(name="../data-00001"),
        lambda v: v["parcels"][0].update(sha256="0"),
        lambda v: v["files"].append(dict(v["files"][0])),
        lambda v: v["files"].append({**v["files"][0], "name": v["files"][0]["name"] + "/x"}),
        lambda v: v.pop("parcels"),
    ],
)
def test_a_damaged_manifest_is_refused(parcels, packed, tmp_path, change):
    sent, _ = packed
    changed_manifest(sent, change)
    with pytest.raises(ValueError, match="fetch it again"):
        parcels.unpack([sent], tmp_path / "got")
    assert contents(tmp_path / "got") == {}


def test_a_file_of_another_content_than_its_hash_is_not_written(parcels, packed, tmp_path):
    sent, files = packed
    changed_manifest(sent, lambda v: v["files"][2].update(sha256="0" * 64))
    with pytest.raises(ValueError, match="is damaged"):
        parcels.unpack([sent], tmp_path / "got")
    assert set(contents(tmp_path / "got")) == {"run/a/empty", "run/a/small"}
    assert set(files) - set(contents(tmp_path / "got")) == {"run/state.ckpt"}


def test_equal_files_are_left_alone_and_others_replaced(parcels, packed, tmp_path):
    sent, files = packed
    parcels.unpack([sent], tmp_path / "got")
    same, other = tmp_path / "got/run/state.ckpt", tmp_path / "got/run/a/small"
    other.write_bytes(b"some tExt")
    before = same.stat().st_mtime_ns, same.stat().st_ino
    parcels.unpack([sent], tmp_path / "got")
    # a cache is keyed by the times of files
    assert (same.stat().st_mtime_ns, same.stat().st_ino) == before
    assert contents(tmp_path / "got") == files


def test_packing_again_leaves_no_old_parcel(parcels, tmp_path):
    source = write(tmp_path / "source", {"a": b"x" * 100, "skip.tmp": b"y", "b/skip.tmp": b"z"})
    parcels.pack([source], tmp_path / "sent", 10)
    parcels.pack([source / "a", source / "b"], tmp_path / "sent", 60, exclude=["*.tmp"])
    names = ["data-00001", "data-00002", "data.parcels.json"]
    assert sorted(contents(tmp_path / "sent")) == names
    parcels.unpack([tmp_path / "sent"], tmp_path / "got")
    assert contents(tmp_path / "got") == {"a": b"x" * 100}


def test_what_cannot_be_packed_is_refused(parcels, tmp_path):
    source = write(tmp_path / "one" / "same", {"a": b"x"})
    other = write(tmp_path / "two" / "same", {"a": b"y"})
    empty = tmp_path / "empty"
    empty.mkdir()
    for sources, text in (
        ([source, other], "would both be 'same/a'"),
        ([empty], "no file to pack"),
        ([tmp_path / "absent"], "does not exist"),
    ):
        with pytest.raises(ValueError, match=text):
            parcels.pack(sources, tmp_path / "sent", 10)
    for size, prefix, text in ((0, "x", "too small"), (1, "../x", "--prefix")):
        with pytest.raises(ValueError, match=text):
            parcels.pack([source], tmp_path / "sent", size, prefix)
    with pytest.raises(ValueError, match=r"no \*\.parcels\.json there"):
        parcels.unpack([empty], tmp_path / "got")
    with pytest.raises(ValueError, match="not a folder"):
        parcels.unpack([tmp_path / "absent"], tmp_path / "got")


def test_two_sets_of_one_name_are_not_mixed(parcels, packed, tmp_path):
    sent, _ = packed
    source = write(tmp_path / "source", {"a": b"x"})
    parcels.pack([source], tmp_path / "other", 10)
    with pytest.raises(ValueError, match="other parcels than an earlier"):
        parcels.unpack([sent, tmp_path / "other"], tmp_path / "got")
