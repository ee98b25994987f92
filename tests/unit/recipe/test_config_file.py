"""A YAML file is the same as flags, and what is wrong in one is said with the nearest name."""

from __future__ import annotations

import functools

import pytest

from megatron_profit.recipe.config_file import as_config, read_config
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import FlagTable, words_of
from megatron_profit.recipe.request import front_parser, read_request

FRONT = frozenset(front_parser()._option_string_actions)
DRAFT = """\
model: Qwen/Qwen3-14B-Base
data: {train: chats.jsonl, valid_split: 0.02, packing: true}
objective: {name: profit, prob_threshold: 0.1}
training: {epochs: 1, global_batch_size: 32, lr: 1.0e-5, warmup_fraction: 0.1}
layout: {tensor: 4, sequence: true, recompute: full}
run: {folder: runs/14b, keep_last: 2, export: true}
evaluate: {tasks: [gsm8k, math500], samples: 8, data: [data/eval]}
megatron: {overlap-grad-reduce: true}
"""


@functools.cache
def table() -> FlagTable:
    return FlagTable()


def words(tmp_path, text: str) -> list[str]:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return read_config(file, table(), FRONT)


def test_sections_are_flags(tmp_path):
    assert words(tmp_path, DRAFT) == [
        *("--model", "Qwen/Qwen3-14B-Base", "--data", "chats.jsonl", "--valid-split", "0.02"),
        *("--packing", "--objective", "profit", "--prob-threshold", "0.1", "--epochs", "1"),
        *("--global-batch-size", "32", "--lr", "1.0e-5", "--lr-warmup-fraction", "0.1"),
        *("--tensor-model-parallel-size", "4", "--sequence-parallel"),
        *("--recompute-granularity", "full", "--run", "runs/14b", "--keep-last", "2"),
        *("--eval-tasks", "gsm8k,math500", "--eval-flags=--samples 8 --data data/eval"),
        "--overlap-grad-reduce",
    ]


def test_a_section_may_be_one_value_and_lists_are_several(tmp_path):
    text = "model: a\ndata: [x.jsonl, y.jsonl]\nobjective: dft\nlayout: auto\n"
    assert words(tmp_path, text) == [
        *("--model", "a", "--data", "x.jsonl", "y.jsonl", "--objective", "dft", "--layout", "auto")
    ]


def test_adapters_have_a_section(tmp_path):
    text = (
        "objective: {name: asft, ref_mode: adapter-off}\n"
        "lora: {rank: 4, targets: [q_proj, v_proj], rslora: true, adapter: old, export: new}\n"
    )
    assert words(tmp_path, text) == [
        *("--objective", "asft", "--ref-mode", "adapter-off", "--lora-rank", "4"),
        *("--lora-targets", "q_proj", "v_proj", "--lora-rslora", "--lora-adapter", "old"),
        *("--export-adapter", "new"),
    ]


def test_values_stay_as_they_are_written(tmp_path):
    """YAML 1.1 would read a number in base 60, an octal one and a truth."""
    text = "layout: {nnodes: 1:4}\ntraining: {lr: 1e-5, seed: 010}\nrun: {wandb_project: no}\n"
    assert words(tmp_path, text) == [
        *("--nnodes", "1:4", "--lr", "1e-5", "--seed", "010", "--wandb-project", "no")
    ]


def test_a_later_file_switches_the_commands_own_switches_off(tmp_path):
    (tmp_path / "on.yaml").write_text("model: a\ndata: b\nrun: {verbose: true, rank_logs: true}\n")
    (tmp_path / "off.yaml").write_text("run: {verbose: false, rank_logs: false}\n")
    for names, expected in ((("on",), True), (("on", "off"), False)):
        files = [str(tmp_path / f"{name}.yaml") for name in names]
        front = read_request(["--config", *files]).front
        assert (front.verbose, front.rank_logs) == (expected, expected)
    assert read_request(["--config", files[0], "--no-rank-logs"]).front.rank_logs is False


