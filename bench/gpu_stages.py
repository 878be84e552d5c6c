"""The stages of the GPU campaign: their commands, their limits, and the calls they are grouped in.

bench/gpu_runner.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where and how stages run."""

    work: Path
    out: Path
    dry: bool
    data: tuple[str, ...] = ()
    jobs: int = 12

    @property
    def results(self) -> Path:
        """Folder of results and logs."""
        return self.work / "results"

    @property
    def device(self) -> str:
        """A dry run needs no GPU."""
        return "cpu" if self.dry else "cuda"


# (place, result file, minutes) to the arguments after "python"
Command = Callable[[Place, Path, float], list[str]]


# place to further commands
Commands = Callable[[Place], list[list[str]]]


@dataclass(frozen=True)
class Planned:
    """A stage: at most so many minutes, the command, what it needs made first, and what follows.

    ``environment`` is set in a dry run. ``before`` and ``after`` are short; what follows does so
    where all before it went well.
    """

    name: str
    minutes: float
    command: Command
    environment: dict[str, str] = field(default_factory=dict)
    before: Commands = lambda place: []
    after: Commands = lambda place: []


def script(path: str, *words: str, **dry_environment: str) -> tuple[Command, dict[str, str]]:
    """A script that takes the common arguments of `stage.parser`."""

    def command(place: Place, result: Path, minutes: float) -> list[str]:
        common = ["--out", str(result), "--device", place.device, "--minutes", f"{minutes:.2f}"]
        given = [w.format(jobs=place.jobs) for w in words]
        return [f"bench/{path}", *given, *common, *(["--dry"] if place.dry else [])]

    return command, dry_environment


def steps(batch: int, *options: str) -> Command:
    """Rows of `fastscore bench step` at one batch size, the baselines treated alike."""

    def command(place: Place, result: Path, minutes: float) -> list[str]:
        words = ["-m", "fastscore", "bench", "step", "--out", str(result), "--quiet"]
        words += ["--device", place.device, *options]
        if place.dry:
            only = [f"step/digits/b{min(batch, 8)}/guided/reference"]
            words += ["--rounds", "2"]
        else:
            only = [f"step/*paper*/b{batch}/guided/{way}" for way in WAYS]
            only += [f"step/*paper*/b{batch}/unguided/triton/{way}" for way in UNGUIDED]
        return words + [w for pattern in only for w in ("--only", pattern)]

    return command


def costs(place: Place, result: Path, minutes: float) -> list[str]:
    """Parameters, memory and joules of ScoreSubnet and the baselines."""
    parts = ["static"] if place.dry else ["static", "memory", "energy"]
    size = "tiny" if place.dry else "paper"
    words = ["bench/headline.py", "--size", size, "--device", place.device, "--out", str(result)]
    return [*words, "--part", *parts]


def training(part: str, minutes: float) -> Planned:
    """`bench/gpu_train.py` of one part, whose run folder goes on where it is; weights come back.

    Score networks are trained over the classifier as it is kept, of this machine or of an earlier
    one.
    """
    kept, export = TRAINED[part]
    over = part not in ("classifier", "vocoder")

    def command(place: Place, result: Path, minutes: float) -> list[str]:
        words, _ = script("gpu_train.py", part, "--run", str(place.work / "train" / part))
        found = [*words(place, result, minutes), "--data", *place.data]
        if over and not place.dry:
            found += ["--classifier", str(_classifier(place))]
        return found

    def join(place: Place) -> list[list[str]]:
        if not over or place.dry or _classifier(place).is_file():
            return []
        return [
            ["bench/artifacts.py", "join", "classifier-paper", "--out", str(_classifier(place))]
        ]

    def keep(place: Place) -> list[list[str]]:
        # networks of a dry run are too small to be kept under that name
        if place.dry:
            return []
        words = ["bench/artifacts.py", "keep", str(place.work / "train" / part / export)]
        # beside the others for the quality stage, and where they are fetched
        return [[*words, "--as", kept], [*words, "--as", kept, "--out", str(place.out)]]

    return Planned(f"train-{part}", minutes, command, before=join, after=keep)


