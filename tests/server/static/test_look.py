"""Light and dark, two languages, a phone, and a keyboard."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.server.static.conftest import Visit
from tests.server.static.stand_in import training_report
from tests.server.static.test_markdown import RICH

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
# the ratio of WCAG 2.2 between two colours, for every text that is shown, against the nearest ground that is painted
CONTRAST = """() => {
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b]
        .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = e => {
        for (; e; e = e.parentElement) {
            const color = parse(getComputedStyle(e).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
        }
        return [255, 255, 255];
    };
    const weak = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement;
        if (walker.currentNode.textContent.trim() === "" || e.closest(":disabled")) continue;
        if (!e.checkVisibility({checkOpacity: true})) continue;
        const [one, other] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((a, b) => b - a);
        const ratio = (one + 0.05) / (other + 0.05);
        if (ratio < 4.5) weak.push(`${walker.currentNode.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
    }
    return weak;
}"""


def ground(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def widths(page: Page) -> list[int]:
    return page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")


def fill(visit: Visit) -> None:
    """A comparison with all that an answer can have."""
    visit.server.on("rich", RICH + "\n" + "x" * 300 + "\n\n| " + " | ".join(["wide column"] * 12) + " |\n" + "|-" * 12)
    visit.server.reports["shop"] = training_report()
    visit.page.locator("#compare").click()
    visit.ask("rich")
    visit.finish()


def test_the_page_is_as_dark_as_the_system(open_page: Callable[..., Visit]) -> None:
    light = ground(open_page(color_scheme="light").page)
    dark = ground(open_page(color_scheme="dark").page)
    assert (light, dark) == ("rgb(247, 245, 241)", "rgb(23, 25, 26)")


def test_the_switch_wins_over_the_system_and_is_remembered(visit: Visit) -> None:
    page = visit.page
    light = ground(page)
    page.select_option("#theme", "dark")
    dark = ground(page)
    assert dark != light
    page.reload()
    assert ground(page) == dark
    page.emulate_media(color_scheme="dark")
    page.select_option("#theme", "light")
    assert ground(page) == light
    page.select_option("#theme", "auto")
    assert ground(page) == dark


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read(open_page: Callable[..., Visit], theme: str) -> None:
    visit = open_page(color_scheme=theme, reduced_motion="reduce")
    page = visit.page
    expect(page.locator("#model-first")).to_be_enabled()
    assert page.evaluate(CONTRAST) == []
    fill(visit)
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate(CONTRAST) == []
    page.get_by_role("button", name="Training").click()
    expect(page.locator("svg.chart")).to_be_visible()
    assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize(
    ("locale", "words"), [("en-GB", "Send"), ("zh-CN", "发送"), ("zh-TW", "发送"), ("fr-FR", "Send")]
)
def test_the_browsers_language_is_spoken(open_page: Callable[..., Visit], locale: str, words: str) -> None:
    page = open_page(locale=locale).page
    expect(page.locator("#send")).to_have_attribute("aria-label", words)


def test_the_language_changes_everywhere_and_is_remembered(visit: Visit) -> None:
    page = visit.page
    fill(visit)
    page.get_by_role("button", name="Settings").click()
    page.select_option("#language", "zh")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.get_by_role("button", name="新对话")).to_be_visible()
    expect(page.locator("[data-fact=completion]").first).to_have_text("输出 1 词元")
    expect(page.locator("#settings h2")).to_have_text("设置")
    assert page.get_attribute("#prompt", "placeholder") == "输入消息"
    shown = page.evaluate(
        """() => [...document.querySelectorAll('[data-text], [data-label]')]
            .filter(e => /^[a-z ]+$/i.test(e.textContent.trim()) && !/^(Top-[kp]|Min-p)$/.test(e.textContent.trim()))
            .filter(e => e.dataset.text).map(e => e.textContent)"""
    )
    assert shown == []
    page.reload()
    expect(page.get_by_role("button", name="新对话")).to_be_visible()
    page.select_option("#language", "en")
    expect(page.get_by_role("button", name="New conversation")).to_be_visible()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize("width", [360, 320, 768, 1024])
def test_nothing_needs_sideways_scrolling(open_page: Callable[..., Visit], width: int, locale: str) -> None:
    visit = open_page(**{**PHONE, "viewport": {"width": width, "height": 740}}, locale=locale)
    page = visit.page
    expect(page.locator("#model-first")).to_be_enabled()
    assert widths(page) == [width, width]
    fill(visit)
    assert widths(page) == [width, width]
    cut = page.evaluate(
        """() => [...document.querySelectorAll('#bar *, #foot *, .answer, .answer > *, .bubble')]
            .filter(e => e.checkVisibility() && e.getBoundingClientRect().width > 1)
            .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
            .map(e => e.id || e.className || e.tagName)"""
    )
    assert cut == []
    page.locator("#report-open").click()
    expect(page.locator("svg.chart")).to_be_visible()
    assert widths(page) == [width, width]
    assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('#report'))") <= 0


def test_a_phones_panels_lie_over_the_page(open_page: Callable[..., Visit]) -> None:
    visit = open_page(**PHONE)
    page = visit.page
    expect(page.locator("#model-first")).to_be_enabled()
    expect(page.locator("#sidebar")).to_be_hidden()
    visit.ask("hello")
    visit.finish()
    page.locator("#sidebar-toggle").tap()
    expect(page.locator("#sidebar")).to_be_visible()
    page.locator("#new").tap()
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator(".turn")).to_have_count(0)
    page.locator("#settings-toggle").tap()
    expect(page.locator("#settings")).to_be_visible()
    page.locator("#settings-scrim").tap(position={"x": 10, "y": 300})
    expect(page.locator("#settings")).to_be_hidden()


def test_phone_targets_are_large_enough(open_page: Callable[..., Visit]) -> None:
    visit = open_page(**PHONE)
    visit.ask("hello")
    visit.finish()
    small = visit.page.evaluate(
        """() => [...document.querySelectorAll('button, select, input, textarea')].filter(e => e.checkVisibility())
            .map(e => [e.id || e.dataset.action, e.getBoundingClientRect()])
            .filter(([, box]) => box.width < 24 || box.height < 24).map(([name]) => name)"""
    )
    assert small == []  # WCAG 2.2, 2.5.8


def test_all_is_done_with_the_keyboard(visit: Visit) -> None:
    page = visit.page
    page.focus(".skip")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .markdown")).to_have_text("shop heard: hello")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate(
            """() => {
                const e = document.activeElement;
                const style = getComputedStyle(e.id === "prompt" ? e.closest("form") : e);
                const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
                return [e.id || e.dataset.action || e.className || e.tagName, seen];
            }"""
        )
        reached.append(name)
    assert [name for name, seen in reached if not seen and name != "BODY"] == []
    wanted = {
        "new", "open", "delete", "export", "import", "delete-all", "language", "theme", "sidebar-toggle", "model-first",
        "compare", "report-open", "settings-toggle", "edit", "again", "copy-answer", "prompt", "skip",
    }  # fmt: skip
    assert wanted <= {name for name, _ in reached}
    page.focus("#settings-toggle")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    expect(page.locator("#settings-toggle")).to_have_attribute("aria-expanded", "true")


def test_every_control_has_a_name(visit: Visit) -> None:
    fill(visit)
    visit.page.get_by_role("button", name="Settings").click()
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll('button, select, input, textarea, [role=region], nav, aside')]
            .filter(e => e.checkVisibility() && !e.closest('.markdown li'))
            .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim()))
            .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []


def test_the_end_of_an_answer_is_read_aloud(visit: Visit) -> None:
    visit.ask("hello")
    voice = visit.page.locator("#voice")
    expect(voice).to_contain_text("Asking shop")
    expect(voice).to_contain_text("Answer of shop: shop heard: hello")
    expect(voice).to_have_attribute("role", "status")


def test_examples_are_put_into_the_field(visit: Visit) -> None:
    visit.page.locator(".example").first.click()
    expect(visit.page.locator("#prompt")).to_have_value(re.compile("LoRA adapter"))
    expect(visit.page.locator("#prompt")).to_be_focused()
    assert visit.server.asked == []
