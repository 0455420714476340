"""The registry: explicit, ordered by name, open to plugins, and never broken by one."""

import importlib.util
import itertools
import random
import subprocess
import sys

import pytest

from loka.errors import KernelError
from loka.hardware import DeviceInfo
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry, default_registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec

CPU = DeviceInfo(type="cpu", name="test")


def built_in(specs=KERNELS):
    registry = Registry()
    for spec in specs:
        registry.add(spec, owner="loka")
    return registry


def request(**changes):
    fields = {"site": "up", "product": "fprop", "op": "linear", "m": 32, "n": 48, "k": 64, "dtype": "bfloat16"}
    return GemmRequest(**{**fields, **changes})


def test_a_second_kernel_of_a_name_is_refused_and_names_the_first_owner():
    registry = built_in()
    with pytest.raises(KernelError, match=r"shop adds the kernel 'torch\.mm\.bf16', which loka has added"):
        registry.add(registry.get("torch.mm.bf16"), owner="shop")


def test_an_unknown_kernel_names_the_nearest():
    with pytest.raises(KernelError, match=r"'torch\.scaled_mm\.rowwise'"):
        built_in().get("torch.scaledmm.rowwise")


def test_candidates_do_not_depend_on_the_order_of_registration():
    shuffled = list(KERNELS)
    random.Random(0).shuffle(shuffled)
    names = [spec.name for spec in built_in(shuffled).candidates("linear")]
    assert names == sorted(spec.name for spec in KERNELS if spec.op == "linear" and spec.recipe)
    assert names == [spec.name for spec in built_in().candidates("linear")]


def test_a_kernel_added_later_becomes_a_candidate():
    registry = built_in()
    registry.candidates("linear")
    registry.add(KernelSpec(name="a.b.c", op="linear", recipe="rowwise", implementation="m:f"), owner="me")
    assert registry.candidates("linear")[0].name == "a.b.c"
    assert registry.owner("a.b.c") == "me"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"dtype": "float32"}, "torch.mm.fp32"),
        ({"dtype": "bfloat16"}, "torch.mm.bf16"),
        ({"dtype": "float16"}, "torch.mm.fp16"),
        ({"dtype": "float64"}, "torch.native.linear"),
        ({"dtype": "float8_e4m3fn"}, "torch.native.linear"),
        ({"op": "bmm", "batch": 8}, "torch.native.bmm"),
        ({"op": "many_linear", "batch": 8}, "torch.native.many_linear"),
        ({"op": "grouped_linear"}, "torch.grouped_mm.bf16"),
        ({"op": "grouped_linear", "dtype": "float32", "batch": 8}, "torch.grouped_mm.fp32"),
        ({"op": "grouped_linear", "dtype": "float64"}, "torch.native.grouped_linear"),
        ({"op": "linear_norm_act"}, "torch.native.linear_norm_act"),
        ({"op": "convolution"}, "torch.native.convolution"),
        ({"op": "other"}, "torch.native.other"),
    ],
)
def test_every_product_has_a_baseline(changes, name):
    assert built_in().baseline(request(**changes)).name == name


def test_a_registry_without_a_baseline_says_so():
    with pytest.raises(KernelError, match="No high-precision kernel serves"):
        Registry().baseline(request())


def test_every_built_in_kernel_can_be_loaded():
    for spec in KERNELS:
        if not spec.module or importlib.util.find_spec(spec.module):
            assert callable(spec.load()), spec.name


def test_the_listing_tells_available_from_not():
    ampere = DeviceInfo(type="cuda", name="A100", capability=(8, 0))
    rows = {spec.name: reason for spec, reason in built_in().listing(ampere)}
    assert list(rows) == sorted(spec.name for spec in KERNELS)
    assert "8.9" in rows["torch.scaled_mm.rowwise"]
    assert rows["emulated.linear.mxfp8"] is None


@pytest.fixture
def install_plugin(tmp_path, monkeypatch):
    """Install a distribution whose entry points are the names of some Python source."""
    numbers = itertools.count()

    def install(source, **points):
        module = f"loka_test_plugin_{tmp_path.name.replace('-', '_')}_{next(numbers)}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {module}:{attribute}\n" for name, attribute in points.items())
        (info / "entry_points.txt").write_text(f"[loka.kernels]\n{lines}")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


PLUGIN = """
from loka.kernel_registry.spec import KernelSpec

FAST = KernelSpec(name="shop.linear.rowwise", op="linear", recipe="rowwise", implementation="m:f")
TWICE = KernelSpec(name="torch.mm.bf16", op="linear", recipe="rowwise", implementation="m:f")
TABLE = (KernelSpec(name="shop.linear.mxfp8", op="linear", recipe="mxfp8", implementation="m:f"),)

def kernels():
    yield FAST

def breaks():
    raise ZeroDivisionError("no such driver")

def duplicates():
    return [KernelSpec(name="shop.linear.late", op="linear", recipe="rowwise", implementation="m:f"), TWICE]

WRONG = ["torch.mm"]
"""


def test_plugins_add_kernels_from_a_callable_or_a_table(install_plugin):
    install_plugin(PLUGIN, made="kernels", table="TABLE")
    registry = built_in()
    registry.load_plugins()
    assert {"shop.linear.rowwise", "shop.linear.mxfp8"} <= {spec.name for spec in registry.candidates("linear")}
    assert "made" in registry.owner("shop.linear.rowwise")


@pytest.mark.parametrize(
    ("attribute", "word"),
    [
        ("breaks", "ZeroDivisionError: no such driver"),
        ("missing", "AttributeError"),
        ("duplicates", "'torch.mm.bf16' is already there, from loka"),
        ("WRONG", "yields a str"),
    ],
)
def test_a_broken_plugin_is_a_row_with_its_reason_and_adds_nothing(install_plugin, attribute, word):
    install_plugin(PLUGIN, broken=attribute)
    registry = built_in()
    registry.load_plugins()
    rows = {spec.name: reason for spec, reason in registry.listing(CPU)}
    assert word in rows.pop("plugin.broken")
    assert set(rows) == {spec.name for spec in KERNELS}
    assert registry.baseline(request(op="other")).name == "torch.native.other"


def test_the_default_registry_is_one_and_holds_the_built_in_kernels():
    assert default_registry() is default_registry()
    assert {spec.name for spec in KERNELS} <= set(default_registry().names())


def test_listing_kernels_imports_no_kernel_library():
    code = (
        "import sys; from loka.kernel_registry.registry import default_registry; from loka.hardware import device_info;"
        "default_registry().listing(device_info());"
        "print([m for m in ('triton', 'loka.kernel_registry.emulated', 'torch._dynamo') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
