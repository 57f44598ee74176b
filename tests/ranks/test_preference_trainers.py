"""Trainers of pairs on two processes: the step is that of a single process with the batches of both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ftw_optim import GreedyFilter
from tests.support.preference_runs import KINDS, reference
from tests.support.processes import Processes
from tests.support.releases import knows_pairs
from tests.support.trainer_runs import ALL, Recording, numbered

pytestmark = [
    knows_pairs,
    pytest.mark.slow,  # two processes import all frameworks
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning"),
]


def trained(directory: str, name: str, own: bool, settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A job: one run of a trainer; what it saw, and what it logged."""
    kind, recording = KINDS[name], Recording()
    several = dist.is_initialized()
    options = copy.deepcopy(options)
    if name == "dpo":
        options["ref_model"] = reference().double()
    if not own:
        second = several and dist.get_rank() == 1
        options |= {"target_dataset": kind.pairs(6, seed=1), "selection_log": None if second else recording}
        options["sample_id_column"] = "number"
    trainer, _ = kind.trained(
        kind.own if own else kind.selective,
        f"{directory}/{dist.get_rank() if several else 'alone'}",  # type: ignore[arg-type]
        {"activation_checkpointing": False, **settings},
        net=kind.build().double(),
        rows=numbered(kind.pairs(18)),
        **options,
    )
    return {
        "parameters": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "steps": recording.steps,
    }


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("selective", [{}, {"train_on_target": True}], ids=["guided", "with target pairs"])
def test_a_step_over_pairs_of_two_processes_is_that_of_one_with_both_batches(
    name: str, selective: dict[str, Any], two_processes: Processes, tmp_path: Any
) -> None:
    settings = {"gradient_accumulation_steps": 1, "num_train_epochs": 1}
    options = {"target_batch_size": 4, "selective": {"filter": GreedyFilter(keep=0.5), **selective}}
    ranks = two_processes.run(
        trained, str(tmp_path), name, False, {**settings, "per_device_train_batch_size": 3}, options
    )
    whole = trained(str(tmp_path), name, False, {**settings, "per_device_train_batch_size": 6}, options)
    for key, value in whole["parameters"].items():
        assert torch.equal(ranks[0]["parameters"][key], ranks[1]["parameters"][key])
        # The reference's log-probabilities and the models' norms are computed in float32.
        torch.testing.assert_close(ranks[0]["parameters"][key], value, rtol=1e-4, atol=2e-6)
    assert ranks[0]["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert len(whole["steps"]) == len(ranks[0]["steps"]) == 3
    for one, other in zip(ranks[0]["steps"], whole["steps"], strict=True):
        assert one["ids"] == other["ids"]
        assert one["selection"].kept.tolist() == other["selection"].kept.tolist()


@pytest.mark.parametrize("name", KINDS)
def test_with_all_pairs_alike_it_is_the_trainers_own_run_on_two_processes(
    name: str, two_processes: Processes, tmp_path: Any
) -> None:
    """With accumulation, clipping, decay, and a last window that is not complete."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    found = two_processes.run(trained, str(tmp_path), name, False, settings, {"selective": ALL})[0]
    own = two_processes.run(trained, str(tmp_path), name, True, settings, {})[0]
    for key, value in own["parameters"].items():
        torch.testing.assert_close(found["parameters"][key], value, rtol=1e-4, atol=1e-6)
    assert found["losses"] == pytest.approx(own["losses"], rel=1e-5)
