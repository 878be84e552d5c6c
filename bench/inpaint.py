"""How well a preset goes on with the first half of held-out recordings, by strength of inpainting.

python bench/inpaint.py --data digits-synth --clips 32 --out bench/results/inpaint

Each clip is cut at its 30th frame and gone on with several times, guided to its own label. A row
a setting: the energy score of the continuations against the recording's own, lowest for the true
conditional distribution (Gneiting and Raftery 2007; rms distances of normalised Mels), over the
four frames after the seam and over all, with standard errors over clips, and those of the
difference from the first strength; the step across the seam and the next one; and the denoiser's
squared residual at sigma 0.3 around the seam over that everywhere. The recordings' come first.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastscore import Pipeline
from fastscore.data import load_mels
from fastscore.files import write_bytes
from fastscore.inpaint import Inpainting, prefix_mask
from fastscore.measure import provenance
from fastscore.noise import NoiseSource
from fastscore.samplers import SAMPLERS, Guidance, initial_state, schedule_for

SEAM = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of recordings; its validation split")
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--draws", type=int, default=4, help="continuations a clip")
    parser.add_argument("--samplers", nargs="+", default=["dpmpp_2m_sde"])
    parser.add_argument("--nfes", type=int, nargs="+", default=[30])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--out", type=Path, help="folder for inpaint.json")
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.preset)
    recorded, labels = _recordings(pipe, args.data, args.clips)
    rows = [{"setting": "recordings", **_seam(pipe, recorded)}]
    print(json.dumps(rows[0]), flush=True)
    for name in args.samplers:
        for nfe in args.nfes:
            plain = None
            for strength in args.strengths:
                drawn = _continue(pipe, recorded, labels, args.draws, name, nfe, strength)
                scores = _scores(drawn, recorded)
                plain = scores if plain is None else plain
                row = {"sampler": name, "nfe": nfe, "strength": strength}
                row |= _summary(scores, plain) | _seam(pipe, drawn.flatten(0, 1))
                rows.append(row)
                print(json.dumps(row), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        found = {"rows": rows, "clips": args.clips, "draws": args.draws, "seam": SEAM}
        found["machine"] = provenance.machine(pipe.device)
        write_bytes(args.out / "inpaint.json", (json.dumps(found, indent=1) + "\n").encode())


def _recordings(pipe: Pipeline, folder: str, count: int) -> tuple[Tensor, Tensor]:
    """Normalised Mels [C, 1, n_mels, frames] and labels [C] of clips spread over the split."""
    mels = load_mels(
        folder, "validation", pipe.labels, pipe.mel_config, pipe.frames, progress=False
    )
    chosen = torch.linspace(0, len(mels) - 1, count).long()
    space = pipe.denoiser.space
    x = (torch.from_numpy(mels.mels[chosen.numpy()]).float() - space.mean) / space.std
    return x[:, None], torch.from_numpy(mels.label_ids[chosen.numpy()])


@torch.no_grad()
def _continue(
    pipe: Pipeline,
    recorded: Tensor,
    labels: Tensor,
    draws: int,
    name: str,
    nfe: int,
    strength: float,
) -> Tensor:
    """Continuations [C, draws, 1, n_mels, frames]; one noise a draw, whatever the setting."""
    defaults, spec = pipe.defaults, SAMPLERS[name]
    sigmas = schedule_for(
        spec,
        nfe,
        pipe.denoiser.sigma_range,
        sigma_min=defaults.sigma_min,
        sigma_max=defaults.sigma_max,
    )
    mask = prefix_mask(SEAM, recorded.shape[2:])
    found = []
    for i, (known, label) in enumerate(zip(recorded, labels.tolist(), strict=True)):
        noise = NoiseSource([i] * draws, range(draws))
        drawn = Inpainting(known[None], mask, strength).sample(
            spec.run,
            pipe.denoiser,
            initial_state(noise, (draws, *known.shape), sigmas[0]),
            sigmas,
            noise=noise,
            guidance=Guidance(
                torch.full((draws,), label),
                defaults.guidance,
                defaults.guidance_interval or (0.0, math.inf),
            ),
            **(defaults.sampler_options if name == defaults.sampler else {}),
        )
        found.append(drawn.x)
    return torch.stack(found)


def _scores(drawn: Tensor, recorded: Tensor) -> Tensor:
    """Energy scores [2, C]: of the four frames after the seam, and of all."""
    draws = drawn.shape[1]
    scores = []
    for part in (slice(SEAM, SEAM + 4), slice(SEAM, None)):
        x, truth = drawn[..., part], recorded[:, None][..., part]
        far = (x - truth).square().mean((-3, -2, -1)).sqrt().mean(1)
        apart = (x[:, :, None] - x[:, None]).square().mean((-3, -2, -1)).sqrt().sum((1, 2))
        scores.append(far - 0.5 * apart / (draws * (draws - 1)))
    return torch.stack(scores)


def _summary(scores: Tensor, plain: Tensor) -> dict[str, list[float]]:
    def stated(values: Tensor) -> list[float]:
        return [round(float(v), 4) for v in (values.mean(), values.std() / len(values) ** 0.5)]

    return {
        "near": stated(scores[0]),
        "all": stated(scores[1]),
        "near_gain": stated(scores[0] - plain[0]),
        "all_gain": stated(scores[1] - plain[1]),
    }


@torch.no_grad()
def _seam(pipe: Pipeline, x: Tensor) -> dict[str, Any]:
    """Mean steps across the seam and after it, and the residual around it over that everywhere."""
    steps = [float((x[..., i] - x[..., i - 1]).abs().mean()) for i in (SEAM, SEAM + 1)]
    noise, level = NoiseSource(range(len(x))), torch.full((1,), 0.3)
    residual = torch.cat(
        [
            pipe.denoiser(noisy[None], level) - clean[None]
            for noisy, clean in zip(x + 0.3 * noise(0, x.shape), x, strict=True)
        ]
    ).square()
    share = residual[..., SEAM - 2 : SEAM + 2].mean() / residual.mean()
    return {"steps": [round(s, 3) for s in steps], "residual": round(float(share), 2)}


if __name__ == "__main__":
    main()
