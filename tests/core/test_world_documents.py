"""Pages are addressed, true to their words, boxes and ink, and validated."""
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.core.world import WorldDataset, to_datasets
from tokenkit.core.world_documents import Documents, documents, page_images, page_questions
from tokenkit.core.world_pages import ENTITIES, LAYOUTS, TAGS, Page, compose_register, page_pen

FIELDS = list(Documents.__dataclass_fields__)


def alike(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list) and a and isinstance(a[0], torch.Tensor):
        return len(a) == len(b) and all(map(torch.equal, a, b))
    return a == b


def same(a: Documents, b: Documents) -> bool:
    return all(alike(getattr(a, name), getattr(b, name)) for name in FIELDS)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 10**9), cut=st.integers(1, 5), kind=st.sampled_from(["register", "report"]))
def test_any_split_into_batches_gives_the_same_pages(seed, start, cut, kind):
    whole = documents(6, seed=seed, start=start, kind=kind)
    assert same(whole[:cut], documents(cut, seed=seed, start=start, kind=kind))
    assert same(whole[torch.tensor([5, cut - 1])], documents([5, cut - 1], seed=seed, start=start, kind=kind))


def test_pictures_do_not_depend_on_the_batch():
    whole = documents(4, 224)
    papers, ink = page_images(whole)
    again = page_images(whole[[2, 0]])
    assert torch.equal(again[0], papers[[2, 0]]) and torch.equal(again[1], ink[[2, 0]])


def test_seeds_and_splits_are_different():
    base = documents(4)
    for other in (documents(4, seed=1), documents(4, split="test"), documents(4, start=4)):
        assert not any(a == b for a in base.words for b in other.words)


def test_lengths_and_vocabularies():
    batch = documents(120)
    for words, boxes, segments, tags, roles in zip(batch.words, batch.boxes, batch.segments, batch.tags, batch.roles):
        assert 40 <= len(words) <= 90 and len(words) == len(boxes) == len(segments) == len(tags) == len(roles)
        assert set(tags) <= set(TAGS) and set(roles) <= {"title", "label", "value", "footer"}
        assert (boxes >= 0).all() and (boxes <= 672).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (segments.diff() >= 0).all() and segments[0] == 0 and (segments.diff() <= 1).all()
    assert set(batch.layouts.tolist()) == set(range(len(LAYOUTS))) and len(TAGS) == 1 + 2 * len(ENTITIES)


def test_tags_spell_the_fields():
    for words, tags, known in zip((batch := documents(60)).words, batch.tags, batch.fields):
        found = {}
        for word, tag in zip(words, tags):
            if tag.startswith("B-"):
                found.setdefault(tag[2:], []).append([word])
            elif tag.startswith("I-"):
                found[tag[2:]][-1].append(word)
        spelled = {name: sorted(" ".join(value) for value in values) for name, values in found.items()}
        assert spelled == {name: sorted(values) for name, values in known.items()}
        assert len(known["BIRTH"]) == len(known["ENTRY"]) == len(known["DIRECTOR"]) and set(known) == set(ENTITIES)


def test_entities_stay_in_one_segment_and_words_apart():
    for kind in ("register", "report"):
        batch = documents(80, 1000, skew=0, kind=kind)
        for boxes, segments, tags in zip(batch.boxes, batch.segments, batch.tags):
            cover = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
            assert not (cover.clamp(min=0).prod(-1).fill_diagonal_(0) > 0).any(), "words overlap"
            assert all(segments[k] == segments[k - 1] for k, tag in enumerate(tags) if tag.startswith("I-"))


def test_dates_stand_under_their_label():
    batch = documents(40, 1000, layouts=("rows-table",), skew=0)
    for row in range(40):
        left = {word: batch.boxes[row][k, 0] for k, word in enumerate(batch.words[row]) if batch.roles[row][k] == "label"}
        for k, tag in enumerate(batch.tags[row]):
            if tag in ("B-BIRTH", "B-ENTRY"):
                own, other = ("Born", "Entered") if tag == "B-BIRTH" else ("Entered", "Born")
                assert abs(batch.boxes[row][k, 0] - left[own]) < 12 < abs(batch.boxes[row][k, 0] - left[other])
    first = [left["Born"] < left["Entered"] for row in range(40)
             for left in [{w: batch.boxes[row][k, 0] for k, w in enumerate(batch.words[row]) if batch.roles[row][k] == "label"}]]
    assert 8 < sum(first) < 32, "either column may come first"


def test_reading_order_follows_the_lines():
    batch = documents(20, 1000, skew=0)
    for boxes, segments, roles in zip(batch.boxes, batch.segments, batch.roles):
        lines = [boxes[segments == s][0] for s in range(int(segments.max()) + 1)]
        middle = torch.stack([(box[1] + box[3]) / 2 for box in lines])
        assert (middle.diff() > -6).all()
    rows = [w.index("Born") < w.index("Entered") for w in documents(60, layouts=("rows-table",), jitter=3.0).words]
    assert 15 < sum(rows) < 45


