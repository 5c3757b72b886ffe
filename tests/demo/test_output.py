"""Tables of the demos: a speed that was measured beside other programs says so."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from tokendial.demo.output import note_on_times, print_table, speed_cell
from tokendial.measure import Timing


@pytest.mark.parametrize(("spread", "cell"), [(0.01, "2.00x"), (2.0, "2.00x ?")])
def test_a_disturbed_row_is_marked_and_the_mark_explained(spread, cell):
    first = SimpleNamespace(timing=Timing(4.0, 0.01, (4.0,) * 5))
    row = SimpleNamespace(timing=Timing(2.0, spread, (2.0,) * 5))
    assert speed_cell(first, first) == "1.00x"
    assert speed_cell(row, first) == cell
    rows = [("0", "1.00x"), ("4", cell)]
    console = Console(record=True, width=100)
    print_table(console, ("degree", "speed"), rows)
    assert bool(note_on_times(rows)) == cell.endswith("?")
    assert ("A question mark: another program" in console.export_text()) == cell.endswith("?")
