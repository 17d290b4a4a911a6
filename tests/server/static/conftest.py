"""A real browser that looks at the page, and the stand-in that serves it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, expect, sync_playwright

from tests.server.static.stand_in import StandIn

ARGUMENTS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
# what the browser itself says of answers that the page shows plainly: 401, 429, a cut connection
REFUSED = re.compile(r"^Failed to load resource: ")


@dataclass
class Visit:
    """One browser window on the page. problems: errors in its console; elsewhere: requests to other origins."""

    page: Page
    context: BrowserContext
    server: StandIn
    problems: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def ask(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")

    def finish(self) -> None:
        """Wait until nothing is being made."""
        expect(self.page.locator("#send")).not_to_have_class(re.compile(r"\bstop\b"))

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


def kept(visit: Visit) -> list[dict[str, Any]]:
    """The conversations in the browser's storage."""
    entries = visit.page.evaluate("Object.entries(localStorage)")
    return [json.loads(text) for name, text in entries if name.startswith("alpaca-lora.conversation.")]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """For what the server sees; the page has Playwright's `expect`."""
    end = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")  # no longer: its event loop stands in the way of tests that run one of their own
def browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("needs a Chromium browser (Debian's package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture
def open_page(browser: Browser, server: Any) -> Iterator[Callable[..., Visit]]:
    """open_page(**options of the context) -> a window on the page; at the end no console may hold an error."""
    visits: list[Visit] = []

    def open_page(**options: Any) -> Visit:
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(8000)
        visit = Visit(context.new_page(), context, server)
        visits.append(visit)
        visit.page.on("console", lambda message: listen(visit, message))
        visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))
        context.route("**", lambda route: keep_at_home(visit, route))
        visit.page.goto(server.url)  # the stand-in, or a service that a test puts in its place
        return visit

    yield open_page
    for visit in visits:
        visit.context.close()
    assert [problem for visit in visits for problem in visit.problems] == []
    assert [url for visit in visits for url in visit.elsewhere] == []


@pytest.fixture
def visit(open_page: Callable[..., Visit]) -> Visit:
    visit = open_page()
    expect(visit.page.locator("#model-first")).to_be_enabled()
    return visit


def listen(visit: Visit, message: ConsoleMessage) -> None:
    if message.type in ("error", "warning") and not REFUSED.match(message.text):
        visit.problems.append(message.text)


def keep_at_home(visit: Visit, route: Route) -> None:
    if route.request.url.startswith(visit.server.url):
        route.continue_()
    else:
        visit.elsewhere.append(route.request.url)
        route.abort()
