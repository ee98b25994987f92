"""Chat records -> token ids and the mask of what the model must produce -> a data set of rows.

```python
renderer = ChatRenderer(AutoTokenizer.from_pretrained(path))
examples, report = build_examples(["train.jsonl"], renderer, seq_length=4096, progress=print)
dataset = SFTDataset(examples, 4096, num_samples=train_iters * global_batch_size, seed=1234)
```
"""

from megatron_profit.data.chat import Conversation, UnknownFormat, normalise
from megatron_profit.data.dataset import (
    IGNORED_LABEL,
    Examples,
    PreparationReport,
    SFTDataset,
    build_examples,
)
from megatron_profit.data.errors import BrokenRecord, DataError
from megatron_profit.data.order import Group
from megatron_profit.data.records import RawRecord, read_records
from megatron_profit.data.render import ChatRenderer, RenderedConversation, TurnMarkers

__all__ = [
    "IGNORED_LABEL",
    "BrokenRecord",
    "ChatRenderer",
    "Conversation",
    "DataError",
    "Examples",
    "Group",
    "PreparationReport",
    "RawRecord",
    "RenderedConversation",
    "SFTDataset",
    "TurnMarkers",
    "UnknownFormat",
    "build_examples",
    "normalise",
    "read_records",
]
