"""YAML files as users write them: read whole, within limits, or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tinymim_fast.errors import InputError

MAX_BYTES = 1 << 20
MAX_ALIASES = 20  # each may double what it names: a file of a line can mean gigabytes


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, in UTF-8 with or without a byte-order mark.

    Args:
        path: a regular file of at most 1 MiB.

    Raises:
        InputError: it can't be read, is no YAML, holds something else than keys and values, a key twice or an empty
            one, or more aliases than a file written by hand has; names file and line.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file", argument="path")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(
                f"{path}: {path.stat().st_size} bytes, want a YAML file of at most {MAX_BYTES}", argument="path"
            )
        text = path.read_text(encoding="utf-8-sig")
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader))
        if aliases > MAX_ALIASES:
            raise InputError(
                f"{path}: {aliases} aliases (*name), want at most {MAX_ALIASES}; write the values out", argument="path"
            )
        root = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            what = "is empty" if root is None else "holds a list" if root.tag.endswith(":seq") else "holds one value"
            raise InputError(f"{path}: {what}, want lines of the form `key: value`", argument="path")
        _refuse_repeated_keys(root, path, set())
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {_reason(error)}", argument="path") from error


def _refuse_repeated_keys(node: yaml.Node, path: Path, seen: set[int]) -> None:
    """YAML forbids them, and PyYAML takes the last without a word."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    children = node.value
    if isinstance(node, yaml.MappingNode):
        keys: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise InputError(f"{path}, line {line}: the key {name!r} is no text", argument="path")
            if name in keys:
                raise InputError(
                    f"{path}, line {line}: {name} stands here and in line {keys[name]}; leave one out", argument="path"
                )
            keys[name] = line
        children = [value for _, value in node.value]
    for child in children:
        _refuse_repeated_keys(child, path, seen)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start}); save it as UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deep"
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"no YAML in line {mark.line + 1}: {error.problem}"
    return re.sub(r"\s+", " ", getattr(error, "strerror", None) or str(error))
