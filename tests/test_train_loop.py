"""The training loop equals a plain one, in every precision and over several processes."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import train_tasks
from torch import nn
from train_tasks import CONFIG, SHARED, Adversarial, Deconvolve, Shared, read_rows, read_state

from fastscore.checkpoint import load_checkpoint, load_into
from fastscore.train import step as step_module
from fastscore.train.ema import decay_at
from fastscore.train.launch import cpu_settings, gpu_settings, stream_seed
from fastscore.train.loop import DivergenceError, learning_rate, run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run(Deconvolve(), CONFIG, out)
    return out


class TestSchedule:
    def test_warms_up_linearly_then_falls_along_a_cosine(self):
        config = replace(CONFIG, steps=104, warmup_steps=4, lr=1.0, final_lr_ratio=0.1)
        rates = [learning_rate(config, step) for step in range(105)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4] == 1.0
        assert rates[54] == pytest.approx(0.55)
        assert rates[104] == pytest.approx(0.1)
        assert all(a > b for a, b in pairwise(rates[4:]))

    def test_average_starts_warm(self):
        assert decay_at(0, 0.999) == pytest.approx(0.1)
        assert decay_at(90, 0.999) == pytest.approx(0.91)
        assert decay_at(10**6, 0.999) == 0.999

    def test_no_two_streams_share_a_seed(self):
        places = [(s, t, r, p) for s in range(9) for t in range(99) for r in (0, 1) for p in "ab"]
        assert len({stream_seed(*place) for place in places}) == len(places)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("steps", 0),
            ("lr", 0.0),
            ("warmup_steps", -1),
            ("ema_decay", 1.0),
            ("clip_norm", 0.0),
            ("betas", (0.9, 1.0)),
            ("precision", "fp8"),
            ("accelerator", "tpu"),
            ("num_threads", 0),
            ("final_lr_ratio", 1.5),
            ("checkpoint_minutes", 0.0),
        ],
    )
    def test_settings_out_of_range_are_named(self, field, value):
        with pytest.raises(ValueError, match=rf"LoopConfig: {field} .* must be"):
            replace(CONFIG, **{field: value})


class TestTraining:
    def test_equals_a_loop_written_by_hand(self, uninterrupted):
        task = Deconvolve()
        net = task.trained["net"]
        decayed = [p for p in net.parameters() if p.ndim > 1]
        others = [p for p in net.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False, fused=False)
        average = {k: v.clone().double() for k, v in net.state_dict().items()}
        for step in range(CONFIG.steps):
            rng = torch.Generator().manual_seed(stream_seed(3, step, 0, "batch"))
            torch.manual_seed(stream_seed(3, step, 0, "step"))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(CONFIG, step)
            optimizer.zero_grad()
            task.loss("net", task.trained, task.batch(step, rng, 0, 1))[0].backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            decay = min(0.9, (1 + step) / (10 + step))
            for key, value in net.state_dict().items():
                average[key] = decay * average[key] + (1 - decay) * value
        stepper = read_state(uninterrupted)["stepper"]
        exported = load_checkpoint(uninterrupted / "deconvolve.safetensors").tensors
        for key, value in net.state_dict().items():
            torch.testing.assert_close(stepper["modules"]["net"][key], value, rtol=1e-4, atol=1e-6)
            if value.is_floating_point():
                close = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}
                torch.testing.assert_close(exported[key], average[key], **close)
        assert exported["1.num_batches_tracked"] == CONFIG.steps

    def test_learns_and_writes_everything(self, tmp_path):
        config = replace(
            CONFIG, steps=150, lr=1e-2, ema_decay=0.95, validate_every=60, log_every=10
        )
        record = run(Deconvolve(), config, tmp_path)
        rows = read_rows(tmp_path)
        assert [int(row["step"]) for row in rows] == list(range(10, 151, 10))
        assert float(rows[-1]["net/loss"]) < 0.5 * float(rows[0]["net/loss"])
        assert [r["step"] for r in rows if r["validation/mse"]] == ["60", "120", "150"]
        # the exported weights are the validated ones
        task = Deconvolve()
        tensors = load_checkpoint(tmp_path / "deconvolve.safetensors", "deconvolve").tensors
        load_into(task.trained["net"].eval(), tensors, "export")
        assert task.validate(task.trained)["mse"] == float(rows[-1]["validation/mse"])
        assert record == json.loads((tmp_path / "run.json").read_text())
        assert record["finished"]
        assert record["samples"] == 150 * 8
        assert record["parameters"] == {"net": 8 * 5 + 16 + 8 * 5 + 1}
        assert 0 < record["validation_seconds"] < record["wall_seconds"]
        assert record["peak_rss_bytes"] > 50e6
        assert record["threads"] == 1

    def test_events_hold_the_table(self, uninterrupted):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(uninterrupted / "tensorboard"))
        events.Reload()
        losses = [(e.step, e.value) for e in events.Scalars("net/loss")]
        rows = [r for r in read_rows(uninterrupted) if r["net/loss"]]
        assert [step for step, _ in losses] == [int(r["step"]) for r in rows]
        for (_, value), row in zip(losses, rows, strict=True):
            assert value == pytest.approx(float(row["net/loss"]))

    def test_a_gpu_tries_its_convolutions_for_as_long_as_it_trains(self):
        before = torch.backends.cudnn.benchmark
        for device, tried in (("cuda", True), ("cpu", before)):
            with gpu_settings(torch.device(device)):
                assert torch.backends.cudnn.benchmark is tried
            assert torch.backends.cudnn.benchmark is before

    def test_leaves_process_settings_as_they_were(self, tmp_path):
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        threads = torch.get_num_threads()
        tiny = torch.tensor(1e-39)
        with cpu_settings(2):
            assert torch.get_num_threads() == 2
            assert (tiny * 0.5).item() == 0
        run(Deconvolve(), replace(CONFIG, steps=2), tmp_path)
        assert (tiny * 0.5).item() > 0
        assert torch.get_num_threads() == threads
        assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def test_names_the_extra_when_a_package_is_absent(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "lightning_fabric", None)
        with pytest.raises(ImportError, match=r"pip install 'fastscore\[train\]'"):
            run(Deconvolve(), CONFIG, tmp_path)


class TestSeveralModules:
    config = replace(CONFIG, steps=10, clip_norm=0.5)

    def test_each_is_stepped_with_its_own_gradients_only(self, tmp_path):
        leaks = []

        class Watched(Adversarial):
            def loss(self, name, modules, batch):
                parameters = [p for m in self.trained.values() for p in m.parameters()]
                leaks.extend(p for p in parameters if p.grad is not None)
                return super().loss(name, modules, batch)

        run(Watched(), self.config, tmp_path)
        assert not leaks
        task = Adversarial()
        optimizers = {}
        for name, module in task.trained.items():
            weights = {"params": [p for p in module.parameters() if p.ndim > 1]}
            biases = {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0}
            optimizers[name] = torch.optim.AdamW([weights, biases], betas=(0.9, 0.99))
        for step in range(10):
            rng = torch.Generator().manual_seed(stream_seed(3, step, 0, "batch"))
            batch = task.batch(step, rng, 0, 1)
            for name, optimizer in optimizers.items():
                loss, _ = task.loss(name, task.trained, batch)
                parameters = list(task.trained[name].parameters())
                gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                nn.utils.clip_grad_norm_(parameters, 0.5)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(self.config, step)
                optimizer.step()
        trained = read_state(tmp_path)["stepper"]["modules"]
        for name, module in task.trained.items():
            for key, value in module.state_dict().items():
                torch.testing.assert_close(trained[name][key], value, rtol=1e-4, atol=1e-6)

    def test_a_task_without_anything_to_train_is_refused(self, tmp_path):
        task = Adversarial()
        task.ema = ("judge",)
        with pytest.raises(ValueError, match="averages 'judge', which is not among"):
            run(task, self.config, tmp_path)
        task = Adversarial()
        task.trained["generator"].requires_grad_(False)
        with pytest.raises(ValueError, match="'generator' has no parameter to train"):
            run(task, self.config, tmp_path)


class Spoilt(Deconvolve):
    """Losses that are infinite at given steps."""

    def __init__(self, bad) -> None:
        super().__init__()
        self.bad = bad

    def batch(self, step, rng, rank, world):
        scale = math.inf if step in self.bad else 1.0
        return super().batch(step, rng, rank, world) | {"scale": torch.tensor(scale)}

    def loss(self, name, modules, batch):
        loss, metrics = super().loss(name, modules, batch)
        return loss * batch["scale"], metrics


class TestNonFinite:
    @pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
    def test_bad_steps_change_no_parameter_and_are_counted(self, tmp_path, precision):
        task = Spoilt(range(100))
        config = replace(CONFIG, steps=6, log_every=3, precision=precision)
        before = {k: v.clone() for k, v in task.trained["net"].named_parameters()}
        record = run(task, config, tmp_path)
        assert record["skipped_steps"] == 6
        assert all(torch.equal(before[k], v) for k, v in task.trained["net"].named_parameters())
        assert [row["skipped"] for row in read_rows(tmp_path)] == ["3.0", "6.0"]
        assert [row["net/loss"] for row in read_rows(tmp_path)] == ["nan", "nan"]
        if precision == "16-mixed":
            assert read_state(tmp_path)["stepper"]["precision"]["scale"] == 2.0 ** (16 - 6)

    def test_training_goes_on_after_a_bad_step(self, tmp_path):
        record = run(Spoilt({4}), replace(CONFIG, steps=10), tmp_path)
        assert record["skipped_steps"] == 1
        assert math.isfinite(float(read_rows(tmp_path)[0]["net/loss"]))

    def test_many_in_a_row_are_divergence(self, tmp_path, monkeypatch):
        monkeypatch.setattr(step_module, "MAX_BAD_STEPS", 5)
        with pytest.raises(DivergenceError, match=r"'deconvolve' diverged.* step 12; lower lr 0"):
            run(Spoilt({2, 3, 4, *range(7, 30)}), CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
def test_mixed_precision_computes_low_and_passes_float32(tmp_path, precision, dtype):
    seen = set()

    class Watched(Deconvolve):
        def __init__(self) -> None:
            super().__init__()
            net = self.trained["net"]
            net.register_forward_pre_hook(lambda _, args: seen.add(("in", args[0].dtype)))
            net[0].register_forward_hook(lambda _, args, y: seen.add(("conv", y.dtype)))

        def setup(self, device, autocast):
            with autocast():
                y = torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
            seen.add(("setup", y.dtype))

        def loss(self, name, modules, batch):
            seen.add(("out", modules[name](batch["x"]).dtype))
            return super().loss(name, modules, batch)

        def validate(self, modules):
            return {}

    run(Watched(), replace(CONFIG, steps=3, precision=precision), tmp_path)
    assert seen == {
        ("in", torch.float32),
        ("conv", dtype),
        ("out", torch.float32),
        ("setup", dtype),
    }
    stored = read_state(tmp_path)["stepper"]["modules"]["net"]
    assert stored["0.weight"].dtype == torch.float32


def launch_two(out, kind):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, train_tasks.__file__, str(out), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


class TestSeveralProcesses:
    def test_time_that_is_up_for_one_stops_all(self, tmp_path):
        launch_two(tmp_path, "short")
        records = [json.loads((tmp_path / f"record_{rank}.json").read_text()) for rank in range(2)]
        assert records[0] == records[1]
        # they ask each other every ten steps
        assert (records[0]["steps"], records[0]["finished"]) == (10, False)
        assert read_state(tmp_path)["step"] == 10

    def test_two_processes_equal_one_with_the_whole_batch(self, tmp_path):
        launch_two(tmp_path / "two", "shared")
        # threads of a group that is never left may abort a process that has finished
        notes = [(tmp_path / "two" / f"group_{rank}.txt").read_text() for rank in range(2)]
        assert notes == ["left", "left"]
        run(Shared(), SHARED, tmp_path / "one")
        one, two = (read_state(tmp_path / n)["stepper"] for n in ("one", "two"))
        for name in ("discriminator", "generator"):
            for key, value in one["modules"][name].items():
                torch.testing.assert_close(two["modules"][name][key], value, rtol=1e-4, atol=1e-6)
        rows = [read_rows(tmp_path / name) for name in ("one", "two")]
        for key in ("discriminator/loss", "generator/loss"):
            losses = [[float(row[key]) for row in table] for table in rows]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert json.loads((tmp_path / "two" / "run.json").read_text())["world_size"] == 2
        with pytest.raises(ValueError, match="world_size was 2 and is now 1"):
            run(Shared(), SHARED, tmp_path / "two")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu_with_batches_made_ahead(tmp_path):
    pytest.importorskip("lightning_fabric", reason="training needs the extra train")
    config = replace(CONFIG, accelerator="cuda", precision="bf16-mixed", steps=60)
    record = run(Deconvolve(), config, tmp_path)
    assert record["device"] == "cuda"
    assert record["peak_device_bytes"] > 0
    assert record["energy_joules"] is not None or record["energy_source"].startswith("none: ")
    losses = [float(row["net/loss"]) for row in read_rows(tmp_path) if row["net/loss"]]
    assert losses[-1] < losses[0]
