"""Models, generations and checks that the tests of recording share."""

import numpy as np
import torch
import torch.nn.functional as F

from tests.probes.made_routing import VOCABULARY, Cache, MadeModel


def seeded_model():
    torch.manual_seed(0)
    return MadeModel().eval()


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


def generate(model, prompt, answer, mask=None):
    """A prefill and a decode step for each token of the answer, as `generate` would run them."""
    cache = Cache()
    model(prompt, attention_mask=mask, past_key_values=cache)
    for step in range(answer.shape[1]):
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        model(answer[:, step : step + 1], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def check(trace, model, *requests):
    """Compare every request with (prefill tokens, decode tokens) that were run alone."""
    assert trace.requests == len(requests)
    for at, phases in enumerate(requests):
        for phase, expected in enumerate(phases):
            assert np.array_equal(trace.counts[at, phase], model.expected(expected)), (at, phase)


def attached(model):
    """What stands around the calls of a model's modules: hooks, and what `nn.Module.__call__` runs instead of them."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return hooks + [m for m in model.modules() if m.__dict__.keys() & {"_compiled_call_impl", "_call_impl", "forward"}]


NONE = torch.tensor([], dtype=torch.long)
