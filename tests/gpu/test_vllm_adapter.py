"""vLLM answers with an adapter folder of this project as PEFT does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from plain_lora import write_adapter
from tiny_models import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint_conversion.adapters.peft_folder import open_peft_folder, plan_adapter_output
from checkpoint_conversion.engine.dtypes import F32
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf.writer import write_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

PROMPT, LENGTH = [5, 17, 42, 7, 99, 3], 12


def own_folder(hf: Path, folder: Path) -> Path:
    """Read random adapters that PEFT wrote, and write them as a run's `--export-adapter` does."""
    config = read_hf_config(hf)
    adapter = open_peft_folder(write_adapter(hf, folder / "peft"), config)
    output = plan_adapter_output(folder / "own", hf, config, adapter.options, F32)
    with output.writer() as (_, writer):
        write_tensors(adapter.weights, output.tensors, writer)
    return folder / "own"


def greedy(hf: Path, adapter: Path) -> list[int]:
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).cuda()
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokens = list(PROMPT)
    for _ in range(LENGTH):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]).cuda()).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def test_vllm_takes_the_adapter_that_was_exported(tmp_path):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    hf = make_model(tmp_path / "model", tied=True).hf
    config = AutoConfig.from_pretrained(hf)
    config.head_dim = 64  # which every attention kernel of vLLM has
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config).save_pretrained(hf)
    adapter = own_folder(hf, tmp_path)
    settings = {"max_lora_rank": 8, "gpu_memory_utilization": 0.3, "enforce_eager": True}
    llm = LLM(str(hf), dtype="float32", enable_lora=True, max_model_len=64, **settings)
    sampling = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    prompt = {"prompt_token_ids": PROMPT}
    plain, adapted = (
        list(llm.generate(prompt, sampling, lora_request=request)[0].outputs[0].token_ids)
        for request in (None, LoRARequest("adapter", 1, str(adapter)))
    )
    assert adapted == greedy(hf, adapter)
    assert adapted != plain, "adapters too small to show a mistake"
