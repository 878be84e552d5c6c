"""Plots of docs/results.md, drawn from the JSON in bench/results/headline."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS, TITLES
from headline_quality import alike, read

from fastscore.files import write_bytes

# told apart by colour and by mark, also without colour vision (Okabe and Ito)
LOOKS = dict(zip(CONTESTANTS, (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^")), strict=True))


def draw(results: Path, out: Path) -> list[Path]:
    """Write the plots whose data are there; their paths."""
    found = []
    quality = alike(read(results / "quality.jsonl"))
    if quality:
        found.append(_write(_quality(quality), out / "quality.png"))
    curves = results / "curves-tiny.json"
    if curves.is_file():
        found.append(_write(_curves(json.loads(curves.read_text())), out / "training.png"))
    costs = [results / f"costs-{size}-cpu.json" for size in ("tiny", "paper")]
    costs = [json.loads(p.read_text()) for p in costs if p.is_file()]
    costs = [c for c in costs if "static" in c and "memory" in c]
    if costs:
        found.append(_write(_costs(costs), out / "costs.png"))
    return found


def _figure(columns: int, rows: int = 1) -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, layout="constrained"
    )


def _write(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    # no date, so that equal data give equal files
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
    return path


def _quality(rows: list[dict[str, Any]]) -> Any:
    """Share right and Frechet distance against evaluations, guided and not."""
    figure, axes = _figure(2, 2)
    for line, guided in enumerate((True, False)):
        for column, key in enumerate(("right", "frechet")):
            axis = axes[line][column]
            for name in CONTESTANTS:
                own = sorted(
                    (r for r in rows if r["contestant"] == name and r["guided"] == guided),
                    key=lambda r: r["nfe"],
                )
                if not own:
                    continue
                scale = 100 if key == "right" else 1
                middle, low, high = ([scale * r[key][i] for r in own] for i in range(3))
                color, mark = LOOKS[name]
                # side by side where they would lie on one another
                shift = 1 + 0.02 * (CONTESTANTS.index(name) - 1)
                axis.errorbar(
                    [r["nfe"] * shift for r in own],
                    middle,
                    yerr=[
                        [m - a for m, a in zip(middle, low, strict=True)],
                        [b - m for m, b in zip(middle, high, strict=True)],
                    ],
                    color=color,
                    marker=mark,
                    capsize=3,
                    label=TITLES[name],
                )
            axis.set_xscale("log")
            ticks = sorted({r["nfe"] for r in rows})
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
            axis.set_xlabel("evaluations")
            kind = "guided" if guided else "unguided"
            what = "heard as meant" if guided else "some digit heard"
            axis.set_ylabel(f"{what}, %" if key == "right" else "Frechet distance")
            axis.set_title(kind)
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    return figure


def _curves(curves: dict[str, Any]) -> Any:
    """Validation loss against steps."""
    figure, axes = _figure(1)
    axis = axes[0][0]
    for name in CONTESTANTS:
        if name in curves:
            color, mark = LOOKS[name]
            axis.plot(
                curves[name]["steps"],
                curves[name]["loss"],
                color=color,
                marker=mark,
                markersize=3,
                label=TITLES[name],
            )
    axis.set_yscale("log")
    axis.set_xlabel("steps of 32 clips")
    axis.set_ylabel("validation loss")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return figure


def _costs(costs: list[dict[str, Any]]) -> Any:
    """Multiply-accumulates and peak memory at batch 64, of every row."""
    figure, axes = _figure(2, len(costs))
    for line, cost in enumerate(costs):
        static, memory = cost["static"]["rows"], cost["memory"]["rows"]
        panels = (
            ("GMACs a step", {k: r["macs"] / 1e9 for k, r in static.items()}),
            (
                "peak MB at batch 64",
                {
                    k: (r["64"]["weights"]["total"] + r["64"]["tensor_peak"]) / 1e6
                    for k, r in memory.items()
                    if "tensor_peak" in r.get("64", {})
                },
            ),
        )
        for column, (what, values) in enumerate(panels):
            axis = axes[line][column]
            for place, guided in enumerate(("unguided", "guided")):
                for i, name in enumerate(CONTESTANTS):
                    value = values.get(f"{name}/{guided}")
                    if value is None:
                        continue
                    bar = axis.bar(
                        place + 0.26 * (i - 1),
                        value,
                        width=0.24,
                        color=LOOKS[name][0],
                        label=TITLES[name] if not place else None,
                    )
                    axis.bar_label(bar, fmt="%.4g", fontsize=8)
            axis.set_xticks([0, 1], ["unguided", "guided"])
            axis.set_ylabel(what)
            axis.set_title(cost["size"])
            axis.margins(y=0.12)
    axes[0][0].legend(fontsize=8)
    return figure
