"""One server for the tests that only ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.open_server import OpenServer, open_server, until


@pytest.fixture(scope="module")
def server() -> Iterator[OpenServer]:
    with open_server() as opened:
        yield opened
        until(lambda: opened.is_idle)  # whatever a test did, nothing is left of it
