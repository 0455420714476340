"""Loss impact: what the probe predicts from one batch against what rounding really does to the loss."""

import copy
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import loka
from loka.formats import DEFAULT_RECIPES, RECIPES
from loka.probes.capturing.products import Factors, gemm
from loka.probes.sampling.impact import ImpactMeter, block_of
from loka.probes.sampling.losses import ModelLoss, apply_hook, items_of, logits_of, true_scale
from loka.quantize import fake_quantize
from tests.probes.made_probe import probed, recorded


class Tower(nn.Module):
    """Rows of different loudness through two layers; one logit, or classes."""

    def __init__(self, out=1):
        super().__init__()
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, out)

    def forward(self, x):
        y = self.down(F.silu(self.up(x)))
        return y.squeeze(-1) if self.down.out_features == 1 else y


class Fields(nn.Module):
    """Four rows of every product belong to one item of the loss."""

    def __init__(self):
        super().__init__()
        self.field, self.head = nn.Linear(12, 16), nn.Linear(64, 1)

    def forward(self, x):
        return self.head(F.silu(self.field(x)).flatten(1)).squeeze(-1)


def loud(*shape):
    return torch.randn(*shape) * torch.randn(shape[0], *(1,) * (len(shape) - 1)).exp()


CASES = {
    "bce": (Tower, lambda: (loud(256, 24), (torch.rand(256) < 0.2).float()), F.binary_cross_entropy_with_logits, "bce"),
    "fields": (
        Fields,
        lambda: (loud(256, 4, 12), (torch.rand(256) < 0.3).float()),
        F.binary_cross_entropy_with_logits,
        "bce",
    ),
    "classes": (
        lambda: Tower(10),
        lambda: (loud(256, 24), torch.randint(10, (256,))),
        F.cross_entropy,
        "cross_entropy",
    ),
    "tokens": (
        lambda: Tower(10),
        lambda: (loud(16, 16, 24), torch.randint(10, (16, 16))),
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
        "cross_entropy",
    ),
}


def trained(case):
    """A model that has learned something, so that neither its loss nor its gradients are those of chance."""
    build, batch, loss, hook = CASES[case]
    torch.manual_seed(3)
    model, teacher = build(), build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = []
    for step in range(180):
        x, y = batch()
        with torch.no_grad():
            z = 3 * teacher(x)
            y = torch.bernoulli(z.sigmoid()) if hook == "bce" else z.argmax(-1)
        if step < 120:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        else:
            batches.append((x, y))
    return model, batches, loss, hook


def probed_impacts(model, batches, loss, path, hook=None):
    with loka.probe(model, path, every=1, overhead=1000, loss=hook):
        for x, y in batches:
            model.zero_grad()
            loss(model(x), y).backward()
    _, steps = recorded(path)
    return steps


def kl_of(steps, site):
    return [one.impacts["rowwise"].kl for step in steps for one in step.products if one.site == site and one.impacts]


def rounded(model, site, name, x):
    """The model's output with one site's operands rounded."""
    recipe = RECIPES[name]

    def replaced(module, args, output):
        x = args[0].flatten(0, -2)
        weight = fake_quantize(module.weight, recipe.operand("weight"))
        return F.linear(fake_quantize(x, recipe.operand("input")), weight, module.bias).view_as(output)

    handle = model.get_submodule(site).register_forward_hook(replaced)
    with torch.no_grad():
        y = model(x)
    handle.remove()
    return y


def divergence(exact, found, hook):
    exact, found = exact.double(), found.double()
    if hook == "bce":
        exact, found = (torch.stack([z, torch.zeros_like(z)], -1) for z in (exact, found))
    log_p, log_q = exact.log_softmax(-1), found.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("case", CASES)
