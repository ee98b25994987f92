"""A part of a record that the chat template drops or cuts is found, whatever the template's own rules are."""

import pytest

from megatron_profit.data import BrokenRecord, ChatRenderer, SupervisionPolicy
from megatron_profit.data.render import left_out
from megatron_profit.data.render import renderer as render

QUESTION = ("user", "Weather in Oslo?")
CALL = {"name": "weather", "arguments": {"city": 'Oslo "S"', "days": 3}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"name": "weather", "parameters": {}}

# As Qwen3's template: the last answer with its thoughts, which it finds in the content as well, the others
# without.
CUTTING = """\
{%- for message in messages %}
{%- set content, reasoning = message.content, message.reasoning_content or '' %}
{%- if '</think>' in content and not message.reasoning_content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}
{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
{%- endif %}
{{- content }}
{%- for call in message.tool_calls or [] %}{{- '\\n' + call.function | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def cutting(make_tokenizer):
    return make_tokenizer(CUTTING)


@pytest.fixture
def found(conversation):
    """found(tokenizer, *turns, tools=None, **training): what is counted, with how often it could be."""

    def render_them(tokenizer, *turns, tools=None, **training):
        renderer = ChatRenderer(tokenizer, SupervisionPolicy(**training))
        rendered = renderer.render(conversation(*turns, tools=tools))
        return {name: (f.count, f.of) for name, f in rendered.findings.items() if f.count}

    return render_them


@pytest.mark.parametrize(
    "answer",
    [
        "<think>\nI explain the tag.\n</think>\n\nIt writes `</think>`, and the answer follows.",
        "Use `text.split('</think>')[1]` for it.",
        "Sure. <think>Hm.</think> It is warm.",
        "It is warm.\n<think>\nIs it?\n</think>\n",
    ],
)
def test_an_answer_that_the_template_cuts_is_left_out(cutting, conversation, answer):
    turns = [QUESTION, ("assistant", answer)]
    for talk in (conversation(*turns), conversation(*turns, QUESTION, ("assistant", "Warm."))):
        with pytest.raises(BrokenRecord) as error:
            ChatRenderer(cutting).render(talk)
        assert error.value.reason == left_out.ANSWER_LEFT_OUT


def test_reasoning_that_the_template_cuts_is_left_out(cutting, conversation):
    answer = "<think>The tag is <think>.</think>It is warm."
    with pytest.raises(BrokenRecord) as error:
        ChatRenderer(cutting).render(conversation(QUESTION, ("assistant", answer)))
    assert error.value.reason == left_out.ANSWER_LEFT_OUT


@pytest.mark.parametrize(
    "answer",
    [
        "It is warm.",
        "\n It is warm. \n",
        "<think>\nHm.\n</think>\n\nIt is warm.",
        "  <think>Hm.</think>It is warm.",
        "Hm, they ask.\n</think>\n\nIt is warm.",
        "<think>\n\n</think>\n\nIt is warm.",
        {"content": "Use `</think>` for it.", "reasoning_content": "Short."},
        {"content": "", "tool_calls": [CALL]},
        {"content": "<think>\nHm.\n</think>\n\n", "tool_calls": [CALL]},
        {"content": "I look.", "tool_calls": [CALL, CALL]},
    ],
)
def test_an_answer_that_is_written_whole_is_trained(cutting, found, answer):
    answer = {"content": answer} if isinstance(answer, str) else answer
    assert found(cutting, QUESTION, {"role": "assistant", **answer}) == {}


def test_a_template_that_cuts_nothing_trains_any_answer(small_tokenizer, found):
    for answer in ("a </think> b", "<think>a</think>b</think>c", "</think>a<think>"):
        assert found(small_tokenizer, QUESTION, ("assistant", answer)) == {}


def test_an_answer_that_is_context_may_be_cut_and_that_is_told(cutting, found):
    cut = {"role": "assistant", "content": "The tag </think> ends it.", "weight": 0}
    told = found(cutting, QUESTION, cut, QUESTION, ("assistant", "Warm."))
    assert told == {render.CONTEXT_LEFT_OUT: (1, 1)}


def test_reasoning_that_is_dropped_is_counted(cutting, found):
    thought = {"role": "assistant", "content": "Warm.", "reasoning_content": "Hm."}
    tagged = ("assistant", "<think>\nHm.\n</think>\n\nWarm.")
    turns = [QUESTION, thought, QUESTION, tagged, QUESTION, ("assistant", "No."), QUESTION, thought]
    assert found(cutting, *turns) == {render.REASONING_LEFT_OUT: (2, 3)}
    assert found(cutting, *turns, turns="last") == {}
    thanked = [QUESTION, tagged, ("user", "Thanks.")]
    assert found(cutting, *thanked) == {render.REASONING_LEFT_OUT: (1, 1)}


def test_each_turn_as_the_last_one_keeps_its_reasoning(cutting, conversation, supervised_texts):
    thought = {"role": "assistant", "content": "Warm.", "reasoning_content": "Hm."}
    excluded = {**thought, "content": "Cold.", "weight": 0}
    talk = conversation(QUESTION, thought, QUESTION, excluded, QUESTION, thought, ("user", "Bye."))
    renderer = ChatRenderer(cutting, SupervisionPolicy("each"))
    examples = renderer.training.examples(talk)
    assert [len(example.messages) for example in examples] == [2, 6]
    for example in examples:
        rendered = renderer.render(example)
        ids = cutting.apply_chat_template(example.messages, return_dict=False)
        assert rendered.ids.tolist() == ids
        texts = supervised_texts(cutting, rendered)
        assert texts == ["<think>\nHm.\n</think>\n\nWarm.<|im_end|>"]
        assert not any(finding.count for finding in rendered.findings.values())
    assert SupervisionPolicy("all").examples(talk) == [talk]


@pytest.mark.parametrize("turn", [CALLING, {**CALLING, "content": "I look."}])
def test_a_template_that_drops_calls_or_what_is_said_with_them(
    make_tokenizer, templates, conversation, turn
):
    dropping = "(message.tool_calls | tojson if message.tool_calls else message.content)"
    calls_only = templates.chatml.replace("message.content", dropping)
    for template in (templates.chatml, calls_only):
        renderer = ChatRenderer(make_tokenizer(template))
        talk = conversation(QUESTION, turn, ("tool", "3"), ("assistant", "Warm."))
        if template == calls_only and not turn["content"]:
            assert renderer.render(talk)
            continue
        with pytest.raises(BrokenRecord) as error:
            renderer.render(talk)
        assert error.value.reason == left_out.ANSWER_LEFT_OUT


@pytest.mark.parametrize(
    "written",
    [
        "call.function | tojson",
        "call.function.name + ': ' + call.function.arguments | string",
        "call.function.name + '(city=' + call.function.arguments.city + ', days=3)'",
    ],
)
def test_calls_may_be_written_in_any_form(make_tokenizer, found, written):
    template = CUTTING.replace("call.function | tojson", f"({written})")
    call = {"name": "weather", "arguments": {"city": 'Zürich "x"\n it\'s', "days": 3}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found(make_tokenizer(template), QUESTION, turn) == {}


def test_context_that_is_dropped_is_counted(make_tokenizer, templates, found):
    template = templates.chatml.replace(
        "in messages %}", "in messages if message.role != 'system' %}"
    )
    tokenizer, answer = make_tokenizer(template), ("assistant", "Warm.")
    told = {render.CONTEXT_LEFT_OUT: (1, 1)}
    assert found(tokenizer, ("system", "Be brief."), QUESTION, answer) == told
    assert found(tokenizer, QUESTION, answer, tools=[TOOL]) == told
    assert found(tokenizer, QUESTION, answer) == {}
    quoting = templates.chatml.replace("message.content", "(message.content | tojson)[1:-1]")
    assert found(make_tokenizer(quoting), ("user", 'Say "hé"\n'), answer) == {}


def test_a_tool_result_that_has_the_templates_tags_is_counted(make_tokenizer, found):
    template = CUTTING.replace(
        "{{- content }}",
        "{{- '<result>\\n' + content + '\\n</result>' if message.role == 'tool' else content }}",
    )
    tokenizer, told = make_tokenizer(template), {render.TAGGED_TWICE: (1, 1)}
    for result, expected in (
        ("<result>\n3\n</result>\n", told),
        ("<result>3</result>", told),
        ("<answer>3</answer>", {}),
        ("The tag <result> begins it.", {}),
        ("3", {}),
    ):
        turns = (QUESTION, CALLING, ("tool", result), ("assistant", "Warm."))
        assert found(tokenizer, *turns) == expected


def test_an_answer_that_shows_the_closing_tag_in_a_block_of_code_is_never_cut(
    make_tokenizer, cutting, conversation, supervised_texts, templates
):
    shown = "End with this line:\n```\n</think>\n```\nThen answer."
    talk = conversation(QUESTION, ("assistant", shown))
    with pytest.raises(BrokenRecord) as error:
        ChatRenderer(cutting).render(talk)
    assert error.value.reason == left_out.ANSWER_LEFT_OUT
    plain = make_tokenizer(templates.chatml)
    rendered = ChatRenderer(plain).render(talk)
    assert supervised_texts(plain, rendered) == [shown + "<|im_end|>"]
