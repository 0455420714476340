"""Places and groups found together: near the proven optimum, under the load cap, better on requests not seen."""

import numpy as np
import pytest

from loka.dispatch.placement.evaluate import evaluate
from loka.dispatch.placement.joint import Problem, _joint, _settled, affinity_of, solve
from loka.dispatch.placement.optimum import optimal_places
from loka.dispatch.placement.options import PlaceOptions
from loka.dispatch.placement.place import greedy_coverage, place, with_replicas
from loka.dispatch.placement.smoothing import DIRECT, STRENGTHS, _left_out, smooth
from loka.dispatch.placement.transport import Repair, load_of, place_by_gain, places_under_load
from loka.dispatch.placement.usage import device_of, fractions, hosts_of, slots_of
from loka.errors import ArgumentError
from tests.dispatch.made_routing import made_trace


def drawn(layers, devices, experts, seed):
    """Use of experts by groups, and its load: some experts are far heavier than others."""
    rng = np.random.default_rng(seed)
    use = rng.gamma(0.4, 10.0, size=(layers, 1, experts)) * rng.dirichlet(
        np.ones(devices), (layers, experts)
    ).transpose(0, 2, 1)
    return use, use.sum(axis=1)


def worth(gain, device):
    return np.take_along_axis(gain, device[:, None], axis=1).sum()


def peak(load, device, devices):
    served = np.bincount(device.ravel(), load.ravel(), devices)
    return served.max() / served.mean()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("layers", "devices", "experts"), [(3, 3, 9), (4, 4, 10), (6, 2, 8)])
def test_places_under_a_load_cap_are_within_three_percent_of_the_proven_optimum(layers, devices, experts, seed):
    gain, load = drawn(layers, devices, experts, seed)
    slots = slots_of(experts, devices)
    best = optimal_places(gain, load, slots, max_load=1.15)
    found = places_under_load(gain, load.reshape(1, -1), slots, max_load=1.15)
    assert peak(load, best, devices) <= 1.15 + 1e-9
    assert peak(load, found, devices) <= 1.15 + 1e-9
    assert np.array_equal(np.bincount(found[0], minlength=devices), slots)
    assert worth(gain, found) >= 0.97 * worth(gain, best)


def test_without_a_cap_one_layer_is_the_optimum_itself():
    gain, load = drawn(2, 3, 7, 0)
    slots = slots_of(7, 3)
    best = optimal_places(gain, load, slots, max_load=99.0)
    assert worth(gain, place_by_gain(gain, slots)) == pytest.approx(worth(gain, best))


def test_a_load_that_cannot_be_is_refused_by_the_optimum_and_approached_by_swaps():
    gain, load = drawn(1, 3, 3, 0)
    with pytest.raises(ArgumentError, match="No optimum was proven"):
        optimal_places(gain, load, slots_of(3, 3), max_load=1.0)
    found = places_under_load(gain, load.reshape(1, -1), slots_of(3, 3), max_load=1.0)
    assert sorted(found[0]) == [0, 1, 2]


def test_the_load_to_be_prepared_for_is_mean_plus_deviation_and_its_slope_is_right():
    counts = np.random.default_rng(0).poisson(5, size=(50, 12)).astype(np.float32)
    device = np.arange(12).reshape(2, 6) % 3
    load = load_of(counts, device, 3, margin=0.7)
    served = np.stack([counts[:, device.ravel() == at].sum(axis=1) for at in range(3)], axis=1).astype(float)
    served += served.mean() - served.mean(axis=1, keepdims=True)  # a longer request is longer for all devices
    assert np.allclose(load.expected, served.mean(axis=0) + 0.7 * served.std(axis=0), rtol=1e-5)
    step = 1e-3  # move a little of expert 4 of layer 1 onto device 2
    nudged = served[:, 2] + step * counts[:, 6 + 4]
    slope = (nudged.mean() + 0.7 * nudged.std() - load.expected[2]) / step
    assert load.weight[1, 2, 4] == pytest.approx(slope, rel=1e-2)


def test_a_repair_ends_below_the_cap_and_keeps_the_slots():
    gain, load = drawn(5, 4, 16, 1)
    device = place_by_gain(gain, slots_of(16, 4))
    repair = Repair(gain, load.reshape(1, -1), device, 0.0)
    assert peak(load, device, 4) > 1.05
    assert repair.run(1.05)
    assert peak(load, repair.device, 4) <= 1.05 + 1e-9
    assert all(np.array_equal(np.bincount(row), [4, 4, 4, 4]) for row in repair.device)


