"""Asking one model: typing, streaming, stopping, going on, and how answers end."""

from __future__ import annotations

import threading

import pytest
from playwright.sync_api import expect

from tests.server.static.conftest import Visit, kept, wait_until
from tests.server.static.stand_in import Answer


def test_a_question_is_typed_and_answered(visit: Visit) -> None:
    page = visit.page
    page.locator("#prompt").press_sequentially("When do you open?")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("When do you open?")
    expect(page.locator(".answer .markdown")).to_have_text("shop heard: When do you open?")
    expect(page.locator("#prompt")).to_have_value("")
    expect(page.locator("#prompt")).to_be_focused()
    [body] = visit.server.asked
    assert body["messages"] == [{"role": "user", "content": "When do you open?"}]
    assert (body["model"], body["stream"], body["stream_options"]) == ("shop", True, {"include_usage": True})


def test_enter_sends_and_shift_enter_does_not(visit: Visit) -> None:
    page = visit.page
    page.locator("#prompt").press_sequentially("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#prompt") == "one\ntwo"
    assert visit.server.asked == []
    page.keyboard.press("Enter")
    expect(page.locator(".answer .markdown")).to_contain_text("two")
    assert visit.server.asked[0]["messages"][0]["content"] == "one\ntwo"


def test_nothing_is_not_sent(visit: Visit) -> None:
    expect(visit.page.locator("#send")).to_be_disabled()
    visit.ask("  \n ")
    expect(visit.page.locator("#send")).to_be_disabled()
    assert visit.page.locator(".turn").count() == 0


def test_an_input_methods_enter_sends_nothing(visit: Visit) -> None:
    page = visit.page
    page.focus("#prompt")
    keyboard = visit.context.new_cdp_session(page)
    enter = {"type": "rawKeyDown", "key": "Enter", "code": "Enter"}
    keyboard.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
    keyboard.send("Input.dispatchKeyEvent", {**enter, "windowsVirtualKeyCode": 13})  # chooses the candidate
    keyboard.send("Input.insertText", {"text": "你好"})
    keyboard.send("Input.dispatchKeyEvent", {**enter, "windowsVirtualKeyCode": 229})  # Safari tells of it afterwards
    expect(page.locator("#prompt")).to_have_value("你好")
    assert page.locator(".turn").count() == 0
    keyboard.send("Input.dispatchKeyEvent", {**enter, "windowsVirtualKeyCode": 13})  # nothing is composed any more
    expect(page.locator(".bubble")).to_have_text("你好")


def test_the_answer_is_shown_while_it_comes(visit: Visit) -> None:
    gate = threading.Event()
    visit.server.on("slow", Answer(["The **first", "** part. ", "The rest."], gate=gate, before_gate=2))
    visit.ask("slow")
    text = visit.page.locator(".answer .markdown")
    expect(text).to_have_text("The first part.")
    expect(text.locator("strong")).to_have_text("first")
    expect(visit.page.locator(".answer")).to_have_attribute("aria-busy", "true")
    gate.set()
    expect(text).to_have_text("The first part. The rest.")
    expect(visit.page.locator(".answer")).to_have_attribute("aria-busy", "false")


def test_tokens_and_speed_are_told(visit: Visit) -> None:
    visit.server.on("count", Answer(["a ", "b ", "c ", "d"], delay=0.05, prompt_tokens=1234, cached_tokens=1000))
    visit.ask("count")
    page = visit.page
    expect(page.locator("[data-fact=completion]")).to_have_text("tokens out 4")
    expect(page.locator("[data-fact=prompt]")).to_have_text("tokens in 1,234 (1,000 cached)")
    answer = kept(visit)[0]["turns"][0]["answers"][0]
    first, seconds = answer["firstSeconds"], answer["seconds"]
    assert 0.05 <= first < seconds  # the stand-in waits before each piece
    expect(page.locator("[data-fact=speed]")).to_have_text(f"{3 / (seconds - first):.1f} tokens/s")
    expect(page.locator("[data-fact=first]")).to_have_text(f"first token {first:.2f} s")


