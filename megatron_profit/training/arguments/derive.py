"""The settings of a run: everything that follows from the flags and from config.json.

`derive` takes the architecture from config.json. It refuses flags that contradict it, cannot work or would be
ignored. It touches no other file: `disk.py` opens what the flags name.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_conversion.adapters.options import LoraOptions
from checkpoint_conversion.families import family_for
from checkpoint_conversion.families.config import ConfigReader, text_config
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.torch_dist.saved_arguments import SavedRun, check_architecture
from megatron_profit.evaluation.after_training import EvalTasks, eval_tasks
from megatron_profit.flags import ArgumentsError, options_of
from megatron_profit.objectives import Objective
from megatron_profit.publish import Publication, publication
from megatron_profit.training.arguments.command_line import CommandLine, parse_command_line
from megatron_profit.training.arguments.length import (
    batch_size_changes,
    check_batch_sizes,
    check_run_steps,
    scheduler_of_flags,
    steps_of_flags,
)
from megatron_profit.training.arguments.lora import active_parameters, lora_options
from megatron_profit.training.arguments.native_flags import check_native_flags
from megatron_profit.training.arguments.parallel_layout import check_layout
from megatron_profit.training.arguments.platform import check_kernels, platform_settings
from megatron_profit.training.arguments.refused import (
    OTHER_ARCHITECTURES,
    check_cuda_graphs,
    check_given,
    check_reference,
)
from megatron_profit.training.checkpoints.keep_options import KeepOptions, keep_options
from megatron_profit.training.monitoring.guards import GuardOptions
from megatron_profit.training.step import expert_flags
from megatron_profit.training.step.objective_flags import objective_of

if TYPE_CHECKING:
    from megatron_profit.training.checkpoints.choose import Resumed

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
class RunSettings:
    """The settings of a run.

    Attributes:
        config: The content of config.json.
        given: The flags that were given, by argument name.
        values: All arguments by name, as Megatron gets them. For example, `values["num_layers"]` is from
            config.json.
        objective: The objective in training.
        guards: Reactions to faulty steps.
        keep: The checkpoints that stay, and an early stop.
        lora: The adapters to train, if any.
        batch_size: Rows of a step over all ranks.
        eval_tasks: The evaluation of the export.
        publication: The name of its base, and its upload.
    """

    config: Mapping[str, Any]
    given: Mapping[str, Any]
    values: Mapping[str, Any]
    objective: Objective
    guards: GuardOptions
    keep: KeepOptions
    lora: LoraOptions | None
    batch_size: int
    eval_tasks: EvalTasks
    publication: Publication

    @property
    def hf_model(self) -> Path:
        """The HuggingFace folder that gives the architecture and the tokenizer."""
        return Path(self.values["hf_model"])

    @property
    def architecture(self) -> Mapping[str, Any]:
        """Megatron's arguments for the architecture, all of which follow from config.json."""
        return family_for(self.config).megatron_arguments(self.config)

    @property
    def save(self) -> Path | None:
        """The folder of checkpoints, if any."""
        return Path(self.values["save"]) if self.values["save"] else None

    @property
    def data_flags(self) -> Mapping[str, Any]:
        """The arguments for `DataOptions.from_flags`: without validation data that no evaluation reads."""
        unread = {"valid_data": None} if self.given.get("eval_iters") == 0 else {}
        return {**self.values, **unread}

    @property
    def eval_batch_size(self) -> int:
        """Rows of an evaluation iteration over all ranks."""
        return self.values["eval_global_batch_size"] or self.batch_size

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, from its beginning.

        None where the batch size changes on the way, and for epochs before `with_rows`.
        """
        return steps_of_flags(self.values, self.batch_size)

    @property
    def namespace(self) -> argparse.Namespace:
        """All arguments, in the form of Megatron's."""
        return argparse.Namespace(**self.values)

    def check_checkpoint(self, saved: SavedRun) -> None:
        """Refuse a checkpoint of another architecture.

        Raises:
            ConversionError: Names each argument that differs, with both values.
        """
        check_architecture(saved.arguments, self.architecture, saved.folder, self.hf_model)

    def with_rows(
        self, epochs_rows: int | None, valid_rows: int, resumed: Resumed | None = None
    ) -> RunSettings:
        """Return these settings with the number of iterations and of evaluation iterations.

        Where epochs were asked for, there are as many iterations as the rows of all epochs need; with a
        schedule of batch sizes Megatron counts them. Evaluations see each validation row once, unless
        --eval-iters says otherwise. For example, 2 epochs of 1,000 rows with a batch size of 32 need 63
        iterations.

        Args:
            epochs_rows: Rows of all epochs; None where the length of the run is not given in epochs.
            valid_rows: Rows of an evaluation.
            resumed: The checkpoint that the run resumes, if any.

        Raises:
            ArgumentsError: A warm-up takes all iterations, or the iterations cannot be counted, or the ranks
                cannot share the steps of a schedule of batch sizes.
        """
        iterations, rows = (0, 0) if resumed is None else resumed.done
        if batch_size_changes(self.values):
            check_batch_sizes(self.values, self.batch_size, rows)
        values = {
            **self.values,
            "eval_iters": math.ceil(valid_rows / self.eval_batch_size),
            "first_step": 1 if resumed is None else resumed.iteration + 1,
        }
        if self.given.get("eval_iters") is not None:
            values["eval_iters"] = self.given["eval_iters"]
        if epochs_rows is not None and batch_size_changes(values):
            values["train_samples"] = epochs_rows
        elif epochs_rows is not None:
            steps = max(iterations + math.ceil((epochs_rows - rows) / self.batch_size), 0)
            values["train_iters"] = steps
            # `check_length` refuses fewer than are done.
            check_run_steps(self.values, self.objective, max(steps, iterations))
        if rows != iterations * self.batch_size and not batch_size_changes(values):
            values |= self._with_another_batch_size(iterations, rows, values["train_iters"])
        return replace(self, values=values)

    def _with_another_batch_size(
        self, iterations: int, rows: int, train_iters: int
    ) -> dict[str, int]:
        """Return arguments that keep the end of the learning rate's schedule at the end of the run.

        This matters for a run that resumes with batches of another size. Megatron counts the schedule in
        rows, as if all batches had the size of now.
        """
        samples = self.values["train_samples"]
        if samples is not None:
            more = math.ceil((samples - rows) / self.batch_size)
            raise ArgumentsError(
                f"--train-samples {samples} cannot be counted in batches of two sizes: the checkpoint has "
                f"taken {rows} rows in {iterations} steps, and --global-batch-size is {self.batch_size} now; "
                f"give --train-iters {iterations + more} in place of it"
            )
        if self.values["lr_decay_iters"] is not None:
            return {}
        left = max(train_iters - iterations, 0)
        return {"lr_decay_iters": math.ceil(rows / self.batch_size) + left}


