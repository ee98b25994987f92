"""Answers by vLLM on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

from checkpoint_conversion.hf.folder import read_json_object
from checkpoint_conversion.hf.stop_tokens import GENERATION_CONFIG
from megatron_profit.evaluation.engines.engine import Answer, EngineOptions, Request
from megatron_profit.evaluation.engines.model_folder import ADAPTER, base_of, load_chat_template
from megatron_profit.evaluation.engines.transformers_engine import (
    begin_of_cut_answers,
    template_ids,
    turn_end,
)
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling

# vLLM schedules the requests of a call itself; the calls are for the records and the progress.
_AT_A_TIME = 512
# The ranks that vLLM's LoRAConfig reserves memory for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """Answers by vLLM's `LLM.generate`, with an adapter as a LoRA request.

    The prompts are rendered here, by the chat template of the adapter if it has one, as with transformers.

    Args:
        model: HuggingFace folder, or an adapter's.
        options: See `EngineOptions`.
    """

    def __init__(self, model: str, options: EngineOptions) -> None:
        from vllm import LLM

        folder = Path(model)
        base = base_of(folder)
        self.template = load_chat_template(folder, options.day)
        self.begin = begin_of_cut_answers(self.template)
        self.adapter: Any = None
        settings: dict[str, Any] = {"model": str(base), "dtype": options.dtype}
        if base != folder:
            from vllm.lora.request import LoRARequest

            self.adapter = LoRARequest("adapter", 1, str(folder))
            settings |= {"enable_lora": True, "max_lora_rank": _space_for_rank(folder)}
            if (folder / GENERATION_CONFIG).is_file():
                settings["generation_config"] = str(folder)
        try:
            self.llm = LLM(trust_remote_code=False, **settings)
        except (ValueError, RuntimeError, OSError) as error:
            raise EvaluationError(
                f"vLLM cannot load {folder}: {error}; give --engine transformers, or start `vllm serve` with "
                "the settings that it needs, for example --max-model-len, and give --server"
            ) from error

    def answers(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[Request, Answer]]:
        """Yield each request with its answer; see `Engine`."""
        from vllm import SamplingParams

        end = turn_end(self.template)
        for part in batched(requests, _AT_A_TIME):
            parameters = [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k or -1,
                    max_tokens=request.longest,
                    seed=sampling.numbers(*request.place).getrandbits(31),
                    stop_token_ids=None if end is None else [end],
                )
                for request in part
            ]
            prompts = [
                {"prompt_token_ids": template_ids(self.template, request.messages)}
                for request in part
            ]
            try:
                outputs = self.llm.generate(
                    prompts, parameters, lora_request=self.adapter, use_tqdm=False
                )
            except ValueError as error:  # a question that is longer than the context
                raise EvaluationError(
                    f"vLLM cannot answer: {error}; choose a model with a longer context, or remove "
                    "the question"
                ) from error
            for request, output in zip(part, outputs, strict=True):
                best = output.outputs[0]
                stopped = best.finish_reason != "length"
                text = best.text if stopped else self.begin + best.text
                yield request, Answer(text, len(best.token_ids), stopped)


def _space_for_rank(folder: Path) -> int:
    """Return the smallest of vLLM's ranks that an adapter fits.

    Raises:
        EvaluationError: It fits none.
    """
    content = read_json_object(folder / ADAPTER)
    patterns = content.get("rank_pattern") or {}
    rank = max([content.get("r", 0), *patterns.values()])
    fits = [most for most in _RANKS if rank <= most]
    if not fits:
        raise EvaluationError(
            f"{folder}: the adapter has rank {rank}, and vLLM's limit is {_RANKS[-1]}; merge it into its "
            "base, or give --engine transformers"
        )
    return fits[0]
