"""Changes to Megatron-Core that are needed on every device."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from megatron_profit.megatron_patches.checkpoint_loading import CHECKPOINT_PATCHES
from megatron_profit.megatron_patches.loggers import LOGGER_PATCHES
from megatron_profit.megatron_patches.loop import LOOP_PATCHES
from megatron_profit.megatron_patches.optimizer.block_norm import block_norm
from megatron_profit.megatron_patches.optimizer.chained_optimizer import regrouped
from megatron_profit.megatron_patches.optimizer.param_groups import adapt_groups
from megatron_profit.megatron_patches.patch import Patch
from megatron_profit.megatron_patches.saving import SAVING_PATCHES
from megatron_profit.parent_death import die_with_parent


def _skip_compilation_of_shipped_helpers() -> None:
    from megatron.core.datasets import utils

    original = utils.compile_helpers

    def compile_helpers() -> None:
        try:
            from megatron.core.datasets import helpers_cpp  # noqa: F401
        except ImportError:
            original()

    utils.compile_helpers = compile_helpers


def _keep_the_queue_of_results() -> None:
    import multiprocessing
    import queue
    import signal
    from multiprocessing import resource_tracker
    from multiprocessing.managers import SyncManager

    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import global_vars

    original = filesystem_async.get_write_results_queue

    def start_manager(mp_mode: str) -> SyncManager:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        # The process inherits the set of blocked signals here. torchrun sends a signal to all processes of a
        # rank, and the save that the rank makes then still needs this one.
        resource_tracker.ensure_running()  # which would unblock SIGINT and SIGTERM again
        ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        manager.start(initializer=die_with_parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return manager

    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if filesystem_async._results_queue is None:
            args = global_vars._GLOBAL_ARGS  # None in a program that uses Megatron-Core alone
            is_async = args is None or args.async_save
            results = start_manager(mp_mode).Queue() if is_async else queue.Queue()
            filesystem_async._results_queue = results
        return original(mp_mode)

    filesystem_async.get_write_results_queue = get_write_results_queue


def _load_into_plain_torch_adam() -> None:
    import torch
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    original_state_dict = optimizer_class.state_dict
    original_load = optimizer_class.load_state_dict
    original_set = optimizer_class._set_main_param_and_optimizer_states

    def is_plain(optimizer: Any) -> bool:
        return type(optimizer.optimizer) in (torch.optim.Adam, torch.optim.AdamW)

    @functools.wraps(original_state_dict)
    def state_dict(self: Any) -> Any:
        if is_plain(self) and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return original_state_dict(self)

    @functools.wraps(original_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original_load(self, state_dict)
        if is_plain(self):
            for state in self.optimizer.state.values():
                # Megatron gives all parameters one tensor, which each of them would count up.
                state["step"] = state["step"].clone()

    # In fp32 the optimizer's parameters are views of the model's, which need no_grad to be written.
    @torch.no_grad()
    @functools.wraps(original_set)
    def set_states(self: Any, model_param: Any, tensors: dict) -> None:
        if is_plain(self):
            # load_state_dict has set the step; the one here, if any, is from before the load.
            tensors = {**tensors, "step": None}
        original_set(self, model_param, tensors)

    optimizer_class.state_dict = state_dict
    optimizer_class.load_state_dict = load_state_dict
    optimizer_class._set_main_param_and_optimizer_states = set_states


def _load_with_other_hyperparameters() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    match = MegatronOptimizer._filter_and_reorder_param_groups
    load = DistributedOptimizer.load_state_dict

    def matched(current: list[dict], saved: list[dict]) -> list[dict]:
        adapt_groups(current, saved, keep_saved=_keeps_saved_schedule())
        return match(current, saved)

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        if not self.ddp_config.use_megatron_fsdp:
            current, saved = self.optimizer.param_groups, state_dict["optimizer"]["param_groups"]
            adapt_groups(current, saved, keep_saved=_keeps_saved_schedule())
        load(self, state_dict)

    MegatronOptimizer._filter_and_reorder_param_groups = staticmethod(matched)
    DistributedOptimizer.load_state_dict = load_state_dict


def _load_momenta() -> None:
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    original = MegatronOptimizer.__init__

    @functools.wraps(original)
    def init(self: Any, optimizer: Any, config: Any, init_state_fn: Any) -> None:
        original(self, optimizer, config, init_state_fn or _begin_momenta)

    MegatronOptimizer.__init__ = init


def _begin_momenta(optimizer: Any, config: Any = None) -> None:
    """Give each parameter of torch's SGD the momentum of a parameter that never had a gradient."""
    import torch

    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _keeps_saved_schedule() -> bool:
    from megatron.training.global_vars import get_args

    return bool(get_args().use_checkpoint_opt_param_scheduler)


