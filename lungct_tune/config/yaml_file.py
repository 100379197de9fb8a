"""Reads YAML that a user or a storage brings: nothing in it is repeated, unfolded or endless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from lungct_tune.files import open_file

MOST_BYTES = 500_000
"""Of a YAML file. The parser is slow, and settings have some hundred lines."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, without aliases and double keys.

    Keys stay as they are written, since folders may be named 0, 1 or no.
    """

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):  # an alias in an alias in an alias unfolds without end
            raise ConstructorError(None, None, "aliases (*name) are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            raise ConstructorError(None, None, "a key is no word", key.start_mark)
        if key.value in mapping:
            raise ConstructorError(None, None, f"the key {key.value[:100]!r} is there twice", key.start_mark)
        mapping[key.value] = loader.construct_object(value, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(file: Path) -> Any:
    """The values in a YAML file, see `parse_yaml`.

    Raises:
        OSError: it cannot be opened, or is too long, see `open_file`.
        ValueError: see `parse_yaml`.
    """
    with open_file(file, MOST_BYTES) as stream:
        return parse_yaml(stream.read())


def parse_yaml(content: bytes | str) -> Any:
    """The values in YAML. Keys of mappings are always strings.

    Raises:
        ValueError: it is not YAML, has a key twice or an alias, or is too long or too deep. The message has the line,
            and no text of the content but keys.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"{len(content):,} bytes; at most {MOST_BYTES:,} are read")
    try:
        return yaml.load(content, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        what = "" if isinstance(error, ConstructorError) else "not YAML: "
        raise ValueError(f"{what}{line}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError("brackets in brackets, too deep") from None
