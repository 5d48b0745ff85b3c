"""Clocks that are off: secure aggregation hardly looks at them, and Flower's node authentication a little."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from fastapi import HTTPException
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.superlink.routers.fleet import node_auth
from flwr.supernode import node_auth_http_interceptor
from protocol import NOW, begin, plain_sum, residues_of

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_devices_whose_clocks_differ_by_any_time_have_a_sum_until_a_certificate_expires() -> None:
    play = begin(6)
    play.clocks = {0: NOW - 10 * 3600, 1: 0.0, 2: 1_999.0}
    residues = residues_of(play, 1)
    play.share()
    play.upload(residues)
    play.agree()
    play.unmask()
    np.testing.assert_array_equal(play.aggregate.total(), plain_sum(play, residues))


@pytest.mark.parametrize(("ahead", "let_in"), [(-306, False), (-304, True), (0, True), (4, True), (6, False)])
def test_a_node_is_let_in_up_to_five_minutes_behind_and_five_seconds_ahead(
    monkeypatch: pytest.MonkeyPatch, ahead: int, let_in: bool
) -> None:
    """By the server's own function, on what a node's own one signs. `docs/deploy.md` says so."""
    key = generate_private_key(SECP384R1())
    public = key.public_key()
    message = ActivateNodeRequest(public_key=public_key_to_bytes(public))
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: NOON + timedelta(seconds=ahead))
    monkeypatch.setattr(node_auth, "now", lambda: NOON)
    context = ProtobufRequestContext("activate", message, httpx.Request("POST", "https://server"))
    node_auth_http_interceptor.NodeAuthHttpInterceptor(key, public).intercept(context, lambda _: httpx.Response(200))
    request: Any = SimpleNamespace(headers=context.request.headers, state=SimpleNamespace(protobuf_request=message))
    if let_in:
        node_auth.authenticate_node(request)
    else:
        with pytest.raises(HTTPException, match="Invalid SuperNode authentication"):
            node_auth.authenticate_node(request)
