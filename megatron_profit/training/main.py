"""The SFT run: Megatron's own `pretrain()` with our model config, data provider and forward step.

This is the counterpart of Megatron-LM's pretrain_gpt.py, and about as long.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from torch.distributed import DistError, DistStoreError
from torch.distributed.checkpoint import CheckpointException

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.shards import Shard
from checkpoint_conversion.model_card.card import card_files
from checkpoint_conversion.model_card.facts import Facts, read_facts
from checkpoint_conversion.model_card.hub import upload
from checkpoint_conversion.model_card.next_steps import next_steps
from megatron_profit.data import DataError, load_tokenizer
from megatron_profit.data.flags import rendering_words
from megatron_profit.evaluation.after_training import become_evaluation, results_of
from megatron_profit.flags import ArgumentsError
from megatron_profit.megatron_patches.callbacks import Callback, RunFailure, register
from megatron_profit.megatron_patches.saving import reason_of_all_ranks
from megatron_profit.models.layer_specs import layer_spec
from megatron_profit.models.lora.transform import adapter_shards, merged_shards
from megatron_profit.training.arguments.command_line import provider_of
from megatron_profit.training.arguments.derive import RunSettings
from megatron_profit.training.checkpoints.adapters import adapter_hook
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.checkpoints.hf_weights import (
    export,
    keep_in,
    load_checkpoint_into,
    load_hook,
    model_shards,
)
from megatron_profit.training.checkpoints.retention import Retention
from megatron_profit.training.monitoring.evaluation_report import EvaluationReport, first_records
from megatron_profit.training.monitoring.guards import Guards
from megatron_profit.training.monitoring.run_monitor import RunMonitor
from megatron_profit.training.monitoring.run_totals import RunTotals
from megatron_profit.training.monitoring.task_evaluation import TaskEvaluation
from megatron_profit.training.plan import RunPlan, plan_run
from megatron_profit.training.plan.datasets import SFTData
from megatron_profit.training.plan.wandb_run import WandbRun
from megatron_profit.training.process.console import fail, print_rank_0
from megatron_profit.training.process.exit_signals import ExitSignals
from megatron_profit.training.process.quiet import keep_files
from megatron_profit.training.process.ranks import from_first_rank, is_first_rank
from megatron_profit.training.process.shutdown import end_communication
from megatron_profit.training.statistics.external_statistics import ExternalStatistics, RunParts
from megatron_profit.training.statistics.lookahead_pass import LookaheadPass
from megatron_profit.training.statistics.providers import make_providers
from megatron_profit.training.step.experts import scale_balancing
from megatron_profit.training.step.forward_step import make_forward_step
from megatron_profit.training.step.objective_loss import ObjectiveLoss
from megatron_profit.training.step.row_length import length_of_rows, stages_exchange_lengths
from megatron_profit.training.step.token_metrics import ProbQuantiles


def main(argv: Sequence[str], device: str) -> None:
    """Plan a run and train; bad input ends the process before Megatron starts.

    Args:
        argv: The flags, without the program's name.
        device: The device that `megatron_profit.megatron_patches.activate` chose.
    """
    try:
        plan = plan_run(argv, device)
    except (ArgumentsError, CheckpointError, ConversionError, DataError) as error:
        fail(error)
    except DistError as error:
        fail(refusal(error))
    run(plan)
    if plan.settings.eval_tasks.is_wanted and is_first_rank():
        become_evaluation(plan.settings.eval_tasks, Path(plan.settings.values["export_hf"]))


def run(plan: RunPlan, callbacks: Sequence[Callback] = ()) -> None:
    """Train as planned: start Megatron's `pretrain()` with the model, the data and the forward step.

    A process trains once. If the run cannot go on, it prints one line and raises `SystemExit`.

    Args:
        plan: The run.
        callbacks: Listeners of your own, called after the run's own ones; the same on all ranks.
    """
    settings, files, data = plan.settings, plan.files, plan.data
    args, model_config = _checked_by_megatron(settings)
    keep_files(None if files.metrics is None else files.metrics.parent, vars(args))
    chunks = _complete(model_config, args, plan)
    loss = objective_loss(settings)
    lookahead_pass = LookaheadPass(loss)
    datasets = {"train": data.train} | ({} if data.valid is None else {"valid": data.valid})
    parts = RunParts(args, loss, lookahead_pass, datasets, data.digest, files.reference)
    providers = make_providers(parts)
    totals = RunTotals()
    keeper = Retention(settings.keep, plan.record, totals, plan.carried)
    report = evaluation_report(settings, data)
    tasks = task_evaluation(plan, chunks)
    signals = ExitSignals(args.exit_signal)
    monitor = RunMonitor(Guards(settings.guards), data.train_prepared.name, files.metrics, totals)
    reports = filter(None, [report, tasks])
    register(*providers, keeper, WandbRun(), *reports, signals, monitor, *callbacks)
    observers = [seeing.observe for seeing in (monitor, report) if seeing is not None]
    external = ExternalStatistics(loss, providers, observers)
    with _known_ends(signals):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            lookahead_pass.watching(data.provider(args)),
            ModelType.encoder_or_decoder,
            make_forward_step(external.begin),
        )
    _export(plan, chunks, keeper)
    end_communication()
    _publish(plan)


def refusal(error: Exception) -> str:
    """Return one line about an exception of Megatron or torch before the first step, with its place."""
    if "EADDRINUSE" in str(error):
        return (
            f"the port {os.environ.get('MASTER_PORT')} (MASTER_PORT) is taken by another process; give "
            "another one, with torchrun by --master-port or --standalone"
        )
    at = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().partition("\n")[0].rstrip(".") or at.line
    if isinstance(error, DistStoreError):
        text = (
            f"the {os.environ.get('WORLD_SIZE')} processes of the run (WORLD_SIZE) have not all started, or "
            f"cannot reach MASTER_ADDR {os.environ.get('MASTER_ADDR')}: {text}"
        )
    return f"{text} ({type(error).__name__} in {at.filename}, line {at.lineno})"


def _checked_by_megatron(settings: RunSettings) -> tuple[Namespace, Any]:
    """Return Megatron's arguments, and its configuration of the model."""
    try:
        args = parse_and_validate_args(extra_args_provider=provider_of(settings.values))
        return args, gpt_config_from_args(args)
    except RunFailure as error:
        fail(error)
    except Exception as error:  # Megatron refuses flags by whatever its checks raise
        fail(f"Megatron refuses the flags: {refusal(error)}")


