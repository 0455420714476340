"""Models that something else has taken hold of are refused."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import loka.mods
from loka.bounds import Bound
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.convert import convert
from loka.errors import ModError
from loka.kernel_registry.spec import GemmRequest
from loka.mods import BlockNorm, FoldNorm, Hadamard, KeepRowsHigh, KeepShareHigh, Smooth
from tests.mods.made_models import ALL, make_model


def test_compiled_models_are_refused():
    inner = make_model()
    compiled = torch.compile(inner, backend="eager")
    with pytest.raises(ModError, match="is compiled"):
        loka.mods.apply(compiled, ALL)
    inner.up.compile(backend="eager")
    with pytest.raises(ModError, match="'up' is compiled"):
        loka.mods.apply(inner, ALL)


def test_a_converted_model_is_refused():
    model = make_model()
    decision = Decision(
        request=GemmRequest(site="up", product="fprop", op="linear", m=4, n=32, k=16, dtype="float32"),
        m_min=1,
        m_max=64,
        kernel="emulated.linear.rowwise",
        recipe="rowwise",
        why="test",
        baseline="torch.mm.fp32",
        baseline_time_us=None,
        time_us=None,
        time_source="none",
        error_upper=None,
        horizon=None,
        rejected=(),
    )
    plan = Plan(
        created="2026-01-01T00:00:00Z",
        model="Sequential",
        fingerprint={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        environment={},
        bound=Bound(row_error=0.05),
        decisions=(decision,),
    )
    convert(model, plan, emulate=True)
    with pytest.raises(ModError, match=r"'up' is converted"):
        loka.mods.apply(model, ALL)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrapped_and_sharded_models_are_refused():
    with pytest.raises(ModError, match=r"The model \(DistributedDataParallel\) is wrapped"):
        loka.mods.apply(nn.parallel.DistributedDataParallel(make_model()), ALL)
    sharded = nn.Sequential(make_model())
    fully_shard(sharded[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ModError, match=r"'0' is sharded"):
        loka.mods.apply(sharded, ALL)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(ModError, match="TorchScript"):
        loka.mods.apply(torch.jit.trace(make_model(), torch.randn(2, 16)), ALL)


def test_a_forward_overridden_on_the_instance_is_refused():
    model = make_model()
    model.up.forward = model.up.forward
    with pytest.raises(ModError, match=r"'up\.bias'.*overridden on the instance"):
        loka.mods.apply(model, ALL)
    loka.mods.apply(model, ALL, filter_fn=lambda module, fqn: fqn != "up")


def test_a_model_that_is_itself_the_norm_has_to_be_put_into_something():
    with pytest.raises(ModError, match=r"nn\.Sequential"):
        loka.mods.apply(nn.LayerNorm(16), [BlockNorm(8)])


class Mapped(nn.Module):
    """A norm and a linear within `torch.vmap`, behind a norm and a linear in the open."""

    def __init__(self):
        super().__init__()
        self.first, self.up = nn.LayerNorm(16), nn.Linear(16, 32)
        self.norm, self.down = nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x):
        return torch.vmap(lambda row: self.down(self.norm(row)))(self.up(self.first(x)))


@pytest.mark.parametrize("mod", [Smooth(), KeepRowsHigh(), KeepShareHigh(times=2), Hadamard(), FoldNorm()])
def test_layers_within_vmap_are_left_and_named(mod):
    torch.manual_seed(0)
    model = Mapped().eval()
    with torch.no_grad():
        model.first.weight[:2] *= 3000.0
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    before, exact = model(batches[0]), Mapped().eval().double()
    exact.load_state_dict(model.state_dict())
    down = model.down.weight.detach().clone()
    applied = loka.mods.apply(model, [mod], inputs=batches)
    assert {each.fqn.split(".")[0] for each in applied.replacements} & {"first", "up"}
    assert any("not called" in each.reason for each in applied.refused if each.fqn in ("norm", "down"))
    assert torch.equal(model.down.weight, down)
    reference = exact(batches[0].double())
    assert torch.linalg.norm(model(batches[0]) - reference) <= 1e-4 * torch.linalg.norm(reference)
    applied.undo()
    assert torch.equal(model(batches[0]), before)
