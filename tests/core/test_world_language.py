"""Captions, questions and references say what is true of the scene."""
import pytest
import torch

from tokenkit.core.world import graph, scenes
from tokenkit.core.world_language import (ANSWERS, KEYS, NUMBERS, QUESTION_KINDS, STYLES, WORDS, articled, captions,
                                          matches, pinpoint, questions, references, tokenize, wording, _lots)


@pytest.fixture(scope="module")
def batch():
    return scenes(150, 32, objects=(0, 5), scale=1.0, seed=2)


def things_of(batch, row):
    return [thing for thing in graph(batch, row)["objects"] if thing["visible"] >= 0.25]


def test_words_do_not_depend_on_the_batch(batch):
    some = batch[[7, 3]]
    assert captions(some) == [captions(batch)[i] for i in (7, 3)]
    asked = {(batch.index[q.row].item(), q.text, q.answer) for q in questions(batch, per_scene=3)}
    assert {(some.index[q.row].item(), q.text, q.answer) for q in questions(some, per_scene=3)} <= asked
    assert captions(batch, seed=1) != captions(batch, seed=0)


def test_every_word_is_in_the_vocabulary(batch):
    texts = [text for style in STYLES for text in captions(batch, style=style)]
    texts += [q.text for q in questions(batch, per_scene=6)] + [r.text for r in references(batch)]
    assert {word for text in texts for word in tokenize(text)} <= set(WORDS)
    assert {q.answer for q in questions(batch, per_scene=6)} <= set(ANSWERS) <= set(WORDS)


def test_captions_name_all_visible_things(batch):
    for style in STYLES:
        for row, text in enumerate(captions(batch, style=style, keys=("color", "shape"))):
            for thing in things_of(batch, row):
                assert f"{thing['color']} {thing['shape']}" in text
            assert text.endswith(f"{graph(batch, row)['background']['color']} background")
    assert not any("background" in text for row, text in enumerate(captions(batch, background=False)) if things_of(batch, row))


def test_relations_in_captions_hold():
    pair = scenes(40, 32, objects=2, scale=1.0)
    for row, text in enumerate(captions(pair, style="relation", background=False)):
        for name in ("left of", "right of", "above", "below"):
            if f" {name} " in text:
                first, second = text.split(f" {name} ")
                objects = graph(pair, row)["objects"]
                i, j = (next(k for k, t in enumerate(objects) if articled(wording({key: t[key] for key in KEYS})) == phrase)
                        for phrase in (first, second))
                if objects[0] | dict(box=0, visible=0) != objects[1] | dict(box=0, visible=0):
                    assert (i, name, j) in graph(pair, row)["relations"]


def parse(phrase: str) -> dict:
    """The description that a noun phrase words."""
    from tokenkit.core.world_language import _WORDS_OF
    words = phrase.removeprefix("the ").removeprefix("an ").removeprefix("a ").split()
    return {key: word for word in words for key in KEYS if word in _WORDS_OF[key]}


def test_references_single_out_their_object(batch):
    found = references(batch)
    assert len(found) > 250 and any(" of the " in r.text or "above the" in r.text for r in found)
    for r in found:
        objects = graph(batch, r.row)["objects"]
        for name in (" left of ", " right of ", " above ", " below "):
            if name in r.text:
                target, landmark = (parse(part) for part in r.text.split(name))
                seen = [k for k, t in enumerate(objects) if t["visible"] >= 0.25]
                meant = {i for i, relation, j in graph(batch, r.row)["relations"] if relation == name.strip() and i in seen
                         and j in seen and matches(objects[i], target) and matches(objects[j], landmark)}
                assert meant == {r.object}
                break
        else:
            assert [k for k, t in enumerate(objects) if t["visible"] >= 0.25 and matches(t, parse(r.text))] == [r.object]
    plain = references(batch, landmarks=False)
    assert not any(" of " in r.text for r in plain)


def test_existence_count_and_background_answers_are_true(batch):
    for q in questions(batch, kinds=("existence", "count", "background"), per_scene=5):
        things = things_of(batch, q.row)
        if q.kind == "existence":
            asked = parse(q.text.removeprefix("is there ").rstrip("?"))
            assert q.answer == ("yes" if any(matches(t, asked) for t in things) else "no")
        elif q.kind == "count" and q.text != "how many things are there?":
            word = q.text.split()[2]
            shape = word[:-2] if word == "crosses" else word[:-1] if word.endswith("s") and word not in ("plain",) else word
            count = sum(shape in (t["shape"], t["color"], t["texture"]) for t in things)
            assert q.answer == NUMBERS[count], q
        elif q.text == "how many things are there?":
            assert q.answer == NUMBERS[len(things)]
        elif q.kind == "background":
            assert q.answer == graph(batch, q.row)["background"]["color"]


def test_attribute_relation_and_comparison_answers_are_true(batch):
    order = ("small", "medium", "large")
    for q in questions(batch, kinds=("attribute", "relation", "comparison"), per_scene=6):
        scene = graph(batch, q.row)
        seen = [k for k, t in enumerate(scene["objects"]) if t["visible"] >= 0.25]
        one = lambda phrase: next(k for k in seen if matches(scene["objects"][k], parse(phrase)))  # noqa: E731
        if q.kind == "attribute":
            key = q.text.split()[1]
            assert scene["objects"][one(q.text.split(" is ")[1].rstrip("?"))][key] == q.answer
        elif q.kind == "relation" and q.text.startswith("is the"):
            name = next(n for n in ("left of", "right of", "above", "below") if n in q.text)
            a, b = q.text.removeprefix("is the ").rstrip("?").split(f" {name} ")
            assert ((one(a), name, one(b)) in scene["relations"]) == (q.answer == "yes")
        elif "larger" in q.text:
            a, b = (order.index(scene["objects"][one(p)]["size"]) for p in q.text.removeprefix("is ").rstrip("?").split(" larger than "))
            assert (a > b) == (q.answer == "yes")


def test_kinds_per_scene_and_repeats(batch):
    asked = questions(batch, kinds=("existence", "count"), per_scene=4)
    assert {q.kind for q in asked} == {"existence", "count"}
    for row in range(len(batch)):
        mine = [q.text for q in asked if q.row == row]
        assert len(mine) <= 4 and len(set(mine)) == len(mine)
    yes = [q.answer == "yes" for q in questions(scenes(400, 16, scale=1.0), kinds=("existence",))]
    assert 0.4 < sum(yes) / len(yes) < 0.6


def test_pinpoint_is_shortest_or_none():
    things = [dict(size="small", color="red", texture="plain", shape="star"), dict(size="small", color="blue", texture="plain", shape="star")]
    lots = _lots(scenes(1, 16), 0, "x")[0]
    assert pinpoint(things, 0, lots) == dict(color="red")
    assert pinpoint([things[0], things[0]], 0, lots) is None


def test_bad_arguments(batch):
    with pytest.raises(ValueError, match="style"):
        captions(batch, style="poem")
    with pytest.raises(ValueError, match="keys"):
        captions(batch, keys=("colour",))
    with pytest.raises(ValueError, match="kinds"):
        questions(batch, kinds=("why",))
    with pytest.raises(ValueError, match="per_scene"):
        questions(batch, per_scene=0)
    assert captions(batch[torch.tensor([0])])
