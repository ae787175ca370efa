"""Configuration: a dataclass of defaults, overridden by config files and `--key=value`, checked.

    $ python train.py config/train_shakespeare_char.py --batch_size=32

applies the arguments in order: the config file first, then the override. `--eval_only` is short for
`--eval_only=True`. A config file is plain Python: assignments to the keys of the dataclass, with
the current value of every key and `os, time, math, pickle, np, torch` in scope, so `min_lr =
learning_rate / 10` works.

A script declares its settings once, as a dataclass; a field's trailing comment is its help line:

    @dataclass
    class TrainConfig:
        batch_size: PositiveInt = 12  # sequences in a micro-batch
        dtype: Literal["auto", "float32"] = "auto"  # precision of the products

    config = configure(TrainConfig, sys.argv[1:])
"""

import ast
import difflib
import importlib
import inspect
import math
import os
import re
import sys
import textwrap
import traceback
import warnings
from dataclasses import fields, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from brisk.errors import UserError, did_you_mean
from brisk.renamed_keys import RENAMED_KEYS, new_key

# Bounds are inclusive.
PositiveInt = Annotated[int, (1, math.inf)]
NonNegativeInt = Annotated[int, (0, math.inf)]
NonNegativeFloat = Annotated[float, (0, math.inf)]
UnitFloat = Annotated[float, (0, 1)]
Seed = Annotated[int, (0, 2**63 - 1)]
LARGEST_INT = 2**63 - 1  # PyTorch and numpy count in int64

# Common names of these keys in other programs, for the hint in an error message.
ALIASES = {"lr": "learning_rate", "bs": "batch_size", "wd": "weight_decay", "steps": "max_iters"}
ALIASES |= {"epochs": "max_epochs", "iters": "max_iters", "layers": "n_layer", "heads": "n_head"}
ALIASES |= {"hidden_size": "n_embd", "seq_len": "block_size", "context": "block_size", "k": "top_k"}
ALIASES |= {"temp": "temperature", "n": "num_samples", "prompt": "start", "resume": "init_from"}
ALIASES |= {"length": "max_new_tokens", "model": "init_from", "output_dir": "out_dir"}
ALIASES |= {"max_tokens": "max_new_tokens", "data": "dataset", "text": "input"}

PATH_KEYS = ("out_dir", "data_dir", "input", "init_from", "out", "prompts", "to", "gguf")

IN_SCOPE = {
    "os": "os",
    "time": "time",
    "math": "math",
    "pickle": "pickle",
    "np": "numpy",
    "torch": "torch",
}


