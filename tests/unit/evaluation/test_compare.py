"""The comparison: its plan, its runs that are kept, its tables, and input that cannot be used."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from checkpoint_conversion.engine.lock import lock_file
from megatron_profit.commands import compare
from megatron_profit.evaluation.comparison import commands as command_runner
from megatron_profit.evaluation.comparison import runs as comparison
from megatron_profit.evaluation.comparison.plan import TRAINED, Plan, Run, read_plan
from megatron_profit.evaluation.comparison.runs import (
    Outcome,
    outcome_of,
    read_outcome,
    write_outcome,
)
from megatron_profit.evaluation.comparison.tables import (
    draw_comparison,
    report,
    table,
    tenths,
    unfinished_table,
)
from megatron_profit.evaluation.errors import EvaluationError


def outcome(objective, seed, score, data="gsm8k", kept=None, **metrics):
    run = Run(data, objective, 1e-5, 0, seed) if objective else None
    curves = {"kept fraction": kept} if kept else {}
    return Outcome(run, data, {"gsm8k": score, "ifeval": 0.25}, metrics, curves=curves)


OUTCOMES = [
    outcome(None, 0, 0.5),
    outcome("sft", 1, 0.5, kept=[0.75, 1.0], **{"lm loss validation": 1.0}),
    outcome("sft", 2, 0.75, kept=[0.25, 0.5], **{"lm loss validation": 2.0}),
    outcome("dft", 1, 0.25),
]


def test_mean_and_spread_are_over_the_seeds():
    assert table(OUTCOMES).splitlines() == [
        "| setting | gsm8k | ifeval |",
        "|---|---|---|",
        "| the base | 50.0 % | 25.0 % |",
        "| sft, lr 1e-05 | 62.5 ± 17.7 % | 25.0 ± 0.0 % |",
        "| dft, lr 1e-05 | 25.0 % | 25.0 % |",
        "",
        "| data | setting | held-out cross-entropy | kept, last tenth |",
        "|---|---|---|---|",
        "| gsm8k | sft, lr 1e-05 | 1.500 | 0.750 |",
        "| gsm8k | dft, lr 1e-05 |  |  |",
    ]


def test_steps_count_by_their_tokens():
    """The last step of an epoch has the few records that are left."""
    kept = [0.5] * 10 + [0.75] * 8 + [0.5, 1.0]
    curves = {"kept fraction": kept, "supervised tokens": [100.0] * 19 + [25.0]}
    assert tenths(Outcome(None, "gsm8k", {}, {}, curves=curves), "kept fraction") == (0.5, 0.6)
    del curves["supervised tokens"]
    assert tenths(Outcome(None, "gsm8k", {}, {}, curves=curves), "kept fraction") == (0.5, 0.75)
    assert tenths(Outcome(None, "gsm8k", {}, {}), "kept fraction") is None


def test_answers_that_were_cut_have_a_table():
    cut = [replace(o, unfinished={"gsm8k": 0.25 * o.run.seed}) for o in OUTCOMES[1:]]
    assert unfinished_table([OUTCOMES[0], *cut]).splitlines() == [
        "| answers that were cut, % | gsm8k | ifeval |",
        "|---|---|---|",
        "| sft, lr 1e-05 | 37.5 |  |",
        "| dft, lr 1e-05 | 25.0 |  |",
    ]
    assert unfinished_table(OUTCOMES) == ""
    assert "| sft, lr 1e-05 | 37.5 |  |" in report(cut)


def test_the_figure_is_drawn(tmp_path):
    draw_comparison(OUTCOMES, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_several_ranks_are_drawn_as_lines(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, stream, **_: drawn.append(self))
    outcomes = [Outcome(None, "gsm8k", {"gsm8k": 0.5}, {})] + [
        Outcome(Run("gsm8k", name, None, rank, seed), "gsm8k", {"gsm8k": score / 100}, {})
        for seed in (1, 2)
        for name, scores in {"sft": (10, 30, 20), "dft": (50, 40, 60)}.items()
        for rank, score in zip((64, 0, 4), (score + 10 * seed for score in scores), strict=True)
    ]
    draw_comparison(outcomes, tmp_path / "figure.png")
    axis = drawn[0].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "64", "all weights"]
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines[:2]}
    assert lines["sft"] == pytest.approx([35, 25, 45])
    assert lines["dft"] == pytest.approx([75, 65, 55])
    assert list(axis.lines[2].get_ydata()) == [50, 50]


def test_a_setting_with_adapters_among_others_stands_in_the_column(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, stream, **_: drawn.append(self))
    adapted = Outcome(Run("gsm8k", "sft", 1e-3, 16, 1), "gsm8k", {"gsm8k": 0.5}, {})
    draw_comparison([*OUTCOMES, adapted], tmp_path / "figure.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert labels == ["sft, lr 0.001, rank 16", "dft, lr 1e-05", "sft, lr 1e-05"]


@pytest.mark.parametrize("kept", OUTCOMES)
def test_a_result_that_was_kept_is_read_as_it_was_written_or_refused(tmp_path, kept):
    file = tmp_path / "result.json"
    write_outcome(file, kept)
    assert read_outcome(file) == kept
    text = file.read_text()
    for damaged in ("", "5", text[:-3], text.replace("0.25", "0.95")):
        file.write_text(damaged)
        with pytest.raises(EvaluationError, match=r"result\.json is damaged .*remove it"):
            read_outcome(file)


@pytest.fixture
def plan(tmp_path):
    """plan(**changes): the file of a plan of two objectives, rates, ranks and seeds."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("{}\n")

    def write(**changes):
        content = {
            "base": str(base),
            "train": f"--data {tmp_path}/train.jsonl --train-iters 2",
            "evaluate": "--tasks gsm8k --limit 5",
            "objectives": {"sft": "--objective sft", "dft": "--objective dft"},
            "learning_rates": ["1e-5", 2e-5],
            "lora_ranks": [0, 16],
            "seeds": [1, 2],
        } | changes
        file = tmp_path / "plan.yaml"
        file.write_text(
            yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False)
        )
        return file

    return write


