"""Chat records -> token ids and the mask of the tokens that the model must produce -> a data set of rows.

```python
renderer = ChatRenderer(load_tokenizer(path))
examples, report = build_examples(["train.jsonl"], renderer, seq_length=4096)
dataset = SFTDataset(examples, 4096, num_samples=train_iters * global_batch_size, seed=1234)
```
"""

from megatron_profit.data.chat.conversations import Conversation, normalise
from megatron_profit.data.errors import BrokenRecord, DataError
from megatron_profit.data.files.records import RawRecord, read_records
from megatron_profit.data.files.sources import ColumnMapping, DataSource, read_sources
from megatron_profit.data.flags import add_data_flags
from megatron_profit.data.options import BuiltSet, DataOptions, build_sets
from megatron_profit.data.render.renderer import (
    ChatRenderer,
    RenderedConversation,
    SupervisionPolicy,
)
from megatron_profit.data.render.template import load_tokenizer
from megatron_profit.data.render.turn_markers import TurnMarkers
from megatron_profit.data.report import DataReport
from megatron_profit.data.sequences.dataset import IGNORED_LABEL, SFTDataset
from megatron_profit.data.sequences.order import Group
from megatron_profit.data.sequences.report import PackingReport
from megatron_profit.data.store.examples import Examples, TokenizedData
from megatron_profit.data.store.prepare import Preparation, build_examples

__all__ = [
    "IGNORED_LABEL",
    "BrokenRecord",
    "BuiltSet",
    "ChatRenderer",
    "ColumnMapping",
    "Conversation",
    "DataError",
    "DataOptions",
    "DataReport",
    "DataSource",
    "Examples",
    "Group",
    "PackingReport",
    "Preparation",
    "RawRecord",
    "RenderedConversation",
    "SFTDataset",
    "SupervisionPolicy",
    "TokenizedData",
    "TurnMarkers",
    "add_data_flags",
    "build_examples",
    "build_sets",
    "load_tokenizer",
    "normalise",
    "read_records",
    "read_sources",
]
