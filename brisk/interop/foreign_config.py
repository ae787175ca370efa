"""Validate the model config of another program against a table of its keys.

Any key of such a JSON file may be missing or invalid. A `Key` defines the allowed values.
"""

import reprlib
from dataclasses import dataclass

from brisk.errors import UserError

REQUIRED = object()  # the default of a key without a default
LARGEST_SIZE = 2**31 - 1
KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
KINDS |= {dict: "an object", str: "a string"}


@dataclass(frozen=True)
class Key:
    """Type, range and default of one key of a config.

    Args:
        kind: type of the value. `float` allows integers; only `bool` allows bools.
        default: value if the key is absent.
        low, high: inclusive bounds of a number.
        values: the values that our model supports; if empty, all values of the kind.
        null: allow null.
        alias: another name of the key.
    """

    kind: type
    default: object = REQUIRED
    low: float = float("-inf")
    high: float = float("inf")
    values: tuple = ()
    null: bool = False
    alias: str = ""

    def allows(self, value):
        if value is None:
            return self.null
        kinds = (int, float) if self.kind is float else (self.kind,)
        if type(value) not in kinds or (self.values and value not in self.values):
            return False
        return self.kind not in (int, float) or self.low <= value <= self.high  # False for NaN

    def expected(self):
        """The allowed values in words."""
        if self.values:
            return " or ".join(map(str, self.values))
        bounds = f" from {self.low} to {self.high}" if self.kind in (int, float) else ""
        return f"{KINDS[self.kind]}{bounds}"


def size(default=REQUIRED, **more):
    """A `Key` for a number of layers, channels, tokens, …"""
    return Key(int, default, low=1, high=LARGEST_SIZE, **more)


def only(*values):
    """A `Key` for which our model supports only these values. The first is the default."""
    return Key(type(values[0]), values[0], values=values)


WEIGHT_FILES = {  # keys of any config that select other weight files or quantized weights
    "transformers_weights": Key(str, None, values=(None,), null=True),
    "quantization_config": Key(dict, None, values=(None,), null=True),
}


def read_config(theirs, table, source):
    """Return {name: value} of the keys in `table` (a dict of `Key`), from the dict `theirs`.

    Raises `UserError`, prefixed with `source`, for a key that is missing, has an unsupported value,
    or contradicts its alias.
    """
    found = {}
    for name, key in table.items():
        given = [theirs[each] for each in (name, key.alias) if each in theirs]
        value = found[name] = given[0] if given else key.default
        for each in given:
            if not key.allows(each):
                raise UserError(
                    f"{source}: its config has {name}={shown(each)}; expected {key.expected()}"
                )
        if len(given) == 2 and given[1] != value:
            both = f"{name}={shown(value)} and {key.alias}={shown(given[1])}"
            raise UserError(f"{source}: its config has {both}, two names of one setting")
    if missing := [name for name, value in found.items() if value is REQUIRED]:
        raise UserError(f"{source}: its config has no {', '.join(missing)}")
    return found


def shown(value):
    return value[:100] if isinstance(value, str) else reprlib.repr(value)