def _save_zeros_as_padding() -> None:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_dp_reshardable

    @functools.wraps(original)
    def sharded_param_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        by_dtype = (state[number] for number in range(len(self.gbuf_ranges)))
        buckets = (bucket for part in by_dtype for buckets in part.values() for bucket in buckets)
        for tensors in (tensors for bucket in buckets for tensors in bucket):
            padding = tensors["padding"]
            if isinstance(padding, LocalNonpersistentObject) and padding.unwrap():
                for item in nested_values(tensors):
                    if isinstance(item, ShardedTensor):
                        item.data.zero_()
        return state

    DistributedOptimizer.sharded_param_state_dp_reshardable = sharded_param_state


def _load_with_another_number_of_optimizers() -> None:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    original = ChainedOptimizer.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        if isinstance(state_dict, dict):
            state_dict = regrouped(state_dict, len(self.chained_optimizers))
        original(self, state_dict)

    ChainedOptimizer.load_state_dict = load_state_dict


def _add_up_norms_in_blocks() -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads
    from megatron.training.utils import common_utils

    def l2_norm(
        chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool, *args: Any
    ) -> tuple[Any, None]:
        return block_norm([tensor for tensors in tensor_lists for tensor in tensors]), None

    original = utils.local_multi_tensor_l2_norm
    for module, name in (
        (utils, "local_multi_tensor_l2_norm"),
        (clip_grads, "l2_norm_impl"),
        (common_utils, "multi_tensor_l2norm"),
    ):
        # Elsewhere the two stand for a kernel of Transformer Engine or Apex.
        if getattr(module, name) is original:
            setattr(module, name, l2_norm)


def _save_no_checkpoint_twice() -> None:
    from megatron.training import checkpointing, training
    from megatron.training.global_vars import get_args

    original = training.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        run = get_args()
        was_loaded = checkpointing.get_loaded_iteration() == iteration and not run.finetune
        is_own = run.load and run.save and Path(run.load).resolve() == Path(run.save).resolve()
        if was_loaded and is_own and iteration >= run.train_iters:
            return None
        return original(iteration, *args, **kwargs)

    training.save_checkpoint = save_checkpoint


def _weigh_auxiliary_losses_alike_on_all_ranks() -> None:
    from megatron.core.transformer.moe import router

    original = router.get_tokens_per_expert_and_token_count

    @functools.wraps(original)
    def counts(
        routing_map: Any, reduce_group: Any, topk: Any = None, with_padding_mask: bool = False
    ) -> tuple:
        per_expert, local, total = original(routing_map, reduce_group, topk, with_padding_mask)
        return per_expert, total / reduce_group.size() if with_padding_mask else local, total

    router.get_tokens_per_expert_and_token_count = counts


