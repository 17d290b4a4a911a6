"""What answers look like, and that a hostile one does nothing."""

from __future__ import annotations

import random
import re

import pytest
from playwright.sync_api import expect

from tests.server.static.conftest import Visit
from tests.server.static.stand_in import Answer

RICH = """# Title

A *soft*, **loud**, ~~wrong~~ and `exact` line with [a link](https://example.org/a_(b)) and https://example.org/c.

1. first
2. second
   - inner *one*
   - inner two

- [x] done
- [ ] open

> quoted
> twice

| fruit | price |
|:------|------:|
| apple | 1.20 |
| `a|b` | 3 |

```python
def f(x):
    return "<b>" + x
```

---
The end.
"""
HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    "<svg onload=\"document.title='owned'\"><a xlink:href=\"javascript:document.title='owned'\">x</a></svg>",
    "[click](javascript:document.title='owned')",
    "[click](JaVaScRiPt:document.title='owned')",
    "[click](java\tscript:document.title='owned')",
    "[click](&#106;avascript:document.title='owned')",
    "[click](data:text/html,<script>opener.document.title='owned'</script>)",
    "[click](vbscript:x) [click](file:///etc/passwd) [click](//elsewhere.test/x) [click](blob:x)",
    "<javascript:document.title='owned'>",
    "![x](http://elsewhere.test/beacon.png)",
    "<iframe src=http://elsewhere.test></iframe><link rel=stylesheet href=http://elsewhere.test/x.css>",
    "<style>body{display:none}</style><form action=http://elsewhere.test><button>ok</button></form>",
    "[x](https://elsewhere.test/\" onmouseover=\"document.title='owned')",
    "```\"><img src=x onerror=document.title='owned'>\ncode\n```",
    "| <img src=x onerror=document.title='owned'> |\n|---|\n| <script>document.title='owned'</script> |",
    "&lt;img src=x onerror=document.title='owned'&gt; &#60;script&#62;document.title='owned'&#60;/script&#62;",
    "${document.title='owned'} {{constructor.constructor('document.title=1')()}}",
]


def test_markdown_is_drawn(visit: Visit) -> None:
    visit.server.on("rich", RICH)
    visit.ask("rich")
    visit.finish()
    text = visit.page.locator(".answer .markdown")
    expect(text.locator("h3")).to_have_text("Title")
    for tag, words in {"em": "soft", "strong": "loud", "s": "wrong", "p > code": "exact"}.items():
        expect(text.locator(tag).first).to_have_text(words)
    links = text.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.org/a_(b)",
        "https://example.org/c",
    ]
    for link in links.all():
        assert link.get_attribute("target") == "_blank"
        assert {"noopener", "noreferrer"} <= set((link.get_attribute("rel") or "").split())
    expect(text.locator("ol > li")).to_have_count(2)
    expect(text.locator("ol > li > ul > li")).to_have_text(["inner one", "inner two"])
    assert [box.is_checked() for box in text.locator("li.check input").all()] == [True, False]
    expect(text.locator("blockquote p")).to_have_text("quoted\ntwice", use_inner_text=True)
    expect(text.locator("td")).to_have_text(["apple", "1.20", "`a", "b`"])
    expect(text.locator("td.right").first).to_have_text("1.20")
    expect(text.locator("pre code")).to_have_text('def f(x):\n    return "<b>" + x')
    expect(text.locator(".code-head span")).to_have_text("python")
    expect(text.locator("hr")).to_have_count(1)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("place", ["answer", "question"])
