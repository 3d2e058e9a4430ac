"""Blanks what an sm_90 GPU would not load in a CUDA shared object, so that it compresses well.

    python prune_so.py IN.so OUT.so

Entries of the fat binaries keep their headers; only their payload becomes zeros. Where a kernel has
no sm_90 code, its newest PTX up to 90 stays. The file still runs on sm_90, and only there.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2
ARCH = 90


class Entry(NamedTuple):
    """Of a fat binary; sizes in bytes."""

    offset: int
    kind: int
    header: int
    payload: int
    arch: int


def sections(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of an ELF64 file's sections."""
    (start,) = struct.unpack_from("<Q", data, 0x28)
    count, names = struct.unpack_from("<HH", data, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, start + 64 * i) for i in range(count)]
    for header in headers:
        at = headers[names][4] + header[0]
        yield data[at : data.index(b"\0", at)].decode(), header[4], header[5]


def containers(data: bytes, offset: int, size: int) -> Iterator[list[Entry]]:
    """The entries of each fat binary of a section."""
    at = offset
    while at < offset + size - 16:
        if struct.unpack_from("<I", data, at)[0] != MAGIC:
            at += 8
            continue
        _, header, payload = struct.unpack_from("<HHQ", data, at + 4)
        entry, end, found = at + header, at + header + payload, []
        while entry < end:
            kind, _, own, length = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            found.append(Entry(entry, kind, own, length, arch))
            entry += own + length
        yield found
        at = end


def needed(entries: list[Entry]) -> list[Entry]:
    """What is loaded on ARCH."""
    code = [entry for entry in entries if (entry.kind, entry.arch) == (MACHINE_CODE, ARCH)]
    if code:
        return code
    ptx = [entry for entry in entries if entry.kind == PTX and entry.arch <= ARCH]
    return [max(ptx, key=lambda entry: entry.arch)] if ptx else []


def main(source: str, target: str) -> None:
    original = Path(source).read_bytes()
    data = bytearray(original)
    kept = blanked = 0
    for name, offset, size in sections(original):
        if name != ".nv_fatbin":
            continue
        for entries in containers(original, offset, size):
            keep = needed(entries)
            for entry in entries:
                if entry in keep:
                    kept += entry.payload
                    continue
                at = entry.offset + entry.header
                data[at : at + entry.payload] = bytes(entry.payload)
                blanked += entry.payload
    Path(target).write_bytes(data)
    print(f"{source}: kept {kept / 1e6:.1f} MB of code, blanked {blanked / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
