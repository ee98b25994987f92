"""Run `megatron-profit data …` as `python tools/prepare_data.py …`."""

from checkpoint_conversion.cli import run
from megatron_profit.commands.prepare_data import main

if __name__ == "__main__":
    run(main)
