"""The capture pass: one forward and one backward pass over a model, which give the factors of its parameters.

Every layer that owns a captured parameter is hooked while the closure runs: its inputs and the gradient edges of its
outputs are kept. A backward pass to these edges (:mod:`~ftw_optim._capture.backward`) gives all output gradients at
once, and forms no weight gradient. Every step also checks which operations of the graph read a captured parameter: an
operation outside of the calls of the layers that own the parameter is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import final

import torch
from torch import Tensor, nn

from ftw_optim._capture.assembly import Assembly
from ftw_optim._capture.backward import Graph, as_they_come, by_edges, parameter_gradients
from ftw_optim._capture.hooks import Phase, Recorder
from ftw_optim._capture.layer_use import Use
from ftw_optim._capture.owners import Owner
from ftw_optim._capture.plan import CapturePlan
from ftw_optim._capture.self_check import PassCheck, SelfChecks, check_weights, refuse_uses_outside, verify_projection
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.finiteness import finite_candidates


@final
class Capture:
    """The context in which the closure runs; afterwards :meth:`differentiate` gives the factors.

    Args:
        model: the whole model; its first input tells the number of candidates.
        plan: what to capture.
        sample_ids: int64, shape of the token grid, the candidate of each position (-1 for none).
    """

    def __init__(self, model: nn.Module, plan: CapturePlan, *, sample_ids: Tensor | None = None) -> None:
        if sample_ids is not None and (sample_ids.ndim != 2 or sample_ids.dtype != torch.int64):
            raise ValueError(
                "Expected sample_ids as int64 of the token grid's shape (b, t), got "
                f"{sample_ids.dtype} of shape {tuple(sample_ids.shape)}."
            )
        self._model, self._plan = model, plan
        self._recorder = Recorder(model, plan, sample_ids)
        self._modes = hash(tuple(module.training for module in model.modules()))
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
        expanded = sorted(self._recorder.expanded)[:5]
        if in_closure and expanded and isinstance(error, RuntimeError | IndexError | ValueError):
            error.add_note(
                f"The output of {', '.join(expanded)} has one row for all candidates and was expanded to one for each. "
                f"If the model cannot take that, do not score these: scored=lambda name, parameter: not name.startswith"
                f'(({", ".join(map(repr, expanded))},)), with combine="graph".'
            )

    def pause(self) -> None:
        """Stop changing the outputs of layers, while another capture is running."""
        self._recorder.phase = Phase.REST

    def resume(self) -> None:
        """Change the outputs of layers again, as in the captured calls: a checkpoint may run the layers again."""
        self._recorder.phase = Phase.RECOMPUTE

    @property
    def count(self) -> int | None:
        """The number of rows the model was called on; None where only ``sample_ids`` or the losses tell it."""
        grid = self._recorder.grid
        return None if grid.sample_ids is not None else grid.n

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
        graph, finite, total = self._looked_at(losses, scale)
        if graph.reentrant:
            found = self._by_plain_backward(
                total, graph, finite, keep_graph=keep_graph or checks is not None, generator=generator
            )
        else:
            self.resume()
            by_edges(total, self._recorder.uses, keep_graph=keep_graph or self._is_due(checks, self._recorder.uses))
            found = self._assembled(len(losses))
        reached = [use for use in self._recorder.uses if use.reached]
        # Of what is not finite nothing can be compared: then the check waits for the next step.
        if self._is_due(checks, reached) and bool(finite_candidates(found, losses).all()):
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
        graph, _, total = self._looked_at(losses, scale)
        if graph.reentrant:
            whole = self.differentiate(losses, scale=scale, keep_graph=False, checks=checks, generator=generator)
            for name in list(whole):
                take(name, whole.pop(name))
            return
        self.resume()
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
            with self._recorder.at_rest():
                assembly.add(use)
            if check is not None:
                vouched.append((use.owner, self._key(use), use.has_gradient()))
            use.release()
            for name in use.owner.parameters.values():
                waiting[name] -= 1
                if waiting[name] == 0:
                    hand_over(name)

        as_they_come(total, graph, self._recorder.uses, arrived)
        for use in self._recorder.uses:
            if use.reached and not use.released:
                arrived(use, last=True)
        for name in list(assembly.found):  # of which some use was not reached
            hand_over(name)
        assembly.refuse_nothing()
        if check is not None:
            self._note_passed(checks, check, vouched)

    def _looked_at(self, losses: Tensor, scale: float) -> tuple[Graph, Tensor, Tensor]:
        """The checked graph; which losses are finite, bool (n,); and the scaled sum of the finite ones."""
        self._check_sample_ids(len(losses))
        graph = Graph(losses)
        self._passed_through |= graph.dtypes
        if graph.reentrant:  # which hides what was computed inside
            self._passed_through |= {p.dtype for p in self._model.parameters() if p.is_floating_point()}
        outside = [
            name for name, p in self._plan.parameters.items() if graph.used_outside(p, self._recorder.uses_of[name])
        ]
        refuse_uses_outside(outside)
        finite = losses.isfinite()
        return graph, finite, torch.where(finite, losses, torch.zeros_like(losses)).sum() * scale

    def _is_due(self, checks: SelfChecks | None, uses: Iterable[Use]) -> bool:
        """Whether a layer was read in a way that the self-check has not vouched for."""
        return checks is not None and checks.due(map(self._key, uses))

    def _check(
        self, losses: Tensor, graph: Graph, scale: float, generator: torch.Generator, *, keep_graph: bool
    ) -> PassCheck | None:
        """The check that compares captured factors with autograd's gradients; None where these are not finite."""
        weights = check_weights(len(losses), generator, self.computed_in)
        total = (weights.to(losses) * losses * scale).sum()
        gradients = parameter_gradients(total, self._plan.parameters, graph, self._model, keep_graph=keep_graph)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):  # the scaled sum may overflow
            return None
        layers = {name: [use.owner.name for use in uses] for name, uses in self._recorder.uses_of.items()}
        computed_in = self._recorder.computed_in | (self._passed_through & {torch.float16})
        return PassCheck(weights, gradients, layers, computed_in)

    def _note_passed(
        self, checks: SelfChecks | None, check: PassCheck, vouched: Iterable[tuple[Owner, tuple[object, ...], bool]]
    ) -> None:
        """Finish the check; if it saw everything, note for each layer the way it was read and if a gradient arrived."""
        assert checks is not None
        check.finish()
        for owner, key, arrived in vouched if check.complete else ():
            checks.passed(key, conclusive=arrived and not check.drowned.issuperset(owner.parameters.values()))

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
            gradients = parameter_gradients(total, self._plan.parameters, graph, self._model, keep_graph=keep_graph)
        found = self._assembled(len(finite))
        weights = finite.to("cpu", torch.float64)
        verify_projection(found, gradients, weights, generator, self.computed_in)
        return found

    def _assembly(self, count: int) -> Assembly:
        return Assembly(self._plan.parameters, count, self._recorder.grid.sample_ids)

    def _assembled(self, count: int) -> dict[str, list[Factors]]:
        """The factors of all uses that a gradient reached, by parameter name."""
        assembly = self._assembly(count)
        with self._recorder.at_rest():
            for use in self._recorder.uses:
                if use.reached:
                    assembly.add(use)
        assembly.refuse_nothing()
        return assembly.found

    def _check_sample_ids(self, count: int) -> None:
        ids = self._recorder.grid.sample_ids
        if ids is not None and ids.numel():
            least, most = int(ids.min()), int(ids.max())
            if least < -1 or most >= count:
                raise ValueError(
                    f"Expected sample_ids from -1 (none) to {count - 1}, one less than the number of losses, got "
                    f"{least} to {most}."
                )

    def _key(self, use: Use) -> tuple[object, ...]:
        """The key that the self-check vouches for: one layer, read in one way, with the model in one mode."""
        return use.owner.name, use.layout.reading, self._modes, self._recorder.grid.n == 1