@pytest.mark.parametrize("how", ["Escape", "button", "Escape from elsewhere"])
def test_an_answer_is_stopped(visit: Visit, how: str) -> None:
    visit.server.on("endless", Answer(["It begins", " and never ends"], gate=threading.Event()))
    visit.ask("endless")
    page = visit.page
    expect(page.locator(".answer .markdown")).to_have_text("It begins")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        if how != "Escape":
            page.focus("#model-first")
        page.keyboard.press("Escape")
    expect(page.locator(".answer .notice")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    wait_until(lambda: visit.server.given_up == ["shop"], "the service hears that nobody reads any more")


def test_what_was_said_before_a_stop_stays_in_the_conversation(visit: Visit) -> None:
    visit.server.on("endless", Answer(["It begins", " and never ends"], gate=threading.Event()))
    visit.ask("endless")
    expect(visit.page.locator(".answer .markdown")).to_have_text("It begins")
    visit.page.keyboard.press("Escape")
    visit.finish()
    visit.ask("go on")
    visit.finish()
    roles = [(m["role"], m["content"]) for m in visit.server.asked[1]["messages"]]
    assert roles == [("user", "endless"), ("assistant", "It begins"), ("user", "go on")]


def test_while_an_answer_comes_enter_sends_nothing(visit: Visit) -> None:
    gate = threading.Event()
    visit.server.on("slow", Answer(["one", " two"], gate=gate))
    visit.ask("slow")
    expect(visit.page.locator(".answer .markdown")).to_have_text("one")
    visit.ask("impatient")
    expect(visit.page.locator("#prompt")).to_have_value("impatient")  # not lost, and not sent
    gate.set()
    visit.finish()
    assert len(visit.server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "words", "level"),
    [
        (Answer(["half"], finish="length"), "Cut short", "warning"),
        (Answer(["I can", ""], finish="content_filter"), "safety policy", "warning"),
        (Answer([], finish="stop"), "answered with nothing", "plain"),
        (Answer(status=429, message="full", headers={"Retry-After": "7"}), "Try again in 7 s. (full)", "error"),
        (Answer(status=503, message="draining"), "busy", "error"),
        (Answer(status=500, message="ouch"), "Something went wrong in the service. (ouch)", "error"),
        (Answer(status=400, message="top_p: too small"), "did not accept the request. (top_p: too small)", "error"),
        (Answer(status=404, message="no such model"), "does not have that", "error"),
        (Answer(["half"], finish=None), "ended before the answer was complete", "error"),
        (Answer(["half", ""], delay=0.3, cut=True), "ended before the answer was complete", "error"),
        (Answer(raw=b"data: {not json}\n\n"), "ended before the answer was complete", "error"),
        (Answer(raw=b'data: {"error": {"message": "out of blocks"}}\n\n'), "out of blocks", "error"),
        (Answer(raw=b"data: 7\n\ndata: null\n\ndata: [DONE]\n\n"), "answered with nothing", "plain"),
        (Answer(raw=b"data: " + b"x" * 1_200_000), "ended before the answer was complete", "error"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:24],
)  # fmt: skip
def test_how_an_answer_ended_is_said(visit: Visit, answer: Answer, words: str, level: str) -> None:
    visit.server.on("end", answer)
    visit.ask("end")
    notice = visit.page.locator(".answer .notice")
    expect(notice).to_contain_text(words)
    expect(notice).to_have_attribute("data-level", level)
    if answer.pieces:
        expect(visit.page.locator(".answer .markdown")).to_have_text("".join(answer.pieces))  # what came stays
    visit.ask("still alive")
    expect(visit.page.locator(".answer .markdown").last).to_have_text("shop heard: still alive")


def test_events_may_come_in_any_pieces(visit: Visit) -> None:
    chunk = '{"choices":[{"delta":{"content":"%s"},"finish_reason":null}]}'
    end = '{"choices":[{"delta":{},"finish_reason":"stop"}]}'
    raw = f": ping\r\n\r\ndata:{chunk % '你'}\r\rid: 7\nevent: x\ndata: {chunk % '好'}\n\n"
    raw += f": ping\n\ndata: {end}\n\ndata: [DONE]\n\n"
    visit.server.on("raw", Answer(raw=raw.encode()))
    visit.ask("raw")
    expect(visit.page.locator(".answer .markdown")).to_have_text("你好")
    expect(visit.page.locator(".answer .notice")).to_be_hidden()


def test_a_service_that_went_away_is_told_of(visit: Visit) -> None:
    visit.page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    visit.ask("anybody?")
    expect(visit.page.locator(".answer .notice")).to_contain_text("cannot be reached")


def test_the_last_question_is_asked_again_or_edited(visit: Visit) -> None:
    page = visit.page
    visit.ask("first")
    visit.finish()
    visit.ask("second")
    visit.finish()
    assert page.locator(".turn-actions").count() == 1
    page.locator("[data-action=again]").click()
    expect(page.locator(".turn")).to_have_count(2)
    visit.finish()
    assert [body["messages"][-1]["content"] for body in visit.server.asked] == ["first", "second", "second"]
    assert len(visit.server.asked[2]["messages"]) == 3
    page.locator("[data-action=edit]").click()
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator("#prompt")).to_have_value("second")


