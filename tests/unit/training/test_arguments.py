"""The command line: what is derived from the HuggingFace folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from megatron_profit.data import DataError
from megatron_profit.flags import ArgumentsError
from megatron_profit.objectives import Objective, option, registry
from megatron_profit.training.arguments.command_line import add_arguments, provider_of
from megatron_profit.training.arguments.derive import RunSettings, derive
from megatron_profit.training.arguments.disk import RunFiles, open_files
from megatron_profit.training.arguments.platform import platform_settings
from megatron_profit.training.checkpoints.choose import (
    CheckpointFlags,
    Resumed,
    check_checkpoints,
    choose_checkpoints,
)

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 507,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "tie_word_embeddings": True,
}
PROFIT = ("--prob-threshold", "0.1", "--threshold-direction", "higher")


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def read(flags: Sequence[object], world_size: int = 1) -> tuple[RunSettings, RunFiles]:
    """Derives a run's settings and opens its files, as one of `world_size` processes."""
    settings = derive([*map(str, flags)], "cpu", world_size)
    return settings, open_files(settings)


@pytest.fixture
def parse(hf_folder):
    """Reads flags on top of the required ones; returns the settings."""

    def run(*flags: str, world_size: int = 1, objective=PROFIT, files: bool = False):
        required = ["--hf-model", hf_folder, "--data", "a.jsonl", "--seq-length", "64"]
        rest = ["--micro-batch-size", "2", "--random-init", "--lr", "1e-5", "--train-iters", "9"]
        return read([*required, *rest, *objective, *flags], world_size)[files]

    return run


def test_signals_save_a_checkpoint_unless_nothing_else_is_said(parse):
    assert parse().values["exit_signal_handler"] is True


def test_megatron_gets_what_its_own_parser_makes_of_the_flags(parse, monkeypatch):
    """Besides the arguments that follow from config.json or the machine; `sys.argv` is not read."""
    monkeypatch.setattr("sys.argv", ["a notebook", "--with", "arguments of its own"])
    flags = "--adam-beta2 0.9 --recompute-modules mlp core_attn --no-packing --seed 7".split()
    settings = parse(*flags)
    own = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    expected = vars(own.parse_args([*PROFIT, *flags]))
    args = vars(provider_of(settings.values)(own).parse_args())
    assert (args["adam_beta2"], args["recompute_modules"]) == (0.9, ["mlp", "core_attn"])
    assert (args["packing"], args["prob_threshold"]) == (False, expected["prob_threshold"])
    assert not expected.keys() - args.keys()
    others = {name for name in expected if args[name] != expected[name]}
    assert len(others) < 50 < 500 < len(expected)
    assert {"num_layers", "tokenizer_type", "lr", "seq_length"} <= others
    assert not others & {name[2:].replace("-", "_") for name in flags if name.startswith("--")}


def test_architecture_comes_from_the_folder(parse):
    args = parse().values
    expected = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "group_query_attention": True,
        "kv_channels": 32,
        "rotary_base": 500000,
        "layernorm_epsilon": 1e-5,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "swiglu": True,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "untie_embeddings_and_output_weights": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": 507,
        "calculate_per_token_loss": True,
        "tokenizer_type": "HuggingFaceTokenizer",
    }
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(("tp", "padded"), [(1, 507), (2, 508), (4, 508)])
def test_the_vocabulary_is_padded_only_as_tensor_parallelism_needs(parse, tp, padded):
    arguments = parse("--tensor-model-parallel-size", str(tp), world_size=tp)
    assert arguments.values["padded_vocab_size"] == padded


def test_a_flag_of_ones_own_still_wins_over_a_convention(parse):
    arguments = parse("--make-vocab-size-divisible-by", "128", "--log-interval", "7")
    assert arguments.values["padded_vocab_size"] == 512
    assert arguments.values["log_interval"] == 7


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--num-layers", "5"), ("--num-layers", "5", "4")),
        (("--hidden-size", "65"), ("--hidden-size", "65", "64")),
        (("--rotary-base", "10000"), ("--rotary-base", "10000", "500000")),
        (("--attention-dropout", "0.1"), ("--attention-dropout", "0.1", "0.0")),
        (("--untie-embeddings-and-output-weights",), ("True", "False")),
        (("--transformer-impl", "transformer_engine"), ("transformer_engine", "local")),
        (("--distributed-backend", "nccl"), ("nccl", "gloo")),
    ],
)
def test_a_contradiction_names_both_values(parse, flags, named):
    with pytest.raises(ArgumentsError) as error:
        parse(*flags)
    assert all(part in str(error.value) for part in named), error.value


def test_a_flag_that_agrees_with_the_folder_is_accepted(parse):
    parse("--num-layers", "4", "--swiglu", "--hidden-dropout", "0")


