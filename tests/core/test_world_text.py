"""Crops of words are addressed, true to the pixel, and validated."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.world import WorldDataset, to_datasets
from tokenkit.core.world_text import CHARACTERS, FONTS, SceneTexts, font_file, glyphs, scene_texts

FIELDS = list(SceneTexts.__dataclass_fields__)


def same(a: SceneTexts, b: SceneTexts) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in FIELDS]
    return all(x == y if isinstance(x, list) else torch.equal(x, y) for x, y in pairs)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 10**9), cut=st.integers(1, 5))
def test_any_split_into_batches_gives_the_same_crops(seed, start, cut):
    whole = scene_texts(6, seed=seed, start=start)
    assert same(whole[:cut], scene_texts(cut, seed=seed, start=start))
    assert same(whole[torch.tensor([5, cut - 1])], scene_texts([5, cut - 1], seed=seed, start=start))


def test_chunks_do_not_matter(monkeypatch):
    whole = scene_texts(5)
    monkeypatch.setattr("tokenkit.core.world_text.CHUNK_PIXELS", 2 * 4 * 32 * 64)
    assert same(whole, scene_texts(5))


def test_seeds_and_splits_are_different():
    base = scene_texts(4)
    for other in (scene_texts(4, seed=1), scene_texts(4, split="test"), scene_texts(4, start=4)):
        assert not set(base.words) & set(other.words)


@pytest.mark.parametrize("size,length", [((32, 64), (3, 5)), ((32, 128), (1, 12)), ((96, 96), (3, 3)), ((16, 16), (1, 1))])
def test_shapes_types_and_words(size, length):
    batch = scene_texts(30, size, length=length)
    assert batch.images.shape == (30, 3, *size) and batch.images.dtype == torch.float32 and batch.owner.shape == (30, *size)
    assert torch.equal((batch.images * 255).round() / 255, batch.images) and batch.images.min() >= 0 and batch.images.max() <= 1
    assert batch.targets.shape == (30, length[1]) and batch.boxes.shape == (30, length[1], 4)
    for word, code, count in zip(batch.words, batch.targets.tolist(), batch.lengths.tolist()):
        assert word == "".join(CHARACTERS[i] for i in code if i >= 0) and len(word) == count and length[0] <= count <= length[1]
        assert code[count:] == [-1] * (length[1] - count)


def test_characters_are_where_the_boxes_say():
    batch = scene_texts(60, (48, 96))
    for b in range(60):
        middles = []
        for k in range(5):
            rows, columns = torch.nonzero(batch.owner[b] == k, as_tuple=True)
            box = batch.boxes[b, k].tolist()
            if k >= batch.lengths[b]:
                assert not len(rows) and box == [0, 0, 0, 0]
                continue
            assert len(rows) and box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            middles.append(columns.float().mean().item())
        assert middles == sorted(middles), "characters read from left to right"


def test_ink_differs_from_the_ground():
    batch = scene_texts(40, (48, 96), severity=0)
    ink = torch.stack([image[:, owner >= 0].mean(1) for image, owner in zip(batch.images, batch.owner)])
    ground = torch.stack([image[:, owner < 0].mean(1) for image, owner in zip(batch.images, batch.owner)])
    assert ((ink - ground).abs().amax(1) > 0.1).all()
    fade = [scene_texts(40, (48, 96), severity=level) for level in (0, 5)]
    spread = [torch.stack([(i[:, o >= 0].mean(1) - i[:, o < 0].mean(1)).norm() for i, o in zip(b.images, b.owner)]).mean() for b in fade]
    assert spread[1] < 0.8 * spread[0]


def test_severity_turns_the_line_and_keeps_the_word():
    calm, wild = scene_texts(40, (48, 96), severity=0, length=(5, 5)), scene_texts(40, (48, 96), severity=5, length=(5, 5))
    assert calm.words == wild.words and torch.equal(calm.fonts, wild.fonts)
    tilt = [((b.boxes[:, 4, 1::2].mean(1) - b.boxes[:, 0, 1::2].mean(1)).abs()).mean() for b in (calm, wild)]
    assert tilt[1] > 2 * tilt[0] and (wild.severity == 5).all()
    mixed = scene_texts(200, severity=(2, 4)).severity
    assert set(mixed.tolist()) == {2, 3, 4}


def test_vocabulary_charset_and_fonts():
    batch = scene_texts(60, vocabulary=("exit", "to"), fonts=("mono", "roman"))
    assert set(batch.words) == {"exit", "to"} and {tuple(FONTS)[i] for i in batch.fonts} == {"mono", "roman"}
    assert batch.targets.shape[1] == 4
    digits = scene_texts(50, charset="0123456789", length=(2, 2))
    assert all(word.isdigit() for word in digits.words) and 0 <= digits.targets.min() and digits.targets.max() == 9
    counts = torch.bincount(scene_texts(400, (16, 32)).targets.flatten() + 1, minlength=27)[1:]
    assert counts.min() > 0.5 * counts.float().mean()


def test_glyph_tables():
    for name in FONTS:
        ink, advance = glyphs(name)
        assert ink.shape == (len(CHARACTERS), 60, 60) and (ink.max((1, 2)) > 0.9).all() and (advance > 0.15).all()
        assert not ink[:, 0].any() and not ink[:, -1].any() and not ink[:, :, 0].any() and not ink[:, :, -1].any(), f"{name} is cut off"
        assert font_file(name).exists()
    with pytest.raises(ValueError, match="font"):
        font_file("comic")


def test_views():
    data = WorldDataset(scene_texts, 6, keys=("images", "words"), start=4)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
    assert torch.equal(batch["images"], scene_texts(3, start=4).images) and list(batch["words"]) == scene_texts(3, start=4).words
    pytest.importorskip("datasets")
    some = scene_texts(2)
    view = to_datasets(some)
    pixels = torch.from_numpy(np.array(view[1]["image"])).permute(2, 0, 1) / 255
    assert torch.allclose(pixels, some.images[1]) and view[0]["text"] == some.words[0]
    assert view.features["font"].int2str(view[0]["font"]) == tuple(FONTS)[some.fonts[0]]


@pytest.mark.parametrize("change,word", [
    (dict(size=(8, 64)), "size"), (dict(size=(32, 64.0)), "size"), (dict(size=(32,)), "size"), (dict(length=(0, 3)), "length"),
    (dict(length=(4, 3)), "length"), (dict(length=(3, 17)), "length"), (dict(charset=""), "charset"), (dict(charset="aa"), "charset"),
    (dict(charset="aé"), "charset"), (dict(vocabulary=()), "vocabulary"), (dict(vocabulary="word"), "vocabulary"),
    (dict(vocabulary=("Exit",)), "vocabulary"), (dict(vocabulary=("",)), "vocabulary"), (dict(severity=6), "severity"),
    (dict(severity=(3, 2)), "severity"), (dict(severity=-1), "severity"), (dict(fonts=()), "fonts"), (dict(fonts="sans"), "fonts"),
    (dict(fonts=("comic",)), "fonts"), (dict(bend=-0.1), "bend"), (dict(bend=float("nan")), "bend"), (dict(n=0), "index"),
    (dict(start=-1), "index"), (dict(seed=-1), "seed"),
])
def test_bad_arguments_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        scene_texts(**(dict(n=1) | change))
