"""The zoo's loader: cards, weights and what it refuses."""
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenkit import zoo
from tokenkit.text.engine import train_bpe
from tokenkit.zoo import hub
from tokenkit.zoo.lm_world import build_lm

LINEAR = dict(builder="torch.nn:Linear", arguments=dict(in_features=3, out_features=2), data="none", recipe="none",
              scores={"top-1": 0.5}, seed=0, steps=1, seconds=2.0)


def test_round_trip_through_a_folder(tmp_path):
    line = nn.Linear(3, 2)
    card = hub.save_model("line", line, folder=tmp_path, **LINEAR)
    again = hub.load("line", folder=tmp_path)
    assert hub.names(tmp_path) == ["line"] and hub.card("line", tmp_path) == card == again.card
    assert torch.allclose(again.weight, line.weight, atol=1e-3) and not again.training and again.weight.dtype == torch.float32
    hub.save_model("line", line, folder=tmp_path, half=False, **LINEAR)
    assert torch.equal(hub.load("line", folder=tmp_path).weight, line.weight)
    assert hub.load("line", folder=tmp_path, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_changed_weights_and_unknown_names_are_refused(tmp_path):
    hub.save_model("line", nn.Linear(3, 2), folder=tmp_path, **LINEAR)
    with pytest.raises(ValueError, match="name must be one of"):
        hub.load("lion", folder=tmp_path)
    path = tmp_path / "line.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="not those"):
        hub.load("line", folder=tmp_path)
    line = nn.Linear(3, 2)
    line.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="finite"):
        hub.save_model("line", line, folder=tmp_path, **LINEAR)


@pytest.mark.parametrize("name", hub.names())
def test_every_model_loads_quickly_and_fits_its_card(name):
    hub.load(name)  # imports the library behind it
    begin = time.process_time()
    model = hub.load(name)
    assert time.process_time() - begin < 1
    assert sum(p.numel() for p in model.parameters()) == model.card.parameters and not model.training
    assert all(value.isfinite().all() for value in model.state_dict().values())
    data = (hub.WEIGHTS / f"{name}.safetensors").read_bytes()
    assert len(data) == model.card.bytes and hashlib.sha256(data).hexdigest() == model.card.sha256
    assert all(0 <= score <= 1 for key, score in model.card.scores.items() if key.startswith("top-1"))


def test_hub_folder(tmp_path):
    path = hub.hub_folder("vit-world", tmp_path / "new")
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert json.loads((path / "config.json").read_text())["name"] == "vit-world"
    with pytest.raises(ValueError, match="empty"):
        hub.hub_folder("vit-world", path)


@pytest.fixture
def toy(tmp_path):
    """A folder with a tiny language model and its tokenizer."""
    shape = dict(vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    words = train_bpe(["tokens and tokens"], 260, special_tokens=["<end>", "<more>"])
    model = build_lm("lm-world", **shape)
    more = LINEAR | dict(builder="tokenkit.zoo.lm_world:build_lm", arguments=dict(name="lm-world", **shape))
    hub.save_model("toy", model, tokenizer=words, folder=tmp_path / "zoo", **more)
    return tmp_path / "zoo", model, words


def test_a_tokenizer_comes_with_its_model(toy):
    folder, _, words = toy
    again = hub.tokenizer("toy", folder)
    assert again.get_vocab() == words.get_vocab() and again.name_or_path == "toy"
    assert [again.bos_token, again.eos_token] == ["<end>"] * 2 and again.all_special_ids == words.all_special_ids
    text = "tokens <more> ünd\t more"
    assert again(text).input_ids == words(text).input_ids and again.decode(again(text).input_ids) == text
    assert hub.names(folder) == ["toy"] and {p.name for p in folder.iterdir()} == {"toy.json", "toy.safetensors", "toy.tokenizer"}
    path = folder / "toy.tokenizer"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match="tokenizer in toy.tokenizer is not the one"):
        hub.tokenizer("toy", folder)
    hub.save_model("line", nn.Linear(3, 2), folder=folder, **LINEAR)
    with pytest.raises(ValueError, match="name must be a model with a tokenizer, one of ."):
        hub.tokenizer("line", folder)
    with pytest.raises(ValueError, match="name must be one of"):
        hub.tokenizer("toys", folder)


def test_tied_matrices_are_stored_once_and_stay_tied(toy):
    folder, model, _ = toy
    tensors = load_file(folder / "toy.safetensors")
    assert len(tensors) == len(model.state_dict()) - 1 and set(hub.shared(model.state_dict()).values()) == set(tensors)
    again = hub.load("toy", folder=folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    whole = nn.Linear(4, 4)
    assert hub.shared(whole.state_dict()) == {"weight": "weight", "bias": "bias"}
    assert hub.shared({"a": torch.zeros(0), "b": torch.zeros(0)}) == {"a": "a", "b": "b"}


def test_hub_folder_of_a_language_model(toy, tmp_path):
    folder, model, words = toy
    path = hub.hub_folder("toy", tmp_path / "new", folder)
    again, spoken = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([spoken("tokens").input_ids])
    with torch.no_grad():
        assert torch.allclose(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-2)
    assert spoken.get_vocab() == words.get_vocab() and json.loads((path / "card.json").read_text())["name"] == "toy"
    readme = (path / "README.md").read_text()
    assert "library_name: transformers" in readme and "LlamaForCausalLM.from_pretrained" in readme and 'zoo.tokenizer("toy")' in readme


def test_missing_and_unexpected_tensors_are_refused(tmp_path):
    card = hub.save_model("line", nn.Linear(3, 2), folder=tmp_path, **LINEAR)
    path = tmp_path / "line.safetensors"
    whole = load_file(path)
    for tensors in ({"weight": whole["weight"]}, whole | {"more": torch.zeros(1)}):
        save_file(tensors, path)
        changed = asdict(card) | dict(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        (tmp_path / "line.json").write_text(json.dumps(changed))
        with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
            hub.load("line", folder=tmp_path)


def test_the_package_offers_the_loader_and_is_light():
    assert zoo.load is hub.load and zoo.names() == hub.names() and zoo.card("vit-world").name == "vit-world"
    code = "import sys; from tokenkit import zoo; print([m for m in ('torch', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_all_weights_together_are_small():
    assert sum(hub.card(name).bytes for name in hub.names()) < 40e6


def test_card_is_shown_as_a_table():
    shown = hub.card("vit-world")._repr_html_()
    assert shown.startswith("<table>") and "sha256" in shown and "top-1" in shown
