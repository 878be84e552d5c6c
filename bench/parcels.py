"""Files in parcels that a transfer with a limit on sizes takes, checked when they are put together.

    python bench/parcels.py pack digits-human digits-synth --out PARCELS [--size 15] [--prefix data]
    python bench/parcels.py unpack PARCELS .. --out FOLDER

The files, one after another in order of their names, are one stream of bytes; a parcel is a piece
of it, nothing is compressed. A manifest beside the parcels names every file and parcel with size
and SHA-256. Parcels may arrive in any order and in several goes, each with the manifest: what came
is kept in FOLDER/.parcels until the rest is there. Exit code 1: parcels are missing, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from fastscore.files import write_bytes

FORMAT, VERSION = "fastscore-parcels", 1
# where parcels wait for the rest
SPOOL = ".parcels"
MIB = 2**20
_PIECE = 4 * MIB
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Item:
    """A file, by its path with slashes, or a parcel, by its name: bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was packed: ``files`` in the order of the stream, ``parcels`` in the order of pieces."""

    prefix: str
    files: list[Item]
    parcels: list[Item]


def manifest_name(prefix: str) -> str:
    """Name of the manifest of parcels ``prefix``-00001 and so on."""
    return f"{prefix}.parcels.json"


def pack(
    sources: Sequence[Path], out: Path, size: int, prefix: str = "data", exclude: Sequence[str] = ()
) -> Manifest:
    """Pack files and folders into parcels of at most ``size`` bytes in ``out``.

    Names begin with the last part of each source; ``exclude`` leaves out files whose name or path
    fits a pattern. ValueError for a source that is not there, holds nothing or shares a name with
    another, for a prefix that is no plain name, and where ``out`` cannot be written.
    """
    if not _NAME.fullmatch(prefix):
        raise ValueError(f"--prefix {prefix!r} must be letters, digits, '.', '_' and '-'")
    if size < 1:
        raise ValueError(f"--size: parcels of {size} bytes are too small; 1 is the least")
    found = _collect(sources, exclude)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}; choose another folder") from None
    # the manifest goes first and comes last, so that none ever speaks of other parcels
    for old in (out / manifest_name(prefix), *out.glob(f"{prefix}-[0-9][0-9][0-9][0-9][0-9]")):
        old.unlink(missing_ok=True)
    files: list[Item] = []
    parcels = list(_write_parcels(_stream(found, files), out, prefix, size))
    manifest = Manifest(prefix, files, parcels)
    values = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    write_bytes(out / manifest_name(prefix), (json.dumps(values, indent=0) + "\n").encode())
    return manifest


def _collect(sources: Sequence[Path], exclude: Sequence[str]) -> dict[str, Path]:
    """Files by the name they are packed under, in order."""
    found: dict[str, Path] = {}
    for source in sources:
        root = source.resolve()
        if not root.exists():
            raise ValueError(f"{source} does not exist; name a file or a folder")
        paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for path in paths:
            name = path.relative_to(root.parent).as_posix()
            if any(fnmatch(name, x) or fnmatch(path.name, x) for x in exclude):
                continue
            if found.setdefault(name, path) != path:
                raise ValueError(
                    f"{found[name]} and {path} would both be {name!r}; rename one of them"
                )
    if not found:
        raise ValueError(f"{', '.join(map(str, sources))}: no file to pack")
    return dict(sorted(found.items()))


def _stream(found: dict[str, Path], files: list[Item]) -> Iterator[bytes]:
    """Bytes of all files; ``files`` learns each one's size and hash once it has been read."""
    for name, path in found.items():
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                size += len(piece)
                yield piece
        files.append(Item(name, size, digest.hexdigest()))


def _write_parcels(stream: Iterable[bytes], out: Path, prefix: str, size: int) -> Iterator[Item]:
    waiting = bytearray()
    number = 0

    def cut(length: int) -> Item:
        nonlocal number
        number += 1
        data = bytes(waiting[:length])
        del waiting[:length]
        name = f"{prefix}-{number:05d}"
        write_bytes(out / name, data)
        return Item(name, len(data), hashlib.sha256(data).hexdigest())

    for piece in stream:
        waiting += piece
        while len(waiting) >= size:
            yield cut(size)
    if waiting:
        yield cut(len(waiting))