@pytest.mark.parametrize(
    ("flags", "world_size", "named"),
    [
        (("--tensor-model-parallel-size", "3"), 3, ("3", "num_attention_heads", "8")),
        (("--tensor-model-parallel-size", "8"), 8, ("8", "num_query_groups", "4", "1, 2, 4")),
        (("--pipeline-model-parallel-size", "3"), 3, ("3", "num_layers", "4")),
        (("--tensor-model-parallel-size", "2"), 3, ("2", "number of processes", "3")),
        (("--global-batch-size", "3"), 1, ("--micro-batch-size", "2", "3")),
        (("--context-parallel-size", "2"), 3, ("context", "2", "number of processes 3")),
        (("--context-parallel-size", "3"), 3, ("--seq-length 64", "multiple of 6")),
        (
            ("--context-parallel-size", "2", "--cp-comm-type", "a2a"),
            2,
            ("--cp-comm-type a2a", "Transformer Engine"),
        ),
        (
            (
                *("--context-parallel-size", "2", "--seq-length", "60"),
                *("--tensor-model-parallel-size", "4", "--sequence-parallel"),
            ),
            8,
            ("--sequence-parallel", "4", "context-parallel", "30"),
        ),
        (("--seq-length", "257"), 1, ("257", "256", "max_position_embeddings")),
        (("--sft",), 1, ("--sft",)),
        (("--cross-entropy-loss-fusion",), 1, ("--cross-entropy-loss-fusion", "--objective")),
        (("--data-path", "x"), 1, ("--data-path", "--data")),
        (("--eval-iters", "3"), 1, ("--eval-iters", "--valid-data")),
        (
            ("--valid-split", "0.05", "--eval-iters", "0"),
            1,
            ("--valid-split 0.05", "--eval-iters 0"),
        ),
        (("--token-report", "r"), 1, ("--token-report", "--valid-data")),
        (("--token-report-records", "3"), 1, ("--token-report, which is missing",)),
        (("--no-such-flag",), 1, ("--no-such-flag",)),
        (("--rotary-interleaved",), 1, ("--rotary-interleaved", "True", "False")),
        (("--rotary-seq-len-interpolation-factor", "4"), 1, ("4", "None")),
        (("--num-experts", "8"), 1, ("--num-experts", "8")),
        (("--spec", "my.layers", "spec"), 1, ("--spec", "my.layers", "None")),
        (("--override-ckpt-iteration", "5"), 1, ("--override-ckpt-iteration", "--ckpt-step")),
        (("--ckpt-convert-format", "torch"), 1, ("--ckpt-convert-format", "torch_dist")),
        (("--moe-shared-expert-glu-interleave-size", "32"), 1, ("glu-interleave-size", "32")),
        (("--apply-layernorm-1p",), 1, ("--apply-layernorm-1p",)),
        (("--squared-relu",), 1, ("--squared-relu",)),
        (("--padded-vocab-size", "9999"), 1, ("9999",)),
        (("--tokenizer-model", "x"), 1, ("--tokenizer-model", "--hf-model")),
        (("--tokenizer-type", "NullTokenizer"), 1, ("--tokenizer-type", "--hf-model")),
        (("--use-checkpoint-args",), 1, ("--use-checkpoint-args", "--hf-model")),
        (("--dataloader-type", "external"), 1, ("--dataloader-type",)),
        (("--split", "1,0,0"), 1, ("--split", "--data")),
        (("--use-torch-fsdp2",), 1, ("--use-torch-fsdp2", "--use-distributed-optimizer")),
        (("--fp8-output-proj",), 1, ("--fp8-output-proj", "dtype of the parameters")),
        (("--inprocess-restart",), 1, ("--inprocess-restart", "--max-restarts")),
        (("--bf16", "--fp32-residual-connection"), 1, ("--fp32-residual-connection", "False")),
        (("--freeze-all-layers",), 1, ("--freeze-all-layers", "no weight")),
        (
            ("--skip-train", "--export-hf", "out"),
            1,
            ("--skip-train", "--export-hf out", "megatron_to_hf"),
        ),
        (
            ("--rampup-batch-size", "2", "2", "100"),
            1,
            ("--rampup-batch-size", "--step-batch-size-schedule"),
        ),
        (
            ("--phase-transition-iterations", "3,6"),
            1,
            ("--phase-transition-iterations", "--exit-interval"),
        ),
        (
            ("--tensor-parallel-num-weight-shards", "2"),
            2,
            ("--tensor-parallel-num-weight-shards", "--tensor-model-parallel-size"),
        ),
        (
            ("--non-persistent-save-interval", "5"),
            1,
            ("--non-persistent-save-interval", "--keep-last"),
        ),
        (("--exit-signal-handler-for-training",), 1, ("--exit-signal-handler-for-training",)),
        (("--keep-last", "2"), 1, ("--keep-last 2", "--save")),
        (("--keep-best", "loss", "--keep-last", "2", "--save", "x"), 1, ("'loss'", "'lm loss'")),
        (("--micro-batch-size", "0"), 1, ("--micro-batch-size", "0")),
        (("--global-batch-size", "0"), 1, ("--global-batch-size", "0")),
        (("--make-vocab-size-divisible-by", "0"), 1, ("--make-vocab-size-divisible-by", "0")),
        (("--seed", "-1"), 1, ("--seed", "-1")),
        (
            ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--seq-length", "47"),
            2,
            ("--sequence-parallel", "47"),
        ),
        (
            ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "3"),
            2,
            ("--num-layers-per-virtual-pipeline-stage", "3"),
        ),
        (
            ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
            2,
            ("--global-batch-size 2", "1 micro-batches", "groups of 2", "give 4"),
        ),
        (
            (
                *("--pipeline-model-parallel-size", "2", "--global-batch-size", "8"),
                *("--num-virtual-stages-per-pipeline-rank", "2", "--valid-split", "0.1"),
                *("--eval-global-batch-size", "6"),
            ),
            2,
            ("--eval-global-batch-size 6", "3 micro-batches", "give 8"),
        ),
        (("--objective", "nonsense"), 1, ("nonsense", "profit", "sft")),
        (("--objective", "sft"), 1, ("--prob-threshold", "profit", "sft")),
        (("--objective", "no_such_module:X"), 1, ("no_such_module", "PYTHONPATH")),
        (("--keep-fraction", "0.5"), 1, ("keep_fraction=0.5", "random")),
        (("--clip-high", "0.2"), 1, ("--clip-high", "psft", "profit")),
        (("--log-quantiles", "0.5", "2"), 1, ("2.0", "quantile")),
        (("--objective-warmup-steps", "9"), 1, ("--objective-warmup-steps 9", "the run's 9")),
        (
            ("--objective-schedule", "prob_threshold", "constant", "0", "9"),
            1,
            ("prob_threshold constant", "all 9", "--prob-threshold would be ignored"),
        ),
        (("--objective-schedule", "tau", "linear", "0", "5"), 1, ("tau", "prob_threshold")),
        (("--objective-schedule", "prob_threshold", "linear", "2", "5"), 1, ("2.0", "[0, 1]")),
    ],
)
def test_what_cannot_work_is_refused(parse, flags, world_size, named):
    with pytest.raises(ArgumentsError) as error:
        parse(*flags, world_size=world_size)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ((), "threshold_direction"),
        (("--prob-threshold", "0.1"), "threshold_direction"),
        (("--prob-threshold", "1.5", "--threshold-direction", "higher"), "1.5"),
        (("--prob-threshold", "0.1", "--threshold-direction", "middle"), "middle"),
        (("--prob-threshold", "0.1", "0.2", "--threshold-direction", "lower"), "lower"),
        (("--threshold-direction", "random"), "keep_fraction"),
    ],
)
def test_options_of_the_objective_are_checked(parse, objective, named):
    with pytest.raises(ArgumentsError, match=named):
        parse(objective=objective)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--objective", "dft", "--objective-normalization", "kept"), ("kept", "dft", "no token")),
        (("--objective", "gce", "--objective-normalization", "kept"), ("kept", "gce", "no token")),
        (("--objective", "sft", "--objective-warmup-steps", "2"), ("sft", "warm-up")),
        (("--objective", "entropy", "--keep-fraction", "0"), ("keep_fraction", "(0, 1]")),
        (("--objective", "psft", "--clip-high", "-1"), ("clip_high", "-1")),
        (
            (
                *("--objective", "sft", "--objective-implementation", "reference"),
                *("--objective-backward", "save"),
            ),
            ("--objective-backward save", "reference", "drop one"),
        ),
    ],
)
def test_what_an_objective_would_ignore_is_refused(parse, flags, named):
    with pytest.raises(ArgumentsError) as error:
        parse(objective=flags)
    assert all(part in str(error.value) for part in named), error.value


