"""Voices are where their plan says, and the same in any batch."""
import numpy as np
import pytest
import torch

from tokenkit.core.world import WorldDataset, to_datasets
from tokenkit.core.world_audio import CONSONANTS, HOP, PHONES, VOICES, VOWELS, voices

NAMES = tuple(PHONES)


@pytest.fixture(scope="module")
def batch():
    return voices(24, seed=3)


def test_a_clip_does_not_depend_on_its_batch(batch):
    some = voices([9, 4], seed=3)
    assert torch.equal(some.waves, batch.waves[[9, 4]]) and torch.equal(some.phones, batch.phones[[9, 4]])
    assert torch.equal(voices(2, seed=3, start=9).waves[0], batch.waves[9])
    assert not torch.equal(voices([9], seed=4).waves, batch.waves[9:10])
    assert not torch.equal(voices([9], seed=3, split="test").waves, batch.waves[9:10])
    assert batch[:3].transcripts() == batch.transcripts()[:3]


@pytest.mark.parametrize("seconds, rate", [(0.5, 8000), (1.25, 4000), (0.4, 16_000)])
def test_shapes_and_range(seconds, rate):
    batch = voices(3, seconds, rate, syllables=(1, 2))
    assert batch.waves.shape == (3, round(seconds * rate)) and batch.waves.dtype == torch.float32
    assert batch.frames.shape == batch.pitch.shape == (3, round(seconds / HOP))
    assert batch.waves.abs().max() <= 1 and batch.waves.isfinite().all() and batch.waves.std(1).min() > 0.01
    assert torch.allclose(batch.waves * 32767, (batch.waves * 32767).round(), atol=1e-2)


def test_phones_alternate_and_fill_their_borders(batch):
    for row in range(len(batch)):
        said = batch.transcripts()[row]
        assert all(s in (CONSONANTS, VOWELS)[i % 2] for i, s in enumerate(said)) and 4 <= len(said) <= 8
        borders = batch.borders[row, :len(said)]
        assert (borders[:, 1] > borders[:, 0]).all() and torch.equal(borders[1:, 0], borders[:-1, 1]) and borders.max() < 1
        middles = (borders.mean(1) / HOP).long()
        assert "".join(NAMES[p] for p in batch.frames[row, middles]) == said
        assert (batch.borders[row, len(said):] == -1).all()


def test_pitch_is_the_voice_and_silence_has_none(batch):
    for row in range(len(batch)):
        low, high, _ = tuple(VOICES.values())[batch.labels[row]]
        spoken = batch.pitch[row][batch.pitch[row] > 0]
        assert 0.65 * low < spoken.min() and spoken.max() < 1.25 * high
    silent = batch.frames == NAMES.index(" ")
    assert (batch.pitch[:, -1] == 0).all()
    loud = batch.waves.reshape(24, -1, 40).pow(2).mean(2)
    assert loud[~silent].mean() > 50 * loud[:, -3:].mean()


def test_hiss_is_high_and_vowels_are_low():
    batch = voices(40, seed=1)
    spectrum = np.abs(np.fft.rfft(batch.waves.reshape(40, -1, 40).numpy())) ** 2
    high = spectrum[..., 11:].sum(-1) / spectrum.sum(-1).clip(1e-9)
    frames = batch.frames.numpy()
    hiss, vowel = (np.median(high[frames == NAMES.index(phone)]) for phone in "so")
    assert hiss > 0.8 > 0.3 > vowel


def test_views(batch):
    item = WorldDataset(voices, 4, keys=("waves", "pitch"), seconds=0.5)[2]
    assert item["waves"].shape == (4000,) and torch.equal(item["waves"], voices([2], 0.5).waves[0])
    hub = to_datasets(batch[:2])
    assert hub[0]["transcript"] == batch.transcripts()[0] and hub.features["label"].names == list(VOICES)


@pytest.mark.parametrize("bad, match", [(dict(seconds=0.1), "seconds"), (dict(rate=11_025), "rate"), (dict(rate=100), "rate"), (dict(syllables=(3, 2)), "syllables"),
                                        (dict(syllables=(0, 2)), "syllables"), (dict(noise=-1), "noise"), (dict(start=-1), "index"), (dict(seed=-1), "seed")])
def test_refusals(bad, match):
    with pytest.raises(ValueError, match=match):
        voices(1, **bad)
