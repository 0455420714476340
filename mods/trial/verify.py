"""Equivalent mods, carried out and kept only where the model still computes what it did.

For each mod in turn: one pass over the inputs says what there is to do, every place is written, and one more pass
compares. Where the output differs by more than the tolerance, the places are taken back and tried by halves, until the
ones that are at fault are found; those stay as they were, with the figure. The comparison is always with the model
before the first equivalent mod, so what is kept holds for all of them together.
"""

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from loka.errors import ArgumentError, ModError
from loka.mods.checks import check_built, irreplaceable
from loka.mods.claims import Claim, FilterFn, listing, walk
from loka.mods.edits import Edit, Replacement, edits_of, in_words, inherit, take_back, write
from loka.mods.fast_paths import side_claims, through_children
from loka.mods.trial.equivalent import Batch, EquivalentMod, Place, Refusal
from loka.mods.trial.observe import Observer, Traffic
from loka.numerics import gate_for, product_error
from loka.value_flow import tensors_in

logger = logging.getLogger("loka.mods")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What the model is run on, and how far its output may move, relative to its norm."""

    batches: tuple[Batch, ...]
    tolerance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Done:
    edits: tuple[Edit, ...]
    replacements: tuple[Replacement, ...]


@dataclass(slots=True)
class Outcome:
    """What was kept and what was not."""

    done: list[_Done] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Every write, in order."""
        return tuple(edit for done in self.done for edit in done.edits)

    @property
    def replacements(self) -> tuple[Replacement, ...]:
        """Every replacement, in order."""
        return tuple(replacement for done in self.done for replacement in done.replacements)


def keep_equivalent(
    model: nn.Module, mods: Sequence[EquivalentMod], filter_fn: FilterFn | None, trial: Trial
) -> Outcome:
    """Carry out equivalent mods one after the other, and keep what leaves the model's output as it was.

    Raises ModError where no mod finds anything at all, or the model computes something else in every run; whatever is
    raised, by the model too, leaves the model as it was.
    """
    work = _Work(model, filter_fn, trial)
    try:
        with torch.inference_mode(False):  # parameters made there could never be trained
            for mod in mods:
                work.carry_out(mod)
    except BaseException:  # an interrupt, too, must not leave half a rewrite behind
        take_back(work.outcome.edits)
        raise
    if not work.outcome.done and not any(refusal.fqn for refusal in work.outcome.refused):
        raise ModError(" ".join(refusal.reason for refusal in work.outcome.refused) + " Nothing was changed.")
    for line in (*work.outcome.replacements, *work.outcome.refused):
        logger.info("%s", line)
    return work.outcome


