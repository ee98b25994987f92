"""What is trained begins where the generation prompt ends, and answers that begin otherwise are counted."""

import pytest

from megatron_profit.data import ChatRenderer, SupervisionPolicy
from megatron_profit.data.render import renderer as render

QUESTION, ANSWER = ("user", "What is the answer?"), ("assistant", "It is forty-two.")
THOUGHT = {"role": "assistant", "content": "Sunny.", "reasoning_content": "Let me think."}

# Thoughts of no turn are written: those of DeepSeek-R1 and QwQ.
FORGETTING = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

# The last "/no_think" or "/think" of a question decides, as in Nemotron's.
SWITCHED = """\
{%- set ns = namespace(think=true) %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- set ns.think = '/no_think' not in message.content %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{{- '<think>\\n' + (message.reasoning_content or '') + '</think>' if ns.think else '<think></think>' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' + ('<think>\\n' if ns.think else '<think></think>') }}
{%- endif %}"""


@pytest.fixture
def trained(conversation, supervised_texts):
    """trained(tokenizer, *turns, **training): the trained texts, and (found, of) of the two findings."""

    def render_them(tokenizer, *turns, **training):
        talk = conversation(*turns)
        rendered = ChatRenderer(tokenizer, SupervisionPolicy(**training)).render(talk)
        names = (render.NOT_AS_PROMPTED, render.NEVER_AS_PROMPTED)
        found = [(rendered.findings[name].count, rendered.findings[name].of) for name in names]
        for position in talk.positions:
            prompt = tokenizer.apply_chat_template(
                talk.messages[:position], add_generation_prompt=True, return_dict=False
            )
            ids = rendered.ids.tolist()
            if ids[: len(prompt)] == prompt:
                assert not rendered.supervised[len(prompt) - 1]
        return supervised_texts(tokenizer, rendered), *found

    return render_them


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_an_opened_think_block_is_not_trained_again(
    make_tokenizer, templates, trained, trim_offsets
):
    tokenizer = make_tokenizer(templates.thinking, trim_offsets=trim_offsets)
    assert ChatRenderer(tokenizer).markers.prompt == "<|im_start|>assistant\n<think>\n"
    texts, not_as, never = trained(tokenizer, QUESTION, ANSWER, QUESTION, THOUGHT)
    assert texts == [
        "It is forty-two.<|im_end|>",
        "Let me think.\n</think>\n\nSunny.<|im_end|>",
    ]
    assert (not_as, never) == ((1, 2), (0, 1))
    texts, not_as, never = trained(tokenizer, QUESTION, THOUGHT, turns="last")
    assert (not_as, never) == ((0, 1), (0, 1))


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_an_answer_without_reasoning_never_shows_the_context_of_inference(
    make_tokenizer, templates, trained, trim_offsets
):
    """The prompt ends in a newline, of which the empty block has two in one token."""
    tokenizer = make_tokenizer(templates.thinking, trim_offsets=trim_offsets)
    tokenizer.add_tokens(["<think>", "</think>"])
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    texts, not_as, never = trained(tokenizer, QUESTION, ANSWER)
    assert texts == ["</think>\n\nIt is forty-two.<|im_end|>"]
    assert (not_as, never) == ((1, 1), (1, 1))


def test_a_template_that_writes_no_thoughts_at_all(make_tokenizer, trained):
    texts, not_as, never = trained(make_tokenizer(FORGETTING), QUESTION, ANSWER, QUESTION, THOUGHT)
    assert texts == ["It is forty-two.<|im_end|>", "Sunny.<|im_end|>"]
    assert (not_as, never) == ((2, 2), (1, 1))


@pytest.mark.parametrize(
    ("turns", "remedy"),
    [((QUESTION, ANSWER), "give the answers reasoning_content"), ((QUESTION, THOUGHT), "each")],
)
def test_the_remedy_is_one_that_helps(make_tokenizer, conversation, turns, remedy):
    rendered = ChatRenderer(make_tokenizer(FORGETTING)).render(conversation(*turns))
    assert remedy in rendered.findings[render.NEVER_AS_PROMPTED].detail


