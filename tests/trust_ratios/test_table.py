"""The table at the end of a run."""

import io
import math

import pytest
from rich.console import Console
from rich.text import Text

from lightning_lars.printing.tables import is_too_wide, print_table
from lightning_lars.trust_ratios.history import TrustRatioHistory
from lightning_lars.trust_ratios.layer_statistics import OverSteps
from lightning_lars.trust_ratios.table import print_trust_ratios, trust_ratio_table


def history(**quantities):
    """Two records of the same."""
    recorded = TrustRatioHistory()
    for _ in range(2):
        recorded.record(
            1,
            {
                quantity: {name: OverSteps(value, value / 2, value * 2) for name, value in layers.items()}
                for quantity, layers in quantities.items()
            },
        )
    return recorded


def cells(table):
    """Headings and rows."""
    columns = [[column.header, *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def test_has_a_row_for_each_layer_and_columns_for_what_occurred():
    layers = {"conv.weight": 0.02, "fc.weight": 0.1}
    none = dict.fromkeys(layers, 0.0)
    table = trust_ratio_table(
        history(
            trust_ratio=layers,
            effective_lr={"conv.weight": 0.04, "fc.weight": 0.2},
            at_trust_clip={"conv.weight": 0.25, "fc.weight": 0.0},
            at_zero_rule=none,
        )
    )
    assert cells(table) == [
        ["Layer", "Trust\nratio", "min", "max", "last", "Effective\nlr", "At\nclip"],
        ["conv.weight", "0.02", "0.01", "0.04", "0.02", "0.04", "25%"],
        ["fc.weight", "0.1", "0.05", "0.2", "0.1", "0.2", "0%"],
    ]


def test_of_many_layers_shows_the_smallest_largest_and_non_finite():
    ratios = {f"layer{i}": 0.001 * (1 + (7 * i) % 100) for i in range(100)} | {"sick": math.nan}
    _, *rows, rest = cells(trust_ratio_table(history(trust_ratio=ratios), max_rows=10))
    by_ratio = sorted((name for name in ratios if name != "sick"), key=ratios.get)
    assert {row[0] for row in rows} == {"sick", *by_ratio[:4], *by_ratio[-5:]}
    assert [row[0] for row in rows] == [name for name in ratios if name in {row[0] for row in rows}]
    assert rest[0] == "and 91 layers between 0.005 and 0.095"


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_hides_no_more_than_it_must(rows):
    ratios = {f"layer{i}": float(i + 1) for i in range(4)}
    _, *shown = cells(trust_ratio_table(history(trust_ratio=ratios), max_rows=rows))
    assert sum(row[0].startswith("layer") for row in shown) == min(rows, 4)


def test_a_file_gets_the_names_in_one_piece_and_a_narrow_terminal_gets_all_numbers():
    name = "model." + "encoder." * 20 + "weight"
    table = trust_ratio_table(history(trust_ratio={name: 0.125}))
    file = io.StringIO()
    print_table(Console(file=file, width=40), table)
    assert name in file.getvalue()
    assert "\x1b" not in file.getvalue()
    terminal = Console(file=io.StringIO(), width=60, force_terminal=True)
    table = trust_ratio_table(history(trust_ratio={name: 0.125}))
    assert is_too_wide(terminal, table)
    print_table(terminal, table)
    lines = [Text.from_ansi(line).plain for line in terminal.file.getvalue().splitlines()]
    assert max(map(len, lines)) == 60
    assert sum("0.125" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(103, []), (93, ["last"]), (81, ["last", "Effective lr"]), (70, ["last", "Effective lr", "min", "max"])],
)
def test_a_narrow_terminal_gets_whole_names_and_fewer_columns(width, left_out):
    layers = {f"backbone.layer{i}.0.downsample.0.weight": 0.00512 for i in range(4)}
    quantities = dict.fromkeys(("trust_ratio", "effective_lr", "update_to_weight"), layers)
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_trust_ratios(terminal, history(**quantities))
    lines = terminal.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum(any(name in line for name in layers) for line in lines) == 4
    heading = " ".join(lines[2:4])
    assert [word for word in ("last", "Effective", "min", "max") if word not in heading] == [
        word.split()[0] for word in left_out
    ]
    assert (lines[-1].strip() == f"without {', '.join(left_out)}: widen the terminal") == bool(left_out)


@pytest.mark.parametrize("width", [80, 120])
def test_names_that_do_not_fit_are_folded_not_dropped(width):
    name = "model." + "encoder." * 10 + "weight"
    quantities = ("trust_ratio", "effective_lr", "update_to_weight", "at_trust_clip", "at_zero_rule")
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_trust_ratios(terminal, history(**{key: {name: 0.00512} for key in quantities}))
    rows = [line.split("│")[1].strip() for line in terminal.file.getvalue().splitlines() if line[0] == "│"]
    assert "".join(rows) == name
    assert min(map(len, rows[:-1])) >= 24