def test_the_curvature_is_the_measured_divergence_and_the_sum_is_the_measured_change(case, tmp_path):
    model, batches, loss, hook = trained(case)
    steps = probed_impacts(model, batches, loss, tmp_path / "run.db", hook=hook)
    taken = [(step, batch) for step, batch in zip(steps, batches, strict=True) if step.labels]
    assert len(taken) == 15
    assert {step.labels for step, _ in taken} == {"closed" if hook == "bce" else "sampled"}
    ratios, changes = [], []
    for site in {product.site for product in steps[0].products}:
        for name in ("tensorwise", "rowwise", "mxfp8"):
            predicted, measured = [], []
            for step, (x, y) in taken:
                (product,) = (one for one in step.products if (one.site, one.product) == (site, "fprop"))
                impact = product.impacts[name]
                with torch.no_grad():
                    exact, found = model(x), rounded(model, site, name, x)
                    change = float(loss(found.double(), y.double() if hook == "bce" else y)) - float(
                        loss(exact.double(), y.double() if hook == "bce" else y)
                    )
                    assert step.loss == pytest.approx(float(loss(exact, y)), rel=1e-5)
                predicted.append(impact.kl)
                measured.append(divergence(exact, found, hook))
                changes.append((impact.kl + impact.first_order, change, impact.spread))
            ratios.append(sum(predicted) / sum(measured))
    # All rows enter here (256 at most), so only the draw of the labels is left to chance, and third-order terms.
    spread = 0.1 if hook == "bce" else 0.25
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=spread / 2)
    assert all(abs(ratio - 1) < 2 * spread for ratio in ratios)
    sums, actual, _ = torch.tensor(changes, dtype=torch.float64).T
    assert torch.corrcoef(torch.stack([sums, actual]))[0, 1] > 0.97
    assert float((sums - actual).norm() / actual.norm()) < 0.25


def test_the_spread_of_the_first_order_is_that_over_batches(tmp_path):
    model, _, loss, hook = trained("bce")
    torch.manual_seed(5)
    batches = [(loud(256, 24), (torch.rand(256) < 0.2).float()) for _ in range(160)]
    steps = [step for step in probed_impacts(model, batches, loss, tmp_path / "run.db", hook=hook) if step.labels]
    for site in ("up", "down"):
        of = [one.impacts["rowwise"] for step in steps for one in step.products if one.site == site and one.impacts]
        first = torch.tensor([impact.first_order for impact in of])
        spread = torch.tensor([impact.spread for impact in of])
        assert len(of) == 40
        assert float(spread.square().mean().sqrt() / first.std()) == pytest.approx(1.0, abs=0.35)


def test_training_is_not_disturbed_by_the_second_backward(tmp_path):
    def train(model, probe_path=None):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loop():
            for _ in range(9):
                x, y = loud(32, 24), (torch.rand(32) < 0.5).float()
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(F.dropout(model(x), 0.1), y).backward()
                optimizer.step()

        if probe_path is None:
            loop()
        else:
            with loka.probe(model, probe_path, every=1, overhead=1000, loss="bce"):
                loop()
        return model.state_dict(), torch.rand(3)

    torch.manual_seed(0)
    model = Tower()
    alone, after_alone = train(copy.deepcopy(model))
    watched, after_watched = train(model, tmp_path / "run.db")
    assert all(alone[name].equal(watched[name]) for name in alone)
    assert after_alone.equal(after_watched)
    _, steps = recorded(tmp_path / "run.db")
    assert sum(bool(step.labels) for step in steps) == 2
    for step in steps:
        calls = {(one.site, one.product): one.calls for one in step.products}
        assert set(calls.values()) == {1}


@pytest.mark.parametrize("scale", [256, 65536], ids=["sum", "gradient scaler"])
def test_a_scaled_loss_changes_nothing(scale, tmp_path):
    model, batches, loss, hook = trained("bce")
    plain = probed_impacts(model, batches[:2], loss, tmp_path / "a.db", hook=hook)[1]
    scaled = probed_impacts(model, batches[:2], lambda z, y: scale * loss(z, y), tmp_path / "b.db", hook=hook)[1]
    of = [{one.site: one.impacts["rowwise"] for one in step.products if one.impacts} for step in (plain, scaled)]
    # A sum is told from a mean exactly; what a scaler multiplied by is taken from the entropy.
    change = scaled.loss / plain.loss
    assert change == pytest.approx(1.0, rel=1e-5 if scale == 256 else 0.3)
    for site, impact in of[0].items():
        other = of[1][site]
        assert (other.kl, other.spread) == pytest.approx((impact.kl, change * impact.spread), rel=1e-4)


def test_a_negative_loss_is_recorded_as_it_is_and_weighs_nothing(tmp_path):
    """As those of policy gradients and likelihoods are."""
    model, batches, loss, _ = trained("bce")
    steps = probed_impacts(model, batches[:3], lambda z, y: -loss(z, y), tmp_path / "run.db")
    with torch.no_grad():
        wanted = [-float(loss(model(x), y)) for x, y in batches[:3]]
    assert [step.loss for step in steps] == pytest.approx(wanted, rel=1e-6)
    assert not any(one.impacts for step in steps for one in step.products)


