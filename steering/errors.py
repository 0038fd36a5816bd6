"""The exceptions of this room: a request's steering that cannot be applied, and which field says so."""


class SteeringError(ValueError):
    """Bad steering. `param` is the path below the steering entry, such as "where.prompt"; "" is the entry itself."""

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message)
        self.param = param


class NotServed(SteeringError):
    """Sound steering that this server cannot do; the message says how another could be started."""


class VectorMismatch(SteeringError):
    """A sound vector that does not fit the served model."""
