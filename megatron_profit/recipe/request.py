"""What a command line of `megatron-profit sft` asks for: this command's flags, and the training's."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import printable
from megatron_profit.flags import ArgumentsError, flag_of, nearest
from megatron_profit.recipe.config_file import WITHOUT, find_config, read_config
from megatron_profit.recipe.errors import LaunchError, LaunchParser
from megatron_profit.recipe.flags import FlagTable, Given
from megatron_profit.training.arguments.refused import refuse_ignored

# Chat templates that --chat-template takes by name.
BUILT_IN_TEMPLATES = ("chatml", "llama3")
_NODES = re.compile(r"\d+(:\d+)?")
_ENDPOINT = re.compile(r"([\w.-]+|\[[\da-fA-F:.%]+\])(:\d{1,5})?")
_GPUS_OF_NODE = 8
_EXAMPLE = "megatron-profit sft --model Qwen/Qwen3-0.6B-Base --data chats.jsonl"


def front_parser() -> argparse.ArgumentParser:
    """Return the parser of this command's own flags; the training's flags are not among them."""
    parser = LaunchParser(prog="megatron-profit sft", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("model, data and objective")
    group.add_argument(
        "--model",
        metavar="ID",
        help="HuggingFace folder, or an id of the hub, such as Qwen/Qwen3-14B-Base or, of one revision, "
        "Qwen/Qwen3-14B-Base@v1.",
    )
    group.add_argument(
        "--config",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="YAML files with all of it, or names of recipes, such as qwen3-14b and profit; a later one "
        "overrides an earlier one, and flags override both.",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help=f"Chat template for a model that has none: a file, or {' or '.join(BUILT_IN_TEMPLATES)}. The "
        "export has it too.",
    )
    group.add_argument(
        "--run",
        metavar="DIR",
        help="Folder of the run; by default runs/MODEL-OBJECTIVE-DATA. The same command resumes it.",
    )
    group = parser.add_argument_group("where")
    group.add_argument(
        "--layout",
        choices=("auto", "given"),
        default="auto",
        help="auto: the layout follows from the GPUs and from estimates of memory and time; flags of "
        "a layout stay as given. given: the flags alone decide.",
    )
    group.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs to use over all nodes, or to plan for (--dry-run).",
    )
    group.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="Memory of a GPU to plan for (default: asked).",
    )
    group.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="Processes of each node; by default one for each GPU, and one without a GPU.",
    )
    group.add_argument(
        "--nnodes",
        default="1",
        metavar="N",
        help="Nodes; the same command starts on each (default 1).",
    )
    group.add_argument(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="The node whose name sorts first, where rank 0 is, and a free port: there the nodes meet.",
    )
    group.add_argument(
        "--rdzv-id", metavar="NAME", help="Name of the run among the nodes (default: its folder)."
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="How often all processes start again from the newest checkpoint after one was lost (default 0).",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Print the command and its layout, and start no training. Only the caches of the data and of "
        "the hub are written, without weights.",
    )
    group.add_argument(
        "--verbose",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Show what Megatron prints (default: RUN/megatron.log).",
    )
    group.add_argument(
        "--rank-logs",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Write what each process prints to RUN/logs as well; its lines get the process's name.",
    )
    group.add_argument(
        WITHOUT,
        action="append",
        default=[],
        metavar="FLAG",
        help="A flag that is not to be derived, written --without=--export-hf. May be given again.",
    )
    return parser


@dataclass(frozen=True)
class Request:
    """A command line, read.

    Attributes:
        model: The model as it was named.
        given: The training's flags that were given, by argument.
        front: This command's flags, by argument.
        table: All flags of the training.
    """

    model: str
    given: Mapping[str, Given]
    front: argparse.Namespace
    table: FlagTable

    def value(self, name: str) -> Any:
        """Return the value of an argument of the training; the parser's default where it was not given."""
        return self.given[name].value if name in self.given else self.table.defaults.get(name)

    @property
    def values(self) -> dict[str, Any]:
        """The values of the training's flags that were given, by argument."""
        return {name: flag.value for name, flag in self.given.items()}

    @property
    def nodes(self) -> int:
        """Nodes of the run: the fewest that it starts with."""
        return int(self.front.nnodes.partition(":")[0])

    @property
    def most_nodes(self) -> int:
        """Nodes of the run if all come. For example, 4 of `--nnodes 1:4`."""
        return int(self.front.nnodes.rpartition(":")[2])


def read_request(argv: Sequence[str]) -> Request:
    """Read a command line, and the file that --config names.

    Raises:
        LaunchError: A flag is unknown, missing, has a value that it cannot have or contradicts another.
    """
    parser, table = front_parser(), FlagTable()
    options = frozenset(parser._option_string_actions)
    files = parser.parse_known_args(list(argv))[0].config or ()
    sources = [read_config(find_config(file), table, options) for file in files]
    front, rest = argparse.Namespace(), list[str]()
    for words in (*sources, list(argv)):
        earlier = list(getattr(front, "without", ()))
        _, flags = parser.parse_known_args(words, front)
        table.refuse_second_lists(flags)
        left_out = front.without[len(earlier) :]
        named = set(map(_option_of, flags))
        rest = [*table.kept_of_earlier(rest, flags, left_out), *flags]
        front.without = [option for option in earlier if option not in named] + left_out
    given = table.parse(rest, options)
    missing = [f"--{name}" for name in ("model",) if getattr(front, name) is None]
    missing += ["--data"] * ("data" not in given)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise LaunchError(f"{' and '.join(missing)} {verb} missing; for example: {_EXAMPLE}")
    request = Request(front.model, given, front, table)
    _check(request)
    _spread_over_nodes(front)
    return request


