"""docs/results.md and its plots, from the JSON in bench/results: one command, nothing by hand.

    python bench/results_page.py [--results bench/results] [--out docs] [--readme README.md]

A figure that is not there is named with its reason; under each table stands the command that
measured it, and on what.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_page
import results_plots
from contestants import BASELINES, CONTESTANTS, OURS, TITLES
from headline import row_name
from headline_quality import NFES, alike, read
from headline_training import reached
from page_parts import NOT_HERE, source, table

from fastscore.files import write_bytes

ROOT = Path(__file__).resolve().parents[1]
ROWS = [(c, g) for c in CONTESTANTS for g in (False, True)]


def load(path: Path) -> dict[str, Any]:
    """A result file, empty where there is none; ValueError where it is not JSON."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); measure it again") from None


def title(contestant: str, guided: bool) -> str:
    name = TITLES[contestant]
    if contestant == OURS:
        return f"**{name}**, {'guided' if guided else 'unguided'}"
    return f"{name}{' + classifier, guided' if guided else ', unguided'}"


def versus(value: float, ours: float) -> str:
    """How a baseline's figure compares with ScoreSubnet's of the same kind."""
    return f" ({value / ours:.2f}x)"


def compared(
    rows: dict[str, Any], pick: Callable[[dict[str, Any]], float | None], show: Callable
) -> dict[tuple[str, bool], str]:
    """A column: each row's figure, baselines with their ratio to ScoreSubnet's."""
    cells = {}
    for contestant, guided in ROWS:
        row, ours = (rows.get(row_name(c, guided)) for c in (contestant, OURS))
        value = None if row is None else pick(row)
        cell = NOT_HERE if value is None else show(value)
        if contestant != OURS and value is not None and ours is not None and pick(ours):
            cell += versus(value, pick(ours))
        cells[contestant, guided] = cell
    return cells


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


def peak_of(batch: int) -> Callable[[dict[str, Any]], float | None]:
    def pick(row: dict[str, Any]) -> float | None:
        one = row.get(str(batch), {})
        return one["weights"]["total"] + one["tensor_peak"] if "tensor_peak" in one else None

    return pick


def training_peak(row: dict[str, Any]) -> float | None:
    return row.get("training", {}).get("total")


def costs_table(costs: dict[str, Any]) -> str:
    """Parameters, multiply-accumulates and memory of all rows."""
    static = costs.get("static", {}).get("rows", {})
    memory = costs.get("memory", {}).get("rows", {})
    size = costs.get("size", "tiny")
    published = costs.get("published", {}) if size == "paper" else {}
    columns = [
        ("trainable, M", compared(static, lambda r: r["trainable"], lambda v: f"{v / 1e6:.2f}")),
        ("total, M", compared(static, lambda r: r["parameters"], lambda v: f"{v / 1e6:.2f}")),
        ("GMACs a step", compared(static, lambda r: r["macs"], lambda v: f"{v / 1e9:.3f}")),
    ]
    for batch in (1, 64):
        columns.append((f"peak MB, batch {batch}", compared(memory, peak_of(batch), megabytes)))
    training = compared(memory, training_peak, megabytes)
    columns.append(("peak MB, training", {k: "" if k[1] else v for k, v in training.items()}))
    head = ["", *(name for name, _ in columns)]
    if published:
        head.append("published: M, GMACs")
    rows = []
    for key in ROWS:
        row = [title(*key), *(column[key] for _, column in columns)]
        if published:
            kind = "guided" if key[1] else "unguided"
            row.append(
                f"{published['trainable'] / 1e6:g} / {published['total'] / 1e6:g}, "
                f"{published[kind] / 1e9:g}"
                if key[0] == OURS
                else ""
            )
        rows.append(row)
    return table(head, rows)


def times_table(costs: dict[str, Any]) -> str:
    """Step latency, clips a second and energy."""
    measured = costs.get("time", {}).get("rows", {})
    energy = costs.get("energy", {}).get("rows", {})
    head, columns = [""], []
    for name, part in measured.items():
        kind, _, batch = name.partition("/b")
        for mode in ("eager", "engine"):
            head.append(
                f"step, batch {batch}, {mode}, ms"
                if kind == "step"
                else f"clips/s, batch {batch}, {mode}"
            )
            columns.append((kind, int(batch), mode, part["rows"]))
    reasons = {energy[n]["none"] for n in energy if "none" in energy[n]}
    head.append("J a clip")
    rows = []
    for contestant, guided in ROWS:
        name = row_name(contestant, guided)
        row = [title(contestant, guided)]
        for kind, batch, mode, found in columns:
            time, ours = (
                found[f"{row_name(c, guided)}/{mode}"]["median"] for c in (contestant, OURS)
            )
            value, first = (time * 1e3, ours * 1e3)
            if kind == "draw":
                value, first = batch / time, batch / ours
            cell = f"{value:.1f}"
            row.append(cell + ("" if contestant == OURS else versus(value, first)))
        figure = energy.get(name, {})
        row.append(f"{figure['joules'] / figure['clips']:.3g}" if "joules" in figure else "none")
        rows.append(row)
    if not columns:
        return f"Latency: {NOT_HERE}."
    notes = f"\n\n{spread_note(measured)}"
    notes += "".join(f"\n\nEnergy: no figure, since {reason}." for reason in sorted(reasons))
    return table(head, rows) + notes


