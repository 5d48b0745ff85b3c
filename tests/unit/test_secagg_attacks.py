"""Attacks on the secure aggregation, one test each: the device refuses, the server names the culprit, or nothing is
released; and the same flow without the attack goes through.

The server of these tests may do anything: it builds rosters, inboxes and sets of survivors of its own.
"""

import random
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.poly1305 import Poly1305
from decoders import PHONE, POLICY, Disk, Phone, Rehearsal, meet, rehearse, residues_for
from protocol import NOW, RUN, SERVER_SEED, Play, anything, identity_of, key_of, plain_sum, residues_of

from client.device import participate
from common.errors import AggregationError, FedtopkError, ProtocolError, Refusal
from common.model import initialise
from common.offer import Offer, read_offer
from common.privacy.encoding import Encoding
from common.secagg import member
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.graph import neighbours_of
from common.secagg.identity import signed
from common.secagg.keys import mask_key, own_key, private_key, public_key, upload_key
from common.secagg.masks import add_masks, in_lanes
from common.secagg.member import TAG_BYTES, Shared, sign_of
from common.secagg.merkle import Tree
from common.secagg.packing import unpack
from common.secagg.roster import View, devices_bytes, place_bytes, view_bytes
from common.secagg.shamir import combine
from common.secagg.shares import inbox_bytes, read_inbox, read_parcels, split_pair
from common.secagg.signatures import signatures_bytes, subject
from common.secagg.terms import Terms
from common.secagg.wire import flags
from common.settings import load_settings
from simulations.datasets.synthetic import synthetic
from simulations.population import Population

TERMS_BYTES = 99
VICTIM, CULPRIT = 1, 4
"""Numbers and positions of the device that is attacked and of the one that attacks or is forged."""


@contextmanager
def blames(culprit: int, match: str) -> Iterator[None]:
    """Refuses, and names the device."""
    with pytest.raises(ProtocolError, match=match) as caught:
        yield
    assert caught.value.culprit == culprit


def all_but(n: int, *missing: int) -> bytes:
    """A set of survivors."""
    return flags([position not in missing for position in range(n)])


def leaves_of(play: Play) -> list[bytes]:
    return [play.advertised[device].message for device in play.device_at]


def view_of(terms: Terms, leaves: Sequence[bytes], position: int) -> bytes:
    """What a server tells a position of a roster of any leaves."""
    tree = Tree(leaves)
    neighbours = neighbours_of(tree.root, terms.n, terms.degree.neighbours, position).tolist()
    return view_with(terms, leaves, position, neighbours)


def view_with(terms: Terms, leaves: Sequence[bytes], position: int, neighbours: list[int]) -> bytes:
    """The same with neighbours of the server's choice."""
    tree = Tree(leaves)
    places = [place_bytes(leaves[place], tree.proof(place)) for place in (position, *neighbours)]
    return view_bytes(terms, devices_bytes(range(terms.n)), tree.root, public_key(SERVER_SEED), position, places)


def join(play: Play, position: int, view: bytes, now: float = NOW) -> Shared:
    """A device takes part in what it is told."""
    state, identity = play.advertised[position], play.identities[position]
    return member.share(state, identity, View.parse(view, anything), now, play.random)[0]


def forge(play: Play, leaf: bytes, position: int = CULPRIT) -> list[bytes]:
    """The roster with another leaf at a position."""
    return [leaf if place == position else own for place, own in enumerate(leaves_of(play))]


def advertisement(play: Play, position: int = CULPRIT, **changes: object) -> Advertisement:
    """What a position advertised, changed and not signed again."""
    found = Advertisement.parse(play.advertised[position].message, play.terms.hybrid)
    return replace(found, **changes)  # type: ignore[arg-type]


def resigned(found: Advertisement, device: int = CULPRIT, run: bytes = RUN) -> bytes:
    """The same, signed by a device."""
    return found.unsigned + signed(key_of(device), "advertisement", run, found.unsigned)


@cache
def uploaded(n: int, seed: int = 0) -> Play:
    """Everybody has uploaded. Not to be changed."""
    play = meet(n, seed)
    play.share()
    play.upload(residues_of(play, seed))
    return play


@cache
def rehearsed() -> Rehearsal:
    """An attempt with the phone. Not to be changed."""
    return rehearse(Phone())


def phone_at(stage: str) -> Phone:
    """The phone, before a stage of it."""
    return Phone(store=deepcopy(rehearsed().stores[stage]))


def fresh(n: int = 10) -> Play:
    """The same, to be changed."""
    return deepcopy(uploaded(n))


# --- Both shares of one device ----------------------------------------------------------------------------------------


def test_a_second_set_of_survivors_gets_no_second_share() -> None:
    phone = Phone()
    attempt = rehearse(phone)
    for stage, request in (("agree", all_but(10, 5)), ("unmask", attempt.requests["unmask"])):
        with pytest.raises(Refusal, match="at the stage 'Advertised'"):
            getattr(phone, stage)(request)


def test_after_the_unmasking_the_secrets_are_gone() -> None:
    phone = Phone()
    attempt = rehearse(phone)
    shared, agreed = attempt.stores["upload"]["secure"], attempt.stores["unmask"]["secure"]
    secrets = [shared["mask_seed"], shared["channel_seed"], shared["own_seed"], *agreed["shares"]]
    assert agreed["own_seed"] in attempt.stores["unmask"].content["secure"]
    assert not any(secret in content for secret in secrets for content in phone.store.content.values())


def test_a_device_signs_one_set_of_survivors() -> None:
    attempt, phone = rehearsed(), phone_at("unmask")
    with pytest.raises(Refusal, match="at the stage 'Agreed'"):
        phone.agree(all_but(10, 5))
    other = [
        signed(key_of(p), "survivors", agreed.context, subject(all_but(10, 5))) for p, agreed in others(attempt.play)
    ]
    with pytest.raises(ProtocolError, match="Expected 0 neighbours that signed the same survivors"):
        phone.unmask(signatures_bytes(list(other)))
    assert phone.unmask(attempt.requests["unmask"])


