"""What a profile records of a sampling run: the same bits, phases, layers and their work."""

import itertools

import pytest
import torch
from small_models import LABELS, SPACE, randomise, small_classifier
from small_presets import VOCODER

from fastscore import Pipeline, cost, trajectory
from fastscore.config import SigmaRange, UNetConfig
from fastscore.denoiser import GuidedUNet
from fastscore.engine import Engine, Options, Rerun
from fastscore.measure import macs, work
from fastscore.profiler import groups, phases
from fastscore.profiler.collect import record
from fastscore.profiler.marks import Marks
from fastscore.unet import UNet
from fastscore.vocoder import SpectralGenerator


@pytest.fixture(scope="module")
def recording(pipe):
    return record(pipe, [LABELS[0], LABELS[2]], rounds=1, nfe=3, batch_size=2)


@pytest.fixture(scope="module")
def pair():
    """The usual pair of networks."""
    config = UNetConfig(
        n_mels=16,
        frames=24,
        channels=(8, 16),
        blocks=(1, 1),
        attention=(False, True),
        heads=2,
        groups=4,
        emb_dim=16,
    )
    unet = randomise(UNet(config), 5).eval()
    denoiser = GuidedUNet(unet, small_classifier(), SPACE, SigmaRange(0.02, 20.0))
    return Pipeline(denoiser, SpectralGenerator(VOCODER).eval())


def names(trace):
    return {span.name.removeprefix(phases.PHASE) for span in trace.phases}


class TestBits:
    def test_a_profiled_run_draws_the_same_bits(self, pipe, recording):
        again = pipe.sample([LABELS[0], LABELS[2]], nfe=3, batch_size=2)
        assert torch.equal(recording.result.waves, again.waves)
        assert torch.equal(recording.result.mels, again.mels)

    def test_another_answer_under_the_profiler_is_refused(self, pipe, monkeypatch):
        plain = trajectory.solver_step

        def step(x, coefficients, **update):
            following, x0 = plain(x, coefficients, **update)
            return following + 1e-3 * torch.autograd._profiler_enabled(), x0

        monkeypatch.setattr(trajectory, "solver_step", step)
        with pytest.raises(RuntimeError, match="other waves"):
            record(pipe, [LABELS[0]], rounds=1, nfe=2)

    def test_marks_come_off_again(self, pipe, recording):
        modules = [*pipe.denoiser.modules(), *pipe.vocoder.modules()]
        for owner in (*modules, pipe.engine._runner):
            left = {"forward", "linearize", "pull", "parts", "draw", "embed", "upper"} & set(
                vars(owner)
            )
            assert not left, f"{type(owner).__name__} keeps {left}"
        assert trajectory.solver_step.__module__ == "fastscore_kernels.solver_step"

    def test_marks_come_off_where_a_run_fails(self, pipe):
        before = set(vars(pipe.denoiser))

        def fail():
            with Marks().on(pipe):
                assert set(vars(pipe.denoiser)) > before
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert set(vars(pipe.denoiser)) == before


class TestPhases:
    def test_one_backbone_has_all_of_its_phases(self, recording):
        expected = {phases.FORWARD, phases.BOTH, phases.CLASS, phases.TAPS, phases.SUBNET}
        expected |= {phases.JEM, phases.SOLVER, phases.VOCODER, phases.PRECONDITIONING}
        assert expected <= names(recording.trace)
        assert phases.UNET not in names(recording.trace)

    def test_unguided_evaluations_pull_back_only_the_marginal(self, recording):
        guided = [span.name.endswith(" guided") for span in recording.trace.evaluations]
        # the preset guides from 0.1 to 9
        assert guided == [False, True, False]
        for item in recording.trace.items:
            if item.evaluation >= 0 and item.phase in (phases.JEM, phases.BOTH, phases.CLASS):
                assert (item.phase != phases.JEM) == guided[item.evaluation]

    def test_the_usual_pair_has_a_unet_in_their_place(self, pair):
        found = record(pair, [LABELS[0]], rounds=1, nfe=2, interval=(0.0, 1e9))
        assert {phases.UNET, phases.FORWARD, phases.CLASS} <= names(found.trace)
        assert not {phases.SUBNET, phases.TAPS, phases.BOTH, phases.JEM} & names(found.trace)
        assert counted(found) == 2 * macs.step(pair.denoiser)["guided"].total

    def test_lanes_fill_the_run_without_overlap(self, recording):
        lanes = recording.trace.phases
        for one, two in itertools.pairwise(lanes):
            assert one.start < one.end <= two.start + 1e-3
        assert sum(span.us for span in lanes) == pytest.approx(recording.trace.us, rel=0.01)


