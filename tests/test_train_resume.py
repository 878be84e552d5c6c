"""A training that was killed or stopped continues to the same bits, and no other is continued."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import train_tasks
from train_tasks import CONFIG, Deconvolve, assert_same_training, read_state

from fastscore.train.launch import sole_writer
from fastscore.train.loop import run
from fastscore.train.state import previous_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run(Deconvolve(), CONFIG, out)
    return out


class TestResume:
    def test_killed_without_warning_continues_to_the_same_bits(self, uninterrupted, tmp_path):
        command = [sys.executable, train_tasks.__file__, str(tmp_path)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "state.ckpt").exists() or read_state(tmp_path)["step"] < 6:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert 6 <= read_state(tmp_path)["step"] < CONFIG.steps
        # a line written after the state, as the killed process may have left
        with (tmp_path / "metrics.csv").open("a") as file:
            file.write(f"{CONFIG.steps},1,1,1,1,1")
        record = run(Deconvolve(), CONFIG, tmp_path)
        assert record["sessions"] == 2
        assert_same_training(tmp_path, uninterrupted)
        assert not list(tmp_path.glob(".*.ckpt"))

    @pytest.mark.parametrize(
        ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
    )
    def test_a_stop_signal_finishes_the_step_and_saves(
        self, uninterrupted, tmp_path, number, raised
    ):
        class Stopped(Deconvolve):
            def batch(self, step, rng, rank, world):
                if step == 12:
                    os.kill(os.getpid(), number)
                return super().batch(step, rng, rank, world)

        with pytest.raises(raised) as error:
            run(Stopped(), CONFIG, tmp_path)
        if raised is SystemExit:
            assert error.value.code == 143
        assert read_state(tmp_path)["step"] == 13
        run(Deconvolve(), CONFIG, tmp_path)
        assert_same_training(tmp_path, uninterrupted)

    def test_time_that_is_up_finishes_the_step_and_saves(self, uninterrupted, tmp_path):
        # a time that has come already leaves one step a call
        for step in range(1, 4):
            record = run(Deconvolve(), CONFIG, tmp_path, until=time.monotonic())
            assert (record["steps"], record["finished"]) == (step, False)
            assert record == json.loads((tmp_path / "run.json").read_text())
            assert read_state(tmp_path)["step"] == step
        assert run(Deconvolve(), CONFIG, tmp_path, until=time.monotonic() + 600)["finished"]
        assert_same_training(tmp_path, uninterrupted)

    def test_a_finished_training_is_not_trained_again(self, uninterrupted, tmp_path):
        class Untouchable(Deconvolve):
            def batch(self, *_):
                raise AssertionError("trained again")

        before = json.loads((uninterrupted / "run.json").read_text())
        (uninterrupted / "deconvolve.safetensors").rename(tmp_path / "kept")
        assert run(Untouchable(), CONFIG, uninterrupted) == before
        exported = uninterrupted / "deconvolve.safetensors"
        assert exported.read_bytes() == (tmp_path / "kept").read_bytes()

    def test_a_damaged_state_gives_way_to_the_one_before(self, uninterrupted, tmp_path):
        config = replace(CONFIG, checkpoint_minutes=1e-9)
        run(Deconvolve(), config, tmp_path)
        state, previous = tmp_path / "state.ckpt", previous_path(tmp_path / "state.ckpt")
        state.write_bytes(state.read_bytes()[:-100])
        with pytest.warns(UserWarning, match=r"state\.ckpt is not a readable .* at step 23$"):
            run(Deconvolve(), config, tmp_path)
        assert_same_training(tmp_path, uninterrupted)
        assert (tmp_path / "state.damaged.ckpt").exists()
        # killed between the two renames of a write
        state.unlink()
        run(Deconvolve(), config, tmp_path)
        assert_same_training(tmp_path, uninterrupted)
        for path in (state, previous):
            path.write_bytes(b"PK")
        with pytest.raises(ValueError, match=r"previous\.ckpt is not a readable .*delete it"):
            run(Deconvolve(), config, tmp_path)

    def test_a_state_that_would_execute_code_is_refused(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "executed"),))

        torch.save({"format": "fastscore training state", "x": Evil()}, tmp_path / "state.ckpt")
        with pytest.raises(ValueError, match="not a readable training state"):
            run(Deconvolve(), CONFIG, tmp_path)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lr": 1e-4}, r"loop\.lr was 0\.003 and is now 0\.0001"),
            ({"seed": 4}, r"loop\.seed was 3 and is now 4"),
            ({"steps": 48}, r"loop\.steps was 24 and is now 48; the learning-rate schedule"),
        ],
    )
    def test_other_settings_are_refused_by_name(self, uninterrupted, changes, message):
        with pytest.raises(ValueError, match=message):
            run(Deconvolve(), replace(CONFIG, **changes), uninterrupted)

    def test_another_task_is_refused_by_name(self, uninterrupted):
        task = Deconvolve()
        task.config = task.config | {"width": 16}
        with pytest.raises(ValueError, match=r"task_config\.width was 8 and is now 16"):
            run(task, CONFIG, uninterrupted)
        task.name = "reverberate"
        with pytest.raises(ValueError, match="task was 'deconvolve' and is now 'reverberate'"):
            run(task, CONFIG, uninterrupted)

    def test_a_configuration_that_json_cannot_hold_is_refused_at_once(self, tmp_path):
        task = Deconvolve()
        task.config = {"path": tmp_path}
        with pytest.raises(ValueError, match=r"'deconvolve' is not JSON-ready: .*PosixPath"):
            run(task, CONFIG, tmp_path)

    def test_a_state_of_another_version_is_left_alone(self, uninterrupted, tmp_path):
        state = read_state(uninterrupted) | {"version": 2}
        torch.save(state, tmp_path / "state.ckpt")
        torch.save(state | {"version": 1}, tmp_path / "state.previous.ckpt")
        with pytest.raises(ValueError, match="training-state version 2, this fastscore reads 1"):
            run(Deconvolve(), CONFIG, tmp_path)
        assert (tmp_path / "state.ckpt").exists()

    def test_starting_over_in_a_used_folder_is_refused(self, uninterrupted):
        with pytest.raises(ValueError, match="already holds a training at step 24"):
            run(Deconvolve(), CONFIG, uninterrupted, resume=False)

    def test_extending_and_free_settings_must_be_permitted(self, tmp_path):
        run(Deconvolve(), replace(CONFIG, steps=6), tmp_path)
        longer = replace(CONFIG, steps=10, log_every=2, validate_every=3, checkpoint_minutes=1)
        assert run(Deconvolve(), longer, tmp_path, extend=True)["steps"] == 10
        with pytest.raises(ValueError, match="at step 10, beyond steps 6"):
            run(Deconvolve(), replace(CONFIG, steps=6), tmp_path, extend=True)

    def test_two_trainings_cannot_share_a_folder(self, tmp_path):
        with sole_writer(tmp_path), pytest.raises(ValueError, match="another training is writing"):
            run(Deconvolve(), CONFIG, tmp_path)
