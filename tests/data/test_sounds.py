"""Sounds as sources: waveforms and spectrograms that can be heard again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from specstream.data import Spectrograms, Tones
from specstream.data.sounds import note_name, pitch
from specstream.media_processor import load_media_processor
from specstream.spectrogram import LogMel

RATE = 8000
SMALL = LogMel(num_bands=24, num_frames=32, window=256, hop=64)


def tone(hertz: float, length: int, loudness: float = 0.5) -> torch.Tensor:
    return loudness * torch.sin(2 * math.pi * hertz * torch.arange(length) / RATE)[None]


def heard(sound: torch.Tensor) -> float:
    """The loudest frequency of a sound (T,)."""
    return float(torch.fft.rfft(sound).abs().argmax() * RATE / len(sound))


def test_a_pure_tone_survives_the_way_to_a_spectrogram_and_back() -> None:
    log_mel = LogMel()
    sound = tone(440, log_mel.length)
    states = log_mel.states(sound, RATE)
    assert states.shape == (1, 1, 64, 64) and states.min() == -1
    loudest = log_mel.filters(RATE)[states[0, 0, :, 32].argmax()].argmax() * RATE / log_mel.window
    assert abs(loudest - 440) < RATE / log_mel.window
    again = log_mel.sound(states, RATE)
    assert again.shape == (1, 1, log_mel.length)
    assert abs(heard(again[0, 0]) - 440) < RATE / log_mel.window
    assert again.std().item() == pytest.approx(sound.std().item(), rel=0.1)
    error = (log_mel.states(again[:, 0], RATE) - states).abs().mean() * log_mel.decibels / 2
    assert error < 2  # decibels


def test_a_full_scale_tone_is_about_1_and_silence_is_minus_1() -> None:
    states = LogMel().states(torch.cat([tone(1000, 8064, 1.0), torch.zeros(1, 8064)]), RATE)
    assert 0.9 < states[0, 0, :, 32].max() <= 1
    assert (states[1] == -1).all()
    assert not LogMel().sound(states[1:], RATE).any()


def test_sounds_of_any_length_give_spectrograms_of_one() -> None:
    short, long = SMALL.states(tone(500, 700), RATE), SMALL.states(tone(500, 9000), RATE)
    assert short.shape == long.shape == (1, 1, 24, 32)
    assert (short[..., 16:] == -1).all() and torch.equal(short[..., :8], long[..., :8])


@pytest.fixture
def recordings(tmp_path: Path) -> str:
    parts = [(30_000 * tone(hertz, n)[0]).numpy() for hertz, n in ((300, 900), (900, 3000))]
    path = tmp_path / "speech.npz"
    np.savez(
        path,
        audio=np.concatenate(parts).astype(np.int16),
        offsets=np.array([0, 900, 3900]),
        digit=np.array([7, 2], np.int8),
        sample_rate=np.int32(RATE),
    )
    return str(path)


def test_recordings_become_spectrograms_with_classes(recordings: str, tmp_path: Path) -> None:
    source = Spectrograms(recordings, log_mel=SMALL)
    source.check()
    samples = source.samples()
    assert samples.states.shape == (2, 1, 24, 32) and samples.classes is not None
    assert samples.classes.tolist() == [7, 2] and source.processor.classes[7] == "7"
    assert (samples.states[0, ..., 20:] == -1).all() and samples.states[1, ..., 30].max() > 0
    low, high = samples.states[:, 0, :, 5].argmax(1).tolist()
    assert low < high
    # what is written sounds as what was read, also by a processor that was stored
    source.processor.save(tmp_path)
    processor = load_media_processor(tmp_path)
    assert processor == source.processor
    processor.write(samples.states[1:], tmp_path / "one.wav")
    sound, rate = soundfile.read(tmp_path / "one.wav")
    assert rate == RATE and len(sound) == SMALL.length
    assert abs(heard(torch.from_numpy(sound)) - 900) < RATE / SMALL.window


def test_tones_have_the_pitch_of_their_class() -> None:
    source = Tones(num_tones=12, num_pitches=5, num_overtones=2, length=4000)
    source.check()
    samples = source.samples()
    assert samples.states.shape == (12, 1, 4000) and samples.classes is not None
    assert samples.states.abs().max() <= 1 and len(samples.classes.unique()) > 2
    for sound, number in zip(samples.states[:, 0], samples.classes.tolist(), strict=True):
        assert abs(heard(sound) / pitch(number) - 1) < 0.02
    assert source.processor.classes == ("A3", "A#3", "B3", "C4", "C#4")
    assert pitch(0) == 220 and note_name(12) == "A4" and pitch(12) == 440
    pictures = Tones(num_tones=3, log_mel=SMALL).samples()
    assert pictures.states.shape == (3, 1, 24, 32)


def test_wrong_options_are_one_line(recordings: str) -> None:
    cases = [
        (lambda: LogMel(hop=300), "window must be at least two hops, 600, got 512"),
        (lambda: LogMel(num_bands=0), "num_bands must be positive, got 0"),
        (lambda: LogMel(num_bands=300).filters(RATE), "cannot tell 300 bands apart at 8000 Hz"),
        (Tones(num_pitches=60).check, "the highest note has 6645 Hz: half the sample_rate"),
        (Tones(num_tones=0).check, "num_tones must be at least 1, got 0"),
        (Spectrograms(recordings, labels="word").check, "has no array 'word'"),
    ]
    for call, line in cases:
        with pytest.raises(ValueError, match=line):
            call()
