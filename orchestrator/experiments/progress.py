"""What is told while an experiment runs. Whoever shows it overrides both; this one shows nothing."""


class Progress:
    def say(self, text: str) -> None:
        """A line."""

    def step(self, done: int, of: int, what: str) -> None:
        """How far it is."""
