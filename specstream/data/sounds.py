"""Sounds: recordings in an array, and tones that need none, as waveforms or spectrograms.

Shapes: n samples, T numbers of a sound, M mel bands, F frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from specstream.data.media_arrays import check_labels, check_room, class_names, read_array
from specstream.data.media_sources import MediaSource, Samples
from specstream.data.sources import check_limit
from specstream.media_processor import MediaProcessor
from specstream.spectrogram import LogMel

AT_ONCE = 256  # sounds that are transformed together
LOUDEST = 0.5  # the peak that recordings are brought to
NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
LOWEST = 57  # of the tones, as MIDI counts notes: A below the middle C, 220 Hz


@dataclass(frozen=True)
class Spectrograms(MediaSource):
    """Mel spectrograms of recordings that lie end to end in an .npz file: (1, M, F).

    Each is brought to the same peak, and cut or filled with silence to the same length.

    Args:
        path: the file; it has `sample_rate` too.
        audio, offsets: names of its arrays: int16 numbers, and where each recording begins and the
            last ends, (n + 1,).
        labels: name of its classes, numbers; None: there are none.
        log_mel: the spectrogram.
        limit: only the first ones.
    """

    path: str
    audio: str = "audio"
    offsets: str = "offsets"
    labels: str | None = "digit"
    log_mel: LogMel = field(default_factory=LogMel)
    limit: int | None = None

    def check(self) -> None:
        check_limit(type(self).__name__, self.limit)
        number = check_recordings(self.path, self.audio, self.offsets)
        check_labels(self.path, self.labels, number)
        self.log_mel.filters(self._sample_rate)

    def samples(self) -> Samples:
        audio, offsets = (read_array(self.path, name) for name in (self.audio, self.offsets))
        bounds = list(pairwise(offsets))[: self.limit]
        length = self.log_mel.length
        sounds = torch.zeros(len(bounds), length)
        for row, (start, end) in enumerate(bounds):
            sound = torch.from_numpy(audio[start:end].astype(np.float32))
            loudest = sound.abs().max().clamp(min=1) if len(sound) else 1.0
            sounds[row, : len(sound)] = (sound * (LOUDEST / loudest))[:length]
        states = as_spectrograms(sounds, self.log_mel, self._sample_rate)
        if self.labels is None:
            return Samples(states)
        labels = read_array(self.path, self.labels)[: self.limit]
        return Samples(states, torch.from_numpy(labels.astype(np.int64)))

    @property
    def processor(self) -> MediaProcessor:
        names = () if self.labels is None else class_names(read_array(self.path, self.labels))
        return MediaProcessor(
            "audio", sample_rate=self._sample_rate, classes=names, spectrogram=self.log_mel
        )

    @property
    def _sample_rate(self) -> int:
        found = read_array(self.path, "sample_rate")
        if found.dtype.kind not in "iu" or found.shape or found < 1:
            raise ValueError(f"'{self.path}': 'sample_rate' must be one whole number above 0")
        return int(found)


@dataclass(frozen=True)
class Tones(MediaSource):
    """Plucked tones with overtones, drawn by rule; classes are notes: (1, T) or (1, M, F).

    Args:
        num_tones: how many; each is drawn by its number.
        num_pitches: how many notes, from 220 Hz up in half tones.
        num_overtones: numbers above the pitch, as far as the sample rate has them.
        length: T of a waveform; that of a spectrogram follows from its frames.
        sample_rate: numbers a second.
        log_mel: the spectrogram; None: tones are waveforms.
    """

    num_tones: int = 2048
    num_pitches: int = 8
    num_overtones: int = 4
    length: int = 1024
    sample_rate: int = 8000
    log_mel: LogMel | None = None

    def check(self) -> None:
        for name in ("num_tones", "num_pitches", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_overtones < 0:
            raise ValueError(f"num_overtones must be at least 0, got {self.num_overtones}")
        highest = pitch(self.num_pitches - 1)
        if highest >= self.sample_rate / 2:
            raise ValueError(
                f"the highest note has {highest:.0f} Hz: half the sample_rate must lie above it"
            )
        if self.log_mel is not None:
            self.log_mel.filters(self.sample_rate)
        check_room(self.num_tones, self.length if self.log_mel is None else self.log_mel.length)

    def samples(self) -> Samples:
        noise = np.random.default_rng(0)
        length = self.length if self.log_mel is None else self.log_mel.length
        classes = noise.integers(self.num_pitches, size=self.num_tones)
        seconds = np.arange(length) / self.sample_rate
        sounds = np.zeros((self.num_tones, length), np.float32)
        for row, number in enumerate(classes):
            multiples = np.arange(1, self.num_overtones + 2)
            hertz = multiples * pitch(int(number))
            strengths = noise.uniform(0.3, 1.0, len(multiples)) / multiples
            strengths *= hertz < self.sample_rate / 2
            phases = noise.uniform(0, 2 * np.pi, len(multiples))
            waves = np.sin(2 * np.pi * hertz[:, None] * seconds + phases[:, None])
            fading = np.exp(-noise.uniform(1, 8) * seconds) * np.minimum(seconds / 0.005, 1)
            sounds[row] = noise.uniform(0.4, 0.9) * fading * (strengths @ waves) / strengths.sum()
        told, waveforms = torch.from_numpy(classes.astype(np.int64)), torch.from_numpy(sounds)
        if self.log_mel is None:
            return Samples(waveforms[:, None], told)
        return Samples(as_spectrograms(waveforms, self.log_mel, self.sample_rate), told)

    @property
    def processor(self) -> MediaProcessor:
        return MediaProcessor(
            "audio",
            sample_rate=self.sample_rate,
            classes=tuple(note_name(number) for number in range(self.num_pitches)),
            spectrogram=self.log_mel,
        )


def check_recordings(path: str, audio: str, offsets: str) -> int:
    """Return how many recordings lie end to end in a file; ValueError where they do not."""
    sounds, bounds = read_array(path, audio), read_array(path, offsets)
    if sounds.dtype != np.int16 or sounds.ndim != 1:
        raise ValueError(
            f"'{path}': '{audio}' must be numbers of 16 bits (int16) end to end, not "
            f"{sounds.dtype} {list(sounds.shape)}"
        )
    if bounds.dtype.kind not in "iu" or bounds.ndim != 1 or len(bounds) < 2:
        raise ValueError(
            f"'{path}': '{offsets}' must be two whole numbers or more, not {bounds.dtype} "
            f"{list(bounds.shape)}"
        )
    rises = bool((bounds[1:] >= bounds[:-1]).all())
    if not rises or bounds[0] < 0 or bounds[-1] > len(sounds):
        raise ValueError(
            f"'{path}': '{offsets}' must rise from 0 or more to at most {len(sounds)}, the numbers "
            f"of '{audio}'"
        )
    return len(bounds) - 1


def pitch(number: int) -> float:
    """Return the frequency in Hz of a note, so many half tones above the lowest."""
    return float(440 * 2 ** ((LOWEST + number - 69) / 12))


def note_name(number: int) -> str:
    """Return the name of a note, so many half tones above the lowest: A3, A#3, B3, C4, ..."""
    octave, place = divmod(LOWEST + number, len(NOTES))
    return f"{NOTES[place]}{octave - 1}"


def as_spectrograms(sounds: torch.Tensor, log_mel: LogMel, sample_rate: int) -> torch.Tensor:
    """Return spectrograms (n, 1, M, F) of sounds (n, T), some at a time."""
    return torch.cat([log_mel.states(part, sample_rate) for part in sounds.split(AT_ONCE)])
