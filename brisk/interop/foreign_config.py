"""Validation of another program's model config by a table of its keys.

A config is JSON from elsewhere: any key may be missing or hold anything. A `Key` states the values
that are admitted, and `read_config` returns values that need no further check of their own.
"""

import reprlib
from dataclasses import dataclass

from brisk.errors import UserError

REQUIRED = object()  # as a default: the key has to be there
LARGEST_SIZE = 2**31 - 1
KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
KINDS |= {dict: "an object", str: "a string"}


@dataclass(frozen=True)
class Key:
    """Type, range and default of one key of a config.

    Args:
        kind: type of its value; `float` admits whole numbers, and no kind but `bool` admits bools.
        default: its value where the key is absent.
        low, high: bounds of a number, both allowed.
        values: the values that our model computes; none: all of the kind.
        null: whether null is admitted.
        alias: another name of the key.
    """

    kind: type
    default: object = REQUIRED
    low: float = float("-inf")
    high: float = float("inf")
    values: tuple = ()
    null: bool = False
    alias: str = ""

    def admits(self, value):
        if value is None:
            return self.null
        kinds = (int, float) if self.kind is float else (self.kind,)
        if type(value) not in kinds or (self.values and value not in self.values):
            return False
        return self.kind not in (int, float) or self.low <= value <= self.high  # NaN is not

    def wanted(self):
        """The admitted values in words."""
        if self.values:
            return " or ".join(map(str, self.values))
        bounds = f" from {self.low} to {self.high}" if self.kind in (int, float) else ""
        return f"{KINDS[self.kind]}{bounds}"


def size(default=REQUIRED, **more):
    """The `Key` of a number of layers, channels, tokens, …"""
    return Key(int, default, low=1, high=LARGEST_SIZE, **more)


def only(*values):
    """The `Key` of a setting that is computed with these values only; the first is its default."""
    return Key(type(values[0]), values[0], values=values)


WEIGHT_FILES = {  # keys by which any config names other files of weights, or compressed ones
    "transformers_weights": Key(str, None, values=(None,), null=True),
    "quantization_config": Key(dict, None, values=(None,), null=True),
}


def read_config(theirs, table, source):
    """The value of each key of `table` (a dict of `Key`) in the dict `theirs`.

    Raises `UserError`, which begins with `source`, for a key that is missing, has a value that is
    not admitted, or disagrees with its alias.
    """
    found = {}
    for name, key in table.items():
        given = [theirs[each] for each in (name, key.alias) if each in theirs]
        value = found[name] = given[0] if given else key.default
        for each in given:
            if not key.admits(each):
                raise UserError(
                    f"{source}: its config says {name}={shown(each)}, wanted: {key.wanted()}"
                )
        if len(given) == 2 and given[1] != value:
            both = f"{name}={shown(value)} and {key.alias}={shown(given[1])}"
            raise UserError(f"{source}: its config says {both}, which are one setting")
    if missing := [name for name, value in found.items() if value is REQUIRED]:
        raise UserError(f"{source}: its config does not state {', '.join(missing)}")
    return found


def shown(value):
    return value[:100] if isinstance(value, str) else reprlib.repr(value)
