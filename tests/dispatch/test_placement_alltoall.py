"""What an exchange costs: the bytes that processes really send, and time by arithmetic done by hand."""

import multiprocessing
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from loka.dispatch.placement.alltoall import Links, exchange, step, token_bytes
from loka.errors import ArgumentError

ROOT = Path(__file__).parents[2]
HIDDEN = 24
TOKENS = np.array([[5, 0, 7, 1], [2, 3, 0, 0], [0, 0, 0, 9], [4, 1, 1, 6]])


def work(rank, folder):
    """Send this rank's tokens in bf16, padded and not; write down the bytes that left it and came to it."""
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=4, rank=rank)
    largest = int((TOKENS * (1 - np.eye(4, dtype=int))).max())
    found = []
    for tokens in (TOKENS, np.full((4, 4), largest)):
        out, back = tokens[rank].tolist(), tokens[:, rank].tolist()
        sent = torch.full((sum(out), HIDDEN), float(rank), dtype=torch.bfloat16)
        received = torch.full((sum(back), HIDDEN), -1.0, dtype=torch.bfloat16)
        dist.all_to_all_single(received, sent, back, out)
        sources = received.split(back)
        assert all((part == source).all() for source, part in enumerate(sources))
        away = [part for source, part in enumerate(sources) if source != rank]
        kept = sent.split(out)[rank]
        found += [sent.nbytes - kept.numel() * 2, sum(part.numel() * part.element_size() for part in away)]
    (Path(folder) / f"{rank}.txt").write_text(" ".join(map(str, found)))
    dist.barrier()
    dist.destroy_process_group()


def work_all(folder):
    """Four processes, forked from one that has imported torch and run nothing: importing four times takes longest."""
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=work, args=(rank, folder)) for rank in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    sys.exit(max(abs(job.exitcode) for job in jobs))


def test_bytes_are_those_that_four_processes_exchange(tmp_path):
    code = "import sys; from tests.dispatch.test_placement_alltoall import work_all; work_all(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=240)
    seen = np.array([[int(word) for word in (tmp_path / f"{rank}.txt").read_text().split()] for rank in range(4)])
    plain = exchange(TOKENS, token_bytes(HIDDEN))
    padded = exchange(TOKENS, token_bytes(HIDDEN), padded=True)
    assert plain.bytes == plain.payload_bytes == seen[:, 0].sum() == seen[:, 1].sum()
    assert plain.busiest_bytes == max(seen[:, 0].max(), seen[:, 1].max())
    assert padded.bytes == seen[:, 2].sum() == seen[:, 3].sum()
    assert padded.busiest_bytes == seen[:, 2:].max()
    assert padded.payload_bytes == plain.payload_bytes


def test_time_is_that_of_the_busiest_link():
    links = Links(intra_bandwidth=1e9, inter_bandwidth=1e8, intra_latency_us=1.0, inter_latency_us=10.0)
    tokens = np.zeros((4, 4))
    tokens[0, 1], tokens[0, 2], tokens[3, 2] = 100, 20, 30
    found = exchange(tokens, 1000, nodes=2, links=links)
    # within: 0 sends 100 kB in 100 us, 3 sends 30 kB; between: 0 sends 20 kB in 200 us
    assert found.time_us == pytest.approx(200 + 10)
    assert found.busiest == "device 2 receives, between nodes" or found.busiest == "device 0 sends, between nodes"
    one_node = exchange(tokens, 1000, links=links)
    assert one_node.time_us == pytest.approx(120 + 2 * 1)
    assert one_node.busiest == "device 0 sends, within its node"


def test_padding_makes_every_message_as_large_as_the_largest():
    found = exchange(TOKENS, 10, padded=True)
    assert found.bytes == 12 * 9 * 10
    assert found.payload_bytes == 25 * 10
    assert found.time_us > exchange(TOKENS, 10).time_us


def test_fp8_sends_half_and_its_scales_and_results_come_back_in_bf16():
    assert token_bytes(5120) == 10240
    assert token_bytes(5120, "fp8") == 5120 + 4 * 40
    assert token_bytes(130, "fp8") == 130 + 4 * 2
    dispatch, combine = step(TOKENS[None], 256, payload="fp8")
    assert dispatch.bytes == 25 * (256 + 8)
    assert combine.bytes == 25 * 512


def test_tokens_that_stay_cost_nothing():
    found = exchange(np.diag([3.0, 4.0]), 100, padded=True)
    assert (found.bytes, found.time_us, found.busiest) == (0, 0.0, "none")


@pytest.mark.parametrize("tokens", [np.zeros((2, 3)), np.full((2, 2), np.nan), -np.ones((2, 2)), np.zeros((0, 0))])
def test_what_is_no_exchange_is_refused(tokens):
    with pytest.raises(ArgumentError):
        exchange(tokens, 2)


def test_links_and_tokens_that_cannot_be_are_refused():
    with pytest.raises(ArgumentError, match="bandwidth"):
        Links(inter_bandwidth=0)
    with pytest.raises(ArgumentError, match="bf16 or fp8"):
        token_bytes(8, "int4")
    with pytest.raises(ArgumentError, match="do not divide"):
        exchange(np.zeros((4, 4)), 2, nodes=3)
