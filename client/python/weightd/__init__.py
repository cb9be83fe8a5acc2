"""weightd moves the weights of a language model from its trainer to its inference engines.

A trainer rank makes an `Actor`, an inference rank an `EngineRank`; every failure is an
`errors.Error`. Importing the package loads no native code, imports no torch, starts no thread and
touches no device.
"""

from weightd import errors
from weightd._group import new_group
from weightd.ack import Ack, EngineDrive, ReplicaOutcome
from weightd.actor import Actor
from weightd.engine import EngineRank
from weightd.engine_client import EngineClient
from weightd.errors import Error

__version__ = "0.1.0"
__all__ = [
    "Ack",
    "Actor",
    "EngineClient",
    "EngineDrive",
    "EngineRank",
    "Error",
    "ReplicaOutcome",
    "errors",
    "new_group",
    "__version__",
]
