"""The devices behind a Flower Grid: which node is which device, and what a stage of the protocol asks of them."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import AggregationError, ProtocolError
from common.messages import Action, size_of

_POLL_SECONDS = 1.0
_SHORTEST_PAUSE_SECONDS, _GROWTH = 0.1, 1.2
_SETTLED_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0
"""How long to wait for the next device to appear."""
_REASON = 300  # characters of a device's words that are kept


@dataclass
class Traffic:
    """What one attempt sent, in bytes of content, and why devices fell out."""

    up: int = 0
    down: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def in_words(self) -> str:
        """The reasons, the most frequent first."""
        return " ".join(f"{reason} ({count}×)" if count > 1 else reason for reason, count in self.reasons.most_common())


class Nodes:
    """Devices by their own numbers.

    Args:
        timeout: seconds that a device has for an answer.
        node_of: Flower's node of each device, as far as it is known.
    """

    def __init__(self, grid: Grid, timeout: float, node_of: Mapping[int, int]) -> None:
        self._grid = grid
        self._timeout = timeout
        self._node_of = dict(node_of)

    def __len__(self) -> int:
        return len(self._node_of)

    @property
    def devices(self) -> np.ndarray:
        """(N,) the devices' numbers, ascending."""
        return np.array(sorted(self._node_of), np.int64)

    def online(self) -> set[int]:
        """Devices whose nodes are connected."""
        nodes = set(self._grid.get_node_ids())
        return {device for device, node in self._node_of.items() if node in nodes}

    def await_online(self, count: int, patience: float, should_stop: Callable[[], bool]) -> None:
        """Wait for so many devices, or until told to stop.

        Raises :class:`AggregationError` if they do not come within `patience` seconds.
        """
        start = time.monotonic()
        while len(there := self.online()) < count and not should_stop():
            if time.monotonic() - start > patience:
                raise AggregationError(f"Expected {count} devices to connect in {patience:g} s, found {len(there)}.")
            time.sleep(_POLL_SECONDS)

    def find(self, expected: int | None, question: RecordDict, identify: Callable[[Message], int]) -> None:
        """Wait until N devices have told who they are.

        Args:
            expected: N; None takes those that are there once no new one comes.
            question: of the round 0, for which every device advertises.
            identify: the device's number in an answer to `advertise`. Raises :class:`ProtocolError`.

        Raises:
            AggregationError: they do not come, or not with the numbers from 0 to N−1.
        """
        asked: set[int] = set()
        refusals: list[str] = []
        newest = time.monotonic()
        while True:
            new = set(self._grid.get_node_ids()) - asked
            asked |= new
            messages = [Message(question, node, "query.advertise") for node in new]
            for reply in self._exchange(messages):
                try:
                    self._node_of[identify(checked(reply))] = reply.metadata.src_node_id
                    newest = time.monotonic()
                except ProtocolError as error:
                    refusals.append(str(error))
            waited = time.monotonic() - newest
            if len(self) == expected or (expected is None and len(self) and waited > _SETTLED_SECONDS):
                break
            if waited > _PATIENCE_SECONDS:
                nodes_option = f'--federation-config "num-supernodes={expected or 2}"'
                raise AggregationError(
                    f"Expected {expected or 'some'} devices, found {len(self)}: in a Flower simulation, pass "
                    f"{nodes_option} to `flwr run`. {' '.join(refusals[:1])}".rstrip()
                )
            time.sleep(_POLL_SECONDS)
        if set(self._node_of) != set(range(len(self))):
            raise AggregationError(
                f"Expected devices numbered from 0 to {len(self) - 1}, found {sorted(self._node_of)}."
            )

    def ask(
        self,
        action: Action,
        contents: Mapping[int, RecordDict],
        take: Callable[[int, Message], None],
        traffic: Traffic,
        group: str,
    ) -> int:
        """Send each device its content, and take the answers as they come.

        Args:
            contents: by device.
            take: is given a device's number and its answer. What it raises as :class:`ProtocolError` counts as no
                answer.
            group: of the Messages.

        Returns:
            How many answers were taken.
        """
        messages = {
            device: Message(content, self._node_of[device], action, group_id=group)
            for device, content in contents.items()
        }
        device_of = {self._node_of[device]: device for device in contents}
        traffic.down += sum(size_of(content) for content in contents.values())
        taken, silent = 0, len(messages)
        for reply in self._exchange(list(messages.values())):
            silent -= 1
            device = device_of.get(reply.metadata.src_node_id)
            try:
                if device is not None:
                    take(device, checked(reply))
                    taken += 1
                    traffic.up += size_of(reply.content)
                elif reply.has_error():
                    checked(reply)
            except ProtocolError as error:
                traffic.reasons[str(error)] += 1
        if silent:
            traffic.reasons[f"No answer within {self._timeout:g} s."] += silent
        return taken

    def _exchange(self, messages: list[Message]) -> Iterator[Message]:
        """Send, and yield the answers as they come, until all are there or the time is up.

        `Grid.send_and_receive` would look for answers every 3 seconds, which a stage of milliseconds then takes.
        """
        if not messages:
            return
        waiting = set(self._grid.push_messages(messages)) - {None}
        end, pause = time.monotonic() + self._timeout, _SHORTEST_PAUSE_SECONDS
        while True:
            for reply in self._grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            if not waiting or time.monotonic() > end:
                return
            time.sleep(pause)
            pause = min(_GROWTH * pause, _POLL_SECONDS)


def checked(reply: Message) -> Message:
    """The reply, unless it is an error. Raises :class:`ProtocolError` with the last line of its reason."""
    if reply.has_error():
        lines = [line.strip() for line in str(reply.error.reason).splitlines() if line.strip()]
        raise ProtocolError(lines[-1][:_REASON] if lines else "A device failed and gave no reason.")
    return reply
