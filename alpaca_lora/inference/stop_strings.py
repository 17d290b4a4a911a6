"""Stop texts in a stream: text is let through only when it can no longer be a part of a stop text. Knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Hold back what may turn out to be a stop text; `push` until `found`, then or at the end `flush`.

    The stop text that is complete first ends the stream, of several that end in one place the longest: the same however
    the text is cut into pieces. Time is linear in the text for each stop text, whatever its length (Knuth, Morris and
    Pratt 1977).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""
        self._borders = [_borders(stop) for stop in self.stops]
        # how many characters of each stop text the text so far ends with
        self._num_open = [0] * len(self.stops)

    def push(self, text: str) -> str:
        """The text that is now certain. When a stop text was found: what stood before it, and nothing ever after."""
        if self.found:
            return ""
        if not self.stops:
            return text
        for place, character in enumerate(text):
            length = self._take(character)
            if length:
                seen = self._held + text[: place + 1]
                self._held, self.found = "", True
                return seen[: len(seen) - length]
        seen = self._held + text
        cut = len(seen) - max(self._num_open)
        certain, self._held = seen[:cut], seen[cut:]
        return certain

    def flush(self) -> str:
        """The rest, when the answer ended without a stop text."""
        rest, self._held = self._held, ""
        return rest

    def _take(self, character: str) -> int:
        """One more character; the length of the stop text that it completes, or 0."""
        completed = 0
        for number, stop in enumerate(self.stops):
            num_open, borders = self._num_open[number], self._borders[number]
            while num_open and stop[num_open] != character:
                num_open = borders[num_open - 1]
            num_open += stop[num_open] == character
            self._num_open[number] = num_open
            if num_open == len(stop):
                completed = max(completed, num_open)
        return completed


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`: the length of its longest proper beginning that it also ends with."""
    borders = [0] * len(stop)
    length = 0
    for place in range(1, len(stop)):
        while length and stop[place] != stop[length]:
            length = borders[length - 1]
        length += stop[place] == stop[length]
        borders[place] = length
    return borders