def _option_of(word: str) -> str:
    return word.partition("=")[0]


def _spread_over_nodes(front: argparse.Namespace) -> None:
    """Take more GPUs than a node has, which only a dry run can plan for, as several nodes.

    The printed command then has words in the place of the node and the port that nobody knows yet.
    """
    if not front.dry_run or front.nnodes != "1" or (front.gpus or 0) <= _GPUS_OF_NODE:
        return
    nodes, rest = divmod(front.gpus, _GPUS_OF_NODE)
    if rest:
        raise LaunchError(
            f"--gpus {front.gpus} are no whole nodes of {_GPUS_OF_NODE}; give a multiple, or --nnodes"
        )
    front.nnodes, front.rdzv_endpoint = str(nodes), front.rdzv_endpoint or "HOST:PORT"


def _check(request: Request) -> None:
    front, given = request.front, request.given
    for option, value in (("--model", front.model), ("--run", front.run)):
        if value == "":
            raise LaunchError(f"{option} is empty; name a folder, or check the shell's variable")
    if "hf_model" in given:
        raise LaunchError("--model and --hf-model name the same thing; drop --hf-model")
    _check_machines(request)
    if front.chat_template is not None:
        _check_template(front.chat_template)
    for option in front.without:
        if option not in request.table.options:
            raise LaunchError(f"{WITHOUT}={option} names no flag; write it with its dashes")
        if request.table.dest(option) in given:
            raise LaunchError(f"{option} is given, and {WITHOUT}={option} leaves it out; drop one")
    try:
        refuse_ignored(request.table.command_line(given))
    except ArgumentsError as error:
        raise LaunchError(str(error)) from error
    _check_numbers(request)


def _check_machines(request: Request) -> None:
    """Refuse numbers of GPUs, processes and nodes that no run can have, or that contradict each other."""
    front = request.front
    limits = {"gpus": 1, "nproc_per_node": 1, "gpu_memory": 1, "max_restarts": 0}
    for name, least in limits.items():
        value = getattr(front, name)
        if value is not None and not value >= least:
            raise LaunchError(f"{flag_of(name)} is {value:g}; it must be at least {least}")
    fewest, _, most = front.nnodes.partition(":")
    if not _NODES.fullmatch(front.nnodes) or not 1 <= int(fewest) <= int(most or fewest):
        raise LaunchError(f"--nnodes is {front.nnodes!r}; it must be a number such as 2, or 1:4")
    if front.rdzv_endpoint is not None and not _ENDPOINT.fullmatch(front.rdzv_endpoint):
        raise LaunchError(
            f"--rdzv-endpoint is {front.rdzv_endpoint!r}; write HOST:PORT, for example node0:29400"
        )
    if request.most_nodes > 1 and front.rdzv_endpoint is None:
        raise LaunchError(
            f"--nnodes {front.nnodes} needs the place where the nodes meet; give --rdzv-endpoint HOST:PORT "
            "with the name of one of them and a free port, for example node0:29400"
        )
    if "overwrite" in request.given:
        _check_overwrite(request)
    if front.gpus is not None and front.gpus % request.nodes:
        raise LaunchError(
            f"--gpus {front.gpus} are not the same number on each of {request.nodes} nodes; give a multiple"
        )
    if None not in (front.gpus, front.nproc_per_node) and (
        front.gpus != front.nproc_per_node * request.nodes
    ):
        raise LaunchError(
            f"--gpus {front.gpus} and --nproc-per-node {front.nproc_per_node} on {request.nodes} node"
            f"{'s' * (request.nodes > 1)} contradict each other; drop one"
        )


def _check_overwrite(request: Request) -> None:
    """Refuse `--overwrite` where the training cannot tell a first start from a restart."""
    front = request.front
    if request.most_nodes > 1 and front.rdzv_id is None:
        raise LaunchError(
            "--overwrite on several nodes needs a name of this job that no earlier one had, the same on all "
            "nodes, so that a restart does not remove what the job itself has written; give --rdzv-id NAME"
        )
    if front.max_restarts:
        raise LaunchError(
            f"--overwrite would act again at each of --max-restarts {front.max_restarts}, and is refused "
            "there; drop one of them"
        )


def _check_template(template: str) -> None:
    """Refuse a template that is neither a file nor a name."""
    if template not in BUILT_IN_TEMPLATES and not Path(template).expanduser().is_file():
        raise LaunchError(
            f"--chat-template {printable(template)}: there is no such file, and the built-in templates are "
            f"{', '.join(BUILT_IN_TEMPLATES)}{nearest(template, BUILT_IN_TEMPLATES)}"
        )


def _check_numbers(request: Request) -> None:
    """Refuse values that no run can have. The training checks all others."""
    positive = (
        *("lr", "epochs", "train_iters", "train_samples", "seq_length", "micro_batch_size"),
        *("global_batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
        *("context_parallel_size", "expert_model_parallel_size", "save_interval"),
    )
    for name in positive:
        value = request.given[name].value if name in request.given else 1
        if not value > 0:
            option = request.given[name].option
            raise LaunchError(f"{option} is {request.given[name].texts[0]}; it must be above 0")
    spans = [n for n in ("epochs", "train_iters", "train_samples") if n in request.given]
    if len(spans) > 1:
        options = " and ".join(request.given[name].option for name in spans)
        raise LaunchError(f"{options} contradict each other; give one of them")
    if "bf16" in request.given and "fp16" in request.given:
        raise LaunchError("--bf16 and --fp16 contradict each other; drop one")
