"""The tables of ``docs/performance.md``, from the JSON lines of ``python -m benchmarks.on_gpu``."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Fact = Mapping[str, Any]

FLOORS = {"LARS": "SGD fused", "LAMB": "AdamW fused"}
MODELS = {"resnet50": "ResNet-50", "bert-large": "BERT-large", "tiny": "10,000 layers"}
# Bytes read and written per float32 parameter, in two passes.
BYTES = {"LARS": 28, "LAMB": 40}

COLUMNS = (
    "Layers",
    "dtype",
    "Optimizer",
    "Graph",
    "Fused SGD, AdamW",
    "Ratio",
    "Of copy",
    "Clipped",
    "8-bit",
    "Unfused",
    "Eager",
    "Fused SGD, AdamW, eager",
    "Host",
    "timm, eager",
)
"""Times of a step in milliseconds: replays of a CUDA graph, except in the last four columns."""


def read(path: Path) -> list[Fact]:
    """Return the measurements of a session, in the order in which they were recorded."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(facts: Iterable[Fact]) -> str:
    """Return the results in Markdown: device, step times, checks, and the sweep of constants."""
    facts = list(facts)
    copy = next((fact["copy_GBs"] for fact in facts if "copy_GBs" in fact), None)
    return "\n\n".join(
        filter(None, (_device(facts, copy), _times(facts, copy), _checks(facts), _sweep(facts)))
    )


def _device(facts: list[Fact], copy: float | None) -> str:
    session = next(fact for fact in facts if "device" in fact)
    versions = f"Python {session['python']}, torch {session['torch']}, triton {session['triton']}"
    bandwidth = "" if copy is None else f"; a copy moves {copy:,} GB/s"
    return f"{session['device']}, {versions}, at commit {session['commit']}{bandwidth}."


def _times(facts: list[Fact], copy: float | None) -> str:
    times: dict[tuple[str, str], dict[str, Fact]] = {}
    for fact in facts:
        if fact["phase"] == "times" and "eager_ms" in fact:
            times.setdefault((fact["model"], fact["dtype"]), {})[fact["optimizer"]] = fact
    rows = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{'|'.join(['---'] * 3 + ['---:'] * (len(COLUMNS) - 3))}|",
    ]
    for (model, dtype), steps in times.items():
        for optimizer, floor in FLOORS.items():
            if f"{optimizer} fused" in steps:
                cells = [MODELS.get(model, model), dtype, optimizer, *_cells(steps, optimizer, floor, copy)]
                rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) if times else ""


def _cells(steps: Mapping[str, Fact], optimizer: str, floor: str, copy: float | None) -> list[str]:
    def time(name: str, key: str = "graph_ms") -> float | None:
        return steps.get(name, {}).get(key)

    fused = f"{optimizer} fused"
    graph, of_floor = time(fused), time(floor)
    host = time(fused, "host_us")
    ratio = share = ""
    if graph is not None and of_floor is not None:
        ratio = f"{graph / of_floor:.2f}"
    if graph is not None and copy is not None and steps[fused]["dtype"] == "float32":
        share = f"{100 * BYTES[optimizer] * steps[fused]['M'] / graph / copy:.0f} %"
    return [
        _ms(graph),
        _ms(of_floor),
        ratio,
        share,
        _ms(time(f"{fused}, clipped")),
        _ms(time(f"{optimizer} 8-bit")),
        _ms(time(f"{optimizer} unfused")),
        _ms(time(fused, "eager_ms")),
        _ms(time(floor, "eager_ms")),
        _ms(None if host is None else host / 1e3),
        _ms(time(f"timm {optimizer}", "eager_ms")),
    ]


def _ms(time: float | None) -> str:
    return "" if time is None else f"{time:.3f}" if time < 1 else f"{time:.2f}"


def _checks(facts: list[Fact]) -> str:
    rows = []
    for fact in facts:
        if "off_unfused" in fact:
            off = f"off the unfused steps by {fact['off_unfused']:.1e}"
            rows.append(f"- `{fact['optimizer']}`, {fact['dtype']}: {off}")
        if "waits" in fact:
            arguments = ", ".join(f"{key}={value!r}" for key, value in fact["options"].items())
            waits = "never synchronizes" if fact["waits"] is False else f"synchronizes: {fact['waits']}"
            off = (_off(fact, "graph_off", "of a step"), _off(fact, "iteration_off", "of an iteration"))
            rows.append(f"- `{fact['optimizer']}({arguments})`: {'; '.join(filter(None, (waits, *off)))}")
        if "memcheck" in fact:
            rows.append(f"- compute-sanitizer: {fact['memcheck'] or 'found nothing'}")
        if "tests" in fact:
            rows.append(f"- tests: {' '.join([*fact['last'], *fact['failed']])}")
        if fact.get("code"):
            rows.append(f"- {fact['phase']} ended after {fact['seconds']} seconds with {fact['code']}")
    return "\n".join(rows)


def _off(fact: Fact, key: str, of: str) -> str:
    if key not in fact:
        return ""
    off = fact[key]
    return f"replays {of} are off by {off:.1e}" if isinstance(off, float) else f"no graph {of}: {off}"


def _sweep(facts: list[Fact]) -> str:
    swept = [fact for fact in facts if fact["phase"] == "sweep" and "graph_ms" in fact]
    runs = list(dict.fromkeys((fact["model"], fact["optimizer"], fact["dtype"]) for fact in swept))
    constants = list(dict.fromkeys((fact["chunk"], fact["block"], fact["warps"]) for fact in swept))
    rows = ["| Chunk | Block | Warps |" + "".join(f" {' '.join(run)} |" for run in runs)]
    rows.append("|---:" * (3 + len(runs)) + "|")
    for chunk, block, warps in constants:
        of_run = {
            (fact["model"], fact["optimizer"], fact["dtype"]): fact["graph_ms"]
            for fact in swept
            if (fact["chunk"], fact["block"], fact["warps"]) == (chunk, block, warps)
        }
        times = "".join(f" {of_run.get(run, '')} |" for run in runs)
        rows.append(f"| {chunk:,} | {block:,} | {warps} |{times}")
    return "\n".join(rows) if swept else ""