def spread_note(measured: dict[str, Any]) -> str:
    """What the figures are, and how far rounds lie apart."""
    rows = [row for part in measured.values() for row in part["rows"].values()]
    widest = max((r["p80"] - r["p20"]) / r["median"] for r in rows)
    return (
        "Medians over rounds in turn; from the 20th to the 80th percentile they span at most "
        f"{100 * widest:.0f} %. Clips are log-Mels of 12 evaluations, all guided where a row is, "
        "drawn by the engine; the vocoder, the same for all, is left out. Eager: PyTorch's own "
        "operations; engine: fused kernels and prepared weights, for every row alike."
    )


def training_table(curves: dict[str, Any], steps: dict[str, Any]) -> str:
    """Seconds to the loss that all of them reached, and their final losses."""
    if not curves:
        return f"Training: {NOT_HERE}."
    target = max(c["loss"][-1] for c in curves.values())
    times = steps.get("rows", {})
    rows = []
    for name in CONTESTANTS:
        if name not in curves:
            rows.append([TITLES[name], *[NOT_HERE] * 4])
            continue
        c = curves[name]
        at = reached(c["steps"], c["loss"], target)
        step = times.get(name, {}).get("median")
        rows.append(
            [
                TITLES[name],
                f"{c['loss'][-1]:.4f}",
                NOT_HERE if step is None else f"{1e3 * step:.0f}",
                "never" if at is None else f"{at:.0f}",
                NOT_HERE if None in (at, step) else f"{at * step:.0f}",
            ]
        )
    head = ["", "final loss", "ms a step", f"steps to {target:.4f}", f"seconds to {target:.4f}"]
    return table(head, rows)


def quality_table(rows: list[dict[str, Any]], guided: bool) -> str:
    """Share right, Frechet distance and DNSMOS against evaluations."""
    found = {(r["contestant"], r["nfe"]): r for r in rows if r["guided"] == guided}
    lines = []
    for contestant in CONTESTANTS:
        for what, show in (
            (
                "right, %",
                lambda r: "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in r["right"])),
            ),
            ("Frechet", lambda r: "{:.1f} [{:.1f}, {:.1f}]".format(*r["frechet"])),
            ("DNSMOS", lambda r: "{:.2f} ± {:.2f}".format(*r["dnsmos"]["ovrl"])),
        ):
            cells = [found.get((contestant, nfe)) for nfe in NFES]
            if what == "DNSMOS":
                cells = [c if c is None or c["dnsmos"] else None for c in cells]
            lines.append(
                [TITLES[contestant], what, *(NOT_HERE if c is None else show(c) for c in cells)]
            )
    return table(["", "", *(f"{n} evaluations" for n in NFES)], lines)


def verdict(costs: dict[str, Any], guided: bool) -> str:
    """In words who needs less, at this size."""
    sentences = []
    static = costs.get("static", {}).get("rows", {})
    memory = costs.get("memory", {}).get("rows", {})
    for baseline in BASELINES:
        ours, theirs = (row_name(c, guided) for c in (OURS, baseline))
        parts = []
        if ours in static:
            parts.append(("multiply-accumulates", static[ours]["macs"] / static[theirs]["macs"]))
        for batch in (1, 64):
            pick = peak_of(batch)
            pair = [pick(memory[n]) if n in memory else None for n in (ours, theirs)]
            if None not in pair:
                parts.append((f"peak memory at batch {batch}", pair[0] / pair[1]))
        if parts:
            kind = "guided" if guided else "unguided"
            said = ", ".join(f"{ratio:.2f} times the {what}" for what, ratio in parts)
            sentences.append(f"- ScoreSubnet, {kind}, against {TITLES[baseline]}: {said}.")
    return "\n".join(sentences)


