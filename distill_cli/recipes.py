"""Recipes: YAML files of options. Defaults < recipe < key=value < flags; all errors are shown at once. Imports no torch."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from distill_cli.commands import COMMANDS, command_of, config_of, instead, kinds
from distill_cli.config.base import Config, expanded, unexpanded
from distill_cli.errors import UsageError, nearest
from distill_cli.files import reading, write_atomic
from distill_cli.processes import say_hidden

ConfigT = TypeVar("ConfigT", bound=Config)


def folder() -> Path:
    """The folder of the built-in recipes: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """The names of the built-in recipes."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a recipe, by name or by path; raises UsageError if there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if path.exists() and not path.is_dir():
            return path
        raise UsageError(f"--recipe {name}: no such file", "distill recipes ls shows the built-in ones; several processes need a file")
    if name not in names():
        raise UsageError(f"--recipe {name}: no recipe of that name", nearest(name, names()))
    say_hidden("recipe", name, "the built-in one")
    return folder() / f"{name}.yaml"


_PIPED: dict[Path, bytes] = {}
"""Recipes that came through pipes, which can be read only once."""


def text_of(path: Path) -> str:
    """The text of a recipe's file; raises UsageError if it is not UTF-8."""
    with reading(path):
        content = path.read_bytes() if path.is_file() else _PIPED.get(path) or _PIPED.setdefault(path, path.read_bytes())
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file: no UTF-8 at byte {error.start}", "save it as UTF-8") from error


def describe(path: Path) -> str:
    """The comment that a recipe opens with: its command, cost and expected result."""
    lines = takewhile(lambda line: line.startswith("#"), text_of(path).splitlines())
    return "\n".join(line.lstrip("# ").rstrip() for line in lines)


_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error, and 010, 1_000, 1:30 and 2024-01-02 are text, as written."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in known if tag.removeprefix(_TAG) in ("bool", "null", "merge")]
        for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError, MemoryError):
            raise
        except Exception as error:  # a value that does not fit its tag: IndexError, KeyError, AttributeError, ...
            what = repr(node.value[:40]) if isinstance(node, yaml.ScalarNode) else "this"
            raise yaml.MarkedYAMLError(problem=f"{what} is no {node.tag.removeprefix(_TAG)}", problem_mark=node.start_mark) from error


