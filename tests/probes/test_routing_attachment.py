"""What stands on a traced model, what it leaves alone, and that it counts right whatever else is done to the model."""

import copy
import importlib
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import loka
from loka.errors import ArgumentError, EvidenceError, LokaWarning
from loka.probes.routing.trace import RoutingTrace
from tests.dispatch.made_conversion import plan_for
from tests.probes.made_recording import NONE, attached, check, generate, seeded_model, tokens
from tests.probes.made_routing import EXPERTS, LAYERS, TOP_K, WIDTH, Cache, MadeExperts, MadeModel

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def model():
    return seeded_model()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "routing.npz"


def calls(model):
    return [module.__dict__.get("_compiled_call_impl", "none") for module in model.modules()]


# --- what is on the model, and in copies of it


def test_no_module_is_sent_through_its_hooks_and_every_forward_stays_its_own(model, path):
    with loka.trace_routing(model, path), torch.no_grad():
        watched = [module for module, call in zip(model.modules(), calls(model), strict=True) if call != "none"]
        assert watched == [model, *(layer.experts for layer in model.layers)]
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
        model(tokens(1, 3))
    assert not attached(model)


@pytest.mark.parametrize("before", ["none", None, "own"])
def test_what_stood_there_before_comes_back(model, path, before):
    ran = []
    if before is None:
        model._compiled_call_impl = None
    elif before == "own":
        inner = model._call_impl
        model._compiled_call_impl = lambda *args, **kwargs: ran.append(1) or inner(*args, **kwargs)
    was = calls(model)
    row = tokens(1, 4)
    with loka.trace_routing(model, path), torch.no_grad():
        model(row)
    assert all(a is b for a, b in zip(calls(model), was, strict=True))
    assert len(ran) == (before == "own")
    model._compiled_call_impl = None
    check(RoutingTrace.load(path), model, (row[0], NONE))


def test_a_forward_of_the_instance_is_kept_and_run(model, path):
    experts, ran = model.layers[1].experts, []
    inner = experts.forward
    own = lambda *args, **kwargs: ran.append(1) or inner(*args, **kwargs)  # noqa: E731  # as accelerate puts its own
    experts.forward = own
    row = tokens(1, 4)
    with loka.trace_routing(model, path), torch.no_grad():
        model(row)
        other = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: E731  # likewise
        experts.forward = other  # and inside of the block
        model(row)
        assert len(ran) == 2
    assert experts.__dict__["forward"] is other
    check(RoutingTrace.load(path), model, (row[0], NONE), (row[0], NONE))


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_inside_the_block_are_free_of_it(model, path, how):
    row = tokens(1, 4)
    with loka.trace_routing(model, path) as trace, torch.no_grad():
        twin = how(model)
        assert "_compiled_call_impl" not in twin.__dict__
        if how is not copy.copy:  # which has the very parts
            assert not attached(twin)
            twin.head.weight.zero_()
            assert not twin(row, use_cache=False)["logits"].equal(model(row, use_cache=False)["logits"])
            assert trace.requests == 1
        else:
            model(row, use_cache=False)
    check(RoutingTrace.load(path), model, (row[0], NONE))


class _CopiesItself(MadeModel):
    """Its copies take along all that is on it."""

    def __getstate__(self):
        return dict(self.__dict__)


def test_a_module_with_its_own_way_of_copying_has_copies_that_run_themselves(path):
    torch.manual_seed(0)
    model, row = _CopiesItself(), tokens(1, 4)
    with loka.trace_routing(model, path), torch.no_grad():
        twin = copy.deepcopy(model)
        twin.head.weight.zero_()
        assert not twin(row)["logits"].equal(model(row)["logits"])
    assert not attached(model)


# --- who else watches or changes the model


def _raise_index(module, args):
    hidden, index, weights = args
    return hidden, (index + 1) % EXPERTS, weights