def read_manifest(path: Path) -> Manifest:
    """Manifest of a file; ValueError where it is none, or names what may not be written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        good = values["format"] == FORMAT and values["version"] == VERSION
        manifest = Manifest(
            values["prefix"],
            *([Item(**item) for item in values[key]] for key in ("files", "parcels")),
        )
        good = good and path.name == manifest_name(manifest.prefix) and _is_sound(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{path} is not a manifest of parcels, or is damaged; fetch it again")
    for item in manifest.files:
        if not _is_inside(item.name):
            raise ValueError(f"{path}: {item.name!r} would lie outside the folder; refused")
    _refuse_conflicts(path, [item.name for item in manifest.files])
    return manifest


def _is_sound(manifest: Manifest) -> bool:
    items = manifest.files + manifest.parcels
    whole = all(
        type(i.name) is str and type(i.bytes) is int and i.bytes >= 0 and _HASH.fullmatch(i.sha256)
        for i in items
    )
    plain = all(_NAME.fullmatch(i.name) for i in manifest.parcels)
    sums = [sum(i.bytes for i in part) for part in (manifest.files, manifest.parcels)]
    return whole and plain and sums[0] == sums[1]


def _is_inside(name: str) -> bool:
    """Whether a path with slashes stays within the folder it is put into, on every system."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or path.parts[0] == SPOOL:
        return False
    return not any(c in name for c in "\\\0") and ":" not in path.parts[0]


def _refuse_conflicts(path: Path, names: list[str]) -> None:
    """ValueError where a name stands twice, or is a file and a folder."""
    seen = {PurePosixPath(name) for name in names}
    folders = {parent for name in seen for parent in name.parents}
    if len(seen) < len(names) or seen & folders:
        raise ValueError(f"{path}: a file is named twice, or is a folder as well; fetch it again")


