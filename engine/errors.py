"""Every refusal and failure as a type of its own. A message says what was wrong and what is allowed."""


class StockadeError(Exception):
    """Base of everything this package raises on purpose."""


# What a caller may have sent wrongly: the engine goes on as if nothing had happened.


class BadInput(StockadeError, ValueError):
    """The request is refused before any model work."""


class EmptyChat(BadInput):
    """A chat without messages, or whose last message has nothing to answer."""


class UnknownRole(BadInput):
    """A message's role is not one of system, user, assistant."""


class InvalidMessage(BadInput):
    """A message or a part of it has a shape no chat format knows."""


class PromptTooLong(BadInput):
    """The prompt leaves no room for one token in the model's context."""


class TooManyImageTokens(PromptTooLong):
    """A prompt's images alone become more tokens than the model's context has."""


class InvalidSampling(BadInput):
    """A sampling parameter is outside its range, or two contradict each other."""


class DoesNotFit(BadInput):
    """The request needs more pages than the pool has in all."""


class ImagesNotSupported(BadInput):
    """An image for a model that reads text only."""


class TooManyImages(BadInput):
    """More images in one chat than the model takes."""


class UnknownModel(BadInput):
    """A pass names a model this engine does not have."""


class UnknownRequest(BadInput, KeyError):
    """No request with this id is under way."""


class InvalidGuard(BadInput):
    """A guard asks for something this engine or this guard cannot do."""


class BadImage(BadInput):
    """Base of everything that can be wrong with an image."""


class UnreadableImage(BadImage):
    """Not an image, or missing, or damaged."""


class TruncatedImage(UnreadableImage):
    """The image's data ends early."""


class ImageTooLarge(BadImage):
    """More bytes than allowed; checked before decoding."""


class TooManyPixels(BadImage):
    """More pixels than allowed; checked before decoding."""


class AnimatedImage(BadImage):
    """More than one frame."""


class UnsupportedImage(BadImage):
    """A format, a URL scheme or a Python type that is not accepted as an image."""


# What a checkpoint may be wrong with.


class CheckpointError(StockadeError):
    """Base of everything that can be wrong with a checkpoint."""


class CheckpointMissing(CheckpointError, FileNotFoundError):
    """A folder or a file of a checkpoint is not there."""


class CheckpointTruncated(CheckpointError):
    """A weight file ends before the tensors its header names, or is no such file."""


class CheckpointMismatch(CheckpointError):
    """Tensors are missing, left over or of another shape than the configuration says."""


class UnsafeCheckpoint(CheckpointError):
    """A pickle that holds more than tensors, or a checkpoint that wants its own code to run."""


class UnknownArchitecture(CheckpointError):
    """No decoder family of this engine matches the checkpoint's configuration."""


class CannotQuantize(CheckpointError):
    """Weights or pages of 8 bits are asked for where the device does not know them, or the model has no such form."""


class CacheWriteFailed(StockadeError, OSError):
    """The cache folder could not be written (full disk, permissions); nothing half-written stays."""


# What may go wrong while a request runs. A guard's loop turns these into a refusal with a reason.


class PassError(StockadeError):
    """A pass could not be finished."""


class PassTimeout(PassError):
    """A pass was still running at its deadline."""


class TooLong(PassError):
    """The text of a pass is longer than its model's context."""


class Aborted(PassError):
    """The request was aborted."""


# What an engine that serves many may answer instead of a reply.


class Unavailable(StockadeError):
    """Base: nothing is wrong with the request, but it was not answered."""


class Overloaded(Unavailable):
    """More requests are under way than are let in. `retry_after`: seconds after which there may be room."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(Unavailable):
    """The engine is shutting down, or the thread that steps it has died."""


class DeviceLost(Unavailable):
    """The GPU has failed, and computes nothing more for this process: only a new one helps."""


class ReplicaLost(Unavailable):
    """The process that was answering has died, and what it had said cannot be taken back or said anew."""


class DeadlineExceeded(Unavailable, TimeoutError):
    """The request's time was over before its reply was there."""


# What only a server refuses.


class Unauthorized(StockadeError):
    """No API key, or one that is not known."""


class RateLimited(Overloaded):
    """This key has sent too many requests, or has too many under way."""


class RequestTooLarge(StockadeError):
    """The body has more bytes than allowed."""


class SlowClient(StockadeError):
    """The client sends or reads too slowly."""


class AuditFailed(Unavailable):
    """A decision could not be written to the audit log, hence nothing of it may leave."""


class AuditBroken(StockadeError):
    """An audit log misses lines, or has lines that were altered."""


# What an exported detector may be refused for.


class MissingExtra(StockadeError, ImportError):
    """A package is not installed that only an extra of this package brings."""


class DetectorClosed(PassError):
    """The detector was closed and gives no more scores."""
