"""Engines that answer questions: transformers in this process, vLLM, or a server."""

from megatron_profit.evaluation.engines.engine import Answer, Engine, Request, choose_engine

__all__ = ["Answer", "Engine", "Request", "choose_engine"]