def resolution_note(costs: dict[str, Any]) -> str:
    """What the baselines would need on single bins, as U-Nets are often built."""
    full, static = costs.get("full_resolution", {}), costs.get("static", {}).get("rows", {})
    said = [
        f"{title(*key)} {full[row_name(*key)] / 1e9:.3g} ("
        f"{full[row_name(*key)] / static[row_name(OURS, key[1])]['macs']:.2f}x)"
        for key in ROWS
        if row_name(*key) in full and static
    ]
    return (
        "The same U-Nets on single Mel bins instead of 2 x 2 patches, GMACs a step: "
        + "; ".join(said)
        + "."
        if said
        else ""
    )


def size_section(results: Path, size: str, device: str) -> list[str]:
    costs = load(results / "headline" / f"costs-{size}-{device}.json")
    if not costs:
        return [f"`{size}` on {device}: {NOT_HERE}."]
    parts = [
        costs_table(costs),
        source(costs.get("static", {}), timed=False),
        resolution_note(costs),
        source(costs.get("memory", {}), timed=False),
        verdict(costs, True),
        verdict(costs, False),
        times_table(costs),
        source(costs.get("time", {})),
    ]
    return [p for p in parts if p]


def quality_section(quality: list[dict[str, Any]], options: str) -> list[str]:
    """Quality against evaluations, guided and not, and the command that measures it."""
    seeds = sorted({r["seed"] for r in quality})
    missing = 2 * len(CONTESTANTS) * len(NFES) - len(quality)
    command = f"`python bench/headline_quality.py{options} --data digits-human digits-synth`"
    if missing > 0:
        command += f"; it goes on with the {missing} rows that were not measured for want of time."
    return [
        "### How they sound",
        "Guided: the share that a recogniser, which took no part in training, hears as the digit "
        "meant. 95 % intervals; n = 500, DNSMOS of 100 clips; seed "
        + ", ".join(map(str, seeds))
        + ". Sampler, levels, strength and noise are the shipped preset's, chosen on ScoreSubnet.",
        quality_table(quality, True),
        "Unguided: the share in which some digit is heard with confidence.",
        quality_table(quality, False),
        command,
    ]


def paper_quality(head: Path) -> list[str]:
    """Quality of the trained networks of the published size, however their rows were drawn."""
    rows = read(head / "quality-paper.jsonl")
    if not rows:
        return ["How they sound waits for a GPU to train on: [gpu.md](gpu.md)."]
    ways = sorted({(r["vocoder"], r["device"], r["precision"]) for r in rows})
    sections = []
    for vocoder, device, precision in ways:
        setup = {"size": "paper", "vocoder": vocoder, "device": device, "precision": precision}
        options = "".join(f" --{name} {value}" for name, value in setup.items())
        sections += quality_section(alike(rows, **setup), options)
    return sections


def gpu_costs(costs: dict[str, Any]) -> list[str]:
    """Parameters, multiply-accumulates and memory as a GPU was measured to need them."""
    if not costs:
        return []
    return [costs_table(costs), source(costs.get("memory", {}), timed=False), verdict(costs, True)]


def page(results: Path, pictures: Sequence[str]) -> str:
    head = results / "headline"
    curves = load(head / "curves-tiny.json")
    steps = load(head / "training-tiny-cpu.json")
    sections = [
        "# Results: one backbone against classifier + U-Net",
        "Generated by `python bench/results_page.py` from `bench/results/`; do not edit. What is "
        "compared, how, and what the figures mean: [benchmark.md](benchmark.md), "
        "[instruments.md](instruments.md). Ratios in brackets are a row's figure over "
        "ScoreSubnet's: above 1x the baseline needs more (for clips/s: is faster).",
        "## `tiny`, on a CPU",
        *size_section(results, "tiny", "cpu"),
        "### Training to the same loss",
        training_table(curves, steps),
        "Denoising score matching at fixed noise levels on held-out clips, averaged weights; the "
        "loss that all of them reached. Steps from the trainings' records, seconds a step timed "
        "side by side. All saw the same clips, levels and noise in the same order.",
        source(steps),
        *quality_section(alike(read(head / "quality.jsonl")), ""),
        *(f"![{Path(p).stem.replace('-', ' ')}]({p})" for p in pictures),
        "## `paper`, on a CPU",
        "Random weights: costs only.",
        *size_section(results, "paper", "cpu"),
        *paper_quality(head),
        "## On a GPU",
        *gpu_page.section(results),
        *gpu_costs(gpu_page.newest(results).get("costs", {})),
        "What no GPU has run yet: `bench/results/STATUS.md`.",
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    pictures = results_plots.draw(args.results / "headline", args.out / "results")
    names = [p.relative_to(args.out).as_posix() for p in pictures]
    write_bytes(args.out / "results.md", page(args.results, names).encode())
    readme = args.readme.read_text(encoding="utf-8")
    write_bytes(args.readme, gpu_page.readme(readme, args.results).encode())
    print(args.out / "results.md")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"results_page: {error}")
