"""Takes the pictures of the page for the documentation, with the stand-in's answers.

python -m tests.server.static.pictures docs/pictures
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.server.static.conftest import ARGUMENTS, chromium
from tests.server.static.stand_in import Answer, StandIn, training_report

QUESTION = "A customer's parcel is late. What do I answer, and what do I check?"
TUNED = """**Dear Ms Lindqvist,**

I am sorry that your parcel is late. I have asked the carrier for its whereabouts and will \
write to you by *tomorrow noon*.

Before you send it, check:

1. whether the parcel was scanned in the last 48 hours
2. whether the address has its floor and bell
3. whether a replacement is in stock

| delay | we offer |
|:------|---------:|
| up to 3 days | an apology |
| up to 7 days | 10 % of the price |
| longer | a replacement |
"""
UNTUNED = """The parcel may be late for many reasons. The parcel is a parcel that is sent \
by a carrier. If the parcel is \
late, the customer may ask where the parcel is. You can answer that the parcel is late.

The parcel may be late for many reasons, such as:

- weather
- weather conditions
- other conditions of the weather
"""
CODE = "Write a function that counts the words of a text."
CODED = """Split at white space, then count:

```python
from collections import Counter

def count_words(text: str) -> Counter[str]:
    return Counter(text.lower().split())
```

`Counter` keeps the words in a dictionary; `most_common(3)` gives the three most frequent ones.
"""
REVIEW = "My parcel has not come, and nobody answers the phone."
CHINESE = "顾客的包裹迟到了，我该怎么回复？"
CHINESE_ANSWER = """**林女士您好：**

非常抱歉，您的包裹晚到了。我已联系快递公司查询，并会在*明天中午*之前再次回复您。

发送之前，请先核对：

1. 过去 48 小时内是否有扫描记录
2. 地址是否写明楼层和门铃
3. 是否有现货可以补发
"""


def words(text: str, delay: float = 0.004) -> Answer:
    pieces = [f"{word} " for word in text.split(" ")]
    return Answer([*pieces[:-1], pieces[-1].rstrip(" ")], delay=delay, prompt_tokens=64, cached_tokens=48)


@contextmanager
def window(browser: Browser, server: StandIn, **options: Any) -> Iterator[Page]:
    context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **options})
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#model-first:enabled")
    yield page
    context.close()


def ask(page: Page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:not(.stop)")
    page.wait_for_timeout(300)


def chat(page: Page) -> None:
    page.click("#settings-toggle")
    page.fill("#setting-temperature", "0.7")
    page.press("#setting-temperature", "Tab")
    for prompt in ("When do you open on Sundays?", CODE):
        page.click("#new")
        ask(page, prompt)
    page.click("#new")
    ask(page, QUESTION)
    ask(page, CODE)


def compare(page: Page) -> None:
    page.click("#compare")
    ask(page, QUESTION)


def report(page: Page) -> None:
    page.click("#report-open")
    page.wait_for_selector("svg.chart")


def compare_while_it_comes(page: Page) -> None:
    page.click("#compare")
    page.fill("#prompt", "both at once")
    page.press("#prompt", "Enter")
    page.wait_for_timeout(400)


def classify(page: Page) -> None:
    page.click("#classify-open")
    page.fill("#classify-text", REVIEW)
    page.press("#classify-text", "Enter")
    page.wait_for_selector(".shares")


PHONE = {"viewport": {"width": 360, "height": 720}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
PICTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat": (chat, {"color_scheme": "light"}),
    "compare": (compare, {"color_scheme": "dark"}),
    "phone": (lambda page: ask(page, QUESTION), {**PHONE, "color_scheme": "light"}),
    "report": (report, {"color_scheme": "light"}),
    "chinese": (lambda page: ask(page, CHINESE), {"color_scheme": "light", "locale": "zh-CN"}),
    "classify": (classify, {"color_scheme": "light"}),
    "phone-classify": (classify, {**PHONE, "color_scheme": "dark", "locale": "zh-CN"}),
    "empty": (lambda page: None, {"color_scheme": "light"}),
    "streaming": (compare_while_it_comes, {"color_scheme": "light"}),
    "phone-compare": (compare, {**PHONE, "color_scheme": "dark"}),
    "phone-report": (report, {**PHONE, "color_scheme": "dark"}),
    "phone-empty": (lambda page: None, {**PHONE, "color_scheme": "dark"}),
}
KEPT = ("chat", "compare", "phone", "report", "classify", "chinese")


def main() -> None:
    folder = Path(sys.argv[1])
    names = sys.argv[2:] or KEPT
    server = StandIn()
    server.reports["shop"] = training_report()
    server.on(QUESTION, words(TUNED))
    server.on(QUESTION, words(UNTUNED, 0.006), "smollm2-135m")
    server.on(CODE, words(CODED))
    pieces = [CHINESE_ANSWER[place : place + 2] for place in range(0, len(CHINESE_ANSWER), 2)]
    server.on(CHINESE, Answer(pieces, delay=0.006, prompt_tokens=64, cached_tokens=48))
    server.labels[REVIEW] = {"complaint": 0.872, "question": 0.116, "praise": 0.012}
    server.on("both at once", Answer(["The first words are here, ", "and then"], gate=threading.Event()), "shop")
    server.on("both at once", Answer(["", "and then"], gate=threading.Event()), "smollm2-135m")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        for name in names:
            steps, options = PICTURES[name]
            with window(browser, server, **options) as page:
                steps(page)
                page.mouse.move(0, 0)
                page.wait_for_timeout(200)
                page.screenshot(path=folder / f"page-{name}.png")
        browser.close()
    server.close()


if __name__ == "__main__":
    main()
