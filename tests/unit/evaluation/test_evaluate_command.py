"""The command: results, resume, several models, and input that cannot be used."""

import json
import os
import shutil
from pathlib import Path

import pytest

from checkpoint_conversion.engine.lock import lock_file
from megatron_profit.commands import evaluate as command
from megatron_profit.evaluation.engines import engine as engines
from megatron_profit.evaluation.engines.engine import Answer
from megatron_profit.evaluation.engines.model_folder import base_of, check_model, fingerprint
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.records import read_records_file
from megatron_profit.evaluation.sampling import choose_sampling


class Calculator:
    """An engine without a model: right on every `right`-th question; fails after `limit` answers."""

    def __init__(self, every=1, limit=10**9):
        self.every, self.limit, self.asked = every, limit, []

    def answers(self, requests, sampling):
        for request in requests:
            if len(self.asked) == self.limit:
                raise EvaluationError("the engine stopped")
            self.asked.append(request.place)
            words = request.messages[0]["content"].count("two")
            value = 2 * words if request.place[1] % self.every == 0 else 1
            yield request, Answer(f"The answer is {value}.", 5, value != 1)


@pytest.fixture
def run(tiny_model, sums, tmp_path, monkeypatch):
    """run(engine, *flags): exit code of the command with an engine of ours."""

    def run(engine, *flags, models=None):
        engines_of = engine if isinstance(engine, dict) else {}

        def choose(model, options):
            return engines_of.get(Path(model).name, engine)

        monkeypatch.setattr(engines, "choose_engine", choose)
        models = models or [f"tiny={tiny_model}"]
        flags = ["--task-file", str(sums), "--out", str(tmp_path / "out"), *flags]
        return command.main([*models, *flags])

    return run


