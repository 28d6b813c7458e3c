"""Spectral scenes: materials, mixtures, the twin, and splits without overlap."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.world import WorldDataset, to_datasets
from tokenkit.core.world_spectra import material_spectra, pixel_split, spectral_scenes


@pytest.fixture(scope="module")
def batch():
    return spectral_scenes(3, 48, bands=20, seed=2)


def test_a_scene_does_not_depend_on_its_batch(batch):
    some = spectral_scenes([2, 0], 48, bands=20, seed=2)
    assert torch.equal(some.cubes, batch.cubes[[2, 0]]) and torch.equal(some.labels, batch.labels[[2, 0]])
    assert not torch.equal(spectral_scenes(1, 48, bands=20, seed=2, split="test").cubes, batch.cubes[:1])


def test_truth_fits_together(batch):
    assert batch.cubes.shape == (3, 48, 48, 20) and batch.abundances.shape == (3, 6, 48, 48)
    assert torch.allclose(batch.abundances.sum(1), torch.ones(3, 48, 48), atol=1e-5) and (batch.abundances >= 0).all()
    assert torch.equal(batch.materials, batch.abundances.argmax(1))
    named = batch.labels > 0
    assert torch.equal(batch.labels[named] - 1, batch.materials[named]) and (batch.abundances.amax(1)[named] > 0.9).all()
    assert set(batch.materials.unique().tolist()) == set(range(6))


def test_without_noise_a_pixel_is_its_mixture():
    batch = spectral_scenes(1, 32, bands=12, noise=0, variety=0)
    mixed = torch.einsum("bmhw,mk->bhwk", batch.abundances, material_spectra(12)) * batch.light[..., None]
    assert (mixed - batch.cubes).abs().max() < 2e-4


def test_the_twin_has_the_spectrum_and_another_texture():
    spectra = material_spectra(30, 4, seed=7)
    assert torch.equal(spectra[-1], spectra[-2]) and spectra.min() >= 0 and spectra.max() <= 1
    assert min((spectra[i] - spectra[j]).abs().max() for i in range(3) for j in range(i)) > 0.03
    batch = spectral_scenes(6, 64, noise=0, variety=0)
    rough = (batch.light[:, :, 1:] - batch.light[:, :, :-1]).abs()
    inside = (batch.abundances.amax(1) > 0.99)[:, :, 1:]
    twin, other = (rough[inside & (batch.materials[:, :, 1:] == k)].mean() for k in (5, 4))
    assert twin > 5 * other


def test_fewer_labels_are_a_part_of_all(batch):
    some = spectral_scenes(3, 48, bands=20, seed=2, labelled=0.3)
    assert torch.equal(some.cubes, batch.cubes) and torch.equal(some.labels[some.labels > 0], batch.labels[some.labels > 0])
    assert 0.2 < (some.labels > 0).sum() / (batch.labels > 0).sum() < 0.4


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 0.5), st.sampled_from([None, 2, 4, 6]), st.integers(0, 5), st.integers(0, 2))
def test_splits_do_not_overlap(share, blocks, seed, margin):
    labels = spectral_scenes(1, 48, bands=4, seed=1).labels[0]
    train, test = pixel_split(labels, share, blocks=blocks, seed=seed, margin=margin)
    assert not (train & test).any() and (labels[train] > 0).all() and (labels[test] > 0).all() and test.any()
    assert 0 < train.sum() <= round(share * (labels > 0).sum().item())
    if blocks:
        near = torch.nn.functional.max_pool2d(train.float()[None, None], 2 * margin + 1, 1, margin)[0, 0] > 0
        assert not (near & test).any()
    assert all(torch.equal(a, b) for a, b in zip((train, test), pixel_split(labels, share, blocks=blocks, seed=seed, margin=margin)))


def test_views(batch):
    item = WorldDataset(spectral_scenes, 3, keys=("cubes", "labels"), size=48, bands=20, seed=2)[1]
    assert torch.equal(item["cubes"], batch.cubes[1])
    assert to_datasets(spectral_scenes(1, 8, bands=4))[0]["labels"] == spectral_scenes(1, 8, bands=4).labels[0].tolist()


@pytest.mark.parametrize("bad, match", [(dict(size=4), "size"), (dict(bands=3), "bands"), (dict(materials=1), "materials"), (dict(patches=3), "patches"), (dict(noise=2), "noise"),
                                        (dict(variety=0.5), "variety"), (dict(labelled=0), "labelled"), (dict(start=-1), "index"), (dict(seed=-1), "seed")])
def test_refusals(bad, match):
    with pytest.raises(ValueError, match=match):
        spectral_scenes(1, **bad)


def test_splits_refuse():
    labels = torch.ones(16, 16, dtype=torch.long)
    for bad, match in ((dict(share=0), "share"), (dict(blocks=1), "blocks"), (dict(blocks=8), "blocks"), (dict(margin=-1), "margin")):
        with pytest.raises(ValueError, match=match):
            pixel_split(labels, **bad)
    with pytest.raises(ValueError, match="labels"):
        pixel_split(labels[None])
