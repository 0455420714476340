"""A small mixture of experts that runs as language models do, with a cache, and traces made by hand."""

import numpy as np
import torch
from torch import Tensor, nn

from loka.probes.routing.trace import RoutingTrace

VOCABULARY, WIDTH, EXPERTS, TOP_K, LAYERS = 50, 8, 6, 2, 3


class Cache:
    """Remembers how many tokens it has been given."""

    def __init__(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length


class MadeExperts(nn.Module):
    """One linear map for each expert, in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 4)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        every = torch.einsum("tk,ekn->ten", hidden, self.weight)
        chosen = every.gather(1, top_k_index[..., None].expand(-1, -1, WIDTH))
        return (chosen * top_k_weights[..., None]).sum(1)


class MadeRouter(nn.Linear):
    """Scores, of which the best are chosen."""

    def __init__(self) -> None:
        super().__init__(WIDTH, EXPERTS)
        self.chosen: list[Tensor] = []

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().forward(hidden).softmax(-1).topk(TOP_K, dim=-1)
        self.chosen.append(index.detach().clone())
        return weights, index


class MadeLayer(nn.Module):
    """Router and experts, beside the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = MadeRouter(), MadeExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        weights, index = self.router(flat)
        return hidden + self.experts(flat, index, weights).view_as(hidden)


class MadeModel(nn.Module):
    """Tokens in, logits out, and a cache that goes on. No token sees another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(MadeLayer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask=None, past_key_values=None, use_cache=True, fail=False):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        if fail:
            raise RuntimeError("made to fail")
        if use_cache:
            past_key_values = Cache() if past_key_values is None else past_key_values
            past_key_values.length += input_ids.shape[1]
        return {"logits": self.head(hidden), "past_key_values": past_key_values if use_cache else None}

    def expected(self, tokens: Tensor) -> np.ndarray:
        """Counts [layer, expert] of a row of tokens, by running it alone."""
        routers = [layer.router for layer in self.layers]
        for router in routers:
            router.chosen.clear()
        if tokens.numel():
            self(tokens.reshape(1, -1))
        found = np.zeros((LAYERS, EXPERTS), np.int64)
        for at, router in enumerate(routers):
            for index in torch.cat(router.chosen).flatten().tolist() if router.chosen else []:
                found[at, index] += 1
        return found


def made_trace(requests: int = 30, *, layers: int = 3, experts: int = 8, domains=("code", "chat"), seed: int = 0):
    """A trace whose domains prefer experts of their own, and whose decode is drawn from the same shares as prefill."""
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(experts, 0.5), size=(len(domains), layers))
    domain = [domains[at % len(domains)] for at in range(requests)]
    counts = np.stack(
        [
            [[random.multinomial(tokens, shares[domains.index(name), layer]) for layer in range(layers)]
             for tokens in (60, 40)]
            for name in domain
        ]
    )  # fmt: skip
    return RoutingTrace(
        counts=counts,
        domain=tuple(domain),
        layers=tuple(range(1, 2 * layers, 2)),
        decode_steps=np.full(requests, 40),
        hidden_size=64,
        top_k=1,
        model="Made",
    )
