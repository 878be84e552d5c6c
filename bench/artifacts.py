"""Trained weights as the repository keeps them: in shards of two bytes a number, and back.

    python bench/artifacts.py keep RUN/score.safetensors --as score-paper [--out artifacts]
    python bench/artifacts.py join score-paper --out FILE
    python bench/artifacts.py assemble paper --out FOLDER [--network scoresubnet]
        [--vocoder digits]

`keep` writes NAME-00001-of-0000N.safetensors of at most 15 MiB each, and NAME.index.json: which
tensor lies where, the SHA-256 of each shard, and the configuration that a checkpoint carries.
float32 becomes bfloat16; what an export holds in 16 bits stays as it is. `join` makes the
checkpoint again, `assemble` a preset that `fastscore sample --preset FOLDER` takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastscore.checkpoint import (
    Checkpoint,
    first_difference,
    load_checkpoint,
    save_checkpoint,
)
from fastscore.config import CLASSIFIERS, SUBNETS, UNETS, to_dict
from fastscore.files import write_bytes
from fastscore.presets import CLASSIFIER, DEFAULTS, SCORE, VOCODER, load_parts, preset_folder
from fastscore.vocoder import PRESETS as HIFIGANS

FORMAT, VERSION = "fastscore-shards", 1
MIB = 2**20
SIZE = 15 * MIB
ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"
# what a shard takes beside its numbers and the names of its tensors, at most, in bytes
_HEADER, _ENTRY = 1024, 160
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

NETWORKS = ("scoresubnet", "unet-equal-trainable", "unet-equal-total")
VOCODERS = ("digits", "hifigan-v1")
SIZES = ("paper",)
# the package's preset that vocoder and defaults come from
SHARED = "digits"


@dataclass(frozen=True)
class Known:
    """An artifact: kind of checkpoint, part of its configuration that must be, what trains it."""

    kind: str
    key: str
    config: dict[str, Any]
    part: str


KNOWN = {
    "classifier-paper": Known(
        "classifier", "classifier", to_dict(CLASSIFIERS["paper"]), "classifier"
    ),
    "score-paper": Known("score", "subnet", to_dict(SUBNETS["paper"]), "score --classifier FILE"),
    **{
        f"unet-{kind}-paper": Known(
            "unet", "unet", to_dict(UNETS[f"paper-{kind}"]), f"unet-{kind} --classifier FILE"
        )
        for kind in ("equal-trainable", "equal-total")
    },
    "vocoder-hifigan-v1": Known("vocoder", "generator", to_dict(HIFIGANS["v1"]), "vocoder"),
}


def keep(source: Path, name: str, out: Path = ARTIFACTS, size: int = SIZE) -> list[Path]:
    """Shards of a checkpoint, and its index, which is written last; their paths.

    ValueError where the checkpoint is unusable or of another network than ``name`` says, and where
    one tensor alone is larger than ``size`` bytes.
    """
    if not _PLAIN.fullmatch(name):
        raise ValueError(f"--as {name!r} must be letters, digits, '.', '_' and '-'")
    stored = load_checkpoint(source, upcast=False)
    check_kind(stored, name)
    tensors = {k: _narrow(k, t, source) for k, t in sorted(stored.tensors.items())}
    groups = _groups(tensors, size)
    out.mkdir(parents=True, exist_ok=True)
    (out / index_name(name)).unlink(missing_ok=True)
    for old in out.glob(f"{name}-?????-of-?????.safetensors"):
        old.unlink()
    shards, places, paths = {}, {}, []
    for number, names in enumerate(groups, 1):
        file = f"{name}-{number:05d}-of-{len(groups):05d}.safetensors"
        path = out / file
        save_checkpoint(path, "shard", {"of": name}, {k: tensors[k] for k in names})
        data = path.read_bytes()
        shards[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        places |= dict.fromkeys(names, file)
        paths.append(path)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "kind": stored.kind,
        "config": stored.config,
        "extra": stored.extra,
        "shards": shards,
        "tensors": places,
    }
    text = json.dumps(index, indent=1, allow_nan=False) + "\n"
    write_bytes(out / index_name(name), text.encode())
    return [*paths, out / index_name(name)]


def index_name(name: str) -> str:
    """File name of an artifact's index."""
    return f"{name}.index.json"


def check_kind(stored: Checkpoint, name: str) -> None:
    """ValueError where ``name`` is a known artifact and the checkpoint is of another network."""
    known = KNOWN.get(name)
    if known is None:
        return
    if stored.kind != known.kind:
        raise ValueError(
            f"{stored.path} holds a {stored.kind!r} model, but {name} is a {known.kind!r} model"
        )
    found, config = stored.config.get(known.key), known.config
    if known.kind == "classifier" and isinstance(found, dict):
        # any set of words
        config = config | {"labels": found.get("labels")}
    difference = first_difference(found, config)
    if difference is not None:
        where, has, wanted = difference
        raise ValueError(f"{stored.path}: {where} is {has}, but {name} has {wanted}")


