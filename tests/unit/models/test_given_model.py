"""Models and tokenizers as objects load from the folder that they are written to as if they had been named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from tiny_models import build_tiny_model, build_tokenizer, random_model
from trl_ray.config.sections import Dtype, ModelConfig, QuantType
from trl_ray.errors import ModelError
from trl_ray.models.given_model import given_options, is_model, quantization_options, write_given
from trl_ray.models.policy_loading import load_policy, load_tokenizer

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model.eval()(input_ids=IDS).logits.float().numpy()
    return found


def adapted() -> torch.nn.Module:
    """A model with an adapter that is no longer zero."""
    options = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model: torch.nn.Module = peft.get_peft_model(random_model(family="llama", tied=False), options)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return model


def test_a_model_and_a_tokenizer_are_read_as_they_were(tmp_path: Path) -> None:
    model, tokenizer = random_model(seed=4), build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write_given(tmp_path / "given", model=model, tokenizer=tokenizer)
    options = ModelConfig(model_name_or_path=str(tmp_path / "given"))
    assert (logits(load_policy(options)) == logits(model)).all()
    assert load_tokenizer(options).chat_template == tokenizer.chat_template


def test_an_adapter_goes_on_with_the_weights_beneath_it(tmp_path: Path) -> None:
    model = adapted()
    write_given(tmp_path / "given", model=model, tokenizer=build_tokenizer())
    options = ModelConfig(model_name_or_path=str(tmp_path / "given"), **given_options(model))
    assert options.use_peft
    np.testing.assert_allclose(logits(load_policy(options)), logits(model), atol=1e-6)
    assert load_tokenizer(options).eos_token == "<|im_end|>"


def test_without_a_tokenizer_the_one_where_the_model_came_from_is_taken(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "model")
    model = load_policy(ModelConfig(model_name_or_path=path))
    write_given(tmp_path / "given", model=model, tokenizer=None)
    assert load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path / "given"))).eos_token == "<|im_end|>"
    with pytest.raises(ModelError, match="processing_class must be given with a model that was not loaded"):
        write_given(tmp_path / "other", model=random_model(), tokenizer=None)


def test_a_named_model_with_another_tokenizer_is_not_copied(tmp_path: Path) -> None:
    path, tokenizer = build_tiny_model(tmp_path / "model"), build_tokenizer()
    tokenizer.chat_template = "another"
    write_given(tmp_path / "given", model=path, tokenizer=tokenizer)
    assert (tmp_path / "given" / "model.safetensors").is_symlink()
    assert load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path / "given"))).chat_template == "another"
    assert load_tokenizer(ModelConfig(model_name_or_path=path)).chat_template != "another"


@pytest.mark.parametrize(("dtype", "option"), [(torch.float32, Dtype.FLOAT32), (torch.bfloat16, Dtype.BFLOAT16)])
def test_weights_keep_their_number_format(dtype: torch.dtype, option: Dtype) -> None:
    assert given_options(random_model().to(dtype)) == {"dtype": option}


def test_models_are_told_from_functions() -> None:
    assert is_model(random_model()) and is_model(adapted())
    assert not is_model(torch.nn.Linear(2, 2)) and not is_model(len) and not is_model("name")


def test_what_is_no_model_or_no_tokenizer_is_refused(tmp_path: Path) -> None:
    class Processor:
        tokenizer = build_tokenizer()

    with pytest.raises(ModelError, match="got a Linear"):
        given_options(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"got a Processor.*processing_class=processor\.tokenizer"):
        write_given(tmp_path / "given", model=random_model(), tokenizer=Processor())

    class Quantised(PreTrainedModel):
        is_quantized = True

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    with pytest.raises(ModelError, match="got a quantised one"):
        given_options(Quantised())


def test_a_quantisation_becomes_options() -> None:
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    assert quantization_options(given) == {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": QuantType.NF4,
        "use_bnb_nested_quant": True,
    }
    with pytest.raises(ModelError, match="llm_int8_skip_modules"):
        quantization_options(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]))
    with pytest.raises(ModelError, match=r"must be a transformers\.BitsAndBytesConfig, got a dict"):
        quantization_options({"load_in_4bit": True})
    with pytest.raises(ModelError, match="must have bnb_4bit_compute_dtype bfloat16 or float32, got float16"):
        quantization_options(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16))
