"""The numbers of the report against transformers' own logits."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_profit.data import RenderedConversation
from megatron_profit.objectives import build_objective
from megatron_profit.token_report import score_records

VOCAB = 61


class Tokenizer:
    def batch_decode(self, ids, **_):
        return ["".join(f"<{i}>" for i in row) for row in ids]


def model(seed):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def conversations():
    random = np.random.default_rng(0)
    return [
        (
            f"r{i}",
            RenderedConversation(
                random.integers(0, VOCAB, n).astype(np.int32), random.random(n) < 0.6
            ),
        )
        for i, n in enumerate((7, 23, 2))
    ]


def test_statistics_are_those_of_the_logits(conversations):
    policy = model(0)
    scored = score_records(
        policy,
        Tokenizer(),
        conversations,
        {
            "profit": build_objective("profit", prob_threshold=0.02, threshold_direction="higher"),
            "entropy": build_objective("entropy"),
            "psft": build_objective("psft"),
        },
    )
    entropies = []
    for (name, rendered), record in zip(conversations, scored, strict=True):
        ids = torch.from_numpy(rendered.ids).long()
        log_probs = policy(ids[None]).logits[0, :-1].detach().double().log_softmax(-1)
        expected = log_probs.gather(1, ids[1:, None]).squeeze(1)
        torch.testing.assert_close(
            record.statistics.log_prob[1:].double(), expected, atol=1e-5, rtol=1e-5
        )
        assert record.statistics.log_prob[0].isnan()
        assert record.name == name
        assert record.pieces == tuple(f"<{i}>" for i in rendered.ids)
        supervised = record.supervised
        assert supervised.tolist() == [False, *rendered.supervised[1:]]
        kept = supervised[1:] & (expected.exp() >= 0.02)
        assert record.weights["profit"].tolist() == [0.0, *kept.float()]
        assert torch.equal(record.weights["psft"], supervised.float())  # its own older state
        entropies.append(-(log_probs.exp() * log_probs).sum(-1)[supervised[1:]])
    kept_entropies = torch.cat([r.weights["entropy"][r.supervised] for r in scored]).bool()
    joined = torch.cat(entropies)
    assert kept_entropies.sum() == np.ceil(0.2 * len(joined))
    assert joined[kept_entropies].min() > joined[~kept_entropies].max()


def test_a_statistic_that_a_report_cannot_know_is_named(conversations):
    class Own(type(build_objective("sft"))):
        required_statistics = frozenset({"margin", "entropy"})

    with pytest.raises(
        ValueError, match="own needs the statistic margin, which only a training run"
    ):
        score_records(None, None, conversations, {"own": Own()})


def test_a_missing_reference_is_named(conversations):
    class Excess(type(build_objective("sft"))):
        required_statistics = frozenset({"ref_log_prob"})

    with pytest.raises(ValueError, match="excess compares with a reference model"):
        score_records(model(0), Tokenizer(), conversations, {"excess": Excess()})
    scored = score_records(
        model(0), Tokenizer(), conversations, {"excess": Excess()}, ref_model=model(1)
    )
    assert scored[0].statistics.ref_log_prob is not None


def test_a_model_that_scales_its_logits_is_refused(conversations):
    scaled = model(0)
    scaled.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="scaled, capped or shifted"):
        score_records(scaled, Tokenizer(), conversations, {"sft": build_objective("sft")})
