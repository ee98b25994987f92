"""Run `megatron-profit plot …` as `python tools/plot_run.py …`."""

import sys

from megatron_profit.commands.plot_run import main

if __name__ == "__main__":
    sys.exit(main())
