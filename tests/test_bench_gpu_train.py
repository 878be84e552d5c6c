"""Trainings in a GPU's minutes, here on small networks: planned, stopped, gone on with, kept."""

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speech_folders import write_clip

from fastscore.checkpoint import load_checkpoint, weights_hash
from fastscore.config import DIGITS
from fastscore.presets import read_classifier
from fastscore.train.state import read_state

ROOT = Path(__file__).parents[1]
PARTS = ("classifier", "score", "unet-equal-trainable", "unet-equal-total", "vocoder")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Ten labels of three speakers, one a split."""
    root = tmp_path_factory.mktemp("clips")
    for label in DIGITS:
        for speaker in "abc":
            write_clip(root / label / f"{speaker}_nohash_0.wav", 0.8)
    for name, speaker in (("validation_list.txt", "b"), ("testing_list.txt", "c")):
        (root / name).write_text("".join(f"{w}/{speaker}_nohash_0.wav\n" for w in DIGITS))
    return root


@pytest.fixture
def train(bench, clips, monkeypatch, tmp_path):
    """The program, called with further arguments; the rows and status of its result."""
    program = bench("gpu_train")

    def call(part, run, *arguments, device="cpu"):
        out = tmp_path / f"{run.name}.json"
        command = [part, "--data", str(clips), "--run", str(run), "--out", str(out)]
        command += ["--device", device, "--dry", "--cache-dir", str(tmp_path / "cache"), *arguments]
        monkeypatch.setattr(sys, "argv", ["gpu_train.py", *command])
        program.main()
        return json.loads(out.read_text())

    return call


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_trains_and_exports(train, tmp_path, part, device):
    values = train(part, tmp_path / "run", device=device)
    row = values["rows"]["training"]
    assert (values["status"], row["steps"], row["finished"]) == ("ok", 6, True)
    assert row["clips_per_second"] > 0
    assert row["losses"]
    assert row["precision"] == ("32-true" if device == "cpu" else "bf16-mixed")
    assert row["validation"]
    kind = part.partition("-")[0]
    assert load_checkpoint(tmp_path / "run" / f"{kind}.safetensors").kind == kind
    assert values["rows"]["plan"]["seconds"]["step"] > 0


def test_a_training_of_several_calls_equals_one_of_one(bench, train, tmp_path):
    recipes = bench("gpu_recipes")
    timed = recipes.Timed(1.0, 0.1, 1.0, 0.1)
    plan = recipes.Plan("unet-equal-trainable", True, 6, 1.0, 3.0, timed)
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
        recipes.write_plan(tmp_path / name / "plan.json", plan)
    whole = train(plan.part, tmp_path / "one")
    # less than what is kept for the end of a call: one step is taken
    steps = [
        train(plan.part, tmp_path / "several", "--minutes", "0.05")["rows"]["training"]["steps"]
        for _ in range(2)
    ]
    assert steps == [1, 2]
    assert json.loads((tmp_path / "several.json").read_text())["status"] == "partial"
    last = train(plan.part, tmp_path / "several")
    assert (last["status"], last["rows"]["training"]["sessions"]) == ("ok", 3)
    one, several = (tmp_path / name / "unet.safetensors" for name in ("one", "several"))
    assert one.read_bytes() == several.read_bytes()
    assert last["rows"]["training"]["losses"] == whole["rows"]["training"]["losses"]


def test_score_is_trained_over_the_classifier_as_it_is_kept(bench, train, tmp_path):
    artifacts = bench("artifacts")
    train("classifier", tmp_path / "first")
    export = tmp_path / "first" / "classifier.safetensors"
    with pytest.raises(ValueError, match="not as it will be kept"):
        train("score", tmp_path / "refused", "--classifier", str(export))
    assert not (tmp_path / "refused").exists()
    artifacts.keep(export, "classifier-dry", tmp_path / "kept")
    joined = artifacts.join(
        "classifier-dry", tmp_path / "classifier.safetensors", tmp_path / "kept"
    )
    train("score", tmp_path / "second", "--classifier", str(joined))
    stored = load_checkpoint(tmp_path / "second" / "score.safetensors", "score")
    assert stored.config["classifier_hash"] == weights_hash(read_classifier(joined).model)


def test_the_plan_of_another_training_is_refused(train, tmp_path):
    train("unet-equal-total", tmp_path / "run", "--steps", "2")
    assert read_state(tmp_path / "run" / "state.ckpt")["step"] == 2
    with pytest.raises(ValueError, match="plan of a dry run of unet-equal-total"):
        train("vocoder", tmp_path / "run")
    plan = tmp_path / "run" / "plan.json"
    plan.write_text("{}")
    with pytest.raises(ValueError, match="is not the plan of a training"):
        train("unet-equal-total", tmp_path / "run")
    plan.unlink()
    with pytest.raises(ValueError, match="a training without a plan"):
        train("unet-equal-total", tmp_path / "run")


def test_what_is_missing_is_said_before_anything_starts(bench, clips, tmp_path, monkeypatch):
    program = bench("gpu_train")
    program.check_packages()
    with pytest.raises(ValueError, match=r"^no_such_package .* cannot be imported here; c"):
        program.check_packages(("json", "no_such_package"))
    # it is there, and what it stands on is not
    (tmp_path / "half_a_package.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"half_a_package \(No module named 'no_such_package'\)"):
        program.check_packages(("half_a_package",))
    command = [sys.executable, ROOT / "bench" / "gpu_train.py", "score", "--data", clips]
    command += ["--run", tmp_path / "run", "--out", tmp_path / "run.json", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("gpu_train: score is trained over a classifier: --classifier FILE")
    assert not (tmp_path / "run").exists()


seconds = st.floats(0.001, 20.0)


@given(seconds, seconds, seconds, seconds, st.floats(1.0, 10.0), st.integers(1, 4), seconds)
def test_what_is_planned_fits_the_calls(start, step, validation, save, one, calls, trial):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        recipes = importlib.import_module("gpu_recipes")
    timed = recipes.Timed(start, step, validation, save)
    total, spent = one * calls, start + trial
    fixed = spent + (calls - 1) * start + calls * (validation + save + recipes.MARGIN)
    fixed += recipes.VALIDATIONS * validation
    plan = None
    with contextlib.suppress(ValueError):
        plan = recipes.choose("score", False, timed, (one, total), spent, None)
    if plan is None:
        assert 60 * total - fixed < 2 * step + save * total
        return
    assert plan.steps >= 1
    # all steps, validations, starts and ends are over in time, and few seconds are left unused
    taken = fixed + plan.steps * step
    assert taken <= 60 * total
    validations = plan.steps // plan.validate_every
    assert validations <= recipes.VALIDATIONS
    assert taken + 0.04 * 60 * total + 2 * step + save * total > 60 * total
    fewer = recipes.choose("score", False, timed, (one, total), spent, 1)
    assert fewer.steps == 1


def test_too_few_minutes_are_said(bench):
    recipes = bench("gpu_recipes")
    timed = recipes.Timed(30.0, 0.1, 5.0, 1.0)
    with pytest.raises(ValueError, match=r"of 1 minutes in 1 calls .* leave 0 s, .* give more"):
        recipes.choose("score", False, timed, (1.0, 1.0), 45.0, None)


def test_recipes_are_those_of_the_published_size(bench, clips, tmp_path):
    program, recipes = bench("gpu_train"), bench("gpu_recipes")
    sizes = {"classifier": 7.9e6, "unet-equal-trainable": 4.4e6, "unet-equal-total": 12.3e6}
    for part, size in sizes.items():
        args = program.argparse.Namespace(
            part=part, dry=False, data=[clips], run=tmp_path, device="cuda", compile=False,
            classifier=None if part == "classifier" else preset_classifier(),
            cache_dir=tmp_path / "cache",
        )  # fmt: skip
        task, loop = recipes.build(args, 1000, 100)
        (module,) = task.trained.values()
        assert sum(p.numel() for p in module.parameters()) == pytest.approx(size, rel=0.05)
        assert (loop.batch_size, loop.precision, loop.steps) == (256, "bf16-mixed", 1000)


def preset_classifier():
    return ROOT / "fastscore" / "presets" / "digits" / "classifier.safetensors"
