"""The upstream functions that the patches change, known by digests of their source.

A patch was written against functions as they were in one version. In another version it is right only where
they are still the same. The sources are read, not imported: a check comes before Megatron's first import.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import io
import itertools
import json
import re
import runpy
import tokenize
from collections.abc import Collection, Iterable
from hashlib import sha256
from pathlib import Path

from checkpoint_conversion.engine.output import write_file

DIGESTS = Path(__file__).with_name("digests.json")
# The distribution of each package, and the file with its version.
_PACKAGES = {
    "megatron": ("megatron-core", "megatron/core/package_info.py"),
    "torch": ("torch", "torch/version.py"),
}
# The versions of constraints.txt. Digests of others are known, too.
_TESTED = {"megatron-core": "0.19.2", "torch": "2.15.0"}
_DEFINITION = re.compile(r"[ \t]*(def |async def |class )")
_DECORATOR = re.compile(r"[ \t]*@")
type Digests = dict[str, dict[str, str]]


def known_digests() -> Digests:
    """Return the digests that the patches accept: by package and version, then by function.

    For example, `["torch 2.15.0"]["torch/overrides.py:TorchFunctionMode"]` is "0f2d4c6e8a1b".
    """
    return json.loads(DIGESTS.read_text(encoding="utf-8"))


def installed_digests(functions: Iterable[str]) -> Digests:
    """Return the digests of the installed sources, in the form of `known_digests`.

    Args:
        functions: Names such as "megatron/training/training.py:train" or "torch/a.py:Class.method". One
            that is not installed has the digest "".
    """
    found: Digests = {}
    for function in sorted(set(functions)):
        file, _, name = function.partition(":")
        of_package = found.setdefault(installed_version(file.partition("/")[0]), {})
        of_package[function] = source_digest(_source(file), name)
    return found


def accept_installed(functions: Collection[str]) -> None:
    """Add the digests of the installed sources to the known ones; a missing function stays unknown.

    Raises:
        ConversionError: The file with the digests cannot be written.
    """
    digests = {**known_digests(), **installed_digests(functions)}
    for version, found in digests.items():
        digests[version] = {f: found[f] for f in functions if found.get(f)}
    write_file(DIGESTS, (json.dumps(digests, indent=2, sort_keys=True) + "\n").encode())


@functools.cache
def installed_version(package: str) -> str:
    """Return a package ("megatron" or "torch") with the version that an import finds, as "torch 2.15.0".

    A folder on PYTHONPATH decides that, not the installed package. A missing package has the version "none".
    """
    distribution, version_file = _PACKAGES[package]
    path = installed_path(version_file)
    version = "none" if path is None else runpy.run_path(str(path))["__version__"]
    return f"{distribution} {version.partition('+')[0]}"


def version_of_tests(version: str) -> str:
    """Return the version of a package that all tests run with, "torch 2.15.0" for "torch 2.12.0"."""
    package = version.partition(" ")[0]
    return f"{package} {_TESTED[package]}"


def installed_path(file: str) -> Path | None:
    """Return where an import would find a file of a package, "torch/version.py"; None if it is missing.

    `megatron.core` and `megatron.training` may lie in different folders.
    """
    parts = file.split("/")
    depth = 2 if parts[0] == "megatron" else 1
    try:
        spec = importlib.util.find_spec(".".join(parts[:depth]))
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*parts[depth:])
    return path if path.is_file() else None


def installed_folder(function: str) -> Path | None:
    """Return the folder of the package that has a function; None if it is missing."""
    path = installed_path(_PACKAGES[function.partition("/")[0]][1])
    return path and path.parent


@functools.cache
def _source(file: str) -> str:
    path = installed_path(file)
    return "" if path is None else path.read_text(encoding="utf-8")


def source_digest(source: str, name: str) -> str:
    """Return a digest of a function, method, class or variable, without comments, docstrings and layout.

    Args:
        source: The text of its module.
        name: Its name; of a method, "Class.method".

    Returns:
        12 hexadecimal digits; "" if the module does not have it. Several definitions of a name, one for each
        case, count together.
    """
    *outer, last = name.split(".")
    for part in outer:
        source = "".join(_body(source, at) for at in _definitions(source, part))
    words = [_words(_statement(source, at)) for at in _definitions(source, last)]
    return sha256(repr(words).encode()).hexdigest()[:12] if words else ""


def _definitions(source: str, name: str) -> list[int]:
    """Return where the outermost definitions of a name begin, as positions of their lines."""
    found = []
    for match in re.finditer(rf"{re.escape(name)}\b(?=( *(?::|=(?!=)))?)", source):
        start = source.rfind("\n", 0, match.start()) + 1
        before = source[start : match.start()]
        is_assigned = before.isspace() or not before
        if (is_assigned and match[1]) or before.strip() in ("def", "async def", "class"):
            found.append((len(before) - len(before.lstrip()), start))
    return [start for indentation, start in found if indentation == min(found)[0]]


def _body(source: str, start: int) -> str:
    """Return the lines after the first one of a class, up to the next definition that is not in it."""
    line, _, body = source[start:].partition("\n")
    indentation = line[: len(line) - len(line.lstrip())]
    end = re.search(rf"^{indentation}(?:@|def |async def |class )", body, re.MULTILINE)
    return body[: end.start()] if end else body


def _statement(source: str, start: int) -> str:
    """Return a definition that starts at a position, with its decorators."""
    if not _DEFINITION.match(source, start):
        return source[start:].partition("\n")[0]
    before = source[:start].splitlines(keepends=True)
    decorators = itertools.takewhile(_DECORATOR.match, reversed(before))
    block = inspect.getblock(source[start:].splitlines(keepends=True))
    return "".join((*reversed(list(decorators)), *block))


def _words(text: str) -> list[str]:
    """Return the tokens of a definition that Python acts on."""
    words: list[str] = []
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            words.append(tokenize.tok_name[token.type])
        elif token.type == tokenize.NEWLINE:
            is_docstring = [word.type for word in statement] == [tokenize.STRING]
            words.extend([] if is_docstring else [*(word.string for word in statement), "\n"])
            statement = []
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            statement.append(token)
    return words
