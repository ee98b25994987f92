"""Qwen3.5 and Qwen3-Next: contents by formula, bit-exact round trips, and the configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversion_helpers import assert_equal, read_hf, read_megatron, write_config
from safetensors.torch import load_file, save_file
from test_megatron_to_hf import assert_same_tensors, save_run
from tiny_gated_delta_net import LINEAR, MODELS, make_model, megatron_tensors
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import family_for
from checkpoint_conversion.families.layouts import grouped_gated_qkv, part_of
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf.output import plan_output
from checkpoint_conversion.hf.stop_tokens import plan_stop_tokens
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.in_transformers import load_language_model
from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from checkpoint_conversion.verify import verify


@pytest.mark.parametrize("name", MODELS)
def test_contents_and_round_trip(tmp_path, name):
    hf = make_model(tmp_path / "hf", name, torch.bfloat16)
    hf_to_megatron(hf, tmp_path / "megatron")
    tensors, objects = read_megatron(tmp_path / "megatron" / "release")
    assert_equal(tensors, megatron_tensors(read_hf(hf)))
    states = {key.split("/")[0] for key in objects if "layers.0." in key}
    own = {key.removeprefix("decoder.layers.0.self_attention.") for key in states}
    assert {"in_proj._extra_state", "out_proj._extra_state"} <= own
    assert not {"conv1d._extra_state", "out_norm._extra_state"} & own
    assert not verify(hf, megatron=tmp_path / "megatron").differences
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")
    assert not verify(hf, tmp_path / "back").differences


@pytest.mark.parametrize("name", MODELS)
def test_an_export_opens_as_the_class_that_it_came_from(tmp_path, name):
    import transformers

    hf = make_model(tmp_path / "hf", name)
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    tokens = torch.randint(507, (2, 9), generator=torch.Generator().manual_seed(0))
    kinds = [transformers.AutoModelForCausalLM]
    if "vision" in name:
        kinds.append(getattr(transformers, read_hf_config(hf)["architectures"][0]))
    for kind in kinds:
        models = [kind.from_pretrained(folder) for folder in (hf, tmp_path / "back")]
        assert type(models[0]) is type(models[1])
        with torch.no_grad():
            one, other = (model(tokens).logits for model in models)
        assert one.std() > 0.1
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def _by_rows(key, size):
    """Chunks as tensor parallelism cuts them: some rows of each part, all of the other axes."""
    if "experts.experts" in key:
        return [2, 17, *size[2:]]
    return [max(1, size[0] // 2), *size[1:]]


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("qwen3.5", None),
        ("qwen3.5-moe-packed", "pre_mlp_layernorm"),
        ("qwen3-next", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_the_way_back_from_ranks_parts(tmp_path, name, absent):
    hf = make_model(tmp_path / "hf", name, torch.bfloat16)
    tensors = megatron_tensors(read_hf(hf))
    if absent is not None:  # the layers of one implementation save one of the two names
        tensors = {key: value for key, value in tensors.items() if absent not in key}
    save_run(tmp_path / "run", tensors, step=_by_rows)
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")


def test_a_convolution_cut_along_its_kernel_is_refused(tmp_path):
    hf = make_model(tmp_path / "hf", "qwen3.5")

    def cut(key, size):
        return [*size[:-1], 2] if "conv1d" in key else size

    save_run(tmp_path / "run", megatron_tensors(read_hf(hf)), step=cut)
    with pytest.raises(ConversionError, match=r"conv1d.* is not cut by rows"):
        megatron_to_hf(tmp_path / "run", hf, tmp_path / "back")


@pytest.mark.parametrize("name", ["qwen3.5-moe-vision", "qwen3-next"])
def test_packed_and_single_experts_have_the_same_megatron_tensors(tmp_path, name):
    """An export has the form of its template, whichever form training started from."""
    single = make_model(tmp_path / "single", name)
    packed = make_model(tmp_path / "packed", f"{name}-packed")
    found = []
    for hf in (packed, single):
        hf_to_megatron(hf, tmp_path / f"{hf.name}-megatron")
        found.append(read_megatron(tmp_path / f"{hf.name}-megatron" / "release")[0])
    assert_equal(*found)
    for source, template in ((packed, single), (single, packed)):
        out = tmp_path / f"{template.name}-back"
        megatron_to_hf(tmp_path / f"{source.name}-megatron", template, out)
        assert_same_tensors(template, out)


IN_FP32 = ("A_log", "linear_attn.norm.weight")


def _as_published(folder: Path, name: str, shard_size: str = "1GB") -> Path:
    """A model in bf16, with the decays and the norms of the heads in fp32, with digits that bf16 lacks."""
    hf = make_model(folder, name, torch.bfloat16, shard_size)
    for shard in hf.glob("*.safetensors"):
        tensors = load_file(shard)
        for own in tensors:
            if own.endswith(IN_FP32):
                tensors[own] = tensors[own].float() * (1 + 1e-4)
        save_file(tensors, shard, metadata={"format": "pt"})
    return hf


def test_a_folder_of_several_files_and_dtypes(tmp_path):
    hf = _as_published(tmp_path / "hf", "qwen3.5-vision", shard_size="60KB")
    assert len(list(hf.glob("*.safetensors"))) > 3
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")
    assert {f.name for f in hf.iterdir()} <= {f.name for f in (tmp_path / "back").iterdir()}


@pytest.mark.parametrize("name", ["qwen3.5-vision", "qwen3.5-moe-packed"])
def test_what_a_run_in_bf16_saved_is_written_in_the_dtypes_of_its_template(tmp_path, name):
    """From its checkpoint as from its ranks, unless another dtype is asked for."""
    hf = _as_published(tmp_path / "hf", name)
    weights = {key: value.bfloat16() for key, value in megatron_tensors(read_hf(hf)).items()}
    save_run(tmp_path / "run", weights)
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "back")
    before, after = read_hf(hf), read_hf(tmp_path / "back")
    fp32 = {name for name in before if name.endswith(IN_FP32)}
    assert len(fp32) == 2 * sum(LINEAR)
    for own, tensor in after.items():
        rounded = before[own].bfloat16().float() if own in fp32 else before[own]
        assert tensor.dtype == before[own].dtype, own
        assert torch.equal(tensor, rounded), own
    direct = plan_output(tmp_path / "direct", hf, torch.bfloat16).tensors
    assert {own for own, spec in direct.items() if spec.dtype_name == "F32"} == fp32
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "half", dtype="bf16")
    assert {read_hf(tmp_path / "half")[own].dtype for own in fp32} == {torch.bfloat16}


def test_a_template_in_fp32_or_without_weights_gives_no_dtype(tmp_path):
    hf = make_model(tmp_path / "hf", "qwen3.5")
    for change in (lambda: None, (hf / "model.safetensors").unlink):
        change()
        tensors = plan_output(tmp_path / "out", hf, torch.bfloat16).tensors
        assert {spec.dtype_name for spec in tensors.values()} == {"BF16"}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_another_dtype_leaves_carried_tensors_as_they_are(tmp_path, dtype):
    hf = make_model(tmp_path / "hf", "qwen3.5-moe-vision", torch.bfloat16)
    hf_to_megatron(hf, tmp_path / "megatron", dtype=dtype)
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    before, after = read_hf(hf), read_hf(tmp_path / "back")
    for name, tensor in before.items():
        carried = name.startswith(("model.visual.", "mtp."))
        expected = (
            tensor if carried else tensor.to({"fp32": torch.float32, "fp16": torch.float16}[dtype])
        )
        assert after[name].dtype == expected.dtype, name
        assert torch.equal(after[name], expected), name
    config = read_hf_config(tmp_path / "back")
    assert config["dtype"] == {"fp32": "float32", "fp16": "float16"}[dtype]


def test_the_rows_of_a_gated_projection():
    assert grouped_gated_qkv(4, 2, 3) == (
        *((0, 0, 3), (0, 6, 3), (0, 3, 3), (0, 9, 3), (1, 0, 3), (2, 0, 3)),
        *((0, 12, 3), (0, 18, 3), (0, 15, 3), (0, 21, 3), (1, 3, 3), (2, 3, 3)),
    )
    assert part_of(5, 7) == ((0, 7, 5),)


@pytest.mark.parametrize("name", MODELS)
def test_the_name_table_takes_each_row_of_each_tensor_once(tmp_path, name):
    config = read_hf_config(make_model(tmp_path / "hf", name))
    family = family_for(config)
    for table in (family.tensor_rules, *family.other_forms):
        taken: dict[str, list[tuple[int, int]]] = {}
        rows: dict[str, int] = {}
        for rule in table(config):
            for piece in rule.pieces():
                for block in rule.layout_of(piece):
                    hf = piece.hf[block.source]
                    taken.setdefault(hf, []).append((block.start, block.start + block.rows))
                for hf, shape in zip(piece.hf, rule.hf.values(), strict=True):
                    rows[hf] = torch.Size(shape[: len(rule.packed) + 1]).numel()
        for hf, spans in taken.items():
            ends = [end for _, end in sorted(spans)]
            assert [start for start, _ in sorted(spans)] == [0, *ends[:-1]], hf
            assert ends[-1] == rows[hf], hf


def _config(tmp_path, name):
    return read_hf_config(make_model(tmp_path / "hf", name))


def test_megatron_arguments(tmp_path):
    config = _config(tmp_path, "qwen3.5-moe-vision")
    arguments = family_for(config).megatron_arguments(config)
    expected = {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [1, 1, 0, 1, 0],
        "linear_conv_kernel_dim": 3,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
        "qk_layernorm": True,
        "rotary_percent": 0.25,
        "rotary_base": 500000,
        "position_embedding_type": "rope",
        "kv_channels": 40,
        "num_query_groups": 2,
        "num_experts": 5,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 36,
        "moe_router_pre_softmax": False,
        "moe_shared_expert_intermediate_size": 28,
        "moe_shared_expert_gate": True,
    }
    assert {name: arguments[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_output_gate": False}, "attn_output_gate=False; for Qwen3.5, supported is"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type='sigmoid'"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype='bfloat16'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        (
            {"linear_num_value_heads": 5},
            "linear_num_value_heads=5.*a multiple of linear_num_key_heads=2",
        ),
        ({"layer_types": ["full_attention"] * 4}, "a list of num_hidden_layers=5"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types='sliding_attention'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type='default'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.275}},
            "partial_rotary_factor=0.275.*an even number of dimensions",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2}}, "above 0, up to 1"),
        ({"partial_rotary_factor": 0.5}, "contradicts itself: partial_rotary_factor=0.5"),
        ({"text_config": {}}, "must have no text_config"),
    ],
)
def test_unsupported_values_are_refused_by_name(tmp_path, change, message):
    config = {**_config(tmp_path, "qwen3.5"), **change}
    with pytest.raises(ConversionError, match=message):
        family_for(config)


def test_what_the_whole_model_has_is_read_at_the_top(tmp_path):
    config = _config(tmp_path, "qwen3.5-vision")
    config["text_config"]["tie_word_embeddings"] = False
    for tied in (True, False):
        config["tie_word_embeddings"] = tied
        arguments = family_for(config).megatron_arguments(config)
        assert arguments["untie_embeddings_and_output_weights"] == (not tied)
    with pytest.raises(ConversionError, match="quantization_config="):
        family_for({**config, "quantization_config": {"quant_method": "fp8"}})
    config["text_config"]["tie_word_embeddings"] = True
    del config["tie_word_embeddings"]
    assert family_for(config).megatron_arguments(config)["untie_embeddings_and_output_weights"]
    with pytest.raises(ConversionError, match="must have a text_config"):
        family_for({key: value for key, value in config.items() if key != "text_config"})


def test_tied_embeddings_of_a_published_folder_are_tied_in_its_language_model_too(tmp_path):
    """Published files have `tie_word_embeddings` at the top. AutoModelForCausalLM reads it in the part."""
    hf = make_model(tmp_path / "hf", "qwen3.5-vision-tied")
    write_config(hf, lambda config: config["text_config"].pop("tie_word_embeddings"))
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = AutoModelForImageTextToText.from_pretrained(hf)(tokens).logits
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
        for model in (opened, load_language_model(hf, torch.float32)):
            torch.testing.assert_close(model(tokens).logits, expected)


def test_values_that_transformers_leaves_out_of_the_text_config_have_its_defaults():
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {"rope_parameters": {"rope_theta": 10000000, "rope_type": "default"}},
    }
    from transformers import Qwen3_5TextConfig

    default = Qwen3_5TextConfig()
    arguments = family_for(config).megatron_arguments(config)
    assert arguments["hidden_size"] == default.hidden_size
    assert arguments["num_layers"] == default.num_hidden_layers
    assert arguments["linear_num_value_heads"] == default.linear_num_value_heads
    assert arguments["vocab_size"] == default.vocab_size
    assert arguments["linear_attention_freq"] == 4
    assert arguments["rotary_percent"] == 0.25


def test_the_stop_token_goes_where_the_file_has_it(tmp_path):
    config = {"text_config": {"eos_token_id": 7}, "vision_config": {}}
    written = plan_stop_tokens(tmp_path, config, 9).config
    assert written == {"text_config": {"eos_token_id": [9, 7]}, "vision_config": {}}
    stops = plan_stop_tokens(tmp_path, {**config, "eos_token_id": 8}, 9)
    assert stops.config == {**config, "eos_token_id": [9, 8]}
    assert stops.ids == (9, 8)
