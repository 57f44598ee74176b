"""The capture pass: one forward and one backward pass over a model, which give the factors of its parameters.

Every layer that owns a captured parameter is hooked while the closure runs: its inputs and the gradient edges of its
outputs are kept. A backward pass to these edges (:mod:`~ftw_optim._capture.backward`) gives all output gradients at
once, and forms no weight gradient. Every step also checks which operations of the graph read a captured parameter: an
operation outside of the calls of the layers that own the parameter is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import final

import torch
from torch import Tensor

from ftw_optim._capture.armed_hooks import ArmedHooks
from ftw_optim._capture.assembly import Assembly
from ftw_optim._capture.backward import Graph, as_they_come, by_edges, nothing_nested, parameter_gradients
from ftw_optim._capture.hooks import Phase, Recorder
from ftw_optim._capture.layer_use import Use
from ftw_optim._capture.membership import Membership, unproven
from ftw_optim._capture.owners import Owner
from ftw_optim._capture.plan import CapturePlan
from ftw_optim._capture.projections import verify_projection
from ftw_optim._capture.sample_ids import GivenIds, SampleIds
from ftw_optim._capture.self_check import (
    PassCheck,
    SelfChecks,
    check_weights,
    coarsest,
    refuse_uses_outside,
)
from ftw_optim._capture.stand_ins import leaves
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.finiteness import finite_candidates


@final
class Capture:
    """The context in which the closure runs; afterwards :meth:`differentiate` gives the factors.

    Args:
        plan: what to capture. The inputs of the whole model tell the number of candidates.
        sample_ids: the candidate of each position or row, or of each row of some layers; see :class:`SampleIds`.
        of: whose rows the closure runs; for those of another closure the self-check has not vouched.
        agreed: whether any of the processes says yes, where all have to make the same passes because each holds only a
            part of the parameters; None: this one makes the passes that it needs.
    """

    def __init__(
        self,
        plan: CapturePlan,
        *,
        sample_ids: GivenIds | None = None,
        of: str = "candidates",
        agreed: Callable[[bool], bool] | None = None,
    ) -> None:
        self._plan, self._of = plan, of
        self._same_passes, self._agreed = agreed is not None, agreed or bool
        modules = plan.structure.modules.values()
        self._ids = None if sample_ids is None else SampleIds(sample_ids, plan.structure.model)
        self._groups = None if self._ids is None else self._ids.groups
        self._recorder = Recorder(plan, self._ids)
        self._armed = ArmedHooks(modules)
        self._modes = hash(tuple([module.training for module in modules]))
        self._count, self._share_rows = 0, False
        self._passed_through: set[torch.dtype] = set()
        self._stance = ExitStack()

    def __enter__(self) -> Capture:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing it would take a second
            # A compiled graph calls no hooks; for this pass its eager original runs in its place.
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._recorder.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        in_closure = self._recorder.phase is Phase.FORWARD
        self._stance.close()
        self._recorder.close()
        self._armed.__exit__(kind, error, trace)
        expanded = sorted(self._recorder.expanded)[:5]
        kinds = (RuntimeError, IndexError, ValueError)
        if in_closure and expanded and isinstance(error, kinds) and hasattr(error, "add_note"):  # since Python 3.11
            error.add_note(
                f"The output of {', '.join(expanded)} has one row for all candidates and was expanded to one for each. "
                f"If the model cannot take that, do not score these: scored=lambda name, parameter: not name.startswith"
                f'(({", ".join(map(repr, expanded))},)), with combine="graph".'
            )

    def pause(self) -> None:
        """Stop changing the outputs of layers, while another capture is running."""
        self._recorder.phase = Phase.REST
        self._armed.disarm()

    def resume(self) -> None:
        """Change the outputs of layers again, as in the captured calls: a checkpoint may run the layers again."""
        self._recorder.phase = Phase.RECOMPUTE
        self._armed.arm()

    @property
    def counts(self) -> Collection[int]:
        """The numbers of rows the model was called on; empty where only ``sample_ids`` or the losses tell it."""
        return () if self._ids is not None and self._ids.is_for_all else self._recorder.grid.counts

    @property
    def computed_in(self) -> set[torch.dtype]:
        """The dtypes that the captured layers, and all between them and the losses, were computed in."""
        return self._recorder.computed_in | self._passed_through

    def differentiate(
        self,
        losses: Tensor,
        *,
        scale: float,
        keep_graph: bool,
        checks: SelfChecks | None,
        generator: torch.Generator,
    ) -> dict[str, list[Factors]]:
        """Factors of every captured parameter that the losses reached, each multiplied by ``scale``.

        Args:
            losses: the closure's losses, shape ``(n,)``. Losses that are not finite contribute nothing.
            scale: multiplies the losses for the pass.
            keep_graph: leave the graph for a second backward.
            checks: what the self-check has vouched for, extended in place; None: no self-check.
            generator: draws the random numbers of the checks.

        Raises:
            NotImplementedError: the candidates of a layer cannot be told apart, or it cannot be run again.
            RuntimeError: nothing was captured, an input was changed in place after its layer had read it, a captured
                parameter was used outside its layer, or the self-check failed.
        """
        graph, finite, total = self._looked_at(losses, scale, checks)
        doubtful = False
        if graph.reentrant:
            found = self._by_plain_backward(
                total, graph, finite, keep_graph=keep_graph or checks is not None, generator=generator
            )
            doubtful = checks is not None and bool(self._unproven(losses))
        else:
            self.resume()
            proof = self._proof(losses, scale, checks, generator)
            due = self._is_due(checks, self._recorder.uses)
            with nothing_nested(self._plan.structure):
                by_edges(total, self._recorder.uses, keep_graph=keep_graph or due)
            if proof is not None:
                for use in self._recorder.uses:
                    proof.compare(use)
                proof.finish(self.computed_in)
            found = self._assembled(len(losses))
        reached = [use for use in self._recorder.uses if use.reached]
        # Of what is not finite nothing can be compared: then the check waits for the next step.
        if self._is_due(checks, reached, doubtful=doubtful) and not self._agreed(
            not bool(finite_candidates(found, losses).all())
        ):
            check = self._check(losses, graph, scale, generator, keep_graph=keep_graph)
            if check is not None:
                for name, uses in found.items():
                    check.verify(name, uses)
                self._note_passed(checks, check, [(use.owner, self._key(use), use.has_gradient()) for use in reached])
        return found

    def stream(
        self,
        losses: Tensor,
        take: Callable[[str, list[Factors]], None],
        *,
        scale: float,
        checks: SelfChecks | None,
        generator: torch.Generator,
    ) -> None:
        """Hand over each parameter's factors as soon as they are complete, and drop them afterwards.

        The factors are those of :meth:`differentiate`, which raises the same errors.

        Args:
            losses: the closure's losses, as for :meth:`differentiate`; their graph is freed.
            take: called with each parameter's name and factors, during the backward pass or right after it.
            scale: multiplies the losses for the pass.
            checks: what the self-check has vouched for, extended in place; None: no self-check.
            generator: draws the random numbers of the checks.
        """
        graph, _, total = self._looked_at(losses, scale, checks)
        if graph.reentrant:
            whole = self.differentiate(losses, scale=scale, keep_graph=False, checks=checks, generator=generator)
            for name in list(whole):
                take(name, whole.pop(name))
            return
        self.resume()
        proof = self._proof(losses, scale, checks, generator)
        check: PassCheck | None = None
        if self._is_due(checks, self._recorder.uses) and bool(losses.isfinite().all()):
            check = self._check(losses, graph, scale, generator, keep_graph=True)
        assembly = self._assembly(len(losses))
        waiting = {name: len(uses) for name, uses in self._recorder.uses_of.items()}
        vouched: list[tuple[Owner, tuple[object, ...], bool]] = []

        def hand_over(name: str) -> None:
            uses = assembly.found.pop(name)
            if check is not None:
                if all(bool(use.finite().all()) for use in uses):
                    check.verify(name, uses)
                else:
                    check.skip(name)
            take(name, uses)

        def arrived(use: Use, *, last: bool = False) -> None:
            if use.owner.rule is None and not last:
                return  # it is run again when no backward pass is under way
            with self._recorder.at_rest(), torch.no_grad():
                assembly.add(use)
            if check is not None:
                vouched.append((use.owner, self._key(use), use.has_gradient()))
            if proof is not None:
                proof.compare(use)
            use.release()
            for name in use.owner.parameters.values():
                waiting[name] -= 1
                if waiting[name] == 0:
                    hand_over(name)

        with nothing_nested(self._plan.structure):
            as_they_come(total, graph, self._recorder.uses, arrived)
        for use in self._recorder.uses:
            if use.reached and not use.released:
                arrived(use, last=True)
        for name in list(assembly.found):  # of which some use was not reached
            hand_over(name)
        if proof is not None:
            proof.finish(self.computed_in)
        assembly.refuse_nothing()
        if check is not None:
            self._note_passed(checks, check, vouched)

    def _looked_at(self, losses: Tensor, scale: float, checks: SelfChecks | None) -> tuple[Graph, Tensor, Tensor]:
        """The checked graph; which losses are finite, bool (n,); and the scaled sum of the finite ones."""
        self._count = len(losses)
        self._armed.take_over()
        self._recorder.settle(self._count if self._groups is None else self._groups.rows)
        if self._ids is not None:
            self._ids.check(self._count)
            self._share_rows = self._ids.share_rows()
        graph = Graph(losses)
        if graph.reentrant and self._plan.structure.sharding:
            raise NotImplementedError(
                "Expected checkpointing with use_reentrant=False in a model that FSDP2 shards, got the reentrant one, "
                "which takes plain backward passes only."
            )
        if checks is not None:
            checks.notice(graph.links)
        self._passed_through |= graph.dtypes
        if graph.reentrant:  # which hides what was computed inside
            self._passed_through |= {p.dtype for p in self._plan.structure.parameters.values() if p.is_floating_point()}
        read = leaves(self._plan.structure, self._plan.parameters)
        outside = [name for name, leaf in read.items() if graph.used_outside(leaf, self._recorder.uses_of[name])]
        refuse_uses_outside(outside)
        finite = losses.isfinite()
        return graph, finite, torch.where(finite, losses, torch.zeros_like(losses)).sum() * scale

    def _unproven(self, losses: Tensor) -> list[Use]:
        return unproven(self._recorder.uses, self._recorder.inputs.holds) if len(losses) > 1 else []

    def _proof(
        self, losses: Tensor, scale: float, checks: SelfChecks | None, generator: torch.Generator
    ) -> Membership | None:
        """The proof of whose the rows of layers are, begun; None where nothing has to be proved."""
        uses = [] if checks is None else self._unproven(losses)
        if checks is None or not self._agreed(bool(uses)):
            return None
        if self._same_passes:
            uses = self._recorder.uses
        with nothing_nested(self._plan.structure):
            weights = check_weights(len(losses), generator, self.computed_in)
            return Membership(uses, losses, weights, scale, groups=self._groups)

    def _is_due(self, checks: SelfChecks | None, uses: Iterable[Use], *, doubtful: bool = False) -> bool:
        """Whether a layer was read in a way that the self-check has not vouched for, or something else is in doubt."""
        return checks is not None and self._agreed(doubtful or checks.due(map(self._key, uses)))

    def _check(
        self, losses: Tensor, graph: Graph, scale: float, generator: torch.Generator, *, keep_graph: bool
    ) -> PassCheck | None:
        """The check that compares captured factors with autograd's gradients; None where these are not finite."""
        weights = check_weights(len(losses), generator, self.computed_in)
        total = (weights.to(losses) * losses * scale).sum()
        gradients = self._gradients(total, graph, keep_graph=keep_graph)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):  # the scaled sum may overflow
            return None
        layers = {name: [use.owner.name for use in uses] for name, uses in self._recorder.uses_of.items()}
        computed_in = self._recorder.computed_in | (self._passed_through & {torch.float16})
        return PassCheck(weights, gradients, layers, computed_in)

    def _gradients(self, total: Tensor, graph: Graph, *, keep_graph: bool) -> dict[str, Tensor]:
        read = leaves(self._plan.structure, self._plan.parameters)
        return parameter_gradients(total, read, graph, self._plan.structure, keep_graph=keep_graph)

    def _note_passed(
        self, checks: SelfChecks | None, check: PassCheck, vouched: Iterable[tuple[Owner, tuple[object, ...], bool]]
    ) -> None:
        """Finish the check; if it saw everything, note for each layer the way it was read and if a gradient arrived."""
        assert checks is not None
        check.finish()
        short = coarsest(self.computed_in) > coarsest([])
        for owner, key, arrived in vouched if check.complete else ():
            seen = arrived and not check.drowned.issuperset(owner.parameters.values())
            checks.passed(key, conclusive=seen, short=short)

    def _by_plain_backward(
        self,
        total: Tensor,
        graph: Graph,
        finite: Tensor,
        *,
        keep_graph: bool,
        generator: torch.Generator,
    ) -> dict[str, list[Factors]]:
        """Factors by a plain backward; its weight gradients show uses that are hidden inside of checkpoints."""
        with self._recorder.during_plain_backward():
            gradients = self._gradients(total, graph, keep_graph=keep_graph)
        found = self._assembled(len(finite))
        weights = finite.to("cpu", torch.float64)
        verify_projection(found, gradients, weights, generator, self.computed_in)
        return found

    def _assembly(self, count: int) -> Assembly:
        return Assembly(self._plan.parameters, count, self._groups)

    def _assembled(self, count: int) -> dict[str, list[Factors]]:
        """The factors of all uses that a gradient reached, by parameter name."""
        assembly = self._assembly(count)
        with self._recorder.at_rest(), torch.no_grad():
            for use in self._recorder.uses:
                if use.reached:
                    assembly.add(use)
        assembly.refuse_nothing()
        return assembly.found

    def _key(self, use: Use) -> tuple[object, ...]:
        """The key that the self-check vouches for: a layer of one closure, read in one way, of so many rows, in a mode.

        Packed rows hold another number at every step, so only whether candidates share a row counts there.
        """
        divided: tuple[object, ...]
        if self._ids is not None and use.layout.sample_ids is not None:
            divided = self._count == 1, self._share_rows
        else:
            rows = self._count if self._groups is None else self._groups.rows
            divided = self._count, rows, self._recorder.grid.positions == rows
        return use.owner.name, self._of, use.layout.reading, self._modes, divided
