"""Statistics of a frozen reference model, for example its log-probabilities, computed once and kept on disk.

A file holds one float32 for each token of the data, in the order of the examples. So a token is found by its
record and its position, whatever the packing, the order or the layout. The name of the file's folder is a
hash of its inputs: the file serves later runs of the same model and data, and no others. Every start compares
its checksum; a damaged file is computed again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import shutil
import uuid
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from torch import Tensor

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.folder import CONFIG
from checkpoint_conversion.hf.model import HFModel
from megatron_profit.data import DataError, Examples, SFTDataset
from megatron_profit.data.store.cache import content_digest
from megatron_profit.data.store.checksums import CheckedFiles, is_usable
from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.models.lora.transform import adapters_off, base_parameters
from megatron_profit.training.checkpoints.hf_weights import load
from megatron_profit.training.process.console import fail, print_rank_0
from megatron_profit.training.process.ranks import (
    from_first_rank,
    from_first_rank_in_time,
    is_seen_in_time,
)
from megatron_profit.training.statistics.adapter_off import AdapterOffReference
from megatron_profit.training.statistics.external_statistics import RunParts, StatisticProvider
from megatron_profit.training.statistics.lookahead_pass import (
    RowRange,
    data_group,
    micro_batch_multiple,
    score_rows,
)
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import ObjectiveLoss

# Micro-batches of each rank between two writes to the file.
_MICRO_BATCHES = 64
_VERSION = "2"


class ReferenceModel(StatisticProvider):
    """Gives `ref_log_prob`, the statistic `log_prob` of the kernel under the reference.

    Args:
        model: HuggingFace folder with the weights of the reference, of the architecture that is trained.
        folder: The folder of the files.
        loss: The loss of the run.
        datasets: Rows of the data by name, "train" and "valid".
    """

    statistic = "ref_log_prob"
    computed: ClassVar[str] = "log_prob"
    flags: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("ref_hf_model", "ref_cache", "ref_mode"), "objectives with a reference model"
    )

    def __init__(
        self, model: HFModel, folder: Path, loss: ObjectiveLoss, datasets: Mapping[str, SFTDataset]
    ) -> None:
        self._model, self._folder, self._loss = model, folder, loss
        self._datasets = datasets
        self._values: dict[str, np.ndarray] = {}

    @property
    def _in_words(self) -> str:
        return (
            "log-probabilities" if self.computed == "log_prob" else self.computed.replace("_", " ")
        )

    @property
    def _file(self) -> str:
        """Name of the file of the values."""
        return f"{self.statistic}.float32"

    @classmethod
    def from_run(cls, run: RunParts) -> StatisticProvider:
        """Return the reference model of a run; where none was opened, it is the frozen base of adapters."""
        if run.reference is None:
            return AdapterOffReference(run.loss, run.lookahead_pass, cls.computed)
        return cls(*run.reference, run.loss, run.datasets)

    def before_train_step(self, context: TrainContext, iteration: int) -> None:
        self._prepare(context)

    def before_evaluation(self, context: TrainContext) -> None:
        self._prepare(context)

    def of(self, batch: Batch, data: str) -> Tensor | None:
        """Return [B, S] of a micro-batch; None on pipeline stages that compute no loss."""
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return None
        wanted = batch.labels != -100
        places = _places(batch, self._datasets[data].examples)[wanted].cpu().numpy()
        values = self._values[data][places]
        result = torch.zeros(wanted.shape, device=wanted.device)
        result[wanted] = torch.from_numpy(values).to(wanted.device)
        return result

    def _prepare(self, context: TrainContext) -> None:
        """Find the values, or compute them. A collective of all ranks, at the first call."""
        if self._values:
            return
        folders = from_first_rank_in_time(self._folders)
        _wait_for(self._folder)  # before hours of work that one machine alone could read
        # What --valid-split sets aside are examples of the training data: one file holds both.
        makers = {folder: name for name, folder in reversed(folders.items())}
        missing = self._missing(makers)
        if missing:
            from_first_rank(lambda: self._check_space([makers[folder] for folder in missing]))
            with _weights_of(self._model, context):
                for folder in missing:
                    self._compute(context, makers[folder], folder)
        for name, folder in folders.items():
            _wait_for(folder / self._file)
            self._values[name] = np.memmap(folder / self._file, dtype=np.float32, mode="r")

    def _folders(self) -> dict[str, Path]:
        """Return the folder of each data set's values, whether they exist or not."""
        args = get_args()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            identity = _identity(self._model, self._folder)
        except (OSError, DataError) as error:
            fail(f"the reference's log-probabilities need {self._folder}: {error}; see --ref-cache")
        about = [_VERSION, *identity, str(args.params_dtype), str(args.vocab_size)]
        formats = ((args.fp8, args.fp8_recipe), (args.fp4, args.fp4_recipe))
        about += [f"{kind} {recipe}" for kind, recipe in formats if kind]
        if self.computed != "log_prob":
            about.append(self.computed)
        return {
            name: self._folder / _digest(about, dataset.examples)
            for name, dataset in self._datasets.items()
        }

    def _missing(self, folders: Collection[Path]) -> list[Path]:
        """Return the folders without values, or whose values any machine finds damaged. A collective."""
        try:
            usable = [folder for folder in folders if is_usable(folder, [self._file], print_rank_0)]
        except OSError as error:
            fail(f"the reference's log-probabilities cannot be read: {error}")
        everywhere = _common(usable)
        return [folder for folder in folders if folder not in everywhere]

    def _check_space(self, names: Collection[str]) -> None:
        needed = sum(4 * int(self._datasets[name].examples.offsets[-1]) for name in names)
        if (free := shutil.disk_usage(self._folder).free) < needed:
            fail(
                f"the reference's log-probabilities take {needed:,} bytes, and {self._folder} has {free:,} "
                "left; make room or give another folder with --ref-cache"
            )

    def _compute(self, context: TrainContext, name: str, folder: Path) -> None:
        """Write the values of a data set, whole or not at all; the first rank of the last stage does."""
        dataset, args = self._datasets[name], get_args()
        examples = dataset.examples
        stride = args.micro_batch_size * mpu.get_data_parallel_world_size()
        rows = _all_rows(dataset, args)
        unit = stride * micro_batch_multiple(context)
        group = data_group()
        last_stage = mpu.is_pipeline_last_stage(ignore_virtual=True)
        writes = last_stage and mpu.get_tensor_model_parallel_rank() == 0 and group.rank() == 0
        values = np.full(int(examples.offsets[-1]), np.nan, dtype=np.float32) if writes else None
        needed = rows.order.rows_until(1)
        for start, end in _parts(needed, unit, stride * _MICRO_BATCHES):
            print_rank_0(f"> reference {self._in_words}: {name} row {start:,} of {needed:,}")
            part = RowRange(rows, start, end, args.micro_batch_size)
            wanted = frozenset({self.computed})
            table = score_rows(context, part, wanted, self._loss, lambda b: _places(b, examples))
            if table is None:
                continue
            table = table.gathered(group)
            if values is not None:
                values[table.keys.cpu().numpy()] = table.statistics[self.computed].cpu().numpy()
        if values is not None:
            _write(folder, self._file, values)
        dist.barrier()


