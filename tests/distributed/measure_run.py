"""A training run that writes what its ranks really hold and send, to compare with the estimates in tools/.

    torchrun --standalone --nproc-per-node 2 tests/distributed/measure_run.py FOLDER <training flags>

Each rank writes FOLDER/rank_<r>.json: bytes of parameters, gradient buffers and optimizer state, bytes
saved for the backward pass of each micro-batch, micro-batches under way at the most, and bytes sent in the
last step by each kind of parallelism, as a ring would send them.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# Bytes that a rank of n sends for a tensor of the given bytes, which is the larger of input and output.
_RING = {
    "all_reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all_gather_into_tensor": lambda size, n: size * (n - 1) / n,
    "reduce_scatter_tensor": lambda size, n: size * (n - 1) / n,
    "all_to_all_single": lambda size, n: size * (n - 1) / n,
}


# Where sends from rank to rank are counted: Megatron lets some of those between pipeline ranks go through
# the group of all ranks, for the sake of overlap.
_SENDS = 0


class Collectives:
    """Counts what is sent, by process group, and sends from rank to rank."""

    def __init__(self) -> None:
        self.sent: dict[int, float] = defaultdict(float)
        self._inside = False  # of a call, which may call itself again
        for name in _RING:
            self._replace(name, self._counting(name, getattr(dist, name)))
        self._replace("isend", self._counting_sends(dist.isend))

    @staticmethod
    def _replace(name, function) -> None:
        setattr(dist, name, function)
        setattr(distributed_c10d, name, function)

    def _counting(self, name, function):
        @functools.wraps(function)
        def call(*args, group=None, **kwargs):
            if self._inside:
                return function(*args, group=group, **kwargs)
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            size = max(t.nbytes for t in tensors)
            if name == "all_to_all_single":  # the input is what is sent
                size = (kwargs.get("input") if "input" in kwargs else args[1]).nbytes
            self.sent[id(group)] += _RING[name](size, dist.get_world_size(group))
            return self._call_inside(function, *args, group=group, **kwargs)

        return call

    def _call_inside(self, function, *args, **kwargs):
        before, self._inside = self._inside, True
        try:
            return function(*args, **kwargs)
        finally:
            self._inside = before

    def _counting_sends(self, function):
        @functools.wraps(function)
        def call(tensor, *args, **kwargs):
            if not self._inside:
                self.sent[_SENDS] += tensor.nbytes
            return self._call_inside(function, tensor, *args, **kwargs)

        return call


class Saved:
    """Bytes that forward passes save for backward passes, each storage once and without parameters."""

    def __init__(self) -> None:
        self.of_micro_batch: list[int] = []

    def watching(self, forward_step):
        @functools.wraps(forward_step)
        def step(data_iterator, model, *args, **kwargs):
            parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
            storages: dict[int, torch.UntypedStorage] = {}

            def pack(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    storages[storage.data_ptr()] = storage
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                result = forward_step(data_iterator, model, *args, **kwargs)
            # What is recomputed has no bytes left by now.
            self.of_micro_batch.append(sum(storage.nbytes() for storage in storages.values()))
            return result

        return step


class UnderWay:
    """Micro-batches (of a model chunk) whose backward pass is still to come."""

    def __init__(self, schedules) -> None:
        self.most = self._now = 0
        for name, change in (("forward_step", 1), ("backward_step", -1)):
            setattr(schedules, name, self._counting(getattr(schedules, name), change))

    def _counting(self, function, change):
        @functools.wraps(function)
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            self._now += change
            self.most = max(self.most, self._now)
            return result

        return call


def optimizer_state(optimizer) -> int:
    """Bytes of moments and main copies, Adam's step counters aside."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    total = 0
    for part in parts:
        inner = part.optimizer
        for state in inner.state.values():
            total += sum(t.nbytes for name, t in state.items() if name != "step")
        # In half precision the inner optimizer trains copies; in fp32 the parameters themselves.
        if part.config.bf16 or part.config.fp16:
            total += sum(p.nbytes for group in inner.param_groups for p in group["params"])
    return total


def main(out: Path) -> None:
    collectives = Collectives()
    from megatron_profit.sft import start

    flags = sys.argv[1:]
    device = start(flags)
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import training

    from megatron_profit.training import main as entry

    saved, under_way, kept = Saved(), UnderWay(schedules), {}
    make_forward_step, setup = entry.make_forward_step, training.setup_model_and_optimizer
    train_step = training.train_step

    def remembering(*args, **kwargs):
        result = setup(*args, **kwargs)
        kept["model"], kept["optimizer"] = result[:2]
        return result

    def one_step(*args, **kwargs):
        collectives.sent.clear()
        result = train_step(*args, **kwargs)
        kept["sent"] = dict(collectives.sent)
        return result

    def write() -> None:
        groups = {
            "tensor": mpu.get_tensor_model_parallel_group(),
            "pipeline": mpu.get_pipeline_model_parallel_group(),
            "context": mpu.get_context_parallel_group(),
            "data": mpu.get_data_parallel_group(with_context_parallel=True),
            "expert": mpu.get_expert_model_parallel_group(),
            "expert data": mpu.get_expert_data_parallel_group(),
            "embedding": mpu.get_embedding_group(check_initialized=False),
        }
        chunks = kept["model"]
        buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
        parameters = {id(p): p for c in chunks for p in c.parameters()}.values()
        numbers = {
            "parameters": sum(p.numel() for p in parameters),
            "weights": sum(p.nbytes for p in parameters),
            "gradients": sum(b.grad_data.nbytes for b in buffers),
            "optimizer": optimizer_state(kept["optimizer"]),
            "saved": saved.of_micro_batch,
            "under way": under_way.most,
            "sent": {name: kept["sent"].get(id(group), 0) for name, group in groups.items()},
            "sent from rank to rank": kept["sent"].get(_SENDS, 0),
            "sent in all": sum(kept["sent"].values()),
        }
        rank = dist.get_rank()
        (out / f"rank_{rank}.json").write_text(json.dumps(numbers))

    entry.make_forward_step = lambda begin: saved.watching(make_forward_step(begin))
    training.setup_model_and_optimizer, training.train_step = remembering, one_step
    pretrain = entry.pretrain

    def measured(*args, **kwargs):
        result = pretrain(*args, **kwargs)
        write()
        return result

    entry.pretrain = measured
    entry.main(flags, device)


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    main(folder)
