"""The exception tree: every error a user or a caller can meet, each also a standard-library error.

    TrlRayError
    ├── InputError        the input was wrong; nothing was started          -> exit code 2
    │   ├── ConfigError       a key, a value, or two values that contradict
    │   ├── DataError         a dataset, a row, or a column
    │   ├── ModelError        a model, a tokenizer, or a chat template
    │   └── ResourceError     the plan needs what the machine or cluster lacks
    ├── RunError          the run failed after it had started              -> exit code 3
    │   ├── ActorLostError    an actor died; whether its last call ran is unknown
    │   │   ├── LearnerLostError  the learner did; it restarts from the last checkpoint
    │   │   ├── StartError        its constructor raised, as it would again
    │   │   └── AnswerLostError   what an actor had left in the object store is gone
    │   ├── ClusterLostError  Ray's head, or Ray on the driver's node, is gone
    │   ├── DeadlineError     an actor or a wait did not answer within its deadline
    │   ├── StallError        work remains, yet nothing has moved
    │   ├── EngineError       an inference engine failed, hung, or holds wrong weights
    │   ├── WeightError       weights do not match their manifest, checksum or weight check
    │   ├── AgreementError    sampler and learner are not the same policy
    │   ├── NumericsError     NaN or infinity where a finite number must be
    │   ├── CheckpointError   a checkpoint is missing, truncated, or of another run
    │   ├── JournalError      the ledger's journal cannot be read or written
    │   ├── RewardError       a reward function failed, beyond what the run may drop
    │   ├── TeacherError      a teacher failed, hung, or answered what cannot be true
    │   └── CallbackError     a callback raised, or asked for what the run cannot do
    └── InterruptedRun    Ctrl-C or SIGTERM; a checkpoint was written       -> exit code 130

Messages say what must hold, what was given, and what to do. No class takes more than one message, so that
every error survives pickling between processes.
"""


class TrlRayError(Exception):
    """Root of every error this package raises on purpose."""


class InputError(TrlRayError, ValueError):
    """The user's input was wrong, and nothing was started or written."""


class ConfigError(InputError):
    """A configuration key is unknown, a value is not allowed, or two values contradict each other."""


class DataError(InputError):
    """A dataset cannot be read, is empty, or has a row or column that cannot be used."""


class ModelError(InputError):
    """A model, its tokenizer or its chat template cannot be used."""


class ResourceError(InputError):
    """The plan needs CPUs, GPUs, memory, a port or a cluster that is not there."""


class RunError(TrlRayError, RuntimeError):
    """The run failed after it had started."""


class ActorLostError(RunError):
    """An actor died. Whether its last call took effect is unknown; the ledger settles it."""


class LearnerLostError(ActorLostError):
    """The learner died or hung. It restarts as a whole, from the last checkpoint."""


class StartError(ActorLostError):
    """An actor's constructor raised. Another try would most likely meet the same."""


class AnswerLostError(ActorLostError):
    """What an actor had left in the object store is gone, with the node that held it."""


class ClusterLostError(RunError):
    """Ray's head, or Ray on the driver's node, is gone, and every actor with it."""


class DeadlineError(RunError, TimeoutError):
    """An actor or a wait did not answer within its deadline."""


class StallError(RunError):
    """Work remains, yet neither the ledger nor the learner has moved for too long."""


class EngineError(RunError):
    """An inference engine failed or hung and must be replaced."""


class WeightError(RunError):
    """Weights do not match their manifest, their checksum or the weight check."""


class AgreementError(RunError):
    """Sampler and learner are not the same policy although they hold the same weights."""


class NumericsError(RunError, ArithmeticError):
    """NaN or infinity where a finite number must be."""


class CheckpointError(RunError):
    """A checkpoint is missing, truncated, or belongs to another run."""


class JournalError(RunError):
    """The journal of the ledger cannot be read or written."""


class RewardError(RunError):
    """A reward function failed more often than the run may drop."""


class TeacherError(RunError):
    """A teacher failed, did not answer in time, or answered what cannot be true; nothing is trained on it."""


class CallbackError(RunError):
    """A callback of the user's raised, or asked for what the run cannot do."""


class InterruptedRun(TrlRayError):
    """The run was interrupted by a signal; a checkpoint was written first."""