def test_a_value_that_looks_like_a_flag_stays_a_value(tmp_path):
    text = "run: {without: [--export-hf, --bf16], eval_flags: --greedy, verbose: true}\n"
    assert words(tmp_path, text) == [
        *("--without=--export-hf", "--without=--bf16", "--eval-flags=--greedy", "--verbose")
    ]
    given = table().parse(["--eval-flags=--greedy"])
    assert given["eval_flags"].words == ("--eval-flags=--greedy",)


def test_options_of_an_objective_from_outside_are_entries(tmp_path):
    text = "objective: {name: my.module:Class, my_option: 3, my_switch: true, log_entropy: true}\n"
    found = words(tmp_path, text)
    assert sorted(found) == sorted(
        ["--objective", "my.module:Class", "--my-option", "3", "--my-switch", "--log-entropy"]
    )
    flags = table().parse(found)
    again = as_config("some/model", flags.values(), {}, table())
    assert sorted(words(tmp_path, again)) == sorted(["--model", "some/model", *found])


def test_several_files_may_be_named_one_by_one(tmp_path):
    for number, text in enumerate(["data: a.jsonl\nmodel: m\n", "training: {lr: 1}\n"]):
        (tmp_path / f"{number}.yaml").write_text(text)
    files = [f"--config={tmp_path}/{number}.yaml" for number in range(2)]
    request = read_request(files)
    assert (request.model, request.given["lr"].value) == ("m", 1.0)


@pytest.mark.parametrize(
    ("earlier", "later", "words", "left_out"),
    [
        ("training: {epochs: 2}", "--train-iters 10", ["--train-iters", "10"], []),
        ("training: {warmup_fraction: 0.1}", "--lr-warmup-iters 3", ["--lr-warmup-iters", "3"], []),
        (
            "objective: {name: profit, prob_threshold: 0.1}",
            "--threshold-quantile 0.3",
            ["--objective", "profit", "--threshold-quantile", "0.3"],
            [],
        ),
        ("objective: {name: profit, prob_threshold: 0.1}", "--objective dft", None, []),
        (
            "layout: {distributed_optimizer: true}",
            "--without=--use-distributed-optimizer",
            [],
            None,
        ),
        ("layout: {distributed_optimizer: false}", "--use-distributed-optimizer", None, []),
        ("run: {export: false}", "--export-hf=x", ["--export-hf", "x"], []),
        ("layout: {recompute: full}", "--without=--recompute-granularity", [], None),
    ],
)
def test_a_later_source_replaces_what_it_excludes(tmp_path, earlier, later, words, left_out):
    (tmp_path / "a.yaml").write_text(f"model: m\ndata: d\n{earlier}\n")
    request = read_request([f"--config={tmp_path}/a.yaml", *later.split()])
    expected = later.split() if words is None else words
    assert words_of(f for n, f in request.given.items() if n != "data") == expected
    gone = [later.partition("=")[2]] if left_out is None else left_out
    assert request.front.without == gone


def test_no_recomputation_is_a_choice_that_the_layout_keeps(tmp_path):
    for none in ("none", "false"):
        text = f"layout: {{mode: auto, recompute: {none}}}\n"
        assert words(tmp_path, text) == ["--layout", "auto", "--without=--recompute-granularity"]


def test_false_keeps_a_flag_from_being_derived(tmp_path):
    text = "data: {packing: false}\nrun: {export: false}\nmegatron: {overlap-param-gather: false}\n"
    assert words(tmp_path, text) == [
        *("--no-packing", "--without=--export-hf", "--without=--overlap-param-gather")
    ]


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(DRAFT)
    argv = ["--config", str(file), "--lr", "3e-5", "--run", "elsewhere", "--data", "b.jsonl"]
    request = read_request(argv)
    assert request.given["lr"].words == ("--lr", "3e-5")
    assert request.given["epochs"].value == 1
    assert (request.front.run, request.value("data")) == ("elsewhere", ["b.jsonl"])


