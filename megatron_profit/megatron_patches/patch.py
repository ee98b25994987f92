"""The form of every change that this project makes to Megatron-Core or PyTorch.

A patch names its upstream version and file, and the reason of the change, so that it can be removed when
upstream no longer needs it. Patches are applied only to the versions that they were written for.
"""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEGATRON_CORE_VERSION = "0.19.2"
_applied: set[str] = set()


class UnsupportedVersionError(RuntimeError):
    """An upstream package is missing or has another version than the patches were written for."""


@dataclass(frozen=True)
class Patch:
    """One change to upstream code.

    Attributes:
        name: Short identifier, unique over all patches.
        upstream: Package and version that the patch was written for.
        file: The upstream file whose behaviour changes.
        reason: Why the change is needed.
        apply: Makes the change; called at most once in a process.
    """

    name: str
    upstream: str
    file: str
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


def check_megatron_version() -> None:
    """Refuse a Megatron-Core that the patches were not written for.

    Raises:
        UnsupportedVersionError: When megatron-core is missing or has another version.
    """
    spec = (
        importlib.util.find_spec("megatron.core") if importlib.util.find_spec("megatron") else None
    )
    found, where = "none", ""
    if spec is not None and spec.origin is not None:
        # The module that will be imported, which a folder on PYTHONPATH decides and not the installed
        # package.
        file = Path(spec.origin).with_name("package_info.py")
        found, where = runpy.run_path(str(file))["__version__"], f" in {file.parent}"
    if found.partition("+")[0] != MEGATRON_CORE_VERSION:
        raise UnsupportedVersionError(
            f"megatron-core {MEGATRON_CORE_VERSION} is needed, found {found}{where}: the changes in "
            "megatron_profit/megatron_patches are written against that version. "
            f"Install it with: pip install 'megatron-core[training]=={MEGATRON_CORE_VERSION}'"
            + (", or take the other one off PYTHONPATH" if where else "")
        )


class replaced:
    """Replaces names of a module by other objects inside the `with` block."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module, self._names = module, names
        self._before: Mapping[str, Any] = {}

    def __enter__(self) -> None:
        self._before = {name: getattr(self._module, name) for name in self._names}
        for name, value in self._names.items():
            setattr(self._module, name, value)

    def __exit__(self, *error: object) -> None:
        for name, value in self._before.items():
            setattr(self._module, name, value)
