"""The date in a conversation is that of the day on which the run began, on whatever day it goes on."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from dataset_runs import values
from tiny_models import build_tiny_model, build_tokenizer
from trl_ray.config.load import build, dump_yaml
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.data.chat.chat_rendering import ChatFormat, render_chat
from trl_ray.errors import ModelError
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.run import run_date
from trl_ray.pipelines.sft import SFTPipeline

DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    name = build_tiny_model(folder)
    (folder / "dated.jinja").write_text(DATED)
    return name


def options(model: str, folder: Path, **more: Any) -> dict[str, Any]:
    template = next(Path(model).parent.rglob("dated.jinja"))
    return {**values(model, folder / "run"), "chat_template": str(template), **more}


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what day it is."""

    def set_day(year: int, month: int, number: int) -> None:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:  # type: ignore[override]
                return datetime.date(year, month, number)

        monkeypatch.setattr(run_date, "date", Day)

    return set_day


def text(pipeline: SFTPipeline) -> str:
    train = pipeline.prepare().train
    assert train is not None
    [sample] = train.examples[0].samples
    return str(TOKENIZER.decode([*sample.prompt_ids, *sample.completion_ids]))


def test_a_run_that_goes_on_another_day_trains_the_same_tokens(tmp_path: Path, model: str, day: Any) -> None:
    day(2026, 11, 30)
    rows = [{"messages": TALK}] * 2
    pipeline = SFTPipeline(args=build(SFTConfig, options(model, tmp_path)), train_dataset=rows)
    assert text(pipeline).startswith("30 Nov 2026")
    day(2026, 12, 1)
    # As `from_run` does: the options of the run's config.yaml.
    again = SFTPipeline(args=pipeline.config, train_dataset=rows)
    assert text(again).startswith("30 Nov 2026")
    # As `resume_from_checkpoint` does: options given anew.
    folder = Path(pipeline.config.output_dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(pipeline.config))
    anew = build(SFTConfig, options(model, tmp_path))
    assert run_date.with_date(anew.replace(resume_from_checkpoint=True), loaded()) == pipeline.config.replace(
        resume_from_checkpoint=True
    )
    assert run_date.with_date(anew, loaded()).chat_template_kwargs == {"strftime_now": "2026-12-01"}


def loaded() -> Any:
    made = build_tokenizer()
    made.chat_template = DATED
    return made


def test_prompts_have_the_date_of_their_run(tmp_path: Path, model: str, day: Any) -> None:
    day(2026, 11, 30)
    given = {key: value for key, value in options(model, tmp_path).items() if key in GRPOConfig.model_fields}
    config = build(GRPOConfig, {**given, "reward_funcs": [], "max_completion_length": 8})
    pipeline = GRPOPipeline(
        args=config, train_dataset=[{"prompt": TALK[:1]}] * 4, reward_funcs=[lambda completions, **_: [0.0] * 8]
    )
    plan = pipeline.prepare()
    assert TOKENIZER.decode(plan.prompts.prompt(0).token_ids.tolist()).startswith("30 Nov 2026")
    assert plan.config.chat_template_kwargs == {"strftime_now": "2026-11-30"}
    # The run's own configuration is what goes into its directory.
    assert plan.objective.config is plan.config is pipeline.config


def test_a_template_without_a_date_leaves_the_options_alone(tmp_path: Path, model: str) -> None:
    config = build(SFTConfig, values(model, tmp_path / "run"))
    assert run_date.with_date(config, TOKENIZER) is config


def test_a_date_may_be_given_and_must_be_one() -> None:
    told = {"strftime_now": datetime.date(2020, 1, 2)}
    for values_given in (told, {"strftime_now": "2020-01-02"}):
        chat = ChatFormat(template=DATED, template_kwargs=values_given)
        assert render_chat(TOKENIZER, TALK, chat).text == "02 Jan 2020<user>q<assistant>a"
    with pytest.raises(ModelError, match="Invalid isoformat string: 'today'"):
        render_chat(TOKENIZER, TALK, ChatFormat(template=DATED, template_kwargs={"strftime_now": "today"}))
