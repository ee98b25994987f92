"""The evaluation that a training run makes of its export, and the hint on the metric to keep by."""

import json
import sys
from pathlib import Path

import pytest

from megatron_profit.evaluation import after_training
from megatron_profit.evaluation.after_training import (
    check_task_files,
    environment_of_engine,
    eval_tasks,
    results_of,
)
from megatron_profit.evaluation.engines.model_folder import fingerprint
from megatron_profit.flags import ArgumentsError
from megatron_profit.objectives import ScheduledObjective, build_objective
from megatron_profit.training.checkpoints.keep_options import (
    KeepOptions,
    keep_options,
    misleading_metric,
)
from megatron_profit.training.checkpoints.retention import EarlyStopState

VALUES = {
    "eval_tasks": None,
    "eval_flags": "",
    "eval_tasks_interval": None,
    "eval_tasks_limit": 50,
    "export_hf": "runs/a/hf",
    "eval_interval": 10,
    "eval_iters": 1,
    "valid_data": ["a.jsonl"],
    "valid_split": None,
    "template_date": None,
}
PROFIT = build_objective("profit", prob_threshold=0.1, threshold_direction="higher")
QUANTILE = {"threshold_quantile": 0.2, "threshold_direction": "higher"}
DURING = {"eval_tasks": "mawps", "eval_tasks_interval": 20, "eval_tasks_limit": 7}


def test_the_export_is_evaluated_by_the_command_that_users_have():
    options = eval_tasks(VALUES | {"eval_tasks": "mawps, svamp", "eval_flags": "--data 'my data'"})
    export = Path("/runs/a/hf")
    command = options.command(export, results_of(export))
    assert command == [
        *(sys.executable, "-m", "megatron_profit", "evaluate", "trained=/runs/a/hf"),
        *("--tasks", "mawps, svamp", "--data", "my data", "--out", "/runs/a/hf-evaluation"),
    ]
    assert not eval_tasks(VALUES).is_wanted


def test_the_questions_have_the_day_of_the_training():
    values = VALUES | {"eval_tasks": "mawps", "template_date": "2026-02-03"}
    words = eval_tasks(values).command(Path("hf"), Path("out"))
    assert words[words.index("--template-date") + 1] == "2026-02-03"
    other = eval_tasks(values | {"eval_flags": "--template-date 2027-01-01"})
    words = other.command(Path("hf"), Path("out"))
    days = [words[at + 1] for at, word in enumerate(words) if word == "--template-date"]
    assert days == ["2026-02-03", "2027-01-01"], "the last one counts"


