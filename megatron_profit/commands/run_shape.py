"""A training command as a run's shape, read by the training's own parser.

So the estimates refuse the same flags as the training, follow its defaults, and take either a command line
or a published model with a layout.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Sequence

from megatron_profit.estimates.published import published_config
from megatron_profit.estimates.run_shape import RunShape, ShapeError, model_arguments

# Flags that the parser needs and that have no meaning for an estimate.
_UNIMPORTANT = {"--data": "none.jsonl", "--lr": "1e-5", "--train-iters": "1", "--objective": "sft"}
# Flags of which each says how long a run is.
_SPANS = {"--train-iters", "--epochs", "--train-samples"}


def read_run(argv: Sequence[str], gpus: int, model: str | None = None) -> RunShape:
    """Read a command line as the training would on machines with GPUs.

    Args:
        argv: The training's flags. Flags that only the training needs may be left out.
        gpus: Number of processes.
        model: A published model, in place of --hf-model.

    Raises:
        ShapeError: The estimates do not cover a setting.
        ArgumentsError: The training would refuse the flags.
        ConversionError: The folder has no usable config.json.
    """
    # Megatron's import warns of libraries that this machine lacks, and an estimate is about another machine.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_profit.training.arguments.derive import derive

    given = {word.partition("=")[0] for word in argv}
    if model is not None and "--hf-model" in given:
        raise ShapeError("--model and --hf-model contradict each other; give one of them")
    argv, config = list(argv), None
    if given & _SPANS:
        given |= _SPANS
    for flag, value in _UNIMPORTANT.items():
        if flag not in given:
            argv += [flag, value]
    if model is not None:
        argv += ["--hf-model", model]
        config = published_config(model)
    settings = derive(argv, "cuda", gpus, config)
    arguments = {**model_arguments(settings.config), **vars(settings.namespace)}
    return RunShape(Namespace(**arguments), gpus)
