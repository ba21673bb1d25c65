"""`python -m tests.docs` writes what of docs/settings.md and docs/cli.md comes from the code; test_docs.py asks whether it is current."""

from tests.docs import cli_page, settings_page
from tests.docs.pages import ROOT, with_made

MADE = {"docs/settings.md": settings_page.made, "docs/cli.md": cli_page.made}


def current(page: str) -> str:
    """The page as it should be now: what people wrote of it, then what the code says."""
    return with_made((ROOT / page).read_text(), MADE[page]())


if __name__ == "__main__":
    for page in MADE:
        (ROOT / page).write_text(current(page))
        print(page)
