"""The tiny model folder loads as a published Qwen3 does, and bad arguments are refused by name."""

import json
from pathlib import Path

import make_tiny_model
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from checkpoint_conversion.hf_to_megatron import plan_import

ROOT = Path(__file__).resolve().parents[3]
DATA = sorted((ROOT / "examples" / "data").glob("arithmetic_*.jsonl"))
SEQ_LENGTH = 40  # of the quickstart
CONVERSATION = [
    {"role": "system", "content": "Answer in words."},
    {"role": "user", "content": "What is forty-two plus 7 naïve 猫?"},
    {"role": "assistant", "content": "Forty-nine."},
]


@pytest.fixture(scope="module")
def tool():
    return make_tiny_model


@pytest.fixture(scope="module")
def folder(tool, tmp_path_factory):
    return tool.make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", DATA)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_model_loads_with_the_shape_asked_for(tool, folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    shape, config = tool.TinyShape(), model.config
    assert config.vocab_size == shape.vocab_size
    assert config.num_hidden_layers == shape.num_layers
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (shape.head_dim,)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_an_untied_model_of_another_shape(tool, tmp_path):
    shape = tool.TinyShape(
        vocab_size=300,
        hidden_size=12,
        intermediate_size=20,
        num_layers=4,
        num_attention_heads=6,
        head_dim=8,
        tied=False,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tool.make_tiny_model(tmp_path / "model", DATA, shape)
    )
    assert model.lm_head.weight.shape == (300, 12)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.model.layers[3].self_attn.k_proj.weight.shape == (2 * 8, 12)


@pytest.mark.parametrize("family", make_tiny_model.FAMILIES)
def test_every_family_loads_as_its_class_and_is_converted(tool, tmp_path, family):
    layers = 4 if "next" in family else 2
    shape = tool.TinyShape(
        hidden_size=32, intermediate_size=24, head_dim=16, num_layers=layers, family=family
    )
    folder = tool.make_tiny_model(tmp_path / "model", DATA[:1], shape)
    kind = AutoModelForImageTextToText if family.endswith("-vision") else AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__name__.startswith(tool.FAMILIES[family])
    if family != "qwen3" and family.startswith("qwen3"):
        kinds = model.config.get_text_config().layer_types
        assert kinds == ["linear_attention"] * (layers - 1) + ["full_attention"]
    plan = plan_import(folder)
    assert bool(plan.model.carried) == family.endswith("-vision")
    arguments = plan.model.family.megatron_arguments(plan.model.config)
    assert ("num_experts" in arguments) == ("moe" in family or "next" in family)


def test_the_chat_template_renders_chatml(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert text == "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CONVERSATION
    )
    prompt = tokenizer.apply_chat_template(
        CONVERSATION[:2], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith(prompt)


def test_any_text_survives_the_tokenizer(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]
    assert len(tokenizer.tokenize("What is forty-two plus twenty-one?")) == 8


def test_special_tokens_are_as_in_a_published_base(folder, tokenizer):
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    for ids in (config, generation):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert ids[name] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer.tokenize(token)) == 1
    # Rows without a token are what a published Qwen3 has too.
    assert 400 < len(tokenizer) < config["vocab_size"]
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_every_shipped_record_fits_the_sequence_of_the_quickstart(tokenizer):
    records = [json.loads(line) for path in DATA for line in path.read_text().splitlines()]
    texts = tokenizer.apply_chat_template([r["messages"] for r in records], tokenize=False)
    assert max(map(len, tokenizer(texts).input_ids)) <= SEQ_LENGTH


def test_the_same_arguments_give_the_same_files(tool, folder, tmp_path):
    random_state = torch.get_rng_state()
    again = tool.make_tiny_model(tmp_path / "again", DATA)
    assert torch.equal(torch.get_rng_state(), random_state)
    other = tool.make_tiny_model(tmp_path / "other", DATA, seed=1)
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() != (other / weights).read_bytes()


def test_an_existing_output_is_kept_unless_overwrite_is_given(tool, tmp_path):
    small = tool.TinyShape(vocab_size=260, hidden_size=8, intermediate_size=8, head_dim=4)
    out = tool.make_tiny_model(tmp_path / "model", DATA[:1], small)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        tool.make_tiny_model(out, DATA[:1], small, seed=1)
    assert (out / "model.safetensors").read_bytes() == before
    tool.make_tiny_model(out, DATA[:1], small, seed=1, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing left beside it


def test_overwrite_refuses_a_folder_that_is_no_model(tool, tmp_path):
    (tmp_path / "thesis.txt").write_text("not a model")
    with pytest.raises(FileExistsError, match="not a model folder"):
        tool.make_tiny_model(tmp_path, DATA[:1], overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failed_run_leaves_nothing(tool, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(tool.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        tool.make_tiny_model(tmp_path / "model", DATA[:1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 510),
        ("vocab_size", 256),
        ("num_layers", 3),
        ("num_key_value_heads", 1),
        ("num_attention_heads", 6),  # no multiple of four key/value heads
        ("head_dim", 33),
        ("hidden_size", 0),
        ("initializer_range", 0.0),
    ],
)
def test_a_shape_that_cannot_be_built_or_split_is_refused_by_name(tool, field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        tool.TinyShape(**{"num_key_value_heads": 4, field: value})


@pytest.mark.parametrize(
    "line", ["not json", "[]", '{"text": "a"}', '{"messages": [{"role": "user", "content": [1]}]}']
)
def test_a_bad_record_is_named_with_its_line(tool, tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": []}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: expected a JSON object with `messages`"):
        tool.read_texts([path])


def test_the_command_reports_errors_without_a_traceback(tool, tmp_path, capsys):
    out, missing = tmp_path / "model", tmp_path / "missing.jsonl"
    assert tool.main(["--out", str(out), "--data", str(missing)]) == 2
    assert f"error: --data: {missing} is not a file" in capsys.readouterr().err
    assert tool.main(["--out", str(out), "--data", str(DATA[0]), "--head-dim", "7"]) == 2
    assert "head_dim is 7" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_passes_its_options_on(tool, tmp_path, capsys):
    out, text = tmp_path / "deep" / "model", tmp_path / "notes.md"
    text.write_text("Plain text teaches the merges as well. " * 3)
    options = ["--vocab-size", "264", "--hidden-size", "8", "--head-dim", "6", "--untied"]
    assert tool.main(["--out", str(out), "--data", str(text), *options]) == 0
    assert str(out) in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"], config["head_dim"]) == (264, 8, 6)
    assert config["tie_word_embeddings"] is False
