"""The form of every change that this project makes to Megatron-Core or PyTorch.

A patch names the upstream functions that it changes, and the reason, so that it can be removed when upstream
no longer needs it. It is applied only where the source of these functions is one that it was written for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_profit.megatron_patches.upstream.sources import (
    Digests,
    installed_digests,
    installed_folder,
    known_digests,
    version_of_tests,
)

_applied: set[str] = set()


class UnsupportedVersionError(RuntimeError):
    """An upstream package is missing, or differs where a patch changes it."""


@dataclass(frozen=True)
class Patch:
    """One change to upstream code.

    Attributes:
        name: Short identifier, unique over all patches.
        functions: The upstream functions, methods, classes or variables that it replaces, wraps or relies
            on, as "megatron/training/training.py:train" or "torch/a.py:Class.method".
        reason: Why the change is needed.
        apply: Makes the change; called at most once in a process.
    """

    name: str
    functions: tuple[str, ...]
    reason: str
    apply: Callable[[], None]


def apply_patches(patches: tuple[Patch, ...]) -> None:
    """Apply each patch once in this process."""
    for patch in patches:
        if patch.name not in _applied:
            patch.apply()
            _applied.add(patch.name)


def applied_patches() -> frozenset[str]:
    """Return the names of the patches that are active in this process."""
    return frozenset(_applied)


def functions_of(patches: Sequence[Patch]) -> list[str]:
    """Return the upstream functions of patches, each once."""
    return list(dict.fromkeys(function for patch in patches for function in patch.functions))


def check_upstream(patches: Sequence[Patch]) -> list[str]:
    """Compare the installed upstream functions with the ones that the patches were written for.

    Returns:
        A line for each package of another version than the tests ran with, whose functions are known.

    Raises:
        UnsupportedVersionError: A function is missing or differs; all such functions are named.
    """
    known, installed = known_digests(), installed_digests(functions_of(patches))
    for version, digests in installed.items():
        if changed := changed_functions(known, digests):
            raise UnsupportedVersionError(_refusal(version, changed, patches))
    return [
        f"{version} is not the version that the tests ran with ({tested}); its functions that are changed "
        "here are known"
        for version in installed
        if version != (tested := version_of_tests(version))
    ]


def changed_functions(known: Digests, installed: Mapping[str, str]) -> list[str]:
    """Return the functions whose installed source is none of the known ones."""
    accepted = {pair for digests in known.values() for pair in digests.items()}
    return [function for function in installed if (function, installed[function]) not in accepted]


def _refusal(version: str, changed: Sequence[str], patches: Sequence[Patch]) -> str:
    folder = installed_folder(changed[0])
    tested = version_of_tests(version)
    requirement = tested.replace("megatron-core", "megatron-core[training]").replace(" ", "==")
    named = [
        f"{name} in {file} (patch {', '.join(p.name for p in patches if function in p.functions)})"
        for function in changed
        for file, _, name in [function.partition(":")]
    ]
    return (
        f"{version}{f' in {folder}' if folder else ''} is missing functions that are changed here, or has "
        f"other ones than {tested}, for which the changes were written: {', '.join(named)}. Install the "
        f"tested version with: pip install '{requirement}', and take other ones off PYTHONPATH; or review "
        "these functions and accept them with: python -m megatron_profit.megatron_patches --accept"
    )


@contextlib.contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """Replace names of a module by other objects inside the `with` block."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
