"""The options of each owner, under TRL's argument names where TRL has the option."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from trl_ray.config.base import FROM_STRING, Fraction, Natural, Positive, Seconds, Section, none_is, none_is_empty, rule
from trl_ray.config.callback_options import CallbackField
from trl_ray.config.deepspeed_file import read_deepspeed
from trl_ray.config.keywords.generation_fields import read_generation_kwargs
from trl_ray.config.keywords.keyword_options import read_model_init_kwargs
from trl_ray.config.object_paths import lasting_file
from trl_ray.config.optimizer_options import Optim, read_optim, read_optim_args
from trl_ray.config.runs.runtime_options import RuntimeConfig as RuntimeConfig
from trl_ray.config.runs.runtime_options import RuntimeKind as RuntimeKind
from trl_ray.config.step_counts import PositiveStepCount, StepCount
from trl_ray.config.trl_options.reading import read_foreign


class Dtype(enum.StrEnum):
    """Number format of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    AUTO = "auto"
    """The checkpoint's own; a run resolves it before anything else asks."""


def _policys(dtype: Dtype | None) -> Dtype | None:
    return None if dtype is Dtype.AUTO else dtype


def _stated(dtype: Dtype) -> Dtype:
    if dtype is Dtype.AUTO:
        raise ValueError("must be float32 or bfloat16, got 'auto': only the policy's format is looked up.")
    return dtype


StatedDtype = Annotated[Dtype, FROM_STRING, AfterValidator(_stated)]
"""A number format that is not looked up."""


class QuantType(enum.StrEnum):
    """Number format of 4-bit weights."""

    FP4 = "fp4"
    NF4 = "nf4"


class Schedule(enum.StrEnum):
    """How the learning rate moves: transformers' schedules, but those that wait for a metric."""

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    COSINE_WARMUP_WITH_MIN_LR = "cosine_warmup_with_min_lr"
    POLYNOMIAL = "polynomial"
    INVERSE_SQRT = "inverse_sqrt"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"


class NonFinite(enum.StrEnum):
    """What to do with a step whose loss or gradients are NaN or infinite."""

    SKIP = "skip"
    STOP = "stop"


class SharePrompt(enum.StrEnum):
    """Whether the completions of a group share one computation of their prompt in the learner."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class EngineChoice(enum.StrEnum):
    """Which inference engine rollout workers run."""

    AUTO = "auto"
    """vLLM where it is installed, else transformers."""
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


class OnDisagreement(enum.StrEnum):
    """What happens when sampler and learner are found to be different policies."""

    WARN = "warn"
    STOP = "stop"


class Isolation(enum.StrEnum):
    """Where the user's reward functions run; those of this package and TRL are always behind walls."""

    PROCESS = "process"
    """In one child process, which can be killed when it hangs; they may keep state, read files and talk to servers.

    They can neither mount nor gain rights by setuid programs: bubblewrap, nsjail and apptainer do not work in them.
    """
    SANDBOX = "sandbox"
    """Each group in a new process without network, files and state."""
    INLINE = "inline"
    """In the reward worker itself: breakpoints work, a hang cannot be cut short."""


