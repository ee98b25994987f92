"""The steps of the proof on a GPU, in the order of their worth.

Each takes a few bounded child processes. Numbers that depend on the machine are measured, and not judged;
a step passes or fails by its errors and counts alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import benchmarking
import torch
from proof import Children, Result, Step, StepFailure
from proof_delta_net import BOUNDS as DELTA_NET_BOUNDS
from proof_delta_net import check_delta_net
from proof_kernel import kernel_configurations, measure_kernel, profile_table
from proof_runs import SIZES, speed, steps_of, train, uneven
from training_inputs import write_chats, write_model, write_tiny_model

from megatron_profit.objectives import build_objective
from megatron_profit.objectives.base import COMPUTED_STATISTICS
from megatron_profit.ops import linear_objective, reference_linear_objective

PACKAGES = (
    *("transformer_engine", "flash-linear-attention", "liger-kernel", "cut-cross-entropy"),
    *("transformers", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "apex", "flash-attn"),
)
# Relative difference of two losses whose layers round differently in bf16.
BF16_NOISE = 2e-2
# A little more than the usual loss's own error against fp64, by dtype.
BOUNDS = {"bf16": 1.05, "fp32": 2.0}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def prepare(device: str) -> None:
    """Import all that the steps need, without touching a GPU."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from megatron_profit.megatron_patches import activate

    activate(device)
    import transformers  # noqa: F401

    import megatron_profit.training.main  # noqa: F401


def touch_gpu() -> str:
    """Return the GPU's name for people."""
    torch.zeros(1, device="cuda")
    return torch.cuda.get_device_name()


def environment(device: str) -> dict[str, Any]:
    """Return the machine and the versions."""
    facts = benchmarking.environment(torch.device(device), PACKAGES)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["driver"] = _driver()
    return facts


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else "unknown"