def test_help_needs_no_library(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0
    assert "--preset {greedy,profit-qwen,profit-llama,psft}" in capsys.readouterr().out


def test_results_and_records(run, tmp_path, capsys):
    assert run(Calculator(every=2), "--samples", "4") == 0
    printed = capsys.readouterr()
    assert "| sums (5) | tiny | 60.0 (k = 4) |" in printed.out
    assert "temperature 0.7, top-p 0.8, top-k 20, 4 samples a question" in printed.out
    assert "tiny on sums: 20 of 20 answers" in printed.err
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert found["average"]["value"] == pytest.approx(0.6)
    assert found["pass_at"] == {
        "1": pytest.approx(0.6),
        "2": pytest.approx(0.6),
        "4": pytest.approx(0.6),
    }
    assert (found["unfinished"], found["unparsed"], found["tokens"]) == (pytest.approx(0.4), 0, 5)
    lines = (tmp_path / "out" / "tiny" / "sums.jsonl").read_text().splitlines()
    assert len(lines) == 6
    record = json.loads(lines[2])
    assert record["question"] == "What is two plus two?"
    assert record["reference"] == "4"
    assert [sample["number"] for sample in record["samples"]] == [0, 1, 2, 3]
    assert record["samples"][0] == {
        "number": 0,
        "text": "The answer is 1.",
        "tokens": 5,
        "stopped": False,
        "right": False,
        "parsed": True,
        "extracted": "1",
        "metrics": {},
    }


def test_an_interrupted_run_asks_only_what_is_missing(run, tmp_path, capsys):
    first = Calculator(limit=7)
    flags = ("--samples", "2", "--temperature", "1")
    assert run(first, *flags) == 1
    assert "the engine stopped" in capsys.readouterr().err
    file = tmp_path / "out" / "tiny" / "sums.jsonl"
    with file.open("ab") as stream:  # the process ended within a line
        stream.write(b'{"kind": "question", "numb')
    second = Calculator()
    assert run(second, *flags) == 0
    assert "10 answers, 7 of them are there" in capsys.readouterr().err
    assert len(second.asked) == 3
    assert not set(first.asked) & set(second.asked)
    third = Calculator()
    assert run(third, *flags) == 0
    assert third.asked == []
    whole = read_records_file(file)[1]
    assert {n: sorted(samples) for n, samples in whole.items()} == {n: [0, 1] for n in range(5)}


def test_answers_that_an_earlier_version_has_graded_are_graded_again(run, tmp_path, capsys):
    assert run(Calculator()) == 0
    file = tmp_path / "out" / "tiny" / "sums.jsonl"
    file.write_text(file.read_text().replace('"right": true', '"right": false'))
    capsys.readouterr()
    assert run(Calculator()) == 0
    printed = capsys.readouterr()
    assert "tiny on sums: 5 earlier answers have another grade now" in printed.err
    assert "| sums (5) | tiny | 100.0" in printed.out
    assert '"right": false' not in file.read_text()


def test_answers_of_other_settings_are_not_mixed(run, tmp_path, capsys):
    assert run(Calculator()) == 0
    assert run(Calculator(), "--temperature", "0.5") == 1
    message = capsys.readouterr().err
    assert "temperature was 0.0 and is 0.5" in message
    assert "--overwrite" in message
    again = Calculator()
    assert run(again, "--temperature", "0.5", "--overwrite") == 0
    assert len(again.asked) == 5


def test_a_file_without_an_answer_is_begun_again(run, capsys):
    assert run(Calculator(limit=0)) == 1
    assert run(Calculator(), "--temperature", "0.5") == 0


def test_two_evaluations_do_not_write_one_file(run, tmp_path, capsys):
    file = tmp_path / "out" / "tiny" / "sums.lock"
    file.parent.mkdir(parents=True)
    with lock_file(file):
        assert run(Calculator()) == 1
    assert "sums.jsonl: another evaluation is writing it" in capsys.readouterr().err
    assert run(Calculator()) == 0


def test_damaged_records_are_named(run, tmp_path, capsys):
    assert run(Calculator()) == 0
    file = tmp_path / "out" / "tiny" / "sums.jsonl"
    file.write_text(file.read_text().replace('"samples": [', '"simples": [', 1))
    assert run(Calculator()) == 1
    assert f"{file}, line 2: is not a line of answers" in capsys.readouterr().err


def test_two_models_are_compared_on_the_same_questions(run, tiny_model, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    both = {"tiny": Calculator(every=2), "other": Calculator()}
    models = [f"base={tiny_model}", f"tuned={other}"]
    assert run(both, models=models) == 0
    printed = capsys.readouterr().out
    assert "| sums | tuned - base | +40.0 |" in printed
    difference = json.loads((tmp_path / "out" / "results.json").read_text())["differences"][0]
    assert (difference["better"], difference["worse"], difference["p_value"]) == (2, 0, 0.5)
    for name in ("results.md", "figure.png", "answers.html"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def refused(capsys, *flags):
    assert command.main(list(map(str, flags))) == 1
    return capsys.readouterr().err


def test_an_unknown_task_is_named_before_anything_is_loaded(tmp_path, capsys):
    message = refused(capsys, tmp_path, "--tasks", "gsmk8")
    assert "there is no task 'gsmk8'; did you mean gsm8k? The tasks are aime24, " in message
    assert "the task gsm8k is given twice" in refused(capsys, tmp_path, "--tasks", "gsm8k,gsm8k")
    assert "no task is given" in refused(capsys, tmp_path)


def test_a_missing_file_says_where_it_comes_from(tmp_path, capsys):
    message = refused(capsys, tmp_path, "--tasks", "gpqa_diamond", "--data", tmp_path)
    assert f"needs the file gpqa_diamond.jsonl (or .json, .parquet, .csv) in {tmp_path}" in message
    assert "gated" in message


def test_missing_columns_are_named(tmp_path, write_questions, capsys):
    file = write_questions(
        [{"question": "1 + 1?", "answer": "2"}, {"question": "2?", "solution": 2}]
    )
    message = refused(capsys, tmp_path, "--task-file", file)
    assert "line 2: has no 'answer'; the record has 'question', 'solution'" in message
    message = refused(capsys, tmp_path, "--task-file", file, "--task-columns", "reply=answer")
    assert "must be question=COLUMN or answer=COLUMN" in message
    write_questions([{"question": ["1 + 1?"], "answer": "2"}])
    assert "holds list; it must hold text" in refused(capsys, tmp_path, "--task-file", file)
    for value, message in (
        ("null", "sums.jsonl, line 1: 'answer' is null; fill it in"),
        ('" "', "record 1: the column 'answer' is ' '; fill it in"),
        ("NaN", "record 1: the column 'answer' is 'nan'; fill it in"),
        ("oops", "sums.jsonl, line 1, column 29: not valid JSON"),
    ):
        file.write_text(f'{{"question": "a", "answer": {value}}}\n')
        assert message in (found := refused(capsys, tmp_path, "--task-file", file))
        assert found.count("sums.jsonl") == found.count("remove") == 1
    write_questions([{"Q": "1 + 1?", "A": "2"}])
    columns = ("--task-columns", "question=Q", "answer=A")
    assert "no such folder" in refused(capsys, tmp_path / "no", "--task-file", file, *columns)


def test_a_folder_that_is_no_model_is_refused(tmp_path, tiny_model, sums, capsys):
    flags = ("--task-file", sums, "--out", tmp_path / "out")
    assert "no such folder" in refused(capsys, tmp_path / "absent", *flags)
    (tmp_path / "empty").mkdir()
    assert "config.json: missing" in refused(capsys, tmp_path / "empty", *flags)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(capsys, bare, *flags)
    (bare / "model.safetensors").unlink()
    assert "holds no *.safetensors" in refused(capsys, bare, *flags)
    small = tmp_path / "small"
    shutil.copytree(tiny_model, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 9, "text_config": None}))
    assert "tokens, but the model has only 9 (vocab_size" in refused(capsys, small, *flags)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/absent"}')
    assert "run `hf download org/absent`, or write the path" in refused(capsys, adapter, *flags)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/absent"}')
    assert "'/absent', which is no folder here; write the path" in refused(capsys, adapter, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("revision", "commit"), [(None, "a" * 40), ("v1", "b" * 40)])
def test_the_base_of_a_published_adapter_is_found_in_the_cache_of_the_hub(
    tmp_path, monkeypatch, revision, commit
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--base"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / (revision or "main")).write_text(commit)
    config = {"base_model_name_or_path": "some/base", "revision": revision}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert base_of(tmp_path) == repository / "snapshots" / commit


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--samples 8 --temperature 0", "8 samples at temperature 0 would all be the same"),
        ("--samples 0", "--samples is 0; it must be at least 1"),
        ("--top-p 0 --temperature 1", "--top-p is 0.0; it must be above 0"),
        ("--temperature nan", "--temperature is nan; it must be at least 0"),
        ("--top-k -1", "--top-k is -1"),
        (
            "--top-p 0.8 --top-k 20",
            "--top-p 0.8 and --top-k 20 would change no answer at temperature 0",
        ),
        ("--preset profit-qwen --temperature 0 --top-k 5", "--top-k 5 would change no answer"),
        ("--max-new-tokens 0", "--max-new-tokens is 0; it must be at least 1"),
        ("--limit 0", "--limit is 0"),
        ("--batch 0", "--batch is 0"),
        ("--concurrency 0", "--concurrency is 0"),
    ],
)
def test_values_that_do_not_fit_are_refused(flags, message, tmp_path, sums, capsys):
    assert message in refused(capsys, tmp_path, "--task-file", sums, *flags.split())


