"""A YAML loader that refuses a name which stands twice: the last one would win in silence."""

from __future__ import annotations

from typing import Any

import yaml


class RepeatedNameError(ValueError):
    """A name stands twice in a section."""


class NamesOnceLoader(yaml.SafeLoader):
    """Makes no objects but data, and refuses a name that stands twice in a section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See yaml.

        Raises:
            RepeatedNameError: A name stands twice.
        """
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                line = node.start_mark.line + 1
                raise RepeatedNameError(
                    f"{name!r} stands twice in the section of line {line}; drop one"
                )
        return super().construct_mapping(node, deep)
