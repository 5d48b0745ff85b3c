"""A device's process: Flower's SuperNode as a child that talks to the server, and the ClientApp, which holds the
secrets, here.

::

    server ◄─ TLS, node authentication ─► flower-supernode ◄─ loopback, shared secret ─► this process ─► the store

The SuperNode is told the transport key through a file in memory. The store is opened for each message and closed after
it, so that `fedtopk device add-events` and `fedtopk recommend` find it free in between.
"""

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
from flwr.app import Context, Error, Message
from flwr.supercore.constant import TaskType
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from client.app import make_app
from client.device_store import STORE_PATIENCE_SECONDS, DeviceStore
from client.store_key import KeySource
from client.stored_device import TRANSPORT_KEY, Condition, StoredDevice, invitation_of
from common.errors import AggregationError
from common.flower_tasks import ENVIRONMENT, Runtime, free_port, quiet
from common.processes import program, running, secret_files
from common.settings import Settings

_POLL_SECONDS = 0.2
_PAUSE_SECONDS = 15.0
"""Before a SuperNode is started again."""
_STRANGE_SECONDS = 80.0
"""How long a SuperNode is tried that gets no message: a device that lost its power is refused for a minute, until the
server has missed two of its heartbeats, as one is that the server does not know."""
_FAILED = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Agent:
    """One device's process.

    Attributes:
        folder, key: of its store.
        condition: why it does not want to take part now; asked before every participation.
        say: tells the device's owner, in one line, what happened.
        log: where the SuperNode's own words go.
    """

    folder: Path
    key: KeySource
    condition: Condition
    say: Say
    log: IO[bytes]

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Answer the server's messages until told to stop.

        A SuperNode tries to reach its server again and again, but ends at some faults that pass, such as a connection
        that breaks while TLS begins, or an answer of a proxy's. So it is started again.

        Raises:
            AggregationError: it ended all the time, and no message came.
            RunError: the device is not enrolled or has not joined.
        """
        quiet()
        with ExitStack() as stack:
            store = stack.enter_context(self._opened())
            StoredDevice(store, Settings())  # raises where it cannot be one
            invitation, transport = invitation_of(store), store.records[TRANSPORT_KEY]
            stack.close()
            runtime = Runtime(f"127.0.0.1:{free_port()}", secrets.token_bytes(32))
            files = stack.enter_context(secret_files(transport, runtime.secret, invitation.root_certificate.encode()))
            words = _supernode(invitation.server, runtime.address, *(path for _, path in files))
            environment = ENVIRONMENT | {"FLWR_HOME": str(self.folder / "flower")}
            answered, begin = 0, time.monotonic()
            while not should_stop():
                with (
                    running(words, environment, self.log, [descriptor for descriptor, _ in files]) as node,
                    runtime.tasks(TaskType.CLIENT_APP) as acquire,
                ):
                    self.say(f"Connecting to {invitation.server}.")
                    while not should_stop() and node.poll() is None:
                        if token := acquire():
                            self._answer(runtime, token)
                            answered += 1
                        else:
                            time.sleep(_POLL_SECONDS)
                if should_stop():
                    break
                if not answered and time.monotonic() - begin > _STRANGE_SECONDS:
                    raise AggregationError(
                        f"Expected Flower's SuperNode to keep running; it ended with {node.returncode}: the server may "
                        "not know this device's key, may have another time than this device, or may not be the one "
                        "that the invitation names."
                    )
                self.say(f"Flower's SuperNode ended; it is started again in {_PAUSE_SECONDS:g} s.")
                _wait(_PAUSE_SECONDS, should_stop)

    def _answer(self, runtime: Runtime, token: str) -> None:
        with suppress(httpx.HTTPError), runtime.task(token) as client:  # the SuperNode may have ended meanwhile
            message, context, _, _ = pull_task_input(client)
            at = f"round {message.metadata.group_id or '-'}, {message.metadata.message_type.partition('.')[2]}"
            try:
                reply = self.reply(message, context)
                self.say(f"{at}: {reply.error.reason if reply.has_error() else 'answered'}")
            except Exception as error:  # what it says may be of the user's history, and is for this device alone
                self.say(f"{at}: failed with {error!r}")
                reply = Message(Error(_FAILED, "The device failed."), reply_to=message)
            push_message(client, reply, context)

    def reply(self, message: Message, context: Context) -> Message:
        """The ClientApp's answer to one message, over the store, which is open meanwhile. Raises what went wrong."""
        with self._opened() as store:
            app = make_app(lambda settings, _: StoredDevice(store, settings, self.condition))
            return app(message, context)

    def _opened(self) -> DeviceStore:
        return DeviceStore.open(self.folder, self.key, patience=STORE_PATIENCE_SECONDS)


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not should_stop():
        time.sleep(_POLL_SECONDS)


def _supernode(server: str, runtime: str, transport_key: str, secret: str, root_certificate: str) -> list[str]:
    host, port = runtime.split(":")
    return [
        program("flower-supernode"),
        *("--superlink", server, "--root-certificates", root_certificate),
        *("--auth-supernode-private-key", transport_key),
        *("--isolation", "process", "--superexec-auth-secret-file", secret, "--host", host, "--port", port),
    ]
