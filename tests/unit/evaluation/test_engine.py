"""The engine of this process: prompts, batches, draws."""

import functools
import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from make_tiny_model import TinyShape, make_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconH1Config,
    Gemma2Config,
    MambaConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from megatron_profit.data import DataError
from megatron_profit.evaluation.engines.decoding import Row, decode, draw, probabilities
from megatron_profit.evaluation.engines.engine import EngineOptions, Request, resolved
from megatron_profit.evaluation.engines.model_folder import load_model
from megatron_profit.evaluation.engines.transformers_engine import (
    TransformersEngine,
    template_ids,
)
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.questions import task_of_file
from megatron_profit.evaluation.sampling import Sampling

DATA = Path(__file__).resolve().parents[3] / "examples" / "data" / "arithmetic_base.jsonl"
OPTIONS = EngineOptions(name="transformers", dtype="float32", batch=64)
GREEDY = Sampling()


@pytest.fixture(scope="module")
def engine(tiny_model):
    return TransformersEngine(str(tiny_model), OPTIONS)


@pytest.fixture(scope="module")
def tiny_model_of(tmp_path_factory):
    """tiny_model_of(family): a tiny random model, loaded."""

    @functools.cache
    def load(family):
        if family == "a sliding window":
            config = Qwen3Config(
                vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                use_sliding_window=True, sliding_window=8, max_window_layers=1,
            )  # fmt: skip
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()
        if family == "attention and states in a layer":
            config = FalconH1Config(
                vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
            )  # fmt: skip
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()
        folder = tmp_path_factory.mktemp("families") / family
        make_tiny_model(folder, [DATA], TinyShape(family=family))
        return load_model(folder, torch.float32)

    return load


def requests_of(task, samples=1, longest=12):
    return [
        Request(question.messages, (task.name, question.number, i), longest)
        for question in task.questions
        for i in range(samples)
    ]


def answers_of(engine, requests, sampling, batch):
    engine.batch = batch
    return {request.place: answer for request, answer in engine.answers(requests, sampling)}


def test_a_prompt_is_the_chat_template_byte_for_byte(engine, tiny_model, sums):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for question in task_of_file(sums, {}).questions:
        asked = [{"role": "user", "content": question.doc["question"]}]
        expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert template_ids(engine.template, question.messages) == list(expected)


def test_a_template_that_asks_for_today_gets_the_day_of_the_options(dated_model, tiny_model):
    engine = TransformersEngine(str(dated_model), replace(OPTIONS, day=date(2026, 2, 3)))
    asked = [{"role": "user", "content": "2 + 2?"}]
    text = engine.tokenizer.decode(template_ids(engine.template, asked))
    assert text.startswith("<|im_start|>system\nToday: 03 Feb 2026<|im_end|>\n")
    with pytest.raises(DataError, match=r"writes today's date.*--template-date"):
        TransformersEngine(str(dated_model), OPTIONS)
    plain = TransformersEngine(str(tiny_model), replace(OPTIONS, day=date(2026, 2, 3)))
    assert plain.template.day is None


def test_cut_thoughts_that_the_prompt_opens_are_told_from_an_answer(
    engine, tiny_model, sums, tmp_path
):
    folder = shutil.copytree(tiny_model, tmp_path / "thinks")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    requests = requests_of(task_of_file(sums, {}))
    thinks = TransformersEngine(str(folder), OPTIONS)
    found = answers_of(thinks, requests, GREEDY, 8).values()
    assert all(answer.text.startswith("<think>") != answer.stopped for answer in found)
    thinks.stop_ids = frozenset(range(thinks.model.config.vocab_size))
    assert {answer.text for answer in answers_of(thinks, requests, GREEDY, 8).values()} == {""}
    plain = answers_of(engine, requests, GREEDY, 8).values()
    assert not any(answer.text.startswith("<think>") for answer in plain)


