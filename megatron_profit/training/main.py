"""The SFT run: Megatron's own `pretrain()` with our model config, data provider and forward step.

This is the counterpart of Megatron-LM's pretrain_gpt.py, and about as long.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from torch.distributed import DistNetworkError
from torch.distributed.checkpoint import CheckpointException

from checkpoint_conversion.errors import ConversionError
from megatron_profit.data import DataError, load_tokenizer
from megatron_profit.megatron_patches.callbacks import RunFailure, register
from megatron_profit.megatron_patches.saving import reason_of_all_ranks
from megatron_profit.models.layer_specs import layer_spec
from megatron_profit.training.arguments.errors import ArgumentsError
from megatron_profit.training.arguments.sft_arguments import SFTArguments, read_arguments
from megatron_profit.training.checkpoints.choose import Resumed, settle_checkpoints
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.checkpoints.hf_weights import (
    export,
    keep_in,
    load_checkpoint_into,
    load_hook,
)
from megatron_profit.training.checkpoints.keeping import CheckpointKeeper
from megatron_profit.training.checkpoints.run_record import RunRecord
from megatron_profit.training.checkpoints.save_folder import tell_of_other_curves
from megatron_profit.training.checkpoints.save_lock import hold_new
from megatron_profit.training.checkpoints.size import check_space_at_start
from megatron_profit.training.datasets import SFTData, prepare_data
from megatron_profit.training.monitoring.evaluation_report import EvaluationReport, first_records
from megatron_profit.training.monitoring.guards import GuardOptions, Guards
from megatron_profit.training.monitoring.run_monitor import RunMonitor
from megatron_profit.training.process.console import fail, print_rank_0
from megatron_profit.training.process.exit_signals import ExitSignals
from megatron_profit.training.process.ranks import is_first_rank
from megatron_profit.training.process.shutdown import end_communication
from megatron_profit.training.resume.compare import check_length, check_resume
from megatron_profit.training.resume.this_run import describe_run
from megatron_profit.training.resume.wandb_run import WandbRun, resume_wandb_run
from megatron_profit.training.statistics.given_statistics import GivenStatistics, StatisticProvider
from megatron_profit.training.statistics.global_ranking import GlobalRanking
from megatron_profit.training.statistics.old_policy import OldPolicy
from megatron_profit.training.statistics.reference_model import ReferenceModel
from megatron_profit.training.statistics.score_pass import ScorePass
from megatron_profit.training.step.experts import scale_balancing
from megatron_profit.training.step.forward_step import make_forward_step
from megatron_profit.training.step.objective_flags import objective_from_args
from megatron_profit.training.step.objective_loss import ObjectiveLoss
from megatron_profit.training.step.row_length import length_of_rows, stages_exchange_lengths
from megatron_profit.training.step.token_metrics import ProbQuantiles


def run(device: str) -> None:
    """Train with the flags of the command line; bad input ends the process before Megatron starts.

    Args:
        device: The device that `megatron_profit.megatron_patches.activate` chose.
    """
    try:
        resumed = settle_checkpoints(sys.argv[1:])
        arguments = read_arguments(sys.argv[1:], device)
        data = prepare_data(arguments)
        arguments = arguments.with_rows(data.train.labelled_rows, data.valid_rows, resumed)
        arguments = arguments.with_turn_end(data.turn_end, print_rank_0)
        loss = objective_loss_from_args(arguments.namespace)
        record = RunRecord()
        if is_first_rank():
            record = checked_record(arguments, data, loss, resumed)
        if arguments.save is not None:
            hold_new(arguments.save)
        resume_wandb_run(arguments.settings, resumed)
    except (ArgumentsError, CheckpointError, ConversionError, DataError) as error:
        fail(error)
    except DistNetworkError as error:
        fail(refusal(error))
    train(arguments, data, loss, record)


def refusal(error: Exception) -> str:
    """Return one line about an exception of Megatron or torch before the first step, with its place."""
    if "EADDRINUSE" in str(error):
        return (
            f"the port {os.environ.get('MASTER_PORT')} (MASTER_PORT) is taken by another process; give "
            "another one, with torchrun by --master-port or --standalone"
        )
    at = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().partition("\n")[0].rstrip(".") or at.line
    return f"{text} ({type(error).__name__} in {at.filename}, line {at.lineno})"


def checked_record(
    arguments: SFTArguments, data: SFTData, loss: ObjectiveLoss, resumed: Resumed | None
) -> RunRecord:
    """Return the record of the run, after checking it against the checkpoint to resume and the disk space.

    Raises:
        CheckpointError: The record does not fit the checkpoint, or there is too little space to save.
    """
    record = describe_run(arguments, data, loss)
    curves = arguments.settings["tensorboard_dir"]
    is_finished = resumed is not None and resumed.iteration == arguments.steps
    if resumed is not None:
        check_length(resumed, arguments, print_rank_0)
        rows_until = data.train.order.rows_until
        check_resume(*(resumed, record, arguments.namespace, rows_until, print_rank_0), is_finished)
    elif curves:
        tell_of_other_curves(curves)
    if arguments.save is not None and not is_finished:
        check_space_at_start(arguments.save, arguments.hf_model, arguments.settings)
    return record


def train(arguments: SFTArguments, data: SFTData, loss: ObjectiveLoss, record: RunRecord) -> None:
    """Start Megatron's `pretrain()` with the model, the data and the forward step."""
    args, model_config = _checked_by_megatron(arguments)
    model_config.transformer.variable_seq_lengths = stages_exchange_lengths(args)
    if not args.packing:
        print_rank_0(f"> {length_of_rows(args)}")
    if args.spec is None:
        model_config.transformer_layer_spec = layer_spec
    if args.num_experts is not None:
        scale_balancing(model_config.transformer, data.supervised_share)
    if arguments.hf_weights is not None:
        model_config.pre_wrap_hooks.append(load_hook(arguments.hf_weights))
    chunks: list[MegatronModule] = []
    model_config.pre_wrap_hooks.append(keep_in(chunks))
    reference = _reference(arguments, loss, data)
    score_pass = ScorePass(loss, *() if reference is None else (reference.given,))
    providers = providers_from_args(args, loss, score_pass, reference, data.digest)
    given = GivenStatistics(loss, providers)
    keeper = CheckpointKeeper(arguments.keep, record)
    report = None if args.token_report is None else evaluation_report(args, data)
    signals = ExitSignals(args.exit_signal)
    begin = given.begin if report is None else report.watching(given.begin)
    monitor = run_monitor(args, arguments, data)
    register(*providers, keeper, WandbRun(), *filter(None, [report]), signals, monitor)
    with _known_ends(signals):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            score_pass.watching(data.provider(args)),
            ModelType.encoder_or_decoder,
            make_forward_step(monitor.watching(begin)),
        )
    if arguments.export is not None:
        _export(arguments, chunks, keeper if args.export_best else None)
    end_communication()