def _classifier(place: Place) -> Path:
    return place.work / "train" / "classifier.safetensors"


def quality(place: Place, result: Path, minutes: float) -> list[str]:
    """How the trained models of the published size sound against evaluations."""
    size = "tiny" if place.dry else "paper"
    words = ["bench/headline_quality.py", "--size", size, "--device", place.device]
    words += ["--out", str(result.with_suffix(".jsonl")), "--minutes", f"{minutes:.2f}"]
    words += ["--dry"] if place.dry else ["--precision", "bf16"]
    # speechmos is not everywhere: clips for it go along
    words += ["--keep-waves", str(place.results / "waves")]
    return [*words, "--data", *place.data]


# compilation takes half a minute a row: guided ones only
WAYS = (
    *("reference", "reference/compile", "reference/graphs"),
    *("triton/graphs", "triton/graphs/bf16", "triton/compiled-graphs/bf16"),
)
UNGUIDED = ("graphs", "graphs/bf16")
# part of a training to the name its weights are kept by, and the file that it exports
TRAINED = {
    "classifier": ("classifier-paper", "classifier.safetensors"),
    "score": ("score-paper", "score.safetensors"),
    "unet-equal-total": ("unet-equal-total-paper", "unet.safetensors"),
    "unet-equal-trainable": ("unet-equal-trainable-paper", "unet.safetensors"),
    "vocoder": ("vocoder-hifigan-v1", "vocoder.safetensors"),
}
STAGES = {
    s.name: s
    for s in (
        Planned("check", 9.0, *script("gpu_check.py", "--jobs", "{jobs}")),
        Planned("sanitize", 6.0, *script("sanitize.py")),
        Planned("step-1", 9.0, steps(1, "--time-only")),
        Planned("step-64", 6.0, steps(64)),
        Planned("step-8", 5.0, steps(8, "--time-only")),
        Planned("step-256", 6.0, steps(256, "--time-only")),
        Planned("serving", 9.0, *script("serving.py", "--energy")),
        Planned("hot", 5.0, *script("hot_kernels.py", "--ncu")),
        Planned("ops", 9.0, *script("op_race.py", TRITON_INTERPRET="1")),
        Planned("experiments", 6.0, *script("experiments.py")),
        Planned("tune", 9.0, *script("tune.py", TRITON_INTERPRET="1")),
        Planned("costs", 9.0, costs),
        training("classifier", 4.0),
        training("score", 5.0),
        *(training(f"unet-equal-{size}", 5.0) for size in ("total", "trainable")),
        training("vocoder", 9.0),
        Planned("quality", 9.0, quality),
    )
}
# calls of ten minutes in the order in which they are worth most
GROUPS = {
    "first": ("check", "sanitize"),
    "second": ("step-1", "serving"),
    "third": ("train-classifier", "train-score"),
    "fourth": ("hot", "experiments", "costs"),
    "fifth": ("ops", "step-64"),
    "sixth": ("tune",),
    "seventh": ("train-unet-equal-total", "quality"),
    "eighth": ("train-unet-equal-trainable", "step-8", "step-256"),
    "ninth": ("train-vocoder",),
    "all": tuple(STAGES),
}


def chosen(words: Sequence[str]) -> list[Planned]:
    """Stages of names and groups; ValueError for a word that is neither."""
    names = [name for word in words for name in GROUPS.get(word, (word,))]
    for name in names:
        if name not in STAGES:
            raise ValueError(
                f"{name!r} is no stage; choose from {', '.join(STAGES)}, or from the groups "
                f"{', '.join(GROUPS)}"
            )
    return [STAGES[name] for name in dict.fromkeys(names)]


def listing() -> str:
    """Stages with their limits, and the groups."""
    lines = [f"{s.name:30} at most {s.minutes:g} minutes" for s in STAGES.values()]
    return "\n".join(lines + [f"{n:30} {' '.join(g)}" for n, g in GROUPS.items()])
