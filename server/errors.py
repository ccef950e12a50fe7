"""Every error this project raises on purpose, as one tree. HTTP statuses live in `api/errors.py`, not here.

LoraMixerError
  + ConfigError                  adapters.yaml, flags or environment are wrong
  + ModelLoadError               the base model cannot be loaded or served
  + InvalidRequestError          a request is malformed or out of range
    - ContextLengthError         prompt (plus max_tokens) does not fit the context
  + ModelNotFoundError           `model` names nothing that is served
  + PayloadTooLargeError         request body over the limit
  + AuthenticationError          API key missing or wrong
  + PermissionDeniedError        the caller may not do this (admin routes, paths outside the adapter roots)
  + OverloadedError              admission limits reached; retry later
    - TooManyRegistrationsError  too many registrations under way; retry later
    - AdapterMemoryError         an adapter has no place in memory now; retry later
  + NotReadyError                starting or draining
  + AdapterNotFoundError         no adapter of that name
  + AdapterConflictError         the name is taken by other content, or the operation collides with another
  + PreconditionFailedError      the adapter is not the one that If-Match names
  + AdapterDownloadError         a Hub source could not be fetched
  + AdapterRefusedError          an adapter cannot be served; carries every reason
  + RouterArtefactError          a router artefact is damaged or belongs to another base, roster or format
  + RegistryFileError            what is to survive a restart cannot be written
  + EngineError                  a step failed; the request ended with an error event
"""

from collections.abc import Sequence
from dataclasses import dataclass


class LoraMixerError(Exception):
    """Base class. `param` names the offending field; `code` is a stable machine-readable word."""

    default_code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code


class ConfigError(LoraMixerError):
    """adapters.yaml, a flag or an environment variable is wrong; the message names it."""

    default_code = "invalid_config"


class ModelLoadError(LoraMixerError):
    """The base model cannot be loaded or served; the message says why and what to change."""

    default_code = "model_load_failed"


class InvalidRequestError(LoraMixerError):
    """A request is malformed, out of range or asks for something unsupported."""

    default_code = "invalid_request"


class ContextLengthError(InvalidRequestError):
    """The prompt, or prompt plus `max_tokens`, does not fit the context window."""

    default_code = "context_length_exceeded"


class ModelNotFoundError(LoraMixerError):
    """`model` is neither `auto`, the base model nor a ready adapter."""

    default_code = "model_not_found"


class PayloadTooLargeError(LoraMixerError):
    """The request body is larger than `max_body_bytes`."""

    default_code = "payload_too_large"


class AuthenticationError(LoraMixerError):
    """The API key is missing or wrong."""

    default_code = "invalid_api_key"


class PermissionDeniedError(LoraMixerError):
    """The caller is known but may not do this."""

    default_code = "permission_denied"


class OverloadedError(LoraMixerError):
    """An admission limit is reached. `retry_after_s` is a hint for the Retry-After header."""

    default_code = "server_overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class TooManyRegistrationsError(OverloadedError):
    """As many adapters are loading as may load at once."""

    default_code = "too_many_registrations"


class AdapterMemoryError(OverloadedError):
    """Adapters that a request needs are on disk, and there was no room for them in memory."""

    default_code = "adapter_memory_full"


class NotReadyError(LoraMixerError):
    """The server is starting or draining."""

    default_code = "not_ready"


class AdapterNotFoundError(LoraMixerError):
    """No adapter of that name is registered."""

    default_code = "adapter_not_found"


class AdapterConflictError(LoraMixerError):
    """The name is taken by other content, or another operation on it is under way."""

    default_code = "adapter_conflict"


class PreconditionFailedError(LoraMixerError):
    """The adapter is not the generation that the caller wants to change."""

    default_code = "precondition_failed"


class AdapterDownloadError(LoraMixerError):
    """A Hub source could not be resolved or downloaded."""

    default_code = "adapter_download_failed"


@dataclass(frozen=True)
class RefusalReason:
    """One reason why an adapter cannot be served: a stable `code`, a sentence, and where it stands."""

    code: str
    message: str
    where: str


class AdapterRefusedError(LoraMixerError):
    """An adapter cannot be served. `reasons` holds every reason, never only the first."""

    default_code = "adapter_refused"

    def __init__(self, name: str, reasons: Sequence[RefusalReason]) -> None:
        listed = "; ".join(f"[{r.code}] {r.message} ({r.where})" for r in reasons)
        super().__init__(f"adapter {name!r} cannot be served: {listed}")
        self.name = name
        self.reasons = tuple(reasons)


class RouterArtefactError(LoraMixerError):
    """A router artefact is damaged, or belongs to another base model, roster or format version."""

    default_code = "router_refused"


class RegistryFileError(LoraMixerError):
    """A file that what was acknowledged is kept in cannot be written: a full or read-only disk. Nothing was changed, or
    what had been registered cannot serve.
    """

    default_code = "registry_not_writable"


class EngineError(LoraMixerError):
    """A model step failed; requests that were in it ended with an error event.

    `sequence_ids` names the guilty sequences: only they end, their batch mates are computed again. Empty means all.
    """

    default_code = "engine_error"

    def __init__(self, message: str, *, sequence_ids: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.sequence_ids = tuple(sequence_ids)
