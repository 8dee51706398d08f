"""What the pages need besides mkdocs itself."""

import re

OF_REPOSITORY = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """A link to a file outside docs/ works in the repository only: here its text is left."""
    return OF_REPOSITORY.sub(r"`\1`", markdown)
