"""The command line: this project's flags next to every native Megatron flag, and the values derived from
them.

`read_arguments` looks at the flags before Megatron starts. It derives the architecture from the HuggingFace
folder. It refuses flags that contradict the architecture or would be ignored. It leaves Megatron a parser
with new defaults: Megatron then parses the same command line itself.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint_conversion.families import family_for
from checkpoint_conversion.families.config import ConfigReader
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf.model import HFModel
from checkpoint_conversion.hf.output import HFOutput
from checkpoint_conversion.hf.stop_tokens import plan_stop_tokens
from megatron_profit.data import DataOptions
from megatron_profit.objectives import Objective, ScheduledObjective
from megatron_profit.training.arguments.command_line import (
    CommandLine,
    add_arguments,
    parse_command_line,
)
from megatron_profit.training.arguments.disk import (
    check_logs,
    metrics_file,
    open_hf_weights,
    open_reference,
    plan_export,
)
from megatron_profit.training.arguments.errors import ArgumentsError
from megatron_profit.training.arguments.length import (
    batch_size_changes,
    check_run_steps,
    scheduler_of_flags,
    steps_of_flags,
)
from megatron_profit.training.arguments.native_flags import check_native_flags
from megatron_profit.training.arguments.parallel_layout import check_layout
from megatron_profit.training.arguments.platform import platform_settings
from megatron_profit.training.arguments.refused import OTHER_ARCHITECTURES, check_given
from megatron_profit.training.checkpoints.choose import Resumed
from megatron_profit.training.checkpoints.keep_options import KeepOptions, keep_options
from megatron_profit.training.monitoring.guards import GuardOptions
from megatron_profit.training.statistics.old_policy import check_old_policy
from megatron_profit.training.step import experts
from megatron_profit.training.step.objective_flags import (
    check_objective,
)

# Conventions of this entry that a flag may still change.
_DEFAULTS = {
    "make_vocab_size_divisible_by": 1,
    "log_interval": 1,
    "save_interval": 500,
    "eval_interval": 100,
    "exit_signal_handler": True,
    # Megatron's reruns find broken hardware: they leave out the first step and end a run with a checkpoint
    # that another GPU has to continue from. Faults of data or model are for our guards.
    "rerun_mode": "disabled",
}


@dataclass(frozen=True)
class SFTArguments:
    """The facts that must be known before Megatron starts.

    Attributes:
        hf_model: HuggingFace folder that gives the architecture and the tokenizer.
        data: The options of the data flags.
        check_steps: Refuses a number of steps in which warm-ups or schedules would not end.
        epochs: Epochs to train, where the flags give no iterations or samples.
        defaults: Values that replace the defaults of Megatron's parser.
        settings: All arguments by name, as far as the flags tell.
        batch_size, eval_batch_size: Rows of one iteration over all ranks.
        eval_iters: Evaluation iterations that were asked for; None for all of the validation data.
        hf_weights: The folder's weights if the run starts from them; None if it starts from a checkpoint or
            from random weights.
        export: The HuggingFace folder to write at the end, if any.
        reference: The reference model and the folder of its log-probabilities, if it is needed.
        save: The folder of checkpoints, if any.
        keep: Options on the checkpoints that stay and on an early stop.
        metrics_file: The file for metrics as JSON lines, if any.
    """

    hf_model: Path
    data: DataOptions
    check_steps: Callable[[int], None]
    epochs: int | None
    defaults: Mapping[str, Any]
    settings: Mapping[str, Any]
    batch_size: int
    eval_batch_size: int
    eval_iters: int | None
    hf_weights: HFModel | None
    export: HFOutput | None
    reference: tuple[HFModel, Path] | None
    save: Path | None
    keep: KeepOptions
    metrics_file: Path | None

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, from its beginning; None where the batch size changes on the way."""
        derived = self.defaults.get("train_iters")
        if derived is not None:
            return derived
        return steps_of_flags(self.settings, self.batch_size)

    @property
    def namespace(self) -> argparse.Namespace:
        """All arguments by name, as Megatron will get them."""
        derived = {k: v for k, v in self.defaults.items() if self.settings.get(k) is None}
        return argparse.Namespace(**{**self.settings, **derived})

    def add_to_parser(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Return Megatron's `extra_args_provider`."""
        parser = add_arguments(parser)
        parser.set_defaults(**self.defaults)
        return parser

    def with_rows(
        self, epochs_rows: int | None, valid_rows: int, resumed: Resumed | None = None
    ) -> SFTArguments:
        """Return these arguments with the number of iterations and of evaluation iterations.

        Where epochs were asked for, there are as many iterations as the rows of all epochs need. Evaluations
        see each validation row once, unless --eval-iters says otherwise. For example, 2 epochs of 1,000 rows
        with a batch size of 32 need 63 iterations.

        Args:
            epochs_rows: Rows of all epochs; None where the length of the run is not given in epochs.
            valid_rows: Rows of an evaluation.
            resumed: The checkpoint that the run resumes, if any.

        Raises:
            ArgumentsError: A warm-up takes all iterations, or the iterations cannot be counted.
        """
        iters = self.eval_iters
        if iters is None:
            iters = math.ceil(valid_rows / self.eval_batch_size)
        iterations, rows = (0, 0) if resumed is None else resumed.done
        first_step = 1 if resumed is None else resumed.iteration + 1
        defaults = {**self.defaults, "eval_iters": iters, "first_step": first_step}
        if epochs_rows is not None:
            steps = max(iterations + math.ceil((epochs_rows - rows) / self.batch_size), 0)
            defaults["train_iters"] = steps
            self.check_steps(max(steps, iterations))  # `check_length` refuses fewer than are done
        if rows != iterations * self.batch_size and not batch_size_changes(self.settings):
            defaults |= self._with_another_batch_size(iterations, rows, defaults.get("train_iters"))
        return replace(self, defaults=defaults)

    def with_turn_end(self, token: int | None, tell: Callable[[str], None]) -> SFTArguments:
        """Return these arguments with an export whose generation stops at the token that ends a turn in
        training.

        Args:
            token: Id of the token that ends a turn; None where the chat template ends it in ordinary text.
            tell: Gets a line of text where the files of the model name no such token.

        Raises:
            ConversionError: A file of the model has stop tokens that are not token ids.
        """
        if token is None:
            tell(
                "> warning: the chat template ends a turn with ordinary text, so no token stops the trained "
                "model; give that text as a stop string to the program that generates"
            )
        stops = plan_stop_tokens(self.hf_model, read_hf_config(self.hf_model), token)
        if stops.added is not None:
            tell(f"> in an export, {stops}")
        return self if self.export is None else replace(self, export=self.export.stopping_at(token))

    def _with_another_batch_size(
        self, iterations: int, rows: int, epochs_iters: int | None
    ) -> dict[str, int]:
        """Return arguments that keep the end of the learning rate's schedule at the end of the run.

        This matters for a run that resumes with batches of another size. Megatron counts the schedule in
        rows, as if all batches had the size of now.
        """
        samples, train_iters = self.settings["train_samples"], self.settings["train_iters"]
        if samples is not None:
            more = math.ceil((samples - rows) / self.batch_size)
            raise ArgumentsError(
                f"--train-samples {samples} cannot be counted in batches of two sizes: the checkpoint has "
                f"taken {rows} rows in {iterations} steps, and --global-batch-size is {self.batch_size} now; "
                f"give --train-iters {iterations + more} in place of it"
            )
        if self.settings["lr_decay_iters"] is not None:
            return {}
        steps = train_iters if epochs_iters is None else epochs_iters
        left = max(steps - iterations, 0)
        return {"lr_decay_iters": math.ceil(rows / self.batch_size) + left}


def read_arguments(argv: list[str], device: str) -> SFTArguments:
    """Check the flags of a command line and derive what Megatron needs.

    Args:
        argv: The flags, without the program's name.
        device: "cuda" or "cpu", as `megatron_profit.megatron_patches.activate` chose it.

    Raises:
        ArgumentsError: For flags that are missing, contradict each other or would be ignored.
        ConversionError: For a HuggingFace folder that is missing, broken or of an unknown
            architecture, or a checkpoint of another architecture.
    """
    flags = parse_command_line(argv)
    check_given(flags)
    explicit, hf_model = flags.explicit, Path(flags.explicit["hf_model"])
    config = read_hf_config(hf_model)
    fixed, soft = platform_settings(device, local=explicit.get("transformer_impl") == "local")
    flags.refuse_contradictions(fixed, "this machine needs")
    soft = {**_DEFAULTS, **soft, **scheduler_of_flags(explicit)}
    if config.get("initializer_range") is not None:
        read = ConfigReader(config, "every family")
        soft["init_method_std"] = read.number("initializer_range", at_least=0.0)
    model = _model_settings(flags, config, hf_model / "config.json")

    settings = {**flags.defaults, **model, **soft, **fixed, **explicit}
    soft |= experts.expert_defaults(settings)
    settings = {**settings, **soft, **fixed, **explicit}
    try:
        check_native_flags(settings, flags.option)
        GuardOptions.from_settings(settings)
    except ValueError as error:
        raise ArgumentsError(str(error)) from error
    check_logs(settings)
    data_parallel = check_layout(settings, int(os.environ.get("WORLD_SIZE", "1")))
    hf_weights = open_hf_weights(settings, config)
    multiple = settings["tensor_model_parallel_size"] * settings["make_vocab_size_divisible_by"]
    options, objective = _objective(settings, explicit)
    batch_size = settings["global_batch_size"] or settings["micro_batch_size"] * data_parallel
    check_steps = partial(check_run_steps, settings, objective)
    steps = steps_of_flags(settings, batch_size)
    if steps is not None:
        check_steps(steps)
    derived = {
        "padded_vocab_size": math.ceil(settings["vocab_size"] / multiple) * multiple,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(hf_model),
        "dataloader_type": "single",
        "calculate_per_token_loss": True,
        "objective_options": options,
    }
    eval_iters = explicit.get("eval_iters")
    return SFTArguments(
        hf_model=hf_model,
        data=DataOptions.from_flags(
            {**settings, "valid_data": None} if eval_iters == 0 else settings
        ),
        check_steps=check_steps,
        epochs=settings["epochs"],
        defaults={**model, **soft, **fixed, **derived},
        settings=settings,
        batch_size=batch_size,
        eval_batch_size=settings["eval_global_batch_size"] or batch_size,
        eval_iters=eval_iters,
        hf_weights=hf_weights,
        export=plan_export(settings),
        reference=open_reference(settings, objective, config),
        save=Path(settings["save"]) if settings["save"] else None,
        keep=_keep(settings),
        metrics_file=metrics_file(settings),
    )


def _model_settings(flags: CommandLine, config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return Megatron's arguments for the architecture; a flag that contradicts them is refused."""
    model = family_for(config).megatron_arguments(config)
    # Padding of the vocabulary is a matter of the layout, not of the model.
    del model["make_vocab_size_divisible_by"]
    unchanged = {name: flags.defaults[name] for name in OTHER_ARCHITECTURES}
    settled = {name: value for name, value in model.items() if name not in experts.CHOICES}
    flags.refuse_contradictions({**unchanged, **settled}, f"{source} says")
    return model


def _keep(settings: Mapping[str, Any]) -> KeepOptions:
    try:
        return keep_options(settings)
    except ValueError as error:
        raise ArgumentsError(str(error)) from error


def _objective(
    settings: Mapping[str, Any], explicit: Mapping[str, Any]
) -> tuple[dict[str, Any], Objective | ScheduledObjective]:
    """Return the options of the objective and the objective itself.

    It is checked together with the model's experts, which it must leave alone.
    """
    try:
        options, objective = check_objective(settings, explicit)
        if "old_log_prob" in objective.required_statistics:
            check_old_policy(settings)
        elif "psft_steps_per_refresh" in explicit:
            raise ValueError(
                f"--psft-steps-per-refresh is for --objective psft, not for {settings['objective']}; "
                "drop it"
            )
        final = objective.objective if isinstance(objective, ScheduledObjective) else objective
        normalization = settings["objective_normalization"] or final.normalization
        experts.check_experts(settings, normalization, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        raise ArgumentsError(str(error)) from error
    return options, objective
