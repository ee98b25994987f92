"""Run `megatron-profit report …` as `python tools/token_report.py …`."""

import sys

from megatron_profit.commands.token_report import main

if __name__ == "__main__":
    sys.exit(main())
