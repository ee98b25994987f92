"""A conversation with a model: messages, tokens one by one, and how likely the model found each of them."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from megatron_profit.data.render.template import ChatTemplate


@dataclass
class Conversation:
    """The messages so far, and the tokens of the last answer.

    Attributes:
        model, template: Of the folder.
        stop_ids: Tokens that end an answer.
        system: Content of the system message; empty for none.
        messages: The messages after it.
        ids: Token ids of the last answer.
        probs: Probability of each of them, given all before, without temperature and cuts.
    """

    model: PreTrainedModel
    template: ChatTemplate
    stop_ids: frozenset[int]
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    turns: int = 0

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the template."""
        return self.template.tokenizer

    def reset(self) -> None:
        """Forget all messages except for the system message."""
        self.messages, self.ids, self.probs = [], [], []

    def prompt_ids(self) -> list[int]:
        """Return the token ids of the conversation, as the chat template renders it."""
        from megatron_profit.evaluation.engines.transformers_engine import template_ids

        system = [{"role": "system", "content": self.system}] if self.system else []
        return template_ids(self.template, [*system, *self.messages])

    def answer(self, text: str, sampling: Sampling, longest: int) -> Generator[str]:
        """Say something, and yield the model's answer in pieces as it grows.

        The answer joins the conversation when it ends, or when the caller stops asking for more.

        Args:
            text: The user's message.
            sampling: How tokens are drawn.
            longest: Most new tokens.
        """
        self.messages.append({"role": "user", "content": text})
        self.ids, self.probs, said = [], [], ""
        self.turns += 1
        try:
            for token, prob in self._tokens(sampling, longest):
                self.ids.append(token)
                self.probs.append(prob)
                whole = self._text()
                if not whole.endswith(
                    "\N{REPLACEMENT CHARACTER}"
                ):  # else a character is unfinished
                    yield whole[len(said) :]
                    said = whole
        finally:
            whole = self._text()
            self.messages.append({"role": "assistant", "content": whole})
        if len(whole) > len(said):
            yield whole[len(said) :]

    def _text(self) -> str:
        """Return the text of the last answer so far, without the token that ends it."""
        ended = self.ids[-1:] and self.ids[-1] in self.stop_ids
        return self.tokenizer.decode(self.ids[: -1 if ended else None], skip_special_tokens=True)

    def _tokens(self, sampling: Sampling, longest: int) -> Iterator[tuple[int, float]]:
        import torch
        from transformers import DynamicCache

        from megatron_profit.evaluation.engines.decoding import draw, last_logits

        numbers = sampling.numbers("chat", self.turns)
        cache = DynamicCache(config=self.model.config)
        prompt = self.prompt_ids()
        ids: Any = torch.tensor([prompt], device=self.model.device)
        for _ in range(min(longest, self._room_after(len(prompt)))):
            try:
                with torch.no_grad():
                    output = self.model(
                        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                    )
            except torch.OutOfMemoryError as error:
                raise EvaluationError(
                    "the conversation needs more memory than the GPU has left; /reset begins again"
                ) from error
            logits = last_logits(output.logits)
            ids = draw(logits, [numbers], sampling)[None]
            token = int(ids)
            yield token, float(logits.softmax(-1)[0, token])
            if token in self.stop_ids:
                return

    def _room_after(self, prompt: int) -> int:
        """Return how many tokens the model's context has room for after a prompt of this many.

        Raises:
            EvaluationError: There is none.
        """
        context = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        if prompt >= context:
            raise EvaluationError(
                f"the conversation has {prompt:,} tokens, and the model's context {context:,}; /reset begins "
                "again"
            )
        return context - prompt

    def check_system(self) -> None:
        """Check that the chat template writes the system message.

        Raises:
            EvaluationError: The template refuses it, or leaves it out.
        """
        from megatron_profit.evaluation.engines.transformers_engine import template_text

        if not self.system:
            return
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": "?"}]
        if self.system.strip() not in template_text(self.template, messages):
            raise EvaluationError("the model's chat template leaves the system message out")

    def pieces(self) -> tuple[str, ...]:
        """Return the text of each token of the last answer."""
        from megatron_profit.token_report import token_texts

        return token_texts(self.tokenizer, self.ids)
