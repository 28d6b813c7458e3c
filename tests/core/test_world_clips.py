"""Clips are addressed, true in every frame, and validated."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.world import Scenes, WorldDataset, graph, scenes, to_datasets
from tokenkit.core.world_clips import ACTIONS, VERBS, Clips, clips, guest_questions, narrations
from tokenkit.core.world_language import WORDS, captions, questions, tokenize
from tokenkit.core.world_paint import COLORS, SHAPES

FIELDS = list(Clips.__dataclass_fields__)


def same(a: Clips, b: Clips) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 10**9), cut=st.integers(1, 4), guest=st.sampled_from([None, 1, 2]))
def test_any_split_into_batches_gives_the_same_clips(seed, start, cut, guest):
    whole = clips(5, 32, 3, seed=seed, start=start, guest=guest)
    assert same(whole[:cut], clips(cut, 32, 3, seed=seed, start=start, guest=guest))
    assert same(whole[[4, cut - 1]], clips([4, cut - 1], 32, 3, seed=seed, start=start, guest=guest))


def test_chunks_do_not_matter(monkeypatch):
    whole = clips(5, 32, 3)
    monkeypatch.setattr("tokenkit.core.world_clips.CHUNK_PIXELS", 2 * 32**2)
    assert same(whole, clips(5, 32, 3))


def test_seeds_and_splits_are_different():
    base = clips(3, 32, 2).videos
    for other in (clips(3, 32, 2, seed=1), clips(3, 32, 2, split="test"), clips(3, 32, 2, start=3)):
        assert not any(torch.equal(a, b) for a in base for b in other.videos)


def test_shapes_types_and_ranges():
    batch = clips(4, 48, 5, objects=(0, 2), seed=1)
    assert batch.videos.shape == (4, 5, 3, 48, 48) and batch.videos.dtype == torch.float32
    assert torch.equal((batch.videos * 255).round() / 255, batch.videos) and batch.videos.min() >= 0
    assert batch.boxes.shape == (4, 5, 2, 4) and batch.owner.shape == (4, 5, 48, 48) and batch.centers.shape == (4, 5, 2, 2)
    assert batch.present.dtype == torch.bool and torch.equal(batch.present.all(1), batch.shapes >= 0)
    assert torch.equal(batch.actions >= 0, batch.shapes >= 0) and set(VERBS) == set(ACTIONS)


def test_a_still_clip_is_its_scene():
    still, scene = clips(6, 32, 2, actions=("still",), noise=0.0), scenes(6, 32, objects=(1, 3), noise=0.0)
    assert torch.equal(still.videos[:, 0], scene.images) and torch.equal(still.videos[:, 1], scene.images)
    assert torch.equal(still.boxes[:, 1], scene.boxes) and torch.equal(still.owner[:, 1], scene.owner)


def test_noise_is_new_in_each_frame():
    video = clips(1, 32, 2, actions=("still",), noise=0.1).videos[0]
    assert 0.08 < (video[0] - video[1]).std() / 2**0.5 < 0.11


def test_masks_follow_tracks():
    batch = clips(60, 48, 5, objects=1, shapes=("circle", "square", "diamond"), difficulty="easy")
    grid = torch.arange(48) + 0.5
    masks = (batch.owner == 0).float()
    mass = masks.sum((-2, -1))
    middle = torch.stack([(masks.sum(-2) * grid).sum(-1) / mass, (masks.sum(-1) * grid).sum(-1) / mass], -1)
    assert (middle - batch.centers[:, :, 0]).norm(dim=-1).max() < 0.6
    for b in range(60):
        for t in range(5):
            rows, columns = torch.nonzero(masks[b, t], as_tuple=True)
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == batch.boxes[b, t, 0].tolist()
    assert (batch.boxes >= 0).all() and (batch.boxes <= 48).all() and (batch.visible == 1).all()


@pytest.mark.parametrize("action", ACTIONS)
def test_actions_do_what_they_say(action):
    batch = clips(12, 48, 5, objects=1, actions=(action,), speed=0.5)
    move = (batch.centers[:, -1] - batch.centers[:, 0])[:, 0]
    swell, turn = (getattr(batch, name)[:, -1, 0] for name in ("radius", "angle"))
    swell, turn = swell / batch.radius[:, 0, 0], turn - batch.angle[:, 0, 0]
    assert (batch.labels == ACTIONS.index(action)).all()
    wanted = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(action, (0, 0))
    along = move @ torch.tensor(wanted, dtype=torch.float32)
    assert (along > 8).all() if any(wanted) else torch.allclose(move, torch.zeros(()), atol=1e-3)
    assert torch.allclose(swell, torch.tensor({"grow": 2.0, "shrink": 0.5}.get(action, 1.0)), atol=1e-4)
    assert torch.allclose(turn.abs(), torch.tensor(np.pi if action == "spin" else 0.0, dtype=torch.float32), atol=1e-4)
    path = (batch.centers[:, 1:] - batch.centers[:, :-1]).norm(dim=-1).sum((1, 2))
    assert (path > 5).all() if action == "orbit" else True
    assert (batch.centers - batch.radius[..., None] > 0).all() and (batch.centers + batch.radius[..., None] < 48).all()


def test_guests_are_there_for_their_frames_only():
    batch = clips(40, 32, 9, guest=3, objects=2)
    guest = batch.present[:, :, 1]
    assert batch.present[:, :, 0].all() and (guest.sum(1) == 3).all()
    runs = (guest[:, 1:] != guest[:, :-1]).sum(1)
    assert (runs <= 2).all() and len({tuple(row) for row in guest.tolist()}) > 4
    assert ((batch.owner == 1).any(-1).any(-1) == guest).all() and (batch.visible[:, :, 1] == guest).all()
    assert (batch.boxes[:, :, 1][~guest] == 0).all()


def test_frames_are_scenes_with_their_truth():
    batch = clips(6, 32, 4, guest=2, objects=(1, 3), scale=1.0)
    frames = batch.frames()
    assert isinstance(frames, Scenes) and len(frames) == 24 and torch.equal(frames.images[9], batch.videos[2, 1])
    for i in range(24):
        objects = graph(frames, i)["objects"]
        here = [k for k in range(3) if batch.present[i // 4, i % 4, k]]
        assert [thing["shape"] for thing in objects] == [SHAPES[batch.shapes[i // 4, k]] for k in here]
        assert frames.attributes[i, : len(SHAPES)].nonzero().flatten().tolist() == sorted({batch.shapes[i // 4, k].item() for k in here})
    assert len(captions(frames)) == 24 and questions(frames) and frames.coverage(8).shape == (24, 16)


def test_questions_about_guests_are_true_and_balanced():
    batch = clips(200, 32, 4, guest=1, objects=2)
    asked = guest_questions(batch)
    assert 0.4 < np.mean([q.answer == "yes" for q in asked]) < 0.6 and len(asked) > 190
    for q in asked:
        assert set(tokenize(q.text)) <= set(WORDS)
        words = q.text.removesuffix("?").split()
        fits = [all(w in words for w in (tuple(COLORS)[batch.colors[q.row, k]], SHAPES[batch.shapes[q.row, k]])) for k in range(2)]
        assert q.answer == "yes" or not any(fits)
        assert q.answer == "no" or fits[1]
    some = guest_questions(batch[[50, 3]])
    assert {(batch.index[[50, 3]][q.row].item(), q.text) for q in some} <= {(batch.index[q.row].item(), q.text) for q in asked}
    assert guest_questions(clips(2, 32, 2, objects=0)) == []


def test_narrations():
    batch = clips(10, 32, 2, objects=(0, 2))
    for row, text in enumerate(narrations(batch)):
        assert text.count(",") == max(batch.counts[row] - 1, 0) and (batch.counts[row] or text == "nothing happens")
        for k in range(batch.counts[row]):
            assert f"{SHAPES[batch.shapes[row, k]]} {VERBS[ACTIONS[batch.actions[row, k]]]}" in text
    with pytest.raises(ValueError, match="keys"):
        narrations(batch, keys=("colour",))


def test_views():
    data = WorldDataset(clips, 6, keys=("videos", "labels"), size=32, frames=2, start=4)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
    assert torch.equal(batch["videos"], clips(3, 32, 2, start=4).videos) and len(data) == 6
    with pytest.raises(ValueError, match="frames"):
        WorldDataset(clips, 6, keys=("videos",), frames=0)
    with pytest.raises(ValueError, match="keys"):
        WorldDataset(clips, 6, keys=("pictures",), size=32)
    pytest.importorskip("datasets")
    some = clips(2, 32, 3)
    view = to_datasets(some)
    pixels = torch.from_numpy(np.array(view[1]["frames"][2])).permute(2, 0, 1) / 255
    assert torch.allclose(pixels, some.videos[1, 2]) and view.features["label"].int2str(view[0]["label"]) == ACTIONS[some.labels[0]]


@pytest.mark.parametrize("change,word", [
    (dict(frames=0), "frames"), (dict(frames=2.0), "frames"), (dict(frames=65), "frames"), (dict(actions=()), "actions"),
    (dict(actions="left"), "actions"), (dict(actions=("jump",)), "actions"), (dict(speed=0), "speed"), (dict(speed=1.5), "speed"),
    (dict(speed=float("nan")), "speed"), (dict(guest=0), "guest"), (dict(guest=3), "guest"), (dict(objects=7), "objects"),
    (dict(n=0), "index"), (dict(start=-1), "index"), (dict(seed=-1), "seed"), (dict(task="film"), "task"), (dict(fps=3), "fps"),
])
def test_bad_arguments_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        clips(**(dict(n=1, size=32, frames=2) | change))
