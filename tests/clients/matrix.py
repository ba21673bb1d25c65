"""Which client does what, as the tests say it: a column is a file of tests and the version it runs against, a row is the name of a test."""

import ast
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = {
    "openai 3": "test_openai.py",
    "openai 2": "test_openai.py",
    "LiteLLM": "test_litellm.py",
    "llm": "test_llm.py",
    "anthropic": "test_anthropic.py",
    "curl": "test_curl.py",
    "websockets": "test_realtime.py",
}
OLDER = ("test_openai.py", "test_litellm.py")  # those that also, or only, run against older.txt


def tests_of(file: str) -> list[str]:
    found = ast.parse((HERE / file).read_text()).body
    return [node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def row(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def table() -> list[str]:
    """The lines of the table in docs/clients.md."""
    rows = dict.fromkeys(row(test) for file in COLUMNS.values() for test in tests_of(file))
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + ":-:|" * len(COLUMNS)]
    for name in rows:
        cells = ("✓" if name in map(row, tests_of(file)) else "" for file in COLUMNS.values())
        lines.append(f"| {name} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
