"""A service that asks for a key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.server.static.conftest import Visit
from tests.server.static.stand_in import StandIn


@pytest.fixture
def locked(server: StandIn, open_page: Callable[..., Visit]) -> Visit:
    server.keys = {"sesame"}
    return open_page()


def test_the_key_is_asked_for_and_kept_in_the_tab(locked: Visit) -> None:
    page = locked.page
    expect(page.get_by_role("dialog", name="Key")).to_be_visible()
    page.locator("#key-field").press_sequentially("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#model-first")).to_have_value("shop")
    locked.ask("hello")
    expect(page.locator(".answer .markdown")).to_have_text("shop heard: hello")
    page.reload()
    expect(page.locator("#model-first")).to_have_value("shop")
    assert page.locator("#key").is_hidden()
    stored = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie]")
    assert ["sesame" in place for place in stored] == [False, True, False]
    other = locked.context.new_page()  # another tab knows nothing of it
    other.goto(locked.server.url)
    expect(other.get_by_role("dialog", name="Key")).to_be_visible()


def test_a_wrong_key_is_asked_for_again(locked: Visit) -> None:
    page = locked.page
    page.fill("#key-field", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-problem")).to_have_text("The service does not know this key.")
    expect(page.locator("#key-field")).to_have_value("")
    page.fill("#key-field", "sesame")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#model-first")).to_be_enabled()


def test_without_a_key_the_page_says_so(locked: Visit) -> None:
    page = locked.page
    expect(page.locator("#key-field")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#trouble")).to_contain_text("wants a key")
    page.get_by_role("button", name="Try again").click()
    page.fill("#key-field", "sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#trouble")).to_be_hidden()


def test_a_key_that_ran_out_is_asked_for_once_by_two_answers(locked: Visit) -> None:
    page, server = locked.page, locked.server
    page.fill("#key-field", "sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#model-first")).to_be_enabled()
    page.get_by_role("button", name="Compare").click()
    server.keys = {"open"}
    locked.ask("hello")
    expect(page.get_by_role("dialog", name="Key")).to_be_visible()
    page.fill("#key-field", "open")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .markdown")).to_have_text(["shop heard: hello", "smollm2-135m heard: hello"])


def test_the_key_is_forgotten(locked: Visit) -> None:
    page = locked.page
    expect(page.locator("#key-field")).to_be_visible()
    expect(page.locator("#forget-key")).to_be_hidden()
    page.fill("#key-field", "sesame")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Forget key").click()
    assert "sesame" not in page.evaluate("JSON.stringify(sessionStorage)")
    locked.ask("hello")
    expect(page.get_by_role("dialog", name="Key")).to_be_visible()
