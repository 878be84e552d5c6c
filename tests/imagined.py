"""What fastscore would do on a GPU, run on tensors that have no memory; prints JSON.

A process of its own: the tests' interpreter of Triton kernels would stand in for what a GPU runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import imagined_models
import torch
from fastscore_kernels import resolve
from fastscore_kernels.gpu import launch
from small_presets import write_preset
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastscore import solver
from fastscore.denoiser import Denoiser, set_precision
from fastscore.engine import Clips, Model, Task
from fastscore.inpaint import Inpainting
from fastscore.measure import nodes
from fastscore.measure.models import MODELS, imagined
from fastscore.presets import load_parts
from fastscore.samplers import sampler_named, schedule_for
from fastscore.vocoder import Generator
from fastscore.voice import Voice

BACKENDS = (("triton", "fp32"), ("triton", "bf16"), ("reference", "fp32"))
SAMPLERS = ("dpmpp_2m_sde", "unipc", "euler", "heun", "pc_vp")


def imagined_voice(denoiser: Denoiser, vocoder: Generator, backend: str) -> Voice:
    """A voice as `Voice` prepares one, without memory; to be called in `nodes.imagined`."""
    voice = Voice.__new__(Voice)
    voice.denoiser, voice.vocoder = denoiser.eval(), vocoder.eval()
    voice.device, voice.mel_config = nodes.DEVICE, vocoder.mel_config
    imagined(voice.denoiser, backend)
    nodes.move(voice.vocoder)
    return voice


def trajectories(folder: Path) -> dict[str, dict]:
    """Launches and transfers of whole clips, vocoder included, by backend, sampler and guidance."""
    found = {}
    for backend, precision in BACKENDS:
        for i, name in enumerate(SAMPLERS):
            # every sampler both ways, not all of them on every backend
            known = (i + len(found)) % 2 == 0
            parts = load_parts(folder)
            denoiser = parts.denoiser()
            set_precision(denoiser, precision)
            task, batch = _clips(denoiser, name, known)
            with nodes.imagined():
                voice = imagined_voice(denoiser, parts.vocoder, backend)
                shape = (1, *voice.denoiser.shape)
                model = Model(voice.denoiser, voice.finish, shape, nodes.DEVICE, backend)
                got = nodes.predicted(_drawing(model, task, batch))
            key = f"{backend}/{precision}/{name}/{'inpainted' if known else 'free'}"
            found[key] = {"total": got.total, "transfers": got.transfers}
    return found


def _clips(denoiser: Denoiser, name: str, known: bool) -> tuple[Task, dict[str, torch.Tensor]]:
    """How to draw a guided and an unguided clip, and their columns, on the host."""
    spec = sampler_named(name)
    shape = (1, *denoiser.shape)
    inpainting = None
    if known:
        mask = torch.zeros(1, *shape, dtype=torch.bool)
        mask[..., :4] = True
        inpainting = Inpainting(torch.zeros(1, *shape), mask)
    task = Task(spec, schedule_for(spec, 5, denoiser.sigma_range))
    return task, Clips([1, -1], [3.0, 1.0], [0, 5], [0, 1], inpainting).tensors(2)


def _drawing(model: Model, task: Task, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    """Label to waveform, as an engine computes it from a batch that lies on the device."""
    route = task.course(True)
    moved = {k: torch.empty(t.shape, dtype=t.dtype, device=nodes.DEVICE) for k, t in batch.items()}
    if route is None:
        return lambda: model.finish(model.loop(task, moved, True, model.conditioned(moved), None))
    moved["table"] = torch.empty(len(route.rows), 6, device=nodes.DEVICE)
    return lambda: model.finish(model.follow(moved, route.kinds, None))


def steps() -> dict[str, dict[str, int]]:
    """Predicted kernels of a step at batch 1 of the models that are measured, and ours in a row."""
    found = {}
    for name, guided in (("paper", False), ("paper", True), ("digits", True)):
        net = MODELS[name]().eval()
        set_precision(net, "bf16")
        with nodes.imagined():
            imagined(net)
            x, one = (torch.empty(s, device=nodes.DEVICE) for s in ((1, 1, 80, 64), (1,)))
            label = torch.empty(1, dtype=torch.int64, device=nodes.DEVICE)
            args = (x, one, label, one) if guided else (x, one)
            got = nodes.predicted(lambda net=net, args=args: net(*args))
        counts = {"total": got.total, "chained": got.chained}
        found[f"{name}/{'guided' if guided else 'unguided'}"] = counts
    return found


def traced() -> dict[str, list[str]]:
    """What a compiler sees of every operation of Triton kernels: its graph by AOTAutograd."""
    resolve("triton", "cuda")
    ops = torch.ops.fastscore_triton
    with FakeTensorMode(), torch.no_grad():
        last = {"memory_format": torch.channels_last}
        x = torch.empty(2, 16, 4, 4, device="cuda").contiguous(**last)
        pair = torch.cat((x, x), 1).contiguous(**last)
        vector = torch.empty(16, device="cuda")
        stats, film = torch.empty(2, 2, 4, device="cuda"), torch.empty(2, 32, device="cuda")
        square = [torch.empty(n, m, 1, 1, device="cuda") for n, m in _PROJECTIONS]
        weights = [t for w in square for t in (w, torch.empty(w.shape[0], device="cuda"))]
        coefficients = torch.empty(2, 7, device="cuda")
        whole = torch.zeros(2, dtype=torch.int64, device="cuda")
        counters = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
        flat = torch.empty(2, 1, 4, 4, device="cuda")
        calls = {
            "norm_act": (ops.norm_act, x, vector, vector, film, 4, True, 1e-5, vector),
            "norm_act_backward": (
                *(ops.norm_act_backward, x, x, stats, vector, vector, film, 4, True, x, vector),
            ),
            "bias_add": (ops.bias_add, x, vector, torch.empty(1, 16, 4, 1, device="cuda"), x),
            "class_cotangents": (ops.class_cotangents, vector.view(2, 8), whole),
            "edm_inputs": (
                *(ops.edm_inputs, flat, stats[0, :, 0], None, vector, 0.5, 2, torch.bfloat16),
            ),
            "tap_norm": (ops.tap_norm, x, x, 4, *[vector] * 4, 1e-5),
            "tap_fuse": (ops.tap_fuse, x, pair, pair, 2, True),
            "tap_fuse_backward": (ops.tap_fuse_backward, x, x, pair, pair, 2, True),
            "tap_path": (ops.tap_path, x, x, [vector] * 4, weights, 4, 2, True, 1e-5),
            "solver_step": (
                *(ops.solver_step, flat, flat, flat, None, flat, coefficients, counters, 0),
            ),
            "normals": (ops.normals, whole, whole, whole[:1].clone(), 16, 0),
        }
        return {name: _graph(*call) for name, call in calls.items()}


_PROJECTIONS = ((16, 16), (32, 16), (32, 16), (16, 32), (16, 16))


def _graph(op: Callable, *args: object) -> list[str]:
    leaves, structure = tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    def call(*given: torch.Tensor) -> object:
        filled = list(leaves)
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        return op(*tree_unflatten(filled, structure))

    aot_function(call, fw_compiler=keep)(*(leaves[i] for i in places))
    return graphs[0]


def planted() -> dict[str, object]:
    """What must be noticed: a copy from the host, a wait for a value, operands on two devices."""
    with nodes.imagined():
        x = torch.empty(4, device=nodes.DEVICE)
        faults = {
            "copy": lambda: x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=nodes.DEVICE),
            "wait": lambda: x.sum().item(),
            "two devices": lambda: x + torch.empty(4),
        }
        found: dict[str, object] = {}
        for name, fault in faults.items():
            try:
                found[name] = nodes.predicted(fault).transfers
            except (RuntimeError, DataDependentOutputException) as error:
                found[name] = type(error).__name__
        found["none"] = nodes.predicted(lambda: (x * 2.0).view(2, 2)).kernels
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    # what a GPU that is not there would say of itself
    # values of tensors without memory cannot be checked; on a real one they are, on the host
    solver.check_guidance = lambda guidance, x, kind: (guidance.label, guidance.gamma)
    launch._cuda_device = lambda index: launch.DEVICES["sm_90"]
    found: dict[str, object] = {"traced": traced(), "planted": planted()}
    with tempfile.TemporaryDirectory() as folder:
        found["trajectories"] = trajectories(write_preset(Path(folder) / "small"))
    found["steps"] = steps()
    found["models"] = imagined_models.everything()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
