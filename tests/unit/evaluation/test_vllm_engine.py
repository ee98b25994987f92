"""The calls to vLLM, with a module in its place: vLLM needs a GPU."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_profit.evaluation.engines.engine import Answer, EngineOptions, Request
from megatron_profit.evaluation.engines.vllm_engine import VllmEngine
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling

OPTIONS = EngineOptions(name="vllm", dtype="bfloat16")
REQUESTS = [Request(({"role": "user", "content": f"q{i}"},), ("t", i, 0), 9) for i in range(3)]


class Model:
    """In place of `vllm.LLM`: notes its calls and repeats the question."""

    def __init__(self, **settings):
        if "absent" in settings["model"]:
            raise ValueError("no such model")
        Model.made, self.calls = settings, []

    def chat(self, messages, parameters, lora_request, use_tqdm):
        Model.calls = (messages, parameters, lora_request)
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        text=talk[-1]["content"], token_ids=[1, 2], finish_reason=reason
                    )
                ]
            )
            for talk, reason in zip(messages, ("stop", "length", "stop"), strict=True)
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


def test_messages_and_settings_reach_vllm(tmp_path):
    engine = VllmEngine(str(tmp_path), OPTIONS)
    assert Model.made == {"model": str(tmp_path), "dtype": "bfloat16", "trust_remote_code": False}
    sampling = Sampling(temperature=0.7, top_p=0.8, samples=8)
    answers = [answer for _, answer in engine.answers(REQUESTS, sampling)]
    assert answers == [Answer(f"q{i}", 2, i != 1) for i in range(3)]
    messages, parameters, adapter = Model.calls
    assert messages[0] == [{"role": "user", "content": "q0"}]
    seeds = {each.pop("seed") for each in parameters}
    assert parameters[0] == {"temperature": 0.7, "top_p": 0.8, "top_k": -1, "max_tokens": 9}
    assert len(seeds) == 3
    assert adapter is None


def make_adapter(tmp_path, rank):
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "adapter").mkdir(exist_ok=True)
    config = {"base_model_name_or_path": str(tmp_path / "base"), "r": rank}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return str(tmp_path / "adapter")


def test_an_adapter_is_a_request_on_its_base(tmp_path):
    engine = VllmEngine(make_adapter(tmp_path, 16), OPTIONS)
    assert Model.made["model"] == str(tmp_path / "base")
    assert Model.made["enable_lora"]
    list(engine.answers(REQUESTS, Sampling()))
    assert Model.calls[2] == ("adapter", 1, str(tmp_path / "adapter"))


@pytest.mark.parametrize(("rank", "space"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_vllm_reserves_memory_for_the_rank_of_the_adapter(tmp_path, rank, space):
    VllmEngine(make_adapter(tmp_path, rank), OPTIONS)
    assert Model.made["max_lora_rank"] == space


def test_a_rank_above_the_limit_of_vllm_is_named(tmp_path):
    with pytest.raises(EvaluationError, match="has rank 1024, and vLLM's limit is 512; merge it"):
        VllmEngine(make_adapter(tmp_path, 1024), OPTIONS)


def test_a_model_that_vllm_refuses_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"vLLM cannot load .*absent: no such model"):
        VllmEngine(str(tmp_path / "absent"), OPTIONS)
