"""Small real trainings that the tests of the training loop share; also run as a program."""

import atexit
import csv
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastscore.checkpoint import save_checkpoint
from fastscore.train.loop import LoopConfig, run

CONFIG = LoopConfig(
    steps=24,
    batch_size=8,
    lr=3e-3,
    warmup_steps=4,
    ema_decay=0.9,
    seed=3,
    log_every=5,
    validate_every=8,
    accelerator="cpu",
    num_threads=1,
)


class Deconvolve:
    """Undo a fixed filter: a small convolutional regression with dropout and batch statistics."""

    name = "deconvolve"
    ema = ("net",)

    def __init__(self, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(
            # a bias before normalisation has no gradient but rounding errors
            nn.Conv1d(1, 8, 5, padding=2, bias=False),
            nn.BatchNorm1d(8),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Conv1d(8, 1, 5, padding=2),
        )
        self.trained = {"net": net}
        self.config = {"width": 8, "filter": (0.5, 1.0, -0.5)}
        self.pause = pause

    def batch(self, step, rng, rank, world):
        time.sleep(self.pause)
        clean = torch.randn(8, 1, 32, generator=rng)
        kernel = torch.tensor([[self.config["filter"]]])
        return {"x": nn.functional.conv1d(clean, kernel, padding=1), "y": clean}

    def loss(self, name, modules, batch):
        error = modules["net"](batch["x"]) - batch["y"]
        return error.square().mean(), {"mae": error.abs().mean()}

    def validate(self, modules):
        batch = self.batch(0, torch.Generator().manual_seed(99), 0, 1)
        return {"mse": self.loss("net", modules, batch)[0].item()}

    def export(self, modules, path):
        save_checkpoint(path, self.name, {"width": 8}, modules["net"].state_dict())


class Adversarial:
    """A generator whose graph is carried from the discriminator's turn to its own."""

    name = "adversarial"
    ema = ("generator",)

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.trained = {
            "discriminator": nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1)),
            "generator": nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2)),
        }
        self.config = {}

    def batch(self, step, rng, rank, world):
        noise, real = torch.randn(16, 3, generator=rng), torch.randn(16, 2, generator=rng)
        return {"noise": noise, "real": 0.5 * real + 1}

    def loss(self, name, modules, batch):
        if name == "discriminator":
            batch["fake"] = modules["generator"](batch["noise"])
            real = modules["discriminator"](batch["real"])
            # no detach: keeping gradients out of the generator is the loop's task
            fake = modules["discriminator"](batch["fake"])
            return (real - 1).square().mean() + fake.square().mean(), {}
        return (modules["discriminator"](batch["fake"]) - 1).square().mean(), {}

    def validate(self, modules):
        return {}

    def export(self, modules, path):
        save_checkpoint(path, "adversarial", {}, modules["generator"].state_dict())


class Shared(Adversarial):
    """Every process takes its share of one batch that all of them could draw."""

    def batch(self, step, rng, rank, world):
        whole = super().batch(step, torch.Generator().manual_seed(step), 0, 1)
        return {name: tensor.chunk(world)[rank] for name, tensor in whole.items()}


def read_rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_state(out: Path) -> dict:
    return torch.load(out / "state.ckpt", weights_only=True)


def assert_same_bits(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same_bits(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_training(a: Path, b: Path) -> None:
    for key in ("stepper", "means", "step", "validation"):
        assert_same_bits(read_state(a)[key], read_state(b)[key], key)
    for name in ("metrics.csv", "deconvolve.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


SHARED = replace(CONFIG, steps=10, clip_norm=0.5)


def note_group_at_exit(out: Path) -> None:
    """Write down whether this process still is in its process group when the interpreter ends."""
    # registered before the training: what that registers has run by then
    name = f"group_{os.environ['RANK']}.txt"
    atexit.register(
        lambda: (out / name).write_text("in" if torch.distributed.is_initialized() else "left")
    )


if __name__ == "__main__":
    if sys.argv[2:] == ["shared"]:
        note_group_at_exit(Path(sys.argv[1]))
        run(Shared(), SHARED, Path(sys.argv[1]))
    elif sys.argv[2:] == ["short"]:
        # one process finds its time over, the other has as much as it likes
        until = time.monotonic() + (0 if os.environ["RANK"] == "1" else 3600)
        record = run(Shared(), replace(SHARED, steps=40), Path(sys.argv[1]), until=until)
        (Path(sys.argv[1]) / f"record_{os.environ['RANK']}.json").write_text(json.dumps(record))
    else:
        run(Deconvolve(pause=0.05), replace(CONFIG, checkpoint_minutes=1e-9), Path(sys.argv[1]))