def others(play: Play) -> list[tuple[int, member.Agreed]]:
    return sorted(play.agreed.items())


Given = dict[int, bytes]
"""One kind of shares of the target's secrets, by their holders."""


def divided(play: Play, target: int, corrupt: Collection[int], told: Collection[int]) -> tuple[bytes, Given, Given]:
    """A server tells some devices and the target that all survived, and the others that the target did not. Corrupt
    devices sign both sets and reveal all they hold.

    Returns:
        What it learns of the target: the seed of its own mask, or nothing; shares of that; shares of its mask key.
    """
    n, context = play.terms.n, play.uploaded[target].context
    sets = {True: all_but(n), False: all_but(n, target)}
    agreed: dict[int, member.Agreed] = {}
    signatures: dict[bool, Given] = {True: {}, False: {}}
    for position in range(n):
        with_it, identity = position in told or position == target, play.identities[position]
        if position in corrupt:
            for which, survivors in sets.items():
                signatures[which][position] = signed(identity.key, "survivors", context, subject(survivors))
        else:
            answer = member.agree(play.uploaded[position], identity, sets[with_it])
            agreed[position], signatures[with_it][position] = answer

    def unmasked(position: int) -> bytes:
        state, with_it = agreed[position], position in told or position == target
        return member.unmask(state, signatures_bytes([signatures[with_it].get(other) for other in state.neighbours]))

    own: Given = {}
    mask: Given = {}
    seed = b""
    for position in [target, *play.uploaded[target].neighbours]:
        state = play.uploaded[position]
        try:
            if position == target:
                seed = unmasked(target)[:32]
            elif position in corrupt:
                pair = split_pair(state.shares[state.neighbours.index(target)])
                own[position], mask[position] = pair["own"], pair["mask"]
            else:
                share = unmasked(position)[32 * (1 + state.neighbours.index(target)) :][:32]
                (own if position in told else mask)[position] = share
        except ProtocolError:
            continue  # too few of its neighbours signed its set
    return seed, own, mask


def revealed(play: Play, target: int, seed: bytes, own: Given, mask: Given) -> np.ndarray | None:
    """The target's update without its masks, if what the server learnt is enough."""
    neighbours, threshold, bits = play.uploaded[target].neighbours, play.terms.degree.threshold, 16

    def secret(shares: Given) -> bytes:
        holders = sorted(shares)
        return combine([neighbours.index(p) + 1 for p in holders], [shares[p] for p in holders], threshold)

    if len(mask) < threshold or (len(own) < threshold and not seed):
        return None
    seed, key, context = seed or secret(own), secret(mask), play.uploaded[target].context
    keys = [
        (mask_key(private_key(key), public_key(play.advertised[p].mask_seed), context, target, p), -sign_of(target, p))
        for p in neighbours
    ]
    content = play.uploads[target][:-TAG_BYTES]
    update = in_lanes(unpack(content, play.terms.encoding.padded, bits).astype(np.uint32), bits)
    add_masks(update, [(own_key(seed, context), -1), *keys])
    return update


