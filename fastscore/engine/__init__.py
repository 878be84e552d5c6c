"""Drawing batches of clips: eager, compiled or by replayed CUDA graphs, with the same bits."""

from fastscore.engine.batches import Clips, joined
from fastscore.engine.core import BUCKETS, MODES, BatchWatcher, Drawn, Engine, EngineStats, Options
from fastscore.engine.recorders import CudaGraphs, GraphPool, Recorder, Rerun
from fastscore.engine.runners import Model, Task

__all__ = [
    "BUCKETS",
    "MODES",
    "BatchWatcher",
    "Clips",
    "CudaGraphs",
    "Drawn",
    "Engine",
    "EngineStats",
    "GraphPool",
    "Model",
    "Options",
    "Recorder",
    "Rerun",
    "Task",
    "joined",
]
