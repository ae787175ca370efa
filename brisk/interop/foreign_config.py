"""Validation of another program's model config."""

from brisk.errors import UserError


def check_computed(theirs, computed, source):
    """Raise `UserError` where a setting of theirs is not among those that we compute."""
    for key, (default, values) in computed.items():
        if (value := theirs.get(key, default)) not in values:
            wanted = " or ".join(str(value) for value in values)
            raise UserError(f"{source}: its config says {key}={value}, this model has {wanted}")