class _Work:
    def __init__(self, model: nn.Module, filter_fn: FilterFn | None, trial: Trial) -> None:
        self.model, self.filter_fn, self.trial = model, filter_fn, trial
        self.outcome = Outcome()
        self.reference = list(run(model, trial.batches))
        if not any(self.reference):
            raise ArgumentError(
                f"{type(model).__name__} returned no tensor on the inputs, so there is nothing to verify a rewrite by. "
                "Apply the mods to a module that returns its result."
            )
        self._reproducible = False

    def carry_out(self, mod: EquivalentMod) -> None:
        """Try everything that one mod proposes."""
        traffic = self._observed(mod)
        proposals = list(mod.proposals(self.model, traffic))
        refused = [proposal for proposal in proposals if isinstance(proposal, Refusal)]
        places = [proposal for proposal in proposals if isinstance(proposal, Place)]
        admitted = [place for place in places if self._admitted(place)]
        self.outcome.refused += refused
        if not proposals:
            found = f"{mod.name} found nothing to rewrite. {mod.nothing_found(self.model)}"
            self.outcome.refused.append(Refusal(fqn="", mod=mod.name, reason=found))
        elif places and not admitted:
            names = listing(place.fqn for place in places)
            reason = f"{mod.name} found nothing to rewrite: filter_fn refused all {len(places)} candidates, {names}."
            self.outcome.refused.append(Refusal(fqn="", mod=mod.name, reason=reason))
        self._try(admitted)

    def _observed(self, mod: EquivalentMod) -> Traffic:
        observer = Observer(self.model, mod.measures(self.model), covariance=mod.wants_covariance())
        figure = difference(run(self.model, self.trial.batches, observer), self.reference)
        if not self._reproducible:
            if not figure <= self.trial.tolerance:
                raise ModError(
                    f"{type(self.model).__name__} computes something else in every run, in evaluation mode and with "
                    f"the same seed: two runs on the inputs differ by {figure:.1e}, and {self.trial.tolerance:.1e} is "
                    "the tolerance. Give other inputs, or a larger tolerance. Nothing was changed."
                )
            self._reproducible = True
        return observer.traffic

    def _admitted(self, place: Place) -> bool:
        return self.filter_fn is None or all(self.filter_fn(claim.module, claim.fqn) for claim in place.claims)

    def _try(self, places: Sequence[Place]) -> None:
        """Write these places; keep them if the output holds, else find out which of them are at fault."""
        done = []
        try:
            for place in places:
                written = self._written(place)
                if written is not None:
                    done.append((place, written))
            figure, why = self._difference() if done else (0.0, "")
        except BaseException:  # an interrupt, too, must not leave half a rewrite behind
            for _, written in reversed(done):
                take_back(written.edits)
            raise
        if figure <= self.trial.tolerance:
            self.outcome.done += [written for _, written in done]
            return
        for _, written in reversed(done):
            take_back(written.edits)
        if len(done) == 1:
            place = done[0][0]
            reason = why or (
                f"the model's output would move by {figure:.1e}, and {self.trial.tolerance:.1e} is the tolerance"
                f"{_rounding(self.model, self.trial.tolerance)}"
            )
            self.outcome.refused.append(Refusal(fqn=place.fqn, mod=place.mod, reason=reason, figure=figure))
            return
        half = len(done) // 2
        self._try([place for place, _ in done[:half]])
        self._try([place for place, _ in done[half:]])

    def _written(self, place: Place) -> _Done | None:
        """Write one place; None, with a refusal, where the model forbids it."""
        try:
            for claim in place.claims:
                refusal = claim.refusal or irreplaceable(claim)
                if refusal:
                    raise ModError(refusal)
            claims = [*place.claims, *side_claims(self.model, place.claims)]
            built: list[tuple[Claim, object]] = [(claim, claim.build() if claim.build else None) for claim in claims]
            check_built(self.model, built, [])
        except ModError as error:
            reason = str(error).removesuffix(" Nothing was changed.")
            self.outcome.refused.append(Refusal(fqn=place.fqn, mod=place.mod, reason=reason))
            return None
        edits = edits_of(self.model, built)
        replacements = tuple(
            Replacement(
                fqn=claim.name, mod=claim.mod, before=in_words(claim.before), after=in_words(after), reason=claim.reason
            )
            for claim, after in built
        )
        for claim, after in built:
            if isinstance(claim.before, nn.Module) and isinstance(after, nn.Module):
                inherit(claim.before, after)
        write(edits)
        return _Done(edits=tuple(edits), replacements=replacements)

    def _difference(self) -> tuple[float, str]:
        try:
            return difference(run(self.model, self.trial.batches), self.reference), ""
        except Exception as error:  # noqa: BLE001 - whatever the model does with what was replaced, it does not fit
            return math.inf, f"the model fails with it: {type(error).__name__}: {error}"


def run(model: nn.Module, batches: Sequence[Batch], observer: Observer | None = None) -> Iterator[list[Tensor]]:
    """Yield the tensors that the model returns for each batch: evaluation mode, no gradients, always one seed."""
    for batch in batches:
        with _evaluation(model), torch.no_grad(), torch.random.fork_rng(_gpus(model)):
            torch.manual_seed(0)
            output = _call(model, batch) if observer is None else observer.watch(lambda: _call(model, batch))  # noqa: B023
            tensors = [tensor.detach().clone() for tensor in tensors_in(output)]
        yield tensors


