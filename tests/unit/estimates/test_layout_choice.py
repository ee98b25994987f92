"""The layout for each published model and number of GPUs: a table, checked by the training's own parser."""

from __future__ import annotations

import functools
import json

import pytest
from list_megatron_flags import LIST, native_flags

from checkpoint_conversion.families import family_for
from megatron_profit.commands.run_shape import read_run
from megatron_profit.estimates.layouts import USABLE, Cluster, NoLayoutError, Wish, choose
from megatron_profit.estimates.memory import GIB, estimate
from megatron_profit.estimates.published import PUBLISHED, published_config

GPUS = (1, 2, 4, 8, 16, 32, 64)
MEMORY = 79.6  # of a GPU of "80 GB", as torch gives it
# Model -> for each number of GPUs tensor x pipeline x expert, replicas, rows of a step; r: recomputed.
TABLE = {
    "Qwen3-0.6B": "1x1x1,1,4 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 4x1x1,16,16",
    "Qwen3-1.7B": "1x1x1,1,4 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 4x1x1,16,16",
    "Qwen3-4B": "- 2x1x1,1,4 2x1x1,2,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 4x1x1,16,16",
    "Qwen3-8B": "- - 4x1x1,1,4 2x1x1,4,4 2x1x1,8,8 2x1x1,16,16 4x1x1,16,16",
    "Qwen3-14B": "- - 4x1x1,1,4r 4x1x1,2,4 4x1x1,4,4 4x1x1,8,8 4x1x1,16,16",
    "Qwen3-32B": "- - - - 8x1x1,2,4 8x1x1,4,4 8x1x1,8,8",
    "Qwen3-30B-A3B": "- - - 4x2x4,1,4r 1x1x8,16,16r 2x1x32,16,16 4x1x32,16,16",
    "Qwen3-235B-A22B": "- - - - - - 4x8x8,2,4r",
    "Qwen3.5-0.8B": "1x1x1,1,4 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 2x2x1,16,16",
    "Qwen3.5-2B": "1x1x1,1,4 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 2x2x1,16,16",
    "Qwen3.5-4B": "- 2x1x1,1,4 2x1x1,2,4 2x1x1,4,4 2x1x1,8,8 2x1x1,16,16 4x1x1,16,16",
    "Qwen3.5-9B": "- - 4x1x1,1,4 2x1x1,4,4 2x1x1,8,8 2x1x1,16,16 4x1x1,16,16",
    "Qwen3.5-27B": "- - - 4x2x1,1,4r 4x1x1,4,4r 4x1x1,8,8r 4x1x1,16,16r",
    "Qwen3.5-35B-A3B": "- - - - 1x1x8,16,16r 2x1x32,16,16 2x2x8,16,16",
    "Qwen3.5-122B-A10B": "- - - - - - 2x4x8,8,8",
    "Qwen3.5-397B-A17B": "- - - - - - -",  # 2x4x32 on 128 GPUs
    "Qwen2.5-0.5B": "1x1x1,1,4 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 2x2x1,16,16",
    "Qwen2.5-1.5B": "1x1x1,1,4 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 2x2x1,16,16",
    "Qwen2.5-3B": "1x1x1,1,4r 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 2x2x1,16,16",
    "Qwen2.5-7B": "- - 2x1x1,2,4 2x1x1,4,4 2x1x1,8,8 2x1x1,16,16 4x1x1,16,16",
    "Qwen2.5-14B": "- - 4x1x1,1,4r 4x1x1,2,4 4x1x1,4,4 4x1x1,8,8 4x1x1,16,16",
    "Qwen2.5-32B": "- - - - 8x1x1,2,4 8x1x1,4,4 8x1x1,8,8",
    "Qwen2.5-72B": "- - - - - 8x4x1,1,4 8x2x1,4,4",
    "Llama-3.2-1B": "1x1x1,1,4 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 4x1x1,16,16",
    "Llama-3.2-3B": "1x1x1,1,4r 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 1x1x1,16,16 2x1x1,16,16 4x1x1,16,16",
    "Llama-3.1-8B": "- - 2x1x1,2,4 2x1x1,4,4 2x1x1,8,8 2x1x1,16,16 4x1x1,16,16",
    "Llama-3.1-70B": "- - - - - 8x4x1,1,4 8x1x1,8,8r",
    "OLMo-2-0425-1B": "1x1x1,1,4 1x1x1,2,4 1x1x1,4,4 1x1x1,8,8 8x1x1,2,4 2x1x1,16,16 4x1x1,16,16",
    "OLMo-2-1124-7B": "- 2x1x1,1,4r 2x1x1,2,4 2x1x1,4,4 8x1x1,2,4 8x2x1,2,4 4x1x1,16,16",
    "OLMo-2-1124-13B": "- - 4x1x1,1,4r 4x1x1,2,4 8x1x1,2,4 8x2x1,2,4 4x1x1,16,16",
    "OLMo-2-0325-32B": "- - - - 8x1x1,2,4 8x2x1,2,4 8x1x1,8,8",
}


def row_of(model: str) -> int:
    """Positions of a row: 8,192, or all that the model has."""
    return min(8192, published_config(model)["max_position_embeddings"])


@functools.cache
def chosen(model: str, gpus: int, seq_length: int | None = None):
    config = published_config(model)
    length = seq_length or row_of(model)
    wish = Wish(family_for(config).megatron_arguments(config), length, rows=4)
    return choose(wish, Cluster(gpus, MEMORY, min(gpus, 8)))