def test_another_objective_drops_the_options_of_the_files(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(DRAFT)
    request = read_request(["--config", str(file), "--objective", "dft"])
    assert request.value("objective") == "dft"
    assert "prob_threshold" not in request.given
    assert request.given["epochs"].value == 1
    same = read_request(["--config", str(file), "--objective", "profit"])
    assert same.given["prob_threshold"].texts == ("0.1",)


def test_a_run_is_written_as_the_file_that_reads_as_the_same_flags(tmp_path):
    flags = table().parse(
        "--data a.jsonl b.jsonl --no-packing --objective psft --psft-steps-per-refresh 4 --lr 1e-5 "
        "--clip-low 0.3 --train-iters 9 --tensor-model-parallel-size 2 --bf16 --no-load-optim "
        "--on-spike skip --moe-router-dtype fp32 --objective-schedule clip_high linear 0.0 5 "
        "--objective-schedule clip_low linear 0.1 5 --metrics-file m.jsonl".split()
    )
    text = as_config("some/model", flags.values(), {"--run": "runs/x"}, table())
    again = words(tmp_path, text)
    assert again[:2] == ["--model", "some/model"]
    rest = [w for w in again if w not in ("--model", "some/model", "--run", "runs/x")]
    assert table().parse(rest) == flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objectve: profit\n", "there is no section 'objectve'; did you mean objective?"),
        ("training: {epoch: 1}\n", "training: there is no entry 'epoch'; did you mean epochs?"),
        ("objective: {prob_treshold: 0.1}\n", "did you mean prob_threshold?"),
        ("megatron: {overlap-grad-reduc: true}\n", "did you mean overlap-grad-reduce?"),
        ("training:\n  lr: 1\n  lr: 2\n", "'lr' stands twice in the section of line 2"),
        ("training: {lr: }\n", "lr has no value"),
        ("training: 3\n", "training: must hold entries, found '3'"),
        ("training: {lr: {a: 1}}\n", "--lr has {'a': '1'}; it must be a value or a list of values"),
        ("training: {bf16: 2}\n", "--bf16 is '2'; it must be true or false"),
        ("training: {bf16: yes}\n", "--bf16 is 'yes'; it must be true or false"),
        ("training: {lr: [[[1]]]}\n", "--lr has [[['1']]]; it must be a value or a list of values"),
        ("training: {lr: &a [*a]}\n", "--lr has [[[[[[[...]]]]]]]; it must be a value"),
        ("training: {lr: [1, 2]}\n", "--lr has ['1', '2']; it takes one value"),
        ("model: [a, b]\n", "--model has ['a', 'b']; it takes one value"),
        ("data: {train: []}\n", "--data has an empty list; give a value, or drop the line"),
        ("evaluate: {tasks: gsm8k, temperature: hot}\n", "temperature: invalid"),
        ("data: {train: [a, true]}\n", "--data has ['a', True]; it must be a value or a list"),
        ("training: {lr: !!set {1}}\n", "it must be a value or a list of values"),
        ("training: {lr: true}\n", "--lr is true; it must have a value"),
        ("evaluate: {samples: 8}\n", "evaluate: must hold tasks and flags of the evaluation"),
        ("evaluate: {tasks: gsm8k, sample: 8}\n", "'sample'; did you mean samples?"),
        ("evaluate: {tasks: gsm8k, samples: true}\n", "samples has True; it must be a value"),
        ("- a\n", "must hold sections, found list"),
        ("a: [1\n", "not YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not YAML"),
        ("\tmodel: x\n", "not YAML"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path, text, message):
    with pytest.raises(LaunchError) as error:
        words(tmp_path, text)
    assert message in str(error.value)
    assert f"--config {tmp_path}/run.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name):
    with pytest.raises(LaunchError, match="cannot be read"):
        read_config(tmp_path / name, table(), FRONT)


def test_an_empty_file_is_no_flags(tmp_path):
    assert words(tmp_path, "# nothing here yet\n") == []
