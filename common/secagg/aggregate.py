"""The server's side of one attempt: from the roster's advertisements to the sum of the updates, and nothing less.

Messages of devices come in with ``take_…`` by position and go out with the other methods, stage by stage; there is no
way back. A device's message that cannot be honest raises :class:`ProtocolError` with the device as its culprit, and
counts as if it had not come. The sum is formed of masked updates as they arrive; no update is kept.
"""

from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.poly1305 import Poly1305
from numpy.typing import NDArray

from common.errors import AggregationError, ProtocolError
from common.secagg.advertisement import Advertisement, commitment_to
from common.secagg.graph import neighbours
from common.secagg.identity import verified
from common.secagg.keys import SEED_BYTES, mask_key, own_key, private_key, public_key, upload_key
from common.secagg.masks import add_masks, lane
from common.secagg.member import TAG_BYTES, sign_of
from common.secagg.merkle import Tree
from common.secagg.packing import packed_bytes, unpack
from common.secagg.roster import devices_bytes, place_bytes, view_bytes
from common.secagg.shamir import combine
from common.secagg.shares import SHARE_BYTES, Kind, commitment, inbox_bytes, promised, read_parcels
from common.secagg.signatures import signatures_bytes, subject
from common.secagg.terms import Terms
from common.secagg.wire import flags


