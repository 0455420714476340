"""Recommendation models, trained here for a minute or less on real logs, then frozen.

Wukong learns the bundled Open Bandit log (clicks, 0.5 % of rows positive), the models of torchrec and DeepCTR-Torch
MovieLens-100k (is the rating 4 or 5), read from the installed recbole. Batches for the study are rows that training
has not seen.
"""

import csv
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.truth.materials import EARLY, LATER, LATER_DOMAIN, Material, Split, Weighing, package_folder
from loka.workloads.open_bandit import load_open_bandit
from loka.workloads.wukong import Wukong, WukongConfig

BATCH: Final[int] = 512
STEPS: Final[int] = 300
_EMBEDDING: Final[int] = 16
_YEAR_S: Final[float] = 365.25 * 86_400

Batch = tuple[Tensor, Tensor, Tensor]  # ids [B, fields], dense [B, features], label [B]
Loss = Callable[[nn.Module, Batch], Tensor]  # in double precision, so that a small change of it is not lost


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A model that has not been trained yet, with its loss and what it is to be trained on."""

    model: nn.Module
    loss: Loss
    table: "Table"

    def trained(self, name: str, *, early: int, later: int) -> Material:
        """Train it; the domains of the domain split are those of these numbers."""
        train(self.model, self.loss, self.table)
        splits = self.table.splits(early=early, later=later)
        return Material(name=name, model=self.model, loss=self.loss, splits=splits, weighing=Weighing(hook="bce"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of a log, of which the first `trained` may be trained on."""

    categorical: Tensor  # int64 [rows, fields]
    dense: Tensor  # float32 [rows, features]
    label: Tensor  # float32 [rows]
    domain: Tensor  # int64 [rows]
    cardinalities: tuple[int, ...]
    trained: int

    def take(self, rows: Tensor) -> Batch:
        """Return one batch."""
        return self.categorical[rows], self.dense[rows], self.label[rows]

    def training_batches(self) -> Iterator[Batch]:
        """Yield batches of the rows that may be trained on, shuffled anew in every epoch, without end."""
        for epoch in count():
            order = torch.randperm(self.trained, generator=torch.Generator().manual_seed(epoch))
            for rows in order[: self.trained // BATCH * BATCH].view(-1, BATCH):
                yield self.take(rows)

    def splits(self, early: int, later: int) -> dict[str, Split]:
        """Batches of held-out rows: shuffled, and by domain, one domain before the other."""
        generator = torch.Generator().manual_seed(1)
        held_out = self.trained + torch.randperm(len(self.label) - self.trained, generator=generator)
        domain = self.domain[held_out]
        mixed = self._batches(held_out, EARLY + LATER)
        return {
            "exchangeable": Split(early=mixed[:EARLY], later=mixed[EARLY:]),
            "domain": Split(
                early=self._batches(held_out[domain == early], EARLY),
                later=self._batches(held_out[domain == later], LATER_DOMAIN),
            ),
        }

    def _batches(self, rows: Tensor, number: int) -> tuple[Batch, ...]:
        if len(rows) < number * BATCH:
            raise ValueError(f"{number} batches of {BATCH} were asked of {len(rows)} rows. Use smaller batches.")
        return tuple(self.take(rows[index * BATCH : (index + 1) * BATCH]) for index in range(number))


def train(model: nn.Module, loss: Loss, table: Table, steps: int = STEPS) -> None:
    """Train in place with Adam on shuffled batches of the rows that may be trained on; leave it in eval mode."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in islice(table.training_batches(), steps):
        optimizer.zero_grad()
        loss(model, batch).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        optimizer.step()
    model.eval()


# --- data ---


def open_bandit() -> Table:
    """The Open Bandit log; the earlier 70 % may be trained on, the domain is the campaign."""
    log = load_open_bandit()
    return Table(
        categorical=log.categorical,
        dense=log.dense,
        label=log.click,
        domain=log.categorical[:, log.fields.index("campaign")],
        cardinalities=log.cardinalities,
        trained=round(0.7 * len(log)),
    )


def movielens() -> Table:
    """MovieLens-100k from recbole, 8 categorical fields and 3 dense features; the domain is the user's gender."""
    folder = package_folder("recbole") / "dataset_example" / "ml-100k"
    tables: dict[str, list[list[str]]] = {}
    for kind in ("inter", "user", "item"):
        with (folder / f"ml-100k.{kind}").open(encoding="utf-8", newline="") as stream:
            tables[kind] = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    users = {row[0]: row[1:] for row in tables["user"]}  # age, gender, occupation, zip code
    items = {row[0]: row[1:] for row in tables["item"]}  # title, year, genres
    order = np.random.default_rng(0).permutation(len(tables["inter"]))
    rows = [tables["inter"][index] for index in order]
    fields = [(u, i, *users[u], *items[i][1:]) for u, i, *_ in rows]
    codes, cardinalities = [], []
    for column in zip(*fields, strict=True):
        values, code = np.unique(np.array(column), return_inverse=True)
        codes.append(code.astype(np.int64))
        cardinalities.append(len(values))
    time = np.array([float(row[3]) for row in rows])
    age = np.array([float(users[row[0]][0]) for row in rows])
    years = [items[row[1]][1] for row in rows]
    released = np.array([float(year) if year.isdigit() else np.nan for year in years])
    dense = np.stack([age, np.where(np.isnan(released), np.nanmean(released), released), time / _YEAR_S], axis=1)
    dense = (dense - dense.mean(0)) / dense.std(0)
    return Table(
        categorical=torch.from_numpy(np.stack(codes, axis=1)),
        dense=torch.from_numpy(dense.astype(np.float32)),
        label=torch.tensor([float(row[2]) >= 4 for row in rows], dtype=torch.float32),
        domain=torch.from_numpy(codes[3]),  # 0 F, 1 M
        cardinalities=tuple(cardinalities),
        trained=70_000,
    )


# --- models ---


def wukong() -> Material:
    """A Wukong on the Open Bandit log; early campaign men, later campaign women."""
    return wukong_setup().trained("wukong", early=1, later=2)


def wukong_setup() -> Setup:
    """The same before it is trained."""
    table = open_bandit()
    model = Wukong(WukongConfig(cardinalities=table.cardinalities, num_dense=table.dense.shape[1], base_rate=0.005))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        categorical, dense, label = batch
        return F.binary_cross_entropy_with_logits(model(categorical, dense).double(), label.double())

    return Setup(model=model, loss=loss, table=table)


def dlrm_dcn() -> Material:
    """torchrec's DLRM_DCN on MovieLens: most of its dense work is done by bare Parameters."""
    dlrm = importlib.import_module("torchrec.models.dlrm")
    configs = importlib.import_module("torchrec.modules.embedding_configs")
    embeddings = importlib.import_module("torchrec.modules.embedding_modules")
    jagged = importlib.import_module("torchrec.sparse.jagged_tensor")
    table = movielens()
    names = [f"f{index}" for index in range(len(table.cardinalities))]
    tables = [
        configs.EmbeddingBagConfig(
            name=f"t_{name}", embedding_dim=2 * _EMBEDDING, num_embeddings=rows, feature_names=[name]
        )
        for name, rows in zip(names, table.cardinalities, strict=True)
    ]
    model = dlrm.DLRM_DCN(
        embeddings.EmbeddingBagCollection(tables=tables),
        table.dense.shape[1],
        dense_arch_layer_sizes=[128, 2 * _EMBEDDING],
        over_arch_layer_sizes=[512, 256, 1],
        dcn_num_layers=3,
        dcn_low_rank_dim=96,
    )

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        categorical, dense, label = batch
        lengths = torch.ones(categorical.numel(), dtype=torch.int32)
        sparse = jagged.KeyedJaggedTensor(keys=names, values=categorical.T.flatten(), lengths=lengths)
        return F.binary_cross_entropy_with_logits(model(dense, sparse).squeeze(-1).double(), label.double())

    return Setup(model=model, loss=loss, table=table).trained("dlrm_dcn", early=0, later=1)


def dcnmix() -> Material:
    """DeepCTR-Torch's DCNMix on MovieLens: slices of 3-d Parameters."""
    return _deepctr("DCNMix", low_rank=32, num_experts=4).trained("dcnmix", early=0, later=1)


def xdeepfm() -> Material:
    """DeepCTR-Torch's xDeepFM on MovieLens: convolutions of width one."""
    return xdeepfm_setup().trained("xdeepfm", early=0, later=1)


def xdeepfm_setup() -> Setup:
    """The same before it is trained."""
    return _deepctr("xDeepFM", cin_layer_size=(64, 64))


def _deepctr(model_name: str, **options: Any) -> Setup:
    with mock.patch("threading.Thread.start"):  # on import, a thread asks the network for a newer version
        models = importlib.import_module("deepctr_torch.models")
        inputs = importlib.import_module("deepctr_torch.inputs")
    table = movielens()
    columns = [
        inputs.SparseFeat(f"c{index}", vocabulary_size=rows, embedding_dim=_EMBEDDING)
        for index, rows in enumerate(table.cardinalities)
    ]
    columns += [inputs.DenseFeat(f"d{index}", 1) for index in range(table.dense.shape[1])]
    model = getattr(models, model_name)(columns, columns, dnn_hidden_units=(256, 128), device="cpu", **options)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        categorical, dense, label = batch
        clicked = model(torch.cat([categorical.float(), dense], dim=1)).squeeze(-1)
        return F.binary_cross_entropy(clicked.double(), label.double())

    return Setup(model=model, loss=loss, table=table)
