"""The page in a real browser, and its text form in a terminal."""

import json
import re

import pytest

from megatron_profit.objectives import build_objective
from megatron_profit.token_report import evaluate_objectives, page, terminal_text


def embedded(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_page_holds_the_numbers_and_nothing_from_elsewhere(records):
    text = page(records, title="t", threshold=(0.5,))
    data = embedded(text)
    assert data["objectives"] == ["profit", "entropy"]
    assert data["records"][0]["p"] == [None, 0.300000012, 0.0500000007, 0.5, 0.949999988]
    assert data["records"][0]["weights"] == {"profit": [0, 0, 0, 1, 1], "entropy": [0, 0, 1, 0, 0]}
    assert data["records"][1]["weights"]["entropy"] == [0, 1, 0]  # ranked over both records
    assert data["records"][1]["pieces"][1] == "</script><b>"
    assert not re.search(
        r"(src|href)=|url\(|https?://(?!www\.w3\.org)", text.replace('href="#records"', "")
    )


def test_page_refuses_to_be_empty():
    with pytest.raises(ValueError, match="no record"):
        page([], title="t")


def test_slider_moves_the_marks(records, browse):
    result = browse(
        page(records, title="t", threshold=(0.5,)),
        """
        result.start = [marks(0), marks(1)];
        const slider = document.querySelector("input[type=range]");
        slider.value = 0.96;
        slider.dispatchEvent(new Event("input"));
        result.number = $("tau").value;
        result.high = [marks(0), marks(1)];
        result.share = data.records[1].share.textContent;
        set("tau", 0.5);
        set("direction", "lower");
        result.lower = marks(0);
        set("direction", "middle");
        set("tau", 0.1);
        set("upper", 0.9);
        result.middle = [marks(0), marks(1)];
        result.status = $("status").textContent;
        result.bars = document.querySelectorAll("#histogram .kept-bar").length;
        """,
    )
    assert result["start"] == [
        ["prompt", "prompt", "dropped", "kept", "kept"],  # p = 0.5 is at the threshold: kept
        ["prompt", "dropped", "kept"],
    ]
    assert result["number"] == "0.96"
    assert result["high"] == [["prompt", "prompt", *3 * ["dropped"]], ["prompt", "dropped", "kept"]]
    assert result["share"] == "1 of 2 supervised tokens kept (50.0 %)"
    assert result["lower"] == ["prompt", "prompt", "kept", "kept", "dropped"]
    assert result["middle"] == [
        ["prompt", "prompt", "dropped", "kept", "dropped"],
        ["prompt", "kept", "dropped"],
    ]
    assert result["status"].startswith("40.0 % of all supervised tokens kept")
    assert result["bars"] == 20


def test_a_quantile_of_all_tokens_or_of_each_record_marks_as_in_training(records, browse):
    keywords = {"title": "t", "direction": "higher"}
    result = browse(
        page(records, threshold=(0.4,), scope="global_batch", **keywords),
        """
        result.start = [marks(0), marks(1)];
        result.status = $("status").textContent;
        set("scope", "record");
        result.record = [marks(0), marks(1)];
        set("direction", "lower");
        result.lower = [marks(0), marks(1)];
        set("scope", "global_batch");
        set("tau", 1);
        result.all = [marks(0), marks(1)];
        set("direction", "higher");
        result.none = [marks(0), marks(1)];
        """,
    )
    for name, direction, quantile, scope in (
        ("start", "higher", 0.4, "global_batch"),
        ("record", "higher", 0.4, "record"),
        ("lower", "lower", 0.4, "record"),
        ("all", "lower", 1.0, "global_batch"),
        ("none", "higher", 1.0, "global_batch"),  # at least one token stays
    ):
        objective = build_objective(
            "profit",
            threshold_quantile=quantile,
            threshold_direction=direction,
            threshold_scope=scope,
        )
        weighed = evaluate_objectives(records, {"it": objective})
        assert result[name] == [
            [
                "prompt" if not is_supervised else "kept" if weight else "dropped"
                for is_supervised, weight in zip(
                    record.supervised, record.weights["it"], strict=True
                )
            ]
            for record in weighed
        ], name
    assert "60.0 % of all supervised tokens kept, threshold 0.500" in result["status"]


def test_both_models_probabilities_are_shown_and_the_threshold_reads_either(records, browse):
    for each in records:
        prob = each.statistics.prob
        object.__setattr__(
            each, "statistics", each.statistics.replaced(ref_log_prob=(1 - prob).log())
        )
    text = page(records, title="t", threshold=(0.5,), signal="reference")
    assert embedded(text)["records"][0]["q"][1:3] == pytest.approx([0.7, 0.95])
    result = browse(
        text,
        """
        result.start = marks(0);
        show(data.records[0], 2);
        result.token = $("token").textContent;
        tabulate(data.records[0], data.records[0].details);
        const cells = row => [...row.cells].map(c => c.textContent);
        result.head = cells(data.records[0].details.querySelector("thead tr"));
        result.row = cells(data.records[0].details.querySelectorAll("tbody tr")[2]);
        const tint = () => data.records[0].nodes[2].style.getPropertyValue("--shade");
        result.shades = [tint()];
        set("signal", "current");
        result.current = marks(1);
        result.shades.push(tint());
        result.hidden = $("signal-label").hidden;
        """,
    )
    assert result["start"] == ["prompt", "prompt", "kept", "kept", "dropped"]
    assert result["token"] == 'token 3 of 5: "is", p 0.0500, q 0.950, kept, weight 1.00'
    assert result["head"] == ["token", "state", "p", "q", "weight"]
    assert result["row"] == ['"is"', "kept", "0.05000", "0.9500", "1.00"]
    assert result["current"] == ["prompt", "dropped", "kept"]
    assert result["shades"][0] != result["shades"][1]
    assert result["hidden"] is False


def test_choosing_tau_shows_what_each_threshold_keeps_and_drops(records, browse):
    result = browse(
        page(records, title="t"),
        """
        const rows = [...$("choosing").tBodies[0].rows];
        result.rows = rows.map(r => [...r.cells].map(c => c.textContent));
        result.hidden = $("signal-label").hidden;
        """,
    )
    assert result["rows"] == [
        ["0.05", "100.0 %", ""],  # p = 0.05 is kept
        ["0.1", "80.0 %", '"is"'],
        ["0.2", "80.0 %", ""],
        ["0.3", "60.0 %", '"</script><b>"'],
        ["0.5", "60.0 %", ""],
        ["0.7", "40.0 %", '" ev"'],
        ["0.9", "40.0 %", ""],
    ]
    assert result["hidden"] is True


def test_the_keyboard_alone_moves_slider_and_reader(records, open_page):
    tab = open_page(page(records, title="t", threshold=(0.5,)))

    def tab_to(selector, limit=20):
        for _ in range(limit):
            tab.press("Tab")
            if tab.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
        pytest.fail(f"no key leads to {selector}")

    def marks():
        return tab.evaluate("data.records.map(r => r.nodes.map(n => n.classList.item(1)))")

    tab_to("input[type=range]")
    assert marks()[0] == ["prompt", "prompt", "dropped", "kept", "kept"]
    tab.press("ArrowRight")
    assert tab.evaluate("$('tau').value") == "0.51"
    assert marks()[0] == ["prompt", "prompt", "dropped", "dropped", "kept"]
    tab.press("End")
    assert marks() == [["prompt", "prompt", *["dropped"] * 3], ["prompt", *["dropped"] * 2]]
    assert tab.evaluate("$('status').textContent").startswith("0.0 % of all supervised tokens kept")
    tab.press("Home")
    assert marks() == [["prompt", "prompt", *["kept"] * 3], ["prompt", *["kept"] * 2]]

    tab_to(".tokens")
    tab.press("ArrowRight", times=2)
    assert tab.evaluate("$('token').textContent").startswith('token 3 of 5: "is", p 0.0500, kept')
    tab.press("End")
    assert tab.evaluate("document.querySelector('.current').textContent") == "en"


def test_light_and_dark_as_the_system_has_it(records, open_page):
    tab = open_page(page(records, title="t"))
    seen = {}
    for scheme in ("light", "dark"):
        tab.prefer(scheme)
        ink, paper = (
            tab.evaluate(f"getComputedStyle(document.body).{name}")
            for name in ("color", "backgroundColor")
        )
        seen[scheme] = (contrast(ink, paper), tab.screenshot())
    assert min(seen["light"][0], seen["dark"][0]) > 12
    assert seen["light"][1] != seen["dark"][1]


def contrast(first, second):
    """WCAG's ratio of two colours, given as rgb(r, g, b)."""

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted([luminance(first), luminance(second)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_objectives_side_by_side(records, browse):
    result = browse(
        page(records, title="t", threshold=(0.5,)),
        """
        set("objective", "entropy");
        result.marks = [marks(0), marks(1)];
        result.hidden = $("thresholds").hidden;
        result.rows = [...$("comparison").tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent));
        """,
    )
    assert result["marks"] == [
        ["prompt", "prompt", "kept", "dropped", "dropped"],
        ["prompt", "kept", "dropped"],
    ]
    assert result["hidden"] is True
    assert result["rows"] == [
        ["profit (slider)", "60.0 %", "0.600", "0.0 %", "33.3 %", "66.7 %"],
        ["profit", "60.0 %", "0.600", "0.0 %", "33.3 %", "66.7 %"],
        ["entropy", "40.0 %", "0.400", "50.0 %", "50.0 %", "0.0 %"],
    ]


def test_search_filter_and_keyboard(records, browse):
    result = browse(
        page(records, title="t", threshold=(0.5,)),
        """
        set("search", "EVEN");
        result.found = data.records[0].nodes.map(n => n.classList.contains("found"));
        result.shown = data.records.map(r => !r.node.hidden);
        set("search", "");
        set("filter", "order");
        set("tau", 0.99);
        result.order = [...$("records").children].map(n => n.querySelector("h2").textContent);
        const tokens = data.records[0].node.querySelector(".tokens");
        const press = key =>
          tokens.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
        tokens.focus();
        press("End");
        result.end = $("token").textContent;
        press("Home"); press("d");
        result.dropped = $("token").textContent;
        const details = data.records[0].details;
        details.open = true;
        tabulate(data.records[0], details);
        const rows = [...details.querySelectorAll("tbody tr")];
        result.table = rows.map(r => [...r.cells].map(c => c.textContent));
        $("theme").click();
        result.dark = getComputedStyle(document.body).backgroundColor;
        """,
    )
    assert result["found"] == [False, False, False, True, True]
    assert result["shown"] == [True, False]
    assert result["order"] == ["a.jsonl, line 1", "a.jsonl, line 2"]
    assert result["end"] == 'token 5 of 5: "en", p 0.950, dropped'
    assert result["dropped"] == 'token 3 of 5: "is", p 0.0500, dropped'
    assert result["table"][3] == ['" ev"', "dropped", "0.5000", "0.00"]
    assert result["dark"] == "rgb(13, 17, 23)"


def test_a_character_of_several_tokens_is_found_and_its_parts_are_seen(split_character, browse):
    result = browse(
        page([split_character], title="t", threshold=(0.5,)),
        """
        const nodes = data.records[0].nodes;
        const found = () => nodes.map(n => n.classList.contains("found"));
        result.text = data.records[0].node.querySelector(".tokens").textContent;
        result.widths = nodes.map(n => n.getBoundingClientRect().width > 0);
        result.glyphs = nodes.map(n => getComputedStyle(n, "::before").content);
        result.marks = marks(0);
        set("search", "汉字");
        result.both = found();
        set("search", "字");
        result.second = found();
        set("search", "🎉");
        result.status = $("status").textContent;
        show(data.records[0], 2);
        result.announced = $("token").textContent;
        const details = data.records[0].details;
        tabulate(data.records[0], details);
        result.row = [...details.querySelectorAll("tbody tr")[2].cells].map(c => c.textContent);
        """,
    )
    assert result["text"] == "<s> 汉字🎉"
    assert result["widths"] == [True] * 6
    assert result["glyphs"] == ["none", "none", '"◂"', "none", "none", '"◂"']
    assert result["marks"] == ["prompt", "prompt", "dropped", "kept", "kept", "dropped"]
    assert result["both"] == [False, True, True, True, False, False]
    assert result["second"] == [False, False, False, True, False, False]
    assert result["status"] == "1 of 1 records shown, 2 tokens match"
    assert result["announced"] == "token 3 of 6: (part of the character before), p 0.0500, dropped"
    assert result["row"] == ["(part of the character before)", "dropped", "0.05000", "0.00"]


def test_terminal_form(records):
    plain = terminal_text(records[0], "profit", color=False)
    assert (
        plain
        == "a.jsonl, line 1: 2 of 3 supervised tokens kept by profit (66.7%)\n<s>two [-is-] even"
    )
    coloured = terminal_text(records[0], "profit", color=True)
    assert "\x1b[9mis\x1b[0m" in coloured
    assert "\x1b[2mtwo \x1b[0m" in coloured


def test_terminal_shows_the_parts_of_a_character(split_character):
    plain = terminal_text(split_character, "profit", color=False)
    assert plain.endswith("\n<s> 汉[-◂-]字🎉[-◂-]")
    coloured = terminal_text(split_character, "profit", color=True)
    assert coloured.count("\x1b[9m◂\x1b[0m") == 2
    object.__setattr__(split_character, "pieces", ("👩\u200d👧", *split_character.pieces[1:]))
    assert "\n👩\u200d👧 汉" in terminal_text(split_character, "profit", color=False)


def test_terminal_is_not_steered_by_a_record(records):
    object.__setattr__(records[0], "pieces", ("\x1b]0;title\x07", *records[0].pieces[1:]))
    assert "\x1b" not in terminal_text(records[0], "profit", color=False)