def test_a_preset_without_draws_and_neutral_cuts_are_accepted():
    assert choose_sampling("profit-qwen", "t", {"temperature": 0}).is_greedy
    assert choose_sampling(None, "t", {"top_p": 1.0, "top_k": 0}).is_greedy
    drawn = choose_sampling(None, "t", {"samples": 4, "top_k": 5})
    assert (drawn.temperature, drawn.top_k) == (0.7, 5)
    assert choose_sampling("profit-llama", "aime24", {}).samples == 32
    assert choose_sampling("psft", "aime24", {}).max_new_tokens == 10240


def test_an_out_that_is_a_file_is_refused_before_a_model_is_loaded(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    engine = Calculator()
    for out in (tmp_path / "file", tmp_path / "file" / "results"):
        assert run(engine, "--out", str(out)) == 1
        assert (
            f"--out {out}: {tmp_path / 'file'} is a file; name a folder" in capsys.readouterr().err
        )
    assert engine.asked == []


def test_the_day_of_a_template_is_asked_for_and_recorded(
    run, dated_model, tiny_model, tmp_path, capsys
):
    models = [f"dated={dated_model}", f"plain={tiny_model}"]
    assert run(Calculator(), models=models) == 1
    assert "writes today's date" in (message := capsys.readouterr().err)
    assert "--template-date 2" in message
    assert not (tmp_path / "out").exists()
    day = ("--template-date", "2026-02-03")
    assert run(Calculator(), *day, models=models) == 0
    settings = {
        label: read_records_file(tmp_path / "out" / label / "sums.jsonl")[0]
        for label in ("dated", "plain")
    }
    assert settings["dated"]["template_date"] == "2026-02-03"
    assert "template_date" not in settings["plain"], "records without it stay valid"
    assert run(Calculator(), "--template-date", "2026-02-04", models=models) == 1
    assert "template_date was '2026-02-03' and is '2026-02-04'" in capsys.readouterr().err
    assert run(Calculator(), *day) == 1
    assert "no model's chat template writes a date; drop it" in capsys.readouterr().err
    assert run(Calculator(), "--template-date", "tomorrow") == 1
    assert "--template-date tomorrow is no day" in capsys.readouterr().err
    assert run(Calculator(), *day, "--server", "http://127.0.0.1:9") == 1
    assert "its own clock; drop it" in capsys.readouterr().err
    assert run(Calculator(), *day, "--opencompass", str(tmp_path / "a.py")) == 1
    assert "OpenCompass writes today's date" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [("--engine", "vllm"), ("--dtype", "float32")])
