"""The settings for OpenCompass: Python that names models, data sets and sampling."""

import ast
import json

import pytest

from megatron_profit.commands import evaluate
from megatron_profit.evaluation.opencompass import DATASETS


@pytest.fixture
def data(tmp_path):
    """A folder with a question of GSM8K, AIME and SVAMP."""
    for name, record in {
        "gsm8k_test": {"question": "1 + 1?", "answer": "#### 2"},
        "aime24": {"problem": "1 + 1?", "answer": "2"},
        "svamp": {"Body": "1", "Question": "?", "Answer": 1.0},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def settings_of(text):
    """Run the file with stand-ins for its imports; return its variables."""
    tree = ast.parse(text)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names = [alias.name for node in imports for alias in node.names]
    found = {name: [{"infer_cfg": {"inferencer": {}}}] for name in names}
    body = [n for n in tree.body if not isinstance(n, ast.ImportFrom | ast.With)]
    exec(compile(ast.Module(body, []), "settings", "exec"), found)
    return found, [f"{node.module} {node.names[0].name}" for node in imports]


def test_the_settings_are_those_of_the_evaluation(tmp_path, data, capsys):
    file = tmp_path / "settings of mine.py"
    flags = ["--tasks", "gsm8k,aime24", "--data", str(data), "--preset", "profit-qwen"]
    flags += ["--dtype", "bfloat16"]
    (tmp_path / "it's").mkdir()
    models = [f"base={tmp_path}/it's", f"tuned={tmp_path}"]
    assert evaluate.main([*models, *flags, "--opencompass", str(file)]) == 0
    assert f"opencompass '{file}'" in capsys.readouterr().out
    found, imports = settings_of(file.read_text())
    folder, module, name = DATASETS["gsm8k"]
    assert f"opencompass.configs.datasets.{folder}.{module} {name}" in imports
    gsm8k, aime = found["datasets"]
    assert (gsm8k["n"], gsm8k["k"], aime["n"]) == (8, 8, 32)
    assert gsm8k["infer_cfg"]["inferencer"]["max_out_len"] == 8192
    assert aime["infer_cfg"]["inferencer"]["max_out_len"] == 32768
    base, tuned = found["models"]
    assert (base["abbr"], base["path"]) == ("base", f"{tmp_path}/it's")
    assert base["generation_kwargs"] == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert tuned["max_out_len"] == 32768
    assert tuned["model_kwargs"] == {"trust_remote_code": False, "dtype": "bfloat16"}
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_that_opencompass_cannot_make_is_refused(tmp_path, data, capsys):
    flags = [str(tmp_path), "--data", str(data), "--opencompass", str(tmp_path / "o.py")]
    assert evaluate.main([*flags, "--tasks", "gsm8k,svamp"]) == 1
    assert "OpenCompass does not grade svamp by rule; it has gsm8k" in capsys.readouterr().err
    engine = ("--engine", "transformers")
    for flag in (("--limit", "5"), ("--seed", "1"), ("--server", "http://127.0.0.1:9"), engine):
        assert evaluate.main([*flags, "--tasks", "gsm8k", *flag]) == 1
        assert f"; drop {flag[0]}" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(data / "..")})
    )
    assert evaluate.main([*flags, "--tasks", "gsm8k"]) == 1
    assert "is an adapter; export a merged model" in capsys.readouterr().err
    assert not (tmp_path / "o.py").exists()
