"""Protobuf's wire format, walked on mapped bytes: where each field of a message begins and ends. Nothing is parsed."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VARINT, FIXED_64, SIZED, FIXED_32 = 0, 1, 2, 5  # protobuf's wire types


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a message: its number, all its bytes, and those of its value."""

    number: int
    whole: memoryview
    value: memoryview

    @property
    def integer(self) -> int:
        """The value of a varint as the signed number of 64 bits that it is. Raises ValueError on another field."""
        value, end = number(self.value, 0)
        if end != len(self.value):
            raise ValueError(f"field {self.number} is no number")
        return value - 2**64 if value >= 2**63 else value

    @property
    def text(self) -> str:
        """The value as text. Raises ValueError (UnicodeDecodeError) on what is none."""
        return bytes(self.value).decode("utf-8")


def mapped(path: Path) -> memoryview:
    """A file's bytes, read as they are looked at; it stays mapped as long as a piece of them is in use."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message on the wire, in their order. Raises ValueError where it is none, or cut."""
    at = 0
    while at < len(message):
        key, start = number(message, at)
        kind = key & 7
        if kind == SIZED:
            size, start = number(message, start)
            end = start + size
        elif kind == VARINT:
            _, end = number(message, start)
        elif kind in (FIXED_64, FIXED_32):
            end = start + (8 if kind == FIXED_64 else 4)
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if end > len(message):
            raise ValueError(f"a field of {end - at} bytes where {len(message) - at} are left")
        yield Field(key >> 3, message[at:end], message[start:end])
        at = end


def number(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the place behind it. Raises ValueError on one without an end."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")


def numbers(field: Field) -> Iterator[int]:
    """A repeated whole number's values in one field: packed into one piece, or a single one."""
    if field.whole[0] & 7 == VARINT:
        yield field.integer
        return
    at = 0
    while at < len(field.value):
        value, at = number(field.value, at)
        yield value - 2**64 if value >= 2**63 else value