def calls(recording, evaluation=None):
    """Work of all calls of the denoiser's layers, or of those in one evaluation."""
    found = {
        (i.layer, i.call)
        for i in recording.trace.items
        if i.layer in recording.ledger and evaluation in (None, i.evaluation)
    }
    works = (recording.ledger[name] for name, _ in found)
    return [one for one in works if one.part not in ("vocoder", "solver")]


def counted(recording):
    """Multiply-accumulates of all of them."""
    return sum(one.macs for one in calls(recording))


def test_a_graph_is_one_program_with_all_of_its_work(preset):
    pipe = Pipeline.from_pretrained(preset)
    asked = pipe.sample(LABELS[0], nfe=3)
    # replayed by running again, as a device without graphs can
    pipe.engine = Engine(pipe.engine._model, Options(mode="graphs"), recorder=Rerun())
    found = record(pipe, [LABELS[0]], rounds=1, nfe=3)
    assert torch.equal(found.result.waves, asked.waves)
    assert found.after["replays"] - found.before["replays"] >= 2
    assert found.after["recorded"] == 1
    counts = macs.step(pipe.denoiser)
    (program,) = (w for w in found.ledger.values() if w.kind == "program")
    assert program.macs == 2 * counts["unguided"].total + counts["guided"].total


class TestWork:
    def test_layers_add_up_to_what_is_counted_of_a_step(self, pipe, recording):
        guided = [span.name.endswith(" guided") for span in recording.trace.evaluations]
        steps = cost.step_macs(pipe.denoiser, batch=2)
        expected = sum(steps["guided" if one else "unguided"] for one in guided)
        assert counted(recording) == expected

    def test_layers_move_what_the_operations_of_a_step_move(self, pipe, recording):
        for index, guided in ((0, False), (1, True)):
            found = calls(recording, index)
            expected = work.step(pipe.denoiser, 2, guided)
            assert sum(one.bytes for one in found) == expected.moved
            assert sum(one.macs for one in found) == expected.macs

    def test_bytes_of_a_convolution(self, recording):
        one = next(w for w in recording.ledger.values() if w.path == "classifier.stem")
        # two samples of 4 patches of 8 x 12 onto 8 channels; a weight of 8 x 4 x 3 x 3 and a bias
        assert one.direction == "forward"
        assert one.macs == 2 * 8 * 12 * 8 * 4 * 9
        assert one.bytes == 4 * (2 * 96 * (4 + 8) + 8 * 4 * 9 + 8)

    def test_every_operation_is_counted_once(self, recording):
        items = recording.trace.items
        for sums in (groups.by_place, groups.by_kernel):
            found = sums(items, recording.ledger)
            assert sum(g.us for g in found) == pytest.approx(sum(i.us for i in items))
            assert sum(g.launches for g in found) == len(items)

    def test_gaps_and_operations_fill_the_run(self, recording):
        trace = recording.trace
        first, last = trace.items[0].start, max(i.end for i in trace.items)
        busy = sum(p.busy for p in groups.by_phase(trace))
        gaps = groups.gaps(trace).total
        assert busy + gaps == pytest.approx(last - first, rel=0.02)

    def test_memory_returns_to_what_is_kept(self, recording):
        memory = recording.memory.allocations
        assert max(a.bytes for a in memory) > 0
        held = sum(a.bytes for a in memory if a.at <= recording.memory.us)
        kept = recording.result
        assert held >= sum(t.numel() * t.element_size() for t in (kept.waves, kept.mels))
