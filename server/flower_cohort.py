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


class FlowerCohort:
    """The devices that answer on a Grid, by their own numbers.

    Args:
        expected: N; the constructor waits until so many devices have told their numbers.
        timeout: seconds that a device has for an answer.
    """

    def __init__(self, grid: Grid, expected: int, timeout: float) -> None:
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
                reasons.append(str(reply.error.reason))
                continue
            update = read_update(reply, offer.encoding)
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

    def _identify(self, expected: int) -> dict[int, int]:
        """Ask every node for its device's number, until all are known. Raises :class:`AggregationError`."""
        nodes: dict[int, int] = {}
        asked: set[int] = set()
        deadline = time.monotonic() + self._timeout
        while len(nodes) < expected:
            new = set(self._grid.get_node_ids()) - asked
            asked |= new
            messages = [Message(RecordDict(), node, f"query.{IDENTIFY}") for node in new]
            for reply in self._exchange(messages) if messages else []:
                if reply.has_error():
                    raise AggregationError(f"A device could not tell its number: {reply.error.reason}.")
                number = read_identity(reply)
                if number < expected:
                    nodes[number] = reply.metadata.src_node_id
            if time.monotonic() > deadline:
                raise AggregationError(f"Expected {expected} devices, found {len(nodes)} after {self._timeout:.0f} s.")
            if not new:
                time.sleep(_POLL_SECONDS)
        return nodes

    def _exchange(self, messages: list[Message]) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=self._timeout)
