"""Tokenworld: scenes are addressed, true and validated."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.world import (ATTRIBUTES, RELATIONS, SIZES, SceneDataset, Scenes, World, graph, make_world,
                                 relations, render, scenes, to_datasets)
from tokenkit.core.world_draw import pair_weights
from tokenkit.core.world_paint import (BACKGROUNDS, CLUTTER, COLORS, SHAPES, TEXTURES, Draws, polygon_distance,
                                       shape_distance, texture)

FIELDS = list(Scenes.__dataclass_fields__)


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 10**9), cut=st.integers(1, 8), task=st.sampled_from(["scene", "class"]))
def test_any_split_into_batches_gives_the_same_scenes(seed, start, cut, task):
    whole = scenes(9, 32, seed=seed, start=start, task=task)
    assert same(whole[:cut], scenes(cut, 32, seed=seed, start=start, task=task))
    assert same(whole[cut:], scenes(9 - cut, 32, seed=seed, start=start + cut, task=task))


def test_order_and_chunks_do_not_matter(monkeypatch):
    whole = scenes(12, 48)
    rows = [11, 3, 3, 0]
    assert same(whole[rows], render(make_world(size=48), rows))
    monkeypatch.setattr("tokenkit.core.world.CHUNK_PIXELS", 2 * 48**2)
    assert same(whole, scenes(12, 48))


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = scenes(6, 64)
        torch.set_num_threads(2)
        assert same(one, scenes(6, 64))
    finally:
        torch.set_num_threads(before)


def test_seeds_and_splits_are_different_worlds():
    base = scenes(6, 32).images
    for other in (scenes(6, 32, seed=1), scenes(6, 32, split="test"), scenes(6, 32, start=6)):
        assert not any(torch.equal(a, b) for a in base for b in other.images)


def test_known_scene_stays_what_it_is():
    batch = scenes(4, 32, seed=3)
    assert batch.shapes[:, 0].tolist() == EXPECTED_SHAPES
    assert abs(batch.images.mean().item() - EXPECTED_MEAN) < 1e-4


EXPECTED_SHAPES, EXPECTED_MEAN = [10, 11, 2, 9], 0.39817


@pytest.mark.parametrize("size,task,difficulty", [(32, "scene", "easy"), (64, "class", "hard"), (96, "scene", "hard")])
def test_shapes_types_and_ranges(size, task, difficulty):
    batch = scenes(5, size, task=task, difficulty=difficulty)
    k = batch.shapes.shape[1]
    assert batch.images.shape == (5, 3, size, size) and batch.images.dtype == torch.float32
    assert batch.images.min() >= 0 and batch.images.max() <= 1 and batch.images.is_contiguous()
    assert torch.equal((batch.images * 255).round() / 255, batch.images)
    assert batch.boxes.shape == (5, k, 4) and batch.owner.shape == (5, size, size)
    assert batch.attributes.shape == (5, len(ATTRIBUTES)) and batch.instance_masks.shape == (5, k, size, size)
    assert len(batch) == 5 and len(batch[1:3]) == 2 and len(batch[torch.tensor([True, False, False, False, True])]) == 2


def test_truth_agrees_with_itself():
    batch = scenes(40, 64)
    there = torch.arange(6) < batch.counts[:, None]
    for words in (batch.shapes, batch.colors, batch.textures, batch.sizes):
        assert torch.equal(words >= 0, there)
    assert (batch.visible[~there] == 0).all() and (batch.visible <= 1).all() and (batch.visible[there] > 0).any()
    for b in range(len(batch)):
        for k in range(batch.counts[b]):
            rows, columns = torch.nonzero(batch.instance_masks[b, k], as_tuple=True)
            x0, y0, x1, y1 = batch.boxes[b, k].tolist()
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            if len(rows):
                assert x0 <= columns.min() and columns.max() < x1 and y0 <= rows.min() and rows.max() < y1
                assert (batch.semantic_masks[b][rows, columns] == 1 + batch.shapes[b, k]).all()
            if batch.visible[b, k] == 1:
                assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (x0, x1, y0, y1)
    assert torch.equal(batch.semantic_masks == 0, batch.owner < 0)


def test_attributes_name_what_is_there():
    batch = scenes(20, 32)
    for b in range(20):
        found = graph(batch, b)
        words = {thing[key] for thing in found["objects"] for key in ("shape", "color", "texture")}
        words.add(found["background"]["color"])
        assert words == {ATTRIBUTES[a] for a in batch.attributes[b].nonzero().flatten()}


def test_pixels_show_the_colour():
    batch = scenes(60, 64, objects=1, difficulty="easy", textures=("plain",), sizes=("large",))
    inside = torch.stack([image[:, mask].median(dim=1).values for image, mask in zip(batch.images, batch.owner == 0)])
    palette = torch.tensor(list(COLORS.values()))
    assert (torch.cdist(inside, palette).argmin(1) == batch.colors[:, 0]).float().mean() > 0.9


def test_coverage_is_the_covered_share():
    batch = scenes(3, 32)
    cover = batch.coverage(8).view(3, 4, 4)
    assert torch.allclose(cover[1, 2, 3], (batch.owner[1, 16:24, 24:32] >= 0).float().mean())
    with pytest.raises(ValueError, match="patch_size"):
        batch.coverage(7)


def test_ingredients_do_not_disturb_each_other():
    calm, busy = scenes(5, 48, difficulty="medium"), scenes(5, 48, difficulty="medium", clutter=20, noise=0.2, lighting=0.9)
    assert torch.equal(calm.owner, busy.owner) and torch.equal(calm.boxes, busy.boxes)
    assert not torch.equal(calm.images, busy.images)


def test_background_only():
    batch = scenes(4, 32, objects=0)
    assert (batch.labels == -1).all() and (batch.owner == -1).all() and (batch.counts == 0).all()
    assert graph(batch, 0)["objects"] == [] and (batch.attributes.sum(1) == 1).all()


def test_vocabulary_pairs_and_weights():
    batch = scenes(200, 32, shapes=("star", "ring"), colors=("blue",), textures=("dotted",), objects=2)
    assert set(batch.shapes.flatten().tolist()) == {SHAPES.index("star"), SHAPES.index("ring")}
    assert set(batch.colors.flatten().tolist()) == {tuple(COLORS).index("blue")}
    rare = scenes(600, 16, shapes=("star", "ring"), shape_weights=(1, 9), objects=1).labels
    assert 0.05 < (rare == SHAPES.index("star")).float().mean() < 0.16
    seen, unseen = (scenes(300, 16, pairs=p, objects=1) for p in ("seen", "unseen"))
    pairs = [set(zip(s.shapes[:, 0].tolist(), s.colors[:, 0].tolist())) for s in (seen, unseen)]
    assert not pairs[0] & pairs[1] and len(pairs[1]) == 24
    assert {s for s, _ in pairs[1]} == set(range(12)) and {c for _, c in pairs[1]} == set(range(10))
    tail = np.sort(pair_weights(World(long_tail=1.0)).ravel())[::-1]
    assert np.allclose(tail, 1 / np.arange(1, 121))


def test_relations_are_antisymmetric_and_in_the_graph():
    batch = scenes(10, 64)
    holds = relations(batch)
    left, right, above, below = holds.unbind(1)
    assert torch.equal(left, right.transpose(1, 2)) and torch.equal(above, below.transpose(1, 2))
    assert not (holds.diagonal(dim1=2, dim2=3)).any()
    for b in range(10):
        triples = graph(batch, b)["relations"]
        assert len(triples) == holds[b].sum()
        for i, name, j in triples:
            assert (j, RELATIONS[name], i) in triples


def test_objects_keep_apart_when_there_is_room():
    batch = scenes(60, 64, objects=2, occlusion=0.0, sizes=("small",), difficulty="easy")
    assert (batch.visible == 1).float().mean() > 0.98


def test_torch_dataset_and_hugging_face_view():
    data = SceneDataset(10, 32, keys=("images", "attributes"), start=5)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert torch.equal(batch["images"], scenes(4, 32, start=5).images)
    assert torch.equal(data[3]["images"], batch["images"][3]) and len(data) == 10
    with pytest.raises(IndexError):
        data[10]
    pytest.importorskip("datasets")
    some = scenes(3, 32)
    view = to_datasets(some)
    pixels = torch.from_numpy(np.array(view[1]["image"])).permute(2, 0, 1) / 255
    assert torch.allclose(pixels, some.images[1]) and view.features["label"].int2str(view[0]["label"]) == SHAPES[some.labels[0]]
    assert json.loads(view[2]["graph"])["background"]["color"] in BACKGROUNDS


@pytest.mark.parametrize("change,word", [
    (dict(size=8), "size"), (dict(size=32.0), "size"), (dict(objects=7), "objects"), (dict(objects=(3, 2)), "objects"),
    (dict(objects=-1), "objects"), (dict(difficulty="mad"), "difficulty"), (dict(shapes=("blob",)), "shapes"),
    (dict(shapes=()), "shapes"), (dict(colors="red"), "colors"), (dict(textures=("plain", "plain")), "textures"),
    (dict(pairs="some"), "pairs"), (dict(shape_weights=(1.0,)), "shape_weights"), (dict(noise=-0.1), "noise"),
    (dict(noise=float("nan")), "noise"), (dict(clutter=100), "clutter"), (dict(occlusion=1.5), "occlusion"),
    (dict(lighting=2), "lighting"), (dict(scale=3.0), "scale"), (dict(long_tail=-1), "long_tail"), (dict(color=3), "color"),
    (dict(task="video"), "task"), (dict(n=0), "index"), (dict(start=-1), "index"), (dict(seed=-1), "seed"),
    (dict(shapes=("circle",), colors=("orange",), pairs="unseen"), "pair"),
])
def test_bad_arguments_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        scenes(**(dict(n=1, size=32) | change))


def test_dataset_refuses_bad_arguments():
    for bad in (dict(n=0), dict(keys=("pictures",)), dict(start=-1)):
        with pytest.raises(ValueError, match="keys"):
            SceneDataset(**(dict(n=2, size=32) | bad))


def test_random_numbers_are_addressed_and_uniform():
    index = np.arange(3000)
    draws = Draws(5, index)
    assert (Draws(5, index[[17]]).uniform("a", 3) == draws.uniform("a", 3)[17]).all()
    assert abs(draws.uniform("a").mean() - 0.5) < 0.03 and not (draws.uniform("a") == draws.uniform("b")).any()
    assert abs(np.corrcoef(draws.uniform("a")[1:], draws.uniform("a")[:-1])[0, 1]) < 0.06
    assert set(draws.integers("c", high=5)) == set(range(5)) and abs((draws.weighted("d", weights=np.array([1, 3])) == 1).mean() - 0.75) < 0.04


def test_distances_have_the_right_sign_and_size():
    square = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    points = np.array([[0.0, 0], [2, 0], [2, 2], [0.5, 0]])
    assert np.allclose(polygon_distance(points, square), [-1, 1, np.sqrt(2), -0.5])
    assert np.allclose(polygon_distance(points, square[::-1]), [-1, 1, np.sqrt(2), -0.5])
    for name in SHAPES + CLUTTER:
        assert shape_distance(name, np.array([[3.0, 3.0]]))[0] > 0
    assert shape_distance("ring", np.zeros((1, 2)))[0] > 0 > shape_distance("circle", np.zeros((1, 2)))[0]
    with pytest.raises(ValueError, match="shape"):
        shape_distance("blob", points)


def test_textures_stay_in_range():
    u, v = np.meshgrid(np.linspace(-5, 5, 50, dtype=np.float32), np.linspace(-5, 5, 50, dtype=np.float32))
    for name in TEXTURES:
        pattern = texture(name, u, v)
        assert pattern.shape == u.shape and 0 <= pattern.min() and pattern.max() <= 1
        assert name == "plain" or 0.05 < pattern.mean() < 0.75
    with pytest.raises(ValueError, match="texture"):
        texture("paisley", u, v)