def test_without_a_hook_the_true_labels_serve(tmp_path):
    model, batches, loss, _ = trained("bce")
    steps = [step for step in probed_impacts(model, batches, loss, tmp_path / "run.db") if step.labels]
    assert {step.labels for step in steps} == {"empirical"}
    with_hook = probed_impacts(model, batches, loss, tmp_path / "hook.db", hook="bce")
    for site in ("up", "down"):
        mine, theirs = (sum(kl_of(which, site)) for which in (steps, with_hook))
        assert 0.3 < mine / theirs < 3.0


def test_a_callable_draws_its_own_labels(tmp_path):
    model, batches, loss, _ = trained("bce")

    def own(output, generator):
        labels = torch.bernoulli(output.detach().sigmoid(), generator=generator)
        return F.binary_cross_entropy_with_logits(output, labels, reduction="none")

    steps = [s for s in probed_impacts(model, batches, loss, tmp_path / "a.db", hook=own) if s.labels]
    closed = [s for s in probed_impacts(model, batches, loss, tmp_path / "b.db", hook="bce") if s.labels]
    assert {step.labels for step in steps} == {"sampled"}
    for site in ("up", "down"):
        mine, exact = (
            sum(
                one.impacts["rowwise"].kl for step in which for one in step.products if one.site == site and one.impacts
            )
            for which in (steps, closed)
        )
        assert mine == pytest.approx(exact, rel=0.3)


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("cross_entropy", "expects logits \\[..., classes\\], the model returned \\(256,\\)"),
        (lambda output, generator: output.sum(), "returned a tensor of shape \\(\\)"),
        (lambda output, generator: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["kind", "reduced", "raises"],
)
def test_a_hook_that_fails_is_told_and_the_run_goes_on_without_it(hook, words, tmp_path):
    model, batches, loss, _ = trained("bce")
    path = tmp_path / "run.db"
    steps = probed_impacts(model, batches, loss, path, hook=hook)
    run, _ = recorded(path)
    (event,) = (event for event in run.events if event.kind == "loss_hook")
    assert re.search(words, event.message)
    assert run.progress.status == "complete"
    assert {step.labels for step in steps} == {"", "empirical"}


def test_checkpointed_layers_are_met_by_their_gradients(tmp_path):
    class Checkpointed(Tower):
        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(lambda x: F.silu(self.up(x)), x, use_reentrant=False)
            return self.down(hidden).squeeze(-1)

    model, batches, loss, _ = trained("bce")
    twin = Checkpointed()
    twin.load_state_dict(model.state_dict())
    plain = probed_impacts(model, batches[:2], loss, tmp_path / "a.db", hook="bce")[1]
    again = probed_impacts(twin, batches[:2], loss, tmp_path / "b.db", hook="bce")[1]
    of = [{(one.site, one.product): one for one in step.products} for step in (plain, again)]
    assert of[0].keys() == of[1].keys()
    for key, product in of[0].items():
        assert product.impacts == pytest.approx(of[1][key].impacts) or product.impacts == of[1][key].impacts
        assert product.calls == of[1][key].calls


def test_evaluation_has_no_impact(tmp_path):
    model, batches, _, _ = trained("bce")
    with loka.probe(model, tmp_path / "run.db", every=1, overhead=1000, loss="bce"), torch.no_grad():
        for x, _ in batches[:6]:
            model(x)
    _, steps = recorded(tmp_path / "run.db")
    assert all(math.isnan(step.loss) and not step.labels for step in steps)
    assert not any(one.impacts for step in steps for one in step.products)


def test_logits_are_found_in_what_models_return():
    z = torch.randn(4, 3)

    class Output:
        logits = z

    for output in (z, {"logits": z, "other": 1}, {"a": "text", "b": z}, (None, z), [z], Output()):
        assert logits_of(output) is z
        assert items_of(output) == 4
    assert items_of("nothing") == 0
    assert items_of(torch.randn(7)) == 7
    assert items_of(torch.randn(2, 5, 11)) == 10


