"""Logits of given tokens, computed by Megatron: `python -m megatron_profit.logits …`, also under torchrun.

    python -m megatron_profit.logits --tokens tokens.pt --logits logits.pt --hf-model DIR --load DIR

Weights, layout and precision come from the flags of `megatron_profit.sft`; `checkpoint_conversion.verify
--logits` compares the result with transformers'.
"""

from __future__ import annotations

import sys

from megatron_profit.sft import start


def main() -> None:
    """Compute the logits with the flags of the command line."""
    argv = sys.argv[1:]
    device = start(argv)

    from megatron_profit.commands.logits import run

    run(argv, device)


if __name__ == "__main__":
    main()