def test_an_answer_ends_where_the_template_ends_a_turn(tiny_model, sums, tmp_path):
    """A base's files may name another token."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "eos_token_id": tokenizer.eos_token_id}))
    base = TransformersEngine(str(folder), OPTIONS)
    assert base.stop_ids == {tokenizer.eos_token_id, end}
    assert tokenizer.eos_token_id != end
    base.stop_ids = frozenset(range(base.model.config.vocab_size))
    found = answers_of(base, requests_of(task_of_file(sums, {})), GREEDY, 8).values()
    assert {(answer.text, answer.tokens, answer.stopped) for answer in found} == {("", 1, True)}


def test_greedy_answers_are_transformers_own_at_any_batch_size(engine, tiny_model, sums):
    task = task_of_file(sums, {})
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = {}
    for request in requests_of(task):
        ids = torch.tensor([template_ids(engine.template, request.messages)])
        output = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.size(1) :]
        expected[request.place] = tokenizer.decode(output, skip_special_tokens=True)
    for batch in (1, 2, 3, 64):
        found = answers_of(engine, requests_of(task), GREEDY, batch)
        assert {place: answer.text for place, answer in found.items()} == expected


@pytest.mark.parametrize(
    "family",
    ["qwen3", "qwen3.5", "qwen3-next", "a sliding window", "attention and states in a layer"],
)
def test_rows_that_join_others_have_the_answers_that_they_have_alone(tiny_model_of, family):
    model = tiny_model_of(family)
    vocabulary = model.config.get_text_config().vocab_size
    draw = random.Random(4)
    prompts = [[draw.randrange(vocabulary) for _ in range(draw.randint(1, 30))] for _ in range(11)]
    # Two answers share a prompt; the limits differ, so that rows leave and join at many places.
    limits = [draw.randint(1, 24) for _ in prompts]
    rows = [Row(prompts[i - i % 2], limits[i], random.Random(i)) for i in range(len(prompts))]
    found = list(decode(model, rows, 4, GREEDY, frozenset({5, 6})))
    assert sorted(map(rows.index, found)) == list(range(len(rows)))
    for row in rows:
        ids = list(row.prompt)
        for token in row.ids:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            # Equal to the most probable token, or so near to it that fp32 cannot tell.
            assert logits[token] >= logits.max() - 1e-4
            ids.append(token)
        assert row.stopped == (row.ids[-1] in (5, 6))
        assert row.stopped or len(row.ids) == row.longest
        assert not {5, 6} & set(row.ids[:-1])


def test_an_answer_ends_at_its_own_limit_and_leaves_the_batch(engine, sums):
    requests = [
        replace(request, longest=3 + 4 * i)
        for i, request in enumerate(requests_of(task_of_file(sums, {})))
    ]
    long = answers_of(engine, [replace(r, longest=19) for r in requests], GREEDY, 64)
    found = answers_of(engine, requests, GREEDY, 64)
    for request in requests:
        whole, cut = long[request.place], found[request.place]
        assert whole.text.startswith(cut.text)
        assert cut.tokens == min(request.longest, whole.tokens)
        assert cut.stopped == (whole.stopped and whole.tokens <= request.longest)


def test_an_answer_that_ends_itself_is_told_from_one_that_is_cut(engine, sums):
    requests = requests_of(task_of_file(sums, {}), longest=8)
    before = answers_of(engine, requests, GREEDY, 64)
    place, answer = next(iter(before.items()))
    ids = engine.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    stop_ids, engine.stop_ids = engine.stop_ids, frozenset(ids[:1])
    try:
        after = answers_of(engine, requests, GREEDY, 64)
    finally:
        engine.stop_ids = stop_ids
    assert after[place].stopped
    assert not before[place].stopped
    assert after[place].tokens <= before[place].tokens


def test_draws_do_not_depend_on_the_batch(engine, sums):
    sampling = Sampling(temperature=0.8, top_p=0.95, top_k=50, samples=3)
    requests = requests_of(task_of_file(sums, {}), samples=3)
    together = answers_of(engine, requests, sampling, 64)
    alone = answers_of(engine, requests[::-1], sampling, 2)
    assert together == alone
    assert len({answer.text for answer in together.values()}) > 10
    other_seed = answers_of(engine, requests, replace(sampling, seed=7), 64)
    assert other_seed != together


def test_draws_have_the_probabilities_of_the_settings():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    sampling = Sampling(temperature=0.5, top_k=3, top_p=0.9, samples=2)
    # By hand: temperature, the three largest (3, 2, 1), then the smallest set of at least 0.9.
    weights = {i: math.exp(logits[i] / 0.5) for i in (4, 0, 1)}
    kept = {4: weights[4], 0: weights[0]}
    assert weights[4] / sum(weights.values()) < 0.9
    assert sum(kept.values()) / sum(weights.values()) >= 0.9
    expected = {i: weight / sum(kept.values()) for i, weight in kept.items()}
    prob, ids = probabilities(logits, sampling)
    found = {i: p for i, p in zip(ids.tolist(), prob.tolist(), strict=True) if p}
    assert found == pytest.approx(expected)
    numbers = [sampling.numbers("t", i) for i in range(4000)]
    counts = Counter(draw(logits.expand(4000, -1), numbers, sampling).tolist())
    assert counts.keys() == expected.keys()
    assert counts[4] / 4000 == pytest.approx(expected[4], abs=0.03)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, state_size=2),
        RecurrentGemmaConfig(
            vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=1, lru_width=8, attention_window_size=4,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_model_with_a_state_outside_of_the_cache_is_refused(tmp_path, config):
    """It would answer from a part of the text."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match=r"keeps its state outside of .*give --server of"):
        load_model(tmp_path, torch.float32)


