"""What axolotl may write in the entries of `datasets` besides, answered."""

from __future__ import annotations

from trl_ray.config.trl_options.table_rows import Rows, never

_COLUMNS = "Set column_mapping={THEIRS: OURS} for the run, where OURS is "

ENTRIES: Rows = {
    "datasets.chat_template_jinja": never("Set chat_template for the run."),
    "datasets.preprocess_shards": never("Remove it: rows are tokenised by dataset_num_proc processes."),
    "datasets.field_chosen": never(_COLUMNS + "chosen."),
    "datasets.field_rejected": never(_COLUMNS + "rejected."),
    "datasets.field_instruction": never(_COLUMNS + "instruction."),
    "datasets.field_input": never(_COLUMNS + "input."),
    "datasets.field_output": never(_COLUMNS + "output."),
    "datasets.field_system": never(_COLUMNS + "system."),
    "datasets.field_human": never(_COLUMNS + "prompt."),
    "datasets.field_model": never(_COLUMNS + "completion."),
    "datasets.field_tools": never(_COLUMNS + "tools."),
    "datasets.train_on_eos": never("Remove it: what ends a turn is trained with it."),
    "datasets.train_on_eot": never("Remove it: what ends a turn is trained with it."),
    "datasets.drop_system_message": never("Remove the system's messages from the rows."),
    "datasets.split_thinking": never("Remove it: thoughts in <think> tags are trained as the row has them."),
    "datasets.revision": never("Set path to a folder that holds that revision."),
    "datasets.trust_remote_code": never("Remove it: datasets are files, and no code is run for them."),
}
"""By the option's name without the number of the entry."""
