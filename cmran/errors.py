"""The exceptions of the project.

```
CmranError            anything that the user can correct; the command prints it in one line and exits with 1
├── ConfigError       a setting or an argument: unknown, out of bounds, contradictory, or not that of a resumed run
├── DataError         a data folder: a file, key, row or value (`cmran.data.faults.FaultError` holds the parts)
├── CheckpointError   a checkpoint or run directory: missing, damaged, of another run or mode
├── ExportError       an ONNX model or a precision variant: not exported by this project, damaged, or other outputs
├── DeviceError       a device, precision or amount of memory that this machine does not have
└── StorageError      a file, folder or database that cannot be read or written
    ├── BusyError     another process uses it
    ├── CacheError    the cache folder; its content can be computed or downloaded again
    └── TrackingError the MLflow tracking store or model registry
```
"""

from cmran.utils.uris import redact


class CmranError(Exception):
    """A condition that the user can correct.

    The message is one line: what was found, where, what was expected, what to do. It names the arguments of the Python
    API in backticks; the command line replaces them by its own flags. Passwords in URIs are hidden.

    Args:
        message: What was found, where, and what was expected.
        hint: What to do. It is appended to the message after a colon.
    """

    def __init__(self, message: str = "", hint: str = "") -> None:
        self.message, self.hint = redact(message), redact(hint)
        super().__init__(f"{self.message}: {self.hint}" if hint else self.message)


class ConfigError(CmranError):
    """A setting or an argument is unknown, out of bounds, contradictory, or differs from the run that is resumed."""


class DataError(CmranError):
    """A data folder lacks a file, or one of its files is damaged or does not fit."""


class CheckpointError(CmranError):
    """A checkpoint or run directory is missing, damaged, or belongs to another run or mode."""


class ExportError(CmranError):
    """An ONNX model is missing or damaged, was not exported by this project, or has other outputs than PyTorch."""


class DeviceError(CmranError):
    """The device, precision or memory that was asked for is not available on this machine."""


class StorageError(CmranError):
    """A file, folder or database cannot be read or written."""


class BusyError(StorageError):
    """Another process is using the resource."""


class CacheError(StorageError):
    """The cache folder cannot be used; what it holds can be computed or downloaded again."""


class TrackingError(StorageError):
    """The MLflow tracking store or the model registry failed."""
