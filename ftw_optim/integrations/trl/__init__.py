"""Selection in the trainers of TRL: supervised fine-tuning, preferences (DPO) and rewards, one module each.

::

    -trainer = SFTTrainer(model, args, train_dataset=mixed)
    +trainer = SelectiveSFTTrainer(model, args, train_dataset=mixed, target_dataset=task,
    +                              selective={"filter": GreedyFilter(keep=0.25)})
     trainer.train()

A trainer says what its candidates' losses are, and inherits the rest. What it reads of TRL that has no public name is
in ``internals.py``.
"""

from ftw_optim.integrations.trl.dpo import SelectiveDPOTrainer
from ftw_optim.integrations.trl.preferences import PreferenceTrainerMixin
from ftw_optim.integrations.trl.reward import SelectiveRewardTrainer
from ftw_optim.integrations.trl.sft import SelectiveSFTTrainer

__all__ = ["PreferenceTrainerMixin", "SelectiveDPOTrainer", "SelectiveRewardTrainer", "SelectiveSFTTrainer"]
