"""Every error that forge raises on purpose. A message is one line: what is wrong, where, and how to fix it."""


class ForgeError(Exception):
    """Base of all forge errors. The command line prints the message alone and exits with 1."""

    def __str__(self) -> str:
        """One line, whatever names it quotes."""
        return super().__str__().replace("\r", "\\r").replace("\n", "\\n")


class ParameterError(ForgeError, ValueError):
    """An argument has a value that cannot be used. Names the parameter; the command line exits with 2."""


class ContextLengthError(ForgeError, ValueError):
    """A prompt does not fit the context."""


class ModelNotFoundError(ForgeError):
    """No model has this name or path."""


class DownloadError(ForgeError):
    """A model could not be fetched or does not match its checksum."""


class FormatError(ForgeError):
    """A model file is truncated, forged, foreign or not readable."""


class UnsupportedError(ForgeError):
    """A well-formed file asks for something forge does not have (an architecture, a tensor type, a tokenizer)."""


class TokenizerError(ForgeError):
    """Text or ids cannot be converted."""


class ChatTemplateError(ForgeError):
    """A chat template is missing, fails, or exceeds its limits."""


class DeviceError(ForgeError):
    """The device asked for is not there or cannot be used."""


class OutOfMemoryError(ForgeError):
    """Weights or KV cache do not fit; the message holds the bytes needed and free."""


class NumericsError(ForgeError):
    """A model computes infinite or NaN logits: its weights are damaged or out of range."""
