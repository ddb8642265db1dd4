"""One line for each way a configuration can be wrong.

jsonargparse reports a mistake deep in a tree of classes as a page of nested messages.  Each nested
parser knows the class it builds and the options that class has, so the reason is written there,
between two marks, and every parser on the way out puts its own key in front:

    config error: model.drafter: option 'dpeth' is not accepted by DraftModel; did you mean 'depth'?
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

MARKED = re.compile(r"\x02(?P<path>[^\x02\x03]*)\x02(?P<reason>[^\x02\x03]*)\x03")
KEY = re.compile(r'Parser key "([^"]+)"')
LONGEST = 300


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line."""


class OneLineErrors(ArgumentParser):
    """Mixed into a parser class: its errors are ConfigErrors of one line; nothing is printed."""

    built_class: str | None = None

    def add_class_arguments(
        self, theclass: Any, nested_key: str | None = None, *args: Any, **options: Any
    ) -> Any:
        if nested_key is None:
            self.built_class = getattr(theclass, "__name__", None)
        return super().add_class_arguments(theclass, nested_key, *args, **options)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **options: Any
    ) -> Any:
        """Parse arguments, the null among them of an option of a class within a class.

        jsonargparse reads such a null where it is given, and hands it down to the inner class's
        parser as Python writes it, `--option=None`.
        """
        if args is not None and self.built_class is not None:
            args = [re.sub(r"^(--[\w.]+)=None$", r"\1=null", word) for word in args]
        return super().parse_args(args, *others, **options)

    def format_help(self, *args: Any, **options: Any) -> str:
        """Return the help; where any module may be given, without a list of all those of torch."""
        for action in self._actions:
            if hasattr(action, "extra_help") and "torch.nn." in action.extra_help():
                action.extra_help = str
        return super().format_help(*args, **options)

    def validate(  # type: ignore[override]
        self, namespace: Any, skip_unset: bool = True, skip_required: bool = False, **options: Any
    ) -> None:
        """Check values, a null among them that an option of a class within a class does not take.

        jsonargparse takes each null for an option that was not given.
        """
        super().validate(namespace, skip_unset, skip_required, **options)
        if self.built_class is not None:
            super().validate(namespace, False, True, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        marked = MARKED.search(message)
        before = message[: marked.start()] if marked else message
        keys = [key for key in KEY.findall(before) if key != "config"]
        if marked:
            path, reason = marked["path"], marked["reason"]
        else:
            path, reason = explain(message, self.built_class, self._option_names())
        path = ".".join(part for part in [*keys, path] if part).replace(".init_args.", ".")
        if not self.exit_on_error:
            raise ArgumentError(None, f"\x02{path}\x02{reason}\x03") from ex
        raise ConfigError(
            f"config error: {path}: {reason}" if path else f"config error: {reason}"
        ) from ex

    def instantiate_classes(self, cfg: Any, **options: Any) -> Any:
        """Build what `cfg` names; a constructor's ValueError is reported with the key it is for."""
        try:
            return super().instantiate_classes(cfg, **options)
        except ValueError as error:
            refusal = constructor_refusal(str(error))
            if refusal is None:
                raise
            reason, value = refusal
            path = key_of(value, cfg)
            raise ConfigError(
                f"config error: {path}: {reason}" if path else f"config error: {reason}"
            ) from error

    def _option_names(self) -> list[str]:
        return [
            action.dest for action in self._actions if action.dest not in ("help", "==SUPPRESS==")
        ]


def explain(message: str, class_name: str | None, options: list[str]) -> tuple[str, str]:
    """Where and why, for one message of jsonargparse without its nesting.

    class_name: what the options belong to.  options: the names it accepts, dotted.
    """
    if found := re.search(r"[Oo]ption '([^']+)' is not accepted", message):
        return not_accepted(found[1], class_name, options)
    if found := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return not_accepted(f"{found[1]}.{found[2]}", class_name, options)
    if found := re.search(r"unrecognized arguments: -*(\S+)", message):
        return not_accepted(found[1].split("=")[0], class_name, options)
    if found := re.search(r"argument --(\S+): expected one argument", message):
        return found[1], f"needs a value: --{found[1]} VALUE"
    if found := re.search(r"arguments are required: (.+)", message):
        owner = f" of {class_name}" if class_name else ""
        return "", f"required{owner} and not given: {found[1]}"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return "", no_class(found[1], found[2])
    if found := re.search(r"Problem with given class_path '([^']+)':\s*(.+)", message):
        return "", f"class_path '{found[1]}' cannot be used: {plain(found[2])}"
    if found := re.search(r"File does not exist: '?([^'\n]+)", message):
        return "", f"there is no file '{found[1]}'"
    if mismatch := wrong_type(message):
        return mismatch
    return "", plain(KEY.sub("", message))


def not_accepted(option: str, class_name: str | None, options: list[str]) -> tuple[str, str]:
    """Where and why, for an option that nothing accepts, with the nearest that is."""
    path, _, name = option.rpartition(".")
    prefix = f"{path}." if path else ""
    accepted = {o.removeprefix(prefix).split(".")[0] for o in options if o.startswith(prefix)}
    accepted -= {"help", "print_config", "print_shtab"}  # the parser's own
    near = get_close_matches(name, sorted(accepted), 1)
    owner = f" by {class_name}" if class_name else ""
    hint = f"; did you mean '{near[0]}'?" if near else ""
    if not near and class_name and accepted:
        hint = f"; accepted are {', '.join(sorted(accepted))}"
    return path, f"option '{name}' is not accepted{owner}{hint}"


def no_class(module: str, name: str) -> str:
    """Why, for a class_path whose last part does not exist, with the nearest that does."""
    names = getattr(sys.modules.get(module), "__all__", [])
    near = get_close_matches(name, names, 1)
    hint = (
        f"; did you mean '{near[0]}'?"
        if near
        else f"; there are {', '.join(names)}"
        if names
        else ""
    )
    return f"there is no class '{name}' in {module}{hint}"


def readable_types(message: str) -> str:
    """Type hints as a user reads them: a Literal is its choices, a factory what it makes."""
    choices = re.sub(r"typing\.Literal\[([^\]]*)\]", lambda m: m[1].replace(", ", " or "), message)
    return re.sub(
        r"(?:collections\.abc|typing)\.Callable\[\[[^\]]*\], (?:\w+\.)*(\w+)\]", r"\1", choices
    )


def wrong_type(message: str) -> tuple[str, str] | None:
    """Where and why, for a value of the wrong type; None for any other message."""
    message = readable_types(message)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if value is None:
        return None
    shown, path = value[1].strip(), ""
    if nested := re.match(r"NestedArg\(key='(.*)', val='(.*)'\)", shown):
        path, shown = nested[1].rstrip("+"), nested[2]
    if found := re.search(r"Expected a dot import path string: (.+)", message):
        return path, f"'{found[1].strip()}' is not the path of a class"
    if found := re.match(r"Namespace\(class_path='([^']+)'", shown):
        shown = found[1]
    if shown.startswith("{'init_args'"):
        return path, "has init_args and no class_path: give an overlay after what it is laid over"
    subtypes = re.search(r"Subtypes: \[(.*)\]", message)
    expected = (
        subtypes[1].split(", ")
        if subtypes
        else re.findall(r"Expected an? (<class '[^']+'>|[^.\n]+)", message)
    )
    names = [
        re.sub(r"<(?:class|enum) '(?:.*\.)?([^']+)'>", r"\1", name).replace("NoneType", "null")
        for name in expected
    ]
    if not names:
        return None
    got = "null" if shown == "None" else f"'{shown[:80]}'"
    return path, f"expected {' or '.join(dict.fromkeys(names))}, got {got}"


def constructor_refusal(message: str) -> tuple[str, str] | None:
    """Why a constructor refused, and the value it was built from; None for any other message.

    jsonargparse wraps what the class said once for each optional class around it.
    """
    if "Does not validate against any of the Union subtypes" not in message:
        return None
    wrapping = ("- Expected", "- Does not validate", "- Import path ")  # of the other classes
    lines = [line.strip() for line in message.splitlines()]
    for number, line in enumerate(lines):
        if line.startswith("- ") and not line.startswith(wrapping):
            values = (rest for rest in lines[number:] if rest.startswith("Given value: "))
            return plain(line[2:]), next(values, "").removeprefix("Given value: ")
    return None


def key_of(shown: str, config: Any, key: str = "") -> str:
    """Return the dotted key of the value that is shown as `shown`; empty where there is none."""
    if key and str(config) == shown:
        return key.replace(".init_args", "")
    if not isinstance(config, Namespace):
        return ""
    inner = (
        key_of(shown, value, f"{key}.{name}".strip(".")) for name, value in vars(config).items()
    )
    return next(filter(None, inner), "")


def plain(text: str) -> str:
    """One line of readable length."""
    line = " ".join(text.split()).strip(": ")
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
