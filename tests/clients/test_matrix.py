"""docs/clients.md says of each client what its tests say."""

from pathlib import Path

from tests.clients import matrix, older

PAGE = (Path(__file__).parents[2] / "docs/clients.md").read_text()


def test_the_table_in_the_docs_is_that_of_the_tests() -> None:
    written = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert written == matrix.table(), "python -m tests.clients.matrix prints it"


def test_the_pinned_versions_are_named() -> None:
    pins = [line for line in older.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if f"`{pin}`" not in PAGE] == []