class ModelConfig(Section):
    """The policy."""

    model_name_or_path: str | None = None
    """Hub name or local folder."""
    model_revision: str = "main"
    ref_model_name_or_path: str | None = None
    """The reference that the policy is compared with; None: the policy as it was before training."""
    trust_remote_code: bool = False
    dtype: Annotated[Dtype, FROM_STRING] = Dtype.FLOAT32
    """Of the weights the optimizer updates; ``auto`` is the checkpoint's (float32 for float16)."""
    bf16: bool | None = None
    """Compute forward and backward under bfloat16 autocast; None: where the learner has GPUs (`learner_num_gpus`)."""
    attn_implementation: str | None = None
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    chat_template: Annotated[str | None, AfterValidator(lambda given: given and lasting_file(given))] = None
    """A chat template in place of the tokenizer's: its text, a jinja file, or a tokenizer (folder or name) that has
    one, whose added tokens come along."""
    eos_token: str | None = None
    """Token that ends turns and sequences, in place of the tokenizer's; generation and checkpoints know it, too."""
    pad_token: str | None = None
    """Token that fills rows up for who takes the checkpoint; None, or one that the tokenizer lacks, is its own one, or
    its end token. Nothing is padded here."""
    use_liger_kernel: bool = False
    """Liger's kernels in the model's layers (GPUs only)."""
    model_init_kwargs: Annotated[dict[str, Any], none_is_empty()] = Field(default_factory=dict)
    """Changes of the model's own configuration, for learner, reference and engines alike; dtype, attn_implementation,
    revision and trust_remote_code are read into the options here."""

    use_peft: bool = False
    """Train an adapter (LoRA) beside frozen weights; a folder with adapter_config.json goes on with its adapter."""
    lora_r: Positive = 16
    lora_alpha: Positive = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lora_target_modules: list[str] | str | None = None
    """Names of the linear layers that get an adapter, ``all-linear``, or None for what PEFT knows of the model."""
    lora_modules_to_save: list[str] | None = None
    """Layers trained in full beside the adapter, by the end of their names: ``norm`` means every norm."""
    lora_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further fields of PEFT's LoraConfig: alpha_pattern, exclude_modules, init_lora_weights, ..."""
    use_rslora: bool = False
    use_dora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    """Quantise the frozen weights (QLoRA); needs bitsandbytes."""
    bnb_4bit_quant_type: Annotated[QuantType, FROM_STRING] = QuantType.NF4
    use_bnb_nested_quant: bool = False

    @model_validator(mode="before")
    @classmethod
    def _read_model_init_kwargs(cls, values: Any) -> Any:
        return read_model_init_kwargs(values)

    @rule
    def _check_adapter(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit must not both be true. Choose one.")
        asked = {
            "load_in_4bit": self.load_in_4bit,
            "load_in_8bit": self.load_in_8bit,
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
            "lora_modules_to_save": bool(self.lora_modules_to_save),
            "lora_kwargs": bool(self.lora_kwargs),
        }
        names = [name for name, wanted in asked.items() if wanted]
        if names and not self.use_peft:
            raise ValueError(f"use_peft must be true with {' and '.join(names)}, got false. Set use_peft=true.")


class MixtureStopping(enum.StrEnum):
    """When a mixture that is drawn by weight ends; the names are those of the library `datasets`."""

    FIRST_EXHAUSTED = "first_exhausted"
    """With the first dataset that has no row left: nothing is repeated."""
    ALL_EXHAUSTED = "all_exhausted"
    """When every row was there at least once: shorter datasets begin again."""
    ALL_EXHAUSTED_WITHOUT_REPLACEMENT = "all_exhausted_without_replacement"
    """When every row was there exactly once: the weights say how early."""


ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak in a conversation."""


class OnBadRow(enum.StrEnum):
    """What to do with rows that cannot be used."""

    STOP = "stop"
    """Refuse the dataset before anything starts, naming all bad rows by what is wrong with them."""
    DROP = "drop"
    """Leave them out, and count them in the ledger and the report."""


class DatasetConfig(Section):
    """One dataset of a mixture, under the names of TRL's `datasets` option."""

    path: str
    """As `dataset_name`, or a builder of the library `datasets` (``json``, ``csv``, ...) with `data_files`."""
    name: str | None = None
    """As `dataset_config`."""
    data_dir: str | None = None
    """The folder within `path` that is read."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """The files within `path` that are read; by split, where it is a mapping."""
    split: str | None = None
    """None takes `dataset_train_split`, or `dataset_test_split` for evaluation."""
    columns: list[str] | None = None
    """Columns to keep; None keeps all."""
    fraction: Annotated[float, Field(gt=0)] | None = None
    """Share of the mixture, relative to the others': of each dataset the first rows are kept, as many as can be without
    repeating one. All datasets have one, or none."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Probability with which the next row is drawn from this dataset, relative to the others' (1 where they have none);
    None everywhere joins the datasets one after the other, whole."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of this dataset's own rows that is trained on: the first ones. Held-out rows are all taken."""
    share_seed: Natural | None = None
    """Draw the rows of `share` at random, by this seed."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """As `dataset_kwargs`."""

    @model_validator(mode="before")
    @classmethod
    def _read_foreign(cls, values: Any) -> Any:
        return read_foreign(values, cls.model_fields, of="datasets.") if isinstance(values, Mapping) else values

    @rule
    def _check_share(self) -> None:
        if self.share is not None and (self.fraction is not None or self.weight is not None):
            raise ValueError(
                f"share must be left out with fraction or weight, got {self.share}: it is a part of the dataset's own "
                "rows, they are parts of the mixture. Remove one."
            )
        if self.share_seed is not None and self.share is None:
            raise ValueError(f"share must be set with share_seed={self.share_seed}, got None. Set it, or remove both.")


class DataConfig(Section):
    """Where rows come from."""

    dataset_name: str | None = None
    """Hub name, a local .json/.jsonl/.csv/.parquet/.arrow file, a folder, or ``reasoning_gym/<task>``."""
    dataset_config: str | None = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """The files within `dataset_name` that are read, or those that a builder (``dataset_name: json``) reads."""
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    """Held-out split for evaluation; None takes ``test``. For generated tasks, another seed stands in for it."""
    dataset_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of a generated task, e.g. its size and the range of its numbers."""
    datasets: list[DatasetConfig] = Field(default_factory=list)
    """Several datasets instead of `dataset_name`: joined whole unless they have a `fraction` or a `weight`."""
    mixture_stopping: Annotated[MixtureStopping, FROM_STRING] | None = None
    """When drawing by `weight` ends; None: with the first dataset that has no row left."""
    test_split_size: Annotated[float, Field(gt=0)] | None = None
    """Hold rows of the training split out for evaluation: a share below 1, or a whole number of rows."""
    on_bad_row: Annotated[OnBadRow, FROM_STRING] = OnBadRow.STOP
    """What becomes of rows that cannot be used."""
    column_mapping: Annotated[dict[str, str | None], none_is_empty()] = Field(default_factory=dict)
    """Names of a dataset's columns and what they stand for here (``question: prompt``); None leaves a column out. A
    column that stands for ``system`` becomes the first message, and makes conversations of texts."""
    role_mapping: Annotated[dict[str, str], none_is_empty()] = Field(default_factory=dict)
    """Names of speakers in messages and the roles that they stand for (``bot: assistant``), beside the usual names."""
    shuffle_dataset: bool = True
    chat_template_kwargs: Annotated[dict[str, Any], none_is_empty()] = Field(default_factory=dict)

    @rule
    def _check_roles(self) -> None:
        unknown = {name: role for name, role in self.role_mapping.items() if role not in ROLES and role != name}
        if unknown:
            raise ValueError(
                f"role_mapping must map speakers to {', '.join(ROLES)}, or to themselves where the chat template knows "
                f"them, got {unknown}. Change the roles."
            )

    @rule
    def _check_data_files(self) -> None:
        if self.data_files is not None and self.dataset_name is None:
            raise ValueError(
                f"dataset_name must be set with data_files={self.data_files!r}, got None: say what reads them, such as "
                "dataset_name=json, csv or parquet. In datasets, set it for each entry."
            )

    @rule
    def _check_shares(self) -> None:
        given = [source.fraction is not None for source in self.datasets]
        if any(given) and not all(given):
            raise ValueError(
                f"fraction must be set for all datasets or for none, got it for {sum(given)} of {len(given)}. Set it "
                "for the others, or remove it."
            )
        weighed = any(source.weight is not None for source in self.datasets) or self.mixture_stopping is not None
        if any(given) and weighed:
            raise ValueError(
                "fraction and weight (or mixture_stopping) say in two ways how datasets are mixed, got both. Remove "
                "one: fraction keeps the first rows of each, weight draws rows at random."
            )
        if weighed and any(source.share is not None for source in self.datasets):
            raise ValueError(
                "share must be left out in datasets that are mixed by weight or mixture_stopping, got both. Remove one."
            )

    @rule
    def _check_test_split_size(self) -> None:
        size = self.test_split_size
        if size is not None and size >= 1 and size != int(size):
            raise ValueError(f"test_split_size must be below 1 or a whole number of rows, got {size}. Change it.")
        if size is not None and self.dataset_test_split is not None:
            raise ValueError(
                f"dataset_test_split must be left out with test_split_size={size}, got {self.dataset_test_split!r}: "
                "both say which rows are held out. Remove one of the two."
            )


class PromptConfig(DataConfig):
    """Where prompts come from."""

    dataset_prompt_column: str = "prompt"
    system_prompt: str | None = None
    """Put before every conversational prompt that has no system message."""
    eval_num_prompts: Positive = 32
    """How many held-out prompts one evaluation uses."""


class TrainingConfig(Section):
    """The optimizer, its schedule, and how long to train."""

    seed: Natural = 42
    data_seed: Natural | None = None
    """Orders the rows; None takes `seed`."""
    full_determinism: bool = False
    """Compute with deterministic kernels alone, which are slower."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Optimizer steps; -1 trains for `num_train_epochs`."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    lr_scheduler_type: Annotated[Schedule, FROM_STRING] = Schedule.LINEAR
    lr_scheduler_kwargs: Annotated[dict[str, Any], none_is_empty()] = Field(default_factory=dict)
    """Options of that schedule alone, in transformers' names: `min_lr`, `num_cycles`, `power`, `num_decay_steps`."""
    warmup_steps: StepCount = 0
    """Optimizer steps over which the rate rises, or a fraction of the run's below 1."""
    tf32: bool | None = None
    """Take float32 products on GPUs in TF32, which is faster and has 10 bits; None leaves it to torch."""
    torch_empty_cache_steps: Positive | None = None
    """Optimizer steps after which GPU memory that is not in use is given back; None never."""
    optim: Annotated[Optim, FROM_STRING, BeforeValidator(read_optim)] = Optim.ADAMW_TORCH_FUSED
    optim_args: Annotated[dict[str, Any], BeforeValidator(read_optim_args)] = Field(default_factory=dict)
    """Further options of the optimizer by its library's names: ``momentum=0.9,nesterov=true``, or a mapping."""
    float32_master_weights: bool = True
    """Train weights in bfloat16 (`dtype`) through copies in float32, as small steps would be rounded away; DeepSpeed
    has copies of its own."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Biases and norms are not decayed."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this L2 norm; 0 leaves them alone."""
    per_device_train_batch_size: Positive = 8
    """Completions in one micro-batch of one rank."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches in one optimizer step of one rank."""
    max_tokens_per_micro_batch: Positive | None = None
    """Cut micro-batches by tokens (prompts included) instead of completions: even work, bounded memory."""
    deepspeed: Annotated[dict[str, Any] | None, BeforeValidator(read_deepspeed)] = None
    """DeepSpeed's configuration or the path of its JSON file, where ``"auto"`` takes the value from here; None trains
    with plain torch."""
    disable_dropout: bool = True
    """Set every dropout probability of the model and its adapter to 0."""
    share_prompt: Annotated[SharePrompt, FROM_STRING] = SharePrompt.AUTO
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight of the load-balancing loss of a mixture of experts; None takes the model's own, 0 is none."""
    chunk_lm_head_size: Positive | None = None
    """Vocabulary entries in one tile of the language-model head; None lets the device decide. Excludes Liger."""
    on_non_finite: Annotated[NonFinite, FROM_STRING] = NonFinite.SKIP
    max_skipped_steps: Natural = 3
    """Consecutive skipped steps after which the run stops."""

    @property
    def seed_of_rows(self) -> int:
        """`data_seed`, or `seed` where it is None."""
        return self.seed if self.data_seed is None else self.data_seed


class GenerationConfig(Section):
    """How completions are sampled."""

    num_generations: Positive = 8
    """Completions per prompt: the group size G."""
    steps_per_generation: Positive | None = None
    """Micro-batches of one rank in one generation batch: a multiple of `gradient_accumulation_steps`, and None that."""
    generation_batch_size: Positive | None = None
    """The same, counted in completions over all ranks."""
    max_completion_length: Positive = 512
    """Tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Natural = 0
    min_p: Annotated[Fraction, none_is(0.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    stop: list[str] = Field(default_factory=list)
    min_tokens: Natural = 0
    """Tokens of a completion before which it may not end."""
    generation_kwargs: Annotated[dict[str, Any], none_is_empty()] = Field(default_factory=dict)
    """Further fields of vLLM's SamplingParams or transformers' GenerationConfig, as the engine has them; what options
    here stand for is read into these, and wins over them."""
    vllm_structured_outputs_regex: str | None = None
    """Completions match this regular expression (vLLM only); wins over generation_kwargs.structured_outputs."""
    num_generations_eval: Positive | None = None
    """Completions per held-out prompt; None takes `num_generations`."""
    eval_temperature: Annotated[float, Field(ge=0)] | None = None
    """Of completions for held-out prompts; 0 takes the most probable token, None is `temperature`."""

    @property
    def completions_per_held_out_prompt(self) -> int:
        """`num_generations_eval`, or `num_generations` where it is None."""
        return self.num_generations_eval or self.num_generations

    @model_validator(mode="before")
    @classmethod
    def _read_generation_kwargs(cls, values: Any) -> Any:
        return read_generation_kwargs(values)

    @property
    def engine_fields(self) -> dict[str, Any]:
        """What engines are given beside the options."""
        regex = self.vllm_structured_outputs_regex
        return self.generation_kwargs | ({} if regex is None else {"structured_outputs": {"regex": regex}})

    @rule
    def _check_min_tokens(self) -> None:
        if self.min_tokens > self.max_completion_length:
            raise ValueError(
                f"min_tokens must be at most max_completion_length, got {self.min_tokens} and "
                f"{self.max_completion_length}. Lower it."
            )


class RewardConfig(Section):
    """Reward workers; each calls the functions of one group after the other, and awaits async ones together."""

    timeout_s: Seconds = 60.0
    """A reward function that takes longer for one group is killed, counted from the group's turn."""
    num_workers: Positive = 1
    num_cpus: Annotated[float, Field(ge=0)] = 0.0
    """CPUs that Ray sets aside for each reward worker."""
    isolation: Annotated[Isolation, FROM_STRING] = Isolation.PROCESS
    """Where your functions run: one process for all groups, a new one behind walls per group (sandbox), or inline. None
    may mount or use setuid programs (bubblewrap, nsjail, apptainer), but inline."""
    max_failures_in_a_row: Positive = 20
    """Groups in a row whose rewards failed, after which the run stops."""

    @model_validator(mode="before")
    @classmethod
    def _is_no_run(cls, values: Any) -> Any:
        if isinstance(values, dict) and "output_dir" in values:
            raise ValueError(
                "RewardConfig says how rewards are computed, got output_dir, an option of a run. TRL's RewardConfig is "
                "RewardModelConfig here."
            )
        return values


class RolloutConfig(Section):
    """Rollout workers and their engines."""

    engine: Annotated[EngineChoice, FROM_STRING] = EngineChoice.AUTO
    dtype: Annotated[Annotated[Dtype, FROM_STRING] | None, AfterValidator(_policys)] = None
    """None (or ``auto``) uses the policy's."""
    num_workers: Positive = 1
    min_workers: Positive | None = None
    """The run begins with as few when there is no room for `num_workers`; None waits for all of them."""
    max_workers: Positive | None = None
    """More are started as nodes with room for them come; None keeps to `num_workers`."""
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    max_num_seqs: Positive = 64
    """Completions one engine generates at once."""
    max_model_len: Positive | None = None
    """Prompt plus completion tokens; None takes what the model allows."""
    kv_cache_memory_gib: Annotated[float, Field(gt=0)] = 1.0
    """Only for engines on a CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    tensor_parallel_size: Positive = 1
    enforce_eager: bool = True
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to vLLM as they are."""
    lease_s: Seconds = 300.0
    """A worker that has not renewed a group's lease for this long loses the group to another."""
    hang_deadline_s: Seconds = 120.0
    """An engine that finishes no step for this long is replaced."""
    canary_every: Natural = 1
    """Check learner against engine log-probs at every N-th weight pull (and the first); 0 never."""
    canary_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest mean |difference| in nats between learner and engine; None takes 1e-3 where both sides are float32, else
    0.2. Later versions are held against what the pair showed at version 0 beside."""
    on_disagreement: Annotated[OnDisagreement, FROM_STRING] | None = None
    """``stop`` or ``warn`` when the agreement check finds sampler and learner apart; None stops where both sides are
    float32, and there is no dropout, and warns elsewhere."""

    @property
    def fewest_workers(self) -> int:
        """With which the run begins."""
        return self.min_workers or self.num_workers

    @property
    def most_workers(self) -> int:
        """To which it grows."""
        return self.max_workers or self.num_workers

    @rule
    def _check_workers(self) -> None:
        if not self.fewest_workers <= self.num_workers <= self.most_workers:
            raise ValueError(
                f"num_workers must be between min_workers and max_workers, got {self.num_workers} with "
                f"{self.fewest_workers} and {self.most_workers}. Change one of them."
            )


def _read_report_to(value: Any) -> Any:
    """One name stands for a list of it, as in TRL, and ``none`` for no name."""
    names = [value] if isinstance(value, str) else value
    return [] if names in (None, ["none"]) else names


Service = Annotated[str, Field(pattern="^(wandb|tensorboard|mlflow|trackio|all)$")]


class ReportConfig(Section):
    """The run directory and what is shown."""

    output_dir: str = "runs/run"
    run_name: str | None = None
    overwrite_output_dir: bool = False
    logging_steps: PositiveStepCount = 10
    """Steps between lines of the console, or a fraction of the run below 1; metrics.jsonl has every step."""
    save_steps: StepCount = 500
    """Steps between checkpoints, or a fraction of the run below 1; 0 writes only the last."""
    save_total_limit: Positive | None = None
    """Older checkpoints are deleted once a newer one is complete."""
    eval_steps: Annotated[StepCount, none_is(0)] = 0
    """Steps between evaluations on held-out prompts, or a fraction of the run below 1; 0 never."""
    log_completions: bool = True
    num_completions_to_print: Natural = 0
    report_to: Annotated[
        list[Annotated[str, Field(pattern="^(wandb|tensorboard|mlflow|trackio|all)$")]],
        BeforeValidator(_read_report_to),
    ] = Field(default_factory=list)
    """``wandb``, ``tensorboard``, ``mlflow``, ``trackio``, a list of them, ``all`` that are installed, or ``none``."""
    project: str | None = None
    """Name of the project in these services; None takes `wandb_project`."""
    trackio_space_id: str | None = None
    """Space that Trackio writes to; None writes on this machine."""
    trackio_bucket_id: str | None = None
    """Bucket where that Space keeps its numbers; None leaves it to Trackio."""
    wandb_project: Annotated[str, none_is("trl_ray")] = "trl_ray"
    wandb_entity: str | None = None
    """User or team in Weights & Biases; None takes the key's own."""
    wandb_run_group: str | None = None
    """Group of runs in Weights & Biases."""
    html_report: bool = True
    callbacks: list[CallbackField] = Field(default_factory=list)
    """Objects whose hooks the run calls: ``package.module:Class``, or ``{path: ..., kwargs: {...}}``."""