class Aggregate:
    """One attempt.

    Args:
        run: 32 bytes, which run this is.
        terms: of the attempt, with n = the number of advertisements.
        roster: the members' advertisements, checked, by increasing device number; their order is the positions.
        seed: 32 secret bytes, of the key with which devices authenticate their uploads to this server.

    Raises:
        AggregationError: no (k, t) exists for the terms, or the roster is not in order or has a device twice.
    """

    def __init__(self, run: bytes, terms: Terms, roster: Sequence[Advertisement], seed: bytes) -> None:
        devices = [advertisement.device for advertisement in roster]
        if len(roster) != terms.n or sorted(set(devices)) != devices:
            raise AggregationError(f"Expected a roster of n={terms.n} different devices in order, found {devices}.")
        self._devices = devices_bytes(devices)
        self.terms = terms
        self._roster = list(roster)
        tree = Tree([advertisement.to_bytes() for advertisement in roster])
        self._root = tree.root
        self._places = [
            place_bytes(advertisement.to_bytes(), tree.proof(at)) for at, advertisement in enumerate(roster)
        ]
        graph: list[list[int]] = neighbours(self._root, terms.n, terms.degree.neighbours).tolist()
        self._neighbours = [{place: index for index, place in enumerate(places)} for places in graph]
        self._context = terms.context(run, self._root, self._devices)
        self._seed, self._public_key = seed, public_key(seed)
        self._parcels: dict[int, list[bytes]] = {}  # each dealer's, in the order of its neighbours
        self._total = np.zeros(terms.encoding.padded, lane(terms.encoding.bits))
        self._uploaded: set[int] = set()
        self._survivors: list[int] = []
        self._bits = b""
        self._signatures: dict[int, bytes] = {}
        self._own_seeds: dict[int, bytes] = {}
        self._shares: dict[tuple[int, Kind], dict[int, bytes]] = {}

    def view(self, position: int) -> bytes:
        """Stage 1: what a device is told of the roster."""
        places = [self._places[place] for place in (position, *self._neighbours[position])]
        return view_bytes(self.terms, self._devices, self._root, self._public_key, position, places)

    def take_shares(self, position: int, content: bytes) -> None:
        """Stage 1: a device's shares for its neighbours."""
        if position in self._parcels:
            raise self._blame(position, "Expected it to share once.")
        try:
            self._parcels[position] = read_parcels(content, len(self._neighbours[position]), self.terms.hybrid)
        except ProtocolError as error:
            raise self._blame(position, str(error)) from None

    @property
    def sharers(self) -> list[int]:
        """Positions of the devices that shared."""
        return sorted(self._parcels)

    def inbox(self, position: int) -> bytes:
        """Stage 2: the shares that a device's neighbours sent it."""
        return inbox_bytes([self._parcel(dealer, position) for dealer in self._neighbours[position]])

    def take_upload(self, position: int, content: bytes) -> None:
        """Stage 2: a device's masked update, with its tag."""
        encoding = self.terms.encoding
        expected = packed_bytes(encoding.padded, encoding.bits) + TAG_BYTES
        if len(content) != expected:
            raise self._blame(position, f"Expected an upload of {len(content)} bytes to have {expected}.")
        update, tag = memoryview(content)[:-TAG_BYTES], content[-TAG_BYTES:]  # without a copy
        key = upload_key(private_key(self._seed), self._roster[position].channel_key, self._context, position)
        try:
            Poly1305.verify_tag(key, update, tag)
        except InvalidSignature:
            raise self._blame(
                position, "Expected the upload to be of the device whose keys are in the roster."
            ) from None
        if position in self._uploaded or position not in self._parcels or self._survivors:
            raise self._blame(
                position, "Expected one upload of each device that shared, before the survivors are fixed."
            )
        residues = unpack(update, encoding.padded, encoding.bits)
        np.add(self._total, residues, out=self._total)
        self._uploaded.add(position)

    def fix_survivors(self) -> bytes:
        """Stage 3: the devices whose updates are in the sum, as bits by position.

        Raises:
            AggregationError: they are fewer than ⌈(1−δ)n⌉.
        """
        least = self.terms.least_survivors
        if len(self._uploaded) < least:
            raise AggregationError(
                f"Expected {len(self._uploaded)} of {self.terms.n} devices to be at least {least} updates; "
                "nothing was released."
            )
        self._survivors = sorted(self._uploaded)
        self._bits = flags([position in self._uploaded for position in range(self.terms.n)])
        return self._bits

    @property
    def survivors(self) -> list[int]:
        """Positions of the devices whose updates are in the sum, once they are fixed."""
        return self._survivors

    @property
    def signers(self) -> list[int]:
        """Positions of the devices that signed them."""
        return sorted(self._signatures)

    def take_agreement(self, position: int, content: bytes) -> None:
        """Stage 3: a device's signature under the survivors."""
        key = self._roster[position].certificate.key
        if not verified(key, "survivors", self._context, subject(self._bits), content):
            raise self._blame(position, "Expected the survivors to be signed by the device.")
        self._signatures[position] = content

    def signatures(self, position: int) -> bytes:
        """Stage 4: the signatures of a device's neighbours."""
        return signatures_bytes([self._signatures.get(neighbour) for neighbour in self._neighbours[position]])

    def take_unmasking(self, position: int, content: bytes) -> None:
        """Stage 4: the seed of a device's own mask, and one share of each neighbour's secrets that it holds.

        A wrong share is kept out, and named at the end: the others of the device count.
        """
        dealers = [neighbour for neighbour in self._neighbours[position] if neighbour in self._parcels]
        expected = SEED_BYTES + len(dealers) * SHARE_BYTES
        if len(content) != expected:
            raise self._blame(position, f"Expected an unmasking of {len(content)} bytes to have {expected}.")
        seed, wrong = content[:SEED_BYTES], []
        if commitment_to(seed) == self._roster[position].commitment:
            self._own_seeds[position] = seed
        else:
            wrong.append(position)
        for dealer, start in zip(dealers, range(SEED_BYTES, expected, SHARE_BYTES), strict=True):
            kind: Kind = "own" if dealer in self._uploaded else "mask"
            share, parcel = content[start : start + SHARE_BYTES], self._parcel(dealer, position)
            if parcel and commitment(self._context, dealer, position, kind, share) == promised(parcel, kind):
                self._shares.setdefault((dealer, kind), {})[position] = share
            else:
                wrong.append(dealer)
        if wrong:
            raise self._blame(position, f"Expected its shares of the secrets of positions {wrong} to be what it got.")

    def total(self) -> NDArray[np.uint32]:
        """(2^m,) the sum of the survivors' residues mod 2^bits.

        Raises:
            AggregationError: a secret of which fewer than t shares came; nothing was released.
            ProtocolError: shares that all fit what their dealer committed to, and do not give its secret.
        """
        masks = []
        for position in self._survivors:
            seed = self._own_seeds.get(position) or self._reconstruct(position, "own")
            masks.append((own_key(seed, self._context), -1))
        for position in self._parcels.keys() - self._uploaded:
            alive = [neighbour for neighbour in self._neighbours[position] if neighbour in self._uploaded]
            if not alive:
                continue
            own = private_key(self._reconstruct(position, "mask"))
            for neighbour in alive:
                key = mask_key(own, self._roster[neighbour].mask_key, self._context, position, neighbour)
                masks.append((key, -sign_of(neighbour, position)))
        total = self._total.copy()
        add_masks(total, masks)
        return total.astype(np.uint32) & np.uint32((1 << self.terms.encoding.bits) - 1)

    def _reconstruct(self, position: int, kind: Kind) -> bytes:
        shares, threshold = self._shares.get((position, kind), {}), self.terms.degree.threshold
        advertisement = self._roster[position]
        if len(shares) < threshold:
            raise AggregationError(
                f"Expected {len(shares)} shares of a secret of device {advertisement.device} to be at least "
                f"{threshold}; nothing was released."
            )
        held = sorted(shares)
        places = [self._neighbours[position][holder] + 1 for holder in held]
        secret = combine(places, [shares[holder] for holder in held], threshold)
        fits = (
            commitment_to(secret) == advertisement.commitment
            if kind == "own"
            else public_key(secret) == advertisement.mask_key
        )
        if not fits:
            raise self._blame(position, "Expected the shares that it dealt to give the secret it committed to.")
        return secret

    def _parcel(self, dealer: int, holder: int) -> bytes | None:
        """What a dealer sent a neighbour of its; None where it has not shared."""
        parcels = self._parcels.get(dealer)
        return parcels[self._neighbours[dealer][holder]] if parcels else None

    def _blame(self, position: int, message: str) -> ProtocolError:
        device = self._roster[position].device
        return ProtocolError(f"Device {device}: {message}", device)
