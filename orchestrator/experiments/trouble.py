"""Why an experiment can not be, or can not go on: words for people, with the mend."""

from collections.abc import Sequence


class Trouble(Exception):
    """`lines`: more of it, each on a line of its own."""

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message, self.lines = message, tuple(lines)
