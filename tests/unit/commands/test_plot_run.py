"""The figure of a run: drawn from TensorBoard events, and clear errors where there are none."""

import json

import matplotlib.figure
import matplotlib.image
import pytest
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from megatron_profit.commands import plot_run

SFT = {"lm loss": (3.0, 1.0), "objective": (3.0, 1.0), "kept fraction": (1.0, 1.0)}
PROFIT = {
    "lm loss": (1.5, 1.25),
    "objective": (0.5, 0.125),
    "kept fraction": (0.75, 0.875),
    "mean p kept": (0.5, 0.75),
    "mean p dropped": (0.0625, 0.03125),
}


@pytest.fixture
def write(tmp_path):
    def write(name, scalars, first_step=1):
        folder = tmp_path / name
        with SummaryWriter(str(folder)) as writer:
            for tag, values in scalars.items():
                for step, value in enumerate(values, first_step):
                    writer.add_scalar(tag, value, step)
        return folder

    return write


@pytest.fixture
def figure(monkeypatch):
    """The figures that are made, as they were saved."""
    made = []

    class Kept(Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Kept)
    return made


def test_two_runs_become_one_png_of_three_panels(write, tmp_path, capsys):
    runs = [f"base={write('base', SFT)}", f"ProFit={write('profit', PROFIT)}"]
    out = tmp_path / "new" / "curves.png"
    assert plot_run.main(["--out", str(out), *runs]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    height, width, _ = matplotlib.image.imread(out).shape
    assert (width, height) == pytest.approx((1690, 494), abs=2)  # 13 x 3.8 inches at 130 dpi
    assert list(out.parent.iterdir()) == [out]  # no partial file is left


def test_the_curves_are_the_logged_values(write, tmp_path, figure):
    plot_run.plot_runs({"ProFit": write("profit", PROFIT)}, tmp_path / "curves.png")
    drawn = {
        (axis.get_title(), line.get_label()): (tuple(line.get_xdata()), tuple(line.get_ydata()))
        for axis in figure[0].axes
        for line in axis.lines
    }
    loss, kept, probability, *_ = (title for title, _ in plot_run.PANELS)
    assert drawn == {
        (loss, "ProFit: cross-entropy"): ((1, 2), PROFIT["lm loss"]),
        (loss, "ProFit: objective"): ((1, 2), PROFIT["objective"]),
        (kept, "ProFit"): ((1, 2), PROFIT["kept fraction"]),
        (probability, "ProFit: kept"): ((1, 2), PROFIT["mean p kept"]),
        (probability, "ProFit: dropped"): ((1, 2), PROFIT["mean p dropped"]),
    }


def test_plain_sft_has_one_loss(write, tmp_path, figure):
    plot_run.plot_runs({"base": write("base", SFT)}, tmp_path / "curves.png")
    labels = [line.get_label() for axis in figure[0].axes for line in axis.lines]
    assert labels == ["base: cross-entropy", "base"]


def test_an_objective_that_weights_every_token_is_drawn(write, tmp_path, figure):
    dft = {**SFT, "objective": (0.25, 0.125)}
    plot_run.plot_runs({"dft": write("dft", dft)}, tmp_path / "curves.png")
    labels = [line.get_label() for axis in figure[0].axes for line in axis.lines]
    assert labels == ["dft: cross-entropy", "dft: objective", "dft"]


def test_a_resumed_run_is_one_curve_and_its_later_values_count(write):
    write("run", {"lm loss": (4.0, 3.0, 2.5)})
    folder = write("run", {"lm loss": (2.0, 1.0)}, first_step=3)
    assert plot_run.read_curves(folder) == {"lm loss": ([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0])}


def test_a_metrics_file_gives_the_same_curves_and_those_of_evaluations(tmp_path, figure):
    file = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "start", "step": 0, "objective": "profit"},
        *(
            {"kind": "train", "step": step, "lm loss": loss, "grad norm": 0.5, "mean p": None}
            for step, loss in ((2, 3.0), (4, 2.0))
        ),
        {"kind": "evaluation", "step": 4, "lm loss": 2.5},
        {"kind": "guard", "step": 4, "event": "spike", "suspects": []},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    file.write_text(text + '{"kind": "tra')
    assert plot_run.read_curves(file) == {
        "lm loss": ([2, 4], [3.0, 2.0]),
        "grad-norm": ([2, 4], [0.5, 0.5]),
        "lm loss validation": ([4], [2.5]),
    }
    plot_run.plot_runs({"run": file}, tmp_path / "curves.png")
    assert [axis.get_title() for axis in figure[0].axes] == [
        "Loss per token (nats)",
        "Gradient norm",
    ]