def test_choices_that_a_hook_changes_are_counted_as_they_run(model, path):
    for layer in model.layers:
        layer.experts.register_forward_pre_hook(_raise_index)
    row, ran = tokens(1, 5), []
    model.layers[0].experts.register_forward_pre_hook(lambda module, args: ran.append(args[1].clone()))
    with loka.trace_routing(model, path), torch.no_grad():
        model(row)
    (index,) = ran
    expected = torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
    assert RoutingTrace.load(path).counts[0, 0, 0].tolist() == expected


def test_tokens_that_a_hook_changes_are_counted_as_they_run(model, path):
    row = tokens(2, 5)
    handle = model.register_forward_pre_hook(lambda module, args: (args[0][:, :3],))
    with loka.trace_routing(model, path), torch.no_grad():
        model(row)
        with pytest.raises(RuntimeError, match="made to fail"):
            model(row, fail=True)
        model(row)
    handle.remove()
    check(RoutingTrace.load(path), model, *((each[:3], NONE) for each in (*row, *row)))


def test_hooks_of_the_user_run_as_they_always_do(model, path):
    seen = []
    with loka.trace_routing(model, path), torch.no_grad():
        experts = model.layers[0].experts
        before = experts.register_forward_pre_hook(lambda *_: seen.append("before"))
        after = experts.register_forward_hook(lambda *_: seen.append("after"))
        model(tokens(1, 2))
        before.remove()
        after.remove()
        model(tokens(1, 2))
    assert seen == ["before", "after"]
    assert not attached(model)


def test_a_model_is_converted_and_reverted_inside_the_block(model, path):
    row = tokens(1, 4)
    with loka.trace_routing(model, path, experts="*.experts"), torch.no_grad():
        plain = model(row)["logits"]
        loka.convert(model, plan_for(model, ["layers.0.router", "head"]))
        planned = model(row)["logits"]
        loka.revert(model)
        assert torch.equal(model(row)["logits"], plain)
    assert not torch.equal(planned, plain)
    assert RoutingTrace.load(path).counts.sum((1, 3)).tolist() == [[4 * TOP_K] * LAYERS] * 3


def test_two_traces_and_a_probe_of_one_model_end_in_any_order(model, path, tmp_path):
    importlib.import_module("torch._dynamo")  # then they set the stance of compiled code, and give it back
    row = tokens(1, 4)
    first, second = (loka.trace_routing(model, path.with_name(name)) for name in ("a.npz", "b.npz"))
    probe = loka.probe(model, db=tmp_path / "run.db", every=1)
    with torch.no_grad():
        first.__enter__()
        probe.__enter__()
        second.__enter__()
        model(row)
        first.__exit__(None, None, None)
        model(row)
        probe.__exit__(None, None, None)
        second.__exit__(None, None, None)
    assert not attached(model)
    check(RoutingTrace.load(path.with_name("a.npz")), model, (row[0], NONE))
    check(RoutingTrace.load(path.with_name("b.npz")), model, (row[0], NONE), (row[0], NONE))


def test_replicas_of_a_model_run_themselves(model, path):
    """As `DataParallel` makes them on several devices: from all that is on their original."""
    parallel = torch.nn.DataParallel(model)
    parallel.device_ids = [0, 1]  # which this machine need not have
    row = tokens(1, 4)
    with loka.trace_routing(parallel, path), torch.no_grad():
        replica = model._replicate_for_data_parallel()
        head = model.head._replicate_for_data_parallel()
        head.weight, head.bias = torch.zeros_like(model.head.weight), torch.zeros_like(model.head.bias)
        replica._modules = {**model._modules, "head": head}
        assert not replica(row)["logits"].any()
    check(RoutingTrace.load(path), model, (row[0], NONE))
    assert not attached(model)


# --- compiled inside the block


def test_what_had_ended_before_a_module_is_compiled_in_place_stays_in_the_trace(model, path):
    before = tokens(1, 3)
    with pytest.warns(LokaWarning, match=r"1 of the watched modules were compiled in place.*are in the trace: 1"):
        with loka.trace_routing(model, path) as trace, torch.no_grad():
            with trace.request():
                model(before)
            with trace.request():
                model(tokens(1, 5))
                model.layers[0].experts.compile(backend="eager")
                model(tokens(1, 1))
            model(tokens(1, 4))
    model.layers[0].experts._compiled_call_impl = None
    check(RoutingTrace.load(path), model, (before[0], NONE))