def test_a_plan_is_every_choice_of_every_axis(plan, tmp_path):
    found = read_plan(plan())
    runs = found.runs()
    assert len(set(runs)) == 16
    assert runs[0].setting == "sft, lr 1e-05"
    assert runs[3].setting == "sft, lr 2e-05, rank 16"
    command = found.train_command(runs[3], Path("hf"), Path("m.jsonl"))
    tail = (
        "--objective sft --lr 2e-05 --lora-rank 16 --seed 1 --export-hf hf --metrics-file m.jsonl"
    )
    assert " ".join(command).endswith(tail)
    assert "--lora-rank" not in found.train_command(runs[0], Path("hf"), Path("m"))
    command = found.evaluate_command("data", "", Path("hf"), Path("out"))
    assert (
        command[1:]
        == "-m megatron_profit evaluate model=hf --tasks gsm8k --limit 5 --out out".split()
    )
    parallel = read_plan(plan(processes=2, learning_rates=None))
    assert "torch.distributed.run" in parallel.train_command(runs[0], Path("hf"), Path("m"))
    assert "--lr" not in parallel.train_command(parallel.runs()[0], Path("hf"), Path("m"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "absent"}, "base: .*absent is no folder"),
        ({"objectives": None}, "objectives must be given"),
        ({"objectives": {}}, "objectives is {}; it must be a mapping"),
        (
            {"objectives": {"sft": "--objective 'sft"}},
            "objectives: sft is .* it must be a text of flags",
        ),
        ({"objective": {"sft": ""}}, "unknown key 'objective'; the keys are base, train"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; it must be a list of different whole numbers"),
        ({"seeds": []}, "seeds is"),
        ({"learning_rates": ["fast"]}, "learning_rates is"),
        ({"lora_ranks": [-1]}, "lora_ranks is"),
        ({"jobs": 0}, "jobs is 0; it must be at least 1"),
        ({"data": {"a": "--data x"}}, "data: a must hold train and evaluate"),
        ({"train": 5}, "train is 5; it must be a text of flags"),
        ({"evaluate": {}}, "evaluate is {}; it must be a mapping"),
        ({"evaluate": {"sums": 5}}, "evaluate: sums is 5; it must be a text of flags"),
        ({"seeds": None, "stages": []}, r"stages is \[\]; it must be a list of mappings"),
        ({"stages": [{"rates": [1]}]}, "stages: 1: unknown key 'rates'; the keys are data"),
        ({"stages": [{}, {"seeds": [1, 1]}]}, "stages: 2: seeds is .* different whole numbers"),
        (
            {"seeds": [True, 2]},
            r"seeds is \[True, 2\]; it must be a list of different whole numbers",
        ),
        ({"seeds": [1, 2.9]}, r"seeds is \[1, 2.9\]"),
        ({"seeds": "12"}, "seeds is '12'"),
        ({"seeds": {1: 2}}, "seeds is {1: 2}"),
        (
            {"learning_rates": [True]},
            r"learning_rates is \[True\]; .* different numbers, none below 0",
        ),
        ({"learning_rates": [float("nan")]}, r"learning_rates is \[nan\]"),
        ({"learning_rates": ["inf"]}, r"learning_rates is \['inf'\]"),
        (
            {"stages": [{"objectives": [["sft"]]}]},
            r"objectives is \[\['sft'\]\]; it must be a list",
        ),
        ({"evaluate": {1: "--tasks a"}}, "evaluate: 1 is no text; put the name into quotes"),
        ({"objectives": {False: "--objective sft"}}, "objectives: False is no text"),
        ({"data": {2024: {"train": "--data a"}}}, "data: 2024 is no text"),
        ({"text": "a"}, "unknown key 'text'"),
        ({"stages": [{"objectives": ["gce"]}]}, "stages: 1: objectives: there is no 'gce'"),
        ({"stages": [{"objectives": "sft"}]}, "stages: 1: objectives is 'sft'; it must be a list"),
        ({"jobs": True}, "jobs is True; it must be at least 1"),
        ({"keep_models": "no"}, "keep_models is 'no'; it must be true or false"),
        ({"save_interval": -1}, "save_interval is -1; it must be at least 0"),
        ({"train": "--seed=7"}, "train has --seed, which has no place there; give seeds"),
        ({"train": "--hf-model x"}, "train has --hf-model, .*; give base"),
        ({"objectives": {"sft": "--lr 1"}}, "objectives: sft has --lr, .* or learning_rates"),
        (
            {"data": {"a": {"train": "--save x"}}, "save_interval": 3},
            "data: a: train has --save, .* or save_interval",
        ),
        ({"evaluate": "--tasks gsm8k --out x"}, "evaluate has --out, .*; drop it"),
        ({"evaluate": "--tasks gsm8k --server=http://x"}, "has --server, .*; drop it; a server"),
    ],
)
def test_plans_that_cannot_be_used_are_refused(plan, changes, message):
    with pytest.raises(EvaluationError, match=message):
        read_plan(plan(**changes))


