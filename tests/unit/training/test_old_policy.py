"""What an outer batch of PSFT cannot be formed with is refused."""

from __future__ import annotations

import pytest

from megatron_profit.training.old_policy import check_old_policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"psft_steps_per_refresh": 1}, "exactly SFT; give 2 or more"),
        ({"psft_steps_per_refresh": 0}, "is 0; it must be at least 2"),
        ({"rampup_batch_size": [2, 2, 8]}, "--rampup-batch-size changes the global batch"),
        ({"decrease_batch_size_if_needed": True}, "--decrease-batch-size-if-needed changes"),
        ({"non_persistent_save_interval": 5}, "use --save-interval"),
        ({"ckpt_format": "torch"}, "use torch_dist"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_old_policy({"psft_steps_per_refresh": 8, **settings})


def test_plain_flags_are_accepted():
    check_old_policy({"psft_steps_per_refresh": 2, "ckpt_format": "torch_dist"})