def difference(actual: Iterable[Sequence[Tensor]], reference: Sequence[Sequence[Tensor]]) -> float:
    """Return the largest relative difference of any returned tensor of any batch, by rows and as a whole, in fp32."""
    worst = 0.0
    for some, exact in zip(actual, reference, strict=True):
        if [tensor.shape for tensor in some] != [tensor.shape for tensor in exact]:
            worst = math.inf
        else:
            worst = max((worst, *(_moved(one, other) for one, other in zip(some, exact, strict=True))))
    return worst


def _moved(actual: Tensor, reference: Tensor) -> float:
    if reference.is_complex() and actual.is_complex():
        actual, reference = torch.view_as_real(actual), torch.view_as_real(reference)
    if not reference.is_floating_point():
        return 0.0 if torch.equal(actual, reference) else math.inf
    finite = reference.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(), reference[~finite].nan_to_num()):
        return math.inf
    actual, reference = actual.masked_fill(~finite, 0), reference.masked_fill(~finite, 0)
    if not reference.numel() or torch.equal(actual, reference):
        return 0.0
    columns = reference.shape[-1] if reference.dim() else 1
    error = product_error(actual.reshape(-1, columns), reference.reshape(-1, columns))
    figure = max(error.relative_error, error.gated(gate_for(columns)))
    return math.inf if math.isnan(figure) else figure


# What no tensor that a model returns moves by more than, relative to its norm, unless `apply` is told otherwise.
TOLERANCE: Final[float] = 1e-4


def checked_trial(inputs: object, tolerance: float = TOLERANCE) -> Trial:
    """Return what `inputs` and `tolerance` of `apply` mean. Raises ArgumentError for what they cannot be."""
    if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not 0 <= tolerance < 1:
        raise ArgumentError(f"tolerance={tolerance!r}: give the relative change of the output that may stay, as 1e-4.")
    if isinstance(inputs, Tensor | Mapping | str) or not hasattr(inputs, "__iter__"):
        raise ArgumentError(
            f"inputs has to be an iterable of batches, not a {type(inputs).__name__}. For one batch write "
            "inputs=[batch]; a batch is a tensor, a tuple of arguments or a dict of keyword arguments."
        )
    batches = tuple(inputs)
    if not batches:
        raise ArgumentError("inputs has no batch. Give at least one that the model can be run on.")
    for batch in batches:
        if not isinstance(batch, Tensor | Mapping | tuple | list):
            raise ArgumentError(
                f"inputs has a batch of type {type(batch).__name__}. A batch is a tensor, a tuple of arguments or a "
                "dict of keyword arguments."
            )
        if any(tensor.is_nested for tensor in tensors_in(batch)):
            raise ArgumentError(
                "inputs has a nested tensor. Rewrites are fitted to dense ones: give the same rows padded, or one "
                "sequence per batch. Layers compute the same on both."
            )
    return Trial(batches=batches, tolerance=float(tolerance))


def _call(model: nn.Module, batch: Batch) -> object:
    args: Sequence[object] = (batch,) if isinstance(batch, Tensor) else () if isinstance(batch, Mapping) else batch
    kwargs = batch if isinstance(batch, Mapping) else {}
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"A batch of inputs does not fit {type(model).__name__}.forward: {error}. A tuple or a dict holds the "
            "arguments of forward and nothing else; of batches that come with labels, give the inputs alone."
        ) from error
    return model(*args, **kwargs)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, through the children of every module, and everything back to what it was."""
    modes = [(module, module.training) for _, module in walk(model)]
    for module, _ in modes:
        module.training = False
    try:
        with through_children(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _gpus(model: nn.Module) -> list[int]:
    devices = {parameter.device for parameter in model.parameters()}
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})


def _rounding(model: nn.Module, tolerance: float) -> str:
    """Say that a model in half precision cannot be rewritten to within less than its own rounding."""
    coarse = max(
        (torch.finfo(parameter.dtype).eps for parameter in model.parameters() if parameter.dtype.is_floating_point),
        default=0.0,
    )
    if coarse < tolerance:
        return ""
    return f"; the model itself rounds to {coarse:.1e}: give a larger tolerance, or apply before casting it down"
