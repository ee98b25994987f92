"""`python tools/token_report.py …` is `megatron-profit report …`."""

import sys

from megatron_profit.commands.token_report import main

if __name__ == "__main__":
    sys.exit(main())
