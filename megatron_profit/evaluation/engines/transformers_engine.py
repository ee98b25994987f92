"""Answers by transformers in this process, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_profit.data.errors import DataError
from megatron_profit.data.render.template import ChatTemplate
from megatron_profit.data.render.turn_markers import learn_markers
from megatron_profit.evaluation.engines.decoding import Row, decode
from megatron_profit.evaluation.engines.engine import Answer, EngineOptions, Request
from megatron_profit.evaluation.engines.model_folder import load_chat_template, load_model
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.graders import THINK
from megatron_profit.evaluation.sampling import Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def template_text(template: ChatTemplate, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the text of messages with a generation prompt, as the chat template writes it.

    Raises:
        EvaluationError: The template cannot render them.
    """
    try:
        return template.text([dict(message) for message in messages], prompt=True)
    except Exception as error:  # whatever a template raises
        raise EvaluationError(
            f"the model's chat template cannot write the messages: {error}"
        ) from error


def template_ids(template: ChatTemplate, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the token ids of `template_text`.

    Raises:
        EvaluationError: The template cannot render the messages.
    """
    (encoding,) = template.encode([template_text(template, messages)])
    return list(encoding.ids)


def begin_of_cut_answers(template: ChatTemplate) -> str:
    """Return "<think>" where the prompt already opens the thoughts, as Qwen3-Thinking's does, else "".

    Written before an answer that was cut, it tells its unfinished thoughts from an answer.
    """
    prompt = template_text(template, [{"role": "user", "content": "?"}])
    return THINK if prompt.rstrip().endswith(THINK) else ""


def turn_end(template: ChatTemplate) -> int | None:
    """Return the token that ends a turn in the chat template, None where it is ordinary text.

    An answer is one turn. A base's own files often name another token, after which it would write the
    user's next question.
    """
    try:
        return learn_markers(template).end_id
    except DataError:  # the template cannot be trained with, and may be asked all the same
        return None


class TransformersEngine:
    """Answers in a batch that the next questions join as others end, those with the longest prompts first.

    Args:
        model: HuggingFace folder, or an adapter's.
        options: See `EngineOptions`.
    """

    def __init__(self, model: str, options: EngineOptions) -> None:
        self.template = load_chat_template(Path(model), options.day)
        self.tokenizer = self.template.tokenizer
        self.begin = begin_of_cut_answers(self.template)
        self.model = load_model(Path(model), DTYPES[options.dtype])
        self.batch = options.batch
        self.stop_ids = self._stop_ids()
        self.context = getattr(self.model.config, "max_position_embeddings", None)

    def _stop_ids(self) -> frozenset[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        ends = (*ends, self.tokenizer.eos_token_id, turn_end(self.template))
        return frozenset(i for i in ends if i is not None)

    def answers(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[Request, Answer]]:
        """Yield each request with its answer; see `Engine`."""
        prompts: dict[str, list[int]] = {}
        for request in requests:
            key = repr(request.messages)
            if key not in prompts:
                prompts[key] = template_ids(self.template, request.messages)
        # The longest first: a batch that does not fit into memory fails at once.
        ordered = sorted(requests, key=lambda r: -len(prompts[repr(r.messages)]))
        rows = [self._row(prompts[repr(r.messages)], r, sampling) for r in ordered]
        asked = {id(row): request for row, request in zip(rows, ordered, strict=True)}
        try:
            for row in decode(self.model, rows, self.batch, sampling, self.stop_ids):
                yield asked[id(row)], self._answer(row)
        except torch.OutOfMemoryError as error:
            raise EvaluationError(
                f"{self.batch} answers at a time need more memory than the GPU has; give a smaller "
                "--batch"
            ) from error

    def _row(self, prompt: list[int], request: Request, sampling: Sampling) -> Row:
        longest = request.longest
        if self.context is not None:
            longest = min(longest, self.context - len(prompt))
        if longest < 1:
            raise EvaluationError(
                f"question {request.place[1]} of {request.place[0]} has {len(prompt):,} tokens, and the "
                f"model's context {self.context:,}; choose a model with a longer context, or remove the "
                "question"
            )
        return Row(prompt, longest, sampling.numbers(*request.place))

    def _answer(self, row: Row) -> Answer:
        ids = row.ids[:-1] if row.stopped else row.ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text if row.stopped else self.begin + text, len(row.ids), row.stopped)
