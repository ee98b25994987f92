"""Measure the house: rooms, sizes of files and functions, annotations, and the words of its prose.

    python tools/house.py                     # this tree
    python tools/house.py --against 20f54d5   # and the code lines of an earlier commit

It prints one line for each number, with its limit, and ends with exit code 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

REPOSITORY = Path(__file__).resolve().parents[1]
# Folders of the product, which does not include scripts of developers and benchmarks.
PRODUCT = ("megatron_profit/", "checkpoint_conversion/")
# Users' commands, where they were before they moved into the package.
COMMANDS = (
    *("tools/estimate_memory.py", "tools/plot_run.py", "tools/prepare_data.py"),
    *("tools/run_shape.py", "tools/token_report.py"),
)
# One file for each paper.
ANY_NUMBER_OF_FILES = "megatron_profit/objectives"
MOST_OFTEN_PER_10_000 = dict.fromkeys(
    ("beside", "behind", "those of", "that of", "what is", "what it", "nothing"), 3.0
)
LEAST_OFTEN_PER_10_000 = {"for example": 8.0}
# The package whose rooms are checked for circles.
_HALL = "megatron_profit.training."
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Number:
    """A measured number and its limit.

    Attributes:
        name: The thing that was counted.
        value: The number.
        limit: The largest value allowed, or the smallest if `at_least` is set; None for no limit.
        where: The place of the largest value, if it has one.
    """

    name: str
    value: float
    limit: float | None = None
    at_least: bool = False
    where: str = ""

    @property
    def is_kept(self) -> bool:
        """True if the limit is kept."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = (
            ""
            if self.limit is None
            else f"  (at {'least' if self.at_least else 'most'} {self.limit:g})"
        )
        mark = " " if self.is_kept else "!"
        place = f"  {self.where}" if self.where else ""
        return f"{mark} {self.value:10.4g}  {self.name}{bound}{place}"


def code_lines(text: str) -> int:
    """Count the lines that hold code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*skipped, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in docstring_nodes(ast.parse(text)):
        lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def docstring_nodes(tree: ast.AST) -> Iterator[ast.Expr]:
    """Yield the expressions that are docstrings."""
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
            and ast.get_docstring(node) is not None
        ):
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield first


def product_files(names: Iterable[str]) -> list[str]:
    """Keep the names of the product's Python files, users' commands included."""
    return [
        name
        for name in names
        if name.endswith(".py") and (name.startswith(PRODUCT) or name in COMMANDS)
    ]


def files_of_commit(commit: str) -> dict[str, str]:
    """Return the product's files of a commit: their text by name."""
    archive = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", commit], check=True, capture_output=True
    ).stdout
    found: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for name in product_files(tar.getnames()):
            content = tar.extractfile(name)
            if content is not None:
                found[name] = content.read().decode("utf-8")
    return found


def files_here() -> dict[str, str]:
    """Return the product's files of this tree: their text by name."""
    every = (
        str(file.relative_to(REPOSITORY)) for file in REPOSITORY.rglob("*.py") if not _hidden(file)
    )
    return {name: (REPOSITORY / name).read_text("utf-8") for name in sorted(product_files(every))}


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(REPOSITORY).parts)


def sizes(files: Mapping[str, str]) -> Iterator[Number]:
    """Measure files and folders."""
    lengths = {name: text.count("\n") for name, text in files.items()}
    longest = max(lengths, key=lengths.__getitem__)
    yield Number("lines of the longest file", lengths[longest], 450, where=longest)
    folders = Counter(str(Path(name).parent) for name in files if name.startswith(PRODUCT))
    folders.pop(ANY_NUMBER_OF_FILES)
    fullest = max(folders, key=folders.__getitem__)
    yield Number("files of the fullest folder", folders[fullest], 12, where=fullest)


