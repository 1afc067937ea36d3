"""The synchronised reference and the options of adapters against TRL's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tiny_models import random_model
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.models.adapters.adapter_config import lora_config
from trl_ray.models.companions.averaging import Pace, WeightAverage
from trl_ray.models.companions.companion import AveragedCompanion

pytestmark = pytest.mark.parity
trl = pytest.importorskip("trl", reason="the reference is TRL")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.6, 1.0, 0.05])
def test_the_synchronised_copy_is_trls_bit_for_bit(alpha: float, dtype: torch.dtype) -> None:
    from trl.trainer.callbacks import SyncRefModelCallback

    policy, ours = random_model(seed=1).to(dtype), random_model(seed=2).to(dtype)
    theirs = copy.deepcopy(ours)
    unused: Any = None
    average = WeightAverage(dict(ours.requires_grad_(False).named_parameters()), Pace(rate=alpha), keep_dtype=True)
    reference = AveragedCompanion(ours, unused, average=average, folder="reference", what="the synchronised reference")
    for step in (1, 2):
        reference.after_step(step, policy.named_parameters())
        SyncRefModelCallback._sync_target_model(policy, theirs, alpha)
        for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(got, want)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_dora": True, "lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.0},
    {"use_rslora": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_modules_to_save": ["norm"]},
    {"lora_target_modules": ["all-linear"]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_options_make_the_same_lora_config(options: dict[str, Any]) -> None:
    from trl import ModelConfig as TheirModelConfig
    from trl import get_peft_config

    theirs = get_peft_config(TheirModelConfig(use_peft=True, **copy.deepcopy(options)))
    assert theirs is not None
    assert lora_config(ModelConfig(use_peft=True, **options)).to_dict() == theirs.to_dict()


def test_the_options_of_model_and_reference_have_trls_names_and_defaults() -> None:
    from trl import GRPOConfig as TheirGRPOConfig
    from trl import ModelConfig as TheirModelConfig

    theirs = {field.name: field.default for field in TheirModelConfig.__dataclass_fields__.values()}
    ours = ModelConfig()
    names = [name for name in ModelConfig.model_fields if name.startswith(("lora_", "use_", "load_in", "bnb_"))]
    shared = set(names) - {"lora_kwargs", "use_liger_kernel"}
    assert {name: getattr(ours, name) for name in shared} == {name: theirs[name] for name in shared}
    assert set(theirs) - set(ModelConfig.model_fields) == {
        "bnb_4bit_quant_storage",
        "lora_target_parameters",
        "lora_task_type",
    }
    fields = TheirGRPOConfig.__dataclass_fields__
    for name in ("beta", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"):
        assert getattr(LossConfig(), name) == fields[name].default
