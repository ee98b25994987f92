"""`python -m megatron_profit COMMAND …` is `megatron-profit COMMAND …`."""

from megatron_profit.commands.cli import main

if __name__ == "__main__":
    main()
