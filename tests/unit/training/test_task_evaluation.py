"""The evaluation of tasks during a training: its scores, its end by a signal, and what it leaves."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest

from checkpoint_conversion.engine.output import whole_folder
from megatron_profit.megatron_patches.callbacks import RunFailure
from megatron_profit.training.monitoring import task_evaluation
from megatron_profit.training.monitoring.task_evaluation import LOG, TaskEvaluation

ANSWERS = (
    "import json, pathlib, sys\n"
    "results = [{'task': 'mawps', 'average': {'value': 0.25}}]\n"
    "pathlib.Path(sys.argv[1], 'results.json').write_text(json.dumps({'results': results}))"
)
HANGS = "import time; print('begun', flush=True); time.sleep(600)"
STEP = "step_0000020"


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """evaluation(code): of one rank, whose evaluations run the code."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(task_evaluation, "from_first_rank", lambda function: function())
    monkeypatch.setattr(task_evaluation, "signal_has_come", lambda: False)

    def make(code: str) -> TaskEvaluation:
        options = SimpleNamespace(
            eval_tasks_interval=20,
            metrics=["mawps"],
            command_during=lambda model, out: [sys.executable, "-c", code, str(out)],
        )

        def export_to(folder):
            with whole_folder(folder, [], True, "export", 0) as place:
                (place / "config.json").touch()
                (place / "model.safetensors").touch()

        return TaskEvaluation(options, export_to, tmp_path)

    return make


def test_scores_come_every_interval_and_the_temporary_export_goes(evaluation, tmp_path):
    running = evaluation(ANSWERS)
    assert running.evaluation_metrics(10) == {}
    assert running.evaluation_metrics(20) == {"mawps": 0.25}
    (tmp_path / STEP / "results.json").unlink()
    assert running.evaluation_metrics(20) == {"mawps": 0.25}, "the last step is asked twice"
    assert sorted(file.name for file in (tmp_path / STEP).iterdir()) == [LOG]


def test_a_signal_ends_the_evaluation_so_that_the_run_can_save(
    evaluation, tmp_path, monkeypatch, capsys
):
    log = tmp_path / STEP / LOG
    monkeypatch.setattr(task_evaluation, "_LOOK_EVERY_SECONDS", 0.02)
    has_come = lambda: log.exists() and log.read_text() == "begun\n"  # noqa: E731
    monkeypatch.setattr(task_evaluation, "signal_has_come", has_come)
    started = []
    start = TaskEvaluation._start
    monkeypatch.setattr(
        TaskEvaluation, "_start", lambda *given: started.append(start(*given)) or started[-1]
    )
    assert evaluation(HANGS).evaluation_metrics(20) == {}
    (process,) = started
    assert process.returncode is not None, "the evaluation has ended"
    assert not (tmp_path / STEP / "model").exists()
    said = "the tasks were not evaluated after step 20: a signal ends the run"
    assert said in "".join(capsys.readouterr())


def test_after_a_signal_no_evaluation_begins(evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(task_evaluation, "signal_has_come", lambda: True)
    assert evaluation(ANSWERS).evaluation_metrics(20) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_rest_of_an_export_does_not_end_each_later_start_at_its_step(evaluation, tmp_path):
    rest = tmp_path / STEP / "model"
    rest.mkdir(parents=True)
    (rest / "model.safetensors").touch()  # its marker is gone already
    assert evaluation(ANSWERS).evaluation_metrics(20) == {"mawps": 0.25}
    assert not rest.exists()


def test_a_failed_evaluation_is_told_and_a_failed_export_ends_the_run(
    evaluation, tmp_path, monkeypatch, capsys
):
    failing = evaluation("print('error: no data'); raise SystemExit(1)")
    assert failing.evaluation_metrics(20) == {}
    assert f"error: no data ({tmp_path / STEP / LOG})" in "".join(capsys.readouterr())
    shutil.rmtree(tmp_path / STEP)
    (tmp_path / "step_0000040").touch()
    with pytest.raises(RunFailure, match="the tasks cannot be evaluated after step 40: "):
        failing.evaluation_metrics(40)
