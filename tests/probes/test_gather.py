"""Statistics of several processes, over real gloo groups: what all ranks hold equals what one process would."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from loka.errors import ArgumentError
from loka.probes.distributions import gather
from loka.probes.distributions.covariance import Covariance
from loka.probes.distributions.gather import gather_arrays, gather_bytes, packed, reduced, unpacked
from loka.probes.distributions.matrix_normal import MatrixNormal
from loka.probes.distributions.moments import Moments
from tests.made_processes import ranks

FEATURES = 37
# Rows of each rank: uneven, and some ranks have none.
SHARDS = {2: [(5, 12), (0, 9), (0, 0)], 4: [(7, 0, 1, 30), (0, 0, 0, 4)]}


def shards(counts):
    generator = torch.Generator().manual_seed(len(counts))
    rows = 1e4 + torch.randn(sum(counts), FEATURES, generator=generator)
    return rows.split(list(counts))


def payload(rank):
    """Bytes of any value and of a length that differs by rank; rank 1 has none."""
    return b"" if rank == 1 else bytes(range(256)) * (rank + 1)


def check_bytes(rank, world, group=None):
    assert gather_bytes(payload(rank), group) == [payload(other) for other in range(world)]
    assert gather_bytes(b"", group) == [b""] * world
    everyone = gather_arrays({f"of/{rank}": np.arange(rank, dtype=np.float16)} if rank else {}, group)
    assert [list(arrays) for arrays in everyone] == [[], *([f"of/{other}"] for other in range(1, world))]
    for other, arrays in enumerate(everyone[1:], start=1):
        np.testing.assert_array_equal(arrays[f"of/{other}"], np.arange(other, dtype=np.float16))


def check_reduced(rank, counts):
    parts = shards(counts)
    whole = torch.cat(parts)
    one, all_of_it = reduced(Moments.of(parts[rank])), Moments.of(whole)
    assert one.count == all_of_it.count
    torch.testing.assert_close(one.mean, all_of_it.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.m2, all_of_it.m2, rtol=1e-12, atol=1e-12)
    for width in (None, 8):
        state, expected = reduced(Covariance.of(parts[rank], rank=width)), Covariance.of(whole, rank=width)
        torch.testing.assert_close(state.matrix, expected.matrix, rtol=0, atol=1e-6)
        torch.testing.assert_close(state.variance, expected.variance, rtol=1e-12, atol=1e-12)
        copies = gather_bytes(packed(state.arrays()))
        assert copies == [copies[0]] * len(counts)  # the same on every rank, bit for bit


def check_weights(world):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    state = MatrixNormal.of(weight)
    together = reduced(state)
    assert together.updates == world
    torch.testing.assert_close(together.rows, state.rows)


def check_errors_are_the_same_everywhere(rank):
    with pytest.raises(ArgumentError, match=r"3 features .* 4"):
        reduced(Moments.empty(3 + min(rank, 1)))


def work(folder, rank, group):
    """The body of one process."""
    world = dist.get_world_size()
    for at_once in (gather.AT_ONCE_BYTES, 0):  # then one rank at a time
        gather.AT_ONCE_BYTES = at_once
        check_bytes(rank, world)
        for counts in SHARDS[world]:
            check_reduced(rank, counts)
        check_weights(world)
        check_errors_are_the_same_everywhere(rank)
        if world == 4:
            check_subgroup(rank, dist.new_group([1, 3]))


def check_subgroup(rank, group):
    """Ranks inside a group count from zero; ranks outside are told."""
    if rank in (1, 3):
        inside = dist.get_rank(group)
        check_bytes(inside, 2, group)
        rows = torch.full((1, 2), float(rank))
        assert reduced(Moments.of(rows), group).mean.tolist() == [2.0, 2.0]
    else:
        with pytest.raises(ArgumentError, match="no member"):
            gather_bytes(b"", group)


@pytest.mark.parametrize("world", list(SHARDS))
def test_every_rank_holds_what_one_process_would(tmp_path, world):
    ranks(world, work, tmp_path)


def test_a_single_process_keeps_what_it_has():
    state = Moments.of(torch.randn(3, 2))
    assert reduced(state) is state
    assert gather_bytes(b"abc") == [b"abc"]
    assert gather_arrays({}) == [{}]


def test_a_group_of_one_keeps_what_it_has(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        state = Moments.of(torch.randn(3, 2))
        assert reduced(state) is state
        assert gather_bytes(b"") == [b""]
    finally:
        dist.destroy_process_group()


def test_arrays_keep_dtype_shape_and_any_name():
    arrays = {
        "file": np.array(3, dtype=np.int64),
        "a/b.c": np.zeros((0, 4), dtype=np.float16),
        "text": np.array(["wide", "deep"]),
        "transposed": np.arange(6.0).reshape(2, 3).T,
    }
    back = unpacked(packed(arrays))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back[name], array)


def test_objects_are_neither_sent_nor_received():
    with pytest.raises(ArgumentError, match="'names' of Python objects"):
        packed({"names": np.array([{}, []], dtype=object)})


@pytest.mark.gpu
def test_over_nccl_the_bytes_travel_through_the_device(tmp_path):
    dist.init_process_group("nccl", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        device = gather._device(None)
        assert device.type == "cuda"
        sizes = gather._sizes(3, None, device)
        assert sizes == [3]
        assert gather._at_once(b"abc", sizes, None, device) == [b"abc"]
        state = Covariance.of(torch.randn(5, 3, device="cuda"))
        assert Covariance.from_arrays(unpacked(packed(state.arrays()))).count == 5
    finally:
        dist.destroy_process_group()
