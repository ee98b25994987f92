"""A tokenizer and its chat template: conversations to text, text to tokens."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_profit.data.chat.messages import Message
from megatron_profit.data.errors import DataError, escape_logs, shown
from megatron_profit.data.render.template_date import check_day, with_day
from megatron_profit.data.render.tokenizer_files import check_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_vocabulary(folder: Path, tokens: int, entries: int) -> None:
    """Refuse a tokenizer with more tokens than the model has entries in its embedding.

    Raises:
        DataError: Names both numbers.
    """
    if tokens > entries:
        raise DataError(
            f"{folder}: the tokenizer has {tokens} tokens, but the model has only {entries} (vocab_size in "
            "config.json); use the tokenizer that belongs to the model"
        )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a HuggingFace folder as its tokenizer.json describes it.

    `AutoTokenizer` would choose a class by config.json and tokenizer_config.json. Some classes split text in
    their own way, whatever the file says: for example `GPT2Tokenizer` (SmolLM2), or `Qwen2Tokenizer` (the
    language model of Qwen3.5 alone). Code in the folder is not run.

    Raises:
        DataError: The folder does not exist, lacks tokenizer.json, or the tokenizer cannot be loaded.
    """
    from transformers import PreTrainedTokenizerFast

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one with a tokenizer and a chat template")
    check_tokenizer_files(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        # Without it transformers may make an empty tokenizer, or one with other ids than the model's.
        found = sorted(path.name for path in folder.iterdir())
        raise DataError(
            f"{folder}: has no tokenizer.json, so that text has no tokens (it holds "
            f"{shown(found) if found else 'no file'}); copy the file from the model's repository, or "
            "make it from the model's other tokenizer files with save_pretrained of its fast tokenizer"
        )
    escape_logs("transformers")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        tokenizer("text", verbose=False)  # some settings are first looked at here
    except Exception as error:  # the tokenizers library raises bare Exceptions
        size = f"tokenizer.json has {file.stat().st_size:,} bytes"
        raise DataError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {error}; {size}); copy its "
            "files from the model's repository again"
        ) from error
    return tokenizer


class ChatTemplate:
    """The chat template of a tokenizer, on a fixed day where it writes one.

    Attributes:
        tokenizer: The tokenizer.
        day: The day that the template writes; None where it asks for none.
        name: Its name in messages.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", day: date | None = None) -> None:
        """Check that the tokenizer can be used.

        Args:
            tokenizer: A fast tokenizer (one that knows character offsets) with a chat template.
            day: The day that a template writes which asks for today's; None for other templates.

        Raises:
            DataError: The tokenizer is not fast, has no template, or its template writes a date and `day` is
                None, or the other way round.
        """
        path = getattr(tokenizer, "name_or_path", "")
        self.name = f"the tokenizer {path or f'({type(tokenizer).__name__})'}"
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{self.name} is a slow tokenizer without character offsets; load it with "
                "AutoTokenizer from a directory that has a tokenizer.json"
            )
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{self.name} has no chat template; use an instruct model's tokenizer, "
                "or add chat_template.jinja to the tokenizer's directory"
            )
        check_day(tokenizer, day, self.name)
        self.tokenizer, self.day = tokenizer, day

    def text(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """Return the messages as the template writes them, with `prompt` up to where generation begins.

        Raises:
            Exception: Any, since a template is a program.
        """
        return self.texts([list(messages)], tools, prompt=prompt)[0]

    def texts(
        self,
        conversations: list[list[Message]],
        tools: list[dict[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> list[str]:
        """Return `text` of several conversations with the same tools, in less time than one by one."""
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
        if self.day is not None:
            template = self.tokenizer.get_chat_template(tools=tools)
            options["chat_template"] = with_day(template, self.day)
        texts: Any = self.tokenizer.apply_chat_template(conversations, tokenize=False, **options)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"the chat template gave {type(texts).__name__}, not text")
        return texts

    def encode(self, texts: list[str]) -> list[Any]:
        """Return the `tokenizers.Encoding` of each text, without tokens that the text does not hold."""
        if not texts:
            return []
        found = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return list(found.encodings)

    def added(self, *texts: str | None) -> list[str]:
        """Return the texts among these that are one token wherever they stand."""
        added = self.tokenizer.get_added_vocab()
        return [text for text in texts if text and text in added]
