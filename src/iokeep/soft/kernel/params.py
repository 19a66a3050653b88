# SPDX-License-Identifier: Apache-2.0
"""The kernel command line: ``--param key=value`` words, read by name with a type and a default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from iokeep.errors import UsageError


class Params:
    """Parameters of one boot. Unknown keys are kept: the module that owns them reads them.

    :param values: key -> text.
    """

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._values = dict(values or {})

    @classmethod
    def parse(cls, words: Iterable[str]) -> Params:
        """From ``key=value`` words; a bare ``key`` means ``key=1``. :raises UsageError: an empty key."""
        values = {}
        for word in words:
            key, sep, value = word.partition("=")
            if not key:
                raise UsageError(f"kernel parameter {word!r} has no name", "write --param key=value")
            values[key] = value if sep else "1"
        return cls(values)

    def text(self, key: str, default: str = "") -> str:
        """The value of ``key``."""
        return self._values.get(key, default)

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """The value of ``key``, one of ``allowed``. :raises UsageError: another value."""
        value = self._values.get(key, default)
        if value not in allowed:
            raise UsageError(f"kernel parameter {key}={value}: must be one of {', '.join(allowed)}")
        return value

    def number(self, key: str, default: int) -> int:
        """The value of ``key`` as an integer (decimal or 0x...). :raises UsageError: not a number."""
        value = self._values.get(key)
        if value is None:
            return default
        try:
            return int(value, 0)
        except ValueError as error:
            raise UsageError(f"kernel parameter {key}={value}: not a number") from error

    def flag(self, key: str) -> bool:
        """True where ``key`` is set to 1, y, yes, on or true. :raises UsageError: an unclear value."""
        value = self._values.get(key, "0").lower()
        if value in ("1", "y", "yes", "on", "true"):
            return True
        if value in ("0", "n", "no", "off", "false", ""):
            return False
        raise UsageError(f"kernel parameter {key}={value}: must be on or off")

    def items(self) -> list[tuple[str, str]]:
        """All parameters, in the order given."""
        return list(self._values.items())

    def words(self) -> list[str]:
        """The ``key=value`` words again."""
        return [f"{key}={value}" for key, value in self._values.items()]
