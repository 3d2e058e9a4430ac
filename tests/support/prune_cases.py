"""A shared object as benchmarks/gpu/prune_so.py reads it: an ELF64 file with two fat binaries."""

from __future__ import annotations

import struct

MAGIC = 0xBA55ED50
PTX, CODE = 1, 2
# (kind, architecture, payload, whether it stays), by fat binary
BINARIES = [
    [(CODE, 80, b"a" * 16, False), (CODE, 90, b"b" * 24, True), (PTX, 90, b"c" * 8, False)],
    [(CODE, 80, b"d" * 8, False), (PTX, 75, b"e" * 8, False), (PTX, 80, b"f" * 16, True),
     (PTX, 100, b"g" * 8, False)],
]  # fmt: skip
ENTRY_HEADER = 64


def shared_object() -> tuple[bytes, bytes]:
    """(the file, the file with what is not needed blanked)."""
    return _elf(_section(blank=False)), _elf(_section(blank=True))


def _section(blank: bool) -> bytes:
    return b"".join(_binary(entries, blank) for entries in BINARIES)


def _binary(entries: list[tuple[int, int, bytes, bool]], blank: bool) -> bytes:
    body = b""
    for kind, arch, payload, stays in entries:
        header = struct.pack("<HHIQ", kind, 0, ENTRY_HEADER, len(payload))
        header += bytes(12) + struct.pack("<I", arch)
        body += header.ljust(ENTRY_HEADER, b"\0")
        body += bytes(len(payload)) if blank and not stays else payload
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(body)) + body


def _elf(fatbin: bytes) -> bytes:
    names = b"\0.nv_fatbin\0.shstrtab\0"
    first = 64
    second = first + len(fatbin) + 16  # whoever looks for the next binary stops before the end
    data = fatbin + bytes(16) + names
    headers = [(0, 0, 0), (1, first, len(fatbin) + 16), (12, second, len(names))]
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", name, 0, 0, 0, offset, size, 0, 0, 0, 0)
        for name, offset, size in headers
    )
    start = first + len(data)
    elf = bytearray(64)
    elf[:4] = b"\x7fELF"
    struct.pack_into("<Q", elf, 0x28, start)
    struct.pack_into("<HH", elf, 0x3C, len(headers), 2)
    return bytes(elf) + data + table
