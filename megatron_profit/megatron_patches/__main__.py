"""`python -m megatron_profit.megatron_patches` prints every change made to Megatron-Core or PyTorch."""

from __future__ import annotations

from megatron_profit.megatron_patches import all_patches

for patch in all_patches():
    print(f"{patch.name}\n  {patch.upstream}, {patch.file}\n  {patch.reason}")
