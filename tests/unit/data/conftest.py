"""A small tokenizer and small chat templates, so that the tests need no file from elsewhere."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_profit.data import ChatRenderer, RawRecord, normalise

SHARED = Path(__file__).resolve().parents[4] / "shared"

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "</s>",
]

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The same, marking for transformers itself what the assistant says.
CHATML_GENERATION = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Opens a think block in the last answer and the generation prompt; forgets earlier thoughts.
THINKING = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

# Tool calls end with another token than answers do.
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.tool_calls %}{{- (message.tool_calls | tojson) + '<|eom_id|>' }}
{%- else %}{{- message.content | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Headers and a header's last space in plain text; only the end is a token.
PLAIN = """\
{%- for message in messages %}
{%- if message.role == 'user' %}{{- 'USER: ' + message.content + '\\n' }}
{%- else %}{{- 'ASSISTANT: ' + message.content + '</s>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT: ' }}{%- endif %}"""

TEMPLATES = SimpleNamespace(
    chatml=CHATML,
    chatml_generation=CHATML_GENERATION,
    thinking=THINKING,
    llama3=LLAMA3,
    plain=PLAIN,
)

LINES = [
    "What is the answer to the question of the user?",
    "The answer is forty-two, and that is all that there is to say about it.",
    "<think>\nLet me think about the weather in Paris.\n</think>\n\nIt is sunny.\n\n",
    '{"name": "weather", "arguments": {"city": "Paris"}}',
    "USER: hello there ASSISTANT: hello to you",
    "system user assistant tool\n",
]


@pytest.fixture(scope="session")
def templates():
    return TEMPLATES


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(template, trim_offsets=False, **options of PreTrainedTokenizerFast)."""

    def make(template, *, trim_offsets=False, **options):
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(LINES, trainer)
        bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
        names = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe, chat_template=template, **(names | options)
        )

    return make


@pytest.fixture(scope="session")
def small_tokenizer(make_tokenizer):
    return make_tokenizer(CHATML)


@pytest.fixture(scope="session")
def renderer(small_tokenizer):
    return ChatRenderer(small_tokenizer)


@pytest.fixture(scope="session")
def conversation():
    """conversation(*pairs of role and content or whole messages, tools=None), normalised."""

    def make(*turns, tools=None):
        messages = [
            turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]}
            for turn in turns
        ]
        return normalise(RawRecord({"messages": messages, "tools": tools}, "test", 1, "line"))

    return make


@pytest.fixture(scope="session")
def supervised_texts():
    """supervised_texts(tokenizer, rendered): the text of each run of supervised tokens."""

    def decode(tokenizer, rendered):
        runs, previous = [], False
        for token, supervised in zip(
            rendered.ids.tolist(), rendered.supervised.tolist(), strict=True
        ):
            if supervised:
                runs = runs if previous else [*runs, []]
                runs[-1].append(token)
            previous = supervised
        return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]

    return decode


@pytest.fixture
def write_lines(tmp_path):
    """write_lines(records, name="data.jsonl"): a file of JSON lines."""

    def write(records, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("needs the real data and tokenizer in ../shared")
    return SHARED


@pytest.fixture(scope="session")
def qwen3(shared):
    return AutoTokenizer.from_pretrained(shared / "qwen3-tokenizer", local_files_only=True)
