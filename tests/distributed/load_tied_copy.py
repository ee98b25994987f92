"""Run under torchrun: says how often a rank reads rows to compare two copies of tied embeddings.

torchrun … load_tied_copy.py FOLDER
"""

from __future__ import annotations

import sys

from megatron_profit.megatron_patches import activate

activate("cpu")

import torch

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.folder import HFTensor
from checkpoint_conversion.hf.model import open_hf_model
from megatron_profit.training.checkpoints.hf_weights import load


def main() -> None:
    torch.distributed.init_process_group("gloo")
    read, reads = HFTensor.rows, []

    def counted(tensor: HFTensor, start: int, *more: object) -> object:
        reads.append(start)
        return read(tensor, start, *more)

    HFTensor.rows = counted
    outcome = "loaded"
    try:
        load(open_hf_model(sys.argv[1]), [])
    except ConversionError as error:
        outcome = str(error)
    print(f"rank {torch.distributed.get_rank()}: {len(reads)} reads: {outcome}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
