r"""Write the tables and figures of docs/real_model.md, and README's table, from the results of the study.

    python benchmarks/report_real_model.py
    python benchmarks/report_real_model.py --results runs/real_model/results.json --core runs/core_tokens.json

The first command reads the newest files in benchmarks/results; the second one puts today's copies of these
two files there before. benchmarks/real_model.yaml has the commands that make them. `--results` takes several
files whose plans are parts of the same study, made one after the other or on several machines.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tools"))

import core_tokens

from checkpoint_conversion.engine.output import whole_file
from megatron_profit.commands.plot_run import COLOURS, STYLES
from megatron_profit.evaluation.comparison.plan import Run, read_plan
from megatron_profit.evaluation.comparison.runs import Outcome, outcome_of, results_text
from megatron_profit.evaluation.comparison.tables import (
    HELD_OUT,
    KEPT,
    differences_table,
    draw_comparison,
    measures_of,
    score_cell,
    settings_of,
    tenths,
    unfinished_table,
)
from megatron_profit.evaluation.presentation.report import header, row

RESULTS = Path(__file__).parent / "results"
PLAN = Path(__file__).parent / "real_model.yaml"
PAGE = REPOSITORY / "docs" / "real_model.md"
README = REPOSITORY / "README.md"
IMAGES = REPOSITORY / "docs" / "images"
STUDY, CORE = "real-model", "core-tokens"
BASELINE = "sft"
SCORES_FIGURE = "\n![right answers of each objective](images/real_model.png)\n"
CURVES_FIGURE = (
    "\n![kept share, p and q of kept tokens and plain cross-entropy over the steps]"
    "(images/real_model_curves.png)\n"
)
_CURVES = {
    KEPT: "kept share of the tokens",
    "mean p kept": "mean p of the kept tokens",
    "mean q kept": "their mean q under the base",
    "lm loss": "plain cross-entropy",
}


def newest(name: str) -> Path:
    """Return the newest results of a name, for example "real-model"."""
    return sorted(RESULTS.glob(f"*-{name}.json"))[-1]


def read_study(file: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """Return the content of a results file of `megatron-profit compare`, and its outcomes."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content, [outcome_of(values) for values in content["results"]]


def joined(files: Sequence[Path]) -> str:
    """Return the text of several results files as one, with the study's plan and the parts that are finished.

    Raises:
        ValueError: The same model has other answers in another file, so that differences would not be paired.
    """
    found: dict[tuple[str, Run | None], Outcome] = {}
    for outcome in (outcome for file in files for outcome in read_study(file)[1]):
        before = found.setdefault((outcome.data, outcome.run), outcome)
        for task in before.right.keys() & outcome.right.keys():
            if before.right[task] != outcome.right[task]:
                model = outcome.setting or "the base"
                raise ValueError(f"{model} has other answers to {task} in another of the files")
        # In the order, and with the values, of the first file.
        found[outcome.data, outcome.run] = before.with_more(outcome).with_more(before)
    plan = read_plan(PLAN, find_base=lambda _: str(RESULTS))  # any folder: the base is not read
    units = [unit for stage in plan.schedule() for unit in stage]
    finished = [
        unit
        for unit in units
        if (made := found.get((unit.run.data, unit.run))) is not None
        and made.right.keys() >= set(unit.evaluations)
    ]
    places = {run: place for place, run in enumerate(plan.runs())}
    in_order = sorted(found.values(), key=lambda o: places.get(o.run, -1) if o.run else -1)
    return results_text(in_order, plan.text, len(finished), len(units))


def blocks(
    study: Mapping[str, Any], outcomes: Sequence[Outcome], core: Mapping[str, Any]
) -> dict[str, str]:
    """Return the parts of the page that follow from the results, by name."""
    single = in_tables(outcomes)
    in_all_tables = [*single, *over_seeds(outcomes)]
    found = {
        "state": state(study),
        "scores": per_data(in_all_tables, scores),
        "differences": "",
        "cut": "",
        "trainings": "No training is finished.\n",
        "core": core_table(core),
        "time": time_taken(outcomes),
    }
    if any(outcome.run is not None for outcome in outcomes):
        found["scores"] += SCORES_FIGURE
        found["differences"] = differences(in_all_tables)
        found["cut"] = per_data(single, unfinished_table)
        found["trainings"] = trainings(outcomes) + CURVES_FIGURE
    return found


