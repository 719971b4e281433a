"""What a kernel takes of an AMD GPU, as its code object says: the ELF note NT_AMDGPU_METADATA, a map in MessagePack.

Source: LLVM, "User Guide for AMDGPU Backend", code object V3 to V6 metadata; the MessagePack specification.
"""

from __future__ import annotations

import struct
from typing import Any

from forge.errors import FormatError

_PT_NOTE, _NT_AMDGPU_METADATA = 4, 32
_MAX_DEPTH = 16
_NAMES = {
    "VGPRs": ".vgpr_count",
    "AGPRs": ".agpr_count",
    "SGPRs": ".sgpr_count",
    "VGPR spills": ".vgpr_spill_count",
    "SGPR spills": ".sgpr_spill_count",
    "scratch bytes": ".private_segment_fixed_size",
    "LDS bytes": ".group_segment_fixed_size",
}
"""What is shown of the metadata. Registers are those of a thread, scratch memory too; LDS is a block's."""
_NUMBERS = {
    **{0xCC + i: f">{kind}" for i, kind in enumerate("BHIQ")},
    **{0xD0 + i: f">{kind}" for i, kind in enumerate("bhiq")},
}
_LENGTHS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}


def resources(code: bytes) -> dict[str, dict[str, int]]:
    """What each kernel of a code object takes, by its name. Raises FormatError where the metadata cannot be read."""
    try:
        found, _ = _value(_metadata(code), 0, 0)
        kernels = {about[".name"]: about for about in found["amdhsa.kernels"]}
        return {
            kernel: {name: int(about.get(key, 0)) for name, key in _NAMES.items()} for kernel, about in kernels.items()
        }
    except (struct.error, IndexError, KeyError, TypeError, ValueError, AttributeError):
        raise FormatError("the code object's metadata cannot be read: it is no kernel's for an AMD GPU") from None


def _metadata(code: bytes) -> bytes:
    """The note of an ELF file of 64 bits. Raises ValueError or struct.error where there is none."""
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no ELF file")
    (table,) = struct.unpack_from("<Q", code, 32)
    size, count = struct.unpack_from("<HH", code, 54)
    for i in range(count):
        kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", code, table + i * size)
        if kind != _PT_NOTE:
            continue
        end = min(start + length, len(code))
        while start + 12 <= end:
            name, content, note = struct.unpack_from("<III", code, start)
            begin = start + 12 + -(-name // 4) * 4
            if note == _NT_AMDGPU_METADATA and begin + content <= end:
                return code[begin : begin + content]
            start = begin + -(-content // 4) * 4
    raise ValueError("no note")


def _value(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    """A value of MessagePack, and where the next one begins."""
    if depth > _MAX_DEPTH:
        raise ValueError("too deep")
    kind, at = data[at], at + 1
    if kind < 0x80:
        return kind, at
    if kind >= 0xE0:
        return kind - 0x100, at
    if kind in _NUMBERS:
        return struct.unpack_from(_NUMBERS[kind], data, at)[0], at + struct.calcsize(_NUMBERS[kind])
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind], at
    if kind in _LENGTHS:
        (length,) = struct.unpack_from(_LENGTHS[kind], data, at)
        at += struct.calcsize(_LENGTHS[kind])
    elif kind < 0xC0:
        length = kind & (0x1F if kind >= 0xA0 else 0x0F)
    else:
        raise ValueError("a kind that metadata has not")
    if 0xA0 <= kind < 0xC0 or 0xD9 <= kind <= 0xDB:
        if at + length > len(data):
            raise ValueError("cut off")
        return data[at : at + length].decode(), at + length
    if 0x90 <= kind < 0xA0 or kind in (0xDC, 0xDD):
        items = []
        for _ in range(length):  # each takes a byte at least, or ends the loop
            item, at = _value(data, at, depth + 1)
            items.append(item)
        return items, at
    pairs: dict[Any, Any] = {}
    for _ in range(length):
        key, at = _value(data, at, depth + 1)
        pairs[key], at = _value(data, at, depth + 1)
    return pairs, at
