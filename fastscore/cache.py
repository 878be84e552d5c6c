"""Arrays computed once from files: keyed by what they depend on, mapped, published atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from tqdm import tqdm

FORMAT = 1
_STALE_SECONDS = 24 * 3600
Compute = Callable[[Path], np.ndarray]


@dataclass(frozen=True)
class Item:
    """One source file as the key sees it; size and mtime_ns are -1 where it is missing."""

    name: str
    label_index: int
    size: int
    mtime_ns: int
    path: Path

    @classmethod
    def of(cls, name: str, path: Path, label_index: int) -> Item:
        """Item with the size and modification time of ``path``."""
        try:
            stat = path.stat()
        except OSError:
            return cls(name, label_index, -1, -1, path)
        return cls(name, label_index, stat.st_size, stat.st_mtime_ns, path)

    @property
    def identity(self) -> list[str | int]:
        """What a change of makes the cached values stale."""
        return [self.name, self.label_index, self.size, self.mtime_ns]


@dataclass(frozen=True)
class Entry:
    """Flat ``values``, ``offsets`` int64 [kept + 1], and messages by number of ``broken`` items."""

    values: np.ndarray
    offsets: np.ndarray
    broken: dict[int, str]


def default_cache_dir() -> Path:
    """$FASTSCORE_CACHE, else ~/.cache/fastscore."""
    return Path(os.environ.get("FASTSCORE_CACHE") or Path.home() / ".cache" / "fastscore")


def cache_key(settings: dict[str, Any], items: Sequence[Item], dtype: str) -> str:
    """Hash of the format, the settings and every source file's name, label, size and time."""
    content = [FORMAT, settings, dtype, [item.identity for item in items]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def open_or_build(
    cache_dir: Path,
    settings: dict[str, Any],
    items: Sequence[Item],
    dtype: str,
    compute: Compute,
    skip_broken: bool = False,
    progress: bool = True,
) -> Entry:
    """Map the entry for these settings and files, computing it first where it is absent.

    ``compute`` turns a file into an array of ``dtype``, or raises ValueError for a broken one. Any
    number of processes may do this at once: an entry is built under a private name and renamed.

    Raises ValueError for broken files unless ``skip_broken``, for a damaged entry, and for a folder
    that cannot be written.
    """
    final = cache_dir / f"{settings['kind']}-{cache_key(settings, items, dtype)}"
    try:
        if final.is_dir():
            entry = _open(final, dtype, len(items))
            if not _mended(entry, items, compute):
                if entry.broken and not skip_broken:
                    raise ValueError(_complaint(entry.broken, len(items)))
                return entry
            _discard(final)
        _build(final, settings, items, dtype, compute, skip_broken, progress)
    except OSError as error:
        raise ValueError(
            f"cannot write the cache {final}: {error.strerror or error}; free space, or choose "
            "another folder with cache_dir or FASTSCORE_CACHE"
        ) from None
    return _open(final, dtype, len(items))


def _open(folder: Path, dtype: str, count: int) -> Entry:
    damaged = f"the cache {folder} is damaged; delete this folder and it is built again"
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        offsets = np.array(index["offsets"], dtype=np.int64)
        broken = {int(number): message for number, message in index["broken"].items()}
        size = (folder / "values.bin").stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{damaged} ({error})") from None
    if len(offsets) != count - len(broken) + 1 or offsets[-1] * np.dtype(dtype).itemsize != size:
        raise ValueError(f"{damaged} (values.bin has {size} bytes)")
    # copy on write: what a caller does to its view never reaches the file
    return Entry(np.memmap(folder / "values.bin", dtype=dtype, mode="c"), offsets, broken)


def _mended(entry: Entry, items: Sequence[Item], compute: Compute) -> bool:
    """Whether a file recorded as broken can be read now."""
    # permissions and mounts come back without a change of size or time, so the key stays the same
    for number in entry.broken:
        with contextlib.suppress(ValueError):
            compute(items[number].path)
            return True
    return False


def _discard(final: Path) -> None:
    # renamed first, so that nobody opens a folder half removed
    trash = final.with_name(f".building-{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _build(
    final: Path,
    settings: dict[str, Any],
    items: Sequence[Item],
    dtype: str,
    compute: Compute,
    skip_broken: bool,
    progress: bool,
) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final.parent)
    temporary = final.with_name(f".building-{secrets.token_hex(8)}")
    temporary.mkdir()
    offsets, broken = [0], {}
    try:
        with open(temporary / "values.bin", "wb") as file:
            bar = tqdm(items, desc=f"caching {settings['kind']}", unit="clip", disable=not progress)
            for number, item in enumerate(bar):
                try:
                    values = compute(item.path)
                except ValueError as error:
                    broken[number] = str(error)
                    continue
                file.write(np.ascontiguousarray(values, dtype=dtype).data)
                offsets.append(offsets[-1] + values.size)
            _sync(file)
        if broken and (not skip_broken or len(broken) == len(items)):
            raise ValueError(_complaint(broken, len(items)))
        index = {"format": FORMAT, "settings": settings, "dtype": dtype, "broken": broken}
        index |= {"items": [item.name for item in items], "offsets": offsets}
        with open(temporary / "index.json", "w", encoding="utf-8") as file:
            json.dump(index, file)
            _sync(file)
        _publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> None:
    try:
        os.rename(temporary, final)
    except OSError:
        # another process published the same entry first: its bytes are as good as ours
        if not (final / "index.json").is_file():
            raise


def _sync(file: BinaryIO | TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sweep(folder: Path) -> None:
    """Remove what builds killed more than a day ago left behind."""
    for old in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)


def _complaint(broken: dict[int, str], count: int) -> str:
    messages = [broken[number] for number in sorted(broken)]
    more = f"; and {len(messages) - 3} more" if len(messages) > 3 else ""
    return (
        f"{len(messages)} of {count} clips are broken: {'; '.join(messages[:3])}{more}; mend or "
        "remove them, or leave them out with skip_broken=True"
    )
