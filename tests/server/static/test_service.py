"""The page on the service itself, with an engine that has no model: what the stand-in stands in for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect

from tests.server.open_server import KEY, OpenServer, open_server, until
from tests.server.static.conftest import Visit


@pytest.fixture
def server() -> Iterator[OpenServer]:
    with open_server() as opened:
        yield opened
        until(lambda: opened.is_idle)


@pytest.fixture
def visit(open_page: Callable[..., Visit]) -> Visit:
    """Let in, with room for a question in the small context."""
    visit = open_page()
    visit.page.fill("#key-field", KEY)
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#model-first")).to_be_enabled()
    visit.page.locator("#settings-toggle").click()
    visit.page.fill("#setting-max_tokens", "64")
    visit.page.press("#setting-max_tokens", "Tab")
    return visit


def test_two_models_answer_side_by_side(visit: Visit) -> None:
    page = visit.page
    expect(page.locator("#first-facts")).to_contain_text("chat")
    page.select_option("#model-first", "shop")
    page.locator("#compare").click()
    expect(page.locator("#model-second")).to_have_value("tiny-base")
    visit.ask("When do you open?")
    expect(page.locator(".answer .markdown").first).to_have_text(re.compile(r"^shop heard \d+ characters$"))
    expect(page.locator(".answer .markdown").last).to_have_text(re.compile(r"^base heard \d+ characters$"))
    expect(page.locator("[data-fact=completion]")).to_have_text([re.compile(r"^tokens out \d\d$")] * 2)


def test_every_setting_is_understood(visit: Visit) -> None:
    page = visit.page
    fields = {"temperature": "0.4", "top_p": "0.01", "top_k": "40", "min_p": "0.05"}
    for name, value in fields.items():
        page.fill(f"#setting-{name}", value)
        page.press(f"#setting-{name}", "Tab")
    page.locator("#dice").click()
    page.fill("#system", "Be brief.")
    visit.ask("hello")
    expect(page.locator(".answer .markdown")).to_contain_text("heard")
    expect(page.locator(".answer .notice")).to_be_hidden()


def test_an_answer_is_stopped_in_the_engine(visit: Visit, server: OpenServer) -> None:
    server.engine.gate.clear()
    visit.ask("hello")
    until(lambda: server.engine.has_work)
    visit.page.keyboard.press("Escape")
    expect(visit.page.locator(".answer .notice")).to_have_text("Stopped.")
    server.engine.gate.set()
    until(lambda: server.is_idle)


def test_refusals_are_shown_in_the_services_words(visit: Visit) -> None:
    visit.ask("x" * 2000)
    notice = visit.page.locator(".answer .notice")
    expect(notice).to_contain_text(re.compile(r"did not accept the request\. \(.+\)"))
    expect(notice).to_have_attribute("data-level", "error")


def test_a_report_without_a_curve(visit: Visit) -> None:
    visit.page.select_option("#model-first", "shop")
    visit.page.locator("#report-open").click()
    expect(visit.page.locator("#report-body")).to_contain_text("val loss")


def test_a_text_is_classified(visit: Visit) -> None:
    visit.page.locator("#classify-open").click()
    visit.page.fill("#classify-text", "a lovely shop")
    visit.page.locator("#classify-send").click()
    expect(visit.page.locator(".shares .label")).to_have_text(["good", "bad"])
    expect(visit.page.locator(".shares .share").first).to_have_text("88.1 %")
