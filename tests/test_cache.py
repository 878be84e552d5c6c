"""The cache is built once, appears whole or not at all, and forgets nothing it depends on."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastscore import cache
from fastscore.cache import Item, cache_key, default_cache_dir, open_or_build

SETTINGS = {"kind": "squares"}

# a process that builds or opens the entry, and in its first item waits until two are at work
BUILDER = """
import os, sys, time
from pathlib import Path
import numpy as np
from fastscore.cache import Item, open_or_build
root = Path(sys.argv[1])
calls = 0
def compute(path):
    global calls
    calls += 1
    (root / f"working-{os.getpid()}").touch()
    while len(list(root.glob("working-*"))) < 2:
        time.sleep(0.005)
    return np.arange(int(path.read_text()), dtype=np.int64) ** 2
items = [Item.of(p.name, p, 0) for p in sorted((root / "source").iterdir())]
entry = open_or_build(root / "cache", {"kind": "squares"}, items, "int64", compute, progress=False)
print(calls, int(entry.values.sum()), entry.offsets.tolist())
"""


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    (tmp_path / "source").mkdir()
    paths = [tmp_path / "source" / f"{i:03}" for i in range(30)]
    for i, path in enumerate(paths):
        path.write_text(str(i + 1))
    return [Item.of(path.name, path, 0) for path in paths]


def square(path: Path) -> np.ndarray:
    text = path.read_text()
    if not text.isdigit():
        raise ValueError(f"{path}: no number")
    return np.arange(int(text), dtype=np.int64) ** 2


def refuse(path: Path) -> np.ndarray:
    raise AssertionError(f"computed again: {path}")


def build(root: Path, items: list[Item], compute=square, **options) -> cache.Entry:
    return open_or_build(
        root / "cache", SETTINGS, items, "int64", compute, progress=False, **options
    )


def test_built_once_and_mapped(tmp_path: Path, items: list[Item]) -> None:
    first = build(tmp_path, items)
    again = build(tmp_path, items, refuse)
    assert isinstance(again.values, np.memmap)
    assert np.array_equal(first.values, again.values)
    assert again.offsets.dtype == np.int64
    for i in range(30):
        part = again.values[again.offsets[i] : again.offsets[i + 1]]
        assert np.array_equal(part, np.arange(i + 1) ** 2)
    # what happens to a view stays with it
    first.values[:] = -1
    assert np.array_equal(build(tmp_path, items, refuse).values, again.values)


def test_key_depends_on_everything(tmp_path: Path, items: list[Item]) -> None:
    path = items[0].path
    key = cache_key(SETTINGS, items, "int64")
    assert key == cache_key(dict(SETTINGS), [Item.of(i.name, i.path, 0) for i in items], "int64")
    others = {
        cache_key({"kind": "squares", "frames": 64}, items, "int64"),
        cache_key(SETTINGS, items, "int32"),
        cache_key(SETTINGS, items[1:], "int64"),
        cache_key(SETTINGS, items[::-1], "int64"),
        cache_key(SETTINGS, [Item.of("000", path, 1), *items[1:]], "int64"),
        cache_key(SETTINGS, [Item.of("x", path, 0), *items[1:]], "int64"),
    }
    os.utime(path, ns=(0, items[0].mtime_ns + 1))
    others.add(cache_key(SETTINGS, [Item.of("000", path, 0), *items[1:]], "int64"))
    path.write_text("12")
    os.utime(path, ns=(0, items[0].mtime_ns))
    others.add(cache_key(SETTINGS, [Item.of("000", path, 0), *items[1:]], "int64"))
    path.unlink()
    others.add(cache_key(SETTINGS, [Item.of("000", path, 0), *items[1:]], "int64"))
    assert len(others | {key}) == 10


def test_broken_files_are_named_and_nothing_is_left(tmp_path: Path, items: list[Item]) -> None:
    for i in range(4):
        items[i].path.write_text("x")
    with pytest.raises(
        ValueError, match=r"4 of 30 clips are broken: .*000.*002: no number; and 1 more"
    ):
        build(tmp_path, items)
    assert list((tmp_path / "cache").iterdir()) == []
    entry = build(tmp_path, items, skip_broken=True)
    assert sorted(entry.broken) == [0, 1, 2, 3]
    assert len(entry.offsets) == 27
    # the entry is there now, and still not for those who want every clip
    with pytest.raises(ValueError, match="4 of 30 clips are broken"):
        build(tmp_path, items)


def test_all_broken(tmp_path: Path, items: list[Item]) -> None:
    for item in items:
        item.path.write_text("x")
    with pytest.raises(ValueError, match="30 of 30 clips are broken"):
        build(tmp_path, items, skip_broken=True)


def test_mended_files_come_back(tmp_path: Path, items: list[Item]) -> None:
    items[3].path.write_text("x")
    assert list(build(tmp_path, items, skip_broken=True).broken) == [3]
    items[3].path.write_text("4")  # the key as taken above stays the same
    entry = build(tmp_path, items, skip_broken=True)
    assert entry.broken == {}
    assert len(entry.offsets) == 31
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("fault", ["short", "index", "no values", "wrong count"])
def test_damaged_entry(tmp_path: Path, items: list[Item], fault: str) -> None:
    build(tmp_path, items)
    (folder,) = (tmp_path / "cache").iterdir()
    values, index = folder / "values.bin", folder / "index.json"
    if fault == "short":
        values.write_bytes(values.read_bytes()[:-8])
    elif fault == "index":
        index.write_text(index.read_text()[:-9])
    elif fault == "no values":
        values.unlink()
    else:
        content = json.loads(index.read_text())
        del content["offsets"][4]
        index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged; delete this folder"):
        build(tmp_path, items)


def test_full_disk(tmp_path: Path, items: list[Item]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write the cache .*cache_dir"):
            build(tmp_path, items)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_folder_to_write_in(tmp_path: Path, items: list[Item]) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="cannot write the cache"):
        build(tmp_path, items)


def test_interrupted_build_leaves_nothing(tmp_path: Path, items: list[Item]) -> None:
    def interrupt(path: Path) -> np.ndarray:
        if path == items[20].path:
            raise KeyboardInterrupt
        return square(path)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, items, interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def start(root: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(root)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_at_once(tmp_path: Path, items: list[Item]) -> None:
    processes = [start(tmp_path), start(tmp_path)]
    outputs = [process.communicate(timeout=120)[0].split(maxsplit=2) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # both were at work at the same time, and both got the same entry
    assert [calls for calls, _, _ in outputs] == ["30", "30"]
    assert outputs[0] == outputs[1]
    assert int(outputs[0][1]) == sum(k * k for i in range(30) for k in range(i + 1))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    build(tmp_path, items, refuse)


def test_killed_build(tmp_path: Path, items: list[Item]) -> None:
    process = start(tmp_path)
    while not list(tmp_path.glob("working-*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".building-")
    # nothing of it is taken for an entry; a young one may be at work and is left alone
    build(tmp_path, items)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    os.utime(left, (0, 0))
    build(tmp_path, items[1:])
    assert not left.exists()


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSCORE_CACHE", "/somewhere")
    assert default_cache_dir() == Path("/somewhere")
    monkeypatch.delenv("FASTSCORE_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "fastscore"
