"""Conversations stay in the browser: over a reload, within bounds, as a file, and not longer than wanted."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.server.static.conftest import Visit, kept, wait_until
from tests.server.static.stand_in import Answer


def test_a_conversation_survives_a_reload(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("button", name="Compare").click()
    visit.ask("remember **me**")
    visit.finish()
    before = [visit.texts(selector) for selector in (".bubble", ".answer .markdown", ".answer .facts")]
    page.reload()
    expect(page.locator(".bubble")).to_have_text("remember **me**")
    assert [visit.texts(selector) for selector in (".bubble", ".answer .markdown", ".answer .facts")] == before
    visit.ask("and now?")
    visit.finish()
    assert len(visit.server.asked[-1]["messages"]) == 3


def test_a_page_left_in_the_middle_of_an_answer_keeps_what_came(visit: Visit) -> None:
    visit.server.on("slow", Answer(["half an answer", " the rest"], gate=threading.Event()))
    visit.ask("slow")
    expect(visit.page.locator(".answer .markdown")).to_have_text("half an answer")
    wait_until(lambda: "half an answer" in json.dumps(kept(visit)), "it is kept while it comes")
    visit.page.reload()
    expect(visit.page.locator(".answer .markdown")).to_have_text("half an answer")
    expect(visit.page.locator(".answer .notice")).to_have_text("Stopped.")


def test_conversations_are_listed_opened_and_deleted(visit: Visit) -> None:
    page = visit.page
    for prompt in ("apples", "pears"):
        visit.ask(prompt)
        visit.finish()
        page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#conversations .title")).to_have_text(["pears", "apples"])
    assert page.locator(".turn").count() == 0
    page.locator("#conversations .open", has_text="apples").click()
    expect(page.locator(".bubble")).to_have_text("apples")
    page.get_by_role("button", name="Delete “apples”").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#conversations .title")).to_have_text(["pears"])
    assert [each["title"] for each in kept(visit)] == ["pears"]
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#conversations .title")).to_have_text(["pears", "apples"])


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(visit: Visit) -> None:
    visit.server.on("slow", Answer(["begun", " never"], gate=threading.Event()))
    visit.ask("slow")
    expect(visit.page.locator(".answer .markdown")).to_have_text("begun")
    visit.page.get_by_role("button", name="Delete “slow”").click()
    visit.finish()
    expect(visit.page.locator("#conversations li")).to_have_count(0)
    assert kept(visit) == []


def test_all_are_deleted_only_when_it_is_sure(visit: Visit) -> None:
    page = visit.page
    visit.ask("keep me")
    visit.finish()
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("button", name="Cancel").click()
    assert len(kept(visit)) == 1
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#conversations li")).to_have_count(0)
    assert kept(visit) == []
    expect(page.locator(".turn")).to_have_count(0)


def test_conversations_go_to_a_file_and_come_back(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    visit.ask("precious")
    visit.finish()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert json.loads(file.read_text())["conversations"][0]["turns"][0]["prompt"] == "precious"
    page.evaluate("localStorage.clear()")
    page.reload()
    expect(page.locator("#conversations li")).to_have_count(0)
    page.set_input_files("#import-file", file)
    expect(page.locator("#notices")).to_contain_text("Conversations taken over: 1")
    page.locator("#conversations .open").click()
    expect(page.locator(".answer .markdown")).to_have_text("shop heard: precious")
    page.set_input_files("#import-file", file)
    expect(page.locator("#notices")).to_contain_text("Conversations taken over: 0")  # it is here already


CONVERSATION = {"id": "0" * 24, "title": "t", "updated": 1, "turns": []}


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "7", '{"version": 1}', '{"version": 2, "conversations": []}',
        json.dumps({"version": 1, "conversations": [7]}),
        json.dumps({"version": 1, "conversations": [{**CONVERSATION, "id": "../../x"}]}),
        json.dumps({"version": 1, "conversations": [{**CONVERSATION, "turns": [{"prompt": 7, "answers": []}]}]}),
        json.dumps({"version": 1, "conversations": [{**CONVERSATION, "updated": "late"}]}),
    ],
)  # fmt: skip
def test_files_that_are_not_ours_are_refused(visit: Visit, text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    visit.page.set_input_files("#import-file", file)
    expect(visit.page.locator("#notices")).to_contain_text("no file of exported conversations")
    assert kept(visit) == []


def test_entries_that_are_not_ours_do_no_harm(visit: Visit) -> None:
    visit.page.evaluate(
        """() => {
            for (const name of ["models", "settings", "language", "theme", "conversation.x"])
                localStorage.setItem("alpaca-lora." + name, '{"broken');
            sessionStorage.setItem("alpaca-lora.current", "gone");
        }"""
    )
    visit.page.reload()
    visit.ask("hello")
    expect(visit.page.locator(".answer .markdown")).to_have_text("shop heard: hello")


def test_the_oldest_leave_when_there_are_too_many(visit: Visit) -> None:
    page = visit.page
    page.evaluate(
        """() => {
            for (let index = 0; index < 100; index++) {
                const id = String(index).padStart(24, "0");
                const conversation = {id, title: `old ${index}`, updated: index, turns: []};
                localStorage.setItem("alpaca-lora.conversation." + id, JSON.stringify(conversation));
            }
        }"""
    )
    visit.ask("one more")
    visit.finish()
    titles = {each["title"] for each in kept(visit)}
    assert len(titles) == 100
    assert "old 0" not in titles and "old 1" in titles and "one more" in titles
    expect(page.locator("#notices")).to_contain_text("Old conversations that left for want of room: 1")


def test_a_full_storage_makes_the_oldest_leave(visit: Visit) -> None:
    visit.page.evaluate(
        """() => {
            const turn = {prompt: "x".repeat(100000), answers: [{model: "m", text: "", state: "done"}]};
            for (let index = 0; index < 15; index++) {
                const id = String(index).padStart(24, "0");
                const conversation = {id, title: `old ${index}`, updated: index, turns: [turn]};
                localStorage.setItem("alpaca-lora.conversation." + id, JSON.stringify(conversation));
            }
            let filling = "y".repeat(1000000);
            for (let index = 0; filling !== ""; index++) {
                try { localStorage.setItem("other." + index, filling); }
                catch { filling = filling.slice(0, filling.length / 2); }
            }
        }"""
    )
    visit.ask("z" * 50_000)
    visit.finish()
    titles = {each["title"] for each in kept(visit)}
    assert "old 0" not in titles and "old 14" in titles
    assert any(title.startswith("zzz") for title in titles)


def test_without_storage_the_page_works_and_says_that_it_keeps_nothing(visit: Visit) -> None:
    visit.page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError'); }});"
    )
    visit.page.reload()
    expect(visit.page.locator("#notices")).to_contain_text("This browser keeps nothing")
    visit.ask("hello")
    expect(visit.page.locator(".answer .markdown")).to_have_text("shop heard: hello")


def test_two_tabs_do_not_overwrite_each_other(visit: Visit) -> None:
    other = visit.context.new_page()
    other.goto(visit.server.url)
    expect(other.locator("#model-first")).to_be_enabled()
    visit.ask("from one")
    visit.finish()
    expect(other.locator("#conversations .title")).to_have_text(["from one"])
    other.fill("#prompt", "from two")
    other.press("#prompt", "Enter")
    expect(visit.page.locator("#conversations .title")).to_have_text(["from two", "from one"])