def test_flags_that_a_server_decides_are_refused(run, capsys, flag):
    assert run(Calculator(), *flag, "--server", "http://127.0.0.1:9") == 1
    assert f"{' '.join(flag)}: the server decides it; drop it" in capsys.readouterr().err


def test_records_of_an_earlier_version_go_on(run, tiny_model, tmp_path):
    """Their settings line, as it was written before this test."""
    assert run(Calculator(limit=3)) == 1
    file = tmp_path / "out" / "tiny" / "sums.jsonl"
    lines = file.read_text().splitlines()
    settings = json.loads(lines[0])
    earlier = {
        "kind": "settings",
        "model": "tiny",
        "identity": fingerprint(str(tiny_model)),
        "task": "sums",
        "version": settings["version"],
        "questions": settings["questions"],
        "engine": settings["engine"],
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "samples": 1,
        "max_new_tokens": None,
        "seed": 1234,
    }
    assert settings == earlier
    file.write_text("\n".join([json.dumps(earlier), *lines[1:], ""]))
    second = Calculator()
    assert run(second) == 0
    assert len(second.asked) == 2


def test_labels_tell_models_apart(tmp_path):
    (tmp_path / "a=b").mkdir()
    found = command.labelled_models(["runs/profit/hf", "base=Qwen/Qwen3", str(tmp_path / "a=b")])
    assert found == {"profit": "runs/profit/hf", "base": "Qwen/Qwen3", "a=b": str(tmp_path / "a=b")}
    with pytest.raises(EvaluationError, match="two models are called 'hf0'"):
        command.labelled_models(["x/hf0", "y/hf0"])
    with pytest.raises(EvaluationError, match="not of the form LABEL=MODEL"):
        command.labelled_models(["../x=model"])


def test_the_identity_of_a_model_covers_all_of_its_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    weights = bytearray(5 << 20)
    (folder / "model.safetensors").write_bytes(weights)
    before = fingerprint(str(folder))
    assert fingerprint(str(folder)) == before
    weights[len(weights) // 2] = 1
    (folder / "model.safetensors").write_bytes(weights)
    assert fingerprint(str(folder)) != before


def test_a_model_folder_with_a_broken_entry_is_refused_with_its_name(tiny_model, tmp_path):
    """Downloads leave links without a file; a pipe would wait for ever."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    known = fingerprint(str(folder))
    (folder / "extra.json").mkdir()
    assert fingerprint(str(folder)) == known, "a folder is no part of the model"
    (folder / "merges.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(EvaluationError, match=r"merges\.txt: No such file .*fetch the model again"):
        fingerprint(str(folder))
    (folder / "merges.txt").unlink()
    os.mkfifo(folder / "merges.txt")
    for examine in (fingerprint, check_model):
        with pytest.raises(EvaluationError, match=r"merges\.txt is a pipe"):
            examine(str(folder))


def test_pass_at_the_number_of_samples_is_shown(run, tmp_path, capsys):
    assert run(Calculator(every=2), "--samples", "3") == 0
    assert "| 60.0 (k = 3) |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert list(found["pass_at"]) == ["1", "2", "3"]


def test_more_samples_of_the_same_questions_are_another_evaluation(run, capsys):
    assert run(Calculator(), "--samples", "2", "--temperature", "1") == 0
    assert run(Calculator(), "--samples", "4", "--temperature", "1") == 1
    assert "samples was 2 and is 4" in capsys.readouterr().err
    assert run(Calculator(), "--samples", "2", "--temperature", "1", "--limit", "3") == 1
    assert "questions was" in capsys.readouterr().err
