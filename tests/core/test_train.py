import pytest
import torch
from torch import nn

from tokenkit.core.train import History, cosine_schedule, fit, parameter_groups


def batch_at(step):
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
    return x, x.sum(1, keepdim=True)


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.GELU(), nn.Linear(16, 1))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_and_ends_in_eval_mode():
    model = net()
    history = fit(model, batch_at, mse, steps=150, lr=1e-2, progress=False)
    assert history.losses[-1] < 0.2 * history.losses[0] and history.steps == 150 and not model.training
    assert len(history.smoothed()) == 150


def test_same_seed_same_weights():
    a, b = net(), net()
    for model in (a, b):
        torch.manual_seed(1)
        fit(model, batch_at, mse, steps=5, progress=False)
    assert torch.equal(weights(a), weights(b))


def test_interrupted_run_continues_exactly(tmp_path):
    file, whole, halves = tmp_path / "run.pt", net(), net()
    torch.manual_seed(1)
    fit(whole, batch_at, mse, steps=20, progress=False)

    def interrupt(step, loss):
        if step == 13:
            raise KeyboardInterrupt
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        fit(halves, batch_at, mse, steps=20, checkpoint=file, every=5, on_step=interrupt, progress=False)
    resumed = net()
    history = fit(resumed, batch_at, mse, steps=20, checkpoint=file, every=5, progress=False)
    assert torch.equal(weights(whole), weights(resumed)) and history.steps == 20
    assert not list(tmp_path.glob("*partial*"))


def test_a_budget_in_seconds_stops_and_keeps_a_checkpoint(tmp_path):
    model, file = net(), tmp_path / "run.pt"
    history = fit(model, batch_at, mse, steps=10_000, seconds=0.0, checkpoint=file, progress=False)
    assert history.steps == 1 and file.exists()


def test_vectors_do_not_decay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    matrices, vectors = parameter_groups(model.named_parameters(), 0.1)
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert [p.ndim for p in matrices["params"]] == [2] and len(vectors["params"]) == 3


def test_frozen_parameters_stay():
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, batch_at, mse, steps=3, progress=False)
    assert torch.equal(before, model[0].weight)


def test_schedule():
    factors = [cosine_schedule(s, 100, 0.1, floor=0.2) for s in range(100)]
    assert factors[9] == 1 and factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True) and 0.2 <= factors[-1] < 0.21


def test_bad_input():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        fit(net(), batch_at, mse, steps=0)
    with pytest.raises(ValueError, match="finite, got nan at step 0"):
        fit(net(), batch_at, lambda m, b: mse(m, b) * float("nan"), steps=2, progress=False)
    assert History().steps == 0


def test_another_optimizer_takes_the_place_of_adamw():
    made = []

    def sgd(groups, lr, weight_decay, betas):
        made.append(torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay, momentum=betas[0]))
        return made[-1]

    history = fit(net(), batch_at, mse, steps=100, lr=1e-2, optimizer=sgd, progress=False)
    assert len(made) == 1 and sum(history.losses[-10:]) < 0.2 * sum(history.losses[:10])


def test_one_process_trains_in_both_precisions():
    seen = []

    def watching(model, batch):
        out = model(batch[0])
        seen.append(out.dtype)
        return nn.functional.mse_loss(out.float(), batch[1])

    for bf16 in (False, True, False):
        fit(net(), batch_at, watching, steps=1, bf16=bf16, progress=False)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
