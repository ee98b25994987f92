"""`python -m megatron_profit.megatron_patches` prints every change made to Megatron-Core or PyTorch.

With `--check` it prints the upstream functions that differ in the installed versions, with their digests.
With `--accept` it also takes them as reviewed.
"""

from __future__ import annotations

import argparse

from checkpoint_conversion.errors import ConversionError
from megatron_profit.megatron_patches import all_patches
from megatron_profit.megatron_patches.patch import changed_functions, functions_of
from megatron_profit.megatron_patches.upstream.sources import (
    DIGESTS,
    accept_installed,
    installed_digests,
    known_digests,
)


def main() -> None:
    """Print the patches, or compare them with the installed versions."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_profit.megatron_patches", description=__doc__.partition("\n\n")[2]
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="print the functions that differ")
    choice.add_argument(
        "--accept",
        action="store_true",
        help=f"accept the installed functions; writes {DIGESTS.name} in the package",
    )
    args = parser.parse_args()
    if args.check or args.accept:
        _compare()
    else:
        for patch in all_patches():
            print(f"{patch.name}\n  {', '.join(patch.functions)}\n  {patch.reason}")
    if args.accept:
        try:
            accept_installed(functions_of(all_patches()))
        except ConversionError as error:
            parser.error(str(error))


def _compare() -> None:
    known = known_digests()
    for version, digests in installed_digests(functions_of(all_patches())).items():
        changed = changed_functions(known, digests)
        print(f"{version}: {len(digests) - len(changed)} of {len(digests)} functions are known")
        for function in changed:
            print(f"  {function} is {digests[function] or 'missing'}")


if __name__ == "__main__":
    main()
