"""A cohort of devices behind a Flower Grid.

**The updates are summed in the clear here**: each is clipped, rotated, rounded and carries its share of the noise, but
this server sees it alone. Secure aggregation, which hides it, takes this module's place behind the same interface.
"""

import time
from collections.abc import Iterable

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from common.errors import AggregationError
from common.messages import IDENTIFY, UPDATE, offer_content, read_identity, read_update
from common.offer import Offer
from common.privacy.encoding import add_residues
from server.cohort import CohortSum, release

_POLL_SECONDS = 1.0
_SETTLED_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0
"""How long to wait for the next device to appear."""


class FlowerCohort:
    """The devices that answer on a Grid, by their own numbers.

    Args:
        expected: N; the constructor waits until so many devices have told their numbers. None takes those that are
            there once no new one comes.
        timeout: seconds that a device has for an answer.
    """

    def __init__(self, grid: Grid, expected: int | None, timeout: float) -> None:
        self._grid = grid
        self._timeout = timeout
        self._nodes = self._identify(expected)

    @property
    def devices(self) -> int:
        return len(self._nodes)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass

    def sum_updates(self, offer: Offer, members: np.ndarray) -> CohortSum:
        content = offer_content(offer, len(members))
        messages = [
            Message(content, self._nodes[device], f"train.{UPDATE}", group_id=str(offer.round))
            for device in members.tolist()
        ]
        residues = np.zeros(offer.encoding.padded, np.uint32)
        survivors, bytes_up, reasons = 0, 0, []
        for reply in self._exchange(messages):
            if reply.has_error():
                reasons.append(_last_line(reply.error.reason))
                continue
            try:
                update = read_update(reply, offer.encoding)
            except AggregationError as error:  # one malformed update is a dropout, as an error is
                reasons.append(str(error))
                continue
            add_residues(residues, update, offer.encoding.bits)
            survivors += 1
            bytes_up = update.nbytes
        needed = int(np.ceil((1 - offer.settings.aggregation.dropout_fraction) * len(members)))
        if survivors < needed:
            raise AggregationError(
                f"Expected {survivors} of {len(members)} devices to be at least {needed} answers in round "
                f"{offer.round}; nothing was released. {' '.join(sorted(set(reasons)))}".rstrip()
            )
        total = release(residues, survivors, len(members), offer)
        down = sum(value.numel() * value.element_size() for value in offer.parameters.values())
        return CohortSum(total, len(members), survivors, bytes_up or None, down if survivors else None)

    def _identify(self, expected: int | None) -> dict[int, int]:
        """Ask every node for its device's number, until all are known. Raises :class:`AggregationError`."""
        nodes: dict[int, int] = {}
        asked: set[int] = set()
        refusals: list[str] = []
        newest = time.monotonic()
        while expected is None or len(nodes) < expected:
            new = set(self._grid.get_node_ids()) - asked
            asked |= new
            for reply in self._exchange([Message(RecordDict(), node, f"query.{IDENTIFY}") for node in new]):
                if reply.has_error():
                    refusals.append(_last_line(reply.error.reason))
                    continue
                nodes[read_identity(reply)] = reply.metadata.src_node_id
                newest = time.monotonic()
            waited = time.monotonic() - newest
            if expected is None and nodes and waited > _SETTLED_SECONDS:
                break
            if waited > _PATIENCE_SECONDS:
                nodes_option = f'--federation-config "num-supernodes={expected or 2}"'
                raise AggregationError(
                    f"Expected {expected or 'some'} devices, found {len(nodes)}: in a Flower simulation, pass "
                    f"{nodes_option} to `flwr run`. {' '.join(refusals[:1])}".rstrip()
                )
            time.sleep(_POLL_SECONDS)
        if set(nodes) != set(range(len(nodes))):
            raise AggregationError(f"Expected devices numbered from 0 to {len(nodes) - 1}, found {sorted(nodes)}.")
        return nodes

    def _exchange(self, messages: list[Message]) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=self._timeout) if messages else ()


def _last_line(reason: str | None) -> str:
    """What an error says in its own words: Flower's reasons are whole tracebacks."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
