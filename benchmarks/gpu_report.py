"""The tables of ``docs/performance.md``, from the JSON lines of ``python -m benchmarks.on_gpu``."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Fact = Mapping[str, Any]

FLOORS = {"LARS": "SGD fused", "LAMB": "AdamW fused"}
MODELS = {"resnet50": "ResNet-50", "bert-large": "BERT-large", "tiny": "10,000 layers"}
# Read and written for each float32 parameter, in two passes where there are norms.
BYTES = {"LARS": 28, "LAMB": 40}

COLUMNS = (
    "Layers",
    "dtype",
    "Optimizer",
    "Graph",
    "Fused SGD, AdamW",
    "Ratio",
    "Of a copy",
    "Clipped",
    "Unfused",
    "Eager",
    "Fused SGD, AdamW, eager",
    "Host",
    "timm, eager",
)
"""Times of a step in milliseconds: replays of a CUDA graph, but for the last four."""


def read(path: Path) -> list[Fact]:
    """Return the facts of a session, in the order in which they became known."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(facts: Iterable[Fact]) -> str:
    """Return what was measured, in Markdown: the device, the times of steps, and what the checks found."""
    facts = list(facts)
    copy = next((fact["copy_GBs"] for fact in facts if "copy_GBs" in fact), None)
    return "\n\n".join(filter(None, (_device(facts, copy), _times(facts, copy), _checks(facts))))


def _device(facts: list[Fact], copy: float | None) -> str:
    session = facts[0]
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
        _ms(time(f"{optimizer} single")),
        _ms(time(fused, "eager_ms")),
        _ms(time(floor, "eager_ms")),
        _ms(None if host is None else host / 1e3),
        _ms(time(f"timm {optimizer}, foreach", "eager_ms")),
    ]


def _ms(time: float | None) -> str:
    return "" if time is None else f"{time:.3f}" if time < 1 else f"{time:.2f}"


def _checks(facts: list[Fact]) -> str:
    rows = []
    for fact in facts:
        if "waits" in fact:
            waits = "never waits" if fact["waits"] is False else f"waits: {fact['waits']}"
            off = fact.get("graph_off")
            replay = f"off by {off:.1e}" if isinstance(off, float) else f"not captured: {off}"
            rows.append(f"- `{fact['optimizer']}` {fact['options']}: {waits}; replays of a graph {replay}")
        if "off_single_operations" in fact:
            dtype, off = fact["dtype"].removeprefix("torch."), fact["off_single_operations"]
            rows.append(f"- `{fact['optimizer']}`, {dtype}: off the unfused step by {off:.1e}")
    return "\n".join(rows)
