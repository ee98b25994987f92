"""Run `megatron-profit estimate …` as `python tools/estimate_memory.py …`."""

import sys

from megatron_profit.commands.estimate_memory import main

if __name__ == "__main__":
    sys.exit(main())
