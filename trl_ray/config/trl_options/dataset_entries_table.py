"""What axolotl writes in the entries of `datasets`, answered: how rows are written is told by their columns."""

from __future__ import annotations

from trl_ray.config.trl_options.table_rows import Rows, never

_TOLD = "Remove it: how rows are written is told by their columns (messages, conversations, instruction, prompt, text)."
_COLUMNS = "Set column_mapping={THEIRS: OURS} for the run, where OURS is "
_ROLES = "Remove it: messages have role and content, or from and value (ShareGPT)."

ENTRIES: Rows = {
    "datasets.type": never(_TOLD),
    "datasets.ds_type": never("Set path to json, csv, parquet or text, with data_files."),
    "datasets.conversation": never("Set chat_template for the run."),
    "datasets.chat_template": never("Set chat_template for the run."),
    "datasets.chat_template_jinja": never("Set chat_template for the run."),
    "datasets.shards": never("Name a part of the rows: share: 0.1, or split: 'train[:10%]'."),
    "datasets.preprocess_shards": never("Remove it: rows are tokenised by dataset_num_proc processes."),
    "datasets.field": never("Set dataset_text_field."),
    "datasets.field_messages": never(_COLUMNS + "messages."),
    "datasets.field_chosen": never(_COLUMNS + "chosen."),
    "datasets.field_rejected": never(_COLUMNS + "rejected."),
    "datasets.field_instruction": never(_COLUMNS + "instruction."),
    "datasets.field_input": never(_COLUMNS + "input."),
    "datasets.field_output": never(_COLUMNS + "output."),
    "datasets.field_system": never(_COLUMNS + "system."),
    "datasets.field_human": never(_COLUMNS + "prompt."),
    "datasets.field_model": never(_COLUMNS + "completion."),
    "datasets.field_tools": never(_COLUMNS + "tools."),
    "datasets.message_field_role": never(_ROLES),
    "datasets.message_field_content": never(_ROLES),
    "datasets.message_property_mappings": never(_ROLES),
    "datasets.roles": never("Set role_mapping={THEIRS: assistant} for the run; human, gpt, ai and bot are known."),
    "datasets.roles_to_train": never("Set assistant_only_loss=true for the run."),
    "datasets.train_on_eos": never("Remove it: what ends a turn is trained with it."),
    "datasets.train_on_eot": never("Remove it: what ends a turn is trained with it."),
    "datasets.drop_system_message": never("Remove the system's messages from the rows."),
    "datasets.split_thinking": never("Remove it: thoughts in <think> tags are trained as the row has them."),
    "datasets.revision": never("Set path to a folder that holds that revision."),
    "datasets.trust_remote_code": never("Remove it: datasets are files, and no code is run for them."),
}
"""By the option's name without the number of the entry."""