def _narrow(name: str, tensor: Tensor, source: Path) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    narrow = tensor.to(torch.bfloat16)
    if bool((narrow.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"{source}: tensor {name!r} overflows bfloat16; train it anew")
    return narrow


def _groups(tensors: Mapping[str, Tensor], size: int) -> list[list[str]]:
    """Names of the tensors of each shard, in order, as many as fit."""
    groups: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        length = tensor.nbytes + len(name.encode()) + _ENTRY
        if length + _HEADER > size:
            raise ValueError(
                f"tensor {name!r} has {tensor.nbytes} bytes and does not fit a shard of {size}; "
                "ask for larger shards"
            )
        if not groups or length > room:
            groups.append([])
            room = size - _HEADER
        groups[-1].append(name)
        room -= length
    return groups


def read(name: str, folder: Path = ARTIFACTS) -> Checkpoint:
    """Checkpoint of an artifact, its tensors as they are kept.

    ValueError where index or shards are missing (with the command that trains it) or damaged.
    """
    path = folder / index_name(name)
    if not path.is_file():
        raise ValueError(f"{path.name} is not in {folder}; {remedy(name)}")
    index = _read_index(path, name)
    tensors: dict[str, Tensor] = {}
    for file, about in index["shards"].items():
        shard = folder / file
        if not shard.is_file():
            raise ValueError(f"{file} is not in {folder}; {remedy(name)}")
        data = shard.read_bytes()
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise ValueError(f"{shard} is damaged: its SHA-256 is another; fetch it again")
        part = load_checkpoint(shard, "shard", upcast=False).tensors
        tensors |= {k: t for k, t in part.items() if index["tensors"].get(k) == file}
    if set(tensors) != set(index["tensors"]):
        lost = sorted(set(index["tensors"]) - set(tensors))
        raise ValueError(f"{path}: its shards lack the tensor {lost[0]!r}; keep the weights anew")
    return Checkpoint(index["kind"], index["config"], tensors, index["extra"], path)


def _read_index(path: Path, name: str) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        good = index["format"] == FORMAT and index["version"] == VERSION
        good = good and all(
            _PLAIN.fullmatch(file) and file.startswith(name) and isinstance(about["sha256"], str)
            for file, about in index["shards"].items()
        )
        good = good and set(index["tensors"].values()) == set(index["shards"])
        good = good and isinstance(index["kind"], str) and isinstance(index["config"], dict)
        good = good and isinstance(index["extra"], dict)
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{path} is not the index of an artifact, or is damaged; fetch it again")
    return index


def remedy(name: str) -> str:
    """Which command trains an artifact."""
    known = KNOWN.get(name)
    if known is None:
        return f"known are {', '.join(KNOWN)}"
    return (
        f"fetch the whole repository, or train it: python bench/gpu_train.py {known.part} --data "
        "ROOTS --run RUN --out RUN.json, then python bench/artifacts.py keep "
        f"RUN/{known.kind}.safetensors --as {name}"
    )


def join(name: str, out: Path, folder: Path = ARTIFACTS) -> Path:
    """Write the checkpoint of an artifact as one file, as `fastscore.checkpoint` reads it."""
    stored = read(name, folder)
    check_kind(stored, name)
    save_checkpoint(out, stored.kind, stored.config, stored.tensors, stored.extra)
    return out


def assemble(
    size: str,
    out: Path,
    network: str = NETWORKS[0],
    vocoder: str = VOCODERS[0],
    folder: Path = ARTIFACTS,
) -> Path:
    """A preset folder of a size's artifacts, its parts checked to belong together.

    Defaults, and the vocoder where it is ``digits``, are those of the package's preset. ValueError
    where weights are missing, damaged, or not made for each other.
    """
    if size not in SIZES or network not in NETWORKS or vocoder not in VOCODERS:
        raise ValueError(
            f"{size}, {network}, {vocoder}: sizes are {', '.join(SIZES)}; networks "
            f"{', '.join(NETWORKS)}; vocoders {', '.join(VOCODERS)}"
        )
    scored = f"score-{size}" if network == NETWORKS[0] else f"{network}-{size}"
    # all of them are looked for before anything is written
    names = {CLASSIFIER: f"classifier-{size}", SCORE: scored}
    if vocoder != SHARED:
        names[VOCODER] = f"vocoder-{vocoder}"
    stored = {file: read(name, folder) for file, name in names.items()}
    out.mkdir(parents=True, exist_ok=True)
    for file, one in stored.items():
        check_kind(one, names[file])
        save_checkpoint(out / file, one.kind, one.config, one.tensors, one.extra)
    shared = preset_folder(SHARED)
    for file in (DEFAULTS, VOCODER):
        if file not in stored:
            shutil.copyfile(shared / file, out / file)
    load_parts(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("keep", help="write the shards of a checkpoint")
    one.add_argument("source", type=Path, metavar="FILE")
    one.add_argument("--as", dest="name", required=True, metavar="NAME")
    one.add_argument("--out", type=Path, default=ARTIFACTS, metavar="FOLDER")
    one.add_argument("--size", type=float, default=SIZE / MIB, metavar="MIB", help="of a shard")
    two = commands.add_parser("join", help="write the checkpoint of an artifact")
    two.add_argument("name", metavar="NAME")
    two.add_argument("--out", type=Path, required=True, metavar="FILE")
    three = commands.add_parser("assemble", help="put a preset together")
    three.add_argument("size", choices=SIZES)
    three.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    three.add_argument("--network", choices=NETWORKS, default=NETWORKS[0])
    three.add_argument("--vocoder", choices=VOCODERS, default=VOCODERS[0])
    for command in (two, three):
        command.add_argument("--artifacts", type=Path, default=ARTIFACTS, metavar="FOLDER")
    args = parser.parse_args()
    try:
        if args.command == "keep":
            found = keep(args.source, args.name, args.out, int(args.size * MIB))
            print("\n".join(map(str, found)))
        elif args.command == "join":
            print(join(args.name, args.out, args.artifacts))
        else:
            print(assemble(args.size, args.out, args.network, args.vocoder, args.artifacts))
    except (ValueError, OSError) as error:
        sys.exit(f"artifacts: {error}")


if __name__ == "__main__":
    main()