def _count_operations_of_adapters() -> None:
    from megatron.training import training

    original = training.num_floating_point_operations

    @functools.wraps(original)
    def operations(
        args: Any,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        adapters = getattr(args, "lora_active_parameters", None)
        tokens = total_real_tokens_in_batch
        tokens = batch_size * args.seq_length if tokens is None else tokens
        total = original(args, batch_size, seqlen_squared_sum_in_batch, tokens)
        if adapters is None:
            return total
        # Without the attention between tokens: each weight in forward pass, input and weight gradient.
        weights = original(args, batch_size, 0, tokens)
        return total - weights / 3 + 6 * adapters * tokens

    training.num_floating_point_operations = operations


def _build_delta_nets_without_kernels() -> None:
    from megatron.core.ssm.gated_delta_net import common

    common.HAVE_FLA = True


MEGATRON_PATCHES = (
    Patch(
        name="shipped-dataset-helpers",
        functions=("megatron/core/datasets/utils.py:compile_helpers",),
        reason="initialize_megatron runs `make` in a folder that has no Makefile in the wheel, and "
        "exits; the compiled helpers_cpp is in the wheel, so nothing has to be compiled.",
        apply=_skip_compilation_of_shipped_helpers,
    ),
    Patch(
        name="distributed-optimizer-load",
        functions=(
            "megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer.state_dict",
            "megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer.load_state_dict",
            "megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer._set_main_param_and_optimizer_states",
        ),
        reason="Without Apex and Transformer Engine, the distributed optimizer cannot load a "
        "checkpoint: torch's Adam has no state yet; its step, a tensor of each parameter, is missed or "
        "overwritten by the one from before the load, and shared by all parameters; and fp32 "
        "parameters are written without no_grad.",
        apply=_load_into_plain_torch_adam,
    ),
    Patch(
        name="hyperparameters-of-the-flags",
        functions=(
            "megatron/core/optimizer/optimizer.py:MegatronOptimizer._filter_and_reorder_param_groups",
            "megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer.load_state_dict",
        ),
        reason="With another --lr or --min-lr no checkpoint can be loaded, because parameter groups are "
        "recognised by these numbers. What else a group holds (betas, epsilon) is taken from the checkpoint, "
        "so that its flags are ignored without a word.",
        apply=_load_with_other_hyperparameters,
    ),
    Patch(
        name="momentum-load",
        functions=(
            "megatron/core/optimizer/optimizer.py:MegatronOptimizer.__init__",
            "megatron/core/optimizer/__init__.py:_get_megatron_optimizer_based_on_param_groups",
        ),
        reason="SGD comes without the function that makes its state before a checkpoint is loaded into it, "
        "so that no run of --optimizer sgd can be resumed.",
        apply=_load_momenta,
    ),
    Patch(
        name="optimizer-padding",
        functions=(
            "megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer.sharded_param_state_dp_reshardable",
        ),
        reason="sharded_param_state_dp_reshardable fills the gaps between parameters with torch.empty: what "
        "was in memory goes into the checkpoint, and equal runs save different files.",
        apply=_save_zeros_as_padding,
    ),
    Patch(
        name="chained-optimizer-load",
        functions=("megatron/core/optimizer/optimizer.py:ChainedOptimizer.load_state_dict",),
        reason="A checkpoint of a run with expert parallelism, which has an optimizer of its own for the "
        "experts, is refused by a run without, and the other way round, although nothing is missing.",
        apply=_load_with_another_number_of_optimizers,
    ),
    Patch(
        name="norm-in-blocks",
        functions=("megatron/core/utils.py:local_multi_tensor_l2_norm",),
        reason="Without Apex and Transformer Engine, the norms of gradients and parameters are torch.norm in "
        "fp32, which on a CPU is too small for large tensors: by 0.2 % at 28 million elements, and less "
        "where a layout splits them, so that clipping depends on the layout.",
        apply=_add_up_norms_in_blocks,
    ),
    *SAVING_PATCHES,
    Patch(
        name="no-checkpoint-twice",
        functions=(
            "megatron/training/checkpointing.py:save_checkpoint",
            "megatron/training/checkpointing.py:get_loaded_iteration",
        ),
        reason="A finished run that is started again writes its last checkpoint again, over the one that it "
        "has just loaded; killed meanwhile, it would leave none.",
        apply=_save_no_checkpoint_twice,
    ),
    Patch(
        name="router-token-count",
        functions=(
            "megatron/core/transformer/moe/moe_utils.py:get_tokens_per_expert_and_token_count",
        ),
        reason="With a padding mask, a rank's own tokens are counted after an all-reduce that works in "
        "place, so that auxiliary losses weigh as many times more as the group has ranks. Its own would be "
        "wrong as well: each rank has a part of the loss, which has to be weighed with the tokens of all, "
        "and padding is not spread evenly over the ranks. So what is given is their mean.",
        apply=_weigh_auxiliary_losses_alike_on_all_ranks,
    ),
    Patch(
        name="operations-of-adapters",
        functions=("megatron/training/training.py:num_floating_point_operations",),
        reason="The count of floating-point operations has gradients of all weights, which frozen ones do "
        "not get, and no adapters.",
        apply=_count_operations_of_adapters,
    ),
    Patch(
        name="queue-of-results",
        functions=(
            "megatron/core/dist_checkpointing/strategies/filesystem_async.py:get_write_results_queue",
        ),
        reason="The first save starts a process for a queue, which takes 0.35 GB and some seconds, and which "
        "only --async-save needs. A rank that is killed leaves it behind for good. A signal that torchrun "
        "passes on ends it before the save that the signal has asked for.",
        apply=_keep_the_queue_of_results,
    ),
    Patch(
        name="gated-delta-net",
        functions=(
            "megatron/core/ssm/gated_delta_net/common.py:_GDNBase",
            "megatron/core/ssm/gated_delta_net/common.py:tensor_a2a_cp2hp",
            "megatron/core/ssm/gated_delta_net/common.py:tensor_a2a_hp2cp",
            "megatron/core/ssm/gated_delta_net/common.py:get_parameter_local_cp",
            "megatron/core/ssm/gated_delta_net/common.py:_build_head_perm_for_split_sections",
            "megatron/core/ssm/gated_delta_net/gdn.py:GatedDeltaNet",
        ),
        reason="Megatron refuses to build a Gated DeltaNet without flash-linear-attention, which needs a "
        "GPU. The layer of `models/gated_delta_net` takes its parameters and parts, and computes without "
        "those kernels where there are none.",
        apply=_build_delta_nets_without_kernels,
    ),
    *CHECKPOINT_PATCHES,
    *LOOP_PATCHES,
    *LOGGER_PATCHES,
)
