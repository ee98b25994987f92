"""Run under torchrun on two processes: collectives whose sizes differ between the ranks."""

from __future__ import annotations

from megatron_profit.megatron_patches import activate

activate("cpu")

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
mine = torch.arange(6.0).view(3, 2) if rank == 0 else torch.full((1, 2), 9.0)

gathered = [torch.empty(3, 2), torch.empty(1, 2)]
dist.all_gather(gathered, mine)
assert torch.equal(gathered[0], torch.arange(6.0).view(3, 2)), gathered
assert (gathered[1] == 9.0).all(), gathered

scattered = torch.empty_like(mine)
dist.reduce_scatter(scattered, [torch.full((3, 2), rank + 1.0), torch.full((1, 2), rank + 5.0)])
assert (scattered == (3.0 if rank == 0 else 11.0)).all(), scattered

exchanged = torch.empty(3 if rank == 0 else 1, 2)
sizes = torch.tensor([2, 1]) if rank == 0 else torch.tensor([1, 0])
received = torch.tensor([2, 1]) if rank == 0 else torch.tensor([1, 0])
dist.all_to_all_single(exchanged, mine, received, sizes)
expected = [[0.0, 1.0], [2.0, 3.0], [9.0, 9.0]] if rank == 0 else [[4.0, 5.0]]
assert exchanged.tolist() == expected, exchanged
dist.destroy_process_group()
