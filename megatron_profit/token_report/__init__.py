"""The probabilities that a model gives to chosen records, token by token.

They are shown as a page for the browser or as lines for a terminal.

```python
records = score_records(model, tokenizer, conversations, {"profit": build_objective("profit", ...)})
Path("report.html").write_text(page(records, title="base model"))
```
"""

from megatron_profit.token_report.page import page
from megatron_profit.token_report.scores import (
    TokenRecord,
    evaluate_objectives,
    score_records,
    token_texts,
)
from megatron_profit.token_report.slider import slider_start
from megatron_profit.token_report.terminal import probabilities_text, terminal_text

__all__ = [
    "TokenRecord",
    "evaluate_objectives",
    "page",
    "probabilities_text",
    "score_records",
    "slider_start",
    "terminal_text",
    "token_texts",
]
