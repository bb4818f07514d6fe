"""The printed summary of a Trainer's optimizers."""

import io
import json
import re
from functools import partial

import lightning.pytorch
import pytest
import pytorch_lightning
import rich
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.optim import SGD, Adam

from lightning_lars import LAMB, LARS, ExcludeNormAndBias, build_optimizer
from lightning_lars.callbacks.param_group_summary import ParamGroupSummary
from tests.support.boring import Boring, boring, trainer
from tests.support.ranks import on_ranks
from tests.workers import group_summary


class Plain:
    """Builds its optimizers by a function of the module."""

    def __init__(self, build=None, *, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.build = build or partial(build_optimizer, optimizer=LARS, lr=0.3, weight_decay=1e-6)
        layers = [layer for _ in range(blocks) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
        self.net = nn.Sequential(*layers)

    training_step = Boring.training_step
    train_dataloader = Boring.train_dataloader

    def configure_optimizers(self):
        return self.build(self)


class Module(Plain, LightningModule):
    pass


class Manual(Module):
    """Takes no step: what is printed is printed before."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        pass


def printed(capsys, tmp_path, module, *callbacks, **options):
    """Fit for one batch and return what was printed."""
    options = {"callbacks": list(callbacks) or [ParamGroupSummary()], "max_steps": 1, **options}
    trainer(tmp_path, **options).fit(module)
    return capsys.readouterr().out


def tables(out):
    """The rows of the printed tables, without their headings."""
    bodies = re.findall(r"┩\n(.*?)└", out, flags=re.DOTALL)
    return [[[c.strip() for c in line.strip("│").split("│")] for line in b.splitlines()] for b in bodies]


def test_prints_groups_and_rules_with_repeated_blocks_folded(tmp_path, capsys):
    out = printed(capsys, tmp_path, Module())
    assert out.startswith("Parameter groups of LARS\n")
    parameters, groups = tables(out)
    assert parameters == [
        ["net.[0,2].weight", "Linear", "(4, 4)", "2", "adapted", ""],
        ["net.[0,2].bias", "Linear", "(4,)", "2", "excluded", "bias"],
        ["net.[1,3].{weight,bias}", "BatchNorm1d", "(4,)", "4", "excluded", "NormBase"],
    ]
    assert groups == [
        ["adapted", "2", "32", "yes", "1e-06", "0.3"],
        ["excluded", "6", "24", "no", "0", "0.3"],
    ]


def test_can_print_every_parameter(tmp_path, capsys):
    parameters, _ = tables(printed(capsys, tmp_path, Module(), ParamGroupSummary(fold=False)))
    assert [(name, tensors) for name, _, _, tensors, _, _ in parameters] == [
        (f"net.{layer}.{of}", "1") for layer in range(4) for of in ("weight", "bias")
    ]


def test_counts_what_does_not_fit_in_max_rows(tmp_path, capsys):
    summary = ParamGroupSummary(fold=False, max_rows=3)
    parameters, groups = tables(printed(capsys, tmp_path, Module(), summary))
    assert len(parameters) == 4
    assert parameters[-1] == ["and 5 more rows: see max_rows", "", "", "5", "", ""]
    assert [tensors for _, tensors, *_ in groups] == ["2", "6"]
    every, _ = tables(printed(capsys, tmp_path, Module(blocks=60), ParamGroupSummary(False, -1)))
    assert len(every) == 240
    first, _ = tables(printed(capsys, tmp_path, Module(blocks=60), ParamGroupSummary(False)))
    assert len(first) == 101


def test_parameters_in_no_optimizer_come_first_with_a_warning_and_frozen_ones_are_counted(tmp_path, capsys):
    def build(module):
        module.net[0].requires_grad_(False)
        return build_optimizer(nn.ModuleList([module.net[1]]), LARS, lr=0.5)

    message = (
        r"4 parameters with requires_grad=True in no optimizer, among them \['net.2.weight', 'net.2.bias'"
    )
    with pytest.warns(UserWarning, match=message):
        out = printed(capsys, tmp_path, Module(build))
    parameters, groups = tables(out)
    assert [(name, group) for name, _, _, _, group, _ in parameters] == [
        ("net.2.weight", "(in no optimizer)"),
        ("net.2.bias", "(in no optimizer)"),
        ("net.3.{weight,bias}", "(in no optimizer)"),
        ("net.1.{weight,bias}", "excluded"),
    ]
    assert groups[1:] == [
        ["(in no optimizer)", "4", "28", "-", "-", "-"],
        ["(frozen)", "2", "20", "-", "-", "-"],
    ]


def test_says_where_the_rule_differs_from_param_groups(tmp_path, capsys):
    def build(module):
        return build_optimizer(module, LAMB, exclude=["net.2.weight"], exclude_norm=False)

    parameters, _ = tables(printed(capsys, tmp_path, Module(build), ParamGroupSummary(fold=False)))
    why = {name: (group, why) for name, _, _, _, group, why in parameters}
    assert why["net.0.weight"] == ("adapted", "")
    assert why["net.2.weight"] == ("excluded", "own rule")
    assert why["net.1.weight"] == ("adapted", "own rule")
    assert why["net.0.bias"] == ("excluded", "bias")


def test_any_optimizer_with_any_groups_is_shown_as_it_is(tmp_path, capsys):
    def build(module):
        module.net[2].requires_grad_(False)
        stranger = torch.zeros(2, 3, requires_grad=True)
        one = {"params": module.net[:2].parameters(), "lr": torch.tensor(0.25)}
        two = {"params": [*module.net[2:].parameters(), stranger], "weight_decay": 0.5}
        return SGD([one, two], lr=0.1)

    parameters, groups = tables(printed(capsys, tmp_path, Module(build), ParamGroupSummary(fold=False)))
    assert parameters[0] == ["net.0.weight", "Linear", "(4, 4)", "1", "pg1", "-"]
    assert parameters[4] == ["net.2.weight", "Linear", "(4, 4)", "1", "pg2", "- (frozen)"]
    assert parameters[-1] == ["(no name)", "not of the module", "(2, 3)", "1", "pg2", "-"]
    assert groups == [["pg1", "4", "28", "-", "0", "0.25"], ["pg2", "5", "34", "-", "0.5", "0.1"]]


def test_several_optimizers_have_names_of_their_own(tmp_path, capsys):
    def build(module):
        parts = [SGD(module.net[0].parameters(), lr=0.1), SGD(module.net[1].parameters(), lr=0.2)]
        return [*parts, build_optimizer(module.net[2:], LARS, lr=0.3)]

    out = printed(capsys, tmp_path, Manual(build))
    assert out.startswith("Parameter groups of SGD, SGD, LARS\n")
    _, groups = tables(out)
    assert [(name, lr) for name, *_, lr in groups] == [
        ("SGD/pg1", "0.1"),
        ("SGD-1/pg1", "0.2"),
        ("LARS/adapted", "0.3"),
        ("LARS/excluded", "0.3"),
    ]


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.filterwarnings("ignore:4 parameters with requires_grad=True in no optimizer")
def test_a_module_without_an_optimizer_has_none(tmp_path, capsys):
    out = printed(capsys, tmp_path, Module(lambda module: None, blocks=1), max_steps=-1)
    assert out.startswith("Parameter groups of no optimizer\n")


def test_groups_of_one_name_are_distinguished(tmp_path, capsys):
    def build(module):
        halves = (module.net[:2], module.net[2:])
        groups = [{"params": half.parameters(), "name": "half", "lr": i + 1} for i, half in enumerate(halves)]
        return Adam(groups)

    _, groups = tables(printed(capsys, tmp_path, Module(build)))
    assert [(name, tensors, lr) for name, tensors, *_, lr in groups] == [
        ("half", "4", "1"),
        ("half (2)", "4", "2"),
    ]


@pytest.mark.parametrize("first", [True, False])
def test_shows_groups_after_they_are_regrouped(tmp_path, capsys, first):
    callbacks = [ParamGroupSummary(), ExcludeNormAndBias()]
    bare = Module(lambda module: LARS(module.parameters(), lr=0.5))
    out = printed(capsys, tmp_path, bare, *(callbacks if first else reversed(callbacks)))
    parameters, _ = tables(out)
    assert {(group, why) for *_, group, why in parameters} == {
        ("adapted", ""),
        ("excluded", "bias"),
        ("excluded", "NormBase"),
    }


def test_shows_the_values_of_a_checkpoint(tmp_path, capsys):
    made = trainer(tmp_path)
    made.fit(Module(partial(build_optimizer, optimizer=LARS, lr=0.125)))
    made.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(tmp_path, max_epochs=2, callbacks=[ParamGroupSummary()])
    again.fit(Module(), ckpt_path=tmp_path / "a.ckpt")
    _, groups = tables(capsys.readouterr().out)
    assert [lr for *_, lr in groups] == ["0.125", "0.125"]


def test_a_lazy_parameter_has_no_shape(tmp_path, capsys):
    class Lazy(Manual):
        def __init__(self):
            super().__init__(lambda module: SGD(module.parameters(), lr=0.1))
            self.net = nn.LazyLinear(3)

    parameters, groups = tables(printed(capsys, tmp_path, Lazy()))
    assert parameters == [["net.{weight,bias}", "LazyLinear", "lazy", "2", "pg1", "-"]]
    assert groups[0][2] == "0"


LONG = "a_name_that_is_much_longer_than_half_of_the_width_of_a_terminal_that_has_eighty_columns"


class Long(Module):
    def __init__(self):
        super().__init__()
        self.net.add_module(LONG, nn.Linear(4, 2))


def test_a_file_gets_every_name_in_one_piece_and_no_escape_codes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = printed(capsys, tmp_path, Long())
    assert f"│ net.{LONG}.weight │ Linear " in out
    assert "\x1b" not in out
    assert len({len(line) for line in out.split("┓\n")[1].splitlines()[:5]}) == 1


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_gets_every_name_on_as_many_lines_as_it_needs(tmp_path, monkeypatch, width):
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=True, width=width)
    monkeypatch.setattr(rich, "_console", console)
    trainer(tmp_path, max_steps=1, callbacks=[ParamGroupSummary()]).fit(Long())
    out = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    assert out != file.getvalue()
    assert max(map(len, out.splitlines())) <= width
    parameters, _ = tables(out)
    column = "".join(name for name, *_ in parameters)
    assert f"net.{LONG}.weight" in column.replace(" ", "")
    assert ["Linear (4, 4)", "", "", ""] in parameters
    assert "…" not in out


def test_an_ascii_file_gets_ascii(tmp_path, monkeypatch):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(rich, "_console", rich.console.Console(file=file))
    trainer(tmp_path, max_steps=1, callbacks=[ParamGroupSummary()]).fit(Module())
    file.flush()
    assert b"| net.[0,2].weight" in raw.getvalue()


@pytest.mark.parametrize("root", [lightning.pytorch, pytorch_lightning])
def test_prints_in_the_trainers_of_both_packages_barebones(capsys, root):
    module = type("Module", (Plain, root.LightningModule), {})()
    module.log = lambda *_: None
    root.Trainer(barebones=True, max_steps=1, accelerator="cpu", callbacks=[ParamGroupSummary()]).fit(module)
    assert capsys.readouterr().out.count("Parameter groups of LARS") == 1


def test_prints_in_a_development_run(tmp_path, capsys):
    assert "Parameter groups of LARS" in printed(capsys, tmp_path, boring(), fast_dev_run=True, max_steps=-1)


def test_is_named_in_yaml(tmp_path, capsys):
    summary = {
        "class_path": f"{ParamGroupSummary.__module__}.ParamGroupSummary",
        "init_args": {"max_rows": 2},
    }
    options = {"max_steps": 1, "logger": False, "accelerator": "cpu", "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path)}
    (tmp_path / "config.yaml").write_text(
        json.dumps({"trainer": {**options, **quiet, "callbacks": [summary]}})
    )
    LightningCLI(
        Boring,
        args=["fit", f"--config={tmp_path / 'config.yaml'}"],
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=False,
    )
    parameters, _ = tables(capsys.readouterr().out)
    assert len(parameters) == 3


@pytest.mark.parametrize("max_rows", [0, -2, 1.5, True])
def test_a_number_of_rows_that_is_none_raises(max_rows):
    message = f"max_rows must be an integer above 0, or -1 for all, got {max_rows!r}"
    with pytest.raises(ValueError, match=message):
        ParamGroupSummary(max_rows=max_rows)


def test_fold_is_true_or_false():
    with pytest.raises(ValueError, match="fold must be True or False, got 3"):
        ParamGroupSummary(fold=3)


@pytest.mark.distributed
def test_one_of_two_ranks_prints_whole_shapes(tmp_path):
    first, second = on_ranks(2, group_summary.printed, tmp_path)
    assert second == ""
    found = tables(first)
    assert len(found) == 2 * len(group_summary.RUNS)
    for parameters, groups in zip(found[::2], found[1::2], strict=True):
        assert parameters == [
            ["lost", parameters[0][1], "(3,)", "1", "(in no optimizer)", ""],
            ["net.gate", "Gated", "(5,)", "1", "excluded", "gain"],
            ["net.0.weight", "Linear", "(7, 4)", "1", "adapted", ""],
            ["net.0.bias", "Linear", "(7,)", "1", "excluded", "bias"],
            ["net.1.{weight,bias}", "LayerNorm", "(7,)", "2", "excluded", "LayerNorm"],
            ["net.2.weight", "Linear", "(5, 7)", "1", "adapted", ""],
            ["net.2.bias", "Linear", "(5,)", "1", "excluded", "bias"],
        ]
        assert [row[:3] for row in groups] == [
            ["adapted", "2", "63"],
            ["excluded", "5", "31"],
            ["(in no optimizer)", "1", "3"],
        ]


class Lamb(Adam):
    """Another package's, which adapts every layer, whatever the groups say."""


@pytest.mark.parametrize("optimizer", [Lamb, Adam, partial(SGD, lr=0.1)])
@pytest.mark.parametrize("split", ["callback", "build_optimizer"])
def test_the_adaptation_of_an_optimizer_that_does_not_read_the_key_is_its_own(
    tmp_path, capsys, optimizer, split
):
    if split == "callback":
        build, callbacks = lambda module: optimizer(module.parameters()), [ExcludeNormAndBias()]
    else:
        build, callbacks = lambda module: build_optimizer(module, optimizer), []
    out = printed(capsys, tmp_path, Module(build), *callbacks, ParamGroupSummary())
    _, groups = tables(out)
    assert [(name, adaptation) for name, _, _, adaptation, *_ in groups] == [
        ("adapted", "-"),
        ("excluded", "-"),
    ]
    kind = getattr(optimizer, "func", optimizer).__name__
    (said,) = [line for line in out.splitlines() if line.startswith(f"{kind} does not read layer_adaptation")]
    assert said.endswith("whether a layer is adapted is the optimizer's own rule.")


def test_beside_another_optimizer_lars_shows_its_adaptation(tmp_path, capsys):
    def build(module):
        return [build_optimizer(module.net[:2], LARS), build_optimizer(module.net[2:], Lamb)]

    out = printed(capsys, tmp_path, Manual(build))
    _, groups = tables(out)
    assert [(name, adaptation) for name, _, _, adaptation, *_ in groups] == [
        ("LARS/adapted", "yes"),
        ("LARS/excluded", "no"),
        ("Lamb/adapted", "-"),
        ("Lamb/excluded", "-"),
    ]
    assert "\nLamb does not read layer_adaptation" in out


def test_an_optimizer_that_all_groups_of_another_hold_shows_what_it_reads(tmp_path, capsys):
    class Around(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step(closure)

    out = printed(capsys, tmp_path, Module(lambda module: Around(build_optimizer(module, LARS, lr=0.5))))
    _, groups = tables(out)
    assert [adaptation for _, _, _, adaptation, *_ in groups] == ["yes", "no"]
    assert "does not read" not in out


def test_an_optimizer_whose_groups_nobody_split_is_not_said_to_ignore_them(tmp_path, capsys):
    out = printed(capsys, tmp_path, Module(lambda module: Adam(module.parameters())))
    assert "layer_adaptation" not in out
