"""A causal language model in two: a frozen trunk, and the last blocks with LoRA, which are all that is trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import token_losses

from .records import IGNORED, Example, collate

Rows = dict[str, Tensor]
"""A padded batch for :class:`Top`: ``inputs_embeds`` (hidden states), ``attention_mask`` and ``labels``."""


class Top(nn.Module):
    """The last blocks of a causal language model, its final norm and its output layer, with LoRA on the blocks.

    The weights are shared with the model that it was taken from, LoRA included: that model, run on tokens, is trained
    with it.

    Attributes:
        trained: the blocks' part, a causal language model that starts from hidden states.
        trunk: what comes before, as a model that ends in hidden states; not a submodule.
        blocks: how many are trained.
    """

    def __init__(self, model: nn.Module, *, blocks: int, rank: int) -> None:
        super().__init__()
        base = getattr(model, "model", None)
        if not isinstance(getattr(base, "layers", None), nn.ModuleList):
            raise ValueError(
                f"Expected a model of the Llama kind, with blocks in model.layers, got {type(model).__name__}."
            )
        count = len(base.layers)
        if not 0 < blocks <= count:
            raise ValueError(f"Expected 1 to {count} trained blocks, as the model has, got {blocks}.")
        self.blocks = blocks
        cut = count - blocks
        # The trunk's last hidden states go into the first trained block: no norm in between.
        below = _with_parts(base, slice(0, cut), layers=base.layers[:cut], norm=nn.Identity())
        above = _with_parts(base, slice(cut, count), layers=base.layers[cut:])
        self.__dict__["trunk"] = below.requires_grad_(False)
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            # PEFT 0.21 asks Transformers for an attribute under its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            self.trained = get_peft_model(_with_parts(model, slice(cut, count), model=above), adapters)
        self.eval()  # no dropout

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.parameters()).device

    def reset(self, seed: int) -> None:
        """Bring LoRA to its start, which changes nothing: one factor random, the other zero."""
        torch.manual_seed(seed)
        for module in self.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", True)

    def adapters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(self, rows: Rows) -> Tensor:
        """Each row's mean token loss, shape ``(n,)``; the output layer runs on label positions."""
        return token_losses(self.trained, rows)

    def evaluate(self, rows: Rows) -> Tensor:
        """The losses of :meth:`forward`, without a graph; the output layer runs on label positions here too."""
        return self.evaluate_with_hits(rows)[0]

    @torch.no_grad()
    def evaluate_with_hits(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The losses, and whether each label of a row is the model's first choice after the labels before it.

        So the second, bool ``(n,)``, says of which rows greedy decoding gives the response to its last token.
        """
        language_model = self.trained.get_base_model()
        hidden = language_model.model(
            inputs_embeds=rows["inputs_embeds"], attention_mask=rows["attention_mask"], use_cache=False
        ).last_hidden_state[:, :-1]
        targets = rows["labels"][:, 1:]
        counted = targets != IGNORED
        logits = language_model.get_output_embeddings()(hidden[counted])
        losses = torch.zeros_like(targets, dtype=logits.dtype)
        losses[counted] = functional.cross_entropy(logits, targets[counted], reduction="none")
        hits = torch.ones_like(counted)
        hits[counted] = logits.argmax(dim=-1) == targets[counted]
        return losses.sum(dim=1) / counted.sum(dim=1).clamp(min=1), hits.all(dim=1)


class Entrance:
    """Hidden states at the entrance of the trained blocks, formed once for each record and kept.

    Args:
        top: the model.
        keep_on: where the states are kept.
    """

    def __init__(self, top: Top, *, keep_on: str = "cpu") -> None:
        self.top = top
        self.keep_on = keep_on
        self._states: dict[tuple[int, ...], Tensor] = {}

    def fill(self, examples: Sequence[Example]) -> None:
        """Run the trunk on those of the examples whose states are not there yet."""
        missing = {tuple(example.tokens): example for example in examples if tuple(example.tokens) not in self._states}
        if not missing:
            return
        states = self.run(list(missing.values()))
        for row, tokens in enumerate(missing):
            self._states[tokens] = states[row, : len(tokens)].to(self.keep_on, copy=True)

    def forget(self) -> None:
        """Let go of all states."""
        self._states.clear()

    @torch.no_grad()
    def run(self, examples: Sequence[Example]) -> Tensor:
        """The trunk's hidden states of a padded batch, ``(n, t, d)``."""
        batch = collate(examples, device=self.top.device)
        trunk = self.top.trunk
        return trunk(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state

    def rows(self, examples: Sequence[Example]) -> Rows:
        """The examples as a padded batch of hidden states, filled in before."""
        batch = collate(examples)
        found = [self._states[tuple(example.tokens)] for example in examples]
        hidden = nn.utils.rnn.pad_sequence(found, batch_first=True)
        rows = {"inputs_embeds": hidden, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        return {name: value.to(self.top.device) for name, value in rows.items()}


def check_split(top: Top, model: nn.Module, examples: Sequence[Example]) -> None:
    """Refuse a model whose blocks do not give, on kept hidden states, what they give within the model.

    Raises:
        ValueError: the losses differ, as for models that scale or change what enters their first block.
    """
    entrance = Entrance(top)
    entrance.fill(examples)
    with torch.no_grad():
        expected = token_losses(model, collate(examples, device=top.device))
    found = top.evaluate(entrance.rows(examples))
    if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"The last blocks of {type(model).__name__}, started from hidden states, give other losses than the model "
            f"({found.tolist()} instead of {expected.tolist()}). Pass a model of the Llama kind, such as Llama or Qwen."
        )


def _with_parts(module: nn.Module, kept: slice, **parts: nn.Module) -> nn.Module:
    """A model that shares everything with ``module`` but some parts; ``kept`` are the blocks that its config counts."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **parts}
    changed._parameters = dict(module._parameters)
    changed.config = copy.deepcopy(module.config)
    indices = range(module.config.num_hidden_layers)[kept]
    changed.config.num_hidden_layers = len(indices)
    changed.config.use_cache = False
    if getattr(module.config, "layer_types", None):
        changed.config.layer_types = [module.config.layer_types[index] for index in indices]
    return changed
