"""Answers by an OpenAI-compatible server, which applies the chat template itself."""

from __future__ import annotations

import json
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from http.client import HTTPException
from typing import Any

from checkpoint_conversion.errors import warn
from megatron_profit.evaluation.engines.engine import (
    Answer,
    EngineOptions,
    Request,
    server_address,
)
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling

# Too many requests, and further refusals that may pass; faults of the server, from 500 on, may pass too.
_PASSING = (408, 409, 425, 429)
_SERVER_FAULT = 500
# Statuses for a field that the server does not know.
_UNKNOWN_FIELD = (400, 422)
# Values that change nothing, in the place of the defaults that a server takes from the model's
# generation_config.json. These fields are not OpenAI's; vLLM, SGLang and llama.cpp know them.
_NEUTRAL = {"top_k": -1, "repetition_penalty": 1.0, "min_p": 0.0}
_LONGEST_BODY = 64 << 20
# Tokens per second of a slow server. A response comes when its answer is whole.
_SLOW = 5
_SHOWN = 300


class ServerEngine:
    """Asks `/v1/chat/completions`, several requests at a time.

    A request that fails in a way that may pass is tried again, after 1, 2, 4 … seconds. The key is taken from
    the environment variable OPENAI_API_KEY.

    Args:
        model: The server's name of the model.
        options: See `EngineOptions`.
    """

    def __init__(self, model: str, options: EngineOptions) -> None:
        base = server_address(options.server or "")
        if not base.startswith(("http://", "https://")):
            raise EvaluationError(
                f"--server is {options.server!r}; it must begin with http:// or https://"
            )
        self.url = f"{base}/v1/chat/completions"
        self.model, self.options = model, options
        self.neutral: Mapping[str, float] = _NEUTRAL
        self.ended = threading.Event()
        self.sleep: Callable[[float], object] = self.ended.wait

    def answers(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[Request, Answer]]:
        """Yield each request with its answer; see `Engine`.

        When a request fails for good, no more are sent, and the ones under way are still waited for. After
        Ctrl-C they are not tried again.
        """
        waiting, running = iter(requests), dict[Future[Answer], Request]()
        failure: EvaluationError | None = None
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            while True:
                while failure is None and len(running) < self.options.concurrency:
                    if (request := next(waiting, None)) is None:
                        break
                    running[pool.submit(self._ask, request, sampling)] = request
                if not running:
                    break
                try:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                except BaseException:
                    self.ended.set()
                    raise
                for future in done:
                    request = running.pop(future)
                    try:
                        answer = future.result()
                    except EvaluationError as error:
                        failure = failure or error
                    else:
                        yield request, answer
        if failure is not None:
            raise failure

    def _ask(self, request: Request, sampling: Sampling) -> Answer:
        task, question, _ = request.place
        place = f"question {question} of {task}"
        for attempt in range(self.options.retries + 1):
            if attempt:
                if self.ended.is_set():
                    break
                self.sleep(min(2 ** (attempt - 1), 30))
            try:
                return _answer(self._response(self._body(request, sampling)))
            except urllib.error.HTTPError as error:
                problem = f"HTTP status {error.code}: {_said(error)}"
                if error.code < _SERVER_FAULT and error.code not in _PASSING:
                    raise EvaluationError(
                        f"{self.url} refuses {place} ({problem}); check --server, the model's name "
                        f"{self.model!r} and the sampling flags"
                    ) from error
            except (OSError, HTTPException, ValueError, KeyError, TypeError, IndexError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise EvaluationError(
            f"{self.url} did not answer {place} in {self.options.retries + 1} tries ({problem}); the answers "
            "so far are kept: when the server works again at this address, give the same command to go on"
        )

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "max_tokens": request.longest,
            "temperature": sampling.temperature,
            "seed": sampling.numbers(*request.place).getrandbits(31),
        }
        if not sampling.is_greedy:
            body |= {"top_p": sampling.top_p}
            body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        return body

    def _response(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request with the neutral fields, and without them if the server does not know them."""
        neutral = self.neutral
        try:
            return self._post({**neutral, **body})
        except urllib.error.HTTPError as error:
            if error.code not in _UNKNOWN_FIELD or not neutral:
                raise
        response = self._post(body)  # another fault is raised again
        if self.neutral:
            self.neutral = {}
            warn(
                f"{self.url} does not take {', '.join(neutral)}, so its own defaults act on the answers, for "
                "example the ones of the model's generation_config.json; start it without them if it can",
                sys.stderr,
            )
        return response

    def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        seconds = self.options.timeout + body["max_tokens"] / _SLOW
        with urllib.request.urlopen(request, timeout=seconds) as response:
            content = response.read(_LONGEST_BODY)
        return json.loads(content)


def _said(error: urllib.error.HTTPError) -> str:
    """Return the start of a fault's text, as much as the server sends of it."""
    try:
        return error.read(_SHOWN).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return ""


def _answer(response: Mapping[str, Any]) -> Answer:
    """Return the answer in a server's response.

    Raises:
        ValueError, KeyError, TypeError, IndexError: It has another form.
    """
    choice = response["choices"][0]
    message = dict(choice["message"])
    text = message.get("content") or ""
    if not isinstance(text, str):
        raise ValueError(f"the content of the response is {type(text).__name__} and no text")
    # Servers with a reasoning parser keep the thoughts apart.
    if thoughts := message.get("reasoning_content") or message.get("reasoning"):
        text = f"<think>{thoughts}</think>{text}"
    tokens = dict(response.get("usage") or {}).get("completion_tokens")
    if not isinstance(tokens, int):
        raise ValueError("the response tells no usage.completion_tokens")
    return Answer(text, tokens, choice.get("finish_reason") != "length")