def test_the_settings_go_with_the_question(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    fields = {"temperature": "0.4", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "64"}
    for name, value in fields.items():
        page.fill(f"#setting-{name}", value)
        page.press(f"#setting-{name}", "Tab")
    page.fill("#seed", "7")
    page.press("#seed", "Tab")
    visit.ask("hello")
    visit.finish()
    body = visit.server.asked[0]
    assert {name: body[name] for name in [*fields, "seed"]} == {
        "temperature": 0.4, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64, "seed": 7,
    }  # fmt: skip
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#setting-top_k")).to_have_value("40")
    page.get_by_role("button", name="Back to defaults").click()
    visit.ask("again")
    visit.finish()
    allowed = {"model", "messages", "stream", "stream_options", "max_tokens"}
    assert set(visit.server.asked[1]) == allowed  # what is not set is the service's to choose


@pytest.mark.parametrize(("typed", "kept"), [("5", "2"), ("-1", "0"), ("1e999", ""), ("0.25", "0.25")])
def test_settings_stay_in_their_range(visit: Visit, typed: str, kept: str) -> None:
    page = visit.page
    page.get_by_role("button", name="Settings").click()
    page.locator("#setting-temperature").press_sequentially(typed)
    page.press("#setting-temperature", "Tab")
    expect(page.locator("#setting-temperature")).to_have_value(kept)


def test_reading_above_is_not_disturbed_by_what_comes_below(visit: Visit) -> None:
    gate = threading.Event()
    visit.server.on("long", Answer(["line\n\n" * 60, "more\n\n" * 30], gate=gate))
    visit.ask("long")
    scroller = visit.page.locator("#scroller")
    at_end = "element => element.scrollHeight - element.clientHeight - element.scrollTop < 5"
    expect(visit.page.locator(".markdown p")).to_have_count(60)
    wait_until(lambda: scroller.evaluate(at_end), "the end is followed")
    scroller.evaluate("element => element.scrollTo(0, 100)")
    expect(visit.page.locator("#jump")).to_be_visible()
    gate.set()
    expect(visit.page.locator(".markdown p")).to_have_count(90)
    assert scroller.evaluate("element => element.scrollTop") == 100
    visit.page.click("#jump")
    assert scroller.evaluate(at_end)


def test_an_answer_is_copied(visit: Visit) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.server.on("code", "Look:\n\n```python\nprint('hi')\n```\n")
    visit.ask("code")
    visit.finish()
    page = visit.page
    page.locator("[data-action=copy-code]").click()
    expect(page.locator("[data-action=copy-code]")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print('hi')"
    page.locator("[data-action=copy-answer]").click()
    expect(page.locator("[data-action=copy-answer]")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "Look:\n\n```python\nprint('hi')\n```\n"