def test_a_prompt_that_depends_on_the_question(make_tokenizer, trained):
    tokenizer = make_tokenizer(SWITCHED)
    turns = [("user", "/no_think Why?"), ANSWER, QUESTION, THOUGHT]
    texts, not_as, never = trained(tokenizer, *turns)
    assert texts == ["It is forty-two.<|im_end|>", "Let me think.</think>Sunny.<|im_end|>"]
    assert (not_as, never) == ((0, 2), (0, 1))
    texts, *_ = trained(tokenizer, *turns, think=False)
    assert texts == ["It is forty-two.<|im_end|>", "Sunny.<|im_end|>"]


def test_a_prompt_that_ends_with_the_header_is_no_finding(make_tokenizer, templates, trained):
    for template in (templates.chatml, templates.llama3):
        texts, not_as, never = trained(make_tokenizer(template), QUESTION, ANSWER)
        assert len(texts) == 1
        assert (not_as, never) == ((0, 1), (0, 1))


def test_a_token_over_the_end_of_the_prompt_is_told(make_tokenizer, templates, conversation):
    tokenizer = make_tokenizer(
        templates.plain
    )  # "ASSISTANT: " + "Yes": the space belongs to the word
    rendered = ChatRenderer(tokenizer).render(conversation(QUESTION, ("assistant", "the answer")))
    finding = rendered.findings[render.NEVER_AS_PROMPTED]
    assert finding.count == 1
    assert "'ASSISTANT: '; a token of the answer begins in the prompt" in finding.detail


def test_a_conversation_of_many_turns_takes_its_last_known_prompt(
    make_tokenizer, trained, monkeypatch
):
    monkeypatch.setattr(render, "_PROMPTS", 2)
    turns = [("user", "/no_think"), ANSWER] * 4
    texts, not_as, _ = trained(make_tokenizer(SWITCHED), *turns)
    assert texts == ["It is forty-two.<|im_end|>"] * 4
    assert not_as == (0, 4)


def test_an_answer_before_any_question_takes_the_usual_prompt(
    make_tokenizer, templates, conversation, supervised_texts
):
    """Its template fails where there is no message."""
    tokenizer = make_tokenizer("{{- messages[0].content[:0] }}" + templates.chatml)
    rendered = ChatRenderer(tokenizer).render(conversation(ANSWER, QUESTION, ANSWER))
    assert supervised_texts(tokenizer, rendered) == ["It is forty-two.<|im_end|>"] * 2
    assert rendered.findings[render.NOT_AS_PROMPTED].count == 0


@pytest.mark.parametrize(
    ("turns", "training", "found"),
    [
        ((QUESTION, ANSWER, ANSWER, QUESTION, ANSWER), {}, 1),
        ((QUESTION, ANSWER, ANSWER, ANSWER), {}, 2),
        ((QUESTION, ANSWER, ANSWER), {"turns": "last"}, 0),
        ((ANSWER, QUESTION, ANSWER), {}, 0),
    ],
)
def test_answers_that_end_before_another_answer_are_counted(
    make_tokenizer, templates, conversation, turns, training, found
):
    renderer = ChatRenderer(make_tokenizer(templates.chatml), SupervisionPolicy(**training))
    finding = renderer.render(conversation(*turns)).findings[render.ENDS_BEFORE_ANSWER]
    assert finding.count == found


def test_a_lone_question_may_end_in_the_end_of_the_text(make_tokenizer, trained, templates):
    with_eos = "{%- else %}{{- eos_token }}{%- endif %}"
    tokenizer = make_tokenizer(templates.chatml.replace("{%- endif %}", with_eos))
    tokenizer.eos_token = "</s>"
    texts, *_ = trained(tokenizer, QUESTION, ANSWER, QUESTION, ANSWER)
    assert texts == ["It is forty-two.<|im_end|>"] * 2
