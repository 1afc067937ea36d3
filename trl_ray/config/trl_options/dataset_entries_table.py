"""What axolotl writes in the entries of `datasets`, answered: how rows are written is told by their columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_ray.config.trl_options.foreign_option import Reading
from trl_ray.config.trl_options.table_rows import Rows, always, never, only, read_by, renamed

_TOLD = (
    "Remove it: how rows are written is told by their columns (messages, conversations, instruction, prompt, text), "
    "and column_mapping={THEIRS: OURS} names others."
)
_COLUMNS = "Set column_mapping={THEIRS: OURS} for the run, where OURS is "
_ROLES = "Remove it: messages have role and content, or from and value (ShareGPT)."

_USUAL_SPEAKERS = frozenset({"user", "human", "assistant", "gpt", "system", "tool"})


def _usual_fields(value: Any, given: Mapping[str, Any]) -> Reading | None:
    usual = {"role": ("role", "from"), "content": ("content", "value")}
    held = value or {}
    if not isinstance(held, Mapping) or any(field not in usual.get(name, ()) for name, field in held.items()):
        return None
    return {}


def _usual_roles(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """{user: [human, user], assistant: [gpt, assistant]}"""
    held = value or {}
    if not isinstance(held, Mapping) or any(not isinstance(each, list) for each in held.values()):
        return None
    return {} if {name for names in (held, *held.values()) for name in names} <= _USUAL_SPEAKERS else None


ENTRIES: Rows = {
    "datasets.type": only("chat_template", "sharegpt", "alpaca", "completion", "", None, says=_TOLD),
    "datasets.ds_type": always("The kind of a file is told by its name."),
    "datasets.conversation": only("chatml", None, says="Set chat_template for the run."),
    "datasets.chat_template": only("tokenizer_default", None, says="Set chat_template for the run."),
    "datasets.chat_template_jinja": never("Set chat_template for the run."),
    "datasets.shards": only(None, says="Set share, a part of the dataset's rows, or split: 'train[:10%]'."),
    "datasets.preprocess_shards": never("Remove it: rows are tokenised by dataset_num_proc processes."),
    "datasets.field": only("text", None, says="Set dataset_text_field to the column."),
    "datasets.field_messages": only("messages", "conversations", None, says=_COLUMNS + "messages."),
    "datasets.field_chosen": never(_COLUMNS + "chosen."),
    "datasets.field_rejected": never(_COLUMNS + "rejected."),
    "datasets.field_instruction": never(_COLUMNS + "instruction."),
    "datasets.field_input": never(_COLUMNS + "input."),
    "datasets.field_output": never(_COLUMNS + "output."),
    "datasets.field_system": never(_COLUMNS + "system."),
    "datasets.field_human": never(_COLUMNS + "prompt."),
    "datasets.field_model": never(_COLUMNS + "completion."),
    "datasets.field_tools": never(_COLUMNS + "tools."),
    "datasets.message_field_role": only("role", "from", None, says=_ROLES),
    "datasets.message_field_content": only("content", "value", None, says=_ROLES),
    "datasets.message_property_mappings": read_by(_usual_fields, says=_ROLES),
    "datasets.roles": read_by(
        _usual_roles, says="Set role_mapping={THEIRS: assistant} for the run; human, gpt, ai and bot are known."
    ),
    "datasets.roles_to_train": never("Set assistant_only_loss=true for the run."),
    "datasets.train_on_eos": never("Remove it: what ends a turn is trained with it."),
    "datasets.train_on_eot": never("Remove it: what ends a turn is trained with it."),
    "datasets.drop_system_message": never("Remove the system's messages from the rows."),
    "datasets.split_thinking": never("Remove it: thoughts in <think> tags are trained as the row has them."),
    "datasets.revision": never("Set path to a folder that holds that revision."),
    "datasets.trust_remote_code": never("Remove it: datasets are files, and no code is run for them."),
    "datasets.train_on_split": renamed("split"),
    "datasets.config": renamed("name"),
}
"""By the option's name without the number of the entry."""