def test_answers_of_other_weights_are_asked_again_and_of_the_same_kept(
    tmp_path, monkeypatch, capsys
):
    """A run that goes on replaces its export; one whose evaluation was interrupted does not change it."""
    export = tmp_path / "hf"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"first")
    folder = results_of(export) / "trained"
    folder.mkdir(parents=True)

    def answered(task):
        settings = {"kind": "settings", "identity": fingerprint(str(export))}
        (folder / f"{task}.jsonl").write_text(json.dumps(settings) + "\n")

    def answers():
        return sorted(file.stem for file in folder.glob("*.jsonl"))

    started = []
    monkeypatch.setattr(after_training.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(after_training.os, "execve", lambda *call: started.append(call[1]))
    asked = {"eval_tasks": "mawps,svamp", "eval_flags": "--task-file exam.jsonl"}
    options = eval_tasks(VALUES | asked)
    for task in ("mawps", "svamp", "exam", "gsm8k"):
        answered(task)
    after_training.become_evaluation(options, export)
    assert answers() == ["exam", "gsm8k", "mawps", "svamp"]
    assert capsys.readouterr().out == ""
    (export / "model.safetensors").write_bytes(b"second")
    answered("mawps")  # the evaluation of the new weights was interrupted after this task
    after_training.become_evaluation(options, export)
    assert answers() == ["gsm8k", "mawps"], "gsm8k is no task any more"
    assert "are asked again: svamp, exam" in capsys.readouterr().out
    (folder / "svamp.jsonl").write_text("damaged")
    after_training.become_evaluation(options, export)
    assert answers() == ["gsm8k", "mawps", "svamp"], "the evaluation names the damage"
    assert not any("--overwrite" in command for command in started)


def test_a_file_of_ones_own_is_a_task_too():
    options = eval_tasks(VALUES | {"eval_flags": "--task-file my/exam.v2.jsonl"})
    assert options.is_wanted
    assert "--tasks" not in options.command(Path("hf"), Path("out"))
    during = eval_tasks(VALUES | DURING | {"eval_flags": "--task-file my/exam.v2.jsonl"})
    assert during.metrics == ["mawps", "exam"]
    assert eval_tasks(VALUES | {"eval_tasks": "mawps"}).metrics == []


def test_an_evaluation_during_the_training_leaves_the_gpu_alone(monkeypatch):
    options = eval_tasks(VALUES | DURING | {"eval_flags": "--engine vllm --limit 500"})
    given = options.command_during(Path("hf"), Path("out"))
    assert given[-4:] == ["--engine", "transformers", "--limit", "7"], "the last one counts"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    environment = environment_of_engine(on_cpu=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"RANK", "OMP_NUM_THREADS", "TORCHELASTIC_USE_AGENT_STORE"} & environment.keys()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment_of_engine()["OMP_NUM_THREADS"] == "3", "torchrun has not set it"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_tasks": "mawps", "export_hf": None}, "the folder of --export-hf, which is missing"),
        ({"eval_flags": "--samples 2"}, "--eval-flags is about --eval-tasks, which is missing"),
        ({"eval_tasks": "mawp"}, "--eval-tasks mawp: there is no task 'mawp'; did you mean mawps"),
        (
            {"eval_tasks": "mawps", "eval_flags": "--samples 2 --temperature 0"},
            "--eval-flags '--samples 2 --temperature 0': 2 samples at temperature 0",
        ),
        ({"eval_tasks": "mawps", "eval_flags": "--sampels 2"}, "unrecognized arguments: --sampels"),
        ({"eval_tasks": "mawps", "eval_flags": "--data 'x"}, "No closing quotation"),
        (
            {"eval_tasks": "mawps", "eval_flags": "--server http://h"},
            "--server http://h does not have the weights of this run",
        ),
        (
            {"eval_tasks": "mawps", "eval_flags": "--template-date 2027-01-01"},
            "--template-date 2027-01-01: the training has none",
        ),
        (
            {"eval_tasks": "mawps", "eval_flags": "--tasks svamp"},
            "--tasks svamp: name tasks with --eval-tasks, which is checked",
        ),
        ({"eval_flags": "--task-file a.jsonl --tasks svamp"}, "--tasks svamp: name tasks with"),
        ({"eval_tasks_interval": 20}, "--eval-tasks-interval is about --eval-tasks"),
        (DURING | {"eval_tasks_interval": 0}, "--eval-tasks-interval and .* must be at least 1"),
        (DURING | {"eval_tasks_limit": 0}, "--eval-tasks-limit must be at least 1"),
        (DURING | {"eval_tasks_interval": 15}, "15 must be a multiple of --eval-interval 10"),
        (DURING | {"valid_data": None}, "there are none; give --valid-data"),
        (DURING | {"eval_iters": 0}, "there are none; give --valid-data"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_before_the_training(values, message):
    with pytest.raises(ArgumentsError, match=message):
        eval_tasks(VALUES | values)


def test_a_missing_file_is_named_before_the_training(tmp_path):
    values = VALUES | {"eval_tasks": "mawps", "eval_flags": f"--data {tmp_path}"}
    with pytest.raises(ArgumentsError, match=r"needs the file mawps\.jsonl"):
        check_task_files(eval_tasks(values))
    (tmp_path / "mawps.jsonl").write_text(json.dumps({"input": "1 + 1 ?"}) + "\n")
    with pytest.raises(ArgumentsError, match="has no 'target'"):
        check_task_files(eval_tasks(values))
    (tmp_path / "mawps.jsonl").write_text(json.dumps({"input": "1 + 1 ?", "target": 2}) + "\n")
    check_task_files(eval_tasks(values))
    check_task_files(eval_tasks(VALUES))
    values |= {"eval_tasks": None, "eval_flags": f"--task-file {tmp_path}/exam.jsonl"}
    with pytest.raises(ArgumentsError, match=r"--eval-flags '--task-file .*exam\.jsonl"):
        check_task_files(eval_tasks(values))


def test_a_task_is_a_metric_if_the_training_evaluates_it():
    values = {"keep_last": 1, "keep_best": "gsm8k", "early_stop": None, "export_best": False}
    values |= {"save": "runs/a", "save_retain_interval": None, "export_hf": "runs/a/hf"}
    values |= VALUES | {"save_interval": 40, "eval_tasks_interval": 20}
    with pytest.raises(ArgumentsError, match="'gsm8k' is a task that the training does not eval"):
        keep_options(values)
    assert keep_options(values, ["gsm8k"]).keep_best == "gsm8k"
    with pytest.raises(ArgumentsError, match="30 must be a multiple of --eval-tasks-interval 20"):
        keep_options(values | {"save_interval": 30}, ["gsm8k"])
    better = EarlyStopState("gsm8k").after(1, 0.5).after(2, 0.6).after(3, 0.55)
    assert better.best_iteration == 2


@pytest.mark.parametrize(
    ("metric", "objective", "why"),
    [
        ("lm loss", PROFIT, "may rise while the run does what it should"),
        ("objective", PROFIT, "small as well where the model finds the token improbable"),
        ("objective", ScheduledObjective(PROFIT, warmup_steps=2), "a worse checkpoint can be the"),
        (
            "objective",
            build_objective("dft"),
            "--keep-best 'objective' with --objective dft: a tok",
        ),
        ("objective", build_objective("profit", **QUANTILE, threshold_scope="running"), "a worse"),
        ("objective", build_objective("profit", **QUANTILE, threshold_scope="global_batch"), None),
        ("objective", build_objective("prift-prob"), None),
        ("objective", build_objective("psft"), None),
        ("objective", build_objective("sft"), None),
        ("lm loss", build_objective("sft"), None),
        ("mean p", PROFIT, None),
        (None, PROFIT, None),
    ],
)
def test_a_metric_that_misleads_is_named(metric, objective, why):
    hint = misleading_metric(KeepOptions(keep_best=metric), objective)
    if why is None:
        assert hint is None
    else:
        assert why in hint
        assert hint.endswith("--keep-best 'mean p' follows the probability of each token")