def test_a_file_that_is_no_plan_is_refused(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text("a: [")
    assert compare.main([str(tmp_path / "plan.yaml"), "--out", str(tmp_path)]) == 1
    assert "plan.yaml cannot be read" in capsys.readouterr().err
    (tmp_path / "plan.yaml").write_text("!!python/object/apply:os.system ['true']")
    assert compare.main([str(tmp_path / "plan.yaml"), "--out", str(tmp_path)]) == 1
    assert "could not determine a constructor" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "absent.yaml"), "--out", str(tmp_path)]) == 1


def test_an_objective_that_is_named_twice_is_refused(plan):
    file = plan()
    file.write_text(
        file.read_text().replace("objectives:\n", "objectives:\n  sft: --objective dft\n")
    )
    with pytest.raises(EvaluationError, match=r"'sft' stands twice in the section of line \d+"):
        read_plan(file)


def answers(right):
    """The file of the answers to questions, right or wrong."""
    sample = {
        "number": 0,
        "text": "",
        "tokens": 1,
        "stopped": True,
        "extracted": None,
        "parsed": True,
    }
    lines = [{"kind": "settings", "task": "gsm8k"}]
    lines += [
        {"kind": "question", "number": i, "samples": [sample | {"right": is_right}]}
        for i, is_right in enumerate(right)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run, each of which leaves the files that the real one leaves."""
    made = []

    def execute(command, log, threads):
        made.append(command)
        if "evaluate" in command:
            out = Path(command[command.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            right = [True, False, False, False] if "hf" in command[4] else [True, False] * 2
            results = [{"task": "gsm8k", "average": {"value": sum(right) / 4}, "unfinished": 0.25}]
            (out / "results.json").write_text(json.dumps({"results": results}))
            (out / "model").mkdir()
            (out / "model" / "gsm8k.jsonl").write_text(answers(right))
        else:
            Path(command[command.index("--export-hf") + 1]).mkdir()
            line = {"kind": "train", "step": 2, "kept fraction": 0.5, "lm loss": 1.0}
            Path(command[command.index("--metrics-file") + 1]).write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(comparison, "execute", execute)
    return made


def test_runs_are_made_once_and_again_when_something_they_follow_from_has_changed(
    plan, commands, tmp_path, capsys
):
    flags = ["--out", str(tmp_path / "out")]
    assert compare.main([str(plan(learning_rates=None, lora_ranks=None)), *flags]) == 0
    assert len(commands) == 1 + 2 * 4
    printed = capsys.readouterr().out
    assert "4 of 4 parts" in printed
    assert "| the base | 50.0 % (0.0 to 100.0) |" in printed
    assert "| sft | 25.0 ± 0.0 % (0.0 to 75.0) |" in printed
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert report["results"][1]["metrics"]["kept fraction"] == 0.5
    assert (tmp_path / "out/figure.png").stat().st_size > 5_000
    assert not list((tmp_path / "out").rglob("hf"))

    assert (
        compare.main([str(plan(learning_rates=None, lora_ranks=None, seeds=[1, 2, 3])), *flags])
        == 0
    )
    assert len(commands) == 9 + 2 * 2, "only the third seed is new"
    with (tmp_path / "train.jsonl").open("a") as data:
        data.write("{}\n")
    assert compare.main([str(plan(learning_rates=None, lora_ranks=None)), *flags]) == 0
    assert len(commands) == 13 + 2 * 4, "the base does not follow from the data"


def test_a_digest_follows_from_the_inputs_and_not_from_the_code(plan, tmp_path, monkeypatch):
    """A checkout has a folder of the package's name, which changes with every pull."""
    (tmp_path / "megatron_profit").mkdir()
    monkeypatch.chdir(tmp_path)
    found = read_plan(plan(evaluate=f"--tasks gsm8k --system {'long ' * 99}"))
    command = found.evaluate_command("data", "", found.base, Path("out"))
    before = found.digest(command)
    (tmp_path / "megatron_profit" / "new.py").touch()
    assert found.digest(command) == before
    (found.base / "config.json").write_text('{"changed": true}')
    assert found.digest(command) != before


def test_a_digest_follows_from_files_with_an_equals_sign_in_their_path(plan, tmp_path):
    file = tmp_path / "lang=de" / "chats.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    found = read_plan(plan(train=f"--data {file} --train-iters 2"))
    command = found.train_command(found.runs()[0], Path("hf"), Path("m"))
    before = found.digest(command)
    file.write_text("{ }\n")
    assert found.digest(command) != before


def test_a_digest_does_not_follow_from_what_a_run_writes(plan, tmp_path, monkeypatch):
    """Also where the comparison's own folder, or a file nearby, has the name of a part of the command."""
    monkeypatch.chdir(tmp_path)
    found = read_plan(
        plan(
            train=f"--data {tmp_path}/train.jsonl --tensorboard-dir curves --token-report=page "
            "--data-cache cache",
            objectives={"prift": "--objective prift-prob --ref-cache reference"},
            save_interval=1,
        )
    )
    run = found.runs()[0]
    commands = [
        found.train_command(run, TRAINED, Path("metrics")),
        found.evaluate_command("data", "", TRAINED, Path("out")),
    ]
    before = [found.digest(command) for command in commands]
    for name in ("out", "hf", "metrics", "checkpoints", "curves", "page", "reference", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(name)
    assert [found.digest(command) for command in commands] == before
    (tmp_path / "train.jsonl").write_text("changed")
    assert found.digest(commands[0]) != before[0]


def test_a_digest_follows_from_data_that_the_command_does_not_name_itself(plan, tmp_path):
    """The splits of a saved data set lie in folders, and entries of a dataset_info.json name files."""
    saved = tmp_path / "saved" / "train" / "data.arrow"
    described = tmp_path / "described" / "chats" / "a.jsonl"
    other = described.with_name("b.jsonl")
    for file in (saved, described, other):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("first")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    info = tmp_path / "described" / "dataset_info.json"
    entries = {"a": {"file_name": "chats/a.jsonl"}, "b": {"file_name": "chats/b.jsonl"}, "c": 1}
    info.write_text(json.dumps(entries))
    for flags in (f"--dataset-info {info}", f"--dataset-info={info.parent}"):
        found = read_plan(plan(train=f"--data {tmp_path}/saved a {flags}"))
        command = found.train_command(found.runs()[0], TRAINED, Path("metrics"))
        digests = [found.digest(command)]
        for file in (saved, described, other):
            file.write_text(file.read_text() + " changed")
            digests.append(found.digest(command))
        assert len(set(digests)) == 3
        assert digests[2] == digests[3], "no flag names the entry b"
    info.write_text("{")
    with pytest.raises(EvaluationError, match=r"--dataset-info .* cannot be read as JSON"):
        found.digest(command)


def test_a_digest_follows_from_the_questions_in_the_usual_folder(plan, tmp_path, monkeypatch):
    """Where no flag names another one: corrected questions would be asked of no model."""
    monkeypatch.chdir(tmp_path)
    questions = Path("data/eval/gsm8k_test.jsonl")
    questions.parent.mkdir(parents=True)
    for flags, follows in (("", True), ("--data base", False), ("--data=base", False)):
        found = read_plan(plan(evaluate=f"--tasks gsm8k {flags}"))
        command = found.evaluate_command("data", "", found.base, Path("out"))
        digests = set()
        for text in ("first", "corrected"):
            questions.write_text(text)
            digests.add(found.digest(command))
        assert len(digests) == 1 + follows


def test_the_digests_of_earlier_comparisons_stay(tmp_path, monkeypatch):
    """A comparison that was made with an earlier version goes on from its folders."""
    monkeypatch.chdir(tmp_path)
    found = Plan(
        base=Path("/models/base"),
        train="--train-iters 2",
        evaluate={"": "--tasks gsm8k"},
        objectives={"sft": "--objective sft"},
        data={"data": {}},
    )
    run = Run("data", "sft", 1e-5, 16, 3)
    training = found.train_command(run, TRAINED, Path("metrics"))
    words = (
        "-m megatron_profit.sft --hf-model /models/base --train-iters 2 --objective sft --lr 1e-05 "
    )
    words += "--lora-rank 16 --seed 3 --export-hf hf --metrics-file metrics"
    asked = found.evaluate_command("data", "", TRAINED, Path("out"))
    for command, text in (
        (training, words),
        (asked, "-m megatron_profit evaluate model=hf --tasks gsm8k --out out"),
    ):
        expected = hashlib.sha256("\0".join(text.split()).encode()).hexdigest()[:12]
        assert found.digest(command) == expected
    assert run.setting == "sft, lr 1e-05, rank 16"


def test_rates_that_differ_in_a_late_digit_are_other_runs(plan):
    found = read_plan(
        plan(learning_rates=["1.2345678e-5", 1.2345679e-5], lora_ranks=[0], seeds=[1])
    )
    runs = found.runs()
    assert [run.setting for run in runs[:2]] == ["sft, lr 1.2345678e-05", "sft, lr 1.2345679e-05"]
    command = found.train_command(runs[0], Path("hf"), Path("m"))
    assert float(command[command.index("--lr") + 1]) == 1.2345678e-5


def test_the_trainings_at_a_time_share_the_cores(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    given = []

    def execute(command, log, threads):
        given.append(("evaluate" in command, threads))
        raise EvaluationError("enough")

    monkeypatch.setattr(comparison, "execute", execute)
    for jobs, processes in ((1, 1), (2, 3), (5, 4)):
        found = read_plan(plan(jobs=jobs, processes=processes))
        for number, step in enumerate((comparison._evaluated, comparison._trained)):
            place = tmp_path / f"{jobs} {number}"
            if number:
                arguments = (found, found.runs()[0], place, None)
            else:
                arguments = (found, None, "data", "", tmp_path, place)
            with pytest.raises(EvaluationError, match="enough"):
                step(*arguments)
    assert given == [(True, 12), (False, 12), (True, 6), (False, 2), (True, 2), (False, 1)]


def test_the_recorded_plan_is_the_one_that_was_read(plan, commands, tmp_path, monkeypatch):
    """Somebody may prepare the next comparison in the same file meanwhile."""
    file = plan(learning_rates=None, lora_ranks=None, seeds=[1])
    text, execute = file.read_text(), comparison.execute

    def meanwhile(command, log, threads):
        file.unlink(missing_ok=True)
        execute(command, log, threads)

    monkeypatch.setattr(comparison, "execute", meanwhile)
    assert compare.main([str(file), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["plan"] == text


def test_stages_are_made_in_order_and_each_evaluation_of_a_run_once(plan):
    found = read_plan(
        plan(
            learning_rates=["1e-5"],
            lora_ranks=None,
            seeds=[1],
            evaluate={"short": "--tasks gsm8k", "long": "--tasks gsm8k --samples 4"},
            stages=[
                {"objectives": ["dft"], "evaluate": ["short"]},
                {"evaluate": ["short"]},
                {"objectives": ["sft"], "learning_rates": ["2e-5"], "evaluate": ["short"]},
                {},
            ],
        )
    )
    assert [
        [(unit.run.setting, *unit.evaluations, unit.is_last) for unit in units]
        for units in found.schedule()
    ] == [
        [("dft, lr 1e-05", "short", False)],
        [("sft, lr 1e-05", "short", False)],
        [("sft, lr 2e-05", "short", True)],
        [("sft, lr 1e-05", "long", True), ("dft, lr 1e-05", "long", True)],
    ]
    command = found.evaluate_command("data", "long", Path("hf"), Path("out"))
    assert command[5:] == "--tasks gsm8k --samples 4 --out out".split()


def test_a_later_evaluation_asks_the_model_that_stayed_or_trains_it_again(plan, commands, tmp_path):
    flags = ["--out", str(tmp_path / "out")]
    small = {"learning_rates": None, "lora_ranks": None, "seeds": [1], "keep_models": True}
    short, both = (
        {"short": "--tasks gsm8k"},
        {"short": "--tasks gsm8k", "long": "--tasks gsm8k -k 4"},
    )
    assert compare.main([str(plan(**small, evaluate=short)), *flags]) == 0
    assert [len(commands), len(list((tmp_path / "out").rglob("hf")))] == [1 + 2 * 2, 2]
    assert compare.main([str(plan(**small, evaluate=both)), *flags]) == 0
    assert len(commands) == 5 + 3, "the base and both models answer the other questions"
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [list(result["scores"]) for result in results["results"]] == [["short", "long"]] * 3
    for model in (tmp_path / "out").rglob("hf"):
        shutil.rmtree(model)
    more = both | {"longest": "--tasks gsm8k -k 8"}
    assert compare.main([str(plan(**small, evaluate=more)), *flags]) == 0
    assert len(commands) == 8 + 1 + 2 * 2


def test_a_model_stays_until_the_last_stage_that_asks_it(plan, commands, tmp_path):
    file = plan(
        learning_rates=None,
        lora_ranks=None,
        seeds=[1],
        evaluate={"short": "--tasks gsm8k", "long": "--tasks gsm8k -k 4"},
        stages=[{"evaluate": ["short"]}, {"evaluate": ["long"]}],
    )
    assert compare.main([str(file), "--out", str(tmp_path / "out")]) == 0
    assert len(commands) == 2 * (1 + 2) + 2, "each run is trained once"
    assert not list((tmp_path / "out").rglob("hf"))


def test_what_was_finished_before_a_failure_is_published_and_stays(
    plan, commands, tmp_path, monkeypatch, capsys
):
    execute = comparison.execute

    def failing(command, log, threads):
        if "dft" in command:
            raise EvaluationError("stopped")
        execute(command, log, threads)

    flags = ["--out", str(tmp_path / "out")]
    file = str(plan(learning_rates=None, lora_ranks=None, seeds=[1], save_interval=4))
    monkeypatch.setattr(comparison, "execute", failing)
    assert compare.main([file, *flags]) == 1
    text = (tmp_path / "out/results.md").read_text()
    assert text.startswith("1 of 2 parts are finished.\n\n| setting | gsm8k |")
    assert "| sft | 25.0 % (0.0 to 75.0) |" in text
    assert "| sft | -25.0 (-75.0 to +0.0), p 1 |" in text
    kept = json.loads((tmp_path / "out/results.json").read_text())
    assert [kept["finished"], kept["runs"], len(kept["results"])] == [1, 2, 2]
    assert outcome_of(kept["results"][1]).right == {"gsm8k": [1.0, 0.0, 0.0, 0.0]}
    made = len(commands)
    monkeypatch.setattr(comparison, "execute", execute)
    assert compare.main([file, *flags]) == 0
    assert len(commands) == made + 2
    (train,) = [command for command in commands[made:] if "evaluate" not in command]
    places = [train[train.index(flag) + 1] for flag in ("--save", "--load", "--save-interval")]
    assert places[0] == places[1]
    assert places[2] == "4"
    assert "finished" not in (tmp_path / "out/results.md").read_text()


def test_the_base_is_evaluated_beside_the_first_runs(plan, commands, tmp_path, monkeypatch):
    """On two devices, the second one does not wait for the base."""
    execute, both = comparison.execute, threading.Barrier(2, timeout=60)

    def waiting(command, log, threads):
        if "evaluate" not in command or "hf" not in command[4]:
            both.wait()
        execute(command, log, threads)

    monkeypatch.setattr(comparison, "execute", waiting)
    file = plan(learning_rates=None, lora_ranks=None, seeds=[1], jobs=2, objectives={"sft": ""})
    assert compare.main([str(file), "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [result["run"] is None for result in results] == [True, False]


def test_what_takes_longer_holds_no_finished_part_back(plan, commands, tmp_path, monkeypatch):
    """Neither the base nor the first run; the outcomes have the order of the plan all the same."""
    execute, published = comparison.execute, []

    def write_results(out, outcomes, text, finished, runs):
        published.append(([o.run and o.run.objective for o in outcomes], finished))

    def waiting(command, log, threads):
        is_base = "evaluate" in command and "hf" not in command[4]
        if is_base or "sft" in command:
            _wait_until(lambda: published and published[-1][1] == (3 if is_base else 2))
        execute(command, log, threads)

    monkeypatch.setattr(compare, "write_results", write_results)
    monkeypatch.setattr(comparison, "execute", waiting)
    objectives = {name: f"--objective {name}" for name in ("sft", "dft", "gce")}
    file = plan(learning_rates=None, lora_ranks=None, seeds=[1], jobs=3, objectives=objectives)
    assert compare.main([str(file), "--out", str(tmp_path / "out")]) == 0
    assert published[2:] == [(["sft", "dft", "gce"], 3), ([None, "sft", "dft", "gce"], 3)]


def test_the_time_left_follows_from_the_parts_and_not_from_this_start(
    plan, commands, tmp_path, monkeypatch, capsys
):
    """A comparison that goes on reads its finished parts at once."""
    execute = comparison.execute

    def timed(command, log, threads):
        execute(command, log, threads)
        log.with_suffix(".times").write_text("[1.0, 60.0]\n")

    monkeypatch.setattr(comparison, "execute", timed)
    monkeypatch.setattr(compare, "write_results", lambda *_: None)
    asked = {"short": "--tasks gsm8k", "long": "--tasks gsm8k -k 4"}
    stages = [{"evaluate": ["short"]}, {"evaluate": ["long"]}]
    small = {"learning_rates": None, "lora_ranks": None, "evaluate": asked, "stages": stages}
    for seeds, left in (([1], "6.0 4.0 1.7 0.0"), ([1, 2, 3], "22.0 20.0")):
        file = plan(**small, seeds=seeds, objectives={"sft": "", "dft": "--objective dft"})
        assert compare.main([str(file), "--out", str(tmp_path / "out")]) == 0
        found = re.findall(r"so far, ([\d.]+) min left", capsys.readouterr().out)
        assert " ".join(found).startswith(left)


def test_jobs_share_the_gpus(plan, tmp_path):
    """Each would otherwise train on the first ones, which all others use too."""
    found = read_plan(plan(jobs=2, processes=2))
    shares = comparison.shares_of_gpus(found, ["4", "5", "6", "7", "8"])
    seen = []
    with ThreadPoolExecutor(2, "", command_runner.take_gpus, (shares,)) as pool:
        together = threading.Barrier(2, timeout=60)

        def run(number):
            together.wait()
            command = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
            log = tmp_path / f"{number}.log"
            command_runner.execute(command, log, 1)
            seen.append(log.read_text().strip())

        list(pool.map(run, range(2)))
    assert sorted(seen) == ["4,5", "6,7"]
    for gpus, jobs in (([], 2), (["0"], 1)):
        shares = comparison.shares_of_gpus(read_plan(plan(jobs=jobs, processes=2)), gpus)
        assert [shares.get_nowait() for _ in range(jobs)] == [None] * jobs
    with pytest.raises(EvaluationError, match="2 jobs of 2 processes need 4 GPUs, and 3 are vis"):
        comparison.shares_of_gpus(found, ["0", "1", "2"])


@pytest.mark.parametrize("what", ["the base", "the first run"])
def test_nothing_begins_after_a_failure(plan, commands, tmp_path, monkeypatch, capsys, what):
    """A training that takes an hour would keep the error from being seen."""
    execute = comparison.execute

    def failing(command, log, threads):
        execute(command, log, threads)
        if ("evaluate" in command) == (what == "the base"):
            raise EvaluationError("the disk is full")

    monkeypatch.setattr(comparison, "execute", failing)
    file = plan(learning_rates=None, lora_ranks=None)
    assert compare.main([str(file), "--out", str(tmp_path / "out")]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert len(commands) == (1 if what == "the base" else 2)


def test_nothing_begins_after_tables_that_cannot_be_written(plan, commands, tmp_path, monkeypatch):
    execute, tried = comparison.execute, threading.Event()

    def write_results(*_):
        tried.set()
        raise OSError("No space left on device")

    def waiting(command, log, threads):
        if "evaluate" not in command:
            assert tried.wait(60)
        execute(command, log, threads)

    monkeypatch.setattr(compare, "write_results", write_results)
    monkeypatch.setattr(comparison, "execute", waiting)
    file = plan(learning_rates=None, lora_ranks=None)
    with pytest.raises(OSError, match="No space left"):
        compare.main([str(file), "--out", str(tmp_path / "out")])
    assert len(commands) < 1 + 2 * 4


@pytest.fixture
def heeded(number):
    """Let a signal act also where the tests were started under nohup, which ignores SIGHUP."""
    before = signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.usefixtures("heeded")
def test_a_stop_ends_the_command_first_and_its_time_is_counted(tmp_path, number):
    code = (  # sleeps are short: a signal that comes just before a pause() would never end it
        "import signal, time; signal.signal(15, lambda *_: exit(0)); print(1, flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    log = tmp_path / "train.log"

    def stop():
        while not log.exists() or not log.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    with command_runner.stoppable():
        thread = threading.Thread(target=stop)
        thread.start()
        for _ in range(2):  # no further command begins
            with pytest.raises(EvaluationError, match="stopped; the same command goes on"):
                command_runner.execute([sys.executable, "-c", code], log, 1)
        thread.join()
    command_runner.execute([sys.executable, "-c", ""], tmp_path / "again.log", 1)
    cpu, wall = command_runner.seconds_of(log)
    assert cpu > 0
    assert wall > 0
    assert command_runner.seconds_of(tmp_path / "absent.log") == [0.0, 0.0]


def test_a_signal_that_is_ignored_stays_ignored():
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command_runner.stoppable():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_ends_with_a_comparison_that_is_killed(tmp_path):
    log = tmp_path / "train.log"
    training = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    code = (
        "import sys; from pathlib import Path\n"
        "from megatron_profit.evaluation.comparison.commands import execute\n"
        f"execute([sys.executable, '-c', {training!r}], Path({str(log)!r}), 1)"
    )
    comparing = subprocess.Popen([sys.executable, "-c", code])
    try:
        _wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
        command = Path("/proc", log.read_text().strip(), "cmdline")
        assert training.encode() in command.read_bytes()
    finally:
        comparing.kill()
        comparing.wait()
    _wait_until(lambda: not command.exists() or not command.read_bytes())  # gone, or a zombie


def _wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_comparisons_do_not_work_in_one_folder(plan, commands, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with lock_file(out / compare.LOCK):
        assert compare.main([str(plan()), "--out", str(out)]) == 1
    assert "another comparison is writing there; wait for it, or" in capsys.readouterr().err
    assert commands == []
    (out / compare.LOCK).symlink_to(tmp_path / "elsewhere")
    assert compare.main([str(plan()), "--out", str(out)]) == 1
    assert "cannot be used: " in capsys.readouterr().err
    assert commands == []


def test_a_model_whose_removal_is_interrupted_is_not_asked_later(
    plan, commands, tmp_path, monkeypatch
):
    flags = ["--out", str(tmp_path / "out")]
    few = {"learning_rates": None, "lora_ranks": None, "seeds": [1], "objectives": {"sft": ""}}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare.main([str(plan(**few)), *flags])
    made = len(commands)
    assert compare.main([str(plan(**few, evaluate="--tasks ifeval")), *flags]) == 0
    again = ["evaluate" if "evaluate" in command else "train" for command in commands[made:]]
    assert again == ["evaluate", "train", "evaluate"]
    assert not list((tmp_path / "out").rglob("*hf*"))


def test_differences_are_paired_and_missing_cells_stay_empty():
    def asked(objective, seed, **right):
        run = Run("d", objective, None, 0, seed) if objective else None
        scores = {task: sum(shares) / len(shares) for task, shares in right.items()}
        return Outcome(run, "d", scores, {}, right)

    text = report(
        [
            asked(None, 0, sums=[0.0] * 4, chats=[1.0] * 4),
            asked("sft", 1, sums=[1.0] * 4, chats=[1.0] * 4),
            asked("sft", 2, sums=[1.0] * 4, chats=[1.0] * 4),
            asked("dft", 1, sums=[0.5] * 4),
        ]
    )
    assert "| the base | 0.0 % (0.0 to 60.2) | 100.0 % (39.8 to 100.0) |" in text
    assert "| dft | 50.0 % (19.9 to 80.1) |  |" in text
    base, first = text.split("| minus ")[1:]
    assert base.startswith("the base, points | sums | chats |")
    assert "| sft | +100.0 (-20.5 to +100.0) | +0.0 (-60.2 to +60.2) |" in base
    assert "| dft | +50.0 (-40.4 to +80.1) |  |" in base, "a mean of draws has no McNemar test"
    assert first.startswith("sft, points | sums | chats |")
    assert "| sft |" not in first
    assert "| dft | -50.0 (-80.1 to +40.4) |  |" in first


def test_a_failure_names_the_command_and_its_error(plan, tmp_path, capsys):
    file = plan(learning_rates=None, lora_ranks=None, evaluate="--tasks nonsense")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert compare.main([str(file), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "evaluate.log): error: there is no task 'nonsense'" in message


def test_an_out_that_is_a_file_is_refused_before_the_first_run(plan, commands, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert compare.main([str(plan()), "--out", str(tmp_path / "out")]) == 1
    assert "is a file; name a folder" in capsys.readouterr().err
    assert commands == []


def test_a_dry_run_prints_the_commands(plan, tmp_path, capsys):
    assert compare.main([str(plan()), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 32
    assert not (tmp_path / "out").exists()
