import pytest

from loka.errors import ArgumentError
from loka.selection import Selection, select

NAMES = ("model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.1.q_proj", "model.norm", "lm_head")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("lm_head", {"lm_head"}),
        ("*lm_head*", {"lm_head"}),
        ("*q_proj", {"model.layers.0.q_proj", "model.layers.1.q_proj"}),
        ("model.layers.?.k_proj", {"model.layers.0.k_proj"}),
        ("model.layers.[0]*", {"model.layers.0.q_proj", "model.layers.0.k_proj"}),
        (r"re:model\.layers\.\d+\.(q|k)_proj", set(NAMES[:3])),
        ("*", set(NAMES)),
    ],
)
def test_exact_names_globs_and_expressions_select_what_they_say(pattern, expected):
    assert set(select([pattern], NAMES)) == expected
    assert {name for name in NAMES if Selection([pattern]).match(name) == pattern} == expected


def test_expressions_match_whole_names_only():
    assert Selection(["re:q_proj"]).match("model.layers.0.q_proj") is None
    assert Selection(["re:.*q_proj"]).match("model.layers.0.q_proj") == "re:.*q_proj"


def test_globs_are_case_sensitive_and_dots_in_them_are_dots():
    assert Selection("LM_head").match("lm_head") is None
    assert Selection("model.norm").match("modelxnorm") is None
    assert Selection("model.n*").match("modelxnorm") is None


def test_a_name_with_glob_characters_is_selected_by_writing_it():
    assert select(["experts.a[0]"], ["experts.a[0]", "experts.a0"]) == ("experts.a[0]", "experts.a0")


def test_first_matching_pattern_is_reported():
    assert Selection(["*proj", "*q_proj"]).match("model.layers.0.q_proj") == "*proj"


def test_names_come_in_their_own_order_and_once():
    assert select(["lm_head", "*q_proj", "*proj"], NAMES) == (*NAMES[:3], "lm_head")


def test_one_string_is_one_pattern_not_its_letters():
    assert select("*head", NAMES) == ("lm_head",)


def test_a_container_covers_what_is_inside_only_when_asked():
    assert Selection("model.layers").match("model.layers.0.q_proj") is None
    assert Selection("model.layers").covers("model.layers.0.q_proj") == "model.layers"
    assert select("model.layers", NAMES, inside=True) == NAMES[:3]
    assert Selection("model.lay").covers("model.layers.0.q_proj") is None


@pytest.mark.parametrize(
    ("pattern", "near"), [("lm_haed", "lm_head"), ("*q_porj*", "q_proj"), ("model.layers.0.kproj", "k_proj")]
)
def test_a_pattern_that_matches_nothing_names_the_nearest(pattern, near):
    with pytest.raises(ArgumentError, match=near) as caught:
        select([pattern], NAMES)
    assert repr(pattern) in str(caught.value)


def test_an_idle_pattern_is_refused_even_when_another_one_matches():
    with pytest.raises(ArgumentError, match="lm_haed"):
        select(["*q_proj", "lm_haed"], NAMES)
    assert select(["*q_proj", "lm_haed"], NAMES, allow_unmatched=True) == (NAMES[0], NAMES[2])


def test_a_pattern_hidden_behind_an_earlier_one_is_not_idle():
    assert select(["*", "lm_head"], NAMES) == NAMES


def test_without_a_near_name_the_message_lists_some():
    with pytest.raises(ArgumentError, match=r"5 to choose from, first 'model\.layers\.0\.q_proj'"):
        select(["zzzzzz"], NAMES)
    with pytest.raises(ArgumentError, match="There is no site to choose from"):
        select(["zzzzzz"], [], what="site")


def test_no_pattern_selects_nothing():
    assert select([], NAMES) == ()


@pytest.mark.parametrize("pattern", ["", "re:", "re:(", "re:*x", 3])
def test_malformed_patterns_are_refused(pattern):
    with pytest.raises(ArgumentError):
        Selection([pattern])
