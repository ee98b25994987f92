"""The tokens of `python -m megatron_profit.logits`, before Megatron starts."""

from __future__ import annotations

import pytest
import torch

from megatron_profit.commands.logits import read_tokens


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.tensor([1, 2]), r"torch.int64 of shape \[2\]"),
        (torch.ones(1, 2), "torch.float32 of shape"),
        (torch.tensor([[1, -1]]), "an id below 0"),
        (torch.zeros(0, 4, dtype=torch.int64), r"of shape \[0, 4\]"),
        ([1, 2], "holds list"),
    ],
)
def test_tokens_of_another_form_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "tokens.pt")
    with pytest.raises(ValueError, match=rf"--tokens .*{message}.*int64 tensor \[N, S\]"):
        read_tokens(str(tmp_path / "tokens.pt"))


def test_a_file_without_tokens_is_named(tmp_path):
    (tmp_path / "text.pt").write_text("no tensors")
    for name in ("missing.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_tokens(str(tmp_path / name))
    torch.save(torch.tensor([[3, 4]]), tmp_path / "tokens.pt")
    assert read_tokens(str(tmp_path / "tokens.pt")).tolist() == [[3, 4]]