def test_more_panels_than_fit_a_row_and_names_of_tensorboard(write, tmp_path, figure):
    scalars = {**PROFIT, "grad-norm": (1.0, 2.0), "learning-rate": (1e-5, 1e-5)}
    plot_run.plot_runs({"run": write("run", scalars)}, tmp_path / "curves.png")
    titles = [axis.get_title() for axis in figure[0].axes]
    assert titles == [title for title, _ in plot_run.PANELS[:5]], "and no empty panel"


def test_a_run_is_given_by_its_folder_or_file_with_a_label_or_without(write, tmp_path, figure):
    run = tmp_path / "a=b"  # a name may hold what ends a label
    write("a=b/tensorboard", SFT)
    ways = [f"{run}", f"{run}/tensorboard", f"x={run}"]
    for way in ways:
        assert plot_run.main(["--out", str(tmp_path / "curves.png"), way]) == 0
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "lm loss": 1.0}\n')
    assert plot_run.read_curves(run) == {"lm loss": ([3], [1.0])}
    for way in (f"{run}", f"y={run}", f"{run}/metrics.jsonl"):
        assert plot_run.main(["--out", str(tmp_path / "curves.png"), way]) == 0
    labels = [made.axes[0].lines[0].get_label().split(":")[0] for made in figure]
    assert labels == ["a=b", "a=b", "x", "a=b", "y", "a=b"]


@pytest.mark.parametrize("line", ["nonsense\n", "[1]\n", '{"kind": "train"}\n'])
def test_a_broken_line_is_named(tmp_path, capsys, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "train", "step": 1, "lm loss": 1.0}\n' + line)
    assert plot_run.main(["--out", str(tmp_path / "curves.png"), f"run={file}"]) == 2
    assert f"{file}, line 2: not an object with a kind and a step" in capsys.readouterr().err


def test_a_run_without_any_of_the_metrics_is_named(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "start", "step": 0}\n')
    assert plot_run.main(["--out", str(tmp_path / "curves.png"), f"run={file}"]) == 2
    assert f"{file}: none of the metrics to draw" in capsys.readouterr().err


@pytest.mark.parametrize("made", [False, True], ids=["missing", "empty"])
def test_a_folder_without_events_is_named(tmp_path, capsys, made):
    folder, out = tmp_path / "nothing", tmp_path / "curves.png"
    if made:
        folder.mkdir()
    assert plot_run.main(["--out", str(out), f"run={folder}"]) == 2
    assert f"error: {folder} is no metrics file, and no folder with" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("runs", "problem"),
    [
        (["=folder"], "'=folder' is not of the form LABEL=RUN"),
        (["label="], "'label=' is not of the form LABEL=RUN"),
        (["a=one", "a=two"], "the label 'a' is given twice"),
        (["one/tensorboard", "one=two"], "the label 'one' is given twice"),
    ],
)
def test_a_malformed_run_is_named(tmp_path, capsys, runs, problem):
    with pytest.raises(SystemExit) as error:
        plot_run.main(["--out", str(tmp_path / "curves.png"), *runs])
    assert error.value.code == 2
    assert problem in capsys.readouterr().err
