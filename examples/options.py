"""Command-line options: types that say what they want, and a --help that reads like a manual."""

import argparse
import math
import textwrap
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from typing import Any, NoReturn

import torch


class UserError(Exception):
    """What was asked for cannot be done; the message says why in one sentence."""


class Number:
    """An argparse type: a number in [low, high], or in (low, high] with `above`; else an error that says so."""

    def __init__(self, kind: Callable[[str], float], low: float, high: float, *, above: bool = False) -> None:
        self.kind, self.low, self.high, self.above = kind, low, high, above
        self.wanted = f"a {'whole ' if kind is int else ''}number in {'(' if above else '['}{low:.10g}, {high:.10g}]"

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high or (self.above and value == self.low):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {self.wanted}")
        return value


class Names:
    """An argparse type: some of these names, separated by commas; else an error that says so."""

    def __init__(self, known: Iterable[str]) -> None:
        self.known = tuple(known)

    def __call__(self, text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in self.known]:
            raise argparse.ArgumentTypeError(f"got {unknown[0]!r}, wanted some of {','.join(self.known)}")
        return names


def fraction(text: str) -> float:
    """A number, or two with a slash between them, as eps is usually written: 8/255."""
    try:
        return float(Fraction(text))
    except ZeroDivisionError:
        raise ValueError(text) from None


def device_name(text: str) -> torch.device:
    """An argparse type: auto (an accelerator where there is one), or a torch device that works here."""
    if text == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        torch.zeros(1, device=text).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted auto, or a device that works ({reason})") from None
    return torch.device(text)


class Group:
    """A titled part of --help. The text of each option ends in what it takes and in its default."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, about: str = "") -> None:
        self._group = parser.add_argument_group(title, textwrap.fill(about, 96) or None)

    def option(
        self,
        flag: str,
        kind: Callable[[str], Any],
        default: object,
        meaning: str,
        *,
        shown: str | None = None,
        **more: Any,
    ) -> None:
        """An option with a value; `shown` is what --help says of a default that takes more words than its value."""
        wanted = f"; {kind.wanted}" if isinstance(kind, Number) else ""
        text = f"{meaning}{wanted} (default: {default if shown is None else shown})"
        self._group.add_argument(flag, type=kind, default=default, help=text, **more)

    def choice(
        self, flag: str, choices: Iterable[str], default: str | None, meaning: str, *, shown: str | None = None
    ) -> None:
        """One of several words."""
        text = f"{meaning} (default: {shown or default})"
        self._group.add_argument(flag, choices=tuple(choices), default=default, help=text)

    def switch(self, flag: str, meaning: str) -> None:
        """Off unless given."""
        self._group.add_argument(flag, action="store_true", help=f"{meaning} (default: off)")

    def either(self, flag: str, meaning: str, *, shown: str) -> None:
        """--flag or --no-flag; None where neither is given."""
        text = f"{meaning} (default: {shown})"
        self._group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one sentence: the usage of so many options would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def manual(about: str, examples: str = "", *, operands: str = "") -> argparse.ArgumentParser:
    """A parser whose --help is for reading: from `about` to `examples`, both with their line breaks.

    `operands` is what the command takes besides options, for the line of its usage.
    """
    return Parser(
        usage=f"%(prog)s [options] {operands}".rstrip(),
        description=about,
        epilog=examples,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=100),
        allow_abbrev=False,  # an abbreviation would change its meaning with the next option that is added
    )
