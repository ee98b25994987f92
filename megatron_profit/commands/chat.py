"""Talk with a model in the terminal.

    megatron-profit chat runs/profit/hf
    megatron-profit chat Qwen3-0.6B --system "Answer in one sentence." --temperature 0.7 --top-p 0.8

A line is a message, and the answer appears as it grows; Ctrl-C cuts it off. Lines that begin with a slash:

    /probs          how likely the model found each token of its last answer, in colour
    /system TEXT    set the system message (without TEXT: remove it) and begin again
    /reset          begin again
    /help, /quit    (Ctrl-D quits too)
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from datetime import date
from typing import TYPE_CHECKING

from checkpoint_conversion.cli import FlagHelp, wants_color
from megatron_profit.evaluation.command_line import (
    add_sampling_flags,
    check_day_is_written,
    sampling_of,
    template_day,
)
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import PRESETS, Sampling
from megatron_profit.recipe.errors import LaunchError

if TYPE_CHECKING:
    from megatron_profit.evaluation.conversation import Conversation

_LONGEST = 1024
_COMMANDS = __doc__.split("slash:\n\n")[1]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=FlagHelp, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="HuggingFace folder, an adapter's folder, or an id of the hub.",
    )
    add("--system", default="", metavar="TEXT", help="System message.")
    add("--preset", choices=PRESETS, help="Sampling settings of a paper.")
    add_sampling_flags(parser)
    parser.set_defaults(samples=1)
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="Of the weights.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Talk until the input ends; return 1 for input that cannot be used."""
    arguments = build_parser().parse_args(argv)
    # The hub's room imports the readers of data, which --help does not need.
    from megatron_profit.launch.hub import local_folder

    try:
        sampling = sampling_of(arguments, "chat")
        day = template_day(arguments)
        folder = local_folder(arguments.model)
        talk = open_conversation(folder, arguments.dtype, arguments.system, day)
        talk.check_system()
    except (EvaluationError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if interactive:
        import readline  # noqa: F401 - arrow keys and history for input()

        print(f"{arguments.model}: {sampling}\n{_COMMANDS}")
    longest = sampling.max_new_tokens or _LONGEST
    color = wants_color()
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line == "/quit":
            return 0
        if line.startswith("/"):
            print(carry_out(talk, line, color=color))
        elif line:
            say(talk, line, sampling, longest, write)


def open_conversation(model: str, dtype: str, system: str, day: date | None = None) -> Conversation:
    """Load a model for a conversation.

    Args:
        model: The model's folder.
        dtype: Of the weights.
        system: The system message; empty for none.
        day: Day that the chat template writes if it asks for today's; None for today.

    Raises:
        EvaluationError: The folder cannot be used.
    """
    from megatron_profit.evaluation.conversation import Conversation
    from megatron_profit.evaluation.engines.engine import EngineOptions, resolved
    from megatron_profit.evaluation.engines.model_folder import check_model
    from megatron_profit.evaluation.engines.transformers_engine import TransformersEngine

    written = check_model(model, day or date.today())
    check_day_is_written(day, [written])
    options = EngineOptions(name="transformers", dtype=dtype, day=written)
    engine = TransformersEngine(model, resolved(options))
    return Conversation(engine.model, engine.template, engine.stop_ids, system)


def write(text: str) -> None:
    """Print a piece of an answer at once, without control characters that would steer the terminal."""
    from checkpoint_conversion.errors import escaped

    print(escaped(text, keep="\n\t"), end="", flush=True)


def say(
    talk: Conversation, line: str, sampling: Sampling, longest: int, show: Callable[[str], None]
) -> None:
    """Send a message and show the answer as it grows; Ctrl-C cuts it off."""
    answer = talk.answer(line, sampling, longest)
    try:
        for piece in answer:
            show(piece)
        if talk.ids[-1] not in talk.stop_ids:
            limit = "--max-new-tokens sets the limit"
            if len(talk.ids) < longest:
                limit = "the model's context is full; /reset begins again"
            show(f" [cut off at {len(talk.ids):,} tokens; {limit}]")
    except KeyboardInterrupt:
        answer.close()
        show(" [cut off]")
    except EvaluationError as error:
        del talk.messages[-2:]
        show(f"error: {error}")
    show("\n")


def carry_out(talk: Conversation, line: str, *, color: bool) -> str:
    """Carry out a line that begins with a slash; return the reply."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        talk.reset()
        return "the conversation begins again"
    if name == "/system":
        before, talk.system = talk.system, rest.strip()
        try:
            talk.check_system()
        except EvaluationError as error:
            talk.system = before
            return f"error: {error}"
        talk.reset()
        return "the conversation begins again" + (", without a system message" if not rest else "")
    if name == "/probs":
        if not talk.ids:
            return "there is no answer yet"
        from megatron_profit.token_report import probabilities_text

        return probabilities_text(talk.pieces(), talk.probs, color=color)
    if name == "/help":
        return _COMMANDS.rstrip()
    return f"there is no command {name}\n{_COMMANDS.rstrip()}"


if __name__ == "__main__":
    sys.exit(main())
