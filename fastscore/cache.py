"""A folder of arrays computed once from files: found by content key, mapped, published atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

FORMAT = 1
_STALE_SECONDS = 24 * 3600


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
        """Item with the size and time of ``path``."""
        try:
            stat = path.stat()
        except OSError:
            return cls(name, label_index, -1, -1, path)
        return cls(name, label_index, stat.st_size, stat.st_mtime_ns, path)


@dataclass(frozen=True)
class Entry:
    """What the cache holds: flat ``values``, ``offsets`` int64 [kept + 1], ``broken`` item numbers."""

    values: np.ndarray
    offsets: np.ndarray
    broken: dict[int, str]


def default_cache_dir() -> Path:
    """$FASTSCORE_CACHE, else ~/.cache/fastscore."""
    return Path(os.environ.get("FASTSCORE_CACHE") or Path.home() / ".cache" / "fastscore")


def cache_key(settings: dict[str, Any], items: Sequence[Item], dtype: str) -> str:
    """Hash of the format, the settings and every source file's name, label, size and time."""
    # the absolute path stays out: a dataset that moves keeps its cache
    content = [FORMAT, settings, dtype, [astuple(item)[:4] for item in items]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def open_or_build(
    cache_dir: Path,
    settings: dict[str, Any],
    items: Sequence[Item],
    dtype: str,
    compute: Callable[[Path], np.ndarray],
    skip_broken: bool = False,
    progress: bool = True,
) -> Entry:
    """Map the entry for these settings and files, computing it first where it is absent.

    ``compute`` turns a file into an array of ``dtype`` or raises ValueError for a broken one. Any
    number of processes may do this at once: an entry is built under a private name and renamed.

    Raises ValueError for broken files unless ``skip_broken``, for a damaged entry, and for a folder
    that cannot be written.
    """
    final = cache_dir / f"{settings['kind']}-{cache_key(settings, items, dtype)}"
    if not final.is_dir():
        try:
            _build(final, settings, items, dtype, compute, skip_broken, progress)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"cannot write the cache {final}: {reason}; choose another cache_dir or set "
                "FASTSCORE_CACHE"
            ) from None
    entry = _open(final, dtype, len(items))
    if entry.broken and not skip_broken:
        raise ValueError(_complain(entry.broken, len(items)))
    return entry


def _open(folder: Path, dtype: str, count: int) -> Entry:
    damaged = f"the cache {folder} is damaged; delete this folder and it is built again"
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        offsets = np.array(index["offsets"], dtype=np.int64)
        broken = {int(number): message for number, message in index["broken"].items()}
        size = (folder / "values.bin").stat().st_size
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{damaged} ({error})") from None
    if len(offsets) != count - len(broken) + 1 or offsets[-1] * np.dtype(dtype).itemsize != size:
        raise ValueError(f"{damaged} (values.bin holds {size} bytes)")
    # copy on write: what a caller does to its view never reaches the file
    return Entry(np.memmap(folder / "values.bin", dtype=dtype, mode="c"), offsets, broken)


def _build(final, settings, items, dtype, compute, skip_broken, progress) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final.parent)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=".building-"))
    try:
        offsets, broken = [0], {}
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
            raise ValueError(_complain(broken, len(items)))
        index = {"format": FORMAT, "settings": settings, "dtype": dtype}
        index |= {"items": [item.name for item in items], "offsets": offsets, "broken": broken}
        with open(temporary / "index.json", "w", encoding="utf-8") as file:
            json.dump(index, file)
            _sync(file)
        _publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> None:
    os.chmod(temporary, 0o755)  # mkdtemp makes it private
    try:
        os.rename(temporary, final)
    except OSError:
        # another process published the same entry first: its bytes are as good as ours
        if not (final / "index.json").is_file():
            raise


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sweep(folder: Path) -> None:
    """Remove what builds killed more than a day ago left behind."""
    for old in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)


def _complain(broken: dict[int, str], count: int) -> str:
    messages = [broken[number] for number in sorted(broken)]
    more = f"; and {len(messages) - 3} more" if len(messages) > 3 else ""
    return (
        f"{len(messages)} of {count} clips are broken: {'; '.join(messages[:3])}{more}; mend or remove "
        "them, or leave them out with skip_broken=True"
    )