def attacked(n: int, corrupted: int, target: int = 7) -> list[np.ndarray | None]:
    """What comes of it when the corrupt devices are neighbours of the target first, for several ways to divide the
    honest ones. Nobody honest gives two shares."""
    play = uploaded(n, seed=1)
    neighbours = play.uploaded[target].neighbours
    corrupt = [*neighbours, *(p for p in range(n) if p not in neighbours and p != target)][:corrupted]
    honest = [p for p in range(n) if p not in corrupt and p != target]
    random.Random(2).shuffle(honest)
    found = []
    middle = len(honest) // 2
    for told in (middle - 1, middle, middle + n // 10):
        seed, own, mask = divided(play, target, corrupt, honest[:told])
        assert len(own) + len(mask) <= len(neighbours) + len(set(corrupt) & set(neighbours))
        found.append(revealed(play, target, seed, own, mask))
    return found


@pytest.mark.parametrize("n", [30, 100], ids=["complete", "sparse"])
def test_two_sets_of_survivors_do_not_unmask_an_honest_device(n: int) -> None:
    assert attacked(n, corrupted=n // 10) == [None] * 3


@pytest.mark.parametrize(("n", "corrupted"), [(30, 4), (100, 60)], ids=["complete", "sparse"])
def test_the_same_attack_succeeds_with_more_corrupt_devices_than_promised(n: int, corrupted: int) -> None:
    """So it is the threshold that stops it; in the complete graph one device more is enough."""
    plain = residues_of(uploaded(n, seed=1), 1)[7]
    assert any(update is not None and np.array_equal(update, plain) for update in attacked(n, corrupted))


# --- Sets of survivors ------------------------------------------------------------------------------------------------

SETS = {
    "without the device": (all_but(10, PHONE), "this device to be among the survivors"),
    "too few": (all_but(10, 5, 6), "Expected 8 survivors to be at least 9 of 10"),
    "nobody": (bytes(2), "this device to be among"),
    "bits beyond n": (b"\xff\xff", "bits beyond the 10"),
    "one bit beyond n": (b"\xff\x07", "bits beyond the 10"),
    "too short": (b"\xff", "1 bytes to have at least 2"),
    "too long": (b"\xff\x03\x00", "3 bytes to have 2"),
}


@pytest.mark.parametrize("name", list(SETS))
def test_an_impossible_set_of_survivors_is_not_signed(name: str) -> None:
    attempt, phone = rehearsed(), phone_at("agree")
    survivors, reason = SETS[name]
    with pytest.raises(ProtocolError, match=reason):
        phone.agree(survivors)
    assert phone.agree(attempt.requests["agree"])


def test_a_neighbour_that_did_not_share_is_no_survivor() -> None:
    play = meet(10)
    play.share(absent={7})
    play.upload(residues_for(play))
    state, identity = play.uploaded[VICTIM], play.identities[VICTIM]
    with pytest.raises(ProtocolError, match="position 7, which did not share, not to be among the survivors"):
        member.agree(state, identity, all_but(10))
    assert member.agree(state, identity, all_but(10, 7))


# --- Terms outside the device's policy --------------------------------------------------------------------------------

TERMS: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "small cohort": ({"n": 2}, {}, "cohort=2 ≥ 3"),
    "no cohort": ({"n": 0}, {}, "n=0 ≥ 1"),
    "large cohort": ({"n": 1001}, {}, "cohort=1001 ≤ 1000"),
    "corrupt": ({"corrupt": 0.0}, {}, "corrupt_fraction=0.0 to be 0.1"),
    "more corrupt": ({"corrupt": 0.2}, {}, "corrupt_fraction=0.2 to be 0.1"),
    "dropout": ({"dropout": 0.5}, {}, "dropout_fraction=0.5 to be 0.1"),
    "hybrid": ({"hybrid": True}, {}, "hybrid=True to be False"),
    "clip": ({}, {"clip": 1.01}, "clip_norm=1.01 ≤ 1.0"),
    "noise": ({}, {"variance": 2.0}, "noise_multiplier=0.163299 ≥ 0.2"),
    "no noise": ({}, {"variance": 0.0}, "noise_multiplier=0 ≥ 0.2"),
    "scale": ({}, {"scale": 80.0}, "noise_multiplier=0.0248395 ≥ 0.2"),
    "bits": ({}, {"bits": 17}, "bits=17 to be in"),
    "honest": ({}, {"honest": 0.9}, "honest=0.9 to be 0.8"),
    "less honest": ({}, {"honest": 0.7}, "honest=0.7 to be 0.8"),
    "central": ({}, {"central": True}, "noise from the devices"),
    "several": ({"corrupt": 0.0}, {"central": True}, "corrupt_fraction.*noise from the devices"),
}


def offered(phone: Phone, terms: bytes) -> bytes:
    """A view that begins with these terms."""
    return terms + meet(10, given={PHONE: phone.advertise()}).aggregate.view(PHONE)[TERMS_BYTES:]


@pytest.mark.parametrize("name", list(TERMS))
def test_terms_outside_the_policy_are_refused(name: str) -> None:
    changes, encoding, reason = TERMS[name]
    phone, terms = Phone(), meet(3).terms
    offer = replace(terms, n=10)
    offer = replace(offer, encoding=replace(offer.encoding, **encoding), **changes)  # type: ignore[arg-type]
    view = offered(phone, offer.to_bytes())
    with pytest.raises(AggregationError, match=reason):
        phone.share(view)
    assert phone.share(offered(phone, replace(terms, n=10).to_bytes()))


def test_a_device_that_insists_on_hybrid_keys_gets_them() -> None:
    insisting = replace(POLICY, hybrid=True)
    with pytest.raises(Refusal, match="hybrid=False to be True"):
        insisting.check(meet(3).terms, [], RUN)
    insisting.check(replace(meet(3).terms, hybrid=True), [], RUN)


def test_a_device_does_not_contribute_more_often_than_it_is_ready_to() -> None:
    phone = Phone()
    for attempt in (1, 2):
        rehearse(phone, attempt=attempt)
    phone.run = bytes(32)  # another run does not begin at zero
    rehearse(phone)
    with pytest.raises(Refusal, match="contributions=3 < 3"):
        rehearse(phone, attempt=2)


FLOATS = {"corrupt": 12, "dropout": 20, "clip": 33, "scale": 41, "variance": 50, "honest": 58}


ODD = (np.nan, -np.nan, np.inf, -np.inf, -1.0, 5e-324, 1.7e308)
HARMLESS = {("clip", 5e-324), ("scale", 5e-324), ("variance", 1.7e308)}
"""Less of an update, or more noise: whatever becomes of it, it reveals no more."""


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in FLOATS for value in ODD if (field, value) not in HARMLESS]
)
def test_numbers_that_are_none_are_refused(field: str, value: float) -> None:
    phone, terms = Phone(), replace(meet(3).terms, n=10).to_bytes()
    start = FLOATS[field]
    assert struct.unpack("<d", terms[start : start + 8])[0] in (0.1, 1.0, 8.0, 4.0, 0.8)
    view = offered(phone, terms[:start] + struct.pack("<d", value) + terms[start + 8 :])
    with pytest.raises((ProtocolError, Refusal)):
        phone.share(view)


def test_an_encoding_without_sensitivity_is_refused() -> None:
    """One coordinate, at a scale at which it always rounds to 0."""
    phone, terms = Phone(), bytearray(replace(meet(3).terms, n=10).to_bytes())
    terms[29:33], terms[41:49] = struct.pack("<I", 1), struct.pack("<d", 1e-9)
    view = offered(phone, bytes(terms))
    with pytest.raises((ProtocolError, Refusal)):
        phone.share(view)


# --- Keys in the roster -----------------------------------------------------------------------------------------------

ELSEWHERE = public_key(bytes(32))
FORGED: dict[str, Callable[[Play], bytes]] = {
    "mask key": lambda play: advertisement(play, mask_key=ELSEWHERE).to_bytes(),
    "channel key": lambda play: advertisement(play, channel_key=ELSEWHERE).to_bytes(),
    "swapped keys": lambda play: advertisement(
        play, mask_key=advertisement(play).channel_key, channel_key=advertisement(play).mask_key
    ).to_bytes(),
    "commitment": lambda play: advertisement(play, commitment=bytes(32)).to_bytes(),
    "no signature": lambda play: advertisement(play, signature=bytes(64)).to_bytes(),
    "signature of a neighbour": lambda play: resigned(advertisement(play), device=5),
    "keys for another run": lambda play: resigned(advertisement(play), run=bytes(32)),
    "keys of a neighbour": lambda play: advertisement(play, 5, certificate=advertisement(play).certificate).to_bytes(),
}


@pytest.mark.parametrize("name", list(FORGED))
def test_a_forged_key_is_refused(name: str) -> None:
    play = meet(10)
    assert join(play, VICTIM, view_of(play.terms, leaves_of(play), VICTIM))
    view = view_of(play.terms, forge(play, FORGED[name](play)), VICTIM)
    with blames(CULPRIT, f"the keys of device {CULPRIT} to be signed by it"):
        join(play, VICTIM, view)


