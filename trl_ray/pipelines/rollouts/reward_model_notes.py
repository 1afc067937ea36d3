"""What reward models are not shown of the prompts, because their own chat templates do not write it.

prompts, reward models ─ RewardReader.findings ─► sentences, once for each kind
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_ray.actors.reward_model_worker import open_reader
from trl_ray.data.prompts.prompt_notes import unrendered_notes
from trl_ray.data.prompts.prompt_source import PromptSource
from trl_ray.pipelines.rollouts.reward_model_actors import PreparedRewardModel

_PROMPTS_LOOKED_AT = 1000


def reward_model_notes(
    models: Sequence[PreparedRewardModel], prompts: PromptSource, *, template_kwargs: Mapping[str, Any]
) -> Iterator[str]:
    """A sentence for each kind of thing that a reward model's template leaves out; of many prompts, some are seen."""
    count = min(len(prompts), _PROMPTS_LOOKED_AT)
    for model in models:
        looked_at = [prompts.prompt(ordinal) for ordinal in range(count)]
        reader = open_reader(model.options, model.facts, template_kwargs=template_kwargs)
        found = {int(prompt.prompt_id.partition(":")[2]): reader.findings(prompt) for prompt in looked_at}
        for note in unrendered_notes(found, what=f"{len(looked_at)} prompts of {prompts.name} that were looked at"):
            yield f"By the chat template of reward model {model.options.label}: {note}"
