import numpy as np
from rich.console import Console

from alpaca_lora.data.example import TokenizedExample
from alpaca_lora.data.preview import (
    LEARNED,
    SEEN,
    class_counts_table,
    coloured,
    length_histogram,
    row_panel,
    runs,
    spread_rows,
)


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


def test_a_text_to_classify_shows_its_label_and_the_token_it_is_read_at():
    row = TokenizedExample(np.array([102, 111, 46], np.int32), np.array([False, False, True]), 0, 1)
    text = coloured(row, Letters())
    assert [(text.plain[s.start : s.end], s.style) for s in text.spans] == [("fo", SEEN), (".", LEARNED)]
    panel = row_panel(row, Letters(), number=4, labels=("no", "[yes]"))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(panel)
    assert "row 4: 3 tokens, label '[yes]', read at the last token" in console.export_text()
    assert list(runs(TokenizedExample(np.array([97], np.int32), np.array([True]), 0, 0))) == [(True, [97])]


def test_classes_are_counted_in_a_table():
    table = class_counts_table(("a", "b"), (1200, 3), (7, 0))
    assert [list(column.cells) for column in table.columns] == [["a", "b"], ["1,200", "3"], ["7", "0"]]
    many = class_counts_table([str(i) for i in range(100)], [1] * 100)
    assert list(many.columns[0].cells)[-1] == "60 more" and list(many.columns[1].cells)[-1] == "60"
