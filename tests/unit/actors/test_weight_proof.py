"""What is said to be wrong when an engine and its learner are apart after a pull."""

import numpy as np
import pytest

from trl_ray.actors.weight_proof import WeightProof
from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.sections import ModelConfig, OnDisagreement
from trl_ray.engines.backend import CHECKPOINT_VERSION
from trl_ray.errors import WeightError
from trl_ray.types import ScoredSequence, WeightCheck, WeightPayload, WeightVersion

IDS, LONG = np.arange(4, dtype=np.int32), np.arange(40, dtype=np.int32)
FILES = np.array([-1.0, -2.0, -3.0], np.float32)
"""What both sides say with the weights that the run began with."""


class Engine:
    """Says what a test writes, by the length of what it scores."""

    def __init__(self, says=FILES, *, starts_from_files=True):
        self.starts_from_files = starts_from_files
        self.version, self.says, self.long = CHECKPOINT_VERSION, says, np.zeros(39, np.float32)

    def score(self, sequences, *, deadline_s):
        return [self.says if len(sequence) == 4 else self.long for sequence in sequences]


def pull(proof, engine, version, *, learner, says, further=(), baseline=None, initial=FILES):
    check = WeightCheck(
        token_ids=IDS,
        logprobs=np.asarray(learner, np.float32),
        version=version,
        further=further,
        initial_logprobs=initial,
        baseline=baseline,
    )
    proof.look_before(check)
    engine.version, engine.says = WeightVersion(version=version, checksum="c"), np.asarray(says, np.float32)
    payload = WeightPayload(identity=engine.version, manifest=(), buffer=np.zeros(0, np.uint8))
    return proof.prove(payload, check, begin=0.0)


def proof_of(engine, *, is_exact=True, asked=None, **model):
    rule = AgreementRule(
        ceiling=1e-3 if is_exact else 0.2,
        floor=2e-4 if is_exact else 0.02,
        is_exact=is_exact,
        on_disagreement=asked,
    )
    given = ModelConfig(model_name_or_path="none", **model)
    return WeightProof(engine, name="rollout-0", model=given, rule=rule, deadline_s=1.0)


def test_an_engine_that_says_what_it_said_before_has_kept_its_weights():
    engine = Engine()
    with pytest.raises(WeightError, match="are not computed with: the engine says what it said before"):
        pull(proof_of(engine), engine, 1, learner=FILES + 0.1, says=FILES)


def test_an_engine_that_agreed_and_moved_but_not_with_the_learner_has_stale_parts():
    engine = Engine()
    with pytest.raises(WeightError, match=r"not all computed with.*names.*tied head.*experts"):
        pull(proof_of(engine), engine, 1, learner=FILES + 0.1, says=FILES + 0.05)


def test_an_engine_that_differs_with_its_own_files_has_other_numerics():
    engine = Engine(FILES + 0.5)
    with pytest.raises(WeightError, match=r"numerics differ: .* apart by 0\.5 nats"):
        pull(proof_of(engine), engine, 0, learner=FILES, says=FILES + 0.5)


def test_an_engine_that_differs_on_long_texts_alone_has_other_numerics_there():
    engine = Engine()
    engine.long = np.full(39, 1.0, np.float32)
    long = ScoredSequence(token_ids=LONG, logprobs=np.zeros(39, np.float32))
    with pytest.raises(WeightError, match="text of 4 tokens agrees, one of 40 does not"):
        pull(proof_of(engine), engine, 0, learner=FILES, says=FILES, further=(long,))


def test_where_nothing_is_known_of_the_files_both_causes_are_named():
    engine = Engine(FILES + 0.5)
    with pytest.raises(WeightError, match=r"are not computed with .*, or the numerics differ"):
        pull(proof_of(engine), engine, 7, learner=FILES, says=FILES + 0.5, initial=None)


def test_files_of_quantised_weights_say_nothing_of_what_is_published():
    engine = Engine(FILES + 0.5)
    report = pull(proof_of(engine, load_in_8bit=True, use_peft=True), engine, 0, learner=FILES, says=FILES)
    assert (report.own_files_mean, report.weight_check_mean) == (None, 0.0)


def test_an_engine_that_began_with_random_weights_says_nothing_of_the_files():
    engine = Engine(FILES + 5.0, starts_from_files=False)
    proof = proof_of(engine)
    report = pull(proof, engine, 0, learner=FILES, says=FILES)
    assert (report.own_files_mean, report.weight_check_mean) == (None, 0.0)
    with pytest.raises(WeightError, match="says what it said before the pull"):
        pull(proof, engine, 1, learner=FILES + 0.5, says=FILES)


def test_weights_that_did_not_arrive_are_told_by_their_version():
    engine = Engine()
    engine.version = WeightVersion(version=3, checksum="c")
    payload = WeightPayload(identity=WeightVersion(version=4, checksum="d"), manifest=(), buffer=np.zeros(0, np.uint8))
    with pytest.raises(WeightError, match="did not arrive"):
        proof_of(engine).prove(payload, None, begin=0.0)


def test_half_precision_is_held_against_version_0_with_a_warning_and_against_the_ceiling_with_an_error():
    engine = Engine()
    proof = proof_of(engine, is_exact=False)
    report = pull(proof, engine, 0, learner=FILES, says=FILES + 0.01)
    assert report.disagreement is None and report.weight_check_mean == pytest.approx(0.01, rel=1e-3)
    report = pull(proof, engine, 1, learner=FILES + 0.1, says=FILES + 0.01, baseline=0.01)
    assert report.disagreement is not None and "says what it said before" in report.disagreement
    with pytest.raises(WeightError):
        pull(proof, engine, 2, learner=FILES + 0.5, says=FILES, baseline=0.01)


def test_warn_goes_on_whatever_is_found():
    engine = Engine()
    report = pull(proof_of(engine, asked=OnDisagreement.WARN), engine, 1, learner=FILES + 5.0, says=FILES)
    assert report.disagreement is not None