def test_a_module_that_is_compiled_in_place_before_any_request_has_ended_is_told(model, path):
    with pytest.raises(EvidenceError, match=r"1 of the watched modules were compiled in place.*there is no trace"):
        with loka.trace_routing(model, path) as trace, torch.no_grad(), trace.request():
            model(tokens(1, 3))
            model.layers[0].experts.compile(backend="eager")
    assert not list(path.parent.iterdir())
    model.layers[0].experts._compiled_call_impl = None


def test_the_first_compiled_code_of_a_process_is_traced_inside_the_block(tmp_path):
    code = textwrap.dedent(
        """
        import sys, torch, loka
        from loka.probes.routing.trace import RoutingTrace
        from tests.probes.made_routing import MadeModel
        torch.manual_seed(0)
        model = MadeModel().eval()
        row = torch.full((1, 4), 7)
        with loka.trace_routing(model, sys.argv[1]), torch.no_grad():
            assert "torch._dynamo" not in sys.modules
            model.layers[1] = torch.compile(model.layers[1], backend="eager")
            model(row)
            model(row)
        assert torch._dynamo.utils.counters["frames"]["total"] == 0
        counts = RoutingTrace.load(sys.argv[1]).counts
        assert counts.sum((1, 3)).tolist() == [[8, 8, 8], [8, 8, 8]], counts
        """
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.npz")], check=True, env=environment, cwd=_ROOT)


# --- decode steps that are only noted, and counted later


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("rows", [3, 70])
def test_a_loop_may_use_the_memory_of_its_tokens_and_masks_again(model, path, mode, rows):
    prompt, answer = tokens(rows, 3), tokens(rows, 6)
    answer[0, 2], answer[1, 4] = 2, 2
    fed, mask = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 9, dtype=torch.long)
    cache = Cache()
    with loka.trace_routing(model, path, stop_tokens=[2]), mode():
        model(input_ids=prompt, past_key_values=cache)
        for step in range(6):
            fed.copy_(answer[:, step : step + 1])
            mask[2, 3 + step] = step % 2  # a row that is padding in every other step
            model(input_ids=fed, attention_mask=mask[:, : 4 + step], past_key_values=cache)
            fed.fill_(2)
            mask[:, 3 + step] = 0
    expected = [answer[0, :2], answer[1, :4], answer[2, 1::2], *answer[3:]]
    found = RoutingTrace.load(path)
    check(found, model, *zip(prompt, expected, strict=True))
    assert found.decode_steps.tolist() == [2, 4] + [6] * (rows - 2)


def _move_on(module, args, output):
    output[1].add_(1).remainder_(EXPERTS)


def test_choices_written_before_they_are_handed_on_are_counted_as_handed_on(model, path):
    for layer in model.layers:
        layer.router.register_forward_hook(_move_on)
    row, ran = tokens(1, 6), []
    inner = model.layers[2].experts.forward
    model.layers[2].experts.forward = lambda hidden, index, weights: (
        ran.append(index.clone()) or inner(hidden, index, weights)
    )
    cache = Cache()
    with loka.trace_routing(model, path), torch.no_grad():
        for step in range(6):
            model(input_ids=row[:, step : step + 1], past_key_values=cache)
    expected = torch.bincount(torch.cat(ran).flatten(), minlength=EXPERTS)
    assert RoutingTrace.load(path).counts[0, :, 2].sum(0).tolist() == expected.tolist()


