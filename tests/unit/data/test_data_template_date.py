"""Templates that write today's date: the day is asked for, and the same whenever data are prepared."""

from datetime import date

import pytest

from megatron_profit.commands.prepare_data import main
from megatron_profit.data import ChatRenderer, DataError, DataSource, Preparation
from megatron_profit.data.render.template_date import parse_day
from megatron_profit.data.store import cache

# As Llama 3.2 writes it.
DATED = """\
{%- if strftime_now is defined %}{%- set today = strftime_now("%d %b %Y") %}
{%- else %}{%- set today = "26 Jul 2024" %}{%- endif %}
{{- '<|im_start|>system\\nToday: ' + today + '<|im_end|>\\n' }}"""
DAY = date(2026, 2, 3)


@pytest.fixture
def dated(make_tokenizer, templates):
    return make_tokenizer(DATED + templates.chatml)


def test_the_day_is_the_one_that_was_asked_for(dated, make_tokenizer, templates, conversation):
    talk = conversation(("user", "q"), ("assistant", "strftime_now('%Y')"))
    rendered = ChatRenderer(dated, day=DAY).render(talk)
    written = make_tokenizer(
        DATED.replace('strftime_now("%d %b %Y")', '"03 Feb 2026"') + templates.chatml
    )
    assert rendered.ids.tolist() == written.apply_chat_template(talk.messages, return_dict=False)
    text = dated.decode(rendered.ids)
    assert "Today: 03 Feb 2026<|im_end|>" in text
    assert text.endswith("assistant\nstrftime_now('%Y')<|im_end|>\n"), "a message is no template"


def test_each_of_several_templates_gets_the_day(make_tokenizer, templates, conversation):
    tokenizer = make_tokenizer({"default": templates.chatml, "tool_use": DATED + templates.chatml})
    tool = {"type": "function", "function": {"name": "f"}}
    talk = conversation(("user", "q"), ("assistant", "a"), tools=[tool])
    text = ChatRenderer(tokenizer, day=DAY).text(talk)
    assert text.startswith("<|im_start|>system\nToday: 03 Feb 2026")


def test_a_day_is_asked_for_where_one_is_written_and_only_there(
    dated, small_tokenizer, make_tokenizer
):
    with pytest.raises(DataError, match=r"writes today's date.*--template-date \d{4}-\d\d-\d\d"):
        ChatRenderer(dated)
    with pytest.raises(
        DataError, match=r"--template-date 2026-02-03 is given, but .* writes no date"
    ):
        ChatRenderer(small_tokenizer, day=DAY)
    computed = make_tokenizer(dated.chat_template.replace('"%d %b %Y"', '"%d" + "%Y"'))
    with pytest.raises(DataError, match="does not write out the format"):
        ChatRenderer(computed, day=DAY)


def test_no_day_is_named():
    assert parse_day(None) is None
    with pytest.raises(DataError, match="--template-date 2026-13-01 is no day"):
        parse_day("2026-13-01")


def test_each_day_is_prepared_by_itself(dated, tmp_path, write_lines, capsys):
    dated.save_pretrained(tmp_path / "tokenizer")
    file = write_lines([{"instruction": "q", "output": "a"}])
    sources, found = [DataSource(str(file))], []
    for day in (DAY, DAY, date(2026, 2, 4)):
        preparation = Preparation(256, day=day)
        prepared = cache.load_or_build(
            sources, tmp_path / "tokenizer", preparation, tmp_path / "cache"
        )
        found.append(dated.decode(prepared.examples[0][0]))
    assert found[0] == found[1] == found[2].replace("04 Feb", "03 Feb")
    assert len(list((tmp_path / "cache").glob(f"*/{cache.ABOUT}"))) == 2
    flags = ["--hf-model", str(tmp_path / "tokenizer"), "--data", str(file), "--seq-length", "256"]
    flags += ["--data-cache", str(tmp_path / "cache")]
    assert main(flags) == 2
    assert "fix the day with --template-date" in capsys.readouterr().err
    assert main([*flags, "--show", "1", "--template-date", "2026-02-03"]) == 0
    assert "Today: 03 Feb 2026" in capsys.readouterr().out