def test_a_certificate_of_another_authority_is_refused() -> None:
    """A device that the server made itself."""
    play = meet(10)
    made = identity_of(CULPRIT, authority=key_of(99)).certificate
    view = view_of(play.terms, forge(play, resigned(advertisement(play, certificate=made))), VICTIM)
    with blames(CULPRIT, f"certificate of device {CULPRIT} to be of the authority"):
        join(play, VICTIM, view)


@pytest.mark.parametrize("field", ["key", "expires"])
def test_a_changed_certificate_is_refused(field: str) -> None:
    play = meet(10)
    change = {"key": identity_of(5).certificate.key, "expires": 3_000}[field]
    changed = replace(advertisement(play).certificate, **{field: change})  # type: ignore[arg-type]
    signer = 5 if field == "key" else CULPRIT
    leaf = resigned(advertisement(play, certificate=changed), device=signer)
    with blames(CULPRIT, "to be of the authority"):
        join(play, VICTIM, view_of(play.terms, forge(play, leaf), VICTIM))


def test_an_expired_certificate_is_refused() -> None:
    play = meet(10)
    view = view_of(play.terms, leaves_of(play), VICTIM)
    assert join(play, VICTIM, view, now=2_000)
    with blames(0, "certificate of device 0 to be valid still"):
        join(play, VICTIM, view, now=2_000.5)