def _complete(model_config: Any, args: Namespace, plan: RunPlan) -> list[MegatronModule]:
    """Give Megatron's configuration the layers and the weights; return a list that will hold the model."""
    model_config.transformer.variable_seq_lengths = stages_exchange_lengths(args)
    if not args.packing:
        print_rank_0(f"> {length_of_rows(args)}")
    if args.spec is None:
        model_config.transformer_layer_spec = layer_spec
    if args.num_experts is not None:
        scale_balancing(model_config.transformer, plan.data.supervised_share)
    if plan.files.hf_weights is not None:
        model_config.pre_wrap_hooks.append(load_hook(plan.files.hf_weights))
    if plan.files.lora is not None:
        model_config.pre_wrap_hooks.append(adapter_hook(plan.files.lora, args))
    chunks: list[MegatronModule] = []
    model_config.pre_wrap_hooks.append(keep_in(chunks))
    return chunks


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


def _export(plan: RunPlan, chunks: list[MegatronModule], keeper: Retention) -> None:
    """Write the HuggingFace and PEFT folders that were asked for, with --export-best of the best
    checkpoint's weights.
    """
    merged, lora = plan.files.export, plan.files.lora
    adapters = None if lora is None else lora.output
    if merged is None and adapters is None:
        return
    base = plan.settings.hf_model
    flag, folder = ("--export-hf", "--out") if merged else ("--export-adapter",) * 2
    try:
        facts: Facts | None = keeper.facts()
        if plan.settings.keep.export_best:
            best = keeper.best().folder
            load_checkpoint_into(chunks, best)
            facts = from_first_rank(lambda: read_facts(best))
        if merged is not None:
            merged = replace(merged, notes=card_files(facts, base))
            export(merged, whole_shards(plan, chunks))
        if adapters is not None:
            flag = folder = "--export-adapter"  # in the error
            adapters = replace(adapters, notes=card_files(facts, base, is_adapter=True))
            export(adapters, adapter_shards(chunks))
    except (CheckpointError, ConversionError, OSError) as error:
        fail(
            f"{flag}: {error}; a checkpoint that --save has written can still be exported: python "
            "-m checkpoint_conversion.megatron_to_hf --megatron DIR --hf-template "
            f"{plan.settings.hf_model} {folder} DIR"
        )
    values = plan.settings.values
    day, data = values["template_date"], [*values["data"][:1], *rendering_words(values)]
    if merged is not None:
        print_rank_0("\n".join(next_steps(merged.folder, base, data, day=day)))
    if adapters is not None:
        rank = adapters.options.rank
        print_rank_0("\n".join(next_steps(adapters.folder, base, day=day, rank=rank)))


