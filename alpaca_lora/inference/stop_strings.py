"""Stop texts in a stream: text is let through only when it can no longer be a part of a stop text. Knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Hold back what may turn out to be a stop text; `push` until `found`, then or at the end `flush`."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is now certain. When a stop text was found: what stood before it, and nothing ever after."""
        if self.found:
            return ""
        if not self.stops:
            return text
        self._held += text
        starts = [start for stop in self.stops if (start := self._held.find(stop)) >= 0]
        if starts:
            # the leftmost stop text wins, whatever the order in which they were given
            certain, self._held, self.found = self._held[: min(starts)], "", True
            return certain
        num_held = max(self._num_open(stop) for stop in self.stops)
        cut = len(self._held) - num_held
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def flush(self) -> str:
        """The rest, when the answer ended without a stop text."""
        rest, self._held = self._held, ""
        return rest

    def _num_open(self, stop: str) -> int:
        """The most characters at the end of the held text that a stop text begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
