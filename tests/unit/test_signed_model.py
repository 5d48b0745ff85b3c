"""A model's signature is for one run, one round, one catalogue and these bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol import key_of

from common.errors import ProtocolError
from common.signed_model import Edition

KEY, OTHER = key_of(1), key_of(2)
PUBLIC = KEY.public_key().public_bytes_raw()
editions = st.builds(
    Edition, st.binary(min_size=32, max_size=32), st.integers(0, 2**40), st.binary(min_size=32, max_size=32)
)


@given(editions, editions, st.binary(max_size=100), st.binary(max_size=100))
def test_a_signature_fits_what_was_signed_and_nothing_else(
    edition: Edition, other: Edition, content: bytes, changed: bytes
) -> None:
    signature = edition.sign(KEY, content)
    edition.check(PUBLIC, content, signature)
    for found, bytes_ in ((other, content), (edition, changed)):
        if (found, bytes_) != (edition, content):
            with pytest.raises(ProtocolError, match="by the publisher"):
                found.check(PUBLIC, bytes_, signature)


@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(63), Edition(bytes(32), 1, bytes(32)).sign(OTHER, b"x")])
def test_no_signature_of_the_publisher(signature: bytes) -> None:
    with pytest.raises(ProtocolError, match="model of 1 rounds"):
        Edition(bytes(32), 1, bytes(32)).check(PUBLIC, b"x", signature)
