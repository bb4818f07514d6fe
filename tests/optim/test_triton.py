"""The kernels in Triton compile for GPUs, with wide loads, also where there is none; and their table."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from lightning_lars import LAMB, LARS
from lightning_lars.optim.backends import choice, triton_table
from lightning_lars.optim.backends.triton_table import CHUNK, LayerTables
from tests.support.layers import groups, layers, values, walk

pytest.importorskip("triton", minversion="3.3", reason="there is no triton for this system")
triton_trial = pytest.importorskip("lightning_lars.optim.backends.triton_trial")
WORKERS = Path(__file__).parents[1] / "workers"


def run_compiled(worker, *arguments):
    """What a worker prints, in a process in which the interpreter does not take the place of the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(WORKERS.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    command = [sys.executable, WORKERS / worker, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.timeout(180)  # nothing may be in Triton's cache
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "kernels", "number"), [(80, "all", 36), (90, "few", 27)])
def test_every_kernel_compiles_for_a_gpu_and_moves_4_elements_at_a_time(capability, kernels, number):
    compiled = run_compiled("compile_kernels.py", str(capability), kernels)
    assert len(compiled) == number
    for name, (instructions, size) in compiled.items():
        assert size > 0
        if name != "count" and "ratio" not in name:
            reads = 1 if "squares" in name else 2
            in_half = "bf16" in name  # two elements in each of two registers
            assert instructions["ld.global.v2" if in_half else "ld.global.v4"] >= reads, name
            # For what does not begin at a multiple of 16 bytes.
            assert instructions["ld.global.b32"] + instructions["ld.global.b16"] >= reads, name
        if "move" in name or "apply" in name:
            assert instructions["st.global.v2" if in_half else "st.global.v4"] >= 1, name


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_kernels_that_are_launched_again_get_the_arguments_that_triton_gave_them():
    launched = run_compiled("launches.py")
    of_gradients = ["gradient_squares", "gradient_norms"] * 2  # of both groups, for max_grad_norm
    assert launched["lars"]["launches"] == [*of_gradients, "walk", "adapt", "walk", "walk"]
    assert launched["lamb"]["launches"] == ["walk", "adapt", "walk", "walk", "count"]
    assert all(each["repeated"] and not each["differ"] for each in launched.values())
    # Triton compiles an int into the kernel, which would not see a later learning rate.
    floats = launched["floats"]["arguments"]
    assert launched["ints"]["arguments"] == launched["of NumPy"]["arguments"] == floats


def test_the_table_has_an_address_for_every_layer_and_a_chunk_for_every_part_of_one():
    layers = [torch.ones(3), torch.ones(2 * CHUNK), torch.ones(0), torch.ones(CHUNK + 1)]
    grads = [torch.ones_like(layer) for layer in layers]
    table = LayerTables().table((layers, grads), ([0, 1, 0, 1],))
    pointers = [[t.data_ptr() for t in tensors] for tensors in (layers, grads)]
    assert table.columns.tolist() == [*pointers, [0, 1, 0, 1]]
    assert table.chunked.sizes.tolist() == [3, 2 * CHUNK, 0, CHUNK + 1]
    assert table.chunked.layer_of_chunk.tolist() == [0, 1, 1, 3, 3]
    assert table.chunked.offset_of_chunk.tolist() == [0, 0, CHUNK, 0, CHUNK]
    assert table.chunked.first_chunk.tolist() == [0, 1, 3, 3, 5]
    assert (table.layers, table.chunks, table.chunked.most_chunks) == (4, 5, 2)


def step(tables, *tensors):
    """The tables of a step, one for each list of lists."""
    tables.start_step()
    return [tables.table(of_layers) for of_layers in tensors]


def test_a_table_is_made_again_only_where_an_address_has_changed():
    layers, grads = [torch.ones(3)], [torch.ones(3)]
    tables = LayerTables()
    (first,) = step(tables, (layers, grads))
    (again,) = step(tables, (layers, grads))
    assert again.columns is first.columns
    (other,) = step(tables, (layers, [torch.ones(3)]))
    assert other.columns is not first.columns
    assert other.columns[1].item() != grads[0].data_ptr()
    assert other.chunked is first.chunked


def test_two_optimizers_share_no_table_as_they_may_step_on_two_streams():
    layers = ([torch.ones(3)], [torch.ones(3)])
    one, other = (step(LayerTables(), layers)[0] for _ in range(2))
    mine = {tensor.data_ptr() for tensor in (one.columns, *one.chunked[:-1])}
    assert mine.isdisjoint(tensor.data_ptr() for tensor in (other.columns, *other.chunked[:-1]))