def _checked_by_megatron(arguments: SFTArguments) -> tuple[Namespace, Any]:
    """Return Megatron's arguments, and its configuration of the model."""
    try:
        args = parse_and_validate_args(extra_args_provider=arguments.add_to_parser)
        return args, gpt_config_from_args(args)
    except RunFailure as error:
        fail(error)
    except Exception as error:  # Megatron refuses flags by whatever its checks raise
        fail(f"Megatron refuses the flags: {refusal(error)}")


@contextlib.contextmanager
def _known_ends(signals: ExitSignals) -> Iterator[None]:
    """Let signals end the run with a checkpoint, and expected errors end it with one line,
    inside the block.
    """
    signals.forward()
    try:
        yield
    except (CheckpointError, ConversionError, RunFailure) as error:
        fail(error)
    except CheckpointException as error:
        fail(f"a checkpoint was not read or written: {reason_of_all_ranks(error)}")
    except SystemExit as end:
        if end.code is None:
            # Megatron cannot load a part of a checkpoint; its exit code would be 0.
            fail("Megatron has ended the run; its last line above says why")
        signals.leave(end)
    except Exception as error:
        if signals.training_has_begun:
            raise
        fail(f"Megatron cannot start: {refusal(error)}")
    signals.release()


def _export(
    arguments: SFTArguments, chunks: list[MegatronModule], keeper: CheckpointKeeper | None
) -> None:
    """Write the HuggingFace folder; with a keeper that knows the best checkpoint, that
    checkpoint's weights.
    """
    try:
        if keeper is not None:
            load_checkpoint_into(chunks, keeper.best().folder)
        export(arguments.export, chunks)
    except (CheckpointError, ConversionError, OSError) as error:
        fail(
            f"--export-hf: {error}; a checkpoint that --save has written can still be exported: python "
            f"-m checkpoint_conversion.megatron_to_hf --megatron DIR --hf-template {arguments.hf_model} "
            "--out DIR"
        )


def objective_loss_from_args(args: Namespace) -> ObjectiveLoss:
    """Return the loss that the flags ask for."""
    return ObjectiveLoss(
        objective_from_args(args),
        normalization=args.objective_normalization,
        vocab_size=args.vocab_size,
        seed=args.seed,
        implementation=args.objective_implementation,
        backward=args.objective_backward,
        log_entropy=args.log_entropy,
        prob_quantiles=ProbQuantiles(tuple(args.log_quantiles)) if args.log_quantiles else None,
    )


def evaluation_report(args: Namespace, data: SFTData) -> EvaluationReport:
    """Return the writer of the token report that the flags ask for."""
    rows = args.eval_iters * args.eval_global_batch_size
    return EvaluationReport(
        folder=Path(args.token_report),
        records=first_records(data.valid, args.token_report_records, rows),
        prepared=data.valid_prepared,
        tokenizer=load_tokenizer(Path(args.hf_model)),
        # An evaluation of PSFT is plain SFT: the old policy is the current one.
        objective="sft" if args.objective == "psft" else args.objective,
    )


def run_monitor(args: Namespace, arguments: SFTArguments, data: SFTData) -> RunMonitor:
    """Return the monitor that guards and logs the run as the flags ask."""
    return RunMonitor(
        Guards(GuardOptions.from_settings(vars(args))),
        data.train_prepared.name,
        arguments.metrics_file,
    )


def _reference(
    arguments: SFTArguments, loss: ObjectiveLoss, data: SFTData
) -> ReferenceModel | None:
    if arguments.reference is None:
        return None
    sets = {"train": data.train, "valid": data.valid}
    datasets = {name: part for name, part in sets.items() if part is not None}
    return ReferenceModel(*arguments.reference, loss, datasets)


def providers_from_args(
    args: Namespace,
    loss: ObjectiveLoss,
    score_pass: ScorePass,
    reference: ReferenceModel | None,
    data_digest: str,
) -> tuple[StatisticProvider, ...]:
    """Where the statistics come from that the objective needs and the kernel cannot compute."""
    # The reference is first: a ranking may need it.
    providers: list[StatisticProvider] = [] if reference is None else [reference]
    required = loss.objective.required_statistics
    if "old_log_prob" in required:
        steps, first = args.psft_steps_per_refresh, args.objective_warmup_steps
        providers.append(OldPolicy(score_pass, steps, first, data_digest))
    if "selected" in required:
        providers.append(GlobalRanking(loss, score_pass))
    return tuple(providers)
