"""The SFT run: Megatron's own `pretrain()` with our model config, data provider and forward step.

This is the counterpart of Megatron-LM's pretrain_gpt.py, and about as long.
"""

from __future__ import annotations

import sys
import traceback
from argparse import Namespace
from pathlib import Path

from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from checkpoint_conversion.errors import ConversionError
from megatron_profit.backends.hooks import listen, observe, on_evaluation
from megatron_profit.data import DataError, load_tokenizer
from megatron_profit.models.layer_specs import layer_spec
from megatron_profit.training.arguments import ArgumentsError, SFTArguments, read_arguments
from megatron_profit.training.checkpoints import CheckpointError
from megatron_profit.training.console import fail
from megatron_profit.training.datasets import SFTData, prepare_data
from megatron_profit.training.evaluation_report import EvaluationReport, first_records
from megatron_profit.training.exit_signals import ExitSignals
from megatron_profit.training.experts import scale_balancing
from megatron_profit.training.forward_step import make_forward_step
from megatron_profit.training.given_statistics import GivenStatistics, Source
from megatron_profit.training.global_ranking import GlobalRanking
from megatron_profit.training.guards import GuardOptions, Guards
from megatron_profit.training.hf_weights import export, keep_in, load_checkpoint_into, load_hook
from megatron_profit.training.keeping import CheckpointKeeper
from megatron_profit.training.objective_flags import objective_from_args
from megatron_profit.training.objective_loss import ObjectiveLoss
from megatron_profit.training.old_policy import OldPolicy
from megatron_profit.training.reference_model import ReferenceModel
from megatron_profit.training.resume import settle_checkpoints
from megatron_profit.training.run_monitor import RunMonitor
from megatron_profit.training.save_lock import hold_new
from megatron_profit.training.score_pass import ScorePass
from megatron_profit.training.shutdown import end_communication
from megatron_profit.training.token_metrics import ProbQuantiles


def run(device: str) -> None:
    """Train with the flags of the command line; bad input ends the process before Megatron starts.

    Args:
        device: What `megatron_profit.backends.activate` chose.
    """
    try:
        settle_checkpoints(sys.argv[1:])
        arguments = read_arguments(sys.argv[1:], device)
        data = prepare_data(arguments)
        arguments = arguments.with_rows(data.train.labelled_rows, data.valid_rows)
        if arguments.save is not None:
            hold_new(arguments.save)
    except (ArgumentsError, CheckpointError, ConversionError, DataError) as error:
        fail(error)
    train(arguments, data)


def train(arguments: SFTArguments, data: SFTData) -> None:
    """Hand everything to Megatron's `pretrain()`."""
    try:
        args = parse_and_validate_args(extra_args_provider=arguments.add_to_parser)
    except AssertionError as error:
        fail(f"Megatron refuses the flags: {error or traceback.format_exc()}")
    model_config = gpt_config_from_args(args)
    if args.spec is None:
        model_config.transformer_layer_spec = layer_spec
    if args.num_experts is not None:
        scale_balancing(model_config.transformer, data.supervised_share)
    if arguments.hf_weights is not None:
        model_config.pre_wrap_hooks.append(load_hook(arguments.hf_weights))
    chunks: list[MegatronModule] = []
    model_config.pre_wrap_hooks.append(keep_in(chunks))
    loss = objective_loss_from_args(args)
    reference = _reference(arguments, loss, data)
    score_pass = ScorePass(loss, *() if reference is None else (reference.given,))
    given = GivenStatistics(loss, sources_from_args(args, loss, score_pass, reference, data.digest))
    keeper = CheckpointKeeper(arguments.keep)
    listen(given, keeper)
    on_evaluation(keeper.after_evaluation)
    begin = given.begin
    if args.token_report is not None:
        begin = evaluation_report(args, data).watching(begin)
    monitor = run_monitor(args, arguments, data)
    observe(monitor)
    on_evaluation(monitor.evaluated)
    signals = ExitSignals(args.exit_signal)
    signals.forward()
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            score_pass.watching(data.provider(args)),
            ModelType.encoder_or_decoder,
            make_forward_step(monitor.watching(begin)),
        )
    except ConversionError as error:
        fail(error)
    except SystemExit as end:
        signals.leave(end)
    signals.release()
    if arguments.export is not None:
        _export(arguments, chunks, keeper if args.export_best else None)
    end_communication()


def _export(
    arguments: SFTArguments, chunks: list[MegatronModule], keeper: CheckpointKeeper | None
) -> None:
    """Write the model, of the best checkpoint where a keeper knows it."""
    try:
        if keeper is not None:
            load_checkpoint_into(chunks, keeper.best().folder)
        export(arguments.export, chunks)
    except (ConversionError, OSError) as error:
        fail(
            f"--export-hf: {error}; a checkpoint that --save has written can still be exported: python "
            f"-m checkpoint_conversion.megatron_to_hf --megatron DIR --hf-template {arguments.hf_model} "
            "--out DIR"
        )


def objective_loss_from_args(args: Namespace) -> ObjectiveLoss:
    """The loss that the flags ask for."""
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
    """What writes the token report that the flags ask for."""
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
    """What guards and logs the run as the flags ask."""
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


def sources_from_args(
    args: Namespace,
    loss: ObjectiveLoss,
    score_pass: ScorePass,
    reference: ReferenceModel | None,
    data_digest: str,
) -> tuple[Source, ...]:
    """Where the statistics come from that the objective needs and the kernel cannot compute."""
    # The reference is first: a ranking may need it.
    sources: list[Source] = [] if reference is None else [reference]
    required = loss.objective.required_statistics
    if "old_log_prob" in required:
        steps, first = args.psft_steps_per_refresh, args.objective_warmup_steps
        sources.append(OldPolicy(score_pass, steps, first, data_digest))
    if "selected" in required:
        sources.append(GlobalRanking(loss, score_pass))
    return tuple(sources)