def test_a_proof_for_another_position_is_refused() -> None:
    play = meet(10)
    leaves, tree = leaves_of(play), Tree(leaves_of(play))
    head = play.terms.to_bytes() + devices_bytes(range(10)) + tree.root + bytes(32) + struct.pack("<I", VICTIM)

    def entry(place: int, leaf: int) -> bytes:
        proof = tree.proof(place)
        return leaves[leaf] + bytes([len(proof) // 32]) + proof

    places = [VICTIM, *(place for place in range(10) if place != VICTIM)]
    assert join(play, VICTIM, head + b"".join(entry(place, place) for place in places))
    swapped = {4: 5, 5: 4}
    with pytest.raises(ProtocolError, match="position 4 to be proven part of the roster"):
        join(play, VICTIM, head + b"".join(entry(place, swapped.get(place, place)) for place in places))
    moved = head + b"".join(entry(swapped.get(place, place), swapped.get(place, place)) for place in places)
    with pytest.raises(ProtocolError, match="position 4 to be proven part of the roster"):
        join(play, VICTIM, moved)


def test_a_device_at_another_ones_place_is_refused() -> None:
    play = meet(10)
    made = replace(advertisement(play).certificate, device=77)
    with blames(77, f"position {CULPRIT} to be of device {CULPRIT}"):
        join(play, VICTIM, view_of(play.terms, forge(play, resigned(advertisement(play, certificate=made))), VICTIM))


def test_a_view_of_another_root_is_refused() -> None:
    play = meet(10)
    view = bytearray(view_of(play.terms, leaves_of(play), VICTIM))
    view[TERMS_BYTES + 10] ^= 1
    with pytest.raises(ProtocolError, match=f"position {VICTIM} to be proven part of the roster"):
        join(play, VICTIM, bytes(view))


@pytest.mark.parametrize("position", [10, 2**32 - 1])
def test_a_position_outside_the_roster_is_refused(position: int) -> None:
    play = meet(10)
    view = bytearray(view_of(play.terms, leaves_of(play), VICTIM))
    view[TERMS_BYTES + 10 + 64 : TERMS_BYTES + 10 + 68] = struct.pack("<I", position)
    with pytest.raises(ProtocolError, match=f"position={position} < n=10"):
        join(play, VICTIM, bytes(view))


def test_the_view_of_another_device_is_refused() -> None:
    play = meet(10)
    with pytest.raises(ProtocolError, match="what this device advertised last"):
        join(play, VICTIM, view_of(play.terms, leaves_of(play), 2))


def test_neighbours_of_the_servers_choice_are_refused() -> None:
    play = meet(100)
    tree, leaves = Tree(leaves_of(play)), leaves_of(play)
    drawn = neighbours_of(tree.root, 100, play.terms.degree.neighbours, VICTIM).tolist()
    assert View.parse(view_with(play.terms, leaves, VICTIM, drawn), anything).neighbours == drawn
    stranger = next(place for place in range(100) if place not in drawn and place != VICTIM)
    chosen = sorted([stranger, *drawn[1:]])
    with pytest.raises(ProtocolError, match="to be proven part of the roster"):
        View.parse(view_with(play.terms, leaves, VICTIM, chosen), anything)


# --- Devices that are in the roster twice -----------------------------------------------------------------------------


def test_a_server_refuses_a_roster_that_holds_a_device_twice() -> None:
    play = meet(10)
    roster = [Advertisement.parse(leaf, hybrid=False) for leaf in forge(play, leaves_of(play)[5])]
    with pytest.raises(AggregationError, match="10 different devices"):
        Aggregate(RUN, play.terms, roster, SERVER_SEED)


@pytest.mark.parametrize("twin", [VICTIM, 5])
def test_a_device_refuses_a_roster_that_shows_it_a_device_twice(twin: int) -> None:
    play = meet(10)
    with pytest.raises(ProtocolError, match=f"Expected position {CULPRIT} to be of device {CULPRIT}"):
        join(play, VICTIM, view_of(play.terms, forge(play, leaves_of(play)[twin]), VICTIM))


def test_no_neighbour_of_a_device_that_is_in_the_roster_twice_joins() -> None:
    """All devices have the same list of different ones, so that whoever sees a place of another one refuses it."""
    play = meet(100)
    joined = []
    for position in set(range(100)) - {VICTIM, CULPRIT}:
        with suppress(ProtocolError):
            View.parse(view_of(play.terms, forge(play, leaves_of(play)[VICTIM]), position), anything)
            joined.append(position)
    tree = Tree(forge(play, leaves_of(play)[VICTIM]))
    twin = neighbours_of(tree.root, 100, play.terms.degree.neighbours, CULPRIT)
    assert not set(joined) & set(twin.tolist())
    assert len(joined) < play.terms.least_survivors


def test_devices_that_were_told_different_rosters_do_not_open_each_others_shares() -> None:
    play = meet(10)
    tree = Tree(leaves_of(play))
    contexts = {play.terms.context(RUN, tree.root, devices_bytes(devices)) for devices in (range(10), [*range(9), 10])}
    assert len(contexts) == 2


# --- Points of low order ----------------------------------------------------------------------------------------------

P = 2**255 - 19
EIGHTH = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
"""The points of order 8."""
LOW_ORDER = [
    (point | high).to_bytes(32, "little") for point in (0, 1, *EIGHTH, P - 1, P, P + 1) for high in (0, 1 << 255)
]


@pytest.mark.parametrize("point", LOW_ORDER, ids=[point[:3].hex() + point[-1:].hex() for point in LOW_ORDER])
def test_a_point_of_low_order_is_refused(point: bytes) -> None:
    """By a device, at the latest before it uploads."""
    play = meet(4)
    channel = resigned(advertisement(play, 3, channel_key=point), device=3)
    with pytest.raises(ProtocolError, match="full order"):
        join(play, VICTIM, view_of(play.terms, forge(play, channel, 3), VICTIM))
    leaves = forge(play, resigned(advertisement(play, 3, mask_key=point), device=3), 3)
    with pytest.raises(ProtocolError, match="full order"):
        states, parcels = {}, {}
        for position in range(4):
            own = replace(play.advertised[position], message=leaves[position])
            view = View.parse(view_of(play.terms, leaves, position), anything)
            states[position], message = member.share(own, play.identities[position], view, NOW, play.random)
            parcels[position] = dict(zip(view.neighbours, read_parcels(message, 3, hybrid=False), strict=True))
        member.receive(states[VICTIM], inbox_bytes([parcels[dealer][VICTIM] for dealer in (0, 2, 3)]))


def test_a_server_key_of_low_order_is_refused() -> None:
    """With which uploads would be authenticated for anybody."""
    play = meet(10)
    play.share()
    state = replace(play.shared[VICTIM], server_key=bytes(32))
    with pytest.raises(ProtocolError, match="full order"):
        member.receive(state, play.aggregate.inbox(VICTIM))


@pytest.mark.parametrize("field", ["mask_key", "channel_key"])
def test_a_device_that_advertises_a_point_of_low_order_is_not_admitted(field: str) -> None:
    """Else all its neighbours refuse, round after round, and none can say whose key it was."""
    play = meet(4)
    admitted = Advertisement.parse(resigned(advertisement(play, 3, **{field: bytes(32)}), device=3), hybrid=False)
    with blames(3, "full order"):
        admitted.check(RUN, identity_of(3).authority, NOW)


@pytest.mark.parametrize("key", [bytes([255]) * 1184, bytes(1183) + b"\1", bytes(1184)])
def test_a_key_that_is_no_key_of_the_kem_is_refused_or_harmless(key: bytes) -> None:
    play = meet(4, hybrid=True)
    leaf = resigned(advertisement(play, 3, kem_key=key), device=3)
    with suppress(ProtocolError):
        assert join(play, VICTIM, view_of(play.terms, forge(play, leaf, 3), VICTIM))


# --- Replays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("round_", "attempt"), [(3, 1), (3, 0), (2, 9), (1, 1), (0, 0)])
def test_a_round_does_not_come_twice(round_: int, attempt: int) -> None:
    phone = Phone()
    rehearse(phone)
    with pytest.raises(Refusal, match=f"round {round_}, attempt {attempt} to come after round 3, attempt 1"):
        rehearse(phone, round=round_, attempt=attempt)


@pytest.mark.parametrize(("round_", "attempt"), [(3, 2), (4, 1)])
def test_a_later_round_or_attempt_may_come(round_: int, attempt: int) -> None:
    phone = Phone()
    rehearse(phone)
    rehearse(phone, round=round_, attempt=attempt)


def test_a_round_does_not_come_twice_with_another_run_between() -> None:
    phone = Phone()
    rehearse(phone)
    phone.run = bytes(32)
    rehearse(phone)
    phone.run = RUN
    with pytest.raises(Refusal, match="to come after"):
        rehearse(phone)


def test_keys_of_an_earlier_attempt_are_not_used_again() -> None:
    phone = Phone()
    old = phone.advertise()
    play = meet(10, given={PHONE: old})
    assert phone.share(play.aggregate.view(PHONE))
    phone.advertise()
    with pytest.raises(ProtocolError, match="what this device advertised last"):
        phone.share(play.aggregate.view(PHONE))


def test_shares_of_another_attempt_do_not_open() -> None:
    """Neighbours' keys and shares replayed from an attempt that came to nothing."""
    play, old = meet(10), meet(10, attempt=2)
    for attempt in (play, old):
        attempt.share()
    assert leaves_of(play) == leaves_of(old)
    assert member.receive(play.shared[VICTIM], play.aggregate.inbox(VICTIM))
    with blames(0, "shares of device 0 to be sealed for this attempt"):
        member.receive(play.shared[VICTIM], old.aggregate.inbox(VICTIM))


# --- Crashes and stages out of order ----------------------------------------------------------------------------------

STAGES = ("share", "upload", "agree", "unmask")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_answered_once(stage: str) -> None:
    """Also where the process ended after the answer was on its way; afterwards a new attempt may begin."""
    attempt, phone = rehearsed(), phone_at(stage)
    for asked in set(STAGES) - {stage}:
        with pytest.raises(Refusal, match="does not answer"):
            getattr(phone, asked)(attempt.requests[asked])
    assert getattr(phone, stage)(attempt.requests[stage])
    with pytest.raises(Refusal, match="does not answer"):
        getattr(phone, stage)(attempt.requests[stage])
    rehearse(phone, attempt=2)


@pytest.mark.parametrize("stage", STAGES)
def test_before_keys_are_made_nothing_is_answered(stage: str) -> None:
    with pytest.raises(Refusal, match="at the stage 'nothing'"):
        getattr(Phone(), stage)(rehearsed().requests[stage])


class FullDisk(Disk):
    """Takes so many writes, and no more."""

    def __init__(self, content: dict[str, bytes], writes: int) -> None:
        super().__init__()
        self.content, self.writes = dict(content), writes

    def __setitem__(self, name: str, record: object) -> None:
        if not self.writes:
            raise OSError("No space left on device")
        self.writes -= 1
        super().__setitem__(name, record)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stage", "writes"), [("share", 0), ("upload", 0), ("upload", 1), ("agree", 0), ("unmask", 0)])
def test_nothing_leaves_before_it_is_stored(stage: str, writes: int) -> None:
    """What a crash interrupts may be answered afterwards, for nothing was sent; an upload may be charged twice then."""
    attempt = rehearsed()
    disk = FullDisk(attempt.stores[stage].content, writes)
    with pytest.raises(OSError, match="No space"):
        getattr(Phone(store=disk), stage)(attempt.requests[stage])
    disk.writes = 9
    assert getattr(Phone(store=disk), stage)(attempt.requests[stage])


# --- Reflected, swapped and changed shares ----------------------------------------------------------------------------


def test_a_device_does_not_take_its_own_shares_for_a_neighbours() -> None:
    play = meet(10)
    play.share()
    own = member.share(play.advertised[VICTIM], play.identities[VICTIM], play.view(VICTIM), NOW, play.random)[1]
    inbox = read_inbox(play.aggregate.inbox(VICTIM), 9, hybrid=False)
    inbox[3] = read_parcels(own, 9, hybrid=False)[3]
    with blames(CULPRIT, f"shares of device {CULPRIT} to be sealed"):
        member.receive(play.shared[VICTIM], inbox_bytes(inbox))


def test_shares_of_two_neighbours_are_not_swapped() -> None:
    play = meet(10)
    play.share()
    inbox = read_inbox(play.aggregate.inbox(VICTIM), 9, hybrid=False)
    inbox[3], inbox[4] = inbox[4], inbox[3]
    with blames(CULPRIT, f"shares of device {CULPRIT} to be sealed"):
        member.receive(play.shared[VICTIM], inbox_bytes(inbox))


def test_shares_for_another_holder_do_not_open() -> None:
    play = meet(10)
    play.share()
    inbox = read_inbox(play.aggregate.inbox(VICTIM), 9, hybrid=False)
    inbox[3] = read_inbox(play.aggregate.inbox(2), 9, hybrid=False)[3]
    assert play.shared[2].neighbours[3] == play.shared[VICTIM].neighbours[3] == CULPRIT
    with blames(CULPRIT, f"shares of device {CULPRIT} to be sealed"):
        member.receive(play.shared[VICTIM], inbox_bytes(inbox))


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_changed_byte_of_a_parcel_is_noticed(hybrid: bool) -> None:
    """In the encapsulated secret, the sealed shares, the tag and the commitments."""
    play = meet(4, hybrid=hybrid)
    play.share()
    inbox = play.aggregate.inbox(VICTIM)
    assert member.receive(play.shared[VICTIM], inbox)
    kem = 1088 * hybrid
    places = [*range(0, kem, 97), *range(kem, kem + 112)]
    assert len(inbox) == 1 + 3 * (places[-1] + 1)
    for place in places:
        changed = bytearray(inbox)
        changed[1 + place] ^= 1 << place % 8
        with blames(0, "shares of device 0 to (be sealed|fit its commitments)"):
            member.receive(play.shared[VICTIM], bytes(changed))


def test_too_few_neighbours_are_not_enough_to_upload() -> None:
    play = meet(10)
    play.share()
    inbox = read_inbox(play.aggregate.inbox(VICTIM), 9, hybrid=False)
    quorum = play.terms.degree.quorum
    assert member.receive(play.shared[VICTIM], inbox_bytes([*inbox[:quorum], *[None] * (9 - quorum)]))
    with pytest.raises(ProtocolError, match=f"shares of {quorum - 1} neighbours to be of at least {quorum}"):
        member.receive(play.shared[VICTIM], inbox_bytes([*inbox[: quorum - 1], *[None] * (10 - quorum)]))


# --- Wrong shares and seeds at the unmasking --------------------------------------------------------------------------


@pytest.mark.parametrize(("about", "dropped"), [("own seed", 3), ("share of a mask key", 3), ("share of a seed", 6)])
def test_a_wrong_share_names_its_holder_and_spoils_nothing(about: str, dropped: int) -> None:
    """Device 3 fell out before its upload and device 6 after it, so both secrets are put together of shares."""
    play = meet(10, dropout=0.2)
    residues = residues_of(play, 6)
    play.share()
    play.upload(residues, absent={3})
    play.agree(absent={6})
    play.unmask(absent={6, CULPRIT})
    message = bytearray(member.unmask(play.agreed[CULPRIT], play.aggregate.signatures(CULPRIT)))
    index = 0 if about == "own seed" else 1 + play.shared[CULPRIT].neighbours.index(dropped)
    message[32 * index + 5] ^= 1
    named = CULPRIT if about == "own seed" else dropped
    with blames(CULPRIT, rf"Device {CULPRIT}: Expected its shares of the secrets of positions \[{named}\]"):
        play.aggregate.take_unmasking(CULPRIT, bytes(message))
    assert np.array_equal(play.aggregate.total(), plain_sum(play, residues))


@pytest.mark.parametrize("change", [lambda message: message[:-1], lambda message: message + b"\0", lambda message: b""])
def test_an_unmasking_of_another_length_names_its_sender(change: Callable[[bytes], bytes]) -> None:
    play = fresh()
    play.agree()
    message = member.unmask(play.agreed[CULPRIT], play.aggregate.signatures(CULPRIT))
    with blames(CULPRIT, "unmasking of"):
        play.aggregate.take_unmasking(CULPRIT, change(message))


def test_too_many_wrong_shares_release_nothing() -> None:
    play = meet(10, dropout=0.2)
    play.share()
    play.upload(residues_for(play), absent={3})
    play.agree()
    held = play.terms.degree.threshold - 1
    honest = list(play.agreed)[:held]
    play.unmask(absent=set(range(10)) - set(honest))
    for position in set(play.agreed) - set(honest):
        message = bytearray(member.unmask(play.agreed[position], play.aggregate.signatures(position)))
        message[32 * (1 + play.shared[position].neighbours.index(3))] ^= 1
        with blames(position, r"positions \[3\]"):
            play.aggregate.take_unmasking(position, bytes(message))
    with pytest.raises(AggregationError, match=f"{held} shares of a secret of device 3 .* nothing was released"):
        play.aggregate.total()


@pytest.mark.parametrize("field", ["own_seed", "mask_seed"])
@pytest.mark.parametrize("drops", [True, False])
def test_shares_of_another_secret_name_their_dealer(field: str, drops: bool) -> None:
    """It commits to them, so that every holder's share is right; as long as it stays, nothing comes of it."""
    play = meet(10)
    residues = residues_of(play, 7)
    play.share(absent={CULPRIT})
    other = replace(play.advertised[CULPRIT], **{field: bytes(range(32))})  # type: ignore[arg-type]
    dealt = member.share(other, play.identities[CULPRIT], play.view(CULPRIT), NOW, play.random)
    play.shared[CULPRIT] = replace(dealt[0], **{field: getattr(play.advertised[CULPRIT], field)})  # type: ignore[arg-type]
    play.aggregate.take_shares(CULPRIT, dealt[1])
    gone = {CULPRIT} if drops else set()
    play.upload(residues, absent=gone if field == "mask_seed" else ())
    play.agree(absent=gone)
    play.unmask(absent=gone)
    if drops:
        with blames(CULPRIT, "the shares that it dealt to give the secret it committed to"):
            play.aggregate.total()
    else:
        assert np.array_equal(play.aggregate.total(), plain_sum(play, residues))


# --- Different models, uploads and signatures -------------------------------------------------------------------------


def test_devices_that_were_given_different_models_do_not_open_each_others_shares() -> None:
    """A server that gives one device another model, or half of them, gets no sum of theirs."""
    play, other = meet(10), meet(10, model=bytes([1]) * 32)
    for attempt in (play, other):
        attempt.share()
    ours = read_inbox(play.aggregate.inbox(VICTIM), 9, hybrid=False)
    theirs = read_inbox(other.aggregate.inbox(VICTIM), 9, hybrid=False)
    with blames(0, "shares of device 0 to be sealed for this attempt"):
        member.receive(play.shared[VICTIM], inbox_bytes(theirs))
    with blames(6, "shares of device 6 to be sealed for this attempt"):
        member.receive(play.shared[VICTIM], inbox_bytes([*ours[:5], *theirs[5:]]))
    half = inbox_bytes([*ours[:4], *[None] * 5])
    with pytest.raises(ProtocolError, match="shares of 4 neighbours to be of at least 5"):
        member.receive(play.shared[VICTIM], half)
    state, _ = member.receive(play.shared[VICTIM], inbox_bytes([*ours[:6], *[None] * 3]))
    with pytest.raises(ProtocolError, match="position 7, which did not share"):
        member.agree(state, play.identities[VICTIM], all_but(10))


def uploading() -> Play:
    """Everybody but the culprit has uploaded; its upload is there to be sent."""
    play = meet(10)
    play.share()
    play.upload(residues_for(play), absent={CULPRIT})
    state, masks = member.receive(play.shared[CULPRIT], play.aggregate.inbox(CULPRIT))
    play.uploaded[CULPRIT] = state
    play.uploads[CULPRIT] = member.upload(state, masks, residues_for(play)[CULPRIT])
    return play


UPLOADS: dict[str, tuple[Callable[[Play, bytes], bytes], str]] = {
    "with a neighbour's tag": (lambda play, own: own[:-16] + play.uploads[5][-16:], "of the device whose keys"),
    "of a neighbour": (lambda play, own: play.uploads[5], "of the device whose keys"),
    "changed": (lambda play, own: bytes([own[0] ^ 1]) + own[1:], "of the device whose keys"),
    "without a tag": (lambda play, own: own[:-16] + bytes(16), "of the device whose keys"),
    "of another attempt": (lambda play, own: uploaded_in_attempt_two(), "of the device whose keys"),
    "too short": (lambda play, own: own[1:], "upload of 31 bytes to have 32"),
    "too long": (lambda play, own: b"\0" + own, "upload of 33 bytes to have 32"),
    "empty": (lambda play, own: b"", "upload of 0 bytes to have 32"),
}


@cache
def uploaded_in_attempt_two() -> bytes:
    play = meet(10, attempt=2)
    play.share()
    play.upload(residues_for(play))
    return play.uploads[CULPRIT]


@pytest.mark.parametrize("name", list(UPLOADS))
def test_an_upload_that_is_not_its_senders_is_refused(name: str) -> None:
    play = uploading()
    change, reason = UPLOADS[name]
    with blames(CULPRIT, reason):
        play.aggregate.take_upload(CULPRIT, change(play, play.uploads[CULPRIT]))
    play.aggregate.take_upload(CULPRIT, play.uploads[CULPRIT])
    play.agree()
    play.unmask()
    assert not play.aggregate.total().any() and len(play.aggregate.survivors) == 10


def test_an_upload_does_not_count_twice() -> None:
    play = fresh()
    with blames(CULPRIT, "one upload of each device"):
        play.aggregate.take_upload(CULPRIT, play.uploads[CULPRIT])
    play.agree()
    play.unmask()
    assert np.array_equal(play.aggregate.total(), plain_sum(play, residues_of(play, 0)))


def test_a_device_that_did_not_share_does_not_upload() -> None:
    """Its neighbours would not agree to survivors with it, and the round would come to nothing."""
    play = meet(10)
    play.share(absent={CULPRIT})
    play.upload(residues_for(play))
    state, context, key = play.advertised[CULPRIT], play.uploaded[VICTIM].context, public_key(SERVER_SEED)
    content = bytes(2 * play.terms.encoding.padded)
    tag_key = upload_key(private_key(state.channel_seed), key, context, CULPRIT)
    forged = content + Poly1305.generate_tag(tag_key, content)
    with blames(CULPRIT, "share"):
        play.aggregate.take_upload(CULPRIT, forged)


def test_shares_are_not_replaced() -> None:
    """Else holders of the first ones would be named as culprits."""
    play = meet(10)
    play.share()
    again = member.share(play.advertised[CULPRIT], play.identities[CULPRIT], play.view(CULPRIT), NOW, play.random)[1]
    with blames(CULPRIT, "share"):
        play.aggregate.take_shares(CULPRIT, again)


@pytest.mark.parametrize("change", [lambda message: message[:-1], lambda message: message + b"\0", lambda message: b""])
def test_shares_of_another_length_name_their_sender(change: Callable[[bytes], bytes]) -> None:
    play = meet(10)
    message = member.share(play.advertised[CULPRIT], play.identities[CULPRIT], play.view(CULPRIT), NOW, play.random)[1]
    with blames(CULPRIT, f"Device {CULPRIT}: Expected the shares of"):
        play.aggregate.take_shares(CULPRIT, change(message))
    play.aggregate.take_shares(CULPRIT, message)


@pytest.mark.parametrize("forgery", ["key", "context", "survivors", "label", "length"])
def test_an_agreement_that_is_not_the_devices_is_refused(forgery: str) -> None:
    play = fresh()
    survivors = play.aggregate.fix_survivors()
    right = {"key": CULPRIT, "label": "survivors", "context": play.uploaded[0].context, "survivors": survivors}
    wrong = {"key": 5, "label": "upload", "context": bytes(32), "survivors": all_but(10, 5)}

    def signature(**parts: object) -> bytes:
        values = right | parts
        return signed(key_of(values["key"]), values["label"], values["context"], subject(values["survivors"]))  # type: ignore[arg-type]

    forged = signature()[:-1] if forgery == "length" else signature(**{forgery: wrong[forgery]})
    with blames(CULPRIT, "survivors to be signed by the device"):
        play.aggregate.take_agreement(CULPRIT, forged)
    play.aggregate.take_agreement(CULPRIT, signature())


def test_fewer_signatures_than_the_quorum_unmask_nothing() -> None:
    play = fresh()
    play.agree()
    state, found = play.agreed[VICTIM], [*play.aggregate.signatures(VICTIM)[2:]]
    each = [bytes(found[64 * index : 64 * index + 64]) for index in range(9)]
    quorum = play.terms.degree.quorum
    assert member.unmask(state, signatures_bytes([*each[:quorum], *[None] * (9 - quorum)]))
    for few in (
        [*each[: quorum - 1], *[None] * (10 - quorum)],
        [*each[: quorum - 1], *[bytes(64)] * (10 - quorum)],
        [*each[: quorum - 1], *[each[0]] * (10 - quorum)],  # one neighbour's does not count for others
    ):
        with pytest.raises(ProtocolError, match=f"Expected {quorum - 1} neighbours .* to be at least {quorum}"):
            member.unmask(state, signatures_bytes(few))
    with pytest.raises(ProtocolError, match="Expected 0 neighbours"):
        member.unmask(state, signatures_bytes([*each[1:], each[0]]))


# --- What a model, and its encoding, make a device do -----------------------------------------------------------------

SETTINGS = load_settings(None, ["privacy.randomness=seeded", "objective.negatives=50", "training.window=30"])
ITEMS, USERS = 300, 12


def model() -> dict[str, torch.Tensor]:
    return initialise(SETTINGS, ITEMS, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("table", ["policy.embedding", "behaviour.embedding"])
def test_a_model_that_overflows_at_one_item_does_not_tell_who_has_it(table: str) -> None:
    """Whether a device uploads must not depend on its history: each attempt would tell one item of it, uncharged."""
    parameters, item = model(), 7
    parameters[table][item] = 3e38
    encoding = Encoding.choose(sum(value.numel() for value in parameters.values()), 1.0, 1.0, USERS, 0.8)
    offer = Offer(5, 1, parameters, encoding, SETTINGS)
    people = Population(SETTINGS, synthetic(USERS, ITEMS, seed=3)[0])
    having, answering = set(), set()
    for device in range(USERS):
        window = people.windows(5, np.array([device]))
        if item in window.items[0, : int(window.lengths[0])]:
            having.add(device)
        with suppress(FedtopkError):
            participate(offer, USERS, device, window, people.users[device])
            answering.add(device)
    silent = set(range(USERS)) - answering
    assert 0 < len(having) < USERS
    assert not silent, f"devices {silent} told by their silence who has the item: {having}"


def test_an_encoding_of_another_dimension_than_the_model_is_refused() -> None:
    """Before anything of its size is allocated."""
    parameters = model()
    offer = Offer(5, 1, parameters, Encoding(2**31, 1.0, 8.0, 16, 4.0, 0.8), SETTINGS)
    terms = Terms(5, 1, 10, 0.1, 0.1, False, offer.encoding, offer.model)
    arrays = {name: value.numpy() for name, value in parameters.items()}
    with pytest.raises(ProtocolError, match="dimension"):
        read_offer(terms, arrays, SETTINGS, ITEMS)


def test_another_model_than_the_one_agreed_on_is_refused() -> None:
    parameters = model()
    dimension = sum(value.numel() for value in parameters.values())
    offer = Offer(5, 1, parameters, Encoding(dimension, 1.0, 8.0, 16, 4.0, 0.8), SETTINGS)
    terms = Terms(5, 1, 10, 0.1, 0.1, False, offer.encoding, offer.model)
    arrays = {name: value.numpy().copy() for name, value in parameters.items()}
    assert read_offer(terms, arrays, SETTINGS, ITEMS).model == offer.model
    arrays["policy.embedding"][7, 3] += 1e-6
    with pytest.raises(ProtocolError, match="the model to be the one that the round was agreed on"):
        read_offer(terms, arrays, SETTINGS, ITEMS)