def derive(
    argv: Sequence[str], device: str, processes: int, config: Mapping[str, Any] | None = None
) -> RunSettings:
    """Check the flags of a run and derive its settings.

    Args:
        argv: The flags, without the program's name.
        device: "cuda" or "cpu", as `megatron_profit.megatron_patches.activate` chose it.
        processes: Number of processes of the run.
        config: The content of config.json; None to read it in the folder that --hf-model names.

    Raises:
        ArgumentsError: For flags that are missing, contradict each other or would be ignored.
        ConversionError: For a config.json that is missing, broken or of an unknown architecture.
    """
    settings = settings_of(parse_command_line(argv), device, processes, config)
    from megatron_profit.training.statistics.providers import check_providers  # imports Megatron

    check_providers(settings.objective, settings.values, settings.given)
    check_cuda_graphs(settings.values)  # --cuda-graph-modules are read by Megatron's parser alone
    return settings


def settings_of(
    flags: CommandLine, device: str, processes: int, config: Mapping[str, Any] | None = None
) -> RunSettings:
    """Derive the settings of a run without torch and Megatron, and so without the providers' checks.

    The arguments, the result and the errors are as for `derive`, besides the parsed flags.
    """
    check_given(flags)
    given = flags.given
    if config is None:
        config = read_hf_config(Path(given["hf_model"]))
    values = _arguments(flags, config, device)
    check_native_flags(values, flags.option)
    check_kernels(values, device)
    guards = options_of(GuardOptions, values)
    data_parallel = check_layout(values, processes)
    multiple = values["tensor_model_parallel_size"] * values["make_vocab_size_divisible_by"]
    values["padded_vocab_size"] = math.ceil(values["vocab_size"] / multiple) * multiple
    objective = _objective(values, given, processes)
    batch_size = values["global_batch_size"] or values["micro_batch_size"] * data_parallel
    steps = steps_of_flags(values, batch_size)
    if steps is not None:
        check_run_steps(values, objective, steps)
    check_reference(values, objective)
    lora = lora_options(values, config)
    values["lora_active_parameters"] = lora and active_parameters(lora, values, config)
    evaluation = eval_tasks(values)
    keep = keep_options(values, evaluation.metrics)
    return RunSettings(
        *(config, given, values, objective, guards, keep, lora, batch_size),
        eval_tasks=evaluation,
        publication=publication(values),
    )


def _arguments(flags: CommandLine, config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return all arguments by name: what config.json, the device and this entry decide, and the flags."""
    given, hf_model = flags.given, flags.given["hf_model"]
    required, suggested = platform_settings(device, local=given.get("transformer_impl") == "local")
    flags.refuse_contradictions(required, "this machine needs")
    suggested = {**_DEFAULTS, **suggested, **scheduler_of_flags(given)}
    initial = {"initializer_range": text_config(config).get("initializer_range")}
    if initial["initializer_range"] is not None:
        read = ConfigReader(initial, "every family")
        suggested["init_method_std"] = read.number("initializer_range", at_least=0.0)
    model = _model_arguments(flags, config, Path(hf_model) / "config.json")
    derived = {
        **required,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(hf_model),
        "dataloader_type": "single",
        "calculate_per_token_loss": True,
    }
    values = {**flags.defaults, **model, **suggested, **derived, **given}
    return {**values, **expert_flags.expert_defaults(values), **required, **given}


def _model_arguments(flags: CommandLine, config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return Megatron's arguments for the architecture; a flag that contradicts them is refused."""
    model = family_for(config).megatron_arguments(config)
    # Padding of the vocabulary is a matter of the layout, not of the model.
    del model["make_vocab_size_divisible_by"]
    unchanged = {name: flags.defaults[name] for name in OTHER_ARCHITECTURES}
    decided = {name: value for name, value in model.items() if name not in expert_flags.CHOICES}
    flags.refuse_contradictions({**unchanged, **decided}, f"{source} says")
    return model


def _objective(values: Mapping[str, Any], given: Mapping[str, Any], processes: int) -> Objective:
    """Return the objective.

    It is checked together with the model's experts, which it must leave alone.
    """
    objective = objective_of(values, given)
    normalization = values["objective_normalization"] or objective.final.normalization
    expert_flags.check_experts(values, normalization, processes)
    return objective


def recorded_names(objective: Objective) -> list[str]:
    """Return the arguments of an objective's statistics that a resumed run must not change."""
    from megatron_profit.training.statistics.providers import provider_classes

    return [name for p in provider_classes(objective).values() for name in p.recorded]
