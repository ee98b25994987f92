"""The form of every change that this project makes to Megatron-Core or PyTorch.

A patch names what it changes, in which upstream version and file, and why, so that it can be removed
when upstream no longer needs it. Patches are applied only to the versions that they were written for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

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
    """Names of the patches that are active in this process."""
    return frozenset(_applied)


def check_megatron_version() -> None:
    """Refuse a Megatron-Core that the patches were not written for.

    Raises:
        UnsupportedVersionError: When megatron-core is missing or has another version.
    """
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        found = "none"
    if found != MEGATRON_CORE_VERSION:
        raise UnsupportedVersionError(
            f"megatron-core {MEGATRON_CORE_VERSION} is needed, found {found}: the changes in "
            "megatron_profit/backends are written against that version. "
            f"Install it with: pip install 'megatron-core[training]=={MEGATRON_CORE_VERSION}'"
        )
