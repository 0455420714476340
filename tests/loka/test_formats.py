"""The tables of formats and recipes say what torch, ml_dtypes and the papers say."""

import ml_dtypes
import pytest
import torch

from loka.errors import ArgumentError
from loka.formats import (
    DEFAULT_RECIPES,
    FORMATS,
    PASS_OPERANDS,
    PASS_SYNONYMS,
    PASSES,
    RECIPES,
    ROLES,
    pass_name,
    recipe,
)

NUMPY_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_has_the_constants_of_its_dtype(name: str) -> None:
    fmt, facts, torch_facts = FORMATS[name], ml_dtypes.finfo(NUMPY_DTYPES[name]), torch.finfo(FORMATS[name].dtype)
    assert fmt.max == float(facts.max) == torch_facts.max
    assert fmt.mantissa_bits == facts.nmant
    assert 2.0**fmt.min_exponent == float(facts.smallest_normal) == torch_facts.smallest_normal
    assert fmt.min_subnormal == float(facts.smallest_subnormal)
    assert fmt.has_infinity == (torch.tensor(float("inf")).to(fmt.dtype).float().isinf().item())


def test_every_recipe_is_complete_and_its_name_is_its_key() -> None:
    for name, entry in RECIPES.items():
        assert entry.name == name
        assert {entry.format_of(role).name for role in ROLES} <= FORMATS.keys()
    assert set(DEFAULT_RECIPES) <= RECIPES.keys()
    assert not any(RECIPES[name].saturating for name in DEFAULT_RECIPES)


@pytest.mark.parametrize(
    ("name", "role", "group", "scale_rule", "element"),
    [
        ("tensorwise", "input", (None, None), "fp32", "e4m3"),
        ("tensorwise", "grad_output", (None, None), "fp32", "e5m2"),
        ("rowwise", "weight", (1, None), "fp32", "e4m3"),
        ("rowwise", "grad_output", (1, None), "fp32", "e4m3"),
        ("blockwise", "input", (1, 128), "fp32", "e4m3"),
        ("blockwise", "weight", (128, 128), "fp32", "e4m3"),
        ("blockwise", "grad_output", (1, 128), "fp32", "e4m3"),
        ("blockwise_pow2", "input", (1, 128), "pow2_up", "e4m3"),
        ("blockwise_pow2", "weight", (128, 128), "pow2_up", "e4m3"),
        ("mxfp8", "input", (1, 32), "pow2_up", "e4m3"),
        ("mxfp8", "weight", (1, 32), "pow2_up", "e4m3"),
        ("mxfp8_floor", "weight", (1, 32), "pow2_floor", "e4m3"),
    ],
)
def test_recipes_quantise_as_their_sources_say(
    name: str, role: str, group: tuple, scale_rule: str, element: str
) -> None:
    spec = RECIPES[name].operand(role)
    assert (spec.group_rows, spec.group_k) == group
    assert (spec.scale_rule, spec.format.name) == (scale_rule, element)
    assert spec.per_tensor == (name == "tensorwise")


def test_a_pass_names_the_formats_of_its_operands() -> None:
    assert RECIPES["tensorwise"].formats_of_pass("fprop") == "e4m3"
    assert RECIPES["tensorwise"].formats_of_pass("dgrad") == "e5m2/e4m3"
    assert RECIPES["rowwise"].formats_of_pass("wgrad") == "e4m3"


def test_each_pass_multiplies_two_of_the_three_operands() -> None:
    assert set(PASS_OPERANDS) == set(PASSES)
    assert {role for pair in PASS_OPERANDS.values() for role in pair} == set(ROLES)
    assert all(len(set(pair)) == 2 for pair in PASS_OPERANDS.values())


def test_torchaos_names_of_the_passes_are_understood() -> None:
    assert {pass_name(synonym) for synonym in PASS_SYNONYMS} == set(PASSES)
    assert [pass_name(name) for name in PASSES] == list(PASSES)


@pytest.mark.parametrize(("look_up", "near"), [(recipe, "rowise"), (pass_name, "dgard")])
def test_an_unknown_name_is_refused_with_the_nearest_known_one(look_up, near: str) -> None:
    known = RECIPES if look_up is recipe else PASSES
    with pytest.raises(ArgumentError, match="Nearest: '") as caught:
        look_up(near)
    assert any(f"'{name}'" in str(caught.value) for name in known)
    assert all(name in str(caught.value) for name in known)
