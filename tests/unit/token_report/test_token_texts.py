"""The texts of tokens joined are the text, whatever bytes a token holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_profit.token_report import token_texts

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
TURN = "<|turn|>"


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=[TURN])


def byte_level():
    """Every byte a token, and one that ends a character and begins the next, as in 汉汉."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends, begins = "ī", "æ"  # the letters of 0x89 and 0xe6: 汉 is e6 b1 89
    vocab = {letter: i for i, letter in enumerate([*letters, ends + begins])}
    tokenizer = Tokenizer(models.BPE(vocab, [(ends, begins)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


def byte_fallback():
    """SentencePiece's form: a word's space belongs to it, an unknown character is its bytes."""
    known = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abc", "▁a"]
    model = models.BPE(
        {token: i for i, token in enumerate(known)},
        [("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return wrapped(tokenizer)


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.lists(st.sampled_from([*"abc 汉字ŝ𠀀🎉👧\u200d", TURN]), min_size=1), st.integers(0, 3))
def test_joined_they_are_the_text(kind, parts, cut):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids)
    assert UNFINISHED not in "".join(texts)
    assert [text for text in texts if TURN in text] == [TURN] * parts.count(TURN)
    # A record that was cut keeps all that is whole.
    kept = token_texts(tokenizer, ids[: len(ids) - cut])
    assert "".join(texts).startswith("".join(kept).rstrip(UNFINISHED))


def test_a_character_stands_where_it_begins():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer("a汉汉b")["input_ids"]
    assert token_texts(tokenizer, ids) == ("a", "汉", "", "汉", "", "", "b")
    assert token_texts(tokenizer, ids[:5]) == ("a", "汉", "", UNFINISHED, "")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_ids(kind):
    assert token_texts(TOKENIZERS[kind], []) == ()


def test_the_replacement_character_itself_is_no_endless_group():
    class Counting:
        tokens = 0

        def batch_decode(self, rows, **options):
            self.tokens += sum(map(len, rows))
            return TOKENIZERS["byte level"].batch_decode(rows, **options)

    text = UNFINISHED * 2000 + "🎉" * 2000
    ids = TOKENIZERS["byte level"](text)["input_ids"]
    counting = Counting()
    assert "".join(token_texts(counting, ids)) == text
    assert counting.tokens < 10 * len(ids)


def test_qwen3(shared_folder):
    tokenizer = AutoTokenizer.from_pretrained(shared_folder / "qwen3-tokenizer")
    text = f"<|im_start|>cafe 👩‍👧 汉字 𠀀 🎉 ŝ a{UNFINISHED} b"
    texts = token_texts(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(texts) == text
    assert texts[:8] == ("<|im_start|>", "ca", "fe", " 👩", "", "\u200d", "", "👧")
    assert texts[8:12] == (" 汉", "", "", "字")
