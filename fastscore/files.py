"""Writing files whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# as atomic_write names them
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}(\.[^.]*)?")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it, synced, when the block ends well.

    The temporary name keeps the suffix of ``path``, so writers that go by it work. When the block
    raises, the temporary file is removed and ``path`` stays as it was. Raises ValueError when the
    folder does not exist, is not writable, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist; create it")
    temporary = path.parent / f".{path.stem}.{secrets.token_hex(6)}{path.suffix}"
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot write {path}: {reason}; free space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically; ValueError as in ``atomic_write``."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of writers that were killed; nobody may be writing in ``folder``."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # some network file systems refuse to sync a folder; the file itself must sync
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