def in_tables(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes with the names of their tables as their data; all before the first training.

    A table has the trainings on one data set with one seed and learning rate: differences between single
    models are paired by question, and objectives are compared at one rate. Where some models were asked more
    than the others, these questions have a table of their own. The base stands in each one, with its answers
    to what the table's models were asked.
    """
    tables: dict[str, list[Outcome]] = {}
    first: dict[str, Run] = {}
    for outcome in outcomes:
        if (run := outcome.run) is None:
            continue
        usual = first.setdefault(run.data, run)
        seed = "" if run.seed == usual.seed else f", seed {run.seed}"
        rate = "" if run.learning_rate == usual.learning_rate else f", lr {run.learning_rate:g}"
        name = run.data + seed + rate
        tables.setdefault(name, []).append(replace(outcome, data=name))
    bases = {outcome.data: outcome for outcome in outcomes if outcome.run is None}
    found = []
    for data in first:
        for trained in tables.values():
            assert trained[0].run is not None
            if trained[0].run.data == data:
                for models in filter(None, (_asked_alike(trained), _asked_more(trained))):
                    base = replace(bases[data], data=models[0].data)
                    found += [_asked_as(models, base), *models]
    return found or list(outcomes)


def _asked_alike(trained: Sequence[Outcome]) -> list[Outcome]:
    """Return all models of a table, with the tasks that each of them was asked."""
    tasks = _tasks_of_all(trained)
    return [_asked(tasks, outcome) for outcome in trained]


def _asked_more(trained: Sequence[Outcome]) -> list[Outcome]:
    """Return the models that were asked further tasks, with these tasks, as a table of their own."""
    tasks = _tasks_of_all(trained)
    more = [_asked(o.scores.keys() - tasks, o) for o in trained]
    return [replace(o, data=f"{o.data}, more questions") for o in more if o.scores]


def _tasks_of_all(outcomes: Sequence[Outcome]) -> set[str]:
    return set.intersection(*(set(outcome.scores) for outcome in outcomes))


def over_seeds(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of settings with several seeds, with the names of their tables as their data.

    A table has the settings on one data set at one learning rate, with the seeds and the questions that all
    of them have. For example, one setting with the seeds 1, 2 and 3, and one with 1 and 2, are compared on 1
    and 2.
    """
    settings: dict[tuple[str, float | None], dict[str, dict[int, Outcome]]] = {}
    for outcome in outcomes:
        if (run := outcome.run) is not None:
            place = settings.setdefault((run.data, run.learning_rate), {})
            place.setdefault(run.setting, {})[run.seed] = outcome
    bases = {outcome.data: outcome for outcome in outcomes if outcome.run is None}
    found = []
    for (data, rate), groups in settings.items():
        several = [by_seed for by_seed in groups.values() if len(by_seed) > 1]
        if not several:
            continue
        seeds = set.intersection(*map(set, several))
        if len(seeds) > 1:
            trained = [o for by_seed in several for seed, o in by_seed.items() if seed in seeds]
            name = f"{data}, lr {rate:g}, mean over {len(seeds)} seeds"
            alike = _asked_alike(trained)
            models = [_asked_as(alike, bases[data]), *alike]
            found += [replace(model, data=name) for model in models]
    return found


def _asked_as(trained: Sequence[Outcome], base: Outcome) -> Outcome:
    return _asked({task for outcome in trained for task in outcome.scores}, base)


def _asked(tasks: Set[str], outcome: Outcome) -> Outcome:
    kept = {task: score for task, score in outcome.scores.items() if task in tasks}
    return replace(outcome, scores=kept)


def readme_blocks(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Return the part of README that follows from the results: the scores on the first data set."""
    return {"scores": rates_side_by_side(outcomes)}


def rates_side_by_side(outcomes: Sequence[Outcome]) -> str:
    """Return the scores on the first data set with its first seed, an objective a row.

    There are columns for each learning rate at which several objectives were trained.
    """
    trained = in_first_comparison(outcomes)
    runs = [o.run for o in trained if o.run is not None]
    rates = [
        rate
        for rate in dict.fromkeys(run.learning_rate for run in runs)
        if sum(run.learning_rate == rate for run in runs) > 1
    ]
    measures = measures_of(trained)
    counts = question_counts(trained)
    columns = [(rate, measure) for rate in rates for measure in measures]
    lines = header("model", *(f"{counts[task]}, lr {rate:g}" for rate, (_, task) in columns))
    lines.append(row("the base", *(score_cell(trained, None, each) for _, each in columns)))
    for objective in dict.fromkeys(run.objective for run in runs):
        settings = {
            rate: replace(runs[0], objective=objective, learning_rate=rate).setting
            for rate in rates
        }
        cells = [score_cell(trained, settings[rate], measure) for rate, measure in columns]
        lines.append(row(objective, *cells))
    return "\n".join(lines) + "\n"


def in_first_comparison(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the base and the trainings on the first data set with its first seed, at all rates."""
    first = next((o.run for o in outcomes if o.run is not None), None)
    if first is None:
        return list(outcomes)
    trained = [
        o for o in outcomes if o.run and (o.run.data, o.run.seed) == (first.data, first.seed)
    ]
    base = next(o for o in outcomes if o.run is None and o.data == first.data)
    return [_asked_as(trained, base), *trained]


def state(study: Mapping[str, Any]) -> str:
    """Return how far the study is."""
    if study["finished"] == study["runs"]:
        return "All runs of the plan are finished.\n"
    return (
        f"**The study is not finished: {study['finished']} of {study['runs']} parts of its plan are.** "
        "A part is a training with its evaluations. [The same command](#repeat-it) goes on.\n"
    )


def differences(outcomes: Sequence[Outcome]) -> str:
    """Return the paired differences from the base and from plain SFT."""
    words = "Points gained over {}, paired by question (95 % interval; McNemar's exact p):\n\n{}"
    tables = {
        "the base": per_data(outcomes, lambda part: differences_table(part, None)),
        "plain SFT at the same learning rate": per_data(
            outcomes, lambda part: differences_table(part, baseline(part))
        ),
    }
    return "\n".join(words.format(name, text) for name, text in tables.items() if text)


def per_data(outcomes: Sequence[Outcome], make: Any) -> str:
    """Return a table for each name of data, with the name where there are several; no empty one."""
    names = list(dict.fromkeys(outcome.data for outcome in outcomes))
    tables = {data: make([o for o in outcomes if o.data == data]) for data in names}
    titles = {data: f"Trained on {data}:\n\n" if len(names) > 1 else "" for data in names}
    return "\n".join(titles[data] + text for data, text in tables.items() if text)


def baseline(outcomes: Sequence[Outcome]) -> str | None:
    """Return the first setting of plain SFT."""
    return next((name for name in settings_of(outcomes) if name.startswith(BASELINE)), None)


def scores(outcomes: Sequence[Outcome]) -> str:
    """Return the table of right answers."""
    measures = measures_of(outcomes)
    lines = header("model", *question_counts(outcomes).values())
    for setting in (None, *settings_of(outcomes)):
        cells = [score_cell(outcomes, setting, measure) for measure in measures]
        lines.append(row(setting or "the base", *cells))
    return "\n".join(lines) + "\n"


def question_counts(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Return the title of each task's column: its name with the number of its questions."""
    return {
        task: f"{task} ({len(next(o.right[task] for o in outcomes if task in o.right))})"
        for _, task in measures_of(outcomes)
    }


def trainings(outcomes: Sequence[Outcome]) -> str:
    """Return the numbers of each training, seed by seed."""
    ends = {KEPT: "kept", "mean p kept": "mean p kept", "mean q kept": "mean q kept"}
    titles = [f"{title}, first tenth to last" for title in ends.values()]
    lines = header("data", "setting", "seed", "held-out cross-entropy", *titles)
    for outcome in outcomes:
        if (run := outcome.run) is None or "lm loss" not in outcome.curves:
            continue
        numbers = [first_and_last_tenth(outcome, name) for name in ends]
        held_out = f"{outcome.metrics[HELD_OUT]:.3f}"
        lines.append(row(run.data, run.setting, run.seed, held_out, *numbers))
    return "\n".join(lines) + "\n"


def first_and_last_tenth(outcome: Outcome, name: str) -> str:
    """Return a metric's means over the first and the last tenth of the steps, where it was logged."""
    means = tenths(outcome, name)
    return "not logged" if means is None else f"{means[0]:.3f} to {means[1]:.3f}"


def core_table(core: Mapping[str, Any]) -> str:
    """Return the probabilities of core and other tokens."""
    lines = header("tokens", "number", "mean p", "95 % interval", "median", "p >= 0.1", "p >= 0.5")
    names = ("core", core_tokens.REST, *core_tokens.CORE, core_tokens.END)
    for name in (name for name in names if core["groups"][name]["tokens"]):
        group = core["groups"][name]
        low, high = group["interval"]
        kept = [f"{100 * group['kept'][tau]:.1f} %" for tau in ("0.1", "0.5")]
        interval = f"{low:.3f} to {high:.3f}"
        numbers = (f"{group['mean p']:.3f}", interval, f"{group['median p']:.3f}", *kept)
        lines.append(row(name, f"{group['tokens']:,}", *numbers))
    return "\n".join(lines) + "\n"


def time_taken(outcomes: Sequence[Outcome]) -> str:
    """Return the time of all trainings and evaluations."""
    sums = {"train": [0.0, 0.0], "evaluate": [0.0, 0.0]}
    # The base's answers count once, although each data set has them.
    bases = {name: s for o in outcomes if o.run is None for name, s in o.seconds.items()}
    seconds = [*bases.items(), *(item for o in outcomes if o.run for item in o.seconds.items())]
    for name, (cpu, wall) in seconds:
        total = sums["train" if name == "train" else "evaluate"]
        total[0] += cpu / 3600
        total[1] += wall / 3600
    (train, train_wall), (ask, ask_wall) = sums.values()
    return (
        f"So far, the trainings took {train:.1f} hours of CPU time and the evaluations {ask:.1f}, within "
        f"{train_wall + ask_wall:.1f} hours.\n"
    )


def with_blocks(page: str, content: Mapping[str, str]) -> str:
    """Return a page with its generated parts replaced.

    Raises:
        ValueError: The page lacks a part.
    """
    for name, text in content.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not mark or not end:
            raise ValueError(f"the page has no part {name!r} between <!-- {name} --> and its end")
        page = f"{before}{mark}\n{text}\n{end}{after}"
    return page


def draw_curves(outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw how the trainings on the first data set went, with its first seed.

    They are the ones at the first learning rate at which all of the curves were logged.
    """
    from matplotlib.figure import Figure

    first = next(o.run for o in outcomes if o.run is not None)
    runs = {
        o.run: o.curves
        for o in outcomes
        if o.run and (o.data, o.run.seed) == (first.data, first.seed)
        if o.curves.keys() >= _CURVES.keys()
    }
    rate = next(iter(runs)).learning_rate
    chosen = {run: curves for run, curves in runs.items() if run.learning_rate == rate}
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    figure.suptitle(f"{first.data}, learning rate {rate:g}", fontsize=11)
    for axis, (name, title) in zip(figure.subplots(1, 4), _CURVES.items(), strict=True):
        for i, (run, curves) in enumerate(chosen.items()):
            look = {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i // len(COLOURS) % 3]}
            # The last step has the few records that are left.
            values = curves[name][:-1]
            axis.plot(range(1, len(values) + 1), values, label=run.objective, **look)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    with whole_file(file) as stream:
        figure.savefig(stream, format="png", dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page's parts and figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, nargs="+", help="results.json of the study")
    parser.add_argument("--core", type=Path, help="results of tools/core_tokens.py")
    arguments = parser.parse_args(argv)
    today = datetime.date.today().isoformat()
    new = {}
    if arguments.results:
        new[STUDY] = joined(arguments.results).encode()
    if arguments.core:
        new[CORE] = arguments.core.read_bytes()
    for name, copy in new.items():
        with whole_file(RESULTS / f"{today}-{name}.json") as stream:
            stream.write(copy)
    study, outcomes = read_study(newest(STUDY))
    core = json.loads(newest(CORE).read_text(encoding="utf-8"))
    parts = {PAGE: blocks(study, outcomes, core), README: readme_blocks(outcomes)}
    for page, content in parts.items():
        text = with_blocks(page.read_text(encoding="utf-8"), content)
        with whole_file(page) as stream:
            stream.write(text.encode())
    if any(outcome.run is not None for outcome in outcomes):
        draw_comparison(in_first_comparison(outcomes), IMAGES / "real_model.png")
        draw_curves(outcomes, IMAGES / "real_model_curves.png")
    core_tokens.draw(core, IMAGES / "core_tokens.png")
    print("wrote " + " and ".join(str(page.relative_to(REPOSITORY)) for page in parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
