"""Who may look and who may give commands.

There is one token. On loopback everybody may look; commands need the token always, and on any other address looking
does, too. A browser that has shown the token keeps a cookie that is derived from it and goes to this site alone; a
command needs, beside the cookie, a word that only our own pages know, and must come from them (``Origin``). Programs
send ``Authorization: Bearer TOKEN``.
"""

import hashlib
import hmac
import ipaddress
import secrets
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from common.errors import SettingsError


@dataclass(frozen=True)
class Access:
    """What requests are held to.

    Attributes:
        open: whether looking needs no token.
    """

    token: str
    open: bool

    @classmethod
    def of(cls, host: str, token: str | None) -> "Access":
        """For a server on `host`; on loopback a token is made up where there is none.

        Raises :class:`SettingsError` for another host without a token, and for a token that can be guessed.
        """
        local = is_loopback(host)
        if token is None and not local:
            raise SettingsError(f"Expected --token with --host={host}: whoever reaches it could see and stop runs.")
        if token is not None and len(token) < 16:
            raise SettingsError(f"Expected a --token of at least 16 characters, found {len(token)}.")
        return cls(token or secrets.token_urlsafe(16), local)

    def derived(self, use: str) -> str:
        """A word that proves knowledge of the token and does not tell it."""
        return hmac.new(self.token.encode(), use.encode(), hashlib.sha256).hexdigest()

    def is_token(self, given: str) -> bool:
        """Whether it is the token, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(given.encode(), self.token.encode())

    def is_operator(self, request: Request) -> bool:
        """Whether the request shows that it knows the token."""
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        cookie = request.cookies.get(cookie_name(request), "")
        return self.is_token(bearer) or hmac.compare_digest(cookie.encode(), self.derived("cookie").encode())

    def remember(self, request: Request, response: Response) -> None:
        """Have the browser keep the cookie that makes it an operator's."""
        secure = request.headers.get("origin", "").startswith("https:")  # a proxy's, perhaps
        name, proof = cookie_name(request), self.derived("cookie")
        response.set_cookie(name, proof, httponly=True, samesite="strict", secure=secure)

    def may_look(self, request: Request) -> bool:
        """Whether the request may be answered at all."""
        return self.open or self.is_operator(request)

    def may_command(self, request: Request) -> bool:
        """Whether the request may change a run: it is an operator's, and no other site's page made it."""
        if self.is_token(request.headers.get("authorization", "").removeprefix("Bearer ")):
            return True  # no browser adds this header by itself
        word = request.headers.get("x-csrf", "")
        own = request.headers.get("origin", "").partition("://")[2] == request.headers.get("host")
        known = hmac.compare_digest(word.encode(), self.derived("csrf").encode())
        return self.is_operator(request) and own and known


def cookie_name(request: Request) -> str:
    """Browsers send a cookie to all ports of a name: each dashboard on a machine has one of its own."""
    port = request.headers.get("host", "").rpartition(":")[2]
    return f"fedtopk-{port}" if port.isdecimal() else "fedtopk"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
