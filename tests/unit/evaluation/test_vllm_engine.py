"""The calls to vLLM, with a module in its place: vLLM needs a GPU."""

import json
import sys
from dataclasses import replace
from datetime import date
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoTokenizer

from megatron_profit.evaluation.engines.engine import Answer, EngineOptions, Request
from megatron_profit.evaluation.engines.vllm_engine import VllmEngine
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling

OPTIONS = EngineOptions(name="vllm", dtype="bfloat16")
REQUESTS = [Request(({"role": "user", "content": f"q{i}"},), ("t", i, 0), 9) for i in range(3)]


class Model:
    """In place of `vllm.LLM`: notes its calls and answers with the prompt."""

    longest, refused = 1000, False

    def __init__(self, **settings):
        if Model.refused:
            raise ValueError("no such model")
        Model.made, self.calls = settings, []

    def generate(self, prompts, parameters, lora_request, use_tqdm):
        Model.calls = (prompts, parameters, lora_request)
        if max(len(prompt["prompt_token_ids"]) for prompt in prompts) > Model.longest:
            raise ValueError("the prompt is longer than the context")
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        text=str(prompt["prompt_token_ids"]), token_ids=[1, 2], finish_reason=reason
                    )
                ]
            )
            for prompt, reason in zip(prompts, ("stop", "length", "stop"), strict=True)
        ]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    module, lora = ModuleType("vllm"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams = Model, lambda **settings: settings
    lora.LoRARequest = lambda *place: place
    for name, each in {
        "vllm": module,
        "vllm.lora": ModuleType("vllm.lora"),
        "vllm.lora.request": lora,
    }.items():
        monkeypatch.setitem(sys.modules, name, each)


def prompts_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            list(request.messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for request in REQUESTS
    ]


def test_prompts_and_settings_reach_vllm(tiny_model):
    engine = VllmEngine(str(tiny_model), OPTIONS)
    assert Model.made == {"model": str(tiny_model), "dtype": "bfloat16", "trust_remote_code": False}
    sampling = Sampling(temperature=0.7, top_p=0.8, samples=8)
    answers = [answer for _, answer in engine.answers(REQUESTS, sampling)]
    expected = prompts_of(tiny_model)
    assert answers == [Answer(str(expected[i]), 2, i != 1) for i in range(3)]
    _, parameters, adapter = Model.calls
    seeds = {each.pop("seed") for each in parameters}
    end = AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids("<|im_end|>")
    assert {tuple(each.pop("stop_token_ids")) for each in parameters} == {(end,)}
    assert parameters[0] == {"temperature": 0.7, "top_p": 0.8, "top_k": -1, "max_tokens": 9}
    assert len(seeds) == 3
    assert adapter is None


def make_adapter(base, folder, rank=16):
    folder.mkdir(exist_ok=True)
    config = {"base_model_name_or_path": str(base), "r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_an_adapter_is_a_request_on_its_base_with_its_own_template(tiny_model, tmp_path):
    engine = VllmEngine(make_adapter(tiny_model, tmp_path / "adapter"), OPTIONS)
    assert Model.made["model"] == str(tiny_model)
    assert Model.made["enable_lora"]
    assert "generation_config" not in Model.made
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": [7]}')
    engine = VllmEngine(str(tmp_path / "adapter"), OPTIONS)
    assert Model.made["generation_config"] == str(tmp_path / "adapter")
    list(engine.answers(REQUESTS, Sampling()))
    assert Model.calls[2] == ("adapter", 1, str(tmp_path / "adapter"))
    assert [prompt["prompt_token_ids"] for prompt in Model.calls[0]] == prompts_of(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(tmp_path / "adapter")
    list(VllmEngine(str(tmp_path / "adapter"), OPTIONS).answers(REQUESTS, Sampling()))
    assert tokenizer.decode(Model.calls[0][1]["prompt_token_ids"]) == "q1!"
    assert Model.calls[1][0]["stop_token_ids"] is None, "this template has no end of a turn"


@pytest.mark.parametrize(("rank", "space"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_vllm_reserves_memory_for_the_rank_of_the_adapter(tiny_model, tmp_path, rank, space):
    VllmEngine(make_adapter(tiny_model, tmp_path / "adapter", rank), OPTIONS)
    assert Model.made["max_lora_rank"] == space


def test_a_rank_above_the_limit_of_vllm_is_named(tiny_model, tmp_path):
    with pytest.raises(EvaluationError, match="has rank 1024, and vLLM's limit is 512; merge it"):
        VllmEngine(make_adapter(tiny_model, tmp_path / "adapter", 1024), OPTIONS)


def test_a_question_that_vllm_refuses_is_a_clear_error(tiny_model, monkeypatch):
    monkeypatch.setattr(Model, "longest", 3)
    engine = VllmEngine(str(tiny_model), OPTIONS)
    with pytest.raises(EvaluationError, match="is longer than the context; choose a model"):
        list(engine.answers(REQUESTS, Sampling()))


def test_a_model_that_vllm_refuses_is_named(tiny_model, monkeypatch):
    monkeypatch.setattr(Model, "refused", True)
    with pytest.raises(
        EvaluationError, match=r"vLLM cannot load .*tiny: no such model; give --engine"
    ):
        VllmEngine(str(tiny_model), OPTIONS)


def test_the_day_of_a_template_reaches_vllm(dated_model):
    engine = VllmEngine(str(dated_model), replace(OPTIONS, day=date(2026, 2, 3)))
    list(engine.answers(REQUESTS, Sampling()))
    text = AutoTokenizer.from_pretrained(dated_model).decode(Model.calls[0][0]["prompt_token_ids"])
    assert "Today: 03 Feb 2026" in text
