"""Who comes in: a key on every path, known or not, but the open ones; without keys only this machine's own names."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from alpaca_lora.server.errors import ApiError, forbidden, unauthorized
from alpaca_lora.server.frame import error_response
from alpaca_lora.server.keys import ANONYMOUS, Caller, KeyRing

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


class Gate:
    """ASGI middleware; puts the `Caller` into ``scope["state"]``. ``open_paths`` ask for no key."""

    def __init__(
        self, app: ASGIApp, ring: KeyRing, open_paths: Collection[str], on_error: Callable[[ApiError], None]
    ) -> None:
        self._app, self._ring, self._open_paths, self._on_error = app, ring, frozenset(open_paths), on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["caller"] = self._caller(scope)
        except ApiError as error:
            self._on_error(error)
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        if not self._ring:
            # a page elsewhere whose name leads to this machine must not find an open server (DNS rebinding)
            if _host(scope) not in LOOPBACK:
                raise forbidden("Without API keys the server answers only to localhost")
            return ANONYMOUS
        if scope["path"] in self._open_paths:
            return ANONYMOUS
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            raise unauthorized("You didn't provide an API key: send Authorization: Bearer YOUR_KEY")
        scheme, _, key = given[0].decode("latin-1").partition(" ")
        caller = self._ring.find(key.strip())
        if caller is None or scheme.lower() != "bearer" or len(given) > 1:
            raise unauthorized("Incorrect API key provided")
        return caller


def _host(scope: Scope) -> str:
    """The name that the client asked for, without the port; empty where it is missing or ambiguous."""
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1:
        return ""
    host = hosts[0].strip().lower()
    name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    if not name:
        return host  # no port
    if port and not port.isdecimal():
        return ""
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name
