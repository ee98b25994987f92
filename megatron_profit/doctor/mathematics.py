"""The loss and the gradient norm of the first batch: transformers against Megatron at the chosen layout.

Megatron's numbers come from one step of the training itself, with the run's flags and plain SFT. transformers
computes each record by itself, without packing, parallelism or this project's kernels. So the two agree only
if weights, tokens, masks, positions, layout and divisor are right.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.in_transformers import load_language_model, with_adapters
from megatron_profit.doctor.findings import Finding, fault, note, ok
from megatron_profit.launch.machine import this_machine
from megatron_profit.launch.processes import environment, launcher
from megatron_profit.recipe.flags import words_of

if TYPE_CHECKING:
    import torch

    from megatron_profit.launch.prepare import Launch

# Relative differences that rounding explains: of the loss, and of the gradient norm.
_TOLERANCE = {"fp32": (1e-4, 1e-3), "half": (1e-2, 5e-2)}
# Bytes of a parameter: weight and gradient in fp32, and some for activations; the weight alone.
_WITH_GRADIENT, _LOSS_ALONE = 10, 5
# Arguments of the training that one step does without, by the beginnings of their names.
_LEFT_OUT = (
    *(
        "load",
        "save",
        "keep_",
        "export",
        "tensorboard",
        "valid_",
        "eval_",
        "overwrite",
        "allow_change",
    ),
    *(
        "wandb",
        "token_report",
        "metrics_file",
        "epochs",
        "train_iters",
        "train_samples",
        "early_stop",
    ),
    *("lr_decay", "lr_warmup", "lr_wsd", "objective", "pretrained_checkpoint", "log_", "psft"),
    *("ref_", "exit_"),
    *("push_", "moe_aux_loss", "moe_router_load_balancing", "moe_z_loss"),
    # Of batches that change, the first one may be smaller than a step.
    *("global_batch_size", "step_batch_size_schedule"),
    *("lora_dropout", "attention_dropout", "hidden_dropout"),  # random, in Megatron's step alone
)
# Rotary bases of published models.
_BASES = (10_000, 100_000, 500_000, 1_000_000, 10_000_000)
# English text that every Python brings: the base shows in long plain text, not in short chats.
_TOPIC, _TOKENS = "execmodel", 1024
# Part of the loss by which another base must lower it before the file's is called wrong. A right base is a
# minimum: the next ones cost 1 % and more.
_CLEARLY = 0.015

# Token ids of a record, and which of them are supervised.
type Record = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Result:
    """The first batch's mean loss over supervised tokens, and the norm of its gradient (None: unknown)."""

    loss: float
    gradient_norm: float | None


def check_mathematics(launch: Launch, train: Any) -> Iterator[Finding]:
    """Yield the comparison, and whether another rotary base would suit the weights better.

    Args:
        launch: The run.
        train: The `BuiltSet` of the training data.
    """
    values = {launch.request.table.dest(f.option): f.value for f in launch.flags}
    records = first_batch(train, launch.rows)
    precision = "half" if values.get("bf16") or values.get("fp16") else "fp32"
    megatron = megatron_result(launch)
    parameters, lora = _parameters(Path(values["hf_model"])), bool(values.get("lora_rank"))
    device = _device(parameters)
    if device is None:
        yield note(
            "mathematics",
            f"Megatron's loss of the first batch is {megatron.loss:.6g}; transformers' is not computed, as "
            f"{parameters / 1e9:.3g} billion parameters take more memory than is free here",
        )
        return
    place, gradient = device
    model = load_model(Path(values["hf_model"]), place)
    if values.get("lora_adapter"):
        if importlib.util.find_spec("peft") is None:
            yield note(
                "mathematics", "the loss with adapters is not compared: PEFT is not installed"
            )
            return
        with_adapters(model, values["lora_adapter"])  # in place
    found = transformers_result(model, records, gradient and not lora)
    yield compared(megatron, found, precision, str(launch.processes))
    yield from check_rotary_base(model, plain_text(Path(values["hf_model"])))


def first_batch(train: Any, rows: int) -> list[Record]:
    """Return the records of the first step."""
    order, examples = train.dataset.order, train.prepared.examples
    return [examples[int(number)] for row in range(rows) for number in order.row(row)[0]]


def compared(megatron: Result, found: Result, precision: str, processes: str) -> Finding:
    """Return the verdict on two results."""
    tolerances = _TOLERANCE[precision]
    lines, good = [], True
    pairs = [
        ("loss", megatron.loss, found.loss, tolerances[0]),
        ("gradient norm", megatron.gradient_norm, found.gradient_norm, tolerances[1]),
    ]
    for name, ours, theirs, tolerance in pairs:
        if ours is None or theirs is None:
            continue
        difference = abs(ours - theirs) / max(abs(theirs), 1e-12)
        within = difference <= tolerance
        good = good and within
        sign = "within" if within else "MORE than"
        lines.append(
            f"{name}: transformers {theirs:.7g}, Megatron on {processes} process(es) {ours:.7g}; differ by "
            f"{difference:.1e}, {sign} the rounding of {precision} ({tolerance:g})"
        )
    text = "\n".join(lines)
    if good:
        return ok("mathematics", text)
    return fault(
        "mathematics",
        f"{text}\nThe two compute different functions. Try --layout given with one process, --device cpu or "
        "--transformer-impl local to find which part differs",
    )