def test_probabilities_and_logits_of_the_same_prediction_are_the_same_loss():
    z = torch.randn(64, dtype=torch.float64, requires_grad=True)
    of_logits = apply_hook("bce", z, torch.Generator())
    of_probability = apply_hook("bce", z.sigmoid(), torch.Generator())
    (from_logits,) = torch.autograd.grad(of_logits.root, z, of_logits.gradient)
    (from_probability,) = torch.autograd.grad(of_probability.root, z, of_probability.gradient)
    torch.testing.assert_close(from_logits, from_probability, rtol=1e-6, atol=1e-9)
    assert of_logits.facts.expected == pytest.approx(of_probability.facts.expected)


def test_logits_that_all_lie_between_zero_and_one_are_still_logits():
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.mul_(0.01)
        layer.bias.fill_(0.1)
    logits = layer(torch.randn(16, 4)).squeeze(-1)
    assert ((logits > 0) & (logits < 1)).all()
    expected = float(F.binary_cross_entropy_with_logits(logits, logits.sigmoid()).detach())
    draw = torch.Generator()
    assert apply_hook("bce", logits, draw).facts.expected == pytest.approx(expected, rel=1e-5)
    assert apply_hook("bce", logits.to(torch.bfloat16), draw).facts.expected == pytest.approx(expected, rel=1e-2)
    assert apply_hook("bce", logits.sigmoid(), draw).facts.expected == pytest.approx(expected, rel=1e-5)


def test_what_a_root_was_multiplied_by_is_told_from_the_entropy():
    facts = ModelLoss(items=1000, expected=0.5, labels="sampled")
    assert true_scale(0.9, facts) == 1.0
    assert true_scale(700.0, facts) == 1000.0
    assert true_scale(65536 * 0.5, facts) == pytest.approx(65536)
    assert true_scale(-1.0, facts) == 1.0


@pytest.mark.parametrize(
    ("rows", "items", "block"), [(256, 256, 1), (1024, 256, 4), (1000, 256, 1), (256, 0, 1), (10**5, 10, 1), (5, 10, 1)]
)
def test_rows_are_taken_by_item_where_that_comes_out_even(rows, items, block):
    assert block_of(rows, items) == block


def test_a_users_own_mode_is_not_shown_the_second_backward(tmp_path):
    model, batches, loss, hook = trained("bce")

    def flops():
        counts = []
        for x, y in batches[:4]:
            with FlopCounterMode(display=False) as counter:
                loss(model(x), y).backward()
            counts.append(counter.get_total_flops())
        return counts

    alone = flops()
    with loka.probe(model, tmp_path / "run.db", every=1, overhead=1000, loss=hook):
        watched = flops()
    assert watched == alone
    _, steps = recorded(tmp_path / "run.db")
    assert [step.labels for step in steps] == ["", "closed", "", ""]


def test_products_that_do_not_fit_into_one_step_take_turns(tmp_path, monkeypatch):
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())], nn.Linear(64, 1))
    # Room for two of the six: 128 rows of 64 columns under four recipes take 128 KiB.
    monkeypatch.setattr("loka.probes.sampling.impact._KEPT_BYTES", 300 << 10)
    monkeypatch.setattr("loka.probes.sampling.impact._SHARE", 0.5)

    def loop():
        for step in range(4 * 7):
            x = torch.randn(128, 64, generator=torch.Generator().manual_seed(step))
            F.binary_cross_entropy_with_logits(model(x)[:, 0], torch.ones(128)).backward()

    _, steps = probed(model, tmp_path, loop, every=1)
    taken = Counter(one.site for step in steps for one in step.products if one.impacts)
    wide = [taken[str(2 * at)] for at in range(6)]
    # Seven steps take an impact, each with room for two of the six: none is left out, none comes twice before another.
    assert sum(wide) == 14
    assert max(wide) - min(wide) <= 1
    assert abs(taken["12"] - sum(wide) / 6) <= 1  # turns are counted, not bytes: the narrow head waits like the others
    assert max(sum(bool(one.impacts) for one in step.products) for step in steps) == 3


@pytest.mark.parametrize(("columns", "rows"), [(64, 512), (4096, 128), (49_152, 10), (150_000, 8), (500_000, 0)])
def test_wide_products_leave_fewer_rows_and_are_not_left_out(columns, rows):
    meter = ImpactMeter(tuple(RECIPES[name] for name in DEFAULT_RECIPES))
    x, weight = torch.empty(4096, 64, device="meta"), torch.empty(64, columns, device="meta")
    assert meter.rows("key", gemm(Factors("mm", x, weight), a_is_p=True), 1) == rows
