"""Two models side by side on the same question, and who is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable

from playwright.sync_api import expect

from tests.server.static.conftest import Visit, wait_until
from tests.server.static.stand_in import BASE, POET, SHOP, Answer


def test_the_first_adapter_is_asked_unless_another_is_chosen(visit: Visit) -> None:
    page = visit.page
    expect(page.locator("#model-first")).to_have_value("shop")
    expect(page.locator("#first-facts")).to_have_text("lora · rank 16 · alpaca")
    page.select_option("#model-first", "poet")
    expect(page.locator("#first-facts")).to_have_text("dora · rank 8 · chatml")
    visit.ask("hello")
    expect(page.locator(".answer .name")).to_have_text("poet")
    page.reload()
    expect(page.locator("#model-first")).to_have_value("poet")


def test_the_adapter_changes_within_a_conversation(visit: Visit) -> None:
    visit.ask("one")
    visit.finish()
    visit.page.select_option("#model-first", "smollm2-135m")
    visit.ask("two")
    visit.finish()
    assert visit.texts(".answer .name") == ["shop", "smollm2-135m"]
    assert [m["content"] for m in visit.server.asked[1]["messages"]] == ["one", "shop heard: one", "two"]


def test_two_models_answer_at_the_same_time(visit: Visit) -> None:
    page = visit.page
    gates = {model: threading.Event() for model in ("shop", "smollm2-135m")}
    for model, gate in gates.items():
        visit.server.on("same", Answer([f"{model} begins", " and ends"], gate=gate), model)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#model-second")).to_have_value(
        "smollm2-135m"
    )  # base and tuned, unless something else is chosen
    visit.ask("same")
    answers = page.locator(".answer .markdown")
    expect(answers).to_have_text(["shop begins", "smollm2-135m begins"])  # both are open at once
    gates["smollm2-135m"].set()
    expect(answers).to_have_text(["shop begins", "smollm2-135m begins and ends"])
    gates["shop"].set()
    expect(answers).to_have_text(["shop begins and ends", "smollm2-135m begins and ends"])
    first, second = page.locator(".answer").all()
    one, other = first.bounding_box(), second.bounding_box()
    assert one and other
    assert one["y"] == other["y"] and one["x"] + one["width"] <= other["x"]
    assert [body["messages"] for body in visit.server.asked] == [[{"role": "user", "content": "same"}]] * 2


def test_each_column_goes_on_with_its_own_answers(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("button", name="Compare").click()
    for prompt in ("one", "two"):
        visit.ask(prompt)
        visit.finish()
    second = {body["model"]: [m["content"] for m in body["messages"]] for body in visit.server.asked[2:]}
    assert second == {
        "shop": ["one", "shop heard: one", "two"], "smollm2-135m": ["one", "smollm2-135m heard: one", "two"],
    }  # fmt: skip
    page.get_by_role("button", name="Compare").click()
    visit.ask("three")
    visit.finish()
    assert [m["content"] for m in visit.server.asked[-1]["messages"]][-2:] == ["shop heard: two", "three"]


def test_both_are_stopped_at_once(visit: Visit) -> None:
    visit.server.on("endless", Answer(["begun", " never"], gate=threading.Event()))
    visit.page.get_by_role("button", name="Compare").click()
    visit.ask("endless")
    expect(visit.page.locator(".answer .markdown")).to_have_text(["begun", "begun"])
    visit.page.keyboard.press("Escape")
    expect(visit.page.locator(".answer .notice")).to_have_text(["Stopped.", "Stopped."])
    wait_until(lambda: sorted(visit.server.given_up) == ["shop", "smollm2-135m"], "both streams are left")


def test_one_that_fails_leaves_the_other_alone(visit: Visit) -> None:
    visit.server.on("hard", Answer(status=500, message="ouch"), "smollm2-135m")
    visit.page.get_by_role("button", name="Compare").click()
    visit.ask("hard")
    expect(visit.page.locator(".answer .markdown").first).to_have_text("shop heard: hard")
    expect(visit.page.locator(".answer .notice").last).to_contain_text("ouch")


def test_the_two_are_swapped(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("button", name="Swap").click()
    assert (page.input_value("#model-first"), page.input_value("#model-second")) == ("smollm2-135m", "shop")
    visit.ask("hello")
    visit.finish()
    assert visit.texts(".answer .name") == ["smollm2-135m", "shop"]


def test_adapters_come_and_go(visit: Visit) -> None:
    page = visit.page
    visit.server.models = [BASE, POET, {"id": "feelings", "kind": "classifier"}]
    page.evaluate("performance.now = (real => () => real() + 60000)(performance.now.bind(performance))")
    page.evaluate("window.dispatchEvent(new Event('focus'))")
    expect(page.locator("#notices li")).to_contain_text("shop is no longer served.")
    expect(page.locator("#model-first")).to_have_value("poet")
    assert page.locator("#model-first option").all_inner_texts() == [
        "poet",
        "smollm2-135m",
    ]  # a classifier writes nothing


def test_no_models_and_no_service_are_told_of(open_page: Callable[..., Visit]) -> None:
    visit = open_page()
    server, page = visit.server, visit.page
    expect(page.locator("#model-first")).to_be_enabled()
    server.models = []
    page.reload()
    expect(page.locator("#trouble")).to_contain_text("The service has no models.")
    page.fill("#prompt", "anybody?")
    expect(page.locator("#send")).to_be_disabled()
    server.models = [SHOP]
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("#send")).to_be_enabled()


def test_a_models_name_is_text(visit: Visit) -> None:
    name = "<img src=x onerror=alert(1)>"
    visit.server.models = [
        {"id": name, "kind": "adapter", "method": name, "rank": "8", "template": None},
        {"id": 7},
        None,
    ]
    visit.page.reload()
    expect(visit.page.locator("#first-facts")).to_have_text(name)
    visit.ask("hello")
    expect(visit.page.locator(".answer .name")).to_have_text(name)
    assert visit.page.locator("img").count() == 0
