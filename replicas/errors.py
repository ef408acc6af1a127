"""Every error that trimode raises on purpose.

    TrimodeError
    ├── CheckpointError      a model folder that cannot be served; names the file, key or tensor
    ├── ConfigError          a setting that cannot work; names the setting and its limit
    └── RequestError         one request's fault or fate; never anybody else's
        ├── InvalidRequest   a field is wrong; names the field and the limit
        ├── Overloaded       no room now; try again or elsewhere
        └── Unavailable      no replica can take it, or the one that had it is gone

The gateway maps these to gRPC status codes; anything else is a bug and is shown as such, without a
trace.
"""


class TrimodeError(Exception):
    """Base of all errors raised on purpose."""


class CheckpointError(TrimodeError):
    """A model folder is not what it should be."""


class ConfigError(TrimodeError):
    """A setting is missing, unknown or out of range."""


class RequestError(TrimodeError):
    """Base of errors that concern one request only."""


class InvalidRequest(RequestError):
    """A field of a request is wrong.

    field: the name as the API spells it. reason: what is wrong and what the limit is.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)  # both, so that the error survives a process boundary
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class Overloaded(RequestError):
    """The queue in question is full; the message says which and how long it is."""


class Unavailable(RequestError):
    """No replica can serve the request at the moment."""