def test_requests_not_seen_send_far_fewer_bytes_under_the_load_cap():
    fit, other = made_trace(seed=1), made_trace(seed=2)
    judged = evaluate(place(fit, PlaceOptions(devices=4)), other).to_json()
    # a domain's experts are a quarter of all and take 85 % of its tokens: 15/75 of the bytes are left at best
    assert judged["bytes"]["loka"] <= 0.25 * judged["bytes"]["linear"]
    assert judged["bytes"]["loka"] <= 1.02 * judged["bytes"]["paper"]
    assert judged["imbalance"]["loka"] <= 1.2
    assert judged["group_sizes"]["loka"] == [16, 16, 16, 16]


def test_half_as_many_domains_as_devices_still_save_and_stay_balanced():
    fit, other = made_trace(domains=2, experts=24, seed=1), made_trace(domains=2, experts=24, seed=2)
    judged = evaluate(place(fit, PlaceOptions(devices=4)), other).to_json()
    assert judged["bytes"]["loka"] <= 0.8 * judged["bytes"]["eplb"]
    assert judged["imbalance"]["loka"] <= 1.2


def test_places_settle_within_the_cap_from_whatever_places_they_start_with():
    trace = made_trace(own=0.3, experts=32, seed=3)
    counts = trace.counts.copy()
    counts[:, :, :, :6] *= 3  # experts in order would put all of these on one device
    options = PlaceOptions(devices=4, max_load=1.1)
    problem = Problem(
        counts=counts[:, 1].reshape(64, -1).astype(np.float32),
        smoothed=smooth(counts[:, 0], counts[:, 1]),
        layers=3,
        slots=slots_of(32, 4),
        affinity=affinity_of(options),
        margin=0.1,
        options=options,
    )
    order = np.tile(np.arange(32) // 8, (3, 1))
    start = _joint(problem, order, np.arange(64) % 4, load_of(problem.counts, order, 4, 0.1))
    settled, (best, _) = _settled(problem, start), solve(problem)
    assert start.ratio > 1.5
    assert settled.held
    assert settled.ratio <= 1.1 + 1e-9
    assert settled.saved >= 0.95 * best.saved


def test_the_same_trace_and_seed_make_the_same_placement():
    trace, options = made_trace(requests=32), PlaceOptions(devices=4, seed=5)
    assert place(trace, options).methods == place(trace, options).methods


def test_an_expert_moves_only_where_that_pays():
    old = place(made_trace(seed=1), PlaceOptions(devices=4))
    fresh = made_trace(seed=9, domains=3)  # three kinds of request where there were four: most experts lie wrong

    def moved(cost):
        new = place(fresh, PlaceOptions(devices=4, max_load=9.0, move_tokens=cost), previous=old)
        return (device_of(new.hosts("loka")) != device_of(old.hosts("loka"))).sum()

    assert moved(1e9) == 0
    assert moved(0.0) > moved(20.0) > 0


def test_the_weight_of_the_busiest_device_lowers_it():
    trace = made_trace(own=0.3, seed=3, experts=32, layers=4)
    counts = trace.counts.copy()
    counts[:, :, :, :3] *= 6  # the same three experts are hot in every layer
    hot = type(trace)(counts=counts, domain=trace.domain, layers=trace.layers)

    def busiest(weight):
        options = PlaceOptions(devices=4, busiest=weight, max_load=9.0)  # no cap that would do the same
        return evaluate(place(hot, options), hot).methods["loka"].busiest

    assert busiest(1.0) < 0.98 * busiest(0.0)


def test_nodes_keep_tokens_near_where_they_cannot_stay():
    trace = made_trace(domains=2, experts=16, seed=4, requests=96)
    one = evaluate(place(trace, PlaceOptions(devices=4, nodes=2)), trace).methods
    assert one["loka"].node_bytes <= 0.4 * one["linear"].node_bytes


def test_the_papers_greedy_gives_an_expert_to_the_group_that_uses_it_most_while_there_is_room():
    use = np.array([[[9.0, 8, 1, 0], [1, 7, 1, 0]]])
    assert greedy_coverage(use, np.array([2, 2])).tolist() == [[0, 0, 1, 1]]


def test_replicas_fill_devices_with_what_their_group_uses_most():
    use = np.array([[[5.0, 4, 3, 0], [6, 1, 2, 0]]])
    hosts = hosts_of(np.array([[0, 0, 1, 1]]), 2)
    assert with_replicas(hosts, use, 1)[0].tolist() == [[True, True, True, False], [True, False, True, True]]
    use[:, 0, 2] = 0.0
    assert with_replicas(hosts, use, 1, only_useful=True)[0, 0].tolist() == [True, True, False, False]


def test_predictions_leave_the_predicted_request_out_and_find_its_domain():
    trace = made_trace(requests=40, layers=2, seed=6)
    smoothed = smooth(trace.prefill, trace.decode)
    changed = trace.decode.copy()
    changed[7] = changed[7][:, ::-1]
    again = smooth(trace.prefill, changed)
    truth = trace.decode.reshape(40, -1).astype(float)
    mean = truth.mean(axis=0)
    assert ((smoothed.known - truth) ** 2).sum() < 0.2 * ((mean - truth) ** 2).sum()
    # what request 7 itself decoded reaches its prediction through the mean of all only, a fortieth
    assert np.abs(again.known[7] - smoothed.known[7]).max() <= np.abs(changed[7].ravel() - truth[7]).max() / 20


@pytest.mark.parametrize("strength", [0.05, 1.6])
def test_an_error_without_a_request_is_that_of_a_ridge_refitted_without_it(strength):
    rng = np.random.default_rng(2)
    points, counts = rng.normal(size=(12, 30)), rng.poisson(4, size=(12, 5)).astype(float)
    kernel = (points - points.mean(axis=0)) @ (points - points.mean(axis=0)).T
    values, vectors = np.linalg.eigh(kernel)
    errors = _left_out(values, vectors, strength) @ (counts - counts.mean(axis=0))
    for at in range(12):
        rest = np.delete(np.arange(12), at)
        inputs, middle = points[rest] - points[rest].mean(axis=0), counts[rest].mean(axis=0)
        ridge = np.linalg.solve(inputs.T @ inputs + strength * np.eye(30), inputs.T @ (counts[rest] - middle))
        predicted = middle + (points[at] - points[rest].mean(axis=0)) @ ridge
        assert np.allclose(errors[at], counts[at] - predicted, atol=1e-8)


def test_prefills_are_compared_in_the_way_and_strength_that_predict_best_without_each_request():
    seen, fresh = (
        made_trace(requests=14, layers=2, experts=6, domains=3, tokens=12, seed=4),
        made_trace(requests=5, layers=2, experts=6, domains=3, tokens=12, seed=5),
    )
    decode = seen.decode.reshape(14, -1).astype(float)
    used = np.stack([row / row.sum(axis=1, keepdims=True) for row in seen.decode.astype(float)]).reshape(14, -1)

    def features(trace, direct):
        """Every block with a total variance of one, times its part."""
        part = np.stack([row / row.sum(axis=1, keepdims=True) for row in trace.prefill.astype(float)])
        share, blocks = part.reshape(len(part), -1), []
        for value, seen_by in ((share, used), (np.sqrt(share), np.sqrt(used))):
            for weight, through in ((direct, np.eye(12)), (0.5 - direct, (seen_by - seen_by.mean(axis=0)).T)):
                blocks.append((weight, value @ through))
        return blocks

    def explicit(direct, strength, rows, at):
        """Ridge of the rows' decode counts, at other requests; how blocks are scaled is known from all of them."""
        known, asked = [], []
        for (weight, block), (_, other) in zip(features(seen, direct), features(at, direct), strict=True):
            scale = np.sqrt(weight / ((block - block.mean(axis=0)) ** 2).sum(axis=1).mean())
            known.append(block[rows] * scale)
            asked.append(other * scale)
        inputs, asked = np.hstack(known), np.hstack(asked)
        middle, mean = inputs.mean(axis=0), decode[rows].mean(axis=0)
        gram = (inputs - middle).T @ (inputs - middle) + strength * np.eye(inputs.shape[1])
        return mean + (asked - middle) @ np.linalg.solve(gram, (inputs - middle).T @ (decode[rows] - mean))

    def error(direct, strength):
        left = [explicit(direct, strength, np.delete(np.arange(14), i), seen)[i] - decode[i] for i in range(14)]
        return (np.array(left) ** 2).sum()

    chosen = min(((d, s) for d in DIRECT for s in STRENGTHS), key=lambda each: error(*each))
    hosted = np.random.default_rng(0).random((3, 12))
    share, root, constant = smooth(seen.prefill, seen.decode).regression.weights(hosted)
    shares = fractions(fresh.prefill, np.zeros((2, 6)))
    found = shares @ share.T + np.sqrt(shares) @ root.T + constant
    assert np.allclose(found, explicit(*chosen, np.arange(14), fresh) @ hosted.T, rtol=1e-3)
