"""Every reader of another party's bytes: a value or a FedtopkError, in little memory, and nothing else."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy

import numpy as np
import pytest
from decoders import DECODERS, PHONE, POLICY, VALID, Decoder, Phone, flags_in, message_with, modest, rehearse
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import FedtopkError, ProtocolError
from common.messages import advertisement_of, body_of, content_of, model_bytes, read_arrays, signed_model_of
from common.privacy.encoding import Encoding
from common.secagg.advertisement import Advertisement, advertisement_bytes
from common.secagg.packing import pack, packed_bytes, unpack
from common.secagg.roster import View
from common.secagg.shares import inbox_bytes, read_inbox, read_parcels
from common.secagg.signatures import read_signatures, signatures_bytes
from common.secagg.terms import Terms
from common.secagg.wire import flags

LITTLE = 1_000_000
"""Bytes that a reader may take to refuse what it is given."""

short_run = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
shorter_run = settings(short_run, max_examples=100)
REHEARSAL = rehearse(Phone())


def read_model(message: Message) -> dict[str, np.ndarray]:
    return read_arrays(signed_model_of(message)[0])


@st.composite
def mutations(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid message with bits flipped, cut, lengthened, or with a piece of a message elsewhere in it."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(0, 3))):
        kind, at = draw(st.sampled_from(["flip", "cut", "extend", "splice"])), draw(st.integers(0, len(content)))
        if kind == "flip" and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at : at + draw(st.sampled_from([1, 16, 32, 64, len(content)]))]
        elif kind == "extend":
            content[at:at] = draw(st.binary(min_size=1, max_size=40))
        elif kind == "splice":
            source, length = draw(st.sampled_from(list(VALID.values()))), draw(st.integers(1, 80))
            start = draw(st.integers(0, len(source)))
            content[at : at + length] = source[start : start + length]
    return bytes(content)


@pytest.mark.parametrize(("name", "decode"), DECODERS, ids=[name for name, _ in DECODERS])
def test_anything_is_read_or_refused(name: str, decode: Decoder) -> None:
    decode(VALID[name])

    @short_run
    @given(mutations(VALID[name]) | st.binary(max_size=2 * len(VALID[name])))
    def fuzz(content: bytes) -> None:
        with suppress(FedtopkError):
            decode(content)

    fuzz()


@pytest.mark.parametrize("stage", ["share", "upload", "agree", "unmask"])
def test_what_a_device_refuses_changes_nothing_that_it_keeps(stage: str) -> None:
    @shorter_run
    @given(mutations(REHEARSAL.requests[stage]))
    def fuzz(content: bytes) -> None:
        phone = Phone(store=deepcopy(REHEARSAL.stores[stage]))
        try:
            getattr(phone, stage)(content)
        except FedtopkError:
            assert phone.store.content == REHEARSAL.stores[stage].content

    fuzz()


# What is read is what was written, and whatever is accepted is written again as it was.

fractions = st.floats(0, 0.99)
encodings = st.builds(
    Encoding,
    st.integers(2, 2**32 - 1),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.integers(2, 32),
    st.floats(0, 1e9),
    st.floats(0.01, 1),
    st.booleans(),
)
numbers = st.integers(1, 2**32 - 1)
all_terms = st.builds(
    Terms,
    numbers,
    numbers,
    numbers,
    fractions,
    fractions,
    st.booleans(),
    encodings,
    st.binary(min_size=32, max_size=32),
)


@shorter_run
@given(all_terms)
def test_terms_are_read_as_they_were_written(terms: Terms) -> None:
    assert Terms.parse(terms.to_bytes()) == terms


COUNT = REHEARSAL.play.terms.degree.neighbours
AGAIN: dict[str, Callable[[bytes], bytes]] = {
    "Advertisement.parse": lambda content: Advertisement.parse(content, hybrid=False).to_bytes(),
    "Advertisement.parse, hybrid": lambda content: Advertisement.parse(content, hybrid=True).to_bytes(),
    "Terms.parse": lambda content: Terms.parse(content).to_bytes(),
    "read_parcels": lambda content: b"".join(read_parcels(content, COUNT, hybrid=False)),
    "read_inbox": lambda content: inbox_bytes(read_inbox(content, COUNT, hybrid=False)),
    "read_signatures": lambda content: signatures_bytes(read_signatures(content, COUNT)),
    "Reader.flags": lambda content: flags(flags_in(content)),
    "unpack, 16": lambda content: pack(unpack(content, 9, 16), 16),
    "unpack, 20": lambda content: pack(unpack(content, 9, 20), 20),
    "unpack, 32": lambda content: pack(unpack(content, 9, 32), 32),
}


@pytest.mark.parametrize("name", list(AGAIN))
def test_no_two_messages_are_read_as_the_same(name: str) -> None:
    again, valid = AGAIN[name], VALID[name]
    assert again(valid) == valid

    @shorter_run
    @given(mutations(valid) | st.binary(min_size=len(valid), max_size=len(valid)))
    def fuzz(content: bytes) -> None:
        with suppress(FedtopkError):
            assert again(content) == content

    fuzz()


def test_a_truth_value_has_one_form() -> None:
    content = bytearray(VALID["Terms.parse"])
    central = len(content) - 33
    for value in range(256):
        content[central] = value
        try:
            assert Terms.parse(bytes(content)).to_bytes() == content, value
        except ProtocolError:
            assert value > 1


def test_a_view_is_of_the_roster() -> None:
    play = REHEARSAL.play
    for position in range(1, 10):
        view = View.parse(play.aggregate.view(position), modest)
        assert (view.terms, view.position) == (play.terms, position)
        assert view.own.to_bytes() == play.advertised[position].message
        told = [theirs.to_bytes() for theirs in view.advertisements if theirs.device != PHONE]
        assert told == [play.advertised[other].message for other in view.neighbours if other != PHONE]


@pytest.mark.parametrize(("count", "bits"), [(1, 20), (9, 20), (8, 16), (8, 32)])
def test_a_residue_more_or_less_is_refused(count: int, bits: int) -> None:
    length = packed_bytes(count, bits)
    for wrong in {0, length - 1, length + 1, 2 * length}:
        with pytest.raises(ProtocolError, match=f"{count} residues"):
            unpack(bytes(wrong), count, bits)


# Memory: nothing is allocated for a number that a message claims.


def peak_of(decode: Callable[[], object]) -> int:
    """Bytes allocated at most while something is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(FedtopkError):
            decode()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("decode", ["View.parse", "SecureUpload.share"])
