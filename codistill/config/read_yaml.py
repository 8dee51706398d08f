"""A YAML file as plain values, without the parts of YAML that say one thing and mean another."""

from pathlib import Path
from typing import Any, NoReturn

import yaml

from codistill.config.base import ConfigError, require

LARGEST_FILE = 100_000  # bytes; the largest preset has 2 thousand


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ConfigError: the file is missing, no text, too large or no YAML, or it has something that
            `PlainLoader` refuses.
    """
    path = path.expanduser()
    key, name = "--config", str(path)
    require(path.is_file(), key, name, "a YAML file that exists")
    try:
        require(path.stat().st_size <= LARGEST_FILE, key, name, f"at most {LARGEST_FILE} bytes")
        content = yaml.load(path.read_text(encoding="utf-8-sig"), PlainLoader)
    except RecursionError as error:
        raise ConfigError(f"{key} = {name!r}: expected YAML of few levels") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        expected = f"YAML in UTF-8: {' '.join(str(error).split())}"
        raise ConfigError(f"{key} = {name!r}: expected {expected}") from error
    require(isinstance(content, dict), key, name, "a YAML file with section: keys")
    return content


class PlainLoader(yaml.SafeLoader):
    """YAML in which a number is what it looks like, a key is a text that occurs once, and nothing
    is repeated by reference.

    YAML 1.1 reads 1:40 as 100 and 010 as 8, and lets a second section of a name replace the first.
    References (`*name`) can make a few lines grow into gigabytes.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            refuse(self.peek_event(), "a reference (*name)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = key.value
            if key.tag != "tag:yaml.org,2002:str":
                refuse(key, f"the key {name!r}, which is no text")
            if name in seen:
                refuse(key, f"the key {name!r} a second time")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        is_int = node.tag == "tag:yaml.org,2002:int"
        try:
            # With base 0, int reads decimal, 0x and 0b, but no number with a leading zero.
            return int(node.value, 0) if is_int else float(node.value)
        except ValueError:
            refuse(node, f"the number {node.value[:50]!r}, which is no plain one")


for kind in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{kind}", PlainLoader.construct_number)


def refuse(found: Any, what: str) -> NoReturn:
    """Raise YAMLError about a node or event."""
    raise yaml.constructor.ConstructorError(None, None, f"found {what}", found.start_mark)
