"""Volumes: the same in any batch, beginnings of longer ones, and truth that fits what is seen."""
import pytest
import torch

from tokenkit.core.world import WorldDataset, to_datasets
from tokenkit.core.world_neurites import affinities, neurites


@pytest.fixture(scope="module")
def batch():
    return neurites(3, (12, 40, 48), seed=2)


def test_a_volume_does_not_depend_on_its_batch_or_depth(batch):
    some = neurites([2, 0], (12, 40, 48), seed=2)
    assert torch.equal(some.volumes, batch.volumes[[2, 0]]) and torch.equal(some.cells, batch.cells[[2, 0]])
    short = neurites(3, (5, 40, 48), seed=2)
    assert torch.equal(short.cells, batch.cells[:, :5]) and torch.equal(short.membranes, batch.membranes[:, :5])
    assert not torch.equal(neurites(1, (12, 40, 48), seed=2, split="test").cells, batch.cells[:1])


def test_truth_fits_the_picture(batch):
    assert batch.volumes.shape == (3, 1, 12, 40, 48) and batch.volumes.min() >= 0 and batch.volumes.max() <= 1
    inside = batch.volumes[:, 0][~batch.membranes & ~batch.organelles]
    assert inside.mean() - batch.volumes[:, 0][batch.membranes].mean() > 0.2
    assert not (batch.membranes & batch.organelles).any()
    assert torch.equal(batch.instances == 0, batch.membranes) and torch.equal(batch.instances[~batch.membranes] - 1, batch.cells[~batch.membranes])


def test_borders_between_cells_are_membranes(batch):
    for axis in (2, 3):
        a, b = (batch.cells.narrow(axis, at, batch.cells.shape[axis] - 1) for at in (0, 1))
        walls = [batch.membranes.narrow(axis, at, batch.cells.shape[axis] - 1) for at in (0, 1)]
        assert (walls[0] | walls[1])[a != b].all()


def test_neurites_go_on_and_on(batch):
    after = (batch.cells[:, 1:] == batch.cells[:, :-1]).float().mean()
    later = (batch.cells[:, 8:] == batch.cells[:, :-8]).float().mean()
    assert after > 0.8 > later > 0.2


def test_affinities_against_a_loop(batch):
    instances = batch.instances[:1, :3, :6, :7]
    offsets = ((1, 0, 0), (0, 2, 0), (1, 1, 3))
    found = affinities(instances, offsets)
    assert found.shape == (1, 3, 3, 6, 7)
    for n, (dz, dy, dx) in enumerate(offsets):
        for z in range(3):
            for y in range(6):
                for x in range(7):
                    earlier = z >= dz and y >= dy and x >= dx and instances[0, z - dz, y - dy, x - dx].item()
                    assert found[0, n, z, y, x] == float(bool(earlier) and earlier == instances[0, z, y, x].item())


def test_views(batch):
    item = WorldDataset(neurites, 3, keys=("volumes", "cells"), size=(12, 40, 48), seed=2)[1]
    assert torch.equal(item["volumes"], batch.volumes[1])
    hub = to_datasets(batch[:1])
    assert len(hub[0]["slices"]) == 12 and hub[0]["instances"] == batch.instances[0].tolist()


@pytest.mark.parametrize("bad, match", [(dict(size=(8, 8)), "size"), (dict(size=(0, 8, 8)), "size"), (dict(size=(1, 4, 8)), "size"), (dict(diameter=2), "diameter"), (dict(membrane=0), "membrane"),
                                        (dict(membrane=9), "membrane"), (dict(noise=-1), "noise"), (dict(start=-1), "index"), (dict(seed=-1), "seed")])
def test_refusals(bad, match):
    with pytest.raises(ValueError, match=match):
        neurites(1, **bad)


@pytest.mark.parametrize("offset", [(0, 0, 0), (-1, 0, 0), (3, 0, 0), (1, 0)])
def test_affinities_refuse(offset):
    with pytest.raises(ValueError, match="offsets"):
        affinities(torch.ones(3, 8, 8, dtype=torch.long), (offset,))
