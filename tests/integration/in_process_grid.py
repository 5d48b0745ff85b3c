"""A Flower Grid whose nodes are ClientApps in this process: real Messages, through Flower's own wire format."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity

Lost = Callable[[str, int], bool]
"""Whether the answer of a node to a message type is lost. The device computes it all the same."""


class InProcessGrid:
    """Nodes 100, 101, …, of partitions 0, 1, …, each with its own Context."""

    def __init__(self, app: ClientApp, nodes: int, run_config: dict[str, Any], lost: Lost, run_id: int = 7) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1  # whose messages they are
        self._app = app
        self._lost = lost
        self._number = itertools.count(1)
        self.contexts = {
            100 + part: Context(run_id, 100 + part, {"partition-id": part}, RecordDict(), run_config)
            for part in range(nodes)
        }
        self.seen: list[tuple[str, int]] = []
        self._answers: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._ask(message) for message in messages]

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self._answers.pop(name) for name in list(ids)]

    def _ask(self, message: Message) -> str:
        message.metadata.__dict__["_message_id"] = str(next(self._number))
        request = message_from_proto(message_to_proto(message))
        kind, node = request.metadata.message_type, request.metadata.dst_node_id
        self.seen.append((kind, node - 100))
        try:
            reply = self._app(request, self.contexts[node])
        except Exception as error:  # as Flower's own runtime does
            reply = Message(Error(2, repr(error)), reply_to=request)
        if self._lost(kind, node - 100):
            reply = Message(Error(8, "lost"), reply_to=request)  # what Flower says of a process that died
        name = request.metadata.message_id
        self._answers[name] = message_from_proto(message_to_proto(reply))
        return name