def test_objectives_share_flags_with_their_own_defaults(parse):
    for flags, share in ((("entropy",), 0.2), (("entropy", "--keep-fraction", "0.7"), 0.7)):
        flags = ("--objective", *flags)
        objective = parse(objective=flags).objective
        assert objective.keep_fraction == share


def test_earlier_names_of_options_and_divisors_are_accepted(parse):
    earlier = (
        "--objective",
        "entropy",
        "--keep-share",
        "0.7",
        "--objective-normalization",
        "valid",
    )
    schedule = ("--objective-schedule", "keep_share", "linear", "1.0", "4")
    settings = parse(*schedule, objective=earlier)
    assert [settings.objective.at(step).keep_fraction for step in (0, 4)] == [1.0, 0.7]
    assert settings.values["objective_normalization"] == "supervised"
    random = ("--threshold-direction", "random", "--keep-ratio", "0.7")
    assert parse(objective=random).objective.keep_fraction == 0.7


def test_a_schedule_and_a_warm_up_reach_the_objective(parse):
    flags = ("--objective-schedule", "prob_threshold", "linear", "0.0", "4")
    flags += ("--objective-warmup-steps", "2")
    objective = parse(*flags).objective
    assert objective.at(1).name == "sft"
    assert [objective.at(step).prob_threshold for step in (2, 4, 6)] == [(0.0,), (0.05,), (0.1,)]


