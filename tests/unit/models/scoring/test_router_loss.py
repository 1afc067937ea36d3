"""The auxiliary loss of routers, against transformers' own."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_architectures import build_tiny_architecture
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.algorithms.batches.micro_batches import CutRules, train_batch
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.errors import ModelError
from trl_ray.models.scoring.router_loss import aux_loss_coefficient, load_balancing_loss
from trl_ray.types import TrainingSample


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = ("mixtral", "qwen3_moe", "jamba", "llama")
    return {name: build_tiny_architecture(tmp_path_factory.mktemp(name), name) for name in names}


def sample(group, prompt, completion, advantage=0.0):
    return TrainingSample(
        group_id=group,
        prompt_ids=np.array(prompt, np.int32),
        completion_ids=np.array(completion, np.int32),
        loss_mask=np.ones(len(completion), np.bool_),
        sampler_logprobs=np.full(len(completion), -1.0, np.float32),
        advantage=advantage,
    )


def learner(folder, **training):
    return PolicyLearner(
        model=ModelConfig(model_name_or_path=folder, gradient_checkpointing=training.pop("checkpointing", False)),
        training=TrainingConfig(learning_rate=1e-3, **training),
        loss=LossConfig(),
        total_updates=4,
    )


def step(made, *samples, size=8):
    return made.step(train_batch(list(samples), step=made.version + 1, rules=CutRules(max_samples=size)))


def test_even_routers_pay_as_many_as_there_are_choices_and_uneven_ones_more():
    # Two experts, one choice: half of the tokens go to each, f = p = 1/2 -> 2 (1/4 + 1/4) = 1.
    even = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
    assert float(load_balancing_loss([even], num_experts=2, top_k=1)) == pytest.approx(1.0, abs=1e-6)
    assert float(load_balancing_loss([even[:1]], num_experts=2, top_k=1)) == pytest.approx(2.0, abs=1e-6)


# Jamba's routers are plain linear layers, which their name tells from others.
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "jamba"])
def test_it_is_the_loss_of_transformers_of_the_tokens_that_are_read(folders, name):
    prompt, completion = [5, 6, 7, 8], [9, 10, 11]
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    # The last token predicts nothing, and is not read.
    expected = model(torch.tensor([prompt + completion[:-1]]), output_router_logits=True).aux_loss
    result = step(learner(folders[name], router_aux_loss_coef=0.5), sample(0, prompt, completion))
    assert result.metrics["aux_loss"].value == pytest.approx(float(expected), rel=1e-5)
    assert result.loss == pytest.approx(0.5 * float(expected), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"share_prompt": "never"}, {"checkpointing": True}])
def test_the_gradient_reaches_the_routers_whatever_the_layout(folders, options):
    samples = [sample(0, [5, 6, 7], [9, 10]), sample(1, [5, 6, 7, 8, 9], [9, 10, 11, 12])]
    without = step(learner(folders["mixtral"], router_aux_loss_coef=0.0, **options), *samples)
    with_loss = step(learner(folders["mixtral"], router_aux_loss_coef=0.5, **options), *samples)
    assert without.grad_norm == 0.0 and "aux_loss" not in without.metrics
    assert with_loss.grad_norm > 0


def test_padding_does_not_count(folders):
    samples = [sample(0, [5, 6, 7], [9, 10]), sample(1, [5, 6, 7, 8, 9, 3, 4, 5], [9, 10, 11, 12])]
    packed = learner(folders["mixtral"], router_aux_loss_coef=0.5)
    padded = learner(folders["mixtral"], router_aux_loss_coef=0.5)
    padded._scorer._attention = "causal"
    padded._model.set_attn_implementation("sdpa")
    values = [step(each, *samples).metrics["aux_loss"].value for each in (packed, padded)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_micro_batches_count_alike_as_in_trl(folders):
    samples = [sample(0, [5, 6, 7], [9, 10]), sample(1, [5, 6, 7, 8, 9], [9, 10, 11, 12])]
    alone = [step(learner(folders["mixtral"], router_aux_loss_coef=0.5), each).loss for each in samples]
    together = step(learner(folders["mixtral"], router_aux_loss_coef=0.5), *samples, size=1)
    assert together.loss == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_the_weight_is_the_models_own_unless_it_is_said_and_needs_a_mixture(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["mixtral"])
    assert aux_loss_coefficient(model.config, None) == model.config.router_aux_loss_coef > 0
    assert aux_loss_coefficient(model.config, 0.0) == 0.0
    dense = AutoModelForCausalLM.from_pretrained(folders["llama"]).config
    assert aux_loss_coefficient(dense, None) == 0.0
    with pytest.raises(ModelError, match=r"router_aux_loss_coef must be left out for a llama, got 0\.1"):
        aux_loss_coefficient(dense, 0.1)