def test_only_the_tables_of_the_last_step_are_kept():
    layers = [torch.ones(3) for _ in range(20)]
    tables, made = LayerTables(), []
    for number in range(20):
        some = layers[number:] + layers[: number // 2]
        made += map(weakref.ref, (step(tables, (some, some))[0].columns, step(tables, (layers,))[0].columns))
    gc.collect()
    assert sum(table() is not None for table in made) == 1


class Capture:
    """What the tables know of a CUDA graph: that one is being captured."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def __enter__(self):
        self.monkeypatch.setattr(triton_table, "is_capturing", lambda device: True)

    def __exit__(self, *args):
        self.monkeypatch.undo()


def test_a_table_that_a_graph_reads_is_kept_whatever_comes_after(monkeypatch):
    layers, grads, state = ([torch.ones(3)] for _ in range(3))
    tables = LayerTables()
    (warm,) = step(tables, (layers, grads, state))
    with Capture(monkeypatch):
        (captured,) = step(tables, (layers, grads, state))
    assert captured.columns is warm.columns
    kept = [weakref.ref(tensor) for tensor in (captured.columns, captured.chunked.sizes, *state)]
    del warm, captured, state
    step(tables, (layers, [torch.ones(3)], [torch.ones(3)]))
    step(tables)
    tables.forget()
    gc.collect()
    assert all(tensor() is not None for tensor in kept)
    del tables
    gc.collect()
    assert all(tensor() is None for tensor in kept)


def test_a_table_that_is_copied_in_each_replay_is_read_by_no_other_step(monkeypatch):
    layers, grads = [torch.ones(3)], [torch.ones(3)]
    tables = LayerTables()
    step(tables, (layers, [torch.ones(3)]))
    captured = []
    for _ in range(2):
        with Capture(monkeypatch):
            captured += step(tables, (layers, grads))
    captured += step(tables, (layers, grads))
    assert len({table.columns.data_ptr() for table in captured}) == 3


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_loading_a_state_dict_keeps_what_a_graph_reads(optimizer_class, monkeypatch):
    params = layers()
    if torch.cuda.is_available():
        params = {name: torch.nn.Parameter(p.detach().cuda()) for name, p in params.items()}
    else:
        monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})
    optimizer = optimizer_class(groups(params), fused=True)
    walk(optimizer, [0])
    with monkeypatch.context() as capture:
        capture.setattr(triton_table, "is_capturing", lambda device: True)
        optimizer.step()
    read = [made[0].columns for made in optimizer._tables._captured.values()]
    assert len(read) == 2
    kept = list(map(weakref.ref, read))
    del read
    optimizer.load_state_dict(optimizer.state_dict())
    walk(optimizer, [1])
    assert all(table() is not None for table in kept)


BROKEN = """
import warnings
import torch
from lightning_lars import LARS
from lightning_lars.optim.backends import choice

choice.TRITON_DEVICES.add("cpu")  # where Triton, without its interpreter, has no driver
w = torch.nn.Parameter(torch.ones(3))
w.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = LARS([w], lr=1.0)
    optimizer.step()
    optimizer.step()
print([str(warning.message) for warning in caught])
print(w.tolist() != [1.0, 1.0, 1.0])
try:
    LARS([w], lr=1.0, fused=True).step()
except RuntimeError as error:
    print(error)
"""


def test_where_triton_cannot_launch_a_step_is_unfused_with_a_warning():
    compiles = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if torch.cuda.is_available():
        pytest.skip("Triton has a driver here")
    run = subprocess.run(
        [sys.executable, "-c", BROKEN], capture_output=True, text=True, check=False, env=compiles
    )
    assert run.returncode == 0, run.stderr
    warned, has_moved, error = run.stdout.splitlines()
    assert warned.count("triton cannot launch a kernel on cpu") == 1
    assert "0 active drivers" in warned
    assert "unfused" in warned
    assert has_moved == "True"
    assert error.startswith("fused=True, but triton cannot launch a kernel on cpu")


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_without_a_c_compiler_a_step_is_unfused_with_a_warning(optimizer_class, monkeypatch):
    def launch(device, dtype):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(choice, "TRITON_DEVICES", {"cpu"})
    monkeypatch.setattr(triton_trial, "launch", launch)
    caches = (choice.trial_launch_failure, choice.warn_of_triton_failure)
    for cached in caches:
        cached.cache_clear()
    try:
        params = layers()
        optimizer = optimizer_class(groups(params))
        with pytest.warns(UserWarning, match="Failed to find C compiler") as warned:
            walk(optimizer, [0, 1])
        assert len(warned) == 1
        single = layers()
        walk(optimizer_class(groups(single), fused=False), [0, 1])
        torch.testing.assert_close(values(params), values(single), rtol=0.0, atol=0.0)
        with pytest.raises(RuntimeError, match=r"fused=True, but triton cannot .* C compiler"):
            walk(optimizer_class(groups(layers()), fused=True), [0])
    finally:
        for cached in caches:
            cached.cache_clear()