@pytest.fixture
def outside_objective(monkeypatch):
    """The example objective, importable by name; what it registers is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "examples"))
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(registry._OBJECTIVES))
    return "own_objective:FocalLoss"


def test_an_outside_objective_brings_its_flags(parse, outside_objective, capsys):
    flags = ("--objective", outside_objective, "--focal-gamma", "3")
    objective = parse(objective=flags).objective
    assert (objective.name, objective.focal_gamma) == (outside_objective, 3.0)
    with pytest.raises(SystemExit):
        derive(["--objective", outside_objective, "--help"], "cpu", 1)
    assert "--focal-gamma" in capsys.readouterr().out
    with pytest.raises(ArgumentsError, match=r"focal_gamma 0.5 is below 1"):
        parse(objective=(*flags[:3], "0.5"))


def test_an_outside_objective_may_require_an_option(parse, outside_objective):
    fields = [("sharpness", float, option("how sharp", type=float, required=True))]
    evaluate = {"evaluate": lambda self, statistics: None}
    registry.register_objective("sharp")(
        make_dataclass("Sharp", fields, bases=(Objective,), namespace=evaluate, frozen=True)
    )
    assert parse(objective=("--objective", "sharp", "--sharpness", "2")).objective.sharpness == 2.0
    with pytest.raises(ArgumentsError, match="required: --sharpness"):
        parse(objective=("--objective", "sharp"))


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        (
            "keep_fraction",
            {"type": int},
            "have different options of the name keep_fraction; rename",
        ),
        ("lr", {"type": float}, "name of a native flag .*--lr"),
    ],
)
def test_options_that_clash_are_refused(parse, outside_objective, name, form, message):
    fields = [(name, object, option("clashes", **form))]
    registry.register_objective("clashing")(
        make_dataclass("Clashing", fields, bases=(Objective,), frozen=True)
    )
    with pytest.raises(ArgumentsError, match=message):
        parse()


def test_a_field_that_is_no_option_is_named(parse, outside_objective):
    fields = [("sharpness", float, 2.0)]
    registry.register_objective("plain")(
        make_dataclass("Plain", fields, bases=(Objective,), frozen=True)
    )
    with pytest.raises(ArgumentsError, match="field sharpness of objective plain says nothing"):
        parse()


@pytest.mark.parametrize("spelling", [("0.3", "0.7"), ("0.3,0.7",), ("0.3 0.7",)])
def test_two_thresholds_in_any_spelling(parse, spelling):
    arguments = parse(objective=("--prob-threshold", *spelling, "--threshold-direction", "middle"))
    assert arguments.objective.prob_threshold == (0.3, 0.7)


@pytest.mark.parametrize(
    "name",
    ["--hf-model", "--data", "--seq-length", "--micro-batch-size", "--lr", "--train-iters"],
)
def test_a_missing_flag_is_named(hf_folder, name):
    flags = {
        "--hf-model": str(hf_folder),
        "--data": "a.jsonl",
        "--seq-length": "64",
        "--micro-batch-size": "1",
        "--lr": "1e-5",
        "--train-iters": "9",
    }
    del flags[name]
    with pytest.raises(ArgumentsError, match=name):
        read([part for pair in flags.items() for part in pair])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--lr-warmup-fraction", "1.0"), "--lr-warmup-fraction is 1.0"),
        (("--train-samples", "7", "--global-batch-size", "8"), "--train-samples 7 is less"),
    ],
)
def test_a_run_without_a_step_of_full_learning_rate_is_refused(hf_folder, flags, named):
    length = () if "--train-samples" in flags else ("--train-iters", "9")
    command = ["--hf-model", str(hf_folder), "--data", "a.jsonl", "--seq-length", "64", *length]
    command += ["--micro-batch-size", "2", "--lr", "1e-5", *PROFIT, "--random-init", *flags]
    with pytest.raises(ArgumentsError, match=named):
        read(command)


def test_embedding_and_loss_may_count_as_layers_of_the_pipeline(parse):
    ends = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
    virtual = ("--num-layers-per-virtual-pipeline-stage", "3")
    parse("--pipeline-model-parallel-size", "2", *ends, *virtual, world_size=2)
    with pytest.raises(
        ArgumentsError, match="num_layers and embedding and loss 6; it can be 1, 2, 3"
    ):
        parse("--pipeline-model-parallel-size", "4", *ends, world_size=4)


def test_epochs_become_iterations(parse, hf_folder):
    with pytest.raises(ArgumentsError, match="--train-iters and --epochs contradict"):
        parse("--epochs", "2")
    flags = ["--hf-model", hf_folder, "--data", "a.jsonl", "--seq-length", "64", "--epochs", "3"]
    flags += ["--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "1e-5"]
    arguments, _ = read([*flags, *PROFIT, "--random-init"])
    assert arguments.values["epochs"] == 3
    assert arguments.with_rows(24, 0).values["train_iters"] == 3
    assert arguments.with_rows(25, 0).values["train_iters"] == 4
    assert parse().with_rows(None, 0).values["train_iters"] == 9


def test_epochs_with_a_schedule_of_batch_sizes_are_counted_in_rows(hf_folder, parse):
    """Megatron's steps, and the learning rate's, would be of the micro-batches of all ranks."""
    schedule = ("--step-batch-size-schedule", "0:4 1K:8")
    arguments = in_epochs(hf_folder, "--epochs", "2", *schedule).with_rows(100, 0)
    assert arguments.values["train_samples"] == 100
    assert arguments.values["train_iters"] is None
    with pytest.raises(
        ArgumentsError, match=r"--train-iters 9 cannot .*--epochs or --train-samples"
    ):
        parse(*schedule)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--objective-warmup-steps", "3"), ("--objective-warmup-steps 3", "the run's 3", "fewer")),
        (
            ("--objective-schedule", "prob_threshold", "constant", "0", "3"),
            ("prob_threshold constant", "all 3"),
        ),
        (("--lr-warmup-iters", "3"), ("--lr-warmup-iters 3", "the 3 iters", "fewer than 3")),
    ],
)
@pytest.mark.parametrize("span", ["--epochs", "--train-samples", "--train-iters"])
def test_a_warm_up_as_long_as_the_run_is_refused(hf_folder, flags, named, span):
    if "--lr-warmup-iters" in flags and span == "--train-samples":
        flags, named = ("--lr-warmup-samples", "24"), ("--lr-warmup-samples 24", "the 24 samples")
    lengths = {"--epochs": 3, "--train-samples": 24, "--train-iters": 3}
    command = [
        "--hf-model",
        hf_folder,
        "--data",
        "a.jsonl",
        "--seq-length",
        "64",
        span,
        lengths[span],
    ]
    command += ["--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "1e-5"]
    command += [*PROFIT, "--random-init", *flags]
    with pytest.raises(ArgumentsError) as error:
        read(command)[0].with_rows(24, 0)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--valid-split", "1"), "--valid-split is 1"),
        (("--valid-split", "0.1", "--valid-data", "v.jsonl"), "contradict each other"),
        (("--data-weights", "1", "2"), "2 weights for 1 files"),
        (("--data-weights", "0"), r"a\.jsonl the weight 0"),
        (("--data-workers", "0"), "--data-workers is 0"),
        (("--data-columns", "prompt"), "maps no column"),
        (("--data-columns", "question=prompt"), "maps no column"),
        (("--dataset-info", "none.json"), r"none\.json: cannot be read"),
    ],
)
def test_data_flags_are_checked(parse, flags, message):
    with pytest.raises(DataError, match=message):
        parse(*flags)


@pytest.fixture
def with_weights(hf_folder):
    """The folder with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    Qwen3ForCausalLM(Qwen3Config(**CONFIG)).save_pretrained(hf_folder)
    (hf_folder / "config.json").write_text(json.dumps(CONFIG))
    return hf_folder