def configure(Config, argv):
    """Build a `Config` from its defaults and the arguments `argv`: config files and `--key=value`.

    If `Config` has a field `given`, it is set to the names of the keys that a config file or the
    command line set, the one set last at the end. `--help` prints every key and exits with status
    0.

    Raises `UserError` for a config file that fails, an unknown key, a value of the wrong type, or a
    file that sets two keys that `Config.exclusive` lists together.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(Config))
        sys.exit(0)
    types = key_types(Config)
    values, given = as_dict(Config()), ()

    def set_key(key, value, where):
        nonlocal given
        values[key] = checked(value, types[key], key, where)
        given = append_keys(given, key)

    paths = [a for a in argv if not (a.startswith("-") or "=" in a or a.endswith(".py"))]
    if len(paths) > 1:
        raise UserError(f"{paths[0]} and {paths[1]}: only one can be named")
    for argument, following in zip_longest(argv, argv[1:], fillvalue=""):
        if argument.startswith("-"):
            key, equals, text = argument.lstrip("-").partition("=")
            key = new_key(key.replace("-", "_"))
            if key not in types:
                near = f"; did you mean {ALIASES[key]}?" if ALIASES.get(key) in types else ""
                near = near or did_you_mean(key, types)
                raise UserError(f"unknown key --{key}{near} (--help lists them all)")
            if not equals and bool in options(types[key]):
                text = "True"
            elif not equals:
                example = following if not following.startswith("-") else ""
                raise UserError(
                    f"--{key} needs a value after =, as in --{key}={example or values[key]}"
                )
            if key in PATH_KEYS and text.startswith("~"):  # which the shell leaves after a "="
                text = os.path.expanduser(text)
            set_key(key, parsed(text, types[key]), "on the command line")
        elif "=" in argument and not os.path.exists(argument):
            raise UserError(f"'{argument}' should start with dashes: --{argument}")
        elif not argument.endswith(".py"):
            set_key(*key_for_path(argument, types), "on the command line")
        else:
            assigned = run_config_file(argument, values, types)
            for keys in getattr(Config, "exclusive", ()):
                if assigned.keys() >= set(keys):
                    raise UserError(f"{argument} sets {' and '.join(keys)}; remove one of them")
            for key, value in assigned.items():
                set_key(key, value, f"in {argument}")
    if "given" in Config.__dataclass_fields__:
        values["given"] = given
    return Config(**values)


def key_for_path(path, types):
    """The (key, value) that a bare path on the command line sets: `out_dir` for a run's folder,
    `init_from` for a checkpoint or a Hugging Face directory. Raises `UserError` with the right
    spelling for any other path, and in train.py for every path."""
    if os.path.isdir(path) and "input" in types:
        resume = f"--init_from=resume --out_dir={path}"
        raise UserError(
            f"{path} is a folder: --input={path} trains on its text, {resume} resumes its run"
        )
    if "init_from" in types and "input" not in types:
        if any(os.path.exists(os.path.join(path, name)) for name in ("ckpt.pt", "last.pt")):
            return "out_dir", path
        if path.endswith(".pt") or os.path.exists(os.path.join(path, "config.json")):
            return "init_from", path
        if os.path.isdir(path):
            raise UserError(f"{path} has no checkpoint in it: neither ckpt.pt nor last.pt")
    if "input" in types and os.path.exists(path):
        raise UserError(f"{path} is not a config file (*.py); to train on it: --input={path}")
    others = (
        "" if "input" in types or "init_from" not in types else ", a run's folder or a checkpoint"
    )
    raise UserError(f"{path} is not a config file (*.py){others}{nearest_config(path)}")


def nearest_config(path):
    """`; did you mean …?` with the config file whose name is closest to `path`, or ""."""
    known = {file.name: str(file) for file in sorted(Path("config").rglob("*.py"))}
    near = difflib.get_close_matches(Path(path).name, known, 1, 0.6)
    return f"; did you mean {known[near[0]]}?" if near else ""


def append_keys(given, *keys):
    """`given` with `keys` at the end, without duplicates: the last occurrence stays."""
    every = (*given, *keys)
    return tuple(key for i, key in enumerate(every) if key not in every[i + 1 :])


def with_values(config, values):
    """`config` with the dict `values` applied, as if given after all other keys."""
    return replace(config, **values, given=append_keys(config.given, *values))


def key_types(Config):
    """{key: type} of the settings of a script."""
    types = get_type_hints(Config, include_extras=True)
    return {field.name: types[field.name] for field in fields(Config) if field.name != "given"}


def run_config_file(path, values, types):
    """Run one config file with the current `values` in scope. Returns {key: value} of the keys of
    this script that it assigned."""
    try:
        source = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors write the mark
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an invalid path
        reason = f"{getattr(error, 'strerror', None) or error}{nearest_config(path)}"
        raise UserError(f"cannot read the config file {path}: {reason}") from error
    before = {**values}
    before |= {old: values[new] for old, new in RENAMED_KEYS.items() if new in values}
    before |= {name: importlib.import_module(module) for name, module in IN_SCOPE.items()}
    scope = {**before, "__file__": str(path), "__name__": "config"}
    try:
        exec(compile(source, str(path), "exec"), scope)  # config files are Python, by design
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    assigned = assigned_names(source)
    ours = {}
    for name, value in scope.items():
        unchanged = name in before and value is before[name] and name not in assigned
        if unchanged or name.startswith("_") or callable(value) or isinstance(value, ModuleType):
            continue
        if new_key(name) in types:
            ours[new_key(name)] = value
        elif new_key(name) not in keys_of_all_scripts():
            if near := did_you_mean(name, types):
                helper = "start the names of your own variables with _"
                raise UserError(f"{path}: unknown key {name} ({helper}){near}")
            print(f"{path}: note: {name} is not a key of any script; ignored", file=sys.stderr)
    return ours


def checked(value, kind, key, where):
    """`value` converted to the type `kind`. If its type or range is wrong, raises `UserError` with
    the key, the place `where` and the legal values."""
    if isinstance(value, bool | int | float | str):
        plain = value
    elif hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        plain = value.item()  # a numpy or torch scalar
    else:
        raise UserError(f"{key} {where} is {type(value).__name__}; it takes {describe(kind)}")

    for option in options(kind):
        option, low, high = with_bounds(option)
        if get_origin(option) is Literal:
            matches = plain in get_args(option) and not isinstance(plain, bool)
        elif option is float:
            matches = isinstance(plain, int | float) and not isinstance(plain, bool)
        elif option is int:
            whole = isinstance(plain, float) and plain.is_integer()
            matches = whole or (isinstance(plain, int) and not isinstance(plain, bool))
        else:
            matches = isinstance(plain, option)
        if matches and option in (int, float):
            limit = LARGEST_INT if option is int else sys.float_info.max
            matches = low <= plain <= high and abs(plain) <= limit
        if matches:
            return plain if get_origin(option) is Literal else option(plain)

    near = did_you_mean(str(plain), choices(kind)) if isinstance(plain, str) else ""
    raise UserError(f"{key}={plain!r} {where}: {key} takes {describe(kind)}{near}")


def check_values(config, where):
    """Check every setting against the type of its key. Raises `UserError`, which names `where` the
    settings come from."""
    for key, kind in key_types(type(config)).items():
        checked(getattr(config, key), kind, key, where)


def parsed(text, kind):
    """Parse `text` from the command line as a Python literal, except for a str key."""
    if kind is str:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in the text
            return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def options(kind):
    """The members of a union type, or the type itself, as a tuple."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def with_bounds(option):
    """(type, lowest, highest) of a member of a union; without bounds they are infinite."""
    if get_origin(option) is Annotated:
        option, (low, high) = get_args(option)
        return option, low, high
    return option, -math.inf, math.inf