def test_a_hostile_text_does_nothing(visit: Visit, text: str, place: str) -> None:
    prompt = text if place == "question" else "go"
    visit.server.on(prompt, Answer([text[: len(text) // 2], text[len(text) // 2 :]]))
    visit.ask(prompt)
    visit.finish()
    visit.page.reload()  # out of the storage, too
    page = visit.page
    expect(page.locator(".bubble")).to_have_count(1)
    for link in page.locator(".answer a").all():
        assert (link.get_attribute("href") or "").startswith(("http://", "https://"))
        link.dispatch_event("mouseover")
    for tag in (
        "img",
        "script:not(head script)",
        "iframe",
        "svg:not(.icon, .sprite)",
        "style",
        "link:not(head link)",
        "form",
    ):
        assert page.locator(f"#thread {tag}").count() == 0, tag
    attributes = page.evaluate(
        "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(name => name.startsWith('on'))"
    )
    assert attributes == []
    assert page.title() == "Alpaca-LoRA"
    # no console error and no request elsewhere: held by the fixture for every test


def test_the_policy_stops_what_the_renderer_would_let_through(visit: Visit) -> None:
    """The negative control: the second wall stands by itself."""
    refused = visit.page.evaluate(
        """() => {
            try { document.body.innerHTML = "<img src=x onerror=alert(1)>"; return false; }
            catch (error) { return error instanceof TypeError; }
        }"""
    )
    assert refused
    visit.problems.clear()  # the browser reports it, as it should


def test_html_is_shown_as_it_was_written(visit: Visit) -> None:
    visit.server.on("html", "Use <b>bold</b> &amp; &lt;i&gt; &copy; &#x4f60;.")
    visit.ask("html")
    expect(visit.page.locator(".answer .markdown")).to_have_text("Use <b>bold</b> & <i> &copy; 你.")


HUGE = {
    "words": "lorem ipsum dolor " * 11_000,
    "one word": "x" * 200_000,
    "stars": "*" * 200_000,
    "open emphasis": "*a **b _c " * 20_000,
    "backticks": "".join("`" * (1 + n % 40) + " " for n in range(10_000)),
    "brackets": "[" * 200_000,
    "links": "[a](" * 50_000,
    "closed links": "[](" * 66_000 + ")",
    "angles": "<" * 200_000,
    "quotes": ">" * 200_000,
    "quote lines": "> " * 50_000 + "\n" + ">" * 1000,
    "list": "- a\n" * 20_000,
    "deep list": "\n".join(" " * n + "- a" for n in range(600)),
    "hashes": "#" * 199_999 + "x",
    "spaces": "# a" + " " * 200_000 + "b",
    "pipes": "|" * 100_000 + "\n" + "|-" * 50_000,
    "table": "|a" * 90 + "\n" + "|-" * 90 + "\n" + "|\n" * 60_000,
    "fences": "```\n" * 40_000,
    "fences in a list": "- ```\n" * 30_000,
    "dashes": "- " * 100_000,
    "blank lines": "- a" + "\n" * 200_000 + "b",
    "entities": "&#" * 100_000,
    "addresses": "https://" * 25_000,
    "parentheses": "https://a.test/" + "(" * 200_000,
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_answer_does_not_stop_the_page(visit: Visit, name: str) -> None:
    text = HUGE[name]
    size = max(1, len(text) // 50)
    visit.server.on("huge", Answer([text[at : at + size] for at in range(0, len(text), size)]))
    visit.ask("huge")
    expect(visit.page.locator("#send")).not_to_have_class(
        re.compile(r"\bstop\b"), timeout=120_000
    )  # a quadratic reader takes longer
    visit.page.fill("#prompt", "still here")
    expect(visit.page.locator("#send")).to_be_enabled()


def test_an_answer_in_pieces_looks_as_the_answer_at_once(visit: Visit) -> None:
    shape = "element => element.innerHTML"
    visit.server.on("whole", RICH)
    visit.ask("whole")
    visit.finish()
    whole = visit.page.locator(".answer .markdown").last.evaluate(shape)
    draw = random.Random(5)
    cuts = sorted(draw.sample(range(1, len(RICH)), 60))
    pieces = [RICH[start:end] for start, end in zip([0, *cuts], [*cuts, len(RICH)], strict=True)]
    visit.server.on("pieces", Answer(pieces, delay=0.01))
    visit.ask("pieces")
    visit.finish()
    assert visit.page.locator(".answer .markdown").last.evaluate(shape) == whole