@pytest.fixture
def weights_of(hf_folder):
    """Where a run with these flags takes the HuggingFace weights from."""

    def weights_of(*flags: object):
        command = ["--hf-model", hf_folder, "--data", "a.jsonl", "--seq-length", "64", *PROFIT]
        command += ["--micro-batch-size", "1", "--lr", "1e-5", "--train-iters", "9", *flags]
        model = read(command)[1].hf_weights
        return model and model.folder

    return weights_of


def test_weights_come_from_the_folder_unless_there_is_a_checkpoint(
    with_weights, weights_of, tmp_path
):
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    hf_to_megatron(with_weights, ended)
    assert weights_of() == with_weights
    assert weights_of("--load", begun, "--save", begun) == with_weights
    assert weights_of("--load", ended, "--save", ended) is None
    both = ("--load", begun, "--save", begun, "--pretrained-checkpoint", ended)
    assert weights_of(*both) is None
    assert weights_of("--random-init") is None


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
@pytest.mark.parametrize("choose", [choose_checkpoints, check_checkpoints])
def test_a_checkpoint_of_another_architecture_is_refused(
    parse, with_weights, tmp_path, flag, choose
):
    hf_to_megatron(with_weights, tmp_path / "ended")
    settings = parse(flag, str(tmp_path / "ended"))
    assert choose(CheckpointFlags.of(settings.values), settings.check_checkpoint) is None
    (with_weights / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 7}))
    settings = parse(flag, str(tmp_path / "ended"))
    with pytest.raises(ConversionError, match="rotary_base is 500000 in the checkpoint and 7 by"):
        choose(CheckpointFlags.of(settings.values), settings.check_checkpoint)


