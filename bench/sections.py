"""Parts of a Markdown file that a command writes, between markers, amid what is written by hand."""

import re

MARKERS = "<!-- {}: begin -->", "<!-- {}: end -->"


def with_section(text: str, name: str, section: str) -> str:
    """A file's text with the section between the markers of this name replaced.

    Raises:
        ValueError: the markers are missing.
    """
    begin, end = (marker.format(name) for marker in MARKERS)
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the text must have the lines {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{section}\n\n{end}", text)
