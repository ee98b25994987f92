"""The conversation in a terminal, with a tiny model."""

import io
import math
import re
from datetime import date

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_profit.commands import chat
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling


@pytest.fixture(scope="module")
def open_talk(tiny_model):
    talk = chat.open_conversation(str(tiny_model), "float32", "")

    def fresh(system=""):
        talk.system = system
        talk.reset()
        return talk

    return fresh


def test_an_answer_comes_in_pieces_and_joins_the_conversation(open_talk, tiny_model):
    talk = open_talk("Be brief.")
    pieces = list(talk.answer("What is two plus two?", Sampling(), 10))
    assert len(pieces) > 3
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is two plus two?"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    output = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.size(1) :]
    assert "".join(pieces) == tokenizer.decode(output, skip_special_tokens=True)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.messages[1]["content"] == "".join(pieces)
    list(talk.answer("And three?", Sampling(), 2))
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_probabilities_are_those_of_one_forward_pass(open_talk, tiny_model):
    talk = open_talk()
    list(talk.answer("two", Sampling(temperature=1.0, top_k=3), 6))
    prompt = talk.tokenizer.apply_chat_template(
        talk.messages[:1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    ids = torch.tensor([[*prompt, *talk.ids]])
    with torch.no_grad():
        prob = talk.model(ids).logits[0].softmax(-1)
    expected = [float(prob[len(prompt) + i - 1, token]) for i, token in enumerate(talk.ids)]
    assert talk.probs == pytest.approx(expected, rel=1e-4)
    lines = chat.carry_out(talk, "/probs", color=False).splitlines()
    assert [float(line.split()[0]) for line in lines] == pytest.approx(expected, abs=6e-4)
    coloured = chat.carry_out(talk, "/probs", color=True)
    text = re.sub(r"\x1b\[[0-9;]*m", "", coloured).split("\nprobability from")[0]
    # Control characters do not reach the terminal.
    assert text == re.sub(r"[\x00-\x1f]", "\ufffd", "".join(p or "◂" for p in talk.pieces()))


def test_ctrl_c_cuts_an_answer_off_and_the_talk_goes_on(open_talk):
    talk, shown = open_talk(), []

    def show(piece):
        shown.append(piece)
        if len(shown) == 2:
            raise KeyboardInterrupt

    chat.say(talk, "What is two plus two?", Sampling(), 50, show)
    assert shown[-2:] == [" [cut off]", "\n"]
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(shown[:2])}
    assert not math.isnan(talk.probs[0])


def test_the_command_reads_lines(tiny_model, monkeypatch, capsys):
    lines = [
        "/probs",
        "two plus two",
        "/system Be kind.",
        "/help",
        "/nonsense",
        "",
        "hello",
        "/quit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert chat.main([str(tiny_model), "--max-new-tokens", "4", "--temperature", "0.7"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("there is no answer yet\n")
    assert "the conversation begins again\n" in printed
    assert printed.count("/system TEXT") == 2
    assert "there is no command /nonsense" in printed
    assert "[cut off at 4 tokens; --max-new-tokens sets the limit]" in printed


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    assert chat.main([str(tmp_path / "absent")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert chat.main([str(tmp_path), "--top-p", "2"]) == 1
    assert "--top-p is 2.0" in capsys.readouterr().err


def test_a_template_that_asks_for_today_gets_one_day_for_the_conversation(dated_model, tiny_model):
    talk = chat.open_conversation(str(dated_model), "float32", "", date(2026, 2, 3))
    talk.messages = [{"role": "user", "content": "hi"}]
    assert "Today: 03 Feb 2026<|im_end|>" in talk.tokenizer.decode(talk.prompt_ids())
    talk = chat.open_conversation(str(dated_model), "float32", "")
    assert talk.template.day is not None
    with pytest.raises(EvaluationError, match="--template-date 2026-02-03 is given, but no model"):
        chat.open_conversation(str(tiny_model), "float32", "", date(2026, 2, 3))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[-1].content }}", "leaves the system message out"),
    ],
)
def test_a_template_without_a_system_role_is_named(open_talk, monkeypatch, template, message):
    talk = open_talk()
    monkeypatch.setattr(talk.tokenizer, "chat_template", template)
    reply = chat.carry_out(talk, "/system Be kind.", color=False)
    assert reply.startswith("error: ")
    assert message in reply
    assert talk.system == ""
    talk.system = "Be kind."
    with pytest.raises(EvaluationError, match=message):
        talk.check_system()


def test_a_conversation_ends_where_the_context_does(open_talk, monkeypatch):
    talk, shown = open_talk(), []
    talk.messages = [{"role": "user", "content": "two"}]
    room = len(talk.prompt_ids()) + 3
    talk.reset()
    monkeypatch.setattr(talk.model.config, "max_position_embeddings", room)
    monkeypatch.setattr(talk, "stop_ids", frozenset())
    chat.say(talk, "two", Sampling(), 50, shown.append)
    assert "".join(shown).endswith(
        "[cut off at 3 tokens; the model's context is full; /reset begins again]\n"
    )
    chat.say(talk, "three", Sampling(), 50, shown.append)
    assert f"and the model's context {room}; /reset begins again" in shown[-2]
    assert len(talk.messages) == 2, "the message that had no room is forgotten"


def test_logits_that_are_nan_are_named(open_talk):
    talk, shown = open_talk(), []
    weight = talk.model.model.norm.weight.data
    before = weight.clone()
    weight.fill_(math.nan)
    try:
        chat.say(talk, "two", Sampling(), 5, shown.append)
    finally:
        weight.copy_(before)
    assert "the model's logits are NaN" in shown[0]
    assert talk.messages == []


def test_a_gpu_without_room_is_named(open_talk, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    talk, shown = open_talk(), []
    monkeypatch.setattr(talk.model, "forward", full)
    chat.say(talk, "two", Sampling(), 5, shown.append)
    assert "more memory than the GPU has left; /reset begins again" in shown[0]
    assert talk.messages == []


def test_bytes_that_are_no_text_are_replaced(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"two \xff\xfe\n"), "utf-8"))
    assert chat.main([str(tiny_model), "--max-new-tokens", "2"]) == 0
    assert "[cut off at 2 tokens" in capsys.readouterr().out