def test_weights_have_to_come_from_somewhere(weights_of, hf_folder, tmp_path):
    with pytest.raises(ArgumentsError, match=rf"{hf_folder}: no weights"):
        weights_of()
    # A mistyped folder must not start a run from other weights than were meant.
    for flags in (["--load"], ["--save", tmp_path, "--load"], ["--pretrained-checkpoint"]):
        for more in ([], ["--random-init"], *([["--lora-rank", "4"]] * (flags[-1] == "--load"))):
            with pytest.raises(ArgumentsError, match=rf"no checkpoint in {flags[-1]} .*nowhere"):
                weights_of(*more, *flags, tmp_path / "nowhere")


def test_a_mistyped_load_is_refused_also_where_a_checkpoint_is_to_start_from(
    with_weights, weights_of, tmp_path
):
    hf_to_megatron(with_weights, tmp_path / "there")
    start = ("--pretrained-checkpoint", tmp_path / "there", "--save", tmp_path / "new")
    assert weights_of(*start, "--load", tmp_path / "new") is None
    with pytest.raises(ArgumentsError, match=r"no checkpoint in --load .*nowhere"):
        weights_of(*start, "--load", tmp_path / "nowhere")
    # The start of a run that resumes may be gone.
    gone = ("--pretrained-checkpoint", tmp_path / "gone")
    assert weights_of(*gone, "--save", tmp_path / "there", "--load", tmp_path / "there") is None


def test_a_batch_that_does_not_divide_is_refused_at_once(parse):
    with pytest.raises(ArgumentsError, match=r"does not divide .*; it can be 1, 2, 4, 5, 8, 10,"):
        parse("--global-batch-size", str(10**12), "--micro-batch-size", "3")


def test_weights_of_another_shape_are_refused(weights_of, with_weights):
    (with_weights / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 5}))
    with pytest.raises(ArgumentsError, match=r"no tensor model\.layers\.4"):
        weights_of()


@pytest.mark.parametrize(("flags", "dtype"), [((), "float32"), (("--bf16",), "bfloat16")])
def test_an_export_has_the_dtype_of_the_run(parse, tmp_path, flags, dtype):
    export = parse("--export-hf", str(tmp_path / "new" / "out"), *flags, files=True).export
    assert {tensor.dtype.torch for tensor in export.tensors.values()} == {dtype}
    assert not (tmp_path / "new").exists()


