"""The errors a user can act on. Each carries one line: what, where, what to do."""


class OvtqError(Exception):
    """Base of all errors that the command line reports in one line with exit code 2."""


class InputError(OvtqError):
    """A path, file or option given by the user can't be used."""


class UnsupportedModel(OvtqError):
    """The model is not one that `ovtq.models` can describe; says what was looked for and not found."""


class PreconditionFailed(OvtqError):
    """A pass refuses a model it can describe; the model was not touched."""


class VerificationFailed(OvtqError):
    """A result is not what was promised (a pass's postcondition, or the numbers of the converted model)."""