@pytest.mark.parametrize("n", [1001, 100_000, 2**31, 2**32 - 1])
def test_a_large_roster_costs_nothing_before_it_is_refused(decode: str, n: int) -> None:
    valid = VALID[decode]
    forged = valid[:8] + struct.pack("<I", n) + valid[12:]
    assert peak_of(lambda: dict(DECODERS)[decode](forged)) < LITTLE


def test_terms_of_any_size_cost_nothing_to_read() -> None:
    content = bytearray(VALID["Terms.parse"])
    content[8:12] = content[29:33] = struct.pack("<I", 2**32 - 1)
    tracemalloc.start()
    terms = Terms.parse(bytes(content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (terms.n, terms.encoding.dimension) == (2**32 - 1, 2**32 - 1) and peak < LITTLE


@pytest.mark.parametrize("name", [name for name, _ in DECODERS if not name.endswith("_of")])
def test_a_long_message_is_not_copied_to_be_refused(name: str) -> None:
    content = VALID[name] + bytes(4 * LITTLE)
    assert peak_of(lambda: dict(DECODERS)[name](content)) < LITTLE


# Messages of other shapes than ours.


def safetensors(header: object, data: bytes = b"") -> bytes:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor_of(shape: list[int], dtype: str = "F32", end: int = 12) -> bytes:
    return safetensors({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}, bytes(12))


MODELS = {
    "nothing": b"",
    "a truncated length": b"\1\0",
    "a header that is not there": struct.pack("<Q", 100),
    "a header beyond memory": struct.pack("<Q", 2**62),
    "an archive": b"PK\3\4 and no more",
    "a pickle": b"\x80\4N.",
    "no JSON": safetensors(b"{'a': ("),
    "a list": safetensors([1, 2]),
    "deep brackets": safetensors(b"[" * 3000),
    "an unknown type": tensor_of([3], "OBJECT"),
    "a type that numpy does not know": tensor_of([6], "BF16"),
    "a negative size": tensor_of([-3]),
    "a size beyond 64 bits": tensor_of([10**30]),
    "a size that overflows": tensor_of([2**32, 2**32]),
    "a size beyond memory": tensor_of([10**12], end=4 * 10**12),
    "another size than its data": tensor_of([2]),
    "data that is too long": tensor_of([3]) + bytes(9),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_odd_models_are_refused_in_little_memory(name: str) -> None:
    model = ConfigRecord({"content": MODELS[name], "signature": b""})
    message = message_with(RecordDict({"model": model}))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="to be safetensors"):
            read_model(message)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < LITTLE


names = st.sampled_from(["secure", "parameters", "body", "advertisement", ""]) | st.text(max_size=3)
values = st.binary(max_size=9) | st.text(max_size=3) | st.integers(-9, 9) | st.floats() | st.booleans()
configs = st.dictionaries(names, values | st.lists(st.binary(max_size=3), max_size=3), max_size=3).map(ConfigRecord)
metrics = st.dictionaries(names, st.floats(), max_size=2).map(MetricRecord)
arrays = st.builds(
    Array,
    st.sampled_from(["float32", "object", ""]),
    st.lists(st.integers(-9, 9), max_size=3).map(tuple),
    st.sampled_from(["numpy.ndarray", "torch", ""]),
    st.binary(max_size=9),
)
array_records = st.dictionaries(names, arrays, max_size=3).map(ArrayRecord)
contents = st.dictionaries(names, configs | metrics | array_records, max_size=3).map(RecordDict)


@shorter_run
@given(contents)
def test_messages_of_any_shape_are_read_or_refused(content: RecordDict) -> None:
    message = message_with(content)
    for read, kind in ((body_of, bytes), (advertisement_of, bytes), (read_model, dict)):
        with suppress(ProtocolError):
            assert isinstance(read(message), kind)


@pytest.mark.parametrize("read", [body_of, advertisement_of, read_model])
def test_a_message_that_is_an_error_has_no_content(read: Callable[[Message], object]) -> None:
    error = Message(Error(1, "no"), reply_to=message_with(RecordDict()))
    with pytest.raises(ProtocolError):
        read(error)


@shorter_run
@given(st.binary(max_size=50), st.binary(max_size=50))
def test_bodies_are_read_as_they_were_written(body: bytes, advertisement: bytes) -> None:
    message = message_with(content_of(body, model=model_bytes({"a": np.arange(3)}), advertisement=advertisement))
    assert (body_of(message), advertisement_of(message)) == (body, advertisement)
    assert np.array_equal(read_model(message)["a"], np.arange(3))


def test_an_advertisement_has_the_length_that_a_view_reserves_for_it() -> None:
    assert len(VALID["Advertisement.parse"]) == advertisement_bytes(hybrid=False)
    assert len(VALID["Advertisement.parse, hybrid"]) == advertisement_bytes(hybrid=True)
    assert POLICY.maximum_cohort <= 1000
