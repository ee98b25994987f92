"""From the files of the command line to the data sets that Megatron's data loaders read."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.datasets.utils import Split
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_profit.data import ChatRenderer, DataError, Examples, SFTDataset, build_examples
from megatron_profit.training.arguments import SFTArguments
from megatron_profit.training.console import print_rank_0


@dataclass(frozen=True)
class SFTData:
    """Tokenised examples of one run.

    Every rank holds the same examples and draws the same order from (seed, sample index), so nothing is
    broadcast and a resumed run continues with the sample at which it stopped.
    """

    train: Examples
    valid: Examples | None

    def provider(self, args: Namespace) -> Callable:
        """Megatron's `train_valid_test_datasets_provider`."""

        def provide(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple:
            # One batch more than is drawn: Megatron's sampler refuses a run that is started again
            # after its last step, although there is nothing left to do.
            num_train, num_valid = num_samples[0] + args.global_batch_size, num_samples[1]
            train = SFTDataset(
                self.train, args.seq_length, num_train, seed=args.seed, packing=args.packing
            )
            train.split = Split.train
            if self.valid is None:
                return train, None, None
            period = args.eval_iters * args.eval_global_batch_size
            valid = SFTDataset(
                self.valid,
                args.seq_length,
                num_valid + period,
                shuffle=False,
                period=period,
                packing=args.packing,
            )
            valid.split = Split.valid
            return train, valid, None

        provide.is_distributed = True
        return provide


def prepare_data(arguments: SFTArguments) -> SFTData:
    """Render and tokenise the files of the run, and report what was left out.

    Raises:
        DataError: For data that cannot be read, or of which nothing can be trained.
    """
    renderer = ChatRenderer(_tokenizer(arguments))
    sets = {}
    for name, files in (("train", arguments.data), ("valid", arguments.valid_data)):
        if files:
            sets[name], report = build_examples(
                files, renderer, arguments.seq_length, progress=print_rank_0
            )
            print_rank_0(f"> {name} data: {report}")
    return SFTData(sets["train"], sets.get("valid"))


def _tokenizer(arguments: SFTArguments) -> PreTrainedTokenizerBase:
    folder, vocab_size = arguments.hf_model, arguments.defaults["vocab_size"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise DataError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    if len(tokenizer) > vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model has only {vocab_size} "
            "(vocab_size in config.json); use the tokenizer that belongs to the model"
        )
    return tokenizer
