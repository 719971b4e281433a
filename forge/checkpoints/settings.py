"""The numbers of a config.json, checked: it comes from a stranger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from forge.errors import FormatError, UnsupportedError
from forge.formats.source import show
from forge.formats.strict_json import Json, show_json

MAX_INT = 2**31 - 1
MAX_LAYERS = 1024
MAX_HEAD_DIM = 1 << 16

_OLD_ROPE = {
    "rope_theta": "rope_theta rotary_emb_base",
    "partial_rotary_factor": "partial_rotary_factor rotary_pct",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
"""What older files say outside of rope_scaling, and under which names. The second names are GPT-NeoX' own."""
_OLD_TYPES = {"su": "longrope"}
_OFF = {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0}
"""What null means of keys that have another default; of flags it means false."""
_MAY_BE_NULL = (
    *("head_dim", "num_key_value_heads", "num_kv_heads", "n_head_kv", "n_inner", "ffn_hidden_size"),
    *("sliding_window", "rope_parameters", "rope_scaling", "hidden_size_per_layer_input", "num_nextn_predict_layers"),
    *("moe_layer_end_index", "num_ln_in_parallel_attn"),
)
"""Keys of which null is as if they, and their default, were not there. No model runs with null of the others."""


class Settings:
    """Reads config.json. A model of text and images has its text model's numbers in text_config.

    A key that is not there has the default that transformers' configuration class has. Null is what it means there:
    never that default. All getters raise FormatError for a value of another kind, or beyond its bounds, and for none
    where one is needed.
    """

    def __init__(self, path: Path, values: Mapping[str, Json], defaults: Mapping[str, Any]) -> None:
        self.path = path
        text = values.get("text_config")
        self.stated: dict[str, Any] = {**values, **(text if isinstance(text, dict) else {})}
        self._defaults = defaults
        self.layers = self.integer("num_hidden_layers n_layer n_layers num_layers", min=1, max=MAX_LAYERS)
        self.heads = self.integer("num_attention_heads n_head n_heads", min=1)

    def find(self, names: str) -> tuple[str, Any] | None:
        """The first of these keys, apart by blanks, that the file has or that has a default, and its value."""
        found = self._first(names, self.stated)
        if found:
            return found
        default = self._first(names, self._defaults)
        null = self._null(names)
        return self._of_null(null, default[1]) if null and default else default

    def _first(self, names: str, values: Mapping[str, Any]) -> tuple[str, Any] | None:
        return next(((name, values[name]) for name in names.split() if values.get(name) is not None), None)

    def _null(self, names: str) -> str | None:
        """The first of these keys that the file has; for keys that have no value."""
        return next((name for name in names.split() if name in self.stated), None)

    def _of_null(self, name: str, default: Any) -> tuple[str, Any] | None:
        """What null means of a key with such a default. Raises FormatError where no model runs with it."""
        if name in _MAY_BE_NULL:
            return None
        if type(default) is not bool and name not in _OFF:
            self.refuse(name, "a value", None)
        return name, _OFF.get(name, False)

    def check_alike(self, names: str) -> None:
        """Raises FormatError if two of these keys have different values."""
        found = [(name, self.stated[name]) for name in names.split() if self.stated.get(name) is not None]
        for name, value in found[1:]:
            if value != found[0][1]:
                raise FormatError(
                    f"{self.path}: {found[0][0]} = {show_json(found[0][1])}, and {name} = {show_json(value)}, which is "
                    "another name of it: take out what is wrong"
                )

    def has(self, names: str) -> bool:
        return self.find(names) is not None

    def integer(self, names: str, default: int | None = None, *, min: int = 0, max: int = MAX_INT) -> int:
        name, value = self._found(names, default)
        if type(value) is float and value.is_integer():  # some files say 1e6
            value = int(value)
        if type(value) is not int or not min <= value <= max:
            self.refuse(name, f"an integer from {min} to {max}", value)
        return value

    def number(
        self, names: str, default: float | None = None, *, min: float = -math.inf, max: float = math.inf
    ) -> float:
        name, value = self._found(names, default)
        return self.checked_number(name, value, min, max)

    def checked_number(self, name: str, value: Any, min: float = -math.inf, max: float = math.inf) -> float:
        """The value, if it is a number of float32 within the bounds."""
        if type(value) not in (int, float) or not abs(value) <= 3e38 or not min <= value <= max:
            self.refuse(name, "a number" + (f" from {min} to {max}" if math.isfinite(min + max) else ""), value)
        return float(value)

    def flag(self, names: str, default: bool | None = None) -> bool:
        name, value = self._found(names, default)
        if type(value) is not bool:
            self.refuse(name, "true or false", value)
        return value

    def text(self, names: str) -> str:
        name, value = self._found(names, None)
        if type(value) is not str:
            self.refuse(name, "a string", value)
        return value

    def per_layer(self, name: str) -> list[Any]:
        """A list with an entry for each layer; one for layers that are not there may follow."""
        value = self._found(name, None)[1]
        if type(value) is not list or len(value) < self.layers:
            self.refuse(name, f"a list for {self.layers} layers", value)
        return value[: self.layers]

    def numbers(self, name: str, value: Any, count: int) -> list[float]:
        """A list of so many numbers, which `name` of the file holds."""
        if type(value) is not list or len(value) != count:
            self.refuse(name, f"a list of {count} numbers", value)
        return [self.checked_number(name, entry) for entry in value]

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        width = self.integer("hidden_size n_embd", min=1)
        return self.integer("head_dim", max(width // self.heads, 1), min=1, max=MAX_HEAD_DIM)

    @property
    def kv_heads(self) -> int:
        return self.integer("num_key_value_heads", self.heads, min=1, max=self.heads)

    def is_local(self) -> list[bool] | None:
        """Whether each layer has a window, or chunks; None where the file does not say."""
        if not self.has("layer_types"):
            return None
        kinds = self.per_layer("layer_types")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
                self.refuse("layer_types", "full_attention, sliding_attention or chunked_attention", kind)
        return [kind != "full_attention" for kind in kinds]

    def rope(self) -> dict[str, Any]:
        """The RoPE settings, in the names of rope_parameters, with rope_theta where it is known.

        Those of layers without a window, where layers have different ones. Files from before transformers 5 have some
        in rope_scaling, and others outside of it.
        """
        found = self._rope_parameters()
        settings = self._with_type(self._object("rope_parameters", found.get("full_attention", found)))
        if self.stated.get("rope_parameters") is not None:
            self._check_older(settings)
        for name in _OLD_ROPE:
            if name not in settings and (found_outside := self.find(self._older_names(name))):
                settings[name] = found_outside[1]
        return settings

    def _older_names(self, name: str) -> str:
        """The names that a number of RoPE has outside of rope_parameters, in this family."""
        first, *others = _OLD_ROPE[name].split()
        return " ".join(other for other in others if other in self._defaults) or first

    def rope_number(self, name: str, min: float, max: float = MAX_INT) -> float:
        """A number without which the kind of RoPE has no meaning."""
        rope = self.rope()
        if name not in rope:
            raise FormatError(f"{self.path}: {name!r} is missing, which rope_type {rope['rope_type']!r:.60} needs")
        return self.checked_number(name, rope[name], min, max)

    def _with_type(self, settings: dict[str, Any]) -> dict[str, Any]:
        """RoPE settings without nulls, and with their kind under its present name."""
        found = {name: value for name, value in settings.items() if value is not None}
        older = found.pop("type", "default")
        kind = found.setdefault("rope_type", older)
        if type(kind) is not str:
            self.refuse("rope_type", "a string", kind)
        return found | {"rope_type": _OLD_TYPES.get(kind, kind)}

    def _check_older(self, settings: dict[str, Any]) -> None:
        """Raises FormatError if the keys that transformers 4 reads say another RoPE than rope_parameters."""
        older = {}
        for name in _OLD_ROPE:
            found = self._first(self._older_names(name), self.stated)
            if found and name in settings:
                older[name] = found[1]
        scaling = self.stated.get("rope_scaling")
        if scaling is not None:
            newer = {name: value for name, value in settings.items() if name not in _OLD_ROPE}
            older = dict.fromkeys(newer) | older | self._with_type(self._object("rope_scaling", scaling))
        for name, value in older.items():
            if settings.get(name) != value:
                raise FormatError(
                    f"{self.path}: rope_parameters says {show(name)} = {show_json(settings.get(name))}, and the older "
                    f"keys {show_json(value)}: take out what is wrong"
                )

    def local_rope(self) -> dict[str, Any]:
        """The RoPE settings of layers with a window, where they have their own; else empty."""
        found = self._rope_parameters()
        if "sliding_attention" in found:
            return self._with_type(self._object("rope_parameters.sliding_attention", found["sliding_attention"]))
        if "rope_local_base_freq" in self._defaults and self.has("rope_local_base_freq"):
            return {"rope_theta": self.number("rope_local_base_freq", min=1.0)}
        return {}

    def _rope_parameters(self) -> dict[str, Any]:
        found = self.find("rope_parameters rope_scaling")
        return self._object(*found) if found else {}

    def object(self, name: str) -> dict[str, Any]:
        """An object; without one an empty one."""
        value = self.stated.get(name)
        return {} if value is None else self._object(name, value)

    def _object(self, name: str, value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            self.refuse(name, "an object", value)
        return dict(value)

    def of_global_layers(self, name: str, overall: str) -> int:
        """A number of Gemma 4's layers without a window: `overall`, or what per_layer_config says of the first one."""
        if self.has(overall):
            return self.integer(overall, min=1, max=MAX_HEAD_DIM)
        configs = self.stated.get("per_layer_config") or {}
        if type(configs) is not dict:
            self.refuse("per_layer_config", "an object", configs)
        for layer, is_local in enumerate(self.is_local() or []):
            config = configs.get(str(layer), configs.get(f"{layer:02}"))
            if not is_local and type(config) is dict and name in config:
                if type(config[name]) is not int or not 0 < config[name] <= MAX_HEAD_DIM:
                    self.refuse(f"per_layer_config.{layer}.{name}", "a whole number", config[name])
                return int(config[name])
        return self.integer(name, min=1, max=MAX_HEAD_DIM)

    @property
    def rotary_share(self) -> float:
        """The share of a head that rotates."""
        return self.checked_number("partial_rotary_factor", self.rope().get("partial_rotary_factor", 1.0), 0.0, 1.0)

    def expect(self, name: str, values: tuple[Any, ...]) -> None:
        """Raises UnsupportedError if a key is there and has none of these values."""
        value = self.stated.get(name)
        if value is not None and value not in values:
            raise UnsupportedError(f"{self.path}: {name} = {show_json(value)} is not supported")

    def refuse(self, name: str, expected: str, value: Any) -> NoReturn:
        raise FormatError(f"{self.path}: {show(name)} should be {expected}, not {show_json(value)}")

    def _found(self, names: str, default: Any) -> tuple[str, Any]:
        found = self.find(names)
        if found:
            return found
        if default is None:
            raise FormatError(f"{self.path}: {names.split()[0]!r} is missing")
        null = self._null(names)
        return (self._of_null(null, default) if null else None) or (names.split()[0], default)