def _publish(plan: RunPlan) -> None:
    """Upload the export, if that was asked for."""
    if plan.repository is None:
        return
    try:
        asked, values = plan.settings.publication, plan.settings.values
        folder, base = asked.folder(values), asked.base_of_adapters(values)
        print_rank_0(f"> uploading {folder} to {plan.repository}")
        print_rank_0(f"> uploaded: {upload(folder, plan.repository, base)}")
    except ConversionError as error:
        fail(error)


def whole_shards(plan: RunPlan, chunks: Sequence[MegatronModule]) -> Iterator[tuple[Shard, bool]]:
    """Yield the shards of this rank's whole weights, with the adapters merged in if the run trains any."""
    return (model_shards if plan.files.lora is None else merged_shards)(chunks)


def task_evaluation(plan: RunPlan, chunks: Sequence[MegatronModule]) -> TaskEvaluation | None:
    """Return the evaluation of tasks during the training that the flags ask for, if they do."""
    options, merged = plan.settings.eval_tasks, plan.files.export
    if options.eval_tasks_interval is None or merged is None:
        return None

    def export_to(folder: Path) -> None:
        export(replace(merged, folder=folder, overwrite=True), whole_shards(plan, chunks))

    return TaskEvaluation(options, export_to, results_of(merged.folder))


def objective_loss(settings: RunSettings) -> ObjectiveLoss:
    """Return the loss that the flags ask for."""
    values, quantiles = settings.values, settings.values["log_quantiles"]
    return ObjectiveLoss(
        settings.objective,
        normalization=values["objective_normalization"],
        vocab_size=values["vocab_size"],
        seed=values["seed"],
        implementation=values["objective_implementation"],
        backward=values["objective_backward"],
        log_entropy=values["log_entropy"],
        log_reference=values["log_reference"],
        prob_quantiles=ProbQuantiles(tuple(quantiles)) if quantiles else None,
    )


def evaluation_report(settings: RunSettings, data: SFTData) -> EvaluationReport | None:
    """Return the writer of the token report that the flags ask for, if they do."""
    values = settings.values
    if values["token_report"] is None:
        return None
    assert data.valid is not None
    assert data.valid_prepared is not None
    rows = values["eval_iters"] * settings.eval_batch_size
    return EvaluationReport(
        folder=Path(values["token_report"]),
        records=first_records(data.valid, values["token_report_records"], rows),
        prepared=data.valid_prepared,
        tokenizer=load_tokenizer(settings.hf_model),
    )
