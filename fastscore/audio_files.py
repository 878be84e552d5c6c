"""Is an audio file whole? libsndfile silently shortens cut-off files, so their containers are read here."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

# sizes that writers to a pipe leave behind, as they cannot know the length
_UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_OGG_PAGE_MAX = 27 + 255 + 255 * 255


def check_complete(path: Path) -> None:
    """Raise ValueError, in one sentence, for a path that is missing, a folder, empty or cut off."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ValueError(f"{path}: the file is empty (0 bytes); remove it or restore it")
            magic = file.read(4)
            if magic in (b"RIFF", b"RIFX"):
                missing = _wav_missing(file, size, "<" if magic == b"RIFF" else ">")
            elif magic == b"OggS":
                missing = _ogg_missing(file, size)
            else:  # FLAC counts its samples in the header: the reader compares
                missing = ""
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, expected an audio file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if missing:
        raise ValueError(f"{path}: truncated, {missing}; restore the complete file")


def _wav_missing(file: BinaryIO, size: int, order: str) -> str:
    """Walk the chunks of a RIFF file up to the samples."""
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack(f"{order}4sI", file.read(8))
        position += 8
        if name == b"data":
            absent = position + length - size
            if absent > 0 and length not in _UNKNOWN_SIZES:
                return f"{absent} of {length} bytes of samples are missing"
            return ""
        position += length + length % 2
    return "it ends before its samples"


def _ogg_missing(file: BinaryIO, size: int) -> str:
    """Look for a complete page that ends the stream (RFC 3533, section 6)."""
    file.seek(max(0, size - _OGG_PAGE_MAX))
    tail = file.read()
    start = tail.rfind(b"OggS")
    while start >= 0:
        page = tail[start:]
        if len(page) >= 27 and page[4] == 0:
            segments = page[26]
            length = 27 + segments + sum(page[27 : 27 + segments])
            if len(page) < length:
                return "its last page is incomplete"
            if len(page) == length:
                return "" if page[5] & 4 else "the page that ends the stream is missing"
        start = tail.rfind(b"OggS", 0, start)  # the four letters within packet data
    return "its last page is incomplete"
