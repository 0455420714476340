"""What freezing leaves in high precision, and what it refuses, each in words."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import loka
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.running import linear as op
from loka.dispatch.running.convert import convert
from loka.errors import KernelError, PlanError
from loka.hardware import device_info
from loka.kernel_registry import emulated, torch_scaled_mm
from loka.kernel_registry.registry import default_registry
from tests.dispatch.made_conversion import decision, plan_for
from tests.dispatch.made_frozen import KERNEL, Mlp, frozen_mlp, plan_of, sized

# --- what is left, and why ---


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.w_scale = nn.Parameter(torch.randn(12, 16)), 2.0


class Zoo(nn.Module):
    """Every reason not to freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.named, self.rnn = nn.Linear(16, 16), Named(), nn.GRU(16, 16)
        self.w, self.ws = nn.Parameter(torch.randn(16, 16)), nn.ParameterList([nn.Parameter(torch.randn(16, 16))])
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        self.second.weight = self.first.weight
        self.wide, self.kept = nn.Linear(16, 16).double(), nn.Linear(16, 16)


REASONS = {
    "w": "it is square, [16, 16], and which way its products read it shows when they run: convert the model, run it",
    "ws.0": "its products, of 8 x 8, are with parts of it",
    "normed": "its weight is computed",
    "rnn.weight_hh_l0": "GRU reads its weight itself",
    "named.w": "Named has a 'w_scale' of its own",
    "head": "it shares its weight with table, which needs it in high precision",
    "wide": r"its weight is torch.float64",
    "kept": "keeps its forward product in high precision",
    "table": "Embedding looks up rows of its weight",
}


def test_what_is_left_is_named_with_its_reason_and_unchanged(recwarn) -> None:
    model = Zoo()
    sites = ["plain", "first", "second", *REASONS]
    made = [decision(site, "fprop", None if site == "kept" else "rowwise") for site in sites]
    made = [sized(each, 16, 16) if each.request.site != "ws.0" else each for each in made]
    before = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    frozen = freeze(model, plan_for(model, [], decisions=tuple(made)))
    assert list(frozen.kernels) == ["first", "plain", "second"]
    assert frozen.left.keys() == REASONS.keys()
    for site, reason in REASONS.items():
        assert reason in frozen.left[site], site
        assert f"{site} is left in high precision: {frozen.left[site]}" in str(frozen)
    after = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert before.items() - after.items() == {(f"{name}.weight", before[f"{name}.weight"]) for name in frozen.kernels}
    assert model.head.weight is model.table.weight
    assert "3 of 12 sites frozen" in str(frozen)


def test_a_weight_of_two_layers_is_stored_once_where_both_store_it_alike(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = model[0].weight
        return model

    model = tied()
    one_plan = plan_of(model, ["0", "1"])
    frozen = freeze(model, one_plan)
    assert model[0].weight.codes is model[1].weight.codes
    assert frozen.bytes_after == 16 * 16 + 16 * 4 + 2 * 16 * 4
    save_model(model, str(tmp_path / "tied.safetensors"))
    other = tied()
    freeze(other, one_plan)
    load_model(other, str(tmp_path / "tied.safetensors"))
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))

    model = tied()
    differently = (decision("0", "fprop", "rowwise"), decision("1", "fprop", "tensorwise"))
    frozen = freeze(model, plan_for(model, [], decisions=differently))
    assert set(frozen.left) == {"0", "1"}
    assert "stores it otherwise" in frozen.left["0"]
    model = tied()
    frozen = freeze(model, plan_of(model, ["0"]))
    assert frozen.left == {"0": "it shares its weight with 1, which needs it in high precision"}


def test_the_root_may_be_a_linear_layer() -> None:
    model = nn.Linear(16, 12)
    assert list(freeze(model, plan_of(model, ["weight"])).kernels) == ["weight"]
    assert model(torch.randn(3, 16)).shape == (3, 12)


def test_wrappers_are_looked_through() -> None:
    model = Mlp()
    frozen = freeze(nn.DataParallel(model), plan_of(model, ["up"]))
    assert list(frozen.kernels) == ["up"]
    assert type(model.up).__name__ == "FrozenLinear"


# --- refusals ---


def test_training_a_frozen_layer_is_an_error() -> None:
    model, _ = frozen_mlp()
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(KernelError, match=r"16 to 32 features.*no backward pass.*torch\.no_grad.*loka\.convert"):
        model(x)
    with torch.no_grad():
        model(x)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(x.detach()).requires_grad


def test_a_frozen_model_is_neither_frozen_nor_converted_again() -> None:
    model = Mlp()
    plan = plan_of(model, ["up"])
    freeze(model, plan)
    for again in (freeze, convert):
        with pytest.raises(PlanError, match=r"Mlp is frozen \(see 'up'\)"):
            again(model, plan)


def test_a_foreign_plan_a_missing_kernel_and_a_compiled_model_leave_the_model_untouched() -> None:
    model = Mlp()
    plan = plan_of(model, ["up"])
    elsewhere = plan_for(model, [], decisions=(decision("up", "fprop", "rowwise", kernel="hopper.x.rowwise"),))
    cases = [
        (nn.Sequential(nn.Linear(16, 4)), plan, "is missing"),
        (model, elsewhere, "hopper"),
        (torch.compile(model, backend="eager"), plan, "is compiled.*Freeze first"),
    ]
    for target, given, reason in cases:
        keys = list(target.state_dict())
        with pytest.raises(PlanError, match=reason):
            freeze(target, given)
        assert list(target.state_dict()) == keys
        assert all(parameter.requires_grad for parameter in target.parameters())


def test_kernels_of_other_passes_and_devices_do_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp()
    made = (decision("up", "fprop", "rowwise"), decision("up", "wgrad", "rowwise", kernel="hopper.x.rowwise"))
    assert list(freeze(model, plan_for(model, [], decisions=made)).kernels) == ["up"]
    model = Mlp()
    made = (decision("up", "fprop", "rowwise", kernel="hopper.x.rowwise"),)
    frozen = freeze(model, plan_for(model, [], decisions=made), emulate=True)
    assert frozen.kernels == {"up": "emulated.linear.rowwise"}


def test_a_kernel_that_raises_is_replaced_by_high_precision(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = frozen_mlp()
    x = torch.randn(3, 16)
    want = model(x)
    registry = default_registry()
    monkeypatch.setattr(registry, "_unavailable", dict(registry._unavailable))
    monkeypatch.setattr(op, "_loaded", dict(op._loaded))
    monkeypatch.setattr(op, "_layers", dict(op._layers))

    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("cuBLAS says no")

    monkeypatch.setattr(torch_scaled_mm.rowwise_halves, "multiply", fails)
    torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.05)
    assert op.load(KERNEL) is None
    assert "quarantined" in registry.unavailable(registry.get(KERNEL), device_info("cpu"))
    torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.05)
    assert "cuBLAS says no" in caplog.text
    with pytest.raises(KernelError, match="float64"):
        frozen_mlp("torch.scaled_mm.tensorwise")[0].up(torch.randn(3, 16, dtype=torch.float64))


def test_executions_are_counted() -> None:
    model, _ = frozen_mlp()
    before = loka.kernel_executions().get(KERNEL, 0)
    model(torch.randn(3, 16))
    assert loka.kernel_executions()[KERNEL] == before + 2


def test_the_front_door_leads_here() -> None:
    assert loka.freeze is freeze
    assert emulated.rowwise_halves is default_registry().get("emulated.linear.rowwise").load_prepared()
