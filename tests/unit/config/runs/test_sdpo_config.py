"""What SDPO's configuration refuses, what it says of its teacher, and how TRL's examples are read."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.load import build, dump_yaml, parse_yaml
from trl_ray.config.losses.distillation_options import RepromptConfig, SDPOObjective
from trl_ray.config.losses.policy_options import OldLogprobs
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.config.sections import GenerationConfig, ModelConfig
from trl_ray.config.teacher_options import TeacherKind, TeacherWeights
from trl_ray.errors import ConfigError

TOP = {"distillation_mode": "topk_logits", "distillation_topk": 20}
FULL = {"distillation_mode": "full_logits"}
SERVED = {"use_teacher_server": True, "teacher_model_kind": "live"}
LIGER = {"use_liger_kernel": True, "distillation_is_clip": None, **FULL}
# Each contradiction, how its message begins, and the change that resolves it.
CONTRADICTIONS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    # The blend
    (
        {"distillation_weight": 1.5},
        "distillation_weight must be less than or equal to 1, got 1.5",
        {"distillation_weight": 1.0},
    ),
    (
        {"distillation_weight": -0.1},
        "distillation_weight must be greater than or equal to 0, got -0.1",
        {"distillation_weight": 0.0},
    ),
    ({"beta": 0.1}, "beta must be 0 with distillation_weight=1, got 0.1", {"distillation_weight": 0.5}),
    # Modes
    (
        {"distillation_mode": "logits"},
        "distillation_mode must be 'sampled_token', 'full_logits' or 'topk_logits', got 'logits'",
        FULL,
    ),
    (
        {"distillation_alpha": 0.5},
        "distillation_alpha must be 1 with distillation_mode=sampled_token, got 0.5",
        FULL,
    ),
    (
        {"distillation_alpha": 2.0},
        "distillation_alpha must be less than or equal to 1, got 2.0",
        {"distillation_alpha": 1.0},
    ),
    (
        {"distillation_mode": "topk_logits"},
        "distillation_topk must be set with distillation_mode=topk_logits and left out otherwise, got None and "
        "topk_logits",
        TOP,
    ),
    (
        {"distillation_topk": 20},
        "distillation_topk must be set with distillation_mode=topk_logits and left out otherwise, got 20 and "
        "sampled_token",
        TOP,
    ),
    ({**TOP, "distillation_topk": 0}, "distillation_topk must be greater than or equal to 1, got 0", TOP),
    (
        {**TOP, "distillation_topk": 1},
        "distillation_add_tail must be true with distillation_topk=1, got false",
        {"distillation_add_tail": True},
    ),
    (
        {"distillation_add_tail": True},
        "distillation_add_tail must be false with distillation_mode=sampled_token, got true",
        TOP,
    ),
    (
        {**FULL, "distillation_add_tail": True},
        "distillation_add_tail must be false with distillation_mode=full_logits, got true",
        TOP,
    ),
    (
        {"distillation_is_clip": 0.0},
        "distillation_is_clip must be greater than 0, got 0.0",
        {"distillation_is_clip": None},
    ),
    # The teacher
    (
        {"teacher_model_kind": "frozen"},
        "teacher_model_kind must be 'ema', 'live', 'base', 'external', package.module:Class or file.py:Class, got",
        {"teacher_model_kind": "base"},
    ),
    (
        {"teacher_model_kind": "external"},
        "teacher_model_kind must be ema, live or base, got external",
        {"teacher_model_kind": "live"},
    ),
    ({"teacher_update_rate": 0.0}, "teacher_update_rate must be greater than 0, got 0.0", {"teacher_update_rate": 1.0}),
    (
        {"teacher_update_rate": 1.1},
        "teacher_update_rate must be less than or equal to 1, got 1.1",
        {"teacher_update_rate": 1.0},
    ),
    (
        {"teacher_sync_steps": 0},
        "teacher_sync_steps must be greater than or equal to 1, got 0",
        {"teacher_sync_steps": 1},
    ),
    (
        {**FULL, "teacher": {"placement": "actor"}},
        "teacher.placement must not be actor with distillation_mode=full_logits, got actor",
        {"teacher": {}},
    ),
    (
        {**TOP, "teacher": {"placement": "actor"}},
        "teacher.placement must not be actor with distillation_mode=topk_logits, got actor",
        {"teacher": {"placement": "learner"}},
    ),
    (
        {"use_peft": True, "teacher": {"placement": "actor"}},
        "teacher_adapter_average must be product with teacher.placement=actor, got factors",
        {"teacher_adapter_average": "product"},
    ),
    # The rollout engines as teacher
    (
        {"use_teacher_server": True},
        "teacher_model_kind must be live with use_teacher_server=true, got ema",
        {"teacher_model_kind": "live"},
    ),
    (
        {**SERVED, "teacher_model_kind": "base"},
        "teacher_model_kind must be live with use_teacher_server=true, got base",
        {"teacher_model_kind": "live"},
    ),
    (
        {**SERVED, "distillation_weight": 0.5},
        "distillation_weight must be 1.0 with use_teacher_server=true, got 0.5",
        {"distillation_weight": 1.0},
    ),
    (
        {**SERVED, **FULL},
        "distillation_mode must be sampled_token or topk_logits with use_teacher_server=true, got full_logits",
        TOP,
    ),
    (
        {**SERVED, "temperature": 0.7},
        "temperature must be 1.0 with use_teacher_server=true, got 0.7",
        {"temperature": 1.0},
    ),
    (
        {**SERVED, "use_liger_kernel": True},
        "use_teacher_server must be false with use_liger_kernel=true, got true",
        {"use_liger_kernel": False},
    ),
    # Liger
    (
        {"use_liger_kernel": True},
        "distillation_mode must be full_logits with use_liger_kernel=true, got sampled_token",
        LIGER,
    ),
    (
        {**LIGER, "distillation_is_clip": 2.0},
        "distillation_is_clip must be null with use_liger_kernel=true, got 2.0",
        LIGER,
    ),
    (
        {**LIGER, "distillation_weight": 0.5},
        "distillation_weight must be 1.0 with use_liger_kernel=true, got 0.5",
        {"distillation_weight": 1.0},
    ),
    # Reprompts
    ({"max_reprompt_len": 0}, "max_reprompt_len must be greater than or equal to 1, got 0", {"max_reprompt_len": 1}),
    (
        {"reprompt_template": "{prompt}{hint}"},
        "reprompt_template must have no other fields than {prompt}, {solution}, {feedback}, got '{prompt}{hint}' "
        "('hint')",
        {"reprompt_template": "{prompt}{{hint}}"},
    ),
    (
        {"solution_template": "{}"},
        "solution_template must have no other fields than {successful_previous_attempt}, got '{}'",
        {"solution_template": "like this: {successful_previous_attempt}"},
    ),
    (
        {"feedback_template": "{feedback_raw"},
        "feedback_template must have no other fields than {feedback_raw}, got '{feedback_raw'",
        {"feedback_template": ""},
    ),
    # Diagnostics
    (
        {"diagnostics_warning_interval": -1},
        "diagnostics_warning_interval must be greater than or equal to 0, got -1",
        {"diagnostics_warning_interval": 0},
    ),
    (
        {"diagnostics_flat_tolerance": -1e-8},
        "diagnostics_flat_tolerance must be greater than or equal to 0, got -1e-08",
        {"diagnostics_flat_tolerance": 0.0},
    ),
    # Generation
    (
        {"num_generations": 1},
        "num_generations must be at least 2 with include_environment_feedback=false, got 1",
        {"include_environment_feedback": True},
    ),
    (
        {"num_generations": 1, "distillation_weight": 0.5, "include_environment_feedback": True},
        "num_generations must be at least 2 with distillation_weight=0.5, got 1",
        {"distillation_weight": 1.0},
    ),
    (
        {"num_generations_eval": 0},
        "num_generations_eval must be greater than or equal to 1, got 0",
        {"num_generations_eval": None},
    ),
    (
        {"max_prompt_length": 0},
        "max_prompt_length must be greater than or equal to 1, got 0",
        {"max_prompt_length": None},
    ),
    ({"min_tokens": 257}, "min_tokens must be at most max_completion_length, got 257 and 256", {"min_tokens": 256}),
    (
        {"generation_batch_size": 16, "steps_per_generation": 2},
        "generation_batch_size and steps_per_generation say the same in two ways, got 16 and 2",
        {"steps_per_generation": None},
    ),
    (
        {"generation_kwargs": {"presense_penalty": 0.9}},
        "generation_kwargs must hold fields of vLLM's SamplingParams or of transformers' GenerationConfig, got "
        "'presense_penalty'. Did you mean 'presence_penalty'?",
        {"generation_kwargs": {"presence_penalty": 0.9}},
    ),
    (
        {"generation_kwargs": {"n": 4}},
        "generation_kwargs cannot hold n=4. Set num_generations.",
        {"generation_kwargs": {"n": 1}},
    ),
    (
        {"generation_kwargs": {"structured_outputs": {"regexp": "[ab]+"}}},
        "generation_kwargs.structured_outputs must be a mapping with one of choice, grammar, json, json_object, regex, "
        "structural_tag, got {'regexp': '[ab]+'}",
        {"generation_kwargs": {"structured_outputs": {"regex": "[ab]+"}}},
    ),
    # The model
    (
        {"model_init_kwargs": {"device_map": "auto"}},
        "model_init_kwargs cannot hold device_map='auto'. The run places the model itself (runtime). Remove it.",
        {"model_init_kwargs": {}},
    ),
    (
        {"model_init_kwargs": {"revision": "v2"}, "model_revision": "v1"},
        "model_revision must be given once, got 'v1' and model_init_kwargs['revision']='v2'",
        {"model_revision": "v2"},
    ),
    (
        {"model_init_kwargs": {"dtype": "float16"}},
        "dtype must be 'float32', 'bfloat16' or 'auto', got 'float16'",
        {"model_init_kwargs": {"dtype": "bfloat16"}},
    ),
]


@pytest.mark.parametrize(("values", "begins", "remedy"), CONTRADICTIONS)
def test_a_contradiction_is_refused_in_one_message_and_its_remedy_is_accepted(
    values: dict[str, Any], begins: str, remedy: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(SDPOConfig, values)
    message = str(caught.value)
    assert message.startswith(begins) and "\n" not in message, message
    build(SDPOConfig, {**values, **remedy})


def test_the_documentations_examples_are_read() -> None:
    config = SDPOConfig(
        output_dir="sdpo-model",
        distillation_mode="topk_logits",
        distillation_topk=100,
        include_environment_feedback=True,
    )
    assert config.part(SDPOObjective).distillation_topk == 100
    served = {"teacher_model_kind": "live", "distillation_weight": 1.0, "distillation_mode": "sampled_token"}
    assert SDPOConfig(output_dir="sdpo-model", use_teacher_server=True, **served).teacher_on_engines
    asked = {"output_dir": "sdpo-model", "use_teacher_server": True, **served}
    assert SDPOConfig(use_vllm=True, vllm_mode="server", **asked) == SDPOConfig(**asked)
    with pytest.raises(ConfigError) as caught:
        SDPOConfig(use_vllm=True, vllm_server_host="10.0.0.5", rollout={"engine": "transformers"}, **asked)
    engine, host = str(caught.value).split("\n")
    assert engine.startswith("'use_vllm' cannot be True here. Set rollout.engine")
    assert host.startswith("'vllm_server_host' cannot be '10.0.0.5' here. Remove it: engines are actors")


def test_the_example_scripts_options_are_read_as_yaml() -> None:
    text = """
    model_name_or_path: Qwen/Qwen2.5-Math-1.5B-Instruct
    dataset_name: openai/gsm8k
    dataset_config: main
    learning_rate: 5e-5
    dtype: bfloat16
    bf16: true
    max_completion_length: 128
    use_peft: true
    lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    per_device_train_batch_size: 1
    gradient_accumulation_steps: 2
    num_generations: 8
    generation_batch_size: 32
    distillation_alpha: 1.0
    distillation_mode: sampled_token
    distillation_weight: 0.5
    report_to: none
    eval_steps: 1000
    save_steps: 0
    """
    config = build(SDPOConfig, parse_yaml(text, source="script"))
    # 32 completions are 4 prompts and, two at a time, 16 updates.
    assert (config.groups_per_step, config.updates_per_step, config.report_to) == (4, 16, [])
    assert (config.distils, config.teacher_in_learner, config.teacher_adapter_average.value) == (True, True, "factors")


def test_what_trl_leaves_at_none_may_be_none() -> None:
    names = ("min_p", "chat_template_kwargs", "generation_kwargs", "model_init_kwargs", "eval_steps", "report_to")
    config = build(SDPOConfig, dict.fromkeys(names))
    assert config == SDPOConfig()
    assert (config.min_p, config.eval_steps, config.report_to) == (0.0, 0, [])
    assert SDPOConfig(report_to="wandb").report_to == SDPOConfig(report_to=["wandb"]).report_to == ["wandb"]


def test_keyword_arguments_become_the_options_that_they_mean() -> None:
    config = SDPOConfig(
        model_init_kwargs={
            "torch_dtype": "torch.bfloat16",
            "attn_implementation": "eager",
            "revision": "v1",
            "trust_remote_code": True,
            "use_cache": False,
            "device_map": None,
            "sliding_window": 64,
        },
        generation_kwargs={"min_new_tokens": 4, "stop_strings": "\n"},
    )
    model, generation = config.part(ModelConfig), config.part(GenerationConfig)
    assert (model.dtype.value, model.attn_implementation) == ("bfloat16", "eager")
    assert (model.model_revision, model.trust_remote_code) == ("v1", True)
    assert (generation.min_tokens, generation.stop) == (4, ["\n"])
    assert (config.model_init_kwargs, config.generation_kwargs) == ({"sliding_window": 64}, {})


def test_generation_kwargs_win_over_options_as_in_trl_and_what_engines_alone_know_is_left() -> None:
    given = {
        "temperature": 0.7,
        "top_k": -1,
        "max_tokens": 32,
        "do_sample": True,
        "num_beams": 1,
        "use_cache": True,
        "stop": "\n",
        "eos_token_id": 7,
        "logit_bias": {"5": -100},
        "bad_words": None,
    }
    generation = SDPOConfig(generation_kwargs=given, temperature=1.0, top_k=5).part(GenerationConfig)
    assert (generation.temperature, generation.top_k, generation.max_completion_length) == (0.7, 0, 32)
    assert (generation.stop, generation.engine_fields) == (
        ["\n"],
        {"stop_token_ids": [7], "logit_bias": {"5": -100}},
    )
    assert generation.part(GenerationConfig) == generation
    text = SDPOConfig(generation_kwargs='{"top_p": 0.9}')  # type: ignore[arg-type]
    assert text.top_p == 0.9


def test_a_structure_is_asked_for_under_all_of_its_names() -> None:
    wanted = {"structured_outputs": {"regex": "[ab]+"}}
    for given in (
        {"vllm_structured_outputs_regex": "[ab]+"},
        {"vllm_guided_decoding_regex": "[ab]+"},
        {"generation_kwargs": wanted},
        {"generation_kwargs": {"guided_decoding": {"regex": "[ab]+"}}},
        {"generation_kwargs": {"guided_regex": "[ab]+"}},
    ):
        assert build(SDPOConfig, given).part(GenerationConfig).engine_fields == wanted


def test_evaluations_take_as_many_completions_as_training_unless_told() -> None:
    assert SDPOConfig().completions_per_held_out_prompt == SDPOConfig().num_generations == 8
    assert SDPOConfig(num_generations_eval=2).completions_per_held_out_prompt == 2


@pytest.mark.parametrize(
    "values",
    [
        {},
        {**TOP, "distillation_add_tail": True, "teacher_model_kind": "base"},
        {**SERVED, "max_staleness": 2},
        {**LIGER, "teacher": {"placement": "learner"}},
        {"distillation_weight": 0.0, "beta": 0.1, "num_iterations": 2, "scale_rewards": False},
        {"use_peft": True, "teacher_adapter_average": "product", "teacher": {"placement": "actor", "num_workers": 2}},
        {"model_init_kwargs": {"dtype": "bfloat16"}, "generation_kwargs": {"stop": ["\n"]}, "reward_weights": [1.0]},
    ],
)
def test_a_configuration_survives_being_written_and_changed(values: dict[str, Any]) -> None:
    config = build(SDPOConfig, values)
    assert build(SDPOConfig, parse_yaml(dump_yaml(config), source="resolved")) == config
    assert config.replace(seed=7).replace(seed=config.seed) == config
    for part in (SDPOObjective, RepromptConfig, TeacherWeights, ModelConfig, GenerationConfig):
        own = config.part(part)
        assert all(getattr(own, name) == getattr(config, name) for name in part.model_fields)


def test_the_teacher_is_told_all_about_itself() -> None:
    config = SDPOConfig(
        model_name_or_path="models/tiny", teacher_update_rate=0.5, teacher_sync_steps=3, teacher={"num_workers": 2}
    )
    [source] = config.teacher_sources
    assert (source.name, source.kind, source.follows_policy) == ("ema", TeacherKind.EMA, True)
    assert source.model.model_name_or_path == "models/tiny" and source.options.num_workers == 2
    assert source.weights == TeacherWeights(teacher_update_rate=0.5, teacher_sync_steps=3)


@pytest.mark.parametrize(
    ("values", "in_learner", "on_engines", "actors"),
    [
        ({}, False, False, 1),
        ({"teacher": {"placement": "learner"}}, True, False, 0),
        (FULL, True, False, 0),
        (TOP, True, False, 0),
        ({"use_peft": True}, True, False, 0),
        ({"use_peft": True, "teacher_adapter_average": "product"}, False, False, 1),
        ({"use_peft": True, "teacher_model_kind": "live"}, False, False, 1),
        (SERVED, False, True, 0),
        ({**SERVED, **TOP}, False, True, 0),
        # Nobody teaches.
        ({"distillation_weight": 0.0}, False, False, 0),
        ({"distillation_weight": 0.0, **FULL}, False, False, 0),
    ],
)
def test_the_teacher_stands_where_its_mode_can_be_computed(
    values: dict[str, Any], in_learner: bool, on_engines: bool, actors: int
) -> None:
    config = build(SDPOConfig, values)
    assert (config.teacher_in_learner, config.teacher_on_engines) == (in_learner, on_engines)
    assert len(config.acting_teachers) == actors


def test_ratios_are_the_samplers_where_generation_runs_ahead_unless_said_otherwise() -> None:
    assert SDPOConfig().old_logprobs is OldLogprobs.POLICY
    assert SDPOConfig(max_staleness=1).old_logprobs is OldLogprobs.SAMPLER
    assert SDPOConfig(max_staleness=1, old_logprobs="policy").old_logprobs is OldLogprobs.POLICY
    assert SDPOConfig(max_staleness=1).replace(seed=1).old_logprobs is OldLogprobs.SAMPLER
