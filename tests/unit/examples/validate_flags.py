"""Megatron's own validation of training commands, on the CPU: reads JSON [[flags, processes], …] from stdin.

Prints one JSON line for each command: null, or what Megatron says against it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

from megatron_profit.sft import start


def complaint(flags: list[str], processes: int) -> str | None:
    """What the training's parser, Megatron's validation or the model configuration say."""
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import unset_global_variables

    from megatron_profit.training.arguments.command_line import provider_of
    from megatron_profit.training.arguments.derive import derive

    os.environ |= {"WORLD_SIZE": str(processes), "RANK": "0", "LOCAL_RANK": "0"}
    try:
        settings = derive(flags, "cpu", processes).with_rows(1000, 0)
        args = parse_and_validate_args(extra_args_provider=provider_of(settings.values))
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    except (AssertionError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        unset_global_variables()
    return None


if __name__ == "__main__":
    results = []
    with contextlib.redirect_stdout(sys.stderr):
        start([])
        for flags, processes in json.load(sys.stdin):
            results.append(complaint(flags, processes))
    for result in results:
        print(json.dumps(result))