def unpack(sources: Sequence[Path], out: Path) -> tuple[list[str], list[str]]:
    """Put parcels of one or several manifests together in ``out``.

    Returns the names of the files of finished manifests, and of the parcels still missing, which
    leave a manifest's files unwritten. A file that lies there with the same content is left alone.
    Every file is written under another name and renamed: a killed program leaves none half written.
    ValueError for damaged parcels, manifests and folders, and for links that lead out of ``out``.
    """
    try:
        (out / SPOOL).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}; choose another folder") from None
    folders = [*sources, out / SPOOL]
    manifests = _manifests(folders)
    done: list[str] = []
    missing: list[str] = []
    for manifest in manifests:
        found, lacking = _find(manifest, folders)
        if lacking:
            _keep(manifest, found, out / SPOOL)
            missing += lacking
            continue
        _write_files(manifest, found, out)
        done += [item.name for item in manifest.files]
        for name in (manifest_name(manifest.prefix), *(p.name for p in manifest.parcels)):
            (out / SPOOL / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (out / SPOOL).rmdir()
    return done, missing


def _manifests(folders: Sequence[Path]) -> list[Manifest]:
    found: dict[str, Manifest] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; name one that holds parcels")
        for path in sorted(folder.glob(manifest_name("*"))):
            manifest = read_manifest(path)
            if found.setdefault(manifest.prefix, manifest) != manifest:
                raise ValueError(
                    f"{path} speaks of other parcels than an earlier manifest of that name; keep "
                    f"one, and remove {SPOOL} where the other's parcels lie"
                )
    if not found:
        names = ", ".join(map(str, folders[:-1]))
        raise ValueError(f"{names}: no {manifest_name('*')} there; it travels with every parcel")
    return list(found.values())


def _find(manifest: Manifest, folders: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Where each parcel lies, whole, and those that are nowhere; ValueError for damaged ones."""
    found: dict[str, Path] = {}
    missing = []
    for parcel in manifest.parcels:
        paths = [p for folder in folders if (p := folder / parcel.name).is_file()]
        good = next((p for p in paths if _digest(p) == parcel.sha256), None)
        if good is not None:
            found[parcel.name] = good
        elif paths:
            raise ValueError(f"{paths[0]} is damaged: its SHA-256 is another; fetch it again")
        else:
            missing.append(parcel.name)
    return found, missing


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep(manifest: Manifest, found: dict[str, Path], spool: Path) -> None:
    """Copy what has arrived to where the next go looks for it."""
    for name, path in found.items():
        if path.parent != spool:
            write_bytes(spool / name, path.read_bytes())
    values: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    write_bytes(spool / manifest_name(manifest.prefix), json.dumps(values).encode())


def _write_files(manifest: Manifest, found: dict[str, Path], out: Path) -> None:
    root = out.resolve()
    stream = _Stream([found[parcel.name] for parcel in manifest.parcels])
    with contextlib.closing(stream):
        for item in manifest.files:
            _place(root, item, stream)


def _place(root: Path, item: Item, stream: _Stream) -> None:
    """Write the next file of the stream, unless it lies there already."""
    path = root / item.name
    if not path.parent.resolve().is_relative_to(root) or path.is_symlink():
        raise ValueError(f"{path} would be written through a link; remove the link")
    if path.is_file() and path.stat().st_size == item.bytes and _digest(path) == item.sha256:
        stream.skip(item.bytes)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, item, stream)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot write {path}: {reason}; free space or choose another folder"
        ) from None


def _write_file(path: Path, item: Item, stream: _Stream) -> None:
    # renamed but not synced one by one: thousands of small files would take minutes, and what a
    # power cut loses lies in the parcels still
    temporary = path.parent / f".{path.stem}.{secrets.token_hex(6)}{path.suffix}"
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for piece in stream.take(item.bytes):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != item.sha256:
            raise ValueError(f"{item.name} is damaged: its SHA-256 is another; pack it again")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Stream:
    """The bytes of parcels, one after another."""

    def __init__(self, parcels: Sequence[Path]) -> None:
        self._left = list(parcels)
        self._file: BinaryIO | None = None

    def take(self, size: int) -> Iterator[bytes]:
        """The next ``size`` bytes, in pieces."""
        while size:
            if self._file is None:
                self._file = self._left.pop(0).open("rb")
            piece = self._file.read(min(size, _PIECE))
            if not piece:
                self._file.close()
                self._file = None
                continue
            size -= len(piece)
            yield piece

    def close(self) -> None:
        """Close the parcel that was read last."""
        if self._file is not None:
            self._file.close()

    def skip(self, size: int) -> None:
        """Pass over ``size`` bytes."""
        for _ in self.take(size):
            pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("pack", help="pack files and folders")
    one.add_argument("sources", type=Path, nargs="+", metavar="SRC")
    one.add_argument(
        "--size", type=float, default=15.0, metavar="MIB", help="(default %(default)s)"
    )
    one.add_argument("--prefix", default="data", help="of the parcels' names (default %(default)s)")
    one.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="files left out")
    two = commands.add_parser("unpack", help="put parcels together")
    two.add_argument("sources", type=Path, nargs="+", metavar="DIR")
    for command in (one, two):
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    if args.command == "pack":
        size = int(args.size * MIB)
        manifest = pack(args.sources, args.out, size, args.prefix, args.exclude)
        total = sum(parcel.bytes for parcel in manifest.parcels)
        print(
            f"{len(manifest.files)} files, {total / MIB:.1f} MiB: {len(manifest.parcels)} parcels"
        )
        return 0
    done, missing = unpack(args.sources, args.out)
    if missing:
        print(f"missing still: {', '.join(missing)}", file=sys.stderr)
    print(f"{len(done)} files whole in {args.out}")
    return 1 if missing else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"parcels: {error}", file=sys.stderr)
        sys.exit(2)