def test_an_export_that_would_fail_at_the_end_is_refused_at_the_beginning(
    parse, hf_folder, tmp_path, monkeypatch
):
    for place, message in ((hf_folder, "input"), (tmp_path, "input"), (tmp_path / "x", "a file")):
        (tmp_path / "x").write_text("")
        with pytest.raises(ConversionError, match=message):
            parse("--export-hf", str(place))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ConversionError, match="is not empty"):
        parse("--export-hf", str(tmp_path / "full"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(ConversionError, match="1 kB free"):
        parse("--export-hf", str(tmp_path / "out"))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConversionError, match="not writable"):
        parse("--export-hf", str(tmp_path / "out"))


def test_broken_folders_are_refused(parse, hf_folder):
    (hf_folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["Bert"]}))
    with pytest.raises(ConversionError, match="Bert"):
        parse()
    (hf_folder / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json"):
        parse()
    (hf_folder / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config\.json"):
        parse()


def test_no_evaluation_although_there_is_validation_data(parse):
    flags = ("--valid-data", "v.jsonl", "--eval-iters", "0")
    assert parse(*flags, files=True).data.valid == ()
    assert parse(*flags).with_rows(None, 0).values["eval_iters"] == 0


@pytest.mark.parametrize("apex", [False, True])
@pytest.mark.parametrize("engine", [False, True])
def test_what_a_gpu_machine_has_decides_the_layers(monkeypatch, apex, engine):
    installed = {"transformer_engine": engine, "fused_weight_gradient_mlp_cuda": apex}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed[name] or None)
    fixed, soft = platform_settings("cuda")
    assert fixed.get("transformer_impl") == (None if engine else "local")
    # The output layer is Megatron's own even with Transformer Engine, and needs Apex to fuse.
    assert soft["gradient_accumulation_fusion"] is apex
    assert platform_settings("cuda", local=True)[0]["transformer_impl"] == "local"


def test_one_evaluation_sees_each_validation_example_once(parse):
    arguments = parse("--valid-data", "v.jsonl", "--global-batch-size", "8")
    assert arguments.with_rows(None, 17).values["eval_iters"] == 3
    assert arguments.with_rows(None, 0).values["eval_iters"] == 0
    arguments = parse("--valid-data", "v.jsonl", "--eval-iters", "2")
    assert arguments.with_rows(None, 17).values["eval_iters"] == 2


def resumed(iteration: int, rows: int) -> Resumed:
    return Resumed(Path(f"run/iter_{iteration:07d}"), iteration, {"consumed_train_samples": rows})


def in_epochs(hf_folder: Path, *flags: str):
    command = ["--hf-model", str(hf_folder), "--data", "a.jsonl", "--seq-length", "64"]
    command += ["--micro-batch-size", "1", "--lr", "1e-5", "--random-init", *PROFIT, *flags]
    return derive(command, "cpu", 1)


@pytest.mark.parametrize(
    ("rows", "batch", "done", "steps"),
    [
        (22, 4, None, 6),
        (44, 4, (6, 24), 11),  # the same as from the beginning
        (22, 4, (6, 24), 6),  # all are made
        (22, 4, (8, 32), 6),  # more than all
        (44, 8, (6, 24), 9),  # 20 rows are left
        (10, 2, (10, 40), 0),  # so many more that no number of steps is right
    ],
)
def test_epochs_go_on_after_the_rows_that_were_taken(hf_folder, rows, batch, done, steps):
    arguments = in_epochs(hf_folder, "--epochs", "2", "--global-batch-size", str(batch))
    before = None if done is None else resumed(*done)
    arguments = arguments.with_rows(rows, 0, before)
    assert arguments.values["train_iters"] == arguments.steps == steps
    assert arguments.values["first_step"] == (done[0] if done else 0) + 1


def test_with_another_batch_size_the_schedule_still_ends_with_the_run(hf_folder):
    """Megatron counts it in rows: 24 are taken, 4 steps of 8 are to come, 56 in all."""
    flags = ("--train-iters", "10", "--global-batch-size", "8")
    values = in_epochs(hf_folder, *flags).with_rows(None, 0, resumed(6, 24)).values
    assert values["lr_decay_iters"] * 8 == 56
    given = in_epochs(hf_folder, *flags, "--lr-decay-iters", "9")
    assert given.with_rows(None, 0, resumed(6, 24)).values["lr_decay_iters"] == 9
    same = in_epochs(hf_folder, "--train-iters", "10", "--global-batch-size", "4")
    assert same.with_rows(None, 0, resumed(6, 24)).values["lr_decay_iters"] is None
    samples = in_epochs(hf_folder, "--train-samples", "100", "--global-batch-size", "8")
    with pytest.raises(ArgumentsError, match=r"24 rows in 6 steps.*--train-iters 16 in place"):
        samples.with_rows(None, 0, resumed(6, 24))


def test_batch_sizes_of_a_schedule_that_the_ranks_cannot_share_are_refused_at_the_start(hf_folder):
    """Megatron compares a size when it is reached. Sizes before the checkpoint may be of fewer ranks."""
    flags = ("--epochs", "2", "--micro-batch-size", "4", "--step-batch-size-schedule")
    uneven = in_epochs(hf_folder, *flags, "0:6 1280:10")
    with pytest.raises(ArgumentsError, match=r"6 rows from row 0 on, and .* size 4 .*give 4 or 8"):
        uneven.with_rows(100, 0)
    with pytest.raises(ArgumentsError, match=r"10 rows from row 20 on.*give 8 or 12"):
        uneven.with_rows(100, 0, resumed(5, 30))
    grown = in_epochs(hf_folder, *flags, "0:6 1280:12").with_rows(100, 0, resumed(5, 30))
    assert grown.values["train_samples"] == 100
    with pytest.raises(ArgumentsError, match=r"'1K:8' cannot be read: .*threshold 0"):
        in_epochs(hf_folder, *flags, "1K:8").with_rows(100, 0)


def test_a_resume_follows_the_flags_unless_they_name_the_checkpoints_schedule(parse):
    assert parse().values["override_opt_param_scheduler"] is True
    flag = "--use-checkpoint-opt_param-scheduler"
    assert parse(flag).values["override_opt_param_scheduler"] is False
    with pytest.raises(ArgumentsError, match="contradict each other"):
        parse(flag, "--override-opt_param-scheduler")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--overwrite", "neither is given"),
        ("--allow-change date", "invalid choice: 'date'"),
        ("--lr nan", "--lr is nan"),
        ("--min-lr 1", "--min-lr 1.0 is above --lr 1e-05"),
        ("--weight-decay -1", "--weight-decay is -1.0"),
        ("--adam-beta2 1", r"--adam-beta2 is 1.0; it must be in \[0, 1\)"),
        ("--seed 4294967295", "--seed is 4294967295; it must be at most"),
        ("--ckpt-step 0", "--ckpt-step is 0; it must be at least 1 and below"),
        ("--ckpt-step -1", "--ckpt-step is -1; it must be at least 1 and below"),
        ("--ckpt-step 1" + "0" * 15, "--ckpt-step is 1000000000000000; it must be at least"),
        ("--ckpt-step " + "9" * 400, "--ckpt-step is 9999"),
        ("--seed " + "9" * 400, "it must be at most"),
        ("--log-interval 0", "--log-interval is 0; it must be at least 1"),
        ("--num-workers -1", "--num-workers is -1"),
        ("--lr-decay-style WSD", "give --lr-wsd-decay-iters"),
        ("--optimizer sgd --use-distributed-optimizer", "--use-distributed-optimizer cannot"),
        ("--bf16 --fp16", "contradict each other"),
        ("--wandb-project p", "give --wandb-exp-name"),
        ("--wandb-project p --wandb-exp-name e", "give --wandb-save-dir"),
        ("--tensorboard-dir /dev/null", "/dev/null is not a folder"),
        ("--metrics-file /dev/null/m.jsonl", "--metrics-file /dev/null/m.jsonl: /dev/null is"),
        ("--token-report /dev/null/r --valid-data v.jsonl", "--token-report /dev/null/r"),
        ("--pretrained-checkpoint none", "no checkpoint in --pretrained-checkpoint none"),
    ],
)
def test_what_megatron_would_end_on_later_is_refused(parse, flags, named):
    with pytest.raises(ArgumentsError, match=named):
        parse(*flags.split())


