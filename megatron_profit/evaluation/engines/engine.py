"""The engines' interface, and the choice of one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Protocol

from megatron_profit.evaluation.errors import EvaluationError, require
from megatron_profit.evaluation.sampling import Sampling

NAMES = ("auto", "transformers", "vllm")


@dataclass(frozen=True)
class Request:
    """A question to be answered once.

    Attributes:
        messages: The chat messages.
        place: The task, the question's number and the sample's number, from which the draws follow.
        longest: Most new tokens.
    """

    messages: tuple[Mapping[str, str], ...]
    place: tuple[str, int, int]
    longest: int


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: Without special tokens. One that was cut has the "<think>" that its prompt may end in.
        tokens: Number of its tokens, with the one that ends it.
        stopped: Whether it ended by itself, and not at the length limit.
    """

    text: str
    tokens: int
    stopped: bool


class Engine(Protocol):
    """Answers requests."""

    def answers(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[Request, Answer]]:
        """Yield each request with its answer, in the order in which they are finished.

        Raises:
            EvaluationError: The engine cannot go on; the answers before are whole.
        """
        ...


@dataclass(frozen=True)
class EngineOptions:
    """Options of all engines.

    Attributes:
        name: One of `NAMES`; auto takes vLLM where it is installed and a GPU is there, else transformers.
        server: Base URL of an OpenAI-compatible server; then the model is the server's name for it.
        batch: Answers at a time.
        dtype: float32, bfloat16, or auto: bfloat16 where the device computes in it.
        concurrency: Requests at a time to a server.
        retries: Further tries of a request that a server did not answer.
        timeout: Seconds to wait for an answer of a server, and a second more for each 5 tokens of its limit.
        day: Day that a chat template writes which asks for today's.
    """

    name: str = "auto"
    server: str | None = None
    batch: int = 32
    dtype: str = "auto"
    concurrency: int = 16
    retries: int = 5
    timeout: float = 600.0
    day: date | None = None


def resolved(options: EngineOptions) -> EngineOptions:
    """Return the options with `auto` decided for this machine.

    Raises:
        EvaluationError: The engine is unknown.
    """
    if options.server is not None:
        return options
    if options.name not in NAMES:
        raise EvaluationError(f"--engine is {options.name!r}; it must be {', '.join(NAMES)}")
    import torch

    on_gpu = torch.cuda.is_available()
    name = options.name
    if name == "auto":
        has_vllm = on_gpu and importlib.util.find_spec("vllm") is not None
        name = "vllm" if has_vllm else "transformers"
    dtype = options.dtype
    if dtype == "auto":
        native = (on_gpu and name == "vllm") or computes_in_bfloat16(on_gpu)
        dtype = "bfloat16" if native else "float32"
    return replace(options, name=name, dtype=dtype)


def computes_in_bfloat16(on_gpu: bool) -> bool:
    """Return whether the device does; another one is several times slower with it.

    A GPU is not asked for vLLM, which has to be the first to use it.
    """
    import torch

    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def description(options: EngineOptions) -> str:
    """Return the engine in words. For example, "transformers, float32"."""
    if options.server is not None:
        return f"server {server_address(options.server)}"
    return f"{options.name}, {options.dtype}"


def server_address(given: str) -> str:
    """Return the address of a server without the path of its API. For example, "http://host:8000"."""
    return given.rstrip("/").removesuffix("/v1")


def choose_engine(model: str, options: EngineOptions) -> Engine:
    """Return the engine that answers for a model.

    Args:
        model: HuggingFace folder that `check_model` accepts; with a server, the server's name of the model.
        options: Resolved options.

    Raises:
        EvaluationError: The engine is not installed, or cannot load the model.
    """
    if options.server is not None:
        from megatron_profit.evaluation.engines.server import ServerEngine

        return ServerEngine(model, options)
    if options.name == "vllm":
        require("vllm", for_what="--engine vllm", install="vllm")
        from megatron_profit.evaluation.engines.vllm_engine import VllmEngine

        return VllmEngine(model, options)
    from megatron_profit.evaluation.engines.transformers_engine import TransformersEngine

    return TransformersEngine(model, options)
