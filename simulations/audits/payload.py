"""Audit 2, payload: which items a device has read, from the bytes that it sends.

Devices with real histories go through a round of the secure aggregation, with the run's clip and wire format but
without noise: the masks alone have to hide what is sent. The attacker reads one device's upload, removes no mask,
undoes packing, scale and rotation, and takes the items that it moves most, as many as the device has in its window.
Under masks that is at chance: the number of right ones is hypergeometric, whatever the model. The same attack on raw
updates has to recover them, or it would say nothing.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from client.device import participate
from client.local_update import compute_update
from common.model import flatten, initialise
from common.offer import Offer
from common.privacy.encoding import Encoding, decode
from common.secagg import member
from common.secagg.advertisement import Advertisement
from common.secagg.aggregate import Aggregate
from common.secagg.keys import SEED_BYTES
from common.secagg.member import TAG_BYTES
from common.secagg.packing import unpack
from common.secagg.roster import View
from common.secagg.terms import Terms
from simulations.audits.bounds import hits_p_value, rate_interval
from simulations.audits.evidence import items_moved, items_read
from simulations.audits.finding import Finding, verdict_of
from simulations.audits.system import System
from simulations.identities import simulated_identity

DEVICES = 20

_RUN = bytes(32)

Masks = list[tuple[bytes, int]]


def all_masks(masks: Masks) -> Masks:
    """No flaw."""
    return masks


def no_masks(masks: Masks) -> Masks:
    """A device that uploads without masks."""
    return []


def audit_payload(system: System, seed: int, error: float, mask: Callable[[Masks], Masks] = all_masks) -> Finding:
    """One round of at most 20 devices; `mask`: what a device does with its masks."""
    system = system.seeded(seed)
    settings, items = system.settings, system.items
    parameters = initialise(settings, items, torch.Generator().manual_seed(seed))
    population = system.population()
    devices = np.flatnonzero(system.histories.lengths() > 1)[:DEVICES]
    aggregation, n = settings.aggregation, len(devices)
    encoding = Encoding.choose(
        len(flatten(parameters)),
        settings.privacy.clip_norm,
        settings.privacy.noise_multiplier,
        n,
        1 - aggregation.corrupt_fraction - aggregation.dropout_fraction,
        aggregation.bits,
    )
    offer = Offer(1, 1, parameters, replace(encoding, variance=0.0), settings)
    windows = [population.windows(1, np.array([device])) for device in devices]
    residues = [
        participate(offer, n, int(device), window, population.users[device]).residues
        for device, window in zip(devices, windows, strict=True)
    ]
    updates = [
        compute_update(settings, parameters, window, population.users[[device]], offer.candidates, offer.warm)
        .gradients.weighted_sum(torch.ones(1))
        .numpy()
        for device, window in zip(devices, windows, strict=True)
    ]
    terms = Terms(
        1, 1, n, aggregation.corrupt_fraction, aggregation.dropout_fraction, False, offer.encoding, offer.model
    )
    uploads = _uploads(terms, devices, residues, mask)
    received = [
        decode(unpack(upload, encoding.padded, encoding.bits), encoding, offer.signs).astype(np.float32)
        for upload in uploads
    ]
    read = [np.flatnonzero(items_read(window, 0, items)) for window in windows]
    sizes, total = [len(own) for own in read], sum(len(own) for own in read)
    chance = sum(size**2 for size in sizes) / items / total
    hits, raw = (
        sum(_hits(items_moved(vector, settings, items), own) for vector, own in zip(vectors, read, strict=True))
        for vectors in (received, updates)
    )
    p_value = hits_p_value(hits, sizes, items)
    low, high = rate_interval(hits, total, error)
    return Finding(
        name="payload",
        statistic="surprise (−log₁₀ p) at how many of a device's items its upload gives away, against blind guesses",
        value=_surprise(p_value),
        lower_bound=_surprise(p_value),
        limit=_surprise(error),
        verdict=verdict_of(_surprise(p_value), _surprise(error), works=hits_p_value(raw, sizes, items) < error),
        detects="uploads that are not masked",
        cannot_detect="masks that somebody else can compute; a server that is told which survivors to unmask twice "
        "(tests/unit/test_secagg_attacks.py)",
        details={
            "devices": n,
            "items_read": total,
            "recovered": hits / total,
            "recovered_interval": [low, high],
            "recovered_by_chance": chance,
            "recovered_from_raw_updates": raw / total,
            "p_value": p_value,
        },
    )


def _uploads(
    terms: Terms, devices: np.ndarray, residues: Sequence[np.ndarray], mask: Callable[[Masks], Masks]
) -> list[bytes]:
    """What each device sends as its masked update, without its authentication."""
    identities = [simulated_identity(0, int(device)) for device in devices]
    advertised = [member.advertise(identity, _RUN, os.urandom) for identity in identities]
    roster = [Advertisement.parse(state.message, terms.hybrid) for state in advertised]
    aggregate = Aggregate(_RUN, terms, roster, os.urandom(SEED_BYTES))
    shared = []
    for position, (identity, state) in enumerate(zip(identities, advertised, strict=True)):
        view = View.parse(aggregate.view(position), lambda offered: None)
        own, message = member.share(state, identity, view, 0.0, os.urandom)
        aggregate.take_shares(position, message)
        shared.append(own)
    uploads = []
    for position, own in enumerate(shared):
        uploaded, masks = member.receive(own, aggregate.inbox(position))
        uploads.append(member.upload(uploaded, mask(masks), residues[position])[:-TAG_BYTES])
    return uploads


def _hits(evidence: np.ndarray, own: np.ndarray) -> int:
    guessed = np.argsort(-evidence, kind="stable")[: len(own)]
    return len(np.intersect1d(guessed, own))


def _surprise(probability: float) -> float:
    return -math.log10(max(probability, 1e-300))