@pytest.mark.parametrize("kind,skew", [("register", 0), ("register", 4), ("report", 2)])
def test_ink_lies_in_the_boxes(kind, skew):
    batch = documents(4, 672, kind=kind, skew=skew)
    papers, ink = page_images(batch, noise=0.0)
    assert papers.shape == (4, 3, 672, 672) and ink.shape == (4, 672, 672) and ink.dtype == torch.bool
    assert 0 <= papers.min() and papers.max() <= 1 and papers[:, 0][ink].max() < 0.75 < papers[:, 0][~ink].median()
    for b in range(4):
        covered = torch.zeros(672, 672, dtype=torch.bool)
        for x0, y0, x1, y1 in batch.boxes[b].tolist():
            box = slice(int(y0), int(y1) + 1), slice(int(x0), int(x1) + 1)
            covered[max(int(y0) - 1, 0) : int(y1) + 2, max(int(x0) - 1, 0) : int(x1) + 2] = True
            assert ink[b][box].any(), "a word without ink"
        stray = (ink[b] & ~covered).sum() / ink[b].sum()
        assert stray < (0.02 if not batch.sheets[b]["rules"] else 0.5)


def test_skew_grows_and_turns_boxes():
    flat, turned = documents(6, skew=0), documents(6, skew=3)
    assert (flat.skew == 0).all() and (turned.skew.abs() <= 3).all() and turned.skew.abs().max() > 0.5
    for a, b, degrees in zip(flat.boxes, turned.boxes, turned.skew.tolist()):
        middle = [(box[:, :2] + box[:, 2:]) / 2 - 336 for box in (a, b)]
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        assert torch.allclose(middle[0] @ torch.tensor([[c, s], [-s, c]], dtype=torch.float32), middle[1], atol=0.01)


def test_boxes_scale_with_the_page():
    small, large = documents(3, 336), documents(3, 672)
    assert small.words == large.words and all(torch.allclose(2 * a, b, atol=1e-3) for a, b in zip(small.boxes, large.boxes))


def test_segment_boxes():
    batch = documents(2)
    frames = batch.segment_boxes(1)
    for k in range(len(frames)):
        mine = batch.boxes[1][batch.segments[1] == batch.segments[1][k]]
        assert torch.equal(frames[k], torch.cat([mine[:, :2].amin(0), mine[:, 2:].amax(0)]))


def test_questions_are_answered_by_their_words():
    batch = documents(60)
    asked = page_questions(batch, per_page=4)
    assert {q.kind for q in asked} == {"field", "date", "count"} and len(asked) == 240
    for q in asked:
        known = batch.fields[q.row]
        if q.kind == "count":
            assert q.answer == str(len(known["DIRECTOR"])) and q.where == ()
            continue
        assert " ".join(batch.words[q.row][k] for k in q.where) == q.answer
        if q.kind == "date":
            (person,) = [i for i, name in enumerate(known["DIRECTOR"]) if name in q.text]
            assert known["BIRTH" if "born" in q.text else "ENTRY"][person] == q.answer
    assert [q.text for q in page_questions(batch[[7]])] == [q.text for q in page_questions(batch) if q.row == 7]


def test_reports_have_parts_and_white_paper():
    batch = documents(40, kind="report")
    assert {role for roles in batch.roles for role in roles} == {"title", "heading", "paragraph", "table"}
    assert (batch.layouts == -1).all() and all(not known for known in batch.fields) and {t for tags in batch.tags for t in tags} == {"O"}
    _, ink = page_images(batch[:8])
    share = torch.nn.functional.max_pool2d(ink[:, None].float(), 14).mean((1, 2, 3))
    assert (share > 0.05).all() and (share < 0.6).all() and share.std() > 0.02


def test_page_writes_where_it_is_told():
    page = Page(random.Random(0), jitter=0.0)
    end = page.put("Share capital", 100, 50, 20, role="label")
    (_, x0, x1), (_, x2, x3) = page.segments[0]["words"]
    assert x0 == 100 and x1 < x2 < x3 < end and abs(x1 - x0 - page_pen(page.font, 200).getlength("Share") / 10) < 0.5
    compose_register(page, "columns-across")
    assert set(page.fields) == set(ENTITIES)


def test_views():
    data = WorldDataset(documents, 6, keys=("words", "boxes"), start=4)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3, collate_fn=list)))
    assert [page["words"] for page in batch] == documents(3, start=4).words
    pytest.importorskip("datasets")
    some = documents(2, 224)
    view = to_datasets(some)
    assert view[1]["words"] == some.words[1] and json.loads(view[0]["fields"]) == some.fields[0]
    assert view[0]["image"].size == (224, 224) and view[1]["tags"] == some.tags[1]


@pytest.mark.parametrize("change,word", [
    (dict(size=64), "size"), (dict(size=300.0), "size"), (dict(kind="letter"), "kind"), (dict(layouts=()), "layouts"),
    (dict(layouts="rows-table"), "layouts"), (dict(layouts=("grid",)), "layouts"), (dict(jitter=-1), "jitter"),
    (dict(jitter=7), "jitter"), (dict(jitter=float("nan")), "jitter"), (dict(skew=-1), "skew"), (dict(skew=5), "skew"),
    (dict(n=0), "index"), (dict(start=-1), "index"), (dict(seed=-1), "seed"),
])
def test_bad_arguments_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        documents(**(dict(n=1) | change))


def test_bad_pictures_and_questions_are_refused():
    with pytest.raises(ValueError, match="noise"):
        page_images(documents(1), noise=1)
    for bad in (0, 7):
        with pytest.raises(ValueError, match="per_page"):
            page_questions(documents(1), per_page=bad)
    with pytest.raises(ValueError, match="reports|register"):
        page_questions(documents(1, kind="report"))
