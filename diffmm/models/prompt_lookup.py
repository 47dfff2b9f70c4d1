"""Guesses of the next tokens, where a text repeats itself."""

from collections.abc import Iterable

SIZES = (3, 2, 1)
"""Numbers of last tokens that are looked up, in this order."""


class PromptLookup:
    """Guesses the next tokens of a text: those that followed its last few tokens when they occurred
    last before (Saxena 2023, "Prompt Lookup Decoding").

    Args:
        ids: The first tokens of the text.

    >>> PromptLookup([1, 2, 3, 4, 1, 2]).guess(3)
    [3, 4, 1]
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the next token of the text."""
        place = len(self.ids)
        for size in SIZES:
            if size <= place:
                self._followed_at[tuple(self.ids[place - size :])] = place
        self.ids.append(token)

    def guess(self, count: int) -> list[int]:
        """Up to `count` next tokens; none if the last token is new."""
        for size in SIZES:
            place = self._followed_at.get(tuple(self.ids[-size:]))
            if place is not None and size <= len(self.ids):
                return self.ids[place : place + count]
        return []
