import numpy as np
from rich.console import Console

from alpaca_lora.data.example import TokenizedExample
from alpaca_lora.data.preview import LEARNED, SEEN, coloured, length_histogram, row_panel, runs, spread_rows


class Letters:
    """ids are code points."""

    def decode(self, ids, *, skip_special=True):
        return "".join(chr(i) for i in ids)


def example(text: str, mask: str) -> TokenizedExample:
    return TokenizedExample(np.array([ord(c) for c in text], np.int32), np.array([c == "x" for c in mask]), 0)


def test_learned_tokens_stand_out():
    text = coloured(example("ask: yes", "     xxx"), Letters())
    assert text.plain == "ask: yes"
    assert [(text.plain[s.start : s.end], s.style) for s in text.spans] == [("ask: ", SEEN), ("yes", LEARNED)]


def test_first_token_is_never_shown_as_learned():
    assert list(runs(example("abc", "xxx"))) == [(False, [97]), (True, [98, 99])]
    assert list(runs(example("a", "x"))) == [(False, [97])]


def test_panel_counts():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(row_panel(example("ask: yes", "     xxx"), Letters(), number=4))
    assert "row 4: 8 tokens, 3 learned" in console.export_text()


def test_rows_are_spread_over_the_lengths():
    lengths = np.arange(100)[::-1]
    assert [int(lengths[row]) for row in spread_rows(lengths, 3)] == [9, 49, 89]
    assert spread_rows(np.array([7]), 3) == [0]


def test_histogram_counts_every_row():
    lengths = np.array([1, 1, 2, 30, 31, 512])
    table = length_histogram(lengths, 512)
    assert sum(int(cell.replace(",", "")) for cell in table.columns[2].cells) == 6
    assert "longest 512" in str(table.title)
