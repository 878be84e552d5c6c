"""Is an audio file whole? libsndfile shortens cut-off files without a word: look for ourselves."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

# sizes that writers to a pipe leave behind, as they cannot know the length
_UNKNOWN_SIZES = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def check_complete(path: Path) -> None:
    """Raise ValueError, in one sentence, for a path that is no file, or one empty or cut off.

    Wav is checked by its chunk sizes and Ogg by its pages (lengths, CRCs, end of stream: RFC 3533,
    section 6). FLAC carries its length and CRCs where the decoder itself checks them.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}: not a file; expected wav, flac or ogg audio")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ValueError(f"{path}: the file is empty (0 bytes); remove it or restore it")
            magic = file.read(4)
            fault = ""
            if magic in (b"RIFF", b"RIFX"):
                fault = _wav_fault(file, size, "<" if magic == b"RIFF" else ">")
            elif magic == b"OggS":
                fault = _ogg_fault(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if fault:
        raise ValueError(f"{path}: {fault}; restore the complete file")


def _wav_fault(file: BinaryIO, size: int, order: str) -> str:
    """Walk the chunks up to the samples and compare their size with the file's."""
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack(f"{order}4sI", file.read(8))
        position += 8
        if name == b"data":
            absent = position + length - size
            if absent > 0 and length not in _UNKNOWN_SIZES:
                return f"truncated, {absent} of {length} bytes of samples are missing"
            return ""
        position += length + length % 2
    return "truncated, it ends before its samples"


def _ogg_fault(file: BinaryIO) -> str:
    """Walk the pages to the one that ends the stream."""
    file.seek(0)
    ended = False
    while head := file.read(27):
        if not head.startswith(b"OggS"[: len(head)]):
            # tags that some tools append are harmless
            return "" if ended else "damaged, a page does not start where the last one ends"
        if len(head) < 27:
            return "truncated within a page header"
        table = file.read(head[26])
        body = file.read(sum(table))
        if len(table) < head[26] or len(body) < sum(table):
            return "truncated within a page"
        # the checksum is computed with its own field set to zero
        if _ogg_crc(head[:22] + bytes(4) + head[26:] + table + body) != head[22:26]:
            return "damaged, the checksum of a page does not match"
        ended = bool(head[5] & 4)
    return "" if ended else "truncated, the page that ends the stream is missing"


def _ogg_crc(page: bytes) -> bytes:
    """CRC of polynomial 0x04C11DB7, high bit first, start 0; little-endian as stored.

    zlib runs the same polynomial low bit first and inverts at both ends: mirror bits and undo that.
    """
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return mirrored.to_bytes(4, "little").translate(_MIRRORED)[::-1]