def check_operation(device: str) -> dict[str, Any]:
    """Compare loss, gradients and statistics of both implementations with the dense oracle in fp64.

    Returns:
        For each implementation and dtype, errors relative to the norm of the exact result, of the operation
        and of the dense loss in the same dtype.
    """
    rows, hidden, vocab = SIZES[device].operation
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        tensor = torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)
        return tensor.bfloat16().double()  # exact in every dtype

    inputs = random(rows, hidden), random(vocab, hidden) * 2.0 ** -round(math.log2(hidden) / 2)
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    labels[::7] = -100
    upstream = torch.randn(rows, generator=generator, device=device, dtype=torch.float64)
    objective = build_objective("profit", threshold_direction="higher", prob_threshold=1 / vocab)

    def run(function: Any, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
        h, w = (tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs)
        output = function(h, w, labels, objective, **options)
        output.loss.backward(upstream.to(output.loss.dtype))
        # Exact comparisons of rounded logits have no small error: a rank may change by one.
        names = [name for name in COMPUTED_STATISTICS if name not in ("rank", "lower_mass")]
        found = {"loss": output.loss.detach(), "grad hidden": h.grad, "grad weight": w.grad}
        found |= {name: getattr(output.statistics, name) for name in names}
        return {name: tensor.double() for name, tensor in found.items()}

    exact = run(reference_linear_objective, torch.float64)
    wanted = {"extra_statistics": frozenset(COMPUTED_STATISTICS)}
    errors: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        usual = run(reference_linear_objective, dtype)
        for implementation in ("torch", *(["triton"] if device == "cuda" else [])):
            ours = run(linear_objective, dtype, implementation=implementation, **wanted)
            errors[f"{implementation}, {name}"] = {
                key: [float((found[key] - truth).norm() / truth.norm()) for found in (ours, usual)]
                for key, truth in exact.items()
            }
    return errors


def dropping_threshold(config: Mapping[str, Any], share: float) -> float:
    """Return the probability under which about a share of random targets lie, with random weights.

    The final norm gives hidden states of root mean square 1, so logits are normal with the deviation
    s = initializer_range * sqrt(hidden_size), and p = exp(logit - s^2 / 2) / V.

    Args:
        config: The model's config.json.
        share: For example 0.2.
    """
    if not share:
        return 0.0
    deviation = config["initializer_range"] * math.sqrt(config["hidden_size"])
    quantile = NormalDist().inv_cdf(share) * deviation
    return math.exp(quantile - deviation**2 / 2) / config["vocab_size"]


class Proof:
    """The steps, with the folders and processes that they share.

    Args:
        children: Starts the processes.
        scratch: Folder of models, data and checkpoints.
    """

    def __init__(self, children: Children, scratch: Path) -> None:
        self._children, self._scratch = children, scratch
        self._sizes = SIZES[children.device]

    def steps(self) -> list[Step]:
        """Return the steps, the most important first."""
        return [
            Step("environment", "The machine", self.environment),
            Step("operation", "The operation against fp64", self.operation),
            Step("run", "A run of Qwen3-0.6B's shape", self.run),
            Step("step", "A whole step with other losses", self.step),
            Step("kernel", "The operation against others", self.kernel),
            Step("delta-net", "Gated DeltaNet, Qwen3.5's heads", self.delta_net),
            Step("lora", "A step with adapters, Qwen3-8B's shape", self.lora),
        ]

    def environment(self, result: Result) -> None:
        """Say which machine and versions these are."""
        result.data |= self._children.run("environment", 60, environment, self._children.device)
        rows = [(name, str(value)) for name, value in result.data.items()]
        result.tables.append(benchmarking.markdown_table(("", "value"), rows))

    def operation(self, result: Result) -> None:
        """Bound the operation's errors by the usual dense loss's errors."""
        errors = self._children.run("operation", 90, check_operation, self._children.device)
        result.data["relative errors, of ours and of the dense loss"] = errors
        rows = []
        for case, values in errors.items():
            bound = BOUNDS[case.split(", ")[1]]
            for name, (ours, usual) in values.items():
                rows.append([f"{case}: {name}", f"{ours:.1e}", f"{usual:.1e}"])
            worst = all(ours <= bound * usual + 1e-7 for ours, usual in values.values())
            result.check(f"{case}: at most {bound:g} times the dense loss's error", worst)
        header = ("relative error", "ours", "dense loss")
        result.tables.append(benchmarking.markdown_table(header, rows))

    def run(self, result: Result) -> None:
        """Train with Transformer Engine where it is, with local layers, and resume."""
        model = self._model("small", self._sizes.model, with_weights=True)
        records = 8 * self._sizes.steps * self._sizes.rows
        data = self._chats("packed", model, uneven(self._sizes.seq_length, records))
        flags = [*self._common(model, data), "--packing"]
        half = self._sizes.steps // 2
        save = ["--save", str(self._scratch / "save"), "--save-interval", str(half)]
        whole = self._train("run", 120, flags, [*save, *self._iterations(self._sizes.steps)])
        self._forget_last_checkpoint()
        resumed = self._train(
            "resumed",
            90,
            flags,
            [*save, "--load", str(self._scratch / "save"), *self._iterations(self._sizes.steps)],
        )
        local = ["--transformer-impl", "local", *self._iterations(self._sizes.steps)]
        others = self._train("local", 90, flags, local)
        result.data["run"], result.data["local layers"] = speed(whole), speed(others)
        result.data["losses"] = [step["lm loss"] for step in steps_of(whole)]
        for name, lines in (("as resumed", resumed), ("with local layers", others)):
            result.check(f"{name}: losses within {BF16_NOISE:.0%}", _near(whole, lines, "lm loss"))
        result.check(
            "as resumed: the same count of supervised tokens in each step",
            _counts(whole)[half:] == _counts(resumed)[-(self._sizes.steps - half) :],
        )
        result.tables.append(_speeds({"as installed": speed(whole), "local layers": speed(others)}))

    def step(self, result: Result) -> None:
        """Measure a step with plain SFT, with a mask afterwards and with ours, on the same rows."""
        model, length = self._model("bare", self._sizes.model), self._sizes.seq_length
        speeds: dict[str, Mapping[str, float]] = {}
        for prompt, dropped, title in ((0.5, 0.2, "50 / 20"), (0.0, 0.0, "0 / 0")):
            data = self._chats(f"prompt-{prompt}", model, [(int(prompt * length), 2 * length)] * 64)
            for loss in ("ours", "stock", "masked"):
                flags = [*self._common(model, data, dropped=dropped), "--no-packing"]
                more = ["--random-init", *self._iterations(self._sizes.timed)]
                name = f"{loss}, {title}"
                lines = self._train(f"step-{loss}-{prompt}", 60, flags, more, loss)
                speeds[name] = result.data[name] = speed(lines)
        result.notes.append(
            "`stock`: Megatron's cross-entropy. `masked`: the same, masked by p afterwards. The numbers "
            "after the comma are percent of prompt and of dropped tokens, about."
        )
        result.tables.append(_speeds(speeds))

    def kernel(self, result: Result) -> None:
        """Measure the operation in turn with others."""
        import bench_objective

        result.data["configurations"] = []
        device = self._children.device
        for number, _ in enumerate(kernel_configurations(device)):
            rendezvous = str(self._scratch / f"rendezvous-{number}")
            record = self._children.run(
                f"kernel-{number}", 60, measure_kernel, device, number, rendezvous
            )
            result.data["configurations"].append(record)
            result.tables.append(f"{record['title']}:\n\n{bench_objective.table(record)}")
            if "profile" in record:
                result.tables.append(profile_table(record["profile"]))

    def delta_net(self, result: Result) -> None:
        """Compare the forms of Gated DeltaNet with the exact result, and train a tiny model."""
        rendezvous = str(self._scratch / "rendezvous-delta-net")
        found = self._children.run(
            "delta-net", 90, check_delta_net, self._children.device, rendezvous
        )
        result.data |= found
        rows = []
        for case, errors in found["errors"].items():
            bound = DELTA_NET_BOUNDS[case.split(", ")[1]]
            rows += [[f"{case}: {name}", f"{error:.1e}"] for name, error in errors.items()]
            result.check(
                f"{case}: relative errors at most {bound:g}", max(errors.values()) <= bound
            )
        result.notes += [
            f"{form}: {value:,.1f} ms, forward and backward of the timed rows in bf16"
            for form, value in found["milliseconds"].items()
        ]
        if "kernels" not in found["milliseconds"]:
            result.notes.append(
                "not run: flash-linear-attention's kernels, which need a GPU and the package"
            )
        result.tables.append(benchmarking.markdown_table(("relative error", "form"), rows))
        folder = self._scratch / "states"
        model = self._children.run("model-states", 60, write_tiny_model, folder, "qwen3.5")
        data = self._chats("states", model, uneven(self._sizes.seq_length, 16 * self._sizes.timed))
        flags = [*self._common(model, data), "--packing", *self._iterations(self._sizes.timed)]
        whole = self._train("states", 90, flags, [])
        local = self._train("states-local", 90, flags, ["--transformer-impl", "local"])
        is_near = _near(whole, local, "lm loss")
        result.check(f"a tiny Qwen3.5, local layers: losses within {BF16_NOISE:.0%}", is_near)

    def lora(self, result: Result) -> None:
        """Measure steps with adapters of rank 16, whose base is held in bf16."""
        model = self._model("large", self._sizes.lora)
        data = self._chats("lora", model, uneven(self._sizes.seq_length, 256))
        flags = [*self._common(model, data), "--packing"]
        more = ["--random-init", "--lora-rank", "16", *self._iterations(self._sizes.timed)]
        lines = self._train("lora", 90, flags, more)
        result.data |= speed(lines)
        result.tables.append(_speeds({"rank 16": speed(lines)}))

    def _model(self, name: str, sizes: Mapping[str, Any], with_weights: bool = False) -> Path:
        folder = self._scratch / name
        self._children.run(f"model-{name}", 60, write_model, folder, sizes, with_weights)
        return folder

    def _chats(self, name: str, model: Path, lengths: Sequence[tuple[int, int]]) -> Path:
        return write_chats(self._scratch / f"{name}.jsonl", model, lengths)

    def _common(self, model: Path, data: Path, dropped: float = 0.2) -> list[str]:
        config = json.loads((model / "config.json").read_text())
        flags = {
            "--hf-model": model,
            "--data": data,
            "--data-cache": self._scratch / "cache",
            "--seq-length": self._sizes.seq_length,
            "--micro-batch-size": self._sizes.rows,
            "--global-batch-size": 2 * self._sizes.rows,
            "--objective": "profit",
            "--prob-threshold": dropping_threshold(config, dropped),
            "--threshold-direction": "higher",
            "--lr": 1e-5,
            "--lr-decay-style": "constant",
            "--device": self._children.device,
            "--log-interval": 1,
        }
        return [str(part) for pair in flags.items() for part in pair] + ["--bf16"]

    def _iterations(self, count: int) -> list[str]:
        return ["--train-iters", str(count)]

    def _train(
        self,
        name: str,
        seconds: float,
        flags: Sequence[str],
        more: Sequence[str],
        loss: str = "ours",
    ) -> list[dict[str, Any]]:
        metrics = self._scratch / "metrics" / f"{name}.jsonl"
        metrics.unlink(missing_ok=True)
        given = [*flags, *more, "--metrics-file", str(metrics)]
        lines = self._children.run(name, seconds, train, given, loss)
        if not steps_of(lines):
            raise StepFailure(f"the run {name} logged no step")
        return lines

    def _forget_last_checkpoint(self) -> None:
        """Let a run resume from the checkpoint in the middle of the one before."""
        half = self._sizes.steps // 2
        (self._scratch / "save" / "latest_checkpointed_iteration.txt").write_text(str(half))


def _counts(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    return [step["supervised tokens"] for step in steps_of(lines)]


def _near(
    lines: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], name: str
) -> bool:
    """Return whether steps of the same number have nearly the same value."""
    by_step = {step["step"]: step[name] for step in steps_of(lines)}
    pairs = [(by_step[step["step"]], step[name]) for step in steps_of(others)]
    return all(abs(a - b) <= BF16_NOISE * abs(a) for a, b in pairs)


def _speeds(runs: Mapping[str, Mapping[str, float]]) -> str:
    header = ("", "ms a step", "tokens/s", "TFLOP/s", "peak GiB", "kept")
    rows = [
        [
            name,
            f"{1e3 * run['seconds per step']:,.0f}",
            f"{run['tokens per second']:,.0f}",
            f"{run['model TFLOP/s per GPU']:,.1f}",
            f"{run['peak memory GiB']:,.1f}",
            f"{run['kept fraction']:.0%}",
        ]
        for name, run in runs.items()
    ]
    return benchmarking.markdown_table(header, rows)