class ReferenceLowerMass(ReferenceModel):
    """Gives `ref_lower_mass`, the statistic `lower_mass` of the kernel under the reference."""

    statistic = "ref_lower_mass"
    computed = "lower_mass"


def _parts(rows: int, unit: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the end of each pass over rows 0 to `rows` - 1; empty rows fill the last one.

    Args:
        rows: Number of rows.
        unit: Each pass takes a multiple of so many rows.
        length: Rows of a pass, unless one unit is longer.
    """
    step, stop = max(length // unit, 1) * unit, math.ceil(rows / unit) * unit
    for start in range(0, stop, step):
        yield start, min(start + step, stop)


def _places(batch: Batch, examples: Examples) -> Tensor:
    """Return [B, S] int64, the place of each token's target among the ids of the examples."""
    offsets = examples.offsets[batch.example_index.clamp(min=0).cpu().numpy()]
    return torch.from_numpy(offsets).to(batch.labels.device) + batch.position_ids + 1


def _all_rows(dataset: SFTDataset, args: Namespace) -> SFTDataset:
    """Return rows that hold each example once, followed by empty rows without end."""
    endless = 2**62
    return SFTDataset(
        dataset.examples,
        dataset.seq_length,
        endless,
        shuffle=False,
        packing=args.packing,
        period=endless,
    )


@contextlib.contextmanager
def _weights_of(model: HFModel, context: TrainContext) -> Iterator[None]:
    """The weights of another model in the place of the model's own, which come back unchanged."""
    chunks = unwrap_model(context.model)
    parameters = [p for chunk in chunks for _, p in base_parameters(chunk)]
    own = [parameter.detach().cpu().clone() for parameter in parameters]
    try:
        load(model, chunks)
        with adapters_off(chunks):
            yield
    except ConversionError as error:
        fail(error)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, own, strict=True):
                parameter.copy_(value)


def _identity(model: HFModel, notes: Path) -> list[str]:
    """Return the hashes of a model's files, which identify it.

    Args:
        model: The model.
        notes: Folder for notes on files that were read, so that files which seem unchanged are read once.
    """
    files = [model.folder / CONFIG, *sorted({tensor.file for tensor in model.tensors.values()})]
    print_rank_0(f"> looking which weights the reference {model.folder} has")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda file: content_digest(file, notes), files)
        return [f"{file.name} {digest}" for file, digest in zip(files, digests, strict=True)]


def _digest(about: list[str], examples: Examples) -> str:
    digest = hashlib.sha256("\n".join(about).encode())
    for part in (examples.ids, examples.supervised, examples.offsets):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:24]


def _wait_for(place: Path) -> None:
    """Wait until this machine sees a file or folder that another one has made."""
    if not is_seen_in_time(place.exists):
        fail(
            f"a machine does not see {place}, which another one has made; --ref-cache must be on a file "
            "system that all machines share"
        )


def _common(found: list[Path]) -> set[Path]:
    """Return the folders that all ranks have found."""
    everywhere: list[list[Path]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return set(found).intersection(*everywhere)


def _write(folder: Path, file: str, values: np.ndarray) -> None:
    unfinished = folder.with_suffix(f".unfinished-{uuid.uuid4().hex[:8]}")
    try:
        with CheckedFiles(unfinished) as files:
            files.append(file, values)
            files.finish()
        unfinished.rename(folder)
    except OSError as error:
        # Another run has written the same; a network file system may not show it yet.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