def shown(model: str, gpus: int) -> str:
    try:
        choice = chosen(model, gpus)
    except NoLayoutError:
        return "-"
    layout = choice.layout
    sizes = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
    recomputed = "r" if layout.recompute_granularity else ""
    return (
        f"{sizes[0]}x{sizes[1]}x{layout.expert_model_parallel_size},{choice.run.dp},"
        f"{layout.global_batch_size}{recomputed}"
    )


@pytest.mark.parametrize("model", PUBLISHED)
def test_each_published_model_has_the_layout_of_the_table(model):
    assert " ".join(shown(model, gpus) for gpus in GPUS) == TABLE[model]


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_smallest_and_the_largest_layout_pass_the_trainings_parser_with_their_estimates(model):
    fitting = [gpus for gpus in GPUS if shown(model, gpus) != "-"]
    for gpus in {*fitting[:1], *fitting[-1:]}:
        choice = chosen(model, gpus)
        flags = ["--seq-length", str(row_of(model)), "--bf16"]
        for name, value in choice.layout.flags().items():
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        run = read_run(flags, gpus, model)  # refuses what Megatron's rules forbid
        largest = max(memory.total for memory in estimate(run))
        assert largest == choice.bytes <= USABLE * MEMORY * GIB


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_layout_divides_model_batch_and_gpus(model):
    sizes = published_config(model)
    for gpus in GPUS:
        if shown(model, gpus) == "-":
            with pytest.raises(NoLayoutError, match=r"such GPUs are enough|use larger GPUs"):
                chosen(model, gpus)
            continue
        layout = chosen(model, gpus).layout
        tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        split = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        for name in (*split, "linear_num_value_heads"):
            assert sizes.get(name, 0) % tp == 0
        ends = 2 * layout.account_for_loss_in_pipeline_split
        assert (sizes["num_hidden_layers"] + ends) % pp == 0
        replicas, rest = divmod(gpus, layout.model_parallel)
        assert rest == 0
        assert layout.global_batch_size % (layout.micro_batch_size * replicas) == 0
        assert sizes.get("num_experts", 1) % layout.expert_model_parallel_size == 0
        assert (gpus // pp) % layout.expert_model_parallel_size == 0
        assert tp <= 8, "tensor parallelism stays in a node"


def test_rows_of_131072_positions_are_split_over_context_parallel_ranks():
    assert chosen("Llama-3.1-8B", 16, 131072).layout.context_parallel_size > 1
    assert chosen("Llama-3.1-8B", 16, 8192).layout.context_parallel_size == 1


def test_given_flags_are_kept_and_named_where_they_leave_no_layout():
    config = published_config("Qwen3-8B")
    model = family_for(config).megatron_arguments(config)
    decided = {"tensor_model_parallel_size": 4, "recompute_granularity": "full"}
    layout = choose(Wish(model, 4096, 8, decided=decided), Cluster(8, MEMORY)).layout
    assert (layout.tensor_model_parallel_size, layout.recompute_method) == (4, "uniform")
    decided = {"tensor_model_parallel_size": 3}
    with pytest.raises(NoLayoutError, match="with --tensor-model-parallel-size 3; give another"):
        choose(Wish(model, 4096, 8, decided=decided), Cluster(8, MEMORY))


def test_a_step_that_was_asked_for_stays_as_it_is():
    config = published_config("Qwen3-0.6B")
    model = family_for(config).megatron_arguments(config)
    layout = choose(Wish(model, 4096, 4, exact_rows=True), Cluster(16, MEMORY)).layout
    assert layout.global_batch_size == 4
    assert layout.model_parallel >= 4


def test_the_line_says_what_why_and_by_how_much():
    line = chosen("Qwen3-14B", 8).describe(Cluster(8, MEMORY))
    assert line.startswith(
        "tensor 4, sequence parallel, no recomputation, micro-batch 1, 2 replicas"
    )
    assert "GiB stay free" in line
    assert "layouts that fit" in line


def test_a_model_that_does_not_fit_names_the_gpus_that_are_enough():
    with pytest.raises(NoLayoutError, match="16 such GPUs are enough"):
        chosen("Qwen3-32B", 8)


def test_adapters_need_fewer_gpus_than_all_weights():
    config = published_config("Qwen3-8B")
    model = family_for(config).megatron_arguments(config)
    one = Cluster(1, MEMORY)
    with pytest.raises(NoLayoutError):
        choose(Wish(model, 8192, 4), one)
    choice = choose(Wish(model, 8192, 4, decided={"lora_rank": 16}), one)
    adapters = 36 * 16 * (2 * (2 * 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    (memory,) = estimate(choice.run)
    assert memory.parameters - adapters == pytest.approx(8.19e9, rel=1e-2)
    assert (memory.gradients, memory.optimizer) == (4 * adapters, 12 * adapters)


def test_the_list_of_native_flags_is_the_installed_megatrons():
    """`python tools/list_megatron_flags.py` writes it again."""
    assert json.loads(LIST.read_text(encoding="utf-8")) == native_flags()


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_a_model_with_fewer_layers_than_pipeline_ranks_has_a_layout(gpus):
    """Embedding and output layer may fill a pipeline rank without a layer."""
    config = {**published_config("Qwen3-0.6B"), "num_hidden_layers": 2}
    wish = Wish(family_for(config).megatron_arguments(config), 8192, rows=4)
    assert choose(wish, Cluster(gpus, MEMORY, min(gpus, 8))).bytes > 0
