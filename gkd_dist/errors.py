"""Every error a user can meet, as one tree.

::

    GkdError                      exit code 1
      ConfigError (ValueError)    2   the configuration is wrong; nothing was started
      DataError                   3   what was read is wrong
        GraphError                    a data set or a graph part
        ModelError                    a model folder, a checkpoint, a layer that is not there
        ManifestError                 a manifest: incomplete, of another graph
          NewerSchemaError              written by a later version; never overwritten
            NewerModelError (ModelError)  the same of a model folder
        ShardError                    a stored object: missing, truncated, flipped byte
        JsonError (ValueError)        a stored object that has to be JSON and is not
      InfrastructureError         4   machines, network, storage; a launcher may try again
        StorageError                  an object store, after retries
          ObjectNotFoundError         one key that is not there
        OwnershipError                another driver holds the run
        TeacherError                  inference actors
        StudentError                  training workers
          NonFiniteLossError          a loss that is NaN or infinite
        TerminatedError           143 SIGTERM, after a last checkpoint

A message has four parts where they apply: what, what was found, what was expected, and the next
action, which always ends it. Classes keep a single positional argument, so that they survive
pickling on their way between processes.
"""

from __future__ import annotations


class GkdError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is the exit status of ``gkd``."""

    exit_code = 1


class ConfigError(GkdError, ValueError):
    """The configuration is wrong. Raised before a process or a device is taken."""

    exit_code = 2


class DataError(GkdError):
    """Something that was read is not what it has to be."""

    exit_code = 3


class GraphError(DataError):
    """A data set, a graph or a graph part is unusable."""


class ModelError(DataError):
    """A model folder, a checkpoint or a layer is missing or does not fit."""


class ManifestError(DataError):
    """A manifest is missing, incomplete, of a newer schema or of something else."""


class NewerSchemaError(ManifestError):
    """A manifest was written by a later version; what it describes is left alone."""


class NewerModelError(NewerSchemaError, ModelError):
    """A model was written by a later version; it is left alone."""


class ShardError(DataError):
    """A stored object is missing, truncated or altered."""


class JsonError(DataError, ValueError):
    """A stored object is not the JSON it has to be."""


class InfrastructureError(GkdError):
    """Machines, network or storage failed; the same command may succeed later."""

    exit_code = 4


class StorageError(InfrastructureError):
    """An object store could not be used."""


class ObjectNotFoundError(StorageError):
    """A key is not in the store."""


class OwnershipError(InfrastructureError):
    """Another driver owns the run."""


class TeacherError(InfrastructureError):
    """Inference actors could not finish."""


class StudentError(InfrastructureError):
    """Training workers could not finish."""


class NonFiniteLossError(StudentError):
    """A loss became NaN or infinite; training stopped before the optimizer saw it."""

    exit_code = 3


class TerminatedError(InfrastructureError):
    """SIGTERM came: training kept a checkpoint of its last step and ended."""

    exit_code = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM came where there is nothing to keep first: ends the command at once, like Ctrl-C does."""
