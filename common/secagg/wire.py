"""Fixed-length binary messages: what is read is checked for its length before anything is allocated for it."""

import struct
from typing import Any

from common.errors import ProtocolError


class Reader:
    """Reads a message from front to back; :meth:`end` insists that nothing is left.

    Args:
        what: names the message in errors.

    Raises:
        ProtocolError: by every method, where the content is not as long as it should be.
    """

    def __init__(self, content: bytes, what: str) -> None:
        self._content = content
        self._what = what
        self._at = 0

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        end = self._at + length
        if length < 0 or end > len(self._content):
            raise ProtocolError(f"Expected {self._what} of {len(self._content)} bytes to have at least {end}.")
        piece = self._content[self._at : end]
        self._at = end
        return piece

    def numbers(self, form: str) -> tuple[Any, ...]:
        """The next numbers, in a form of :mod:`struct`, little-endian."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def varint(self) -> int:
        """The next number below 2^35, 7 bits in a byte, the lowest first (LEB128)."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ProtocolError(f"Expected the numbers of {self._what} to have at most 5 bytes each.")

    def flags(self, count: int) -> list[bool]:
        """The next `count` bits; those that fill the last byte must be 0."""
        content = self.take((count + 7) // 8)
        if count % 8 and content[-1] >> count % 8:
            raise ProtocolError(f"Expected the bits beyond the {count} of {self._what} to be 0.")
        return [bool(content[index // 8] >> index % 8 & 1) for index in range(count)]

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._content):
            raise ProtocolError(f"Expected {self._what} of {len(self._content)} bytes to have {self._at}.")


def numbers(form: str, *values: Any) -> bytes:
    """The bytes that :meth:`Reader.numbers` reads."""
    return struct.pack(f"<{form}", *values)


def varint(value: int) -> bytes:
    """The bytes that :meth:`Reader.varint` reads."""
    content = bytearray()
    while value >= 0x80:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    content.append(value)
    return bytes(content)


def flags(values: list[bool]) -> bytes:
    """The bytes that :meth:`Reader.flags` reads."""
    content = bytearray((len(values) + 7) // 8)
    for index, value in enumerate(values):
        content[index // 8] |= value << index % 8
    return bytes(content)