def functions(files: Mapping[str, str]) -> Iterator[Number]:
    """Measure functions: their lines, annotations and docstrings."""
    lengths: dict[str, int] = {}
    bare: list[str] = []
    for name, text in files.items():
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                lengths[f"{name}:{node.lineno}"] = (
                    (node.end_lineno or node.lineno) - node.lineno + 1
                )
        bare += [f"{name}:{line}" for line in _bare(tree)]
    longest = max(lengths, key=lengths.__getitem__)
    yield Number("lines of a function, median", median(lengths.values()), 8)
    yield Number("lines of a function, 99th percentile", quantiles(lengths.values(), n=100)[98], 50)
    yield Number("lines of the longest function", lengths[longest], where=longest)
    where = bare[0] if bare else ""
    yield Number(
        "public functions and classes without annotation or docstring", len(bare), 0, where=where
    )


def _bare(tree: ast.Module) -> Iterator[int]:
    """Yield the lines of public definitions at the top of a module and of its public classes' methods."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_"):
            yield from () if ast.get_docstring(node) and _annotated(node) else (node.lineno,)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, FUNCTIONS) and not _annotated(method):
                    yield method.lineno


def _annotated(node: ast.stmt) -> bool:
    if not isinstance(node, FUNCTIONS):
        return True
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    given = [a for a in arguments if a.arg not in ("self", "cls")]
    return node.returns is not None and all(a.annotation is not None for a in given)


def arrows(files: Mapping[str, str]) -> set[tuple[str, str]]:
    """Return the pairs of rooms of `training` in which the first imports the second."""
    modules = {
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): text
        for name, text in files.items()
    }
    found: set[tuple[str, str]] = set()
    for module, text in modules.items():
        here = _room(module)
        for node in ast.walk(ast.parse(text)) if here else ():
            if isinstance(node, ast.ImportFrom) and node.module:
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [name if name in modules else node.module for name in named]
                found |= {
                    (here, room) for name in targets if (room := _room(name)) not in ("", here)
                }
    return found


def _room(module: str) -> str:
    return module.removeprefix(_HALL).split(".")[0] if module.startswith(_HALL) else ""


def has_circle(pairs: set[tuple[str, str]]) -> bool:
    """Return whether rooms import each other in a circle."""
    left = set(pairs)
    while left:
        sources = {a for a, _ in left}
        kept = {(a, b) for a, b in left if b in sources}
        if kept == left:
            return True
        left = kept
    return False


def prose(files: Mapping[str, str]) -> str:
    """Join docs, README, docstrings and messages in one text."""
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    parts = [re.sub(r"```.*?```", " ", page.read_text("utf-8"), flags=re.S) for page in pages]
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                parts.append(node.value)
    return " ".join(parts).lower()


def words(text: str) -> Iterator[Number]:
    """Measure how often some words occur in 10,000."""
    total = len(re.findall(r"[a-z]+", text))
    for limits, at_least in ((MOST_OFTEN_PER_10_000, False), (LEAST_OFTEN_PER_10_000, True)):
        for phrase, limit in limits.items():
            count = len(re.findall(rf"\b{phrase.replace(' ', r'\s+')}\b", text))
            rate = round(count * 10_000 / total, 1)
            yield Number(f"'{phrase}' in 10,000 words", rate, limit, at_least)


def main() -> int:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description="Measure the house: rooms, sizes and words.")
    parser.add_argument(
        "--against", metavar="COMMIT", help="compare the code lines with a commit's"
    )
    commit = parser.parse_args().against
    files = files_here()
    lines = sum(map(code_lines, files.values()))
    numbers = [Number("lines of code of the product", lines)]
    if commit is not None:
        before = sum(map(code_lines, files_of_commit(commit).values()))
        numbers.append(Number(f"% of the lines of code of {commit}", 100 * lines / before))
    pairs = arrows(files)
    numbers += [*sizes(files), *functions(files)]
    numbers.append(Number("arrows between the rooms of training", len(pairs), 25))
    numbers.append(Number("circles of rooms in training", int(has_circle(pairs)), 0))
    numbers += words(prose(files))
    print("\n".join(map(str, numbers)))
    return 0 if all(number.is_kept for number in numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