def megatron_result(launch: Launch) -> Result:
    """Return the numbers of one training step with the run's flags.

    Raises:
        RuntimeError: The step fails; the message has the first line that names an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        command = [sys.executable, "-m", "torch.distributed.run", *torchrun_words(launch)]
        command += [*one_step(launch), "--metrics-file", str(metrics)]
        threads = str(max(1, launch.machine.cores // launch.processes))
        variables = {"OMP_NUM_THREADS": threads, **environment(0), **os.environ}
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        steps = [json.loads(line) for line in lines]
        step = next((s for s in steps if s["kind"] == "train"), None)
    if step is None or step.get("lm loss") is None:
        raise RuntimeError(f"one step of the training fails: {_first_error(answer.stderr)}")
    return Result(step["lm loss"], step.get("grad norm"))


def torchrun_words(launch: Launch) -> list[str]:
    """Return torchrun's words for one try, which leaves no log in the run's folder."""
    changes = {"max_restarts": 0, "rank_logs": False}
    front = argparse.Namespace(**{**vars(launch.request.front), **changes})
    return launcher(replace(launch.request, front=front), launch.processes, launch.run)


def one_step(launch: Launch) -> list[str]:
    """Return the flags of one step of plain SFT at the run's layout, without a loss that balances experts."""
    table = launch.request.table
    kept = [
        flag
        for flag in launch.flags
        if not table.dest(flag.option).startswith(_LEFT_OUT)
        and flag.option not in table.of_objectives
    ]
    words = [*words_of(kept), "--objective", "sft", "--train-iters", "1"]
    words += ["--global-batch-size", str(launch.rows)]
    (folder,) = (flag.value for flag in launch.flags if table.dest(flag.option) == "hf_model")
    config = read_hf_config(Path(folder))
    experts = family_for(config).megatron_arguments(config).get("num_experts")
    return [*words, *(["--moe-aux-loss-coeff", "0"] if experts else [])]


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line.lower()]
    return (lines or text.splitlines() or ["it printed no reason"])[0].strip()


def _parameters(folder: Path) -> int:
    from checkpoint_conversion.hf.model import expected_shapes

    rules = family_for(read_hf_config(folder)).tensor_rules(read_hf_config(folder))
    return sum(map(math.prod, expected_shapes(rules).values()))


def _device(parameters: int) -> tuple[str, bool] | None:
    """Return where transformers computes, and whether the gradient fits too; None where neither fits."""
    machine = this_machine()
    places = [("cuda", max(machine.gpus))] if machine.gpus else []
    places.append(("cpu", machine.memory))
    for size, gradient in ((_WITH_GRADIENT, True), (_LOSS_ALONE, False)):
        for place, memory in places:
            if parameters * size < memory * 2**30:
                return place, gradient
    return None


def load_model(folder: Path, device: str) -> Any:
    """Return transformers' model in fp32; no code of the folder is run."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return load_language_model(folder, torch.float32).to(device).eval()


def transformers_result(model: Any, records: Sequence[Record], gradient: bool) -> Result:
    """Return the mean loss over the supervised tokens of all records, and the gradient's norm."""
    import torch

    count = sum(int(supervised[1:].sum()) for _, supervised in records)
    total = 0.0
    with torch.set_grad_enabled(gradient):
        for ids, supervised in records:
            loss = _summed_loss(model, ids, supervised) / count
            total += float(loss.detach())
            if gradient:
                loss.backward()
    if not gradient:
        return Result(total, None)
    squares = (p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
    norm = math.sqrt(sum(float(square) for square in squares))
    model.zero_grad(set_to_none=True)
    return Result(total, norm)


def _summed_loss(
    model: Any, ids: npt.NDArray[np.int32], supervised: npt.NDArray[np.uint8]
) -> torch.Tensor:
    import torch

    tokens = torch.from_numpy(ids.astype(np.int64)).to(model.device)
    labels = torch.where(torch.from_numpy(supervised != 0).to(model.device), tokens, -100)
    logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(
        logits.float(), labels[1:], ignore_index=-100, reduction="sum"
    )


def plain_text(folder: Path) -> Record:
    """Return tokens of an English text, all of them supervised."""
    from pydoc_data.topics import topics

    from megatron_profit.data import load_tokenizer

    tokenizer = load_tokenizer(folder)
    # Without `verbose` transformers does not warn of the length, of which only the beginning is used.
    ids = tokenizer(topics[_TOPIC], add_special_tokens=False, verbose=False).input_ids[:_TOKENS]
    return np.array(ids, np.int32), np.ones(len(ids), np.uint8)


def check_rotary_base(model: Any, text: Record) -> Iterator[Finding]:
    """Yield a fault where another published rotary base predicts a plain text clearly better."""
    base = rotary_base(model.config)
    if base is None:
        return
    losses: Mapping[float, float] = {
        other: _with_base(model, [text], other) for other in _BASES if other != base
    }
    loss = transformers_result(model, [text], gradient=False).loss
    best = min(losses, key=lambda other: losses[other])
    if losses[best] < (1 - _CLEARLY) * loss:
        yield fault(
            "rotary base",
            f"config.json says {base:,.0f}, and an English text has the loss {loss:.4g}; with {best:,} "
            f"it is {losses[best]:.4g}. Correct rope_theta (and rope_parameters) in config.json",
        )
    else:
        yield ok("rotary base", f"{base:,.0f}; no other usual base predicts an English text better")


def rotary_base(config: Any) -> float | None:
    """Return the rotary base of transformers' configuration, of version 4 or 5."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_theta", getattr(config, "rope_theta", None))


def _with_base(model: Any, records: Sequence[Record], base: float) -> float:
    """Return the loss with another rotary base."""
    config = copy.deepcopy(model.config)
    if getattr(config, "rope_parameters", None):
        config.rope_parameters = {**config.rope_parameters, "rope_theta": base}
    if hasattr(config, "rope_theta"):
        config.rope_theta = base
    before = model.model.rotary_emb
    try:
        model.model.rotary_emb = type(before)(config).to(model.device)
        return transformers_result(model, records, gradient=False).loss
    finally:
        model.model.rotary_emb = before