def test_an_optimizer_whose_package_is_missing_is_refused(parse, monkeypatch):
    missing = lambda name: None  # noqa: E731
    monkeypatch.setattr(
        "megatron_profit.training.arguments.native_flags.importlib.util.find_spec", missing
    )
    with pytest.raises(ArgumentsError, match="--optimizer muon needs the package emerging-optim"):
        parse("--optimizer", "muon")


def test_curves_on_wandb_need_its_package(parse, monkeypatch, tmp_path):
    missing = lambda name: None  # noqa: E731
    monkeypatch.setattr(
        "megatron_profit.training.arguments.native_flags.importlib.util.find_spec", missing
    )
    flags = ("--wandb-project", "p", "--wandb-exp-name", "e", "--save", str(tmp_path))
    with pytest.raises(ArgumentsError, match="needs the package wandb, which is not installed"):
        parse(*flags)


def test_help_shows_our_flags_before_megatrons(capsys):
    with pytest.raises(SystemExit) as end:
        derive(["--help"], "cpu", 1)
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.index("--hf-model") < text.index("--prob-threshold") < text.index("--num-layers")


def test_metrics_go_beside_the_checkpoints_or_where_a_flag_says(parse, tmp_path):
    assert parse(files=True).metrics is None
    assert parse("--save", str(tmp_path), files=True).metrics == tmp_path / "metrics.jsonl"
    file = tmp_path / "other.jsonl"
    flags = ("--save", str(tmp_path), "--metrics-file", str(file))
    assert parse(*flags, files=True).metrics == file
    with pytest.raises(ArgumentsError, match=r"--metrics-file .* is a folder; name a file"):
        parse("--metrics-file", str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--spike-loss 0.5", "--spike-loss is 0.5"),
        ("--stall-steps 0", "--stall-steps is 0"),
        ("--on-nonfinite warn", "--on-nonfinite: invalid choice: 'warn'"),
        ("--optimizer-cuda-graph", "--optimizer-cuda-graph cannot be used here: a guard decides"),
    ],
)
def test_guards_that_cannot_work_are_refused(parse, flags, named):
    with pytest.raises(ArgumentsError, match=named):
        parse(*flags.split())


PACKED = "with --packing attention goes by the records of each row"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cuda-graph-impl full_iteration", "of the full iteration cannot be recorded"),
        ("--cuda-graph-modules full_iteration", "of the full iteration cannot be recorded"),
        ("--cuda-graph-impl transformer_engine", f"{PACKED}.* give --cuda-graph-modules mlp"),
        ("--cuda-graph-impl transformer_engine --cuda-graph-modules attn mlp", PACKED),
        ("--cuda-graph-impl local", f"{PACKED}; drop one of the two$"),
        ("--cuda-graph-impl local --cuda-graph-modules full", PACKED),
        ("--cuda-graph-impl local --cuda-graph-modules mlp", PACKED),
        ("--enable-cuda-graph", "--enable-cuda-graph cannot be used here: give --cuda-graph-impl"),
        ("--external-cuda-graph", "--external-cuda-graph cannot be used here: give --cuda-graph-i"),
        ("--cuda-graph-scope attn", "--cuda-graph-scope cannot be used here: give --cuda-graph-m"),
    ],
)
def test_cuda_graphs_that_cannot_be_recorded_are_refused(parse, flags, message):
    with pytest.raises(ArgumentsError, match=message):
        parse(*flags.split())


def test_cuda_graphs_of_rows_of_one_record_or_of_other_parts_are_accepted(parse):
    for flags in (
        "--cuda-graph-impl local --no-packing",
        "--cuda-graph-impl transformer_engine --no-packing",
        "--cuda-graph-impl transformer_engine --cuda-graph-modules mlp",
        "--cuda-graph-impl local --cuda-graph-modules moe_router",
    ):
        parse(*flags.split())
    split = "--cuda-graph-impl local --no-packing --context-parallel-size 2"
    with pytest.raises(ArgumentsError, match="with --context-parallel-size without Transformer"):
        parse(*split.split(), world_size=2)


def test_megatrons_reruns_are_off_unless_asked_for(parse):
    assert parse().values["rerun_mode"] == "disabled"
    assert parse("--rerun-mode", "validate_results").values["rerun_mode"] == "validate_results"
