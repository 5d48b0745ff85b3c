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


def flags(values: list[bool]) -> bytes:
    """The bytes that :meth:`Reader.flags` reads."""
    content = bytearray((len(values) + 7) // 8)
    for index, value in enumerate(values):
        content[index // 8] |= value << index % 8
    return bytes(content)
