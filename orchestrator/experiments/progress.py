"""What is told while an experiment runs. Whoever shows it overrides both methods; this one shows nothing."""


def counted(number: int, what: str) -> str:
    """1 burst, 3 bursts."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class Progress:
    def say(self, text: str) -> None:
        """A line."""

    def step(self, done: int, of: int, what: str) -> None:
        """How far it is."""