def test_models_whose_attention_torch_does_not_have_are_loaded(tmp_path):
    """For example Gemma 2 with its soft caps, also if its config.json names kernels of others."""
    config = Gemma2Config(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["attn_implementation"] = "somebody/kernels"
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = load_model(tmp_path, torch.float32)
    assert model.config._attn_implementation == "eager"


def test_a_model_larger_than_the_gpu_is_named(tiny_model, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    with pytest.raises(
        EvaluationError, match=r"needs 0.0 GiB in float32, more than the GPU has left"
    ):
        load_model(tiny_model, torch.float32)


def test_a_question_longer_than_the_context_is_named(engine, write_questions):
    file = write_questions([{"question": "plus " * 3000, "answer": 1}])
    with pytest.raises(
        EvaluationError, match=r"question 0 of sums has .* tokens, and the model's context 2,048"
    ):
        answers_of(engine, requests_of(task_of_file(file, {})), GREEDY, 4)


def test_a_template_that_fails_and_logits_that_are_nan_are_named(engine, sums):
    requests = requests_of(task_of_file(sums, {}))
    template, engine.tokenizer.chat_template = engine.tokenizer.chat_template, "{{ raise('no') }}"
    try:
        with pytest.raises(EvaluationError, match="chat template cannot write the messages"):
            answers_of(engine, requests, GREEDY, 4)
    finally:
        engine.tokenizer.chat_template = template
    weight = engine.model.model.norm.weight.data
    before = weight.clone()
    weight.fill_(math.nan)
    try:
        with pytest.raises(EvaluationError, match="the model's logits are NaN"):
            answers_of(engine, requests, GREEDY, 4)
    finally:
        weight.copy_(before)


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_without_bfloat16_gets_float32(monkeypatch, native, dtype):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: native)
    assert resolved(EngineOptions(name="transformers")).dtype == dtype


def test_automatic_options_are_decided_and_named():
    options = resolved(EngineOptions())
    assert options.name == "transformers" or torch.cuda.is_available()
    assert options.dtype in ("float32", "bfloat16")
    with pytest.raises(EvaluationError, match="--engine is 'sglang'"):
        resolved(EngineOptions(name="sglang"))


def test_an_adapter_answers_as_its_merged_model(tiny_model, tmp_path, sums):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "merged")
    requests = requests_of(task_of_file(sums, {}))
    texts = [
        {
            place: answer.text
            for place, answer in answers_of(
                TransformersEngine(str(folder), OPTIONS), requests, GREEDY, 8
            ).items()
        }
        for folder in (tmp_path / "adapter", tmp_path / "merged", tiny_model)
    ]
    assert texts[0] == texts[1] != texts[2]
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert TransformersEngine(str(tmp_path / "adapter"), OPTIONS).stop_ids >= {7, 5}