def choices(kind):
    """The words that the type `kind` allows: those of a Literal, True and False of a bool."""
    words = []
    for option in options(kind):
        words += ["True", "False"] if option is bool else []
        words += get_args(option) if get_origin(option) is Literal else []
    return words


def describe(kind):
    """The legal values of the type `kind` in words, for error messages."""
    words = choices(kind)
    for option in options(kind):
        option, low, high = with_bounds(option)
        if name := {int: "a whole number", float: "a number", str: "text"}.get(option):
            if high < math.inf:
                name += f" from {low} to {high}"
            elif low > -math.inf:
                name += f" of at least {low}"
            words.append(name)
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def help_text(Config):
    """The script's docstring, then every key of `Config` with its default, trailing comment and
    legal values, under the headings of the class."""
    lines = [inspect.getdoc(inspect.getmodule(Config)) or "", ""]
    lines += ["Settings, as --key=value or as `key = value` in a config file:"]
    types, defaults = key_types(Config), as_dict(Config())
    for heading, comments in help_groups(Config).items():
        lines += ["", *([f"{heading}:"] if heading else [])]
        for key, comment in comments.items():
            values = f" [{legal_values(types[key])}]" if types[key] is not str else ""
            lines.append(f"  {f'--{key}={defaults[key]}':<36} {comment}{values}")
    if start_keys := getattr(Config, "start_keys", ()):
        run_keys = [key for key in types if key not in start_keys]
        lines += [
            "",
            "Keys that --init_from=resume does not take from the checkpoint:",
        ]
        lines += ["", *indent(start_keys), ""]
        lines += ["Keys that it does take from there, unless they are given again:"]
        lines += ["", *indent(run_keys)]
    return "\n".join(lines)


def indent(keys):
    """`keys` as indented lines of at most 96 characters."""
    return textwrap.wrap(" ".join(keys), 96, initial_indent="  ", subsequent_indent="  ")


def legal_values(kind):
    """The legal values of the type `kind` for --help, such as "int >= 1" or "adamw|muon"."""
    words = choices(kind)
    for option in options(kind):
        option, low, high = with_bounds(option)
        if option in (int, float, str):
            bounds = f" in [{low}, {high}]" if high < 2**62 else f" >= {low}"
            words.append(option.__name__ + (bounds if low > -math.inf else ""))
    return "|".join(words)


def help_groups(Config):
    """{heading: {key: trailing comment}} of the fields of `Config` and its base classes. A heading
    is a comment of one or two words on its own line; inherited fields without a heading are listed
    under "model"."""
    groups, seen = {}, {"given"}
    for kind in filter(is_dataclass, Config.__mro__):
        heading = "" if kind is Config else "model"
        for line in inspect.getsource(kind).splitlines():
            if found := re.fullmatch(r"    # (\w+(?: \w+)?)", line):
                heading = found[1]
            elif (found := re.match(r"    (\w+):.*?(?:  # (.*))?$", line)) and found[1] not in seen:
                seen.add(found[1])
                groups.setdefault(heading, {})[found[1]] = found[2] or ""
    return groups


def help_lines(Config):
    """{key: trailing comment} of all keys of `Config`."""
    return {key: line for group in help_groups(Config).values() for key, line in group.items()}


def keys_of_all_scripts():
    """The keys of every script in this folder, parsed from the source without importing it."""
    keys = set()
    for script in Path(__file__).parent.glob("*.py"):
        for node in ast.parse(script.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                keys |= {a.target.id for a in node.body if isinstance(a, ast.AnnAssign)}
    return keys - {"given"}


def assigned_names(source):
    """Names that the source assigns at module level. With them `x = x` counts as given."""
    scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    scopes += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    names, nodes = set(), [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, scopes)]
    return names


def as_dict(config):
    """The settings as a plain dict, without `given`."""
    return {key: getattr(config, key) for key in key_types(type(config))}