def test_rows_that_ended_run_again_after_a_step_of_several_tokens(model, path):
    """As of a turn in a conversation, and that steps before and after it are told apart."""
    prompt, first, turn, last = tokens(2, 3), tokens(2, 4), tokens(2, 2), tokens(2, 3)
    first[0, 1], last[1, 2] = 2, 2
    cache = Cache()
    with loka.trace_routing(model, path, stop_tokens=[2]), torch.no_grad():
        model(input_ids=prompt, past_key_values=cache)
        for step in range(4):
            model(input_ids=first[:, step : step + 1], past_key_values=cache)
        model(input_ids=turn, past_key_values=cache)
        for step in range(3):
            model(input_ids=last[:, step : step + 1], past_key_values=cache)
    decoded = torch.cat([first[0, :1], turn[0], last[0]]), torch.cat([first[1], turn[1], last[1, :2]])
    found = RoutingTrace.load(path)
    check(found, model, (prompt[0], decoded[0]), (prompt[1], decoded[1]))
    assert found.decode_steps.tolist() == [1 + 1 + 3, 4 + 1 + 2]


@pytest.mark.parametrize("many", [1, 2, 5])
def test_it_counts_the_same_however_many_steps_are_noted(model, path, monkeypatch, many):
    monkeypatch.setattr("loka.probes.routing.flow._MOST_STEPS", many)
    prompt, answer = tokens(2, 4), tokens(2, 9)
    cache = Cache()
    with loka.trace_routing(model, path), torch.no_grad():
        model(input_ids=prompt, past_key_values=cache)
        for step in range(9):
            model(input_ids=answer[:, step : step + 1], past_key_values=cache)
    check(RoutingTrace.load(path), model, (prompt[0], answer[0]), (prompt[1], answer[1]))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["layers.1", "layers.2.experts", "head"])
def test_an_error_in_the_middle_of_a_step_loses_its_own_requests_only(model, path, error, where):
    rows, answer = tokens(3, 4), tokens(1, 5)
    armed = []

    def interrupt(*_):
        if armed:
            raise error("stop")

    model.get_submodule(where).register_forward_pre_hook(interrupt)
    with loka.trace_routing(model, path) as trace, torch.no_grad():
        generate(model, rows[:1], answer)
        cache = Cache()
        for step in range(5):
            model(input_ids=answer[:, step : step + 1], past_key_values=cache)
        armed.append(True)
        with pytest.raises(error, match="stop"):
            model(input_ids=answer[:, :1], past_key_values=cache)
        armed.clear()
        assert trace.requests == 1
        generate(model, rows[2:], answer)
    check(RoutingTrace.load(path), model, (rows[0], answer[0]), (rows[2], answer[0]))


def test_threads_that_decode_at_once_are_told_apart(model, path):
    prompts, answers = tokens(4, 1, 5), tokens(4, 1, 12)
    together = threading.Barrier(4)

    def serve(at):
        with torch.no_grad():
            cache = Cache()
            model(input_ids=prompts[at], past_key_values=cache)
            for step in range(12):
                together.wait()
                model(input_ids=answers[at][:, step : step + 1], past_key_values=cache)
            kept.append(cache)

    kept = []
    with loka.trace_routing(model, path):
        threads = [threading.Thread(target=serve, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = RoutingTrace.load(path)
    assert found.requests == 4
    for routers in (layer.router for layer in model.layers):
        routers.chosen.clear()
    expected = [
        [model.expected(each) for each in (prompt[0], answer[0])]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert sorted(found.counts.tolist()) == sorted([[[*map(list, phase)] for phase in each] for each in expected])


class _ChangingExperts(MadeExperts):
    """Is handed its choice as the second argument at first, and something else there later."""

    def forward(self, hidden, top_k_index, top_k_weights):
        return hidden


def test_a_second_argument_that_is_no_choice_any_more_is_refused(path):
    model = torch.nn.ModuleDict({"experts": _ChangingExperts()})
    index = torch.zeros(3, TOP_K, dtype=torch.long)
    model.forward = lambda hidden, second: model["experts"](hidden, second, index)
    hidden = torch.randn(3, WIDTH)
    with pytest.raises(ArgumentError, match=r"experts was handed torch.float32 \[3, 2\], where.*its chosen experts"):
        with loka.trace_routing(model, path):
            model(hidden, index)
            model.forward = lambda hidden, second: [model["experts"](hidden, each, index) for each in second]
            model(hidden, [index, F.one_hot(index[:, 0], 2).float()])
