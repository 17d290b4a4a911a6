"""A classifier is chosen, asked, and its labels are shown with their probabilities."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.server.static.conftest import Visit
from tests.server.static.stand_in import BASE, MOOD, SHOP
from tests.server.static.test_look import CONTRAST, PHONE, widths

HOSTILE = "<img src=x onerror=alert(1)>"


def classify(visit: Visit, text: str) -> None:
    visit.page.fill("#classify-text", text)
    visit.page.locator("#classify-send").click()


def test_labels_come_with_their_probabilities(visit: Visit) -> None:
    page = visit.page
    visit.server.labels["A lovely shop."] = {"bad": 0.0312, "good": 0.9688}
    page.get_by_role("button", name="Classify").click()
    expect(page.get_by_role("dialog", name="Classify a text")).to_be_visible()
    expect(page.locator("#classify-text")).to_be_focused()
    classify(visit, "A lovely shop.")
    expect(page.locator(".shares li")).to_have_text([re.compile(r"good\s*96\.9 %"), re.compile(r"bad\s*3\.1 %")])
    expect(page.locator(".shares .first .label")).to_have_text("good")
    assert page.locator(".shares rect").first.get_attribute("width") == "96.88%"
    assert visit.server.asked == [{"model": "mood", "input": "A lovely shop."}]
    page.fill("#classify-text", "A lovely shop!")  # what stands there was said of another text
    expect(page.locator(".shares")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.locator("#classify")).to_be_hidden()


def test_another_classifier_is_chosen_and_enter_asks(visit: Visit) -> None:
    page = visit.page
    visit.server.models = [BASE, SHOP, MOOD, {"id": "topic", "kind": "classifier", "labels": ["1", "2", "10"]}]
    visit.server.labels["tea"] = {"2": 0.5, "10": 0.3, "1": 0.2}
    page.reload()
    page.locator("#classify-open").click()
    page.select_option("#classify-model", "topic")
    page.fill("#classify-text", "tea")
    page.keyboard.press("Enter")
    expect(page.locator(".shares .label")).to_have_text(["2", "10", "1"])
    page.keyboard.press("Shift+Enter")
    expect(page.locator("#classify-text")).to_have_value("tea\n")
    assert [body["model"] for body in visit.server.asked] == ["topic"]


def test_without_classifiers_there_is_no_button(visit: Visit) -> None:
    visit.server.models = [BASE, SHOP]
    visit.page.reload()
    expect(visit.page.locator("#model-first")).to_be_enabled()
    expect(visit.page.locator("#classify-open")).to_be_hidden()


def test_errors_long_texts_and_hostile_labels(visit: Visit) -> None:
    page = visit.page
    page.locator("#classify-open").click()
    classify(visit, "   ")
    assert visit.server.asked == []
    classify(visit, "unknown")
    expect(page.locator("#classify-result .notice")).to_contain_text("There is no text to classify")
    visit.server.labels["long " * 300] = {HOSTILE: 0.75, "b" * 200: 0.25}
    classify(visit, "long " * 300)
    expect(page.locator(".shares .label").first).to_have_text(HOSTILE)
    expect(page.locator("#classify-result .hint")).to_contain_text("Only its beginning was read")
    assert page.locator("#classify-result img").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_can_be_read_in_chinese_on_a_phone(open_page: Callable[..., Visit], width: int, theme: str) -> None:
    visit = open_page(
        **{**PHONE, "viewport": {"width": width, "height": 740}}, locale="zh-CN", color_scheme=theme,
        reduced_motion="reduce",
    )  # fmt: skip
    page = visit.page
    visit.server.labels["好茶"] = {"满意": 0.98, "不满意，而且标签的名字很长很长": 0.02}
    page.get_by_role("button", name="分类").tap()
    expect(page.locator("#classify-title")).to_have_text("文本分类")
    classify(visit, "好茶")
    expect(page.locator(".shares .share").first).to_have_text("98.0%")
    assert widths(page) == [width, width] and page.evaluate(CONTRAST) == []
    assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('#classify'))") <= 0