_FLOAT = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(_FLOAT), list("-+.0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"[-+]?(0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$"), list("-+0123456789"))


def _unique(loader: _Loader, node: yaml.Node) -> None:
    """Raise if a key is given twice in a mapping, or in one that `<<` merges into it."""
    seen: set[Any] = set()
    for part in node.value if isinstance(node, yaml.SequenceNode) else ():
        _unique(loader, part)
    for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else ():
        merged = key_node.tag == f"{_TAG}merge"
        key = "<<" if merged else loader.construct_object(key_node)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
        if merged:
            _unique(loader, value_node)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    _unique(loader, node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; raises UsageError that names `source` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError as error:
        raise UsageError(f"{source}: nested too deeply, or in itself") from error
    except MemoryError:
        raise
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{source}{where}: {problem}") from error


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe file, including `command`."""
    data = parse_yaml(text_of(path), str(path))
    if not isinstance(data, dict) or str(data.get("command")) not in COMMANDS:
        raise UsageError(f"{path}: no recipe", f"it needs a line `command: ...` with one of {', '.join(COMMANDS)}")
    return data


def section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def plain_kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation: str and NoneType of `str | None`, str of a choice."""
    if typing.get_origin(annotation) is typing.Literal:
        return {type(choice) for choice in typing.get_args(annotation)}
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    inner = set().union(*map(plain_kinds, typing.get_args(annotation)))
    return inner | {typing.get_origin(annotation) or annotation} - {typing.Union, types.UnionType}


def field_of(config: type[BaseModel], key: str) -> FieldInfo:
    """The field of a key, which may have dots."""
    *sections, last = key.split(".")
    for name in sections:
        config = section(config.model_fields[name].annotation) or config
    return config.model_fields[last]


class _Given(NamedTuple):
    """What a key was given, how errors name it, and how it was given: in a recipe's "file", as "key"=value, or by a "flag"."""

    value: Any
    name: str
    how: str


def _typed(given: _Given, kinds: set[Any]) -> Any:
    """The value of a key of some plain types. Text after `key=` or a flag is YAML, but for keys of text or paths, which take it as it is.

    After `key=` a text that may be None is so for `null`, and a list of text is YAML if it is in brackets, else has one element.
    """
    text, flag = given.value, given.how == "flag"
    if not isinstance(text, str) or given.how == "file":
        return text
    if (list in kinds and text.startswith("[") and not flag) or not kinds <= {str, Path, list, type(None)}:
        value = parse_yaml(text, given.name)
        if value is None and text.strip() not in ("null", "~"):
            raise UsageError(f"{given.name}: is empty ({'null means' if type(None) in kinds else 'leave it out for'} the default)")
        return value
    return None if text == "null" and type(None) in kinds and not flag else text


def keys(config: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a config; keys of sections have dots."""
    out = []
    for name, field in config.model_fields.items():
        inner = section(field.annotation)
        out += keys(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return out


def _flatten(configs: Sequence[type[BaseModel]], data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, and their values; sections are those of any of `configs`."""
    for name, value in data.items():
        fields = [config.model_fields[str(name)] for config in configs if str(name) in config.model_fields]
        inner = [found for field in fields if (found := section(field.annotation))]
        if inner and isinstance(value, Mapping):
            yield from _flatten(inner, value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inner = out
        for name in sections:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return out


def flag_of(key: str) -> str:
    """The flag of a key."""
    return f"--{key.replace('_', '-')}"


def _chosen(config: type[ConfigT], given: dict[str, _Given], errors: list[str]) -> type[ConfigT]:
    """The class of the method that is given, of those that a command has; keys of its other methods are taken out or refused.

    Runs of before wrote the keys of all methods into their recipes: of another method's key in a file, what stands for its default goes.
    """
    choices = {name: kind for name, kind in kinds(command_of(config)).items() if issubclass(kind, config)}
    first = next(iter(choices))
    name = given["method"].value if "method" in given and "method" in config.model_fields else first
    out = choices.get(str(name))
    if out is None:
        names = [f"'{choice}'" for choice in choices]
        errors.append(f"{given.pop('method').name}: input should be {', '.join(names[:-1])} or {names[-1]} (got {name!r})")
    known = keys(out or config)
    for key in [key for key in given if key not in known]:
        others = [kind for kind in choices.values() if key in keys(kind)]
        wrong = given.pop(key)
        if not others:
            where = f"{wrong.name}: " if wrong.how == "flag" else wrong.name.removesuffix(key)
            errors.append(f"{where}unknown key {key} ({instead(command_of(config), key) or nearest(key, known)})")
        elif out is not None and not (wrong.how == "file" and _is_default(wrong.value, key, others)):
            errors.append(f"{wrong.name}: not a key of method {name} ({nearest(key, known)})")
    return out or choices[first]


def _is_default(value: Any, key: str, of: Sequence[type[BaseModel]]) -> bool:
    """Whether a value in a recipe is none, or the key's default in one of some classes."""
    return value is None or any(value == field_of(kind, key).get_default(call_default_factory=True) for kind in of)


def resolve(
    config: type[ConfigT], recipe: str | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> ConfigT:
    """The options of one command from its recipe, `key=value` overrides and flags (None: not given; text is typed by its key).

    `config` is a command's class; where it has several methods, the result is of the class of the method that `method` names.
    Raises UsageError with every problem found, a line each.
    """
    command = command_of(config)
    errors: list[str] = []
    given: dict[str, _Given] = {}
    if recipe is not None:
        path = find(recipe)
        data = read(path)
        if data["command"] != command:
            raise UsageError(f"--recipe {recipe}: made for `distill {data['command']}`, not for `distill {command}`")
        for key, value in _flatten([*kinds(command).values()], {k: v for k, v in data.items() if k != "command"}):
            if key in given:
                errors.append(f"{path}: key {key} is given twice")
            given[key] = _Given(value, f"{path}: {key}", "file")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            errors.append(f"{text}: not of the form key=value")
            continue
        if key in given and given[key].how == "key":
            errors.append(f"{key}: given twice")
        given[key] = _Given(value, key, "key")
    for key, value in (flags or {}).items():
        if value is not None:
            if key in given and given[key].how == "key":
                errors.append(f"{key}: given twice, as {flag_of(key)} and as {key}=")
            given[key] = _Given(value, flag_of(key), "flag")
    chosen = _chosen(config, given, errors)
    values: dict[str, Any] = {}
    for key, each in given.items():
        plain = plain_kinds(field_of(chosen, key).annotation)
        try:
            values[key] = _typed(each, plain)
        except UsageError as error:
            errors.append(error.message)
            continue
        if isinstance(values[key], bool) and not plain & {bool, str}:
            errors.append(f"{each.name}: input should be a number (got {values[key]})")
    try:
        out = chosen.model_validate(_nest(values))
    except ValidationError as error:
        errors += _explain(error, given)
    if errors:
        raise UsageError("\n       ".join(errors), f"distill {command} --help-all shows every key")
    return out


def _explain(error: ValidationError, given: Mapping[str, _Given]) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        names = [str(part) for part in problem["loc"] if part not in ("int", "float", "str") and "[" not in str(part)]
        key = ".".join(name for name in names if not name.isdigit())
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] in ("string_type", "path_type"):
            message = "input should be a valid string: put it in quotes"
        shown = f" (got {problem['input']!r})" if isinstance(problem["input"], str | int | float | list) else ""
        where = given[key].name if key in given else key
        lines.append(f"{where}{': ' if where else ''}{message[:1].lower()}{message[1:]}{shown}")
    return lines


def choices(annotation: Any) -> list[str]:
    """The choices of a Literal type, which may be missing too."""
    parts = typing.get_args(annotation)
    literal = typing.get_origin(annotation) is typing.Literal
    return [choice for part in parts for choice in ([str(part)] if literal else choices(part))]


def _is_path(*parts: Any) -> bool:
    """Whether a value of this annotation is expanded as a path (`expanded`)."""
    return any(getattr(part, "func", None) is expanded or _is_path(*typing.get_args(part)) for part in parts)


def dump(config: Config, comments: bool = False) -> str:
    """A resolved recipe as YAML, which is again a recipe; with comments that explain every key."""
    command = command_of(type(config))
    lines = [f"command: {command}"]

    def add(model: BaseModel, indent: str) -> None:
        for name, field in type(model).model_fields.items():
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                lines.append(f"{indent}{name}:")
                add(value, indent + "  ")
                continue
            plain = model.model_dump(mode="json", include={name})[name]
            if _is_path(field.annotation, *field.metadata):
                plain = [*map(unexpanded, plain)] if isinstance(plain, list) else plain and unexpanded(plain)
            text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
            options = " | ".join(choices(field.annotation))
            note = f"  # {options}{'; ' * bool(options)}{field.description}" if comments and field.description else ""
            lines.append(f"{indent}{name}: {text}{note}")

    add(config, "")
    return "\n".join(lines) + "\n"


def copy(name: str, to: Path) -> Path:
    """Copy a recipe to a file or into a folder; raises UsageError if the file exists."""
    source = find(name)
    path = to / source.name if to.is_dir() else to
    if path.exists():
        raise UsageError(f"{path}: exists already", "choose another name")
    write_atomic(path, text_of(source))
    return path


def check(name: str) -> Config:
    """Resolve a recipe; raises UsageError with every problem found."""
    return resolve(config_of(read(find(name))["command"]), name)
